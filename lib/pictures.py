"""Pictures in files: which there are, how one is read right, and many of them, ahead, by worker processes."""

import contextlib
import functools
import os
import shutil
import signal
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, tee
from pathlib import Path

import numpy as np
import torch
from PIL import ExifTags, Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm

from lib import processes
from lib.augment import crop_boxes
from lib.errors import InputError

FORMAT_BY_SUFFIX = Image.registered_extensions()  # of all formats of Pillow, by its names, which it loads here
# It opens others as well, which hold pages, films or measured fields, and for one of them it runs another program.
FORMATS = sorted({*Image.ID} & {*"AVIF BMP DIB GIF JPEG JPEG2000 PCX PNG PPM QOI TGA TIFF WEBP".split()})
TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # Image.Transpose that makes upright, by the orientation in EXIF
WHITE = 2**16 - 1  # of a picture of 16 bits, where nothing else is known
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information")
SHARED_MEMORY = "/dev/shm"  # through which workers hand over batches
BYTES_A_WORKER = 2**29  # room there: two batches of 512 pairs of 224 x 224 pixels, and two of an evaluation


class Files:
    """Pictures of any size that stay in files; `files[rows]` are some of them, as rows of a tensor are.

    `white` is the value that is white in those of 16 bits; `workers` processes read them; 0: this one does.
    """

    def __init__(self, paths: Sequence[str], white: int = WHITE, workers: int = 0):
        self.paths = np.array(paths)
        self.white = white
        self.workers = workers

    def __getitem__(self, rows: Tensor) -> "Files":
        return Files(self.paths[rows.cpu().numpy()], self.white, self.workers)

    def to(self, device) -> "Files":
        """Return self: files are read later, so there is nothing to move."""
        return self


# ---- Which pictures there are ----------------------------------------------------------------------------------------
def is_hidden(name: str) -> bool:
    """Whether the system or a program left a file or folder: ._1.png, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def find(folder: str | Path, left_out: Counter, places: dict[str, str]) -> list[str]:
    """Return the paths of all pictures below a folder, sorted: those in it, then those of its sub-folders.

    Links are followed, but to no folder twice, and to none above the first one, which holds the other classes. Counts
    in `left_out` files that are no pictures, by the reason, and adds to `places`, empty at first, the folders by their
    real paths. OSError for a folder that may not be read.
    """
    real_folder = os.path.realpath(folder)
    is_above = Path(next(iter(places), "")).is_relative_to(real_folder)
    if is_above:
        left_out["linked to a folder above"] += 1
    if is_above or real_folder in places:
        return []
    places[real_folder] = str(folder)
    paths, folders = [], []
    for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
        suffix = os.path.splitext(entry.name)[1].lower()
        if is_hidden(entry.name):
            left_out["hidden"] += 1
        elif entry.is_dir():
            folders.append(entry.path)
        elif FORMAT_BY_SUFFIX.get(suffix) in (*FORMATS, "MPO"):  # which is opened as JPEG
            paths.append(entry.path)
        else:
            left_out[f"named *{suffix}" if suffix else "without a suffix"] += 1
    for sub_folder in folders:
        paths += find(sub_folder, left_out, places)
    return paths


# ---- One picture -----------------------------------------------------------------------------------------------------
@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Yield a picture of which the header is read. InputError for whatever goes wrong with it in here."""
    try:
        # Not Image.open(path): Pillow would map plain TIFFs into memory, and mix up the rows of those that are turned.
        # Only the formats above, whatever the file is called.
        with open(path, "rb") as file, Image.open(file, formats=FORMATS) as picture:
            has_32_bits = picture.mode == "I" and picture.format not in ("PNG", "PPM")  # theirs are 16 bits
            if picture.mode == "F" or has_32_bits:
                raise ValueError("fractions or 32 bits, of an unknown range; save it with 8 or 16 bits a pixel")
            yield picture
    except Exception as e:  # Pillow raises errors of many types on broken files
        text = " ".join(str(e).split()).partition(" <")[0]  # Pillow's ends in the file as Python prints it
        reason = getattr(e, "strerror", None) or text  # an OSError's text names the path again
        raise InputError(f"{path}: not a picture that can be read ({reason})") from e


