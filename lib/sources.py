"""Where data sets come from: the embedded photographs, torchvision's sets, and folders of pictures.

Each source returns the names of the classes and a `Split` for training and for testing. `_read` chooses the source
by the name; what is known of the sets that have one, FACTS, stands in data.py.
"""

import contextlib
import difflib
import os
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lib import files, pictures, processes
from lib.errors import InputError
from lib.pictures import Files
from lib.surveys import Kept

Classes = tuple[str, ...]
Channels = tuple[float, ...]  # a number for each channel
Found = tuple[Classes, "Split", "Split", dict]  # classes, train, test, facts

PHOTOGRAPHS = (
    "astronaut",
    "brick",
    "chelsea",
    "coffee",
    "coins",
    "grass",
    "gravel",
    "hubble_deep_field",
    "immunohistochemistry",
    "retina",
)
MAKERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
IN_DATA_DIR = (*MAKERS, "imagenet")
DOWNLOAD_LOCK = ".download.lock"
FORMS = {"cifar10": "python", "cifar100": "python", "stl10": "binary"}  # of several that their authors offer
MEMORY = 2**30  # bytes of pictures of a folder, up to which they are kept in memory
NO_CLASS = -1  # the label of an image without a class
FLAT = 16  # of 255: a picture whose values differ by less in each channel is nearly of one colour


class Split(NamedTuple):
    """Images, uint8 (n, 3, h, w) or Files, and their classes, int64 (n,); -1 is an image without one."""

    images: Tensor | Files
    labels: Tensor
    paths: np.ndarray | None = None  # (n,), of the files of pictures, also of those that were read into memory

    def rows(self, rows: Tensor) -> "Split":
        """Return the images of these rows, their labels and paths."""
        paths = None if self.paths is None else self.paths[rows.cpu().numpy()]
        return Split(self.images[rows], self.labels[rows], paths)

    def to(self, device) -> "Split":
        """Return the same on another device."""
        return Split(self.images.to(device), self.labels.to(device), self.paths)


def by_class(labels: Tensor, order: Tensor) -> tuple[Tensor, Tensor]:
    """Sort images by class, those of a class in the order (n,): their row numbers, and the place of each, from 0."""
    sorted_rows = order[labels[order].argsort(stable=True)]
    counts = labels.bincount()
    firsts = counts.cumsum(0) - counts  # where each class begins
    place_in_class = torch.arange(len(labels)) - firsts.repeat_interleave(counts)
    return sorted_rows, place_in_class


def held_out(labels: Tensor, order: Tensor, images_per_class: float) -> Tensor:
    """Return the first images of each class in the order (n,): so many on average, and the same part of each class."""
    rows, place_in_class = by_class(labels, order)
    counts = labels.bincount().double()
    wanted = (images_per_class * counts / counts.mean()).round().clamp_min(1)
    return rows[place_in_class < wanted[labels[rows]]]


