"""Pictures in files: which there are, how one is read right, and many of them by worker processes.

`find` lists a folder; `read` is one picture, RGB and upright; `sound` finds the broken ones before any is needed. A
large set stays in files: `loader` reads its crops ahead.
"""

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.datasets.folder import IMG_EXTENSIONS
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from harness import processes
from harness.augment import crop_boxes, named_draws
from harness.errors import InputError

TURNED_BY_A_QUARTER = (5, 6, 7, 8)  # values of EXIF's orientation that exchange height and width
SECONDS_WITHOUT_MAIN = 30  # for which a worker outlives a SIGTERM


class Files:
    """Pictures of any size that stay in files; `files[rows]` are some of them, as rows of a tensor are."""

    def __init__(self, paths: Sequence[str]):
        self.paths = np.array(paths)

    def __getitem__(self, rows: Tensor) -> "Files":
        return Files(self.paths[rows.cpu().numpy()])

    def to(self, device) -> "Files":
        """Return self: files are read later, so there is nothing to move."""
        return self


# ---- Which pictures there are ----------------------------------------------------------------------------------------


def find(folder: Path) -> list[str]:
    """Return the paths of all pictures below a folder, sorted. Links are followed, but to no folder twice.

    InputError for a folder that may not be read.
    """

    def refuse(e: OSError) -> None:
        raise InputError(f"{e.filename}: cannot be read ({e.strerror})") from e

    paths = []
    visited = set()  # so that a loop of links ends
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real_place = os.path.realpath(place)
        if real_place in visited:
            folders.clear()
            continue
        visited.add(real_place)
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(IMG_EXTENSIONS):
                paths.append(os.path.join(place, name))
    return paths