def rgb(path: str, white: int = WHITE) -> Image.Image:
    """Return a picture as RGB of 8 bits, upright by its EXIF, on white; InputError if it cannot be read.

    `white` is the value that is white in a picture of 16 bits.
    """
    with opened(path) as picture:
        picture.load()
        # Not ImageOps.exif_transpose, which writes the EXIF anew, and fails where one of its tags is of another type.
        turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
        if turn is not None:
            picture = picture.transpose(Image.Transpose(turn))
        if picture.mode.startswith("I"):  # 16 bits, all of grey: Pillow gives those of colours as 8 bits
            values = np.asarray(picture).astype(np.int64)
            scaled = (values * 255 + white // 2) // white
            return Image.fromarray(scaled.clip(0, 255).astype(np.uint8)).convert("RGB")
        if not picture.has_transparency_data:
            return picture.convert("RGB")
        picture = picture.convert("RGBA")
        ground = Image.new("RGB", picture.size, "white")
        ground.paste(picture, mask=picture.getchannel("A"))
        return ground


# ---- Many pictures ---------------------------------------------------------------------------------------------------
def by_workers(look: Callable, files: Files) -> Iterator:
    """Yield look(path) of each picture, by workers where there are many, with a bar if it lasts.

    `look` returns no tensors: answers come through pipes, however small the shared memory is.
    """
    n = len(files.paths)
    chunks = [files.paths[i : i + 32] for i in range(0, n, 32)]
    n_workers = min(files.workers, len(chunks) // 2)  # a worker takes as long to start as to look at some
    answers = chain.from_iterable(loader(look, chunks, n_workers, collate_fn=list))
    yield from tqdm(answers, "looking at pictures", n, delay=2, leave=False, disable=not processes.is_main())


def fault_of(path: str) -> str:
    """Say why a picture cannot be read; nothing if it can."""
    try:
        rgb(path)
    except InputError as e:
        return str(e)
    return ""


def white_of(files: Files) -> int:
    """Return the value that is white in those of the pictures that have 16 bits: the last of the bits that all need."""
    highest = max(by_workers(_highest, files))
    return 2 ** max(8, highest.bit_length()) - 1


def _highest(path: str) -> int:
    """Return the highest value of a picture of 16 bits; 0 of any other, by its header."""
    with opened(path) as picture:
        return int(np.asarray(picture).max()) if picture.mode.startswith("I") else 0


def in_memory(files: Files, most_bytes: int) -> Tensor | None:
    """Return pictures as uint8 (n, 3, h, w); None if they are of several sizes, or take more memory than that."""
    images = None
    for row, picture in enumerate(by_workers(functools.partial(rgb, white=files.white), files)):
        width, height = picture.size
        if images is None and 3 * height * width * len(files.paths) <= most_bytes:
            images = torch.empty(len(files.paths), 3, height, width, dtype=torch.uint8)
        if images is None or images.shape[2:] != (height, width):
            return None
        images[row] = F.pil_to_tensor(picture)
    return images


def side_and_histograms(files: Files) -> tuple[int, Tensor]:
    """Return the median of the pictures' shorter sides, and how often each value comes in each channel, (3, 256)."""
    rows = torch.tensor([*by_workers(functools.partial(_side_and_histograms, files.white), files)])
    return int(rows[:, 0].median()), rows[:, 1:].sum(0).view(3, 256)


def _side_and_histograms(white: int, path: str) -> list[int]:
    picture = rgb(path, white)
    return [min(picture.size), *picture.histogram()]


def crops(files: Files, size: int, micro_batches: Iterator, device: torch.device) -> Iterator[tuple]:
    """Yield rows (b,), u (views, b, DRAWS_PER_IMAGE) and crops (b, views, 3, size, size) of micro-batches (rows, u)."""
    read_ahead, now = tee(micro_batches)  # the loader reads ahead; `now` follows its results
    keys = ([*zip(rows.tolist(), u.transpose(0, 1).numpy())] for rows, u in read_ahead)
    make = functools.partial(_crops, files, size)
    batches = loader(make, keys, files.workers, pin_memory=device.type == "cuda")
    for (rows, u), crops in zip(now, batches):
        yield rows, u, crops


def _crops(files: Files, size: int, key: tuple[int, np.ndarray]) -> Tensor:
    """Return random resized crops and flips, uint8 (views, 3, size, size), of a row by the u of its views."""
    row, u = key
    image = F.pil_to_tensor(rgb(files.paths[row], files.white))
    crops = []
    for *box, is_flipped in crop_boxes(torch.from_numpy(u), *image.shape[1:]).tolist():
        crop = F.resized_crop(image, *box, [size, size], InterpolationMode.BICUBIC, antialias=True)
        crops.append(crop.flip(2) if is_flipped else crop)
    return torch.stack(crops)


def centres(files: Files, size: int, crop: float, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the central squares (b, 3, size, size) of all files, in their order, each shrunk to size / crop before."""
    rows = range(len(files.paths))
    keys = (rows[i : i + batch_size] for i in rows[::batch_size])
    make = functools.partial(_centre, files, size, crop)
    yield from loader(make, keys, files.workers, pin_memory=device.type == "cuda")


def _centre(files: Files, size: int, crop: float, row: int) -> Tensor:
    """Return the central square, uint8 (3, size, size), of a row."""
    image = F.pil_to_tensor(rgb(files.paths[row], files.white))
    longest = 8 * min(image.shape[1:])  # 1 x 20,000 pixels, resized whole, would take gigabytes
    image = F.center_crop(image, [min(length, longest) for length in image.shape[1:]])
    image = F.resize(image, [round(size / crop)], InterpolationMode.BICUBIC, antialias=True)  # the shorter side
    return F.center_crop(image, [size, size])


def loader(make: Callable, keys: Iterable, n_workers: int, **options) -> Iterator:
    """Yield make(key) of the keys of each list, a batch, made ahead by workers. InputError for a broken picture."""
    batches = DataLoader(
        _Made(make),
        batch_sampler=keys,
        num_workers=n_workers,
        worker_init_fn=_leave_signals_to_main,
        **options,
    )
    try:
        yield from batches
    except InputError as e:  # a worker's is the traceback there, whose last line is "...InputError: message"
        message = str(e).strip().splitlines()[-1].split("InputError: ", 1)[-1]
        advice = "mend or remove it, or leave it out by --skip_broken of pretrain.py or a judge"
        raise InputError(f"{message}; {advice}") from None


@dataclass
class _Made:
    """What `make` makes of each key, as a DataLoader asks for it."""

    make: Callable

    def __getitem__(self, key) -> object:
        return self.make(key)


def fitting_workers() -> int:
    """Return how many processes can read pictures: one a core, 16 at most, or fewer where shared memory is small."""
    n = min(16, processes.cores())
    if not os.path.ismount(SHARED_MEMORY):  # as on a Mac
        return n
    room = shutil.disk_usage(SHARED_MEMORY).free / processes.processes_here()
    fitting = min(n, int(room / BYTES_A_WORKER))
    if fitting < n:
        fault = f"{SHARED_MEMORY} is small: {fitting} processes read pictures ahead, in place of {n}"
        processes.say(f"{fault}; give it more (docker run --shm-size 8g), or choose a number by --workers")
    return fitting


def _leave_signals_to_main(_) -> None:
    """Let a worker outlive Ctrl-C and SIGTERM, which all processes get: the run finishes its step with its workers."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(30))  # if the main process dies before it ends its workers
