"""Where data sets come from: the embedded photographs, torchvision's sets, and folders of pictures.

Each source returns the names of the classes and parts: to train on, to judge by and, of STL-10, without labels.
"""

import contextlib
import difflib
import functools
import os
import sys
import unicodedata
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lib import files, pictures, processes
from lib.errors import InputError

Classes = tuple[str, ...]
Channels = tuple[float, ...]  # a number for each channel
Part = tuple  # images, uint8 (n, 3, h, w) or pictures.Files; labels, int64 (n,); and, of files, their paths (n,)
Found = tuple[Classes, list[Part], dict]  # classes, parts, facts
Pairs = list[tuple[str, int]]  # paths of pictures, and the class of each
say_once = functools.cache(processes.say)  # in a process: tools open a set several times

PHOTOGRAPHS = "astronaut brick chelsea coffee coins grass gravel hubble_deep_field immunohistochemistry retina".split()
MAKERS = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}
IN_DATA_DIR = (*MAKERS, "imagenet")
WITHOUT_FILES = (*MAKERS, "photos")  # sets that have no file for each picture
DOWNLOAD_LOCK = ".download.lock"
MEMORY = 2**30  # bytes of pictures of a folder, up to which they are kept in memory
SAMPLE = 2000  # pictures, of which the mean and the like are taken where not all fit there
NO_CLASS = -1  # the label of an image without a class


def read_set(name: str, data_dir: str, facts: dict, pretraining: bool, skip_broken: bool, workers: int | None) -> Found:
    """Return classes, parts and facts of a data set by its name or path; arguments and InputError as of `data.load`."""
    name, root = os.path.expanduser(name), Path(os.path.expanduser(data_dir))
    if name in facts and os.path.isdir(name) and os.path.realpath(name) != os.path.realpath(root):
        processes.say(f"dataset {name}: the set of that name, not the folder; --dataset ./{name} is the folder")
    if name == "photos":
        return *photos(), facts[name]
    if name in MAKERS:
        return *torchvision_set(name, root, pretraining), facts[name]
    if name == "imagenet":
        return folder(f"dataset imagenet: --data_dir {root}", root, facts[name], pretraining, skip_broken, workers)
    if os.path.isdir(name):
        return folder(f"dataset {Path(name)}", Path(name), None, pretraining, skip_broken, workers)
    suggestions = difflib.get_close_matches(name, facts, 1)
    hint = f" (did you mean {suggestions[0]}?)" if suggestions else ""
    raise InputError(f"dataset {name}: neither {', '.join(facts)} nor a folder{hint}")


def has_no_data_dir(name: str) -> bool:
    """Whether a data set is certain to lie elsewhere: it is embedded, or a folder."""
    return name not in IN_DATA_DIR and (name == "photos" or os.path.isdir(os.path.expanduser(name)))


# ---- The embedded photographs ----------------------------------------------------------------------------------------
def photos() -> tuple[Classes, list[Part]]:
    """Return the classes and parts of ten photographs, which ship inside scikit-image; InputError without it.

    Windows of 64x64 pixels, shrunk to 32x32: 200 a photograph from its left 70 %, 50 from its right 30 %, so that no
    pixel is in both.
    """
    try:
        from skimage import data as photographs
    except ImportError as e:
        raise InputError("dataset photos: its photographs ship inside scikit-image; pip install scikit-image") from e
    generator = torch.Generator().manual_seed(2022)
    train, test = [], []
    for name in PHOTOGRAPHS:
        pixels = np.atleast_3d(getattr(photographs, name)())
        image = torch.from_numpy(pixels).permute(2, 0, 1).expand(3, -1, -1)  # grey ones have one channel
        border = int(0.7 * image.shape[2])
        for patches, side, n in ((train, image[:, :, :border], 200), (test, image[:, :, border:], 50)):
            top = torch.randint(side.shape[1] - 63, (n,), generator=generator)
            left = torch.randint(side.shape[2] - 63, (n,), generator=generator)
            windows = torch.stack([side[:, y : y + 64, x : x + 64] for y, x in zip(top.tolist(), left.tolist())])
            patches.append(F.resize(windows, [32, 32], InterpolationMode.BICUBIC, antialias=True))
    labels = torch.arange(len(PHOTOGRAPHS))
    parts = [(torch.cat(train), labels.repeat_interleave(200)), (torch.cat(test), labels.repeat_interleave(50))]
    return tuple(PHOTOGRAPHS), parts