def find_classes(folder: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Return the sub-folders of a folder but hidden ones, as classes, their pictures, and the class of each.

    InputError for a sub-folder without a picture.
    """
    folders = [entry.name for entry in os.scandir(folder) if entry.is_dir()]
    classes = tuple(sorted(name for name in folders if name[0] != "."))
    paths = []
    labels = []
    for label, name in enumerate(classes):
        paths_of_class = find(folder / name)
        if not paths_of_class:
            raise InputError(
                f"{folder / name}: holds no picture ({', '.join(IMG_EXTENSIONS)}); put pictures in it, or remove it"
            )
        paths += paths_of_class
        labels += [label] * len(paths_of_class)
    return classes, paths, labels


# ---- One picture -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Yield a picture of which the header is read. InputError for whatever goes wrong with it in here."""
    try:
        with Image.open(path) as picture:
            is_integer = picture.mode == "I" and picture.format != "PNG"  # some Pillows open PNGs of 16 bits as "I"
            if picture.mode == "F" or is_integer:
                raise ValueError("32 bits a pixel, of an unknown range")
            yield picture
    except Exception as e:  # Pillow raises errors of many types on broken files
        reason = " ".join(str(e).split())
        raise InputError(f"{path}: not a picture that can be read ({reason})") from e


def read(path: str) -> Tensor:
    """Return a picture as uint8 (3, h, w): RGB, upright as its EXIF says, 16 bits scaled to 8, alpha left out.

    InputError if it cannot be read.
    """
    with opened(path) as picture:
        has_16_bits = picture.mode.startswith("I")
        ImageOps.exif_transpose(picture, in_place=True)
        if has_16_bits:
            picture = _scaled_to_8_bits(picture)
        elif "transparency" in picture.info:
            picture = picture.convert("RGBA")
        if picture.mode != "RGB":
            picture = picture.convert("RGB")
        return F.pil_to_tensor(picture)


def _scaled_to_8_bits(picture: Image.Image) -> Image.Image:
    """Return a picture of 16 bits of grey with 8 bits, rounded; Pillow's own conversion would clip it at 255."""
    grey = np.asarray(picture).astype(np.int64)
    scaled = (grey * 255 + 32767) // 65535
    return Image.fromarray(scaled.astype(np.uint8))


def shape(path: str) -> tuple[int, int]:
    """Return height and width of a picture, upright, from its header. InputError if it cannot be read."""
    with opened(path) as picture:
        width, height = picture.size
        orientation = picture.getexif().get(ExifTags.Base.Orientation, 1)
    if orientation in TURNED_BY_A_QUARTER:
        return width, height
    return height, width


def survey(path: str) -> np.ndarray:
    """Return height and width of a picture, the sums of its three channels in [0, 1], and those of their squares.

    The picture is read for it. InputError if it cannot be read.
    """
    image = read(path)
    channels = image.flatten(1).double() / 255
    sums = channels.sum(1)
    squares = channels.square().sum(1)
    return np.concatenate([image.shape[1:], sums, squares])


# ---- Many pictures ---------------------------------------------------------------------------------------------------


def sound(paths: Sequence[str], look: Callable, skip_broken: bool, n_workers: int = 0) -> tuple[list[int], list]:
    """Return the rows of the pictures that `look` works on, one of `shape`, `read`, `survey`, and what it returns.

    InputError for the first that it does not work on, unless these are to be skipped: then they are named.
    """
    attempts = DataLoader(
        _Attempts(paths, look),
        batch_size=None,
        collate_fn=tuple,
        num_workers=n_workers,
        worker_init_fn=_leave_signals_to_main,
    )
    bar = tqdm(
        attempts,
        desc=f"{look.__name__} of pictures",
        delay=2,
        leave=False,
        disable=not processes.is_main(),
    )
    rows = []
    answers = []
    faults = []
    for row, (answer, fault) in enumerate(bar):
        if not fault:
            rows.append(row)
            answers.append(answer)
        elif skip_broken:
            faults.append(fault)
        else:
            raise InputError(f"{fault}; --skip_broken leaves such pictures out")
    if faults:
        processes.say("\n  ".join([f"skipped {len(faults)} of {len(paths)} pictures:", *faults]))
    return rows, answers


@dataclass
class _Attempts:
    """What `look` returns for a picture, or why it returns nothing: errors would end a worker."""

    paths: Sequence[str]
    look: Callable

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple:
        try:
            return self.look(self.paths[row]), ""
        except InputError as e:
            return 0, str(e)


def workers() -> int:
    """Return how many processes read pictures ahead, for each of those that train."""
    return min(16, processes.cores())


def _leave_signals_to_main(_) -> None:
    """Let a worker outlive the signal that asks for the end of the run.

    Ctrl-C and job schedulers signal all processes at once. The main process still finishes its step, for which it needs
    its workers, and ends them itself. If it is killed before that, an alarm ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_WITHOUT_MAIN))


def loader(pictures, keys: Iterator, device: torch.device) -> Iterator:
    """Yield batches of `pictures`, one for each list of keys, read ahead by processes of their own.

    InputError for a picture that cannot be read.
    """
    batches = DataLoader(
        pictures,
        batch_sampler=keys,
        num_workers=workers(),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_main,
    )
    try:
        yield from batches
    except InputError as e:  # its text is the traceback in the worker, whose last line is "...InputError: message"
        last_line = str(e).strip().splitlines()[-1]
        raise InputError(last_line.partition("InputError: ")[2]) from None


@dataclass
class Crops:
    """Random resized crops and flips, uint8 (views, 3, size, size), of pictures in files.

    A key is a row and the draws of its views, (views, DRAWS_PER_IMAGE).
    """

    paths: np.ndarray
    size: int

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Tensor:
        row, u = key
        image = read(str(self.paths[row]))
        height, width = image.shape[1:]
        draws = named_draws(torch.from_numpy(u))
        boxes = crop_boxes(draws["area"], draws["aspect"], draws["corner"], height, width)
        size = [self.size, self.size]
        crops = []
        for box, flip in zip(boxes.tolist(), draws["flip"]):
            crop = F.resized_crop(image, *box, size, InterpolationMode.BICUBIC, antialias=True)
            crops.append(crop.flip(2) if flip < 0.5 else crop)
        return torch.stack(crops)


@dataclass
class Centres:
    """Central squares, uint8 (3, size, size), of pictures in files, shrunk to size / crop pixels before.

    A key is a row.
    """

    paths: np.ndarray
    size: int
    crop: float

    def __getitem__(self, row: int) -> Tensor:
        image = read(str(self.paths[row]))
        side = round(self.size / self.crop)  # of the shorter one
        image = F.resize(image, [side], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(image, [self.size, self.size])
