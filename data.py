"""From a data set's name to tensors: its images as uint8, random crops of them in batches, the evaluations' view.

    dataset = load("photos")                                  # or "cifar10", "imagenet", ..., or a folder of pictures
    for crops, labels, u in batches(dataset.train, 64, dataset.size, seed=0, epochs=[1]):
        v1, v2 = views.two_views(crops, u, dataset.mean, dataset.std)

Sets of small images lie in memory, on the device, as uint8, and are cropped there. Pictures of a large set stay in
files; worker processes decode and crop them.
"""

import contextlib
import difflib
import itertools
import math
import os
import random
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from harness import pictures, processes
from harness.augment import DRAWS, crop_flip, normalise
from harness.pictures import DataError, Files


class Split(NamedTuple):
    """Images, uint8 (n, 3, h, w) or Files, and their classes, int64 (n,); -1 is an image without one."""

    images: Tensor | Files
    labels: Tensor

    def rows(self, rows: Tensor) -> "Split":
        """Some of them."""
        return Split(self.images[rows], self.labels[rows])

    def to(self, device) -> "Split":
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set; the fields below `test` are those of FACTS."""

    classes: tuple[str, ...]
    pretraining: Split  # what an encoder is trained on; its labels are not looked at
    train: Split  # what a judge learns from
    test: Split  # what it judges by
    size: int
    stem: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    holdout: int | None
    blur: tuple[float, float] = (0.0, 0.0)
    solarise: tuple[float, float] = (0.0, 0.0)

    def view(self, crop: float) -> dict:
        """What `evaluation_views` takes, with the central `crop` of the side."""
        return {"size": self.size, "crop": crop, "mean": self.mean, "std": self.std}


# size: side of the views in pixels, Appendix B.5. stem: Appendix B.1. mean, std: of the training pixels in [0, 1]; None
# = computed when the set is read. holdout: images a class that `hold_out` takes from the training set, Appendix B.4;
# None = IMAGENET_HOLDOUT of all. blur, solarise: probabilities in the first and the second view; Appendix B.5.2 has
# neither, those of ImageNet are BYOL's, Appendix B.3.
FACTS = {
    "photos": dict(size=32, stem="imagenet", mean=None, std=None, holdout=20),  # ours: a tenth of each class
    "cifar10": dict(size=32, stem="cifar", mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616), holdout=500),
    "cifar100": dict(size=32, stem="cifar", mean=None, std=None, holdout=50),
    # mean and std are those in the code of Wang and Isola (2020), ssnl/align_uniform
    "stl10": dict(size=64, stem="imagenet", mean=(0.4409, 0.4279, 0.3868), std=(0.2683, 0.2610, 0.2687), holdout=50),
    "imagenet": dict(
        **dict(size=224, stem="imagenet", mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225), holdout=None),
        **dict(blur=(1.0, 0.1), solarise=(0.0, 0.2)),
    ),
}
IMAGENET_HOLDOUT = 10_009
MEMORY = 2**30  # bytes of pictures of a folder, up to which they are kept in memory
EVAL_CROP = 0.875  # of the shorter side: 28 of 32 pixels, 56 of 64 (84 of STL-10's 96), 224 of 256, Appendix B.5
PHOTOGRAPHS = (
    *("astronaut", "brick", "chelsea", "coffee", "coins"),
    *("grass", "gravel", "hubble_deep_field", "immunohistochemistry", "retina"),
)


def load(name: str, data_dir: str = "data", pretraining: bool = False, skip_broken: bool = False) -> Dataset:
    """The data set called `name`, or the folder of pictures at that path.

    photos: 2,000 + 500 patches of ten photographs that ship inside scikit-image. cifar10, cifar100, stl10:
    torchvision's, found in or downloaded to `data_dir`. imagenet: `data_dir` holds train/ and val/ with one sub-folder
    a class. A folder: train/ and test/ or val/ likewise. With `pretraining`, images that serve nothing else are read,
    too: STL-10's 100,000 without a label; and a folder may hold pictures without classes. Raises DataError, for a
    broken picture of a folder unless these are to be skipped.
    """
    facts = FACTS.get(name)
    if name == "photos":
        classes, train, test = _photos()
    elif name == "imagenet":
        what = "dataset imagenet: --data_dir"
        classes, train, test, facts = _folder(what, Path(data_dir), ("val",), facts, pretraining, skip_broken)
    elif name in FACTS:
        classes, (train, test, *unlabeled) = _torchvision(name, data_dir, pretraining)
    elif os.path.isdir(name):
        classes, train, test, facts = _folder("dataset", Path(name), ("test", "val"), None, pretraining, skip_broken)
    else:
        near = difflib.get_close_matches(name, FACTS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"dataset {name}: neither {', '.join(FACTS)} nor a folder{hint}")
    if facts["mean"] is None:
        mean, std = pixel_statistics(train.images)
        facts = facts | dict(mean=mean, std=std)
    own = unlabeled[0] if name == "stl10" and pretraining else train
    return Dataset(classes, own, train, test, **facts)


def judged(
    description: dict, dataset: str | None, data_dir: str | None, skip_broken: bool, eval_crop: float | None
) -> tuple[Dataset, dict]:
    """The data set that a network is judged on and its evaluation view: None = as in training, by its description.

    A description without a view, of another project's file, gets the data set's own. Raises DataError as `load` does.
    """
    settings = description["settings"]
    name, place = dataset or settings["dataset"], data_dir or settings["data_dir"]
    try:
        images = load(name, place, skip_broken=skip_broken or settings["skip_broken"])
    except DataError as e:
        where = "" if dataset else "; the checkpoint was trained on it; --dataset or --data_dir say where it is now"
        raise DataError(f"{e}{where}") from e
    own = images.view(EVAL_CROP)
    view = description.get("view") or own
    if not dataset and any(list(view[x]) != list(own[x]) for x in ("mean", "std")):
        processes.say(
            f"dataset {name}: other images than in training, by their mean and std, which stay the training's"
        )
    return images, view | ({"crop": eval_crop} if eval_crop else {})


def hold_out(dataset: Dataset) -> Dataset:
    """The same with images of the training set, always the same ones, in place of the test set, Appendix B.4.

    DataError if a class has no image left to learn from, or if there are no classes.
    """
    train, labels = dataset.train, dataset.train.labels
    if not dataset.classes:
        raise DataError("--holdout: the pictures have no classes, and nothing is judged")
    order = torch.randperm(len(labels), generator=_generator("holdout"))
    if dataset.holdout is None:
        held = order[-IMAGENET_HOLDOUT:]
    else:
        held = torch.cat([order[labels[order] == c][: dataset.holdout] for c in range(len(dataset.classes))])
    kept = torch.ones(len(labels), dtype=torch.bool).index_fill_(0, held, False).nonzero()[:, 0]
    left = labels[kept].bincount(minlength=len(dataset.classes))
    if not left.all():
        n = int((labels == left.argmin()).sum())
        raise DataError(f"--holdout: class {dataset.classes[left.argmin()]} would keep none of its {n} training images")
    rest = train.rows(kept)
    own = rest if dataset.pretraining is train else dataset.pretraining
    return replace(dataset, pretraining=own, train=rest, test=train.rows(held))


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (n, 3, h, w), as parts of 255, to 4 digits."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    return _moments(counts @ values, counts @ values.square(), counts[0].sum())


def _moments(sums: Tensor, squares: Tensor, n: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    mean = sums / n
    variance = (squares / n - mean.square()).clamp_min(1 / 255**2)  # one flat colour has none
    return tuple(round(m, 4) for m in mean.tolist()), tuple(round(s, 4) for s in variance.sqrt().tolist())


def _photos() -> tuple[tuple[str, ...], Split, Split]:
    """Windows of 64x64 pixels, shrunk to 32x32: 200 a photograph from its left 70 %, 50 from its right 30 %."""
    try:
        from skimage import data as photographs
    except ImportError as e:
        raise DataError("dataset photos: its photographs ship inside scikit-image; pip install scikit-image") from e
    generator = torch.Generator().manual_seed(2022)

    def patches(image: Tensor, n: int) -> Tensor:
        top = torch.randint(image.shape[1] - 63, (n,), generator=generator).tolist()
        left = torch.randint(image.shape[2] - 63, (n,), generator=generator).tolist()
        windows = torch.stack([image[:, y : y + 64, x : x + 64] for y, x in zip(top, left)])
        return F.resize(windows, [32, 32], InterpolationMode.BICUBIC, antialias=True)

    train, test = [], []
    for name in PHOTOGRAPHS:
        image = torch.from_numpy(getattr(photographs, name)())
        image = (image[..., None].expand(-1, -1, 3) if image.ndim == 2 else image).permute(2, 0, 1)
        border = int(0.7 * image.shape[2])
        train.append(patches(image[:, :, :border], 200))
        test.append(patches(image[:, :, border:], 50))
    labels = (torch.arange(len(PHOTOGRAPHS)).repeat_interleave(n) for n in (200, 50))
    return PHOTOGRAPHS, *(Split(torch.cat(parts), label) for parts, label in zip((train, test), labels))


def _torchvision(name: str, data_dir: str, pretraining: bool) -> tuple[tuple[str, ...], list[Split]]:
    """Classes and splits of CIFAR-10, CIFAR-100 or STL-10, downloaded if need be: train, test, STL-10's unlabeled."""
    maker = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100, "stl10": datasets.STL10}[name]
    parts = [{"train": True}, {"train": False}]
    if name == "stl10":
        parts = [{"split": part} for part in ("train", "test", *["unlabeled"] * pretraining)]
    root = Path(data_dir)
    new = [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for rows
            sets = [maker(root, download=True, **part) for part in parts]
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise DataError(
            f"dataset {name}: cannot be read from or downloaded to {root} ({e}); put its {FORMS[name]} version at "
            f"{root / maker.base_folder}, or take the embedded set, --dataset photos"
        ) from e
    if name == "stl10":
        splits = [Split(torch.from_numpy(s.data), torch.from_numpy(s.labels).long()) for s in sets]
    else:
        splits = [
            Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets
        ]
    return tuple(sets[0].classes), splits


FORMS = {"cifar10": "python", "cifar100": "python", "stl10": "binary"}  # of several that their authors offer


def _folder(
    what: str, root: Path, tests: tuple[str, ...], facts: dict | None, pretraining: bool, skip_broken: bool
) -> tuple[tuple[str, ...], Split, Split, dict]:
    """Classes, splits and facts of a folder of pictures: those of one size in memory, unless their facts are known."""
    classes, parts, why = _layout(what, root, tests)
    if why and (facts or not pretraining or not parts[0][0]):
        raise DataError(f"{what} {root}: {why}")
    if why:
        processes.say(f"{what} {root}: {len(parts[0][0])} pictures to train on, none to judge by ({why})")

    def look(how: Callable, workers: int = 0) -> list[list]:
        said = []
        for i, (paths, labels) in enumerate(parts):
            rows, answers = pictures.sound(paths, how, skip_broken, workers)
            parts[i] = [paths[row] for row in rows], [labels[row] for row in rows]
            said.append(answers)
        return said

    shapes = [] if facts else [*itertools.chain(*look(pictures.shape))]
    in_memory = len(set(shapes)) == 1 and 3 * math.prod(shapes[0]) * len(shapes) <= MEMORY
    if in_memory:
        said = look(pictures.read)
    elif not facts or skip_broken:
        said = look(pictures.survey, pictures.workers())
    left = (
        [torch.tensor(labels, dtype=torch.long).bincount(minlength=len(classes)) for _, labels in parts]
        if classes
        else []
    )
    empty = [name for n in left for name, count in zip(classes, n) if not count]
    if empty or not parts[0][0]:
        raise DataError(f"{what} {root}: no picture that can be read{f' in class {empty[0]}' if empty else ''}")
    images = [torch.stack(x) if x else torch.empty(0) for x in said] if in_memory else [Files(x) for x, _ in parts]
    train, test = (Split(x, torch.tensor(labels, dtype=torch.long)) for x, (_, labels) in zip(images, parts))
    if facts:
        return classes, train, test, facts
    if in_memory:
        side, (mean, std) = min(shapes[0]), pixel_statistics(train.images)
    else:
        h, w, *sums = torch.from_numpy(np.stack(said[0])).T
        side, (mean, std) = (
            int(torch.minimum(h, w).median()),
            _moments(*torch.stack(sums).sum(1).chunk(2), (h * w).sum()),
        )
    stem, tenth = "cifar" if side <= 32 else "imagenet", round(len(train.labels) / max(1, len(classes)) / 10)
    return classes, train, test, dict(size=min(side, 224), stem=stem, mean=mean, std=std, holdout=max(1, tenth))


def _layout(what: str, root: Path, tests: tuple[str, ...]) -> tuple[tuple[str, ...], list[tuple[list, list]], str]:
    """Classes, paths and labels of train and test; without classes, all pictures for train, and why there are none."""
    train, held = root / "train", next((root / s for s in tests if (root / s).is_dir()), root / tests[0])
    layout = f"train/ and {'/ or '.join(tests)}/ hold a sub-folder of pictures a class"
    why = next((f"no folder {part}; {layout}" for part in (train, held) if not part.is_dir()), "")
    if not why:
        (classes, *own), (others, *test) = pictures.find_classes(train), pictures.find_classes(held)
        if odd := sorted(set(classes) ^ set(others)):
            alone = ", ".join(f"{name} in {'train' if name in classes else held.name} alone" for name in odd[:5])
            raise DataError(f"{what} {root}: train and {held.name} do not hold the same classes: {alone}")
        if len(classes) > 1:
            return classes, [own, test], ""
        why = f"{' '.join(['one class,', *classes] if classes else ['no class'])}; {layout}, two or more"
    top = train if train.is_dir() or held.is_dir() else root  # pictures to judge by are not trained on
    paths = pictures.find(top) if top.is_dir() else []
    return (), [(paths, [-1] * len(paths)), ([], [])], why


def batches(
    split: Split,
    batch_size: int,
    size: int,
    seed: int,
    epochs: Iterable[int],
    views: int = 2,
    passed: int = 0,
    parts: int = 1,
    rank: int = 0,
    world: int = 1,
    drop_last: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield crops (views, b, 3, size, size), labels (b,) and draws u (views, b, sum(DRAWS)) of epochs.

    Crops of images in memory are in [0, 1], those of files uint8. They come in one stream, in which files are read
    ahead, from one epoch into the next, by processes that stay. The first `passed` batches are left out. Each batch
    comes in `parts` micro-batches, of which process `rank` of `world` gets its share. The order of the images and the
    draws of a step are functions of (seed, epoch, step) alone, whatever the device and the number of parts and
    processes. u is on the CPU. DataError: a file cannot be read.
    """

    def plan() -> Iterator[tuple[Tensor, Tensor]]:
        left = passed
        for epoch in epochs:
            order = torch.randperm(len(split.labels), generator=_generator(seed, epoch))
            for step, rows in enumerate(order.split(batch_size)):
                if left or (drop_last and len(rows) < batch_size):
                    left = max(0, left - 1)
                    continue
                u = torch.rand(views, len(rows), sum(DRAWS), generator=_generator(seed, epoch, step))
                for part, draws in zip(rows.tensor_split(parts), u.tensor_split(parts, 1)):
                    own = processes.share(len(part), rank, world)
                    yield part[own], draws.index_select(1, own)  # draws[:, own] wakes threads, for which workers wait

    device = split.labels.device
    if isinstance(split.images, Tensor):
        for rows, u in plan():
            rows = rows.to(device, non_blocking=True)
            yield torch.stack([crop_flip(split.images[rows], v, size) for v in u]), split.labels[rows], u
    else:
        ahead, now = itertools.tee(plan())
        keys = ([*zip(rows.tolist(), u.transpose(0, 1).numpy())] for rows, u in ahead)
        for (rows, u), crops in zip(now, pictures.loader(pictures.Crops(split.images.paths, size), keys, device)):
            yield (
                crops.to(device, non_blocking=True).transpose(0, 1),
                split.labels[rows.to(device, non_blocking=True)],
                u,
            )


def evaluation_views(
    split: Split, size: int, crop: float, mean: tuple, std: tuple, batch_size: int = 500
) -> Iterator[Tensor]:
    """Yield batches (b, 3, size, size) of the evaluation view of a split's images, on the device of its labels.

    Of images in memory, it is the central square of `crop` times the shorter side, resized (bicubic) and normalised,
    Appendix B.5.2; files are resized first, to size / crop pixels, Appendix B.5.1.
    """
    if isinstance(split.images, Tensor):
        side = max(1, round(crop * min(split.images.shape[2:])))
        for batch in split.images.split(min(batch_size, max(1, 2**26 // split.images[0].numel()))):  # of 256 MB at most
            x = F.center_crop(batch.float() / 255, [side, side])
            x = F.resize(x, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp_(0, 1)
            yield normalise(x, mean, std)
    else:
        rows = range(len(split.labels))
        keys = (rows[i : i + batch_size] for i in rows[::batch_size])
        for x in pictures.loader(pictures.Centres(split.images.paths, size, crop), keys, split.labels.device):
            yield normalise(x.to(split.labels.device, non_blocking=True), mean, std)


def _generator(*key) -> torch.Generator:
    """Random numbers that are a function of `key` alone."""
    return torch.Generator().manual_seed(random.Random(" ".join(map(str, key))).getrandbits(32))  # torch keeps 32 bits