# ---- torchvision's sets ----------------------------------------------------------------------------------------------
def torchvision_set(name: str, root: Path, unlabeled: bool) -> tuple[Classes, list[Part]]:
    """Return the classes and parts of cifar10, cifar100 or stl10, downloaded to `root` if need be.

    `unlabeled` adds STL-10's 100,000 images without a label. InputError if it can be neither read nor downloaded.
    """
    options = [{"train": True}, {"train": False}]
    if name == "stl10":
        options = [{"split": part} for part in ("train", "test", "unlabeled")[: 2 + unlabeled]]
    try:
        sets = [MAKERS[name](root, **part) for part in options]
    except (OSError, RuntimeError):  # it is not there, or not whole
        sets = _downloaded(name, root, options)
    if name == "stl10":
        parts = [(torch.from_numpy(each.data), torch.from_numpy(each.labels).long()) for each in sets]
    else:  # torchvision keeps these as (n, h, w, 3), and their labels in a list
        images = [torch.from_numpy(each.data).permute(0, 3, 1, 2).contiguous() for each in sets]
        parts = [(x, torch.tensor(each.targets)) for x, each in zip(images, sets)]
    return tuple(sets[0].classes), parts


def _downloaded(name: str, root: Path, options: list[dict]) -> list[datasets.VisionDataset]:
    """Download the parts of a set, one command at a time: two would write the same file. The lock's file stays."""
    maker = MAKERS[name]
    processes.say(f"dataset {name}: is downloaded to {root}, once no other command does that")
    try:
        root.mkdir(parents=True, exist_ok=True)
        with open(root / DOWNLOAD_LOCK, "w") as file, contextlib.redirect_stdout(sys.stderr):  # rows go to the other
            with contextlib.suppress(OSError):  # there are no locks
                files.lock(file, wait=True)
            return [maker(root, download=True, **part) for part in options]
    except (OSError, RuntimeError) as e:
        advice = f"put it at {root / maker.base_folder}, or take the embedded set, --dataset photos"
        raise InputError(f"dataset {name}: cannot be read from or downloaded to {root} ({e}); {advice}") from e


# ---- A folder of pictures --------------------------------------------------------------------------------------------
def folder(
    name: str, root: Path, facts: dict | None, pretraining: bool, skip_broken: bool, workers: int | None
) -> Found:
    """Return classes, parts and facts of a folder with train/ and test/ or val/, each with a sub-folder a class.

    Pictures of one size are read into memory, if they fit; others, and those of a set with `facts`, ImageNet, stay in
    files. With `pretraining` a folder of your own may lack classes. `name` begins messages. InputError for another
    layout, and for a broken picture that is met, unless these are to be skipped.
    """
    try:
        classes, parts, told = _listed(name, root, ["val"] if facts else ["test", "val"], pretraining and not facts)
    except OSError as e:
        raise InputError(f"{e.filename}: cannot be read ({e.strerror})") from e
    workers = pictures.fitting_workers() if workers is None else workers
    if skip_broken:
        parts = _without_broken(name, parts, workers)
    train, test = parts
    told = f"{len(classes)} classes, {len(train)} pictures to train on, {len(test)} to judge by; {told}"
    for pairs in parts:
        missing = {*range(len(classes))} - {label for _, label in pairs}
        if missing:
            raise InputError(f"{name}: no picture that can be read in class {classes[min(missing)]}; {told}")
    if not train:
        raise InputError(f"{name}: no picture that can be read; {told}")
    say_once(f"{name}: {told}")
    images = [pictures.Files([path for path, _ in pairs], workers=workers) for pairs in parts]
    labels = [torch.tensor([label for _, label in pairs], dtype=torch.long) for pairs in parts]
    paths = [files.paths for files in images]
    if not facts:
        images, facts = _images_and_facts(*images)
        facts["holdout"] = len(train) / max(1, len(classes)) / 10
    return classes, list(zip(images, labels, paths)), facts