def pixel_statistics(images: Tensor) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of each channel of uint8 images (n, 3, h, w), as parts of 255, to 4 digits."""
    values = torch.arange(256, dtype=torch.float64) / 255
    histograms = [torch.bincount(channel.flatten(), minlength=256) for channel in images.unbind(1)]
    counts = torch.stack(histograms).double()
    sums, squares = counts @ values, counts @ values.square()
    return _mean_and_std(sums, squares, counts[0].sum())


def _mean_and_std(sums: Tensor, squares: Tensor, n: Tensor) -> tuple[Channels, Channels]:
    """Return mean and standard deviation, to 4 digits, of n numbers a channel from their sums and those of squares."""
    mean = sums / n
    variance = squares / n - mean.square()
    std = variance.clamp_min(1 / 255**2).sqrt()  # one flat colour has none, and views are divided by it
    return _rounded(mean), _rounded(std)


def _rounded(numbers: Tensor) -> Channels:
    return tuple(round(number, 4) for number in numbers.tolist())


# ---- A set by its name -----------------------------------------------------------------------------------------------


def read(
    name: str, data_dir: str, facts: dict[str, dict], pretraining: bool, skip_broken: bool
) -> tuple[Classes, Split, Split, Split | None, dict]:
    """Read the data set called `name`, of those that have facts, or the folder of pictures at that path.

    Returns its classes, its training and test set, images without labels for pretraining if it has some, and its facts,
    with mean and std. InputError as from `data.load`.
    """
    classes, train, test, unlabeled, own_facts = _read(name, data_dir, facts, pretraining, skip_broken)
    if own_facts["mean"] is None:
        mean, std = pixel_statistics(train.images)
        own_facts = {**own_facts, "mean": mean, "std": std}
    return classes, train, test, unlabeled, own_facts


def has_no_data_dir(name: str) -> bool:
    """Whether a data set is certain to lie elsewhere: it is embedded, or a folder."""
    return name not in IN_DATA_DIR and (name == "photos" or os.path.isdir(os.path.expanduser(name)))


def has_no_files(name: str) -> bool:
    """Whether a data set has no file for each picture."""
    return name == "photos" or name in MAKERS


def _read(name: str, data_dir: str, facts: dict[str, dict], pretraining: bool, skip_broken: bool) -> tuple:
    """Do what `read` does, but for mean and std where they are not known."""
    name, data_dir = os.path.expanduser(name), os.path.expanduser(data_dir)
    own_facts = facts.get(name)
    if own_facts and os.path.isdir(name) and os.path.realpath(name) != os.path.realpath(data_dir):
        processes.say(f"dataset {name}: the set of that name, not the folder; --dataset ./{name} is the folder")
    options = (own_facts, pretraining, skip_broken)
    if name == "photos":
        return *photos(), None, own_facts
    if name == "imagenet":
        classes, train, test, found = folder("dataset imagenet: --data_dir", Path(data_dir), ("val",), *options)
        return classes, train, test, None, found
    if own_facts:
        classes, (train, test, *unlabeled) = torchvision_set(name, data_dir, unlabeled=pretraining)
        return classes, train, test, unlabeled[0] if unlabeled else None, own_facts
    if os.path.isdir(name):
        classes, train, test, found = folder("dataset", Path(name), ("test", "val"), *options)
        return classes, train, test, None, found
    suggestions = difflib.get_close_matches(name, facts, 1)
    hint = f" (did you mean {suggestions[0]}?)" if suggestions else ""
    raise InputError(f"dataset {name}: neither {', '.join(facts)} nor a folder{hint}")


# ---- The embedded photographs ----------------------------------------------------------------------------------------


def photos() -> tuple[Classes, Split, Split]:
    """Return classes, train and test of the ten photographs that ship inside scikit-image.

    Windows of 64x64 pixels, shrunk to 32x32: 200 a photograph from its left 70 %, 50 from its right 30 %, so that no
    pixel is in both. InputError without scikit-image.
    """
    try:
        from skimage import data as photographs
    except ImportError as e:
        raise InputError("dataset photos: its photographs ship inside scikit-image; pip install scikit-image") from e
    generator = torch.Generator().manual_seed(2022)
    train, test = [], []
    for name in PHOTOGRAPHS:
        image = torch.from_numpy(getattr(photographs, name)())
        if image.ndim == 2:  # grey
            image = image[..., None].expand(-1, -1, 3)
        image = image.permute(2, 0, 1)
        border = int(0.7 * image.shape[2])
        train.append(_patches(image[:, :, :border], 200, generator))
        test.append(_patches(image[:, :, border:], 50, generator))
    return PHOTOGRAPHS, _by_class(train), _by_class(test)


def _patches(image: Tensor, n: int, generator: torch.Generator) -> Tensor:
    """Return n windows (n, 3, 32, 32) of an image (3, h, w)."""
    _, height, width = image.shape
    top = torch.randint(height - 63, (n,), generator=generator)
    left = torch.randint(width - 63, (n,), generator=generator)
    windows = []
    for y, x in zip(top.tolist(), left.tolist()):
        windows.append(image[:, y : y + 64, x : x + 64])
    windows = torch.stack(windows)
    return F.resize(windows, [32, 32], InterpolationMode.BICUBIC, antialias=True)


def _by_class(images: list[Tensor]) -> Split:
    """Return the images of each class, (n, 3, h, w), as one split."""
    n = len(images[0])
    labels = torch.arange(len(images)).repeat_interleave(n)
    return Split(torch.cat(images), labels)


# ---- torchvision's sets ----------------------------------------------------------------------------------------------


def torchvision_set(name: str, data_dir: str, unlabeled: bool) -> tuple[Classes, list[Split]]:
    """Return the classes and splits of cifar10, cifar100 or stl10, downloaded to `data_dir` if need be.

    The splits are train and test and, of stl10 with `unlabeled`, its 100,000 images without a label. InputError if they
    can be neither read nor downloaded.
    """
    if name == "stl10":
        parts = [{"split": "train"}, {"split": "test"}]
        if unlabeled:
            parts.append({"split": "unlabeled"})
    else:
        parts = [{"train": True}, {"train": False}]
    sets = _downloaded(name, Path(data_dir), parts)
    return tuple(sets[0].classes), [_split_of(part) for part in sets]


def _downloaded(name: str, root: Path, parts: list[dict]) -> list[datasets.VisionDataset]:
    """Return parts of a set, read or downloaded; where neither can be done, folders made for it are removed again."""
    maker = MAKERS[name]
    with contextlib.suppress(OSError, RuntimeError):  # it is not there, or not whole
        return [maker(root, **part) for part in parts]
    missing_folders = [place for place in (root, *root.parents) if not os.path.exists(place)]
    try:
        with contextlib.redirect_stdout(sys.stderr), _downloading(name, root):  # standard output is for rows
            return [maker(root, download=True, **part) for part in parts]
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            if root in missing_folders:
                (root / DOWNLOAD_LOCK).unlink(missing_ok=True)
            for place in missing_folders:
                place.rmdir()
        raise InputError(
            f"dataset {name}: cannot be read from or downloaded to {root} ({e}); put its {FORMS[name]} version at "
            f"{root / maker.base_folder}, or take the embedded set, --dataset photos"
        ) from e


@contextlib.contextmanager
def _downloading(name: str, root: Path) -> Iterator[None]:
    """Let one command at a time download to a folder: two would write the same file. The lock's file stays."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / DOWNLOAD_LOCK, "w") as file:
        try:
            files.lock(file, wait=False)
        except BlockingIOError:
            processes.say(f"dataset {name}: another command downloads to {root}; waiting for it")
            files.lock(file, wait=True)
        except OSError:  # there are no locks
            pass
        yield


