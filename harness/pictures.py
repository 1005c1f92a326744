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
from harness.augment import DRAWS, crop_boxes


class DataError(ValueError):
    """A data set that is not there, or is not what a data set has to be."""


class Files:
    """Pictures of any size that stay in files; `files[rows]` are some of them, as rows of a tensor are."""

    def __init__(self, paths: Sequence[str]):
        self.paths = np.array(paths)

    def __getitem__(self, rows: Tensor) -> "Files":
        return Files(self.paths[rows.cpu().numpy()])

    def to(self, device) -> "Files":
        """Themselves: they are not on a device before they are read."""
        return self


def find(folder: Path) -> list[str]:
    """Paths of all pictures below a folder, sorted. Links are followed, but to no folder twice. DataError."""

    def refuse(e: OSError) -> None:
        raise DataError(f"{e.filename}: cannot be read ({e.strerror})") from e

    found, been = [], set()
    for place, below, names in os.walk(folder, followlinks=True, onerror=refuse):
        if (real := os.path.realpath(place)) in been:
            below.clear()
            continue
        been.add(real)
        below.sort()
        found += [os.path.join(place, name) for name in sorted(names) if name.lower().endswith(IMG_EXTENSIONS)]
    return found


def find_classes(folder: Path) -> tuple[tuple[str, ...], list[str], list[int]]:
    """The sub-folders of a folder but hidden ones, as classes, their pictures, and the class of each.

    DataError for one without a picture.
    """
    classes = tuple(sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and entry.name[0] != "."))
    paths, labels = [], []
    for label, name in enumerate(classes):
        found = find(folder / name)
        if not found:
            raise DataError(f"{folder / name}: holds no picture ({', '.join(IMG_EXTENSIONS)}), and is no class")
        paths, labels = paths + found, labels + [label] * len(found)
    return classes, paths, labels


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """A picture of which the header is read. DataError for whatever goes wrong with it in here."""
    try:
        with Image.open(path) as picture:
            if picture.mode == "F" or (picture.mode == "I" and picture.format != "PNG"):
                raise ValueError("32 bits a pixel, whose range is not known")
            yield picture
    except Exception as e:  # Pillow raises errors of many types on broken files
        raise DataError(f"{path}: not a picture that can be read ({' '.join(str(e).split())})") from e


def read(path: str) -> Tensor:
    """A picture as uint8 (3, h, w): RGB, upright as its EXIF says, 16 bits scaled to 8, alpha left out. DataError."""
    with opened(path) as picture:
        deep = picture.mode.startswith("I")  # 16 bits of grey, which Pillow would clip at 255
        ImageOps.exif_transpose(picture, in_place=True)
        if deep:
            grey = np.asarray(picture).astype(np.int64)
            picture = Image.fromarray(((grey * 255 + 32767) // 65535).astype(np.uint8))
        elif "transparency" in picture.info:
            picture = picture.convert("RGBA")
        return F.pil_to_tensor(picture if picture.mode == "RGB" else picture.convert("RGB"))


def shape(path: str) -> tuple[int, int]:
    """Height and width of a picture, upright, from its header. DataError."""
    with opened(path) as picture:
        turned = picture.getexif().get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8)
        return picture.size if turned else picture.size[::-1]


def survey(path: str) -> np.ndarray:
    """Height and width of a picture that is read for it, then sums of its channels in [0, 1], then of their squares."""
    x = read(path)
    channels = x.flatten(1).double() / 255
    return np.concatenate([x.shape[1:], channels.sum(1), channels.square().sum(1)])


def sound(paths: Sequence[str], how: Callable, skip_broken: bool, workers: int = 0) -> tuple[list[int], list]:
    """Rows of the pictures that `how`, one of `shape`, `read`, `survey`, works on, and what it says of each.

    DataError for the first that it does not work on, unless these are to be skipped: then they are named.
    """
    rows, said, broken = [], [], []
    tried = _Tried(paths, how)
    looks = DataLoader(tried, batch_size=None, collate_fn=tuple, num_workers=workers, worker_init_fn=_patient)
    bar = {"desc": f"{how.__name__} of pictures", "delay": 2, "leave": False, "disable": not processes.is_main()}
    for row, (answer, why) in enumerate(tqdm(looks, **bar)):
        if why and not skip_broken:
            raise DataError(f"{why}; --skip_broken leaves such pictures out")
        if why:
            broken.append(why)
        else:
            rows.append(row)
            said.append(answer)
    if broken:
        processes.say("\n  ".join([f"skipped {len(broken)} of {len(paths)} pictures:", *broken]))
    return rows, said


@dataclass
class _Tried:
    """What `how` says of a picture, and why it says nothing."""

    paths: Sequence[str]
    how: Callable

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, row: int) -> tuple:
        try:
            return self.how(self.paths[row]), ""
        except DataError as e:
            return 0, str(e)


def workers() -> int:
    """Processes that read pictures ahead, for each of those that train."""
    return min(16, processes.cores())


def _patient(_) -> None:
    """Leave signals to the main process, which finishes its step; a worker that it does not end ends 30 s later."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))


def loader(pictures, keys: Iterator, device: torch.device) -> Iterator:
    """Batches of `pictures`, read ahead by processes of their own. DataError for a picture that cannot be read."""
    how = {"num_workers": workers(), "pin_memory": device.type == "cuda", "worker_init_fn": _patient}
    try:
        yield from DataLoader(pictures, batch_sampler=keys, **how)
    except DataError as e:  # its text is the traceback in the worker
        raise DataError(str(e).strip().splitlines()[-1].partition("DataError: ")[2]) from None


@dataclass
class Crops:
    """Random resized crops and flips, uint8 (views, 3, size, size), of pictures in files, by (row, u)."""

    paths: np.ndarray
    size: int

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Tensor:
        row, u = key
        image = read(str(self.paths[row]))
        area, aspect, corner, flip = torch.from_numpy(u).split(DRAWS, 1)[:4]
        boxes = crop_boxes(area, aspect, corner, *image.shape[1:]).tolist()
        shape = [self.size, self.size]
        crops = [F.resized_crop(image, *box, shape, InterpolationMode.BICUBIC, antialias=True) for box in boxes]
        return torch.stack([x.flip(2) if f < 0.5 else x for x, f in zip(crops, flip)])


@dataclass
class Centres:
    """Central squares, uint8 (3, size, size), of pictures in files, shrunk to size / crop pixels before, by row."""

    paths: np.ndarray
    size: int
    crop: float

    def __getitem__(self, row: int) -> Tensor:
        image = read(str(self.paths[row]))
        image = F.resize(image, [round(self.size / self.crop)], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(image, [self.size, self.size])
