"""Pictures in files: which there are, how one is read right, and many of them by worker processes.

`find` lists a folder; `read` is one picture, RGB and upright; `survey` says what one is like; `sound` finds the broken
ones before any is needed. A large set stays in files: `loader` reads its crops ahead.
"""

import contextlib
import functools
import itertools
import math
import os
import signal
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
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
from lib.augment import crop_boxes, named_draws
from lib.errors import InputError

# Pillow's names of the formats that pictures are kept in. It opens others as well, which hold pages, films or measured
# fields, and for one of them it runs another program.
FORMATS = (
    "AVIF",
    "BMP",
    "DIB",
    "GIF",
    "JPEG",
    "JPEG2000",
    "MPO",
    "PCX",
    "PNG",
    "PPM",
    "QOI",
    "TGA",
    "TIFF",
    "WEBP",
)
TURNS = {  # what makes a picture upright, by its orientation in EXIF
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
WHITE_IS_ZERO = 0  # of a TIFF's tag 262
SYSTEM_FOLDERS = ("__MACOSX", "@eaDir", "#recycle", "$RECYCLE.BIN", "lost+found", "System Volume Information")
# Grey pictures of 16 bits a pixel often hold the 10, 12 or 14 bits of a camera.
BITS = (8, 10, 12, 14, 16)
# What `survey` says of a picture. sums, squares: over the pixels, a number for each channel, in steps of 1 / 255, or of
# 1 / white if the picture is deep. spread: between its lowest and its highest value in one channel, the largest of the
# three. is_deep: has 16 bits a pixel. highest: what `white_of` takes then. is_transparent: some of its pixels are.
SURVEY = np.dtype(
    [
        ("height", np.int64),
        ("width", np.int64),
        ("sums", np.int64, 3),
        ("squares", np.int64, 3),
        ("spread", np.int64),
        ("highest", np.int64),
        ("is_deep", np.int64),
        ("is_transparent", np.int64),
    ]
)
MOST_REASONS = 10  # that one line names
PICTURES_A_CHUNK = 32  # that a worker looks at before it answers
SECONDS_WITHOUT_MAIN = 30  # for which a worker outlives a SIGTERM
SHARED_MEMORY = "/dev/shm"  # through which workers hand over batches
BATCHES_A_WORKER = 2  # that wait there, besides those in use
BATCHES_IN_USE = 2


class Files:
    """Pictures of any size that stay in files; `files[rows]` are some of them, as rows of a tensor are.

    `white` is the value that is white in those of 16 bits, None = see `white_of`.
    """

    def __init__(self, paths: Sequence[str], white: int | None = None):
        self.paths = np.array(paths)
        self.white = white

    def __getitem__(self, rows: Tensor) -> "Files":
        return Files(self.paths[rows.cpu().numpy()], self.white)

    def to(self, device) -> "Files":
        """Return self: files are read later, so there is nothing to move."""
        return self

    def read(self, row: int) -> Tensor:
        """Return one picture, uint8 (3, h, w)."""
        return read(str(self.paths[row]), self.white)


# ---- Which pictures there are ----------------------------------------------------------------------------------------


@functools.cache
def suffixes() -> frozenset[str]:
    """Return how the names of pictures end: .jpg, .png, ..."""
    endings = Image.registered_extensions()
    can_open = {*Image.OPEN, "MPO"} & {*FORMATS}  # MPO is opened as JPEG; AVIF is missing from some Pillows
    return frozenset(ending for ending, name in endings.items() if name in can_open) - {".pfm"}  # not 8 or 16 bits


def is_hidden(name: str) -> bool:
    """Whether a file or folder was left by the system or by a program: ._1.png, .ipynb_checkpoints, __MACOSX."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def find(folder: Path, left_out: Counter | None = None) -> list[str]:
    """Return the paths of all pictures below a folder, sorted. Links are followed, but to no folder twice.

    Adds to `left_out` how many files are not among them, by the reason. InputError for a folder that may not be read.
    """

    def refuse(e: OSError) -> None:
        raise InputError(f"{e.filename}: cannot be read ({e.strerror})") from e

    left_out = Counter() if left_out is None else left_out
    paths = []
    visited = set()  # so that a loop of links ends
    for place, folders, names in os.walk(folder, followlinks=True, onerror=refuse):
        real_place = os.path.realpath(place)
        if real_place in visited:
            folders.clear()
            continue
        visited.add(real_place)
        for name in filter(is_hidden, folders):
            left_out["in hidden folders"] += _pictures_in_hidden(os.path.join(place, name))
        folders[:] = sorted(name for name in folders if not is_hidden(name))
        for name in sorted(names):
            suffix = _suffix(name)
            if suffix not in suffixes():
                if not is_hidden(name):
                    left_out[f"named *{suffix}" if suffix else "without a suffix"] += 1
            elif is_hidden(name):
                left_out["hidden"] += 1
            else:
                paths.append(os.path.join(place, name))
    return paths


def _pictures_in_hidden(folder: str) -> int:
    """Count the pictures below a folder; links are not followed, and what may not be read does not count."""
    n = 0
    for _, _, names in os.walk(folder):
        n += sum(_suffix(name) in suffixes() for name in names)
    return n


def _suffix(name: str) -> str:
    return os.path.splitext(name)[1].lower()


def class_folders(folder: Path) -> tuple[str, ...]:
    """Return the names of the sub-folders of a folder but hidden ones, sorted; none if it is not there.

    InputError for a folder that may not be read.
    """
    if not folder.is_dir():
        return ()
    try:
        with os.scandir(folder) as entries:
            return tuple(sorted(entry.name for entry in entries if entry.is_dir() and not is_hidden(entry.name)))
    except OSError as e:
        raise InputError(f"{folder}: cannot be read ({e.strerror})") from e


def find_classes(folder: Path, left_out: Counter | None = None) -> tuple[tuple[str, ...], list[str], list[int]]:
    """Return the classes of a folder, their pictures, and the class of each.

    Adds to `left_out` as `find` does. InputError for a class without a picture.
    """
    left_out = Counter() if left_out is None else left_out
    classes = class_folders(folder)
    paths = []
    labels = []
    for label, name in enumerate(classes):
        left_out_of_class = Counter()
        paths_of_class = find(folder / name, left_out_of_class)
        if not paths_of_class:
            raise InputError(
                f"{folder / name}: holds no picture (left out: {in_words(left_out_of_class)}); put pictures in it "
                f"({', '.join(sorted(suffixes()))}), or remove it"
            )
        paths += paths_of_class
        labels += [label] * len(paths_of_class)
        left_out.update(left_out_of_class)
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_dir() and is_hidden(entry.name):
                left_out["in hidden folders"] += _pictures_in_hidden(entry.path)
            elif not entry.is_dir() and _suffix(entry.name) in suffixes():
                left_out["hidden" if is_hidden(entry.name) else "beside the folders of the classes"] += 1
    return classes, paths, labels


def in_words(left_out: Counter) -> str:
    """Return what was left out in words: 4 named *.txt, 2 in hidden folders."""
    by_number = sorted((-n, reason) for reason, n in left_out.items() if n)
    reasons = [f"{-n} {reason}" for n, reason in by_number[:MOST_REASONS]]
    others = -sum(n for n, _ in by_number[MOST_REASONS:])
    if others:
        reasons.append(f"{others} others")
    return ", ".join(reasons) or "nothing"


# ---- One picture -----------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def opened(path: str) -> Iterator[Image.Image]:
    """Yield a picture of which the header is read. InputError for whatever goes wrong with it in here."""
    try:
        # Not Image.open(path): Pillow would map plain TIFFs into memory, and mix up the rows of those that are turned.
        # Only the formats above, whatever the file is called.
        with open(path, "rb") as file, Image.open(file, formats=_opened_formats()) as picture:
            if picture.mode == "F":
                raise ValueError("fractions, of an unknown range; save it with 8 or 16 bits")
            if picture.mode == "I" and picture.format not in ("PNG", "PPM"):  # which have 16 bits, though some as "I"
                raise ValueError("32 bits a pixel, or negative ones, of an unknown range; save it with 8 or 16 bits")
            yield picture
    except Exception as e:  # Pillow raises errors of many types on broken files
        reason = " ".join(str(e).split())
        raise InputError(f"{path}: not a picture that can be read ({reason})") from e


@functools.cache
def _opened_formats() -> list[str]:
    """Return those of FORMATS that this Pillow opens, in its order; MPO is opened as JPEG."""
    Image.init()
    return [name for name in Image.ID if name in FORMATS and name in Image.OPEN]


def read(path: str, white: int | None = None) -> Tensor:
    """Return a picture as uint8 (3, h, w): RGB, upright as its EXIF says, 16 bits scaled to 8, on a white ground.

    `white` is the value that is white in a picture of 16 bits; None = by its highest value, see `white_of`. InputError
    if it cannot be read.
    """
    with opened(path) as picture:
        if not _is_deep(picture):
            picture, _ = _on_white(picture)
            return F.pil_to_tensor(picture)
        grey, key, highest = _deep(picture)
        white = white or white_of(highest)
        rounded = (grey.astype(np.int64) * 255 + white // 2) // white
        scaled = rounded.clip(0, 255).astype(np.uint8)
        scaled[grey == key] = 255
        return torch.from_numpy(scaled).repeat(3, 1, 1)


def white_of(highest: int) -> int:
    """Return the value that is white in pictures of 16 bits with this highest value: the end of 8, 10, ..., 16 bits."""
    for bits in BITS:
        if highest < 2**bits:
            break
    return 2**bits - 1


def survey(path: str) -> tuple:
    """Return what SURVEY lists of a picture, which is read for it. InputError if it cannot be read.

    It takes little more memory than the picture itself.
    """
    with opened(path) as picture:
        is_deep = _is_deep(picture)
        if is_deep:
            grey, key, highest = _deep(picture)
            height, width = grey.shape
            counts = _counts_of_16_bits(grey)
            is_transparent = key is not None and counts[key] > 0
            if is_transparent:
                n_transparent, counts[key] = counts[key], 0
                counts[white_of(highest)] += n_transparent
            counts = np.stack([counts] * 3)
        else:
            picture, is_transparent = _on_white(picture)
            width, height = picture.size
            counts = np.array(picture.histogram()).reshape(3, 256)
            highest = 255
    levels = np.arange(counts.shape[1])
    present = [levels[counts_of_channel > 0] for counts_of_channel in counts]
    spread = max(values[-1] - values[0] for values in present)
    return height, width, counts @ levels, counts @ levels**2, spread, highest, is_deep, is_transparent


def _is_deep(picture: Image.Image) -> bool:
    """Whether a picture has 16 bits a pixel, all of grey: Pillow gives those of colours as 8 bits."""
    return picture.mode.startswith("I")


def _deep(picture: Image.Image) -> tuple[np.ndarray, int | None, int]:
    """Return the values of a picture of 16 bits (h, w), upright, the transparent one, if any, and the highest other.

    That is 65535 of a format which says what its white is, and which Pillow scales by that.
    """
    key = picture.info.get("transparency")
    grey = np.asarray(_upright(picture))
    if picture.format == "TIFF" and picture.tag_v2.get(262) == WHITE_IS_ZERO:
        (bits,) = picture.tag_v2.get(258, (16,))
        grey = 2**bits - 1 - grey  # as Pillow does where there are 8 bits
    if picture.format in ("PPM", "JPEG2000"):
        return grey, key, 2**16 - 1
    opaque = grey if key is None else grey[grey != key]
    return grey, key, int(opaque.max(initial=0))


def _counts_of_16_bits(grey: np.ndarray) -> np.ndarray:
    """Count each value of (h, w), a million pixels at a time, because bincount makes them four times as large."""
    values = grey.reshape(-1)
    counts = np.zeros(2**16, np.int64)
    for first in range(0, len(values), 2**20):
        counts += np.bincount(values[first : first + 2**20], minlength=2**16)
    return counts


def _on_white(picture: Image.Image) -> tuple[Image.Image, bool]:
    """Return a picture as RGB, upright, on a white ground, and whether any of that is seen."""
    if "transparency" in picture.info:
        picture.info["transparency"] = _key_of_8_bits(picture)
    picture = _upright(picture)
    if not picture.has_transparency_data:
        return picture if picture.mode == "RGB" else picture.convert("RGB"), False
    if picture.mode == "La":
        picture = picture.convert("LA")  # Pillow converts it to nothing else
    if picture.mode != "RGBA":
        picture = picture.convert("RGBA")
    alpha = picture.getchannel("A")
    ground = Image.new("RGB", picture.size, "white")
    ground.paste(picture, mask=alpha)
    return ground, alpha.getextrema()[0] < 255


def _upright(picture: Image.Image) -> Image.Image:
    """Return a picture turned as its EXIF says.

    Not ImageOps.exif_transpose, which also writes the EXIF anew, and fails where one of its tags is of another type.
    """
    picture.load()
    turn = TURNS.get(picture.getexif().get(ExifTags.Base.Orientation))
    return picture if turn is None else picture.transpose(turn)


def _key_of_8_bits(picture: Image.Image) -> int | bytes | tuple[int, ...]:
    """Return what is transparent, as values of 8 bits: Pillow scales a PNG's pixels to them, but not its key."""
    key = picture.info["transparency"]
    stored_as = picture.tile[0][3] if picture.format == "PNG" else ""
    if stored_as == "L;2":
        return key * 85
    if stored_as == "L;4":
        return key * 17
    if stored_as == "RGB;16B":
        return tuple(value >> 8 for value in key)
    return key


# ---- Many pictures ---------------------------------------------------------------------------------------------------


def sound(paths: Sequence[str], look: Callable, skip_broken: bool) -> tuple[list[int], list]:
    """Return the rows of the pictures that `look` works on, one of `read`, `survey`, and what it returns for them.

    InputError for the first that it does not work on, unless these are to be skipped: then they are named.
    """
    rows = []
    answers = []
    for row, answer in looks(paths, look, skip_broken, len(paths)):
        rows.append(row)
        answers.append(answer)
    return rows, answers


def looks(
    paths: Sequence[str], look: Callable, skip_broken: bool, of: int, n_workers: int = 0
) -> Iterator[tuple[int, object]]:
    """Yield what `sound` returns, by one row and answer; the pictures are some of the `of` that a message speaks of."""
    chunks = DataLoader(
        _Attempts(paths, look),
        batch_size=PICTURES_A_CHUNK,
        collate_fn=list,
        num_workers=n_workers,
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # it draws a seed, which must not be one of the global generator's
    )
    bar = tqdm(total=len(paths), desc="looking at pictures", delay=2, leave=False, disable=not processes.is_main())
    faults = []
    with bar:
        for row, (answer, fault) in enumerate(itertools.chain.from_iterable(chunks)):
            bar.update()
            if not fault:
                yield row, answer
            elif skip_broken:
                faults.append(fault)
            else:
                raise InputError(f"{fault}; --skip_broken leaves such pictures out")
    if faults:
        processes.say("\n  ".join([f"skipped {len(faults)} of {of} pictures:", *faults]))


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


_chosen_workers: int | None = None


def choose_workers(n: int | None) -> None:
    """Set how many processes read pictures; None = by the cores, and as many as shared memory has room for."""
    global _chosen_workers
    _chosen_workers = n


def workers() -> int:
    """Return how many processes read pictures ahead, for each of those that train."""
    return min(16, processes.cores()) if _chosen_workers is None else _chosen_workers


def workers_for(batch_bytes: int) -> int:
    """Return how many `workers` hand over batches of this size: fewer, down to none, where shared memory is small.

    A number that was chosen stays. Half of the memory is left to another loader, as of an evaluation within a run.
    """
    n = workers()
    if _chosen_workers is not None:
        return n
    batches = free_shared_memory() / 2 / processes.processes_here() / batch_bytes
    fitting = max(0, int((batches - BATCHES_IN_USE) / BATCHES_A_WORKER)) if batches < math.inf else n
    if fitting < n:
        _tell_of_small_memory(n, fitting)
    return min(n, fitting)


def free_shared_memory() -> float:
    """Return the free bytes of shared memory; infinite where it is not a file system of its own, as on a Mac."""
    try:
        status = os.statvfs(SHARED_MEMORY)
    except (OSError, AttributeError):
        return math.inf
    return status.f_bavail * status.f_frsize


@functools.cache  # once for each pair of numbers
def _tell_of_small_memory(n: int, fitting: int) -> None:
    processes.say(
        f"{SHARED_MEMORY} is small: {fitting} processes read pictures ahead, in place of {n}; give it more "
        "(docker run --shm-size 8g), or choose a number by --workers"
    )


def _leave_signals_to_main(_) -> None:
    """Let a worker outlive the signal that asks for the end of the run.

    Ctrl-C and job schedulers signal all processes at once. The main process still finishes its step, for which it needs
    its workers, and ends them itself. If it is killed before that, an alarm ends them.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.alarm(SECONDS_WITHOUT_MAIN))


def crops(files: Files, size: int, micro_batches: Iterator, device: torch.device) -> Iterator[Tensor]:
    """Yield crops (b, views, 3, size, size) of micro-batches: rows (b,) and draws (views, b, DRAWS_PER_IMAGE)."""
    keys = ([*zip(rows.tolist(), u.transpose(0, 1).numpy())] for rows, u in micro_batches)
    yield from loader(Crops(files, size), keys, device)


def centres(files: Files, size: int, crop: float, batch_size: int, device: torch.device) -> Iterator[Tensor]:
    """Yield the central squares (b, 3, size, size) of all files, in their order."""
    rows = range(len(files.paths))
    keys = (rows[i : i + batch_size] for i in rows[::batch_size])
    yield from loader(Centres(files, size, crop), keys, device)


def loader(pictures, keys: Iterator, device: torch.device) -> Iterator:
    """Yield batches of `pictures`, one for each list of keys, read ahead by processes of their own.

    InputError for a picture that cannot be read.
    """
    first = next(keys, None)
    if first is None:
        return
    batches = DataLoader(
        pictures,
        batch_sampler=itertools.chain([first], keys),
        num_workers=workers_for(pictures.bytes_of(first)),
        pin_memory=device.type == "cuda",
        worker_init_fn=_leave_signals_to_main,
        generator=torch.Generator(),  # of its own: it draws at each start, and a run that goes on has more starts
    )
    try:
        yield from batches
    except InputError as e:  # a worker's is the traceback there, whose last line is "...InputError: message"
        last_line = str(e).strip().splitlines()[-1]
        raise InputError(last_line.split("InputError: ", 1)[-1]) from None


@dataclass
class Crops:
    """Random resized crops and flips, uint8 (views, 3, size, size), of pictures in files.

    A key is a row and the draws of its views, (views, DRAWS_PER_IMAGE).
    """

    files: Files
    size: int

    def bytes_of(self, keys: Sequence) -> int:
        """Return the size of the batch of these keys."""
        return 3 * self.size**2 * sum(len(u) for _, u in keys)

    def __getitem__(self, key: tuple[int, np.ndarray]) -> Tensor:
        row, u = key
        image = self.files.read(row)
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

    files: Files
    size: int
    crop: float

    def bytes_of(self, keys: Sequence) -> int:
        """Return the size of the batch of these keys."""
        return 3 * self.size**2 * len(keys)

    def __getitem__(self, row: int) -> Tensor:
        image = self.files.read(row)
        side = round(self.size / self.crop)  # of the shorter one
        image = F.resize(image, [side], InterpolationMode.BICUBIC, antialias=True)
        return F.center_crop(image, [self.size, self.size])