def _split_of(stored: datasets.VisionDataset) -> Split:
    """Return images as (n, 3, h, w) and their labels; torchvision keeps CIFAR's as (n, h, w, 3) and in a list."""
    images = torch.from_numpy(stored.data)
    if isinstance(stored, datasets.STL10):
        return Split(images, torch.from_numpy(stored.labels).long())
    images = images.permute(0, 3, 1, 2).contiguous()
    return Split(images, torch.tensor(stored.targets))


# ---- A folder of pictures --------------------------------------------------------------------------------------------


@dataclass
class Listing:
    """The pictures of one part of a folder, and the class of each."""

    paths: list[str]
    labels: list[int]

    def keep(self, rows: list[int]) -> None:
        """Drop all pictures but these."""
        self.paths = [self.paths[row] for row in rows]
        self.labels = [self.labels[row] for row in rows]

    def in_files(self, white: int | None = None) -> Split:
        """Return a split of pictures that stay in files; `white` as in Files."""
        labels = torch.tensor(self.labels, dtype=torch.long)
        files = Files(self.paths, white)
        return Split(files, labels, files.paths)

    def in_memory(self, images: list[Tensor]) -> Split:
        """Return a split of these images, which are the pictures."""
        labels = torch.tensor(self.labels, dtype=torch.long)
        stacked = torch.stack(images) if images else torch.empty(0)
        return Split(stacked, labels, np.array(self.paths))


class Layout(NamedTuple):
    """What a folder holds. Without classes all pictures are in `train`, and `fault` says why there are none."""

    classes: Classes
    train: Listing
    test: Listing
    left_out: Counter  # numbers of files by the reason
    not_used: list[str]  # names of folders beside train and test
    fault: str = ""


def folder(
    what: str, root: Path, tests: tuple[str, ...], facts: dict | None, pretraining: bool, skip_broken: bool
) -> Found:
    """Return classes, train, test and facts of a folder with train/ and one of `tests`, each with a sub-folder a class.

    Pictures of one size are read into memory, if they fit; others stay in files. With `facts`, which are those of a set
    that is known to be large, all stay in files, and none is looked at unless broken ones are to be skipped. With
    `pretraining` the pictures may be without classes. `what` names the folder in messages. InputError for a broken
    picture, unless these are to be skipped, and for a folder that is not laid out like this.
    """
    name = f"{what} {root}"
    layout = _layout(name, root, tests)
    if layout.fault and (facts or not pretraining or not layout.train.paths):
        raise InputError(f"{name}: {layout.fault}")
    is_surveyed = not facts or skip_broken
    if is_surveyed:
        train, test = _survey(root, layout, skip_broken)
    _refuse_empty_classes(name, layout)
    processes.say(f"{name}: {_contents(layout)}")
    white = None
    if is_surveyed:
        white = _white(np.concatenate([train, test]))
        _say_what_is_odd(name, layout, train, test, white)
    if facts:
        return layout.classes, layout.train.in_files(white), layout.test.in_files(white), facts
    if _fit_in_memory(train, test):
        return _set_in_memory(layout, white, skip_broken)
    return _set_in_files(layout, train, white)