def _listed(name: str, root: Path, tests: list[str], may_lack_classes: bool) -> tuple[Classes, list[Pairs], str]:
    """Return the classes, the pictures to train on and those to judge by, and what is left out, in words.

    Without classes, if it `may_lack_classes`, all are to train on; InputError if not, or if test has other classes.
    """
    left_out = Counter()
    train = root / "train"
    classes = _classes(train, left_out)
    # Of test/ and val/ the one that shares most classes with train/.
    test = root / max(tests, key=lambda part: len({*classes} & {*_classes(root / part, Counter())}))
    test_classes = _classes(test, left_out)
    unpaired = sorted({*classes} ^ {*test_classes})
    if classes and test_classes and unpaired:
        as_seen = {unicodedata.normalize("NFC", label).strip() for label in unpaired}
        written = repr if len(as_seen) == len(unpaired) else ascii  # some look alike: show how they differ
        places = [f"{written(label)} in {'train' if label in classes else test.name} alone" for label in unpaired[:5]]
        raise InputError(f"{name}: train and {test.name} do not hold the same classes: {', '.join(places)}")
    # Where the folder has parts, only train/ is trained on: the rest was laid aside to judge by.
    has_parts = any((root / part).is_dir() for part in ("train", *tests))
    unjudged = ""
    if len(classes) > 1 and len(test_classes) > 1:
        parts = _by_class(name, train, test, classes, left_out)
    else:
        fault = f"{train if len(classes) < 2 else test} is no folder of two or more classes"
        if not may_lack_classes:
            needed = " or ".join(f"{part}/" for part in tests)
            raise InputError(f"{name}: {fault}; train/ and {needed} must hold a sub-folder of pictures for each class")
        unjudged = f" (nothing is judged: {fault})"
        paths = pictures.find(train if has_parts else root, left_out, {})
        classes, parts = (), [[(path, NO_CLASS) for path in paths], []]
    if has_parts:
        others = {*_classes(root, Counter())} - {train.name, test.name}
        left_out |= {f"folder {other}/": 1 for other in sorted(others)}
    reasons = [f"{n} {reason}" for reason, n in left_out.most_common(10)]
    return classes, parts, f"left out: {', '.join(reasons) or 'nothing'}{unjudged}"


def _classes(part: Path, left_out: Counter) -> Classes:
    """Return the names of the sub-folders of a folder but hidden ones, sorted; count what else it holds."""
    names = []
    for path in sorted(part.iterdir()) if part.is_dir() else []:
        if pictures.is_hidden(path.name):
            left_out["hidden"] += 1
        elif path.is_dir():
            names.append(path.name)
        else:
            left_out["beside the folders of the classes" if path.exists() else f"linked to nothing ({path})"] += 1
    return tuple(names)


def _by_class(name: str, train: Path, test: Path, classes: Classes, left_out: Counter) -> list[Pairs]:
    """Return the pictures of train and of test, class by class; say where two places are one."""
    parts = [[], []]
    place_by_folder, twice = {}, []
    for pairs, part in zip(parts, (train, test)):
        for label, class_name in enumerate(classes):
            places = {}
            pairs += [(path, label) for path in pictures.find(part / class_name, left_out, places)]
            twice += [f"{places[real]} is {place_by_folder[real]}" for real in places if real in place_by_folder]
            place_by_folder |= places
    if twice:
        say_once(f"{name}: {len(twice)} folders come twice: {', '.join(twice[:3])}")
    return parts


def _without_broken(name: str, parts: list[Pairs], workers: int) -> list[Pairs]:
    """Return the pairs whose picture can be read; count the others, and name ten."""
    paths = [path for pairs in parts for path, _ in pairs]
    fault_by_path = dict(zip(paths, pictures.by_workers(pictures.fault_of, pictures.Files(paths, workers=workers))))
    faults = [fault for fault in fault_by_path.values() if fault]
    if faults:
        processes.say("\n  ".join([f"{name}: skipped {len(faults)} of {len(paths)} pictures:", *faults[:10]]))
    return [[pair for pair in pairs if not fault_by_path[pair[0]]] for pairs in parts]


def _images_and_facts(train: pictures.Files, test: pictures.Files) -> tuple[list, dict]:
    """Return the images of both parts, in memory or as Files, and what data.FACTS holds of a named set."""
    order = torch.randperm(len(train.paths), generator=torch.Generator().manual_seed(0))
    sample = train[order[:SAMPLE].sort().values]
    train.white = test.white = sample.white = pictures.white_of(sample)
    everything = pictures.Files([*train.paths, *test.paths], train.white, train.workers)
    in_memory = pictures.in_memory(everything, MEMORY)
    if in_memory is None:
        images = [train, test]
        side, histograms = pictures.side_and_histograms(sample)
    else:
        images = in_memory.split([len(train.paths), len(test.paths)])
        side = min(in_memory.shape[2:])
        histograms = torch.stack([channel.flatten().bincount(minlength=256) for channel in images[0].unbind(1)])
    mean, std = pixel_statistics(histograms)
    return images, {"size": min(side, 224), "stem": "cifar" if side <= 32 else "imagenet", "mean": mean, "std": std}


def pixel_statistics(histograms: Tensor) -> tuple[Channels, Channels]:
    """Return mean and standard deviation of each channel as parts of 255, to 4 digits, from its histogram (3, 256)."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = histograms / histograms.sum(1, keepdim=True, dtype=torch.float64)
    mean = shares @ values
    variance = shares @ values.square() - mean.square()
    std = variance.clamp_min(1 / 255**2).sqrt()  # one flat colour has none, and views are divided by it
    return tuple(round(x, 4) for x in mean.tolist()), tuple(round(x, 4) for x in std.tolist())