def _survey(root: Path, layout: Layout, skip_broken: bool) -> list[np.ndarray]:
    """Return what SURVEY lists of the pictures of train and of test; broken ones are dropped from the layout."""
    surveys = []
    with Kept(root) as kept:
        for listing in (layout.train, layout.test):
            rows, surveys_of_part = kept.survey(listing.paths, skip_broken)
            listing.keep(rows)
            surveys.append(surveys_of_part)
    return surveys


def _set_in_memory(layout: Layout, white: int, skip_broken: bool) -> Found:
    """Return a set of pictures of one size, read, and its facts."""
    splits = []
    for listing in (layout.train, layout.test):
        rows, images = pictures.sound(listing.paths, partial(pictures.read, white=white), skip_broken)
        listing.keep(rows)
        splits.append(listing.in_memory(images))
    train, test = splits
    side = min(train.images.shape[2:])
    facts = _facts(layout, side, *pixel_statistics(train.images))
    return layout.classes, train, test, facts


def _set_in_files(layout: Layout, surveys: np.ndarray, white: int) -> Found:
    """Return a set of pictures that stay in files, and its facts, of the surveys of those to train on."""
    steps = _steps(surveys, white)[:, None]  # of the values of each picture
    sums = (surveys["sums"] / steps).sum(0)
    squares = (surveys["squares"] / steps**2).sum(0)
    n = (surveys["height"] * surveys["width"]).sum()
    mean, std = _mean_and_std(torch.from_numpy(sums), torch.from_numpy(squares), torch.tensor(n))
    side = int(torch.from_numpy(_shorter_side(surveys)).median())
    facts = _facts(layout, side, mean, std)
    return layout.classes, layout.train.in_files(white), layout.test.in_files(white), facts


def _shorter_side(surveys: np.ndarray) -> np.ndarray:
    return np.minimum(surveys["height"], surveys["width"])


def _steps(surveys: np.ndarray, white: int) -> np.ndarray:
    """Return the value that is white in each picture."""
    return np.where(surveys["is_deep"], white, 255)


def _white(surveys: np.ndarray) -> int:
    """Return the value that is white in the pictures of 16 bits: one for all, or dark ones would become bright."""
    deep = surveys[surveys["is_deep"] == 1]
    return pictures.white_of(deep["highest"].max(initial=0))


def _facts(layout: Layout, side: int, mean: Channels, std: Channels) -> dict:
    """Return what data.FACTS holds of a named set, for a folder: `side` is that of its pictures, the shorter one."""
    images_per_class = len(layout.train.labels) / max(1, len(layout.classes))
    return {
        "size": min(side, 224),
        "stem": "cifar" if side <= 32 else "imagenet",
        "mean": mean,
        "std": std,
        "holdout": images_per_class / 10,
    }


# ---- What a folder holds ---------------------------------------------------------------------------------------------


def _layout(name: str, root: Path, tests: tuple[str, ...]) -> Layout:
    """Return what a folder holds. InputError where train and test do not hold the same classes."""
    wanted = f"train/ and {'/ or '.join(tests)}/ must hold a sub-folder of pictures for each class"
    train = root / "train"
    classes = pictures.class_folders(train)
    test = _test_folder([root / part for part in tests], classes)
    test_classes = pictures.class_folders(test)
    # Where the folder has parts, only train/ is trained on: the rest was laid aside to judge by.
    has_parts = train.is_dir() or test.is_dir()
    not_used = []
    if has_parts and os.access(root, os.R_OK):
        not_used = sorted({*pictures.class_folders(root)} - {train.name, test.name})
    left_out = Counter()
    fault = _fault_of_part(train, classes) or _fault_of_part(test, test_classes)
    if not fault:
        _refuse_other_classes(name, classes, test_classes, test.name)
        if len(classes) > 1:
            _, *train_listing = pictures.find_classes(train, left_out)
            _, *test_listing = pictures.find_classes(test, left_out)
            return Layout(classes, Listing(*train_listing), Listing(*test_listing), left_out, not_used)
        fault = f"one class, {classes[0]}"
        wanted += ", two or more"
    place = train if has_parts else root
    paths = pictures.find(place, left_out) if place.is_dir() else []
    labels = [NO_CLASS] * len(paths)
    return Layout((), Listing(paths, labels), Listing([], []), left_out, not_used, f"{fault}; {wanted}")


def _test_folder(folders: list[Path], classes: Classes) -> Path:
    """Return the first folder that holds these classes, or the first that holds any, or that is there, or the first."""
    has_same_classes = [pictures.class_folders(path) == classes != () for path in folders]
    has_classes = [pictures.class_folders(path) != () for path in folders]
    is_there = [path.is_dir() for path in folders]
    for condition in (has_same_classes, has_classes, is_there):
        if any(condition):
            return folders[condition.index(True)]
    return folders[0]


def _fault_of_part(part: Path, classes: Classes) -> str:
    """Say why train or test has no classes; nothing if it has some."""
    if classes:
        return ""
    if not part.is_dir():
        return f"no folder {part}"
    n = len(pictures.find(part))
    if n:
        return f"{part} holds {n} pictures and no sub-folders; sort them by their classes"
    return f"{part} holds no class"


def _contents(layout: Layout) -> str:
    """Say how many classes and pictures there are, and what is left out."""
    n_train, n_test = len(layout.train.paths), len(layout.test.paths)
    if layout.fault:
        line = f"{n_train} pictures to train on, none to judge by ({layout.fault})"
    else:
        line = f"{len(layout.classes)} classes, {n_train} pictures to train on, {n_test} to judge by"
    line += f"; left out: {pictures.in_words(layout.left_out)}"
    if layout.not_used:
        line += f"; folders that are not used: {', '.join(layout.not_used[:5])}"
        line += ", ..." if len(layout.not_used) > 5 else ""
    return line


def _say_what_is_odd(name: str, layout: Layout, train: np.ndarray, test: np.ndarray, white: int) -> None:
    """Say what the pictures are that few mean them to be: put on white, of fewer bits, of one colour, all alike."""
    surveys = np.concatenate([train, test])
    paths = layout.train.paths + layout.test.paths
    n = len(surveys)
    n_transparent = surveys["is_transparent"].sum()
    if n_transparent:
        processes.say(f"{name}: {n_transparent} of {n} pictures are transparent in places, which become white")
    n_deep = surveys["is_deep"].sum()
    if n_deep and white < 2**16 - 1:
        highest = surveys["highest"][surveys["is_deep"] == 1].max()
        processes.say(
            f"{name}: {n_deep} of {n} pictures have 16 bits a pixel and no value above {highest}, so that {white} is "
            "taken for white"
        )
    is_flat = surveys["spread"] * 255 < FLAT * _steps(surveys, white)
    flat = np.flatnonzero(is_flat)
    if len(flat):
        processes.say(f"{name}: {len(flat)} of {n} pictures are of one colour, or nearly so, as {paths[flat[0]]}")
    if _are_alike(layout.train.paths, train):
        processes.say(f"{name}: the {len(train)} pictures to train on are all alike")


def _are_alike(paths: list[str], surveys: np.ndarray) -> bool:
    """Whether pictures are the same in their surveys and, the first hundred, in their pixels."""
    if len(paths) < 2 or (surveys != surveys[0]).any():
        return False
    first = pictures.read(paths[0])
    return all(torch.equal(pictures.read(path), first) for path in paths[1:100])


def _refuse_other_classes(name: str, classes: Classes, test_classes: Classes, test: str) -> None:
    """Raise InputError for classes that train or test alone has; it names five of them."""
    unpaired = sorted(set(classes) ^ set(test_classes))
    places = []
    for label in unpaired[:5]:
        part = "train" if label in classes else test
        places.append(f"{label} in {part} alone")
    if places:
        raise InputError(f"{name}: train and {test} do not hold the same classes: {', '.join(places)}")


def _fit_in_memory(train: np.ndarray, test: np.ndarray) -> bool:
    """Whether the pictures make one tensor that is not too large."""
    surveys = np.concatenate([train, test])
    height, width = surveys["height"], surveys["width"]
    if (height != height[0]).any() or (width != width[0]).any():
        return False
    return 3 * height.sum() * width[0] <= MEMORY


def _refuse_empty_classes(name: str, layout: Layout) -> None:
    """Raise InputError if no picture is left to train on, or none of some class."""
    for listing in (layout.train, layout.test):
        labels = set(listing.labels)
        for label, class_name in enumerate(layout.classes):
            if label not in labels:
                raise InputError(f"{name}: no picture that can be read in class {class_name}")
    if not layout.train.paths:
        raise InputError(f"{name}: no picture that can be read")
