"""Load a data set by name; make batches of random crops, the two augmented views and the evaluation view.

    dataset = load("photos")  # or "cifar10", "imagenet", ..., or a folder of pictures
    for crops, labels, u in batches(dataset.pretraining, dataset.size, 64, seed=0, steps=range(100)):
        v1, v2 = two_views(crops, u, dataset.mean, dataset.std)

Small images lie in memory as uint8, and move with `Split.to`. Pictures of a large set stay in files; workers read them.
"""

import itertools
import math
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F

from lib import augment, pictures, processes, sources
from lib.augment import DRAWS_PER_IMAGE, Change, named_draws, normalise
from lib.errors import InputError

# ---- Data sets -------------------------------------------------------------------------------------------------------
# size: side of the views in pixels, Appendix B.5. stem: Appendix B.1. holdout: images of a class that `hold_out`
# takes from the training set, Appendix B.4; None = IMAGENET_HOLDOUT of all. mean, std: of the training pixels in
# [0, 1]. blur_p, solarise_p: probabilities in the first and the second view; Appendix B.5.2 uses neither; ImageNet's
# are BYOL's, Appendix B.3.
# fmt: off
FACTS = {
    "photos": dict(size=32, stem="imagenet", holdout=20,  # ours; holds out a tenth of each class
                   mean=(0.5055, 0.3898, 0.3450), std=(0.2612, 0.2191, 0.2247)),
    "cifar10": dict(size=32, stem="cifar", holdout=500,
                    mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)),
    "cifar100": dict(size=32, stem="cifar", holdout=50,
                     mean=(0.5071, 0.4865, 0.4409), std=(0.2673, 0.2564, 0.2762)),
    "stl10": dict(size=64, stem="imagenet", holdout=50,  # mean and std: the code of Wang and Isola (2020)
                  mean=(0.4409, 0.4279, 0.3868), std=(0.2683, 0.2610, 0.2687)),
    "imagenet": dict(size=224, stem="imagenet", holdout=None,
                     mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
                     blur_p=(1.0, 0.1), solarise_p=(0.0, 0.2)),
}
# fmt: on
IMAGENET_HOLDOUT = 10_009
EVAL_CROP = 0.875  # of the shorter side: 28 of CIFAR's 32 pixels, 84 of STL-10's 96, 224 of 256, Appendix B.5


class Split(NamedTuple):
    """Images, uint8 (n, 3, h, w) or Files, and their classes, int64 (n,); -1 is an image without one."""

    images: Tensor | pictures.Files
    labels: Tensor
    paths: np.ndarray | None = None  # (n,), of pictures, also of those that were read into memory

    def rows(self, rows: Tensor) -> "Split":
        """Return the images of these rows, their labels and paths."""
        paths = None if self.paths is None else self.paths[rows.cpu().numpy()]
        return Split(self.images[rows], self.labels[rows], paths)

    def to(self, device) -> "Split":
        """Return the same on another device."""
        return Split(self.images.to(device), self.labels.to(device), self.paths)


@dataclass(frozen=True)
class Dataset:
    """A data set's splits, and its facts: the fields after `test` are explained at FACTS."""

    classes: tuple[str, ...]
    pretraining: Split  # what an encoder is trained on; its labels are not used
    train: Split  # what the k-NN vote and the linear classifier learn from
    test: Split  # what they are tested on
    size: int
    stem: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    holdout: float | None  # images of each class, on average
    blur_p: tuple[float, float] = (0.0, 0.0)
    solarise_p: tuple[float, float] = (0.0, 0.0)

    def to(self, device) -> "Dataset":
        """Return the same with its images on another device, each split once."""
        train = self.train.to(device)
        pretraining = train if self.pretraining is self.train else self.pretraining.to(device)
        return replace(self, pretraining=pretraining, train=train, test=self.test.to(device))

    def view(self, crop: float) -> dict:
        """Return the keyword arguments of `evaluation_views`, with the central `crop` of the side."""
        return {"size": self.size, "crop": crop, "mean": self.mean, "std": self.std}


def load(
    name: str, data_dir: str = "data", pretraining=False, skip_broken=False, workers: int | None = None
) -> Dataset:
    """Load the data set called `name`, or the folder of pictures at that path; docs/data.md describes them all.

    With `pretraining`, STL-10's 100,000 images without labels are read too, and a folder may hold pictures without
    classes. workers: processes that read pictures ahead; None = by cores and shared memory. InputError for a set that
    cannot be read, and for a broken picture unless `skip_broken` leaves these out.
    """
    classes, parts, facts = sources.read_set(name, data_dir, FACTS, pretraining, skip_broken, workers)
    train, test, *unlabeled = [Split(*part) for part in parts]
    learnt = unlabeled[0] if unlabeled else train
    return Dataset(classes, learnt, train, test, **facts)


def hold_out(dataset: Dataset) -> Dataset:
    """Replace the test set by images of the training set, always the same ones, Appendix B.4.

    InputError if there are no classes, or if one has no image left to learn from.
    """
    if not dataset.classes:
        raise InputError("--holdout: the pictures have no classes, so nothing can be judged")
    labels = dataset.train.labels
    order = torch.randperm(len(labels), generator=_generator("holdout"))
    if dataset.holdout is None:
        held = order[-IMAGENET_HOLDOUT:]
        kept = order[:-IMAGENET_HOLDOUT]
    else:
        counts = labels.bincount().double()
        wanted = dataset.holdout * counts / counts.mean()  # the same part of each class
        held, kept = divided_classes(labels, order, wanted.clamp_min(1))
    train = rows_to_learn_from(dataset, kept, "hold-out", "give it more, or leave out --holdout or --sweep")
    pretraining = train if dataset.pretraining is dataset.train else dataset.pretraining
    return replace(dataset, pretraining=pretraining, train=train, test=dataset.train.rows(held))


def with_labels(dataset: Dataset, part: float) -> Dataset:
    """Keep this part of each class's training images, always the same ones; those of a smaller part are among them.

    The hold-out of --sweep shrinks by the same part. InputError as from `hold_out`.
    """
    if part == 1:
        return dataset
    if not dataset.classes:
        raise InputError(f"--labels {part:g}: the pictures have no classes")
    labels = dataset.train.labels
    counts = labels.bincount()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, _ = divided_classes(labels, order, part * counts.double())
    enough = math.ceil(1e4 / int(counts.min())) / 1e4  # rounded up, so that the number that is printed is enough
    train = rows_to_learn_from(dataset, kept, f"--labels {part:g}", f"{enough:g} keeps one of each class")
    per_class = dataset.holdout or IMAGENET_HOLDOUT / len(dataset.classes)
    return replace(dataset, train=train, holdout=part * per_class)


def divided_classes(labels: Tensor, order: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows of each class that come first in the order (n,), `wanted` (classes,) of them, and the others."""
    by_class = order[labels[order].argsort(stable=True)]
    rows_of_classes = by_class.split(labels.bincount().tolist())
    first, others = [], []
    for rows, n in zip(rows_of_classes, wanted.round().int().tolist()):
        first.append(rows[:n])
        others.append(rows[n:])
    return torch.cat(first), torch.cat(others)


def rows_to_learn_from(dataset: Dataset, rows: Tensor, subject: str, advice: str) -> Split:
    """Return these rows of the training set, sorted; InputError if a class has none of them."""
    train = dataset.train.rows(rows.sort().values)
    counts = train.labels.bincount(minlength=len(dataset.classes))
    if not counts.all():
        lost = int(counts.argmin())
        n = (dataset.train.labels == lost).sum()
        fault = f"class {dataset.classes[lost]} would keep none of its {n} training images"
        raise InputError(f"{subject}: {fault}; {advice}")
    return train


# ---- The two views, Appendix B.5 -------------------------------------------------------------------------------------
JITTER_P = 0.8
GREY_P = 0.2
COLOUR = (augment.brightness, augment.contrast, augment.saturation, augment.hue)
STRENGTH = torch.tensor([0.4, 0.4, 0.2, 0.1])  # of each operation of COLOUR: BYOL's
NEUTRAL = torch.tensor([1.0, 1.0, 1.0, 0.0])  # the factor of each that changes nothing


def two_views(
    crops: Tensor, u: Tensor, mean, std, blur_p=(0, 0), solarise_p=(0, 0), jitter=1.0, grey_p=GREY_P
) -> tuple[Tensor, Tensor]:
    """Make the two views (b, 3, size, size) of crops (2, b, 3, size, size); overwrites float crops.

    crops: uint8, or floats in [0, 1], cropped and flipped. u: (2, b, DRAWS_PER_IMAGE), uniform on [0, 1), on the CPU:
    each image has numbers of its own. Then come colour jitter, grey, blur and solarisation, the last two with a
    probability for each view, and normalisation by mean and std. jitter is a part, 0 ... 1, of BYOL's strength.
    """

    def augmented(x, u, blur_p, solarise_p):
        draws = named_draws(u)
        sigma = 0.1 + 1.9 * draws["sigma"]  # in pixels
        threshold = torch.full_like(sigma, 0.5)
        changes = colour_changes(draws, jitter, grey_p)
        changes.append((augment.gaussian_blur, draws["blur"] < blur_p, sigma))
        changes.append((augment.solarise, draws["solarise"] < solarise_p, threshold))
        x = F.to_dtype(x, scale=True)
        augment.change(x, changes)
        return normalise(x, mean, std)

    probabilities = torch.tensor([blur_p, solarise_p])
    of_images = probabilities.repeat_interleave(crops.shape[1], 1)
    per_image = (crops.flatten(0, 1), u.flatten(0, 1), *of_images)  # both views pass together
    return torch.cat([augmented(*parts) for parts in augment.in_chunks(*per_image)]).chunk(2)


def colour_changes(draws: dict, jitter=1.0, grey_p=GREY_P) -> list[Change]:
    """Choose colour jitter, in an order of its own for each image, and grey, for `augment.change`."""
    factors = (2 * draws["factors"] - 1) * (jitter * STRENGTH) + NEUTRAL
    order = draws["order"].argsort(1)  # order[i, turn]: the operation of COLOUR that image i gets in this turn
    jitter_p = JITTER_P if jitter else 0  # an operation of strength 0 would still round
    order[draws["jitter"] >= jitter_p] = -1  # none
    changes = []
    for operations in order.unbind(1):
        for i, operation in enumerate(COLOUR):
            changes.append((operation, operations == i, factors[:, i]))
    no_colour = torch.zeros(len(factors))
    changes.append((augment.saturation, draws["grey"] < grey_p, no_colour))
    return changes


# ---- Batches ---------------------------------------------------------------------------------------------------------
def batches(
    split: Split,
    size: int,
    batch_size: int,
    seed: int,
    steps: Iterable[int],
    micro_batches: int = 1,
    share: tuple[int, int] = (0, 1),
    views: int = 2,
    drop_last: bool = True,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield crops (views, b, 3, size, size), labels (b,) and u (views, b, DRAWS_PER_IMAGE), uniform on [0, 1).

    steps: the steps' numbers, from 0 over the whole run. Each batch is cut into `micro_batches` parts, and each part
    into equal shares; share: (rank, world) of this process. Order and u are functions of (seed, epoch, place in the
    epoch) alone, whatever the device, the micro-batches and the processes. Crops of images in memory are in [0, 1],
    those of files uint8, and files are read ahead. u is on the CPU. InputError if a file cannot be read.
    """
    n = len(split.labels)
    steps_per_epoch = n // batch_size if drop_last else math.ceil(n / batch_size)

    def plan() -> Iterator:
        """Yield row numbers (b,) and u of each micro-batch of this process."""
        for epoch, steps_of_epoch in itertools.groupby(steps, lambda step: step // steps_per_epoch):
            order = torch.randperm(n, generator=_generator(seed, epoch + 1))
            rows_by_place = order.split(batch_size)
            for step in steps_of_epoch:
                place = step % steps_per_epoch
                rows = rows_by_place[place]
                generator = _generator(seed, epoch + 1, place)
                u = torch.rand(views, len(rows), DRAWS_PER_IMAGE, generator=generator)
                parts = zip(rows.tensor_split(micro_batches), u.tensor_split(micro_batches, 1))
                for part, part_u in parts:
                    mine = processes.share(len(part), *share)
                    # index_select: part_u[:, mine] starts torch's threads, which take cores from the workers
                    yield part[mine], part_u.index_select(1, mine)

    device = split.labels.device
    if isinstance(split.images, Tensor):
        for rows, u in plan():
            rows = augment.to_device(rows, device)
            crops = augment.crop_flip(split.images[rows], u, size)
            yield crops, split.labels[rows], u
        return
    for rows, u, crops in pictures.crops(split.images, size, plan(), device):
        rows = augment.to_device(rows, device)
        crops = augment.to_device(crops, device)
        yield crops.transpose(0, 1), split.labels[rows], u


def evaluation_views(split: Split, size: int, crop: float, mean, std, batch_size=500) -> Iterator[Tensor]:
    """Yield batches (b, 3, size, size) of the evaluation view of a split's images, on the device of its labels.

    Images in memory: the central square of `crop` times the shorter side, resized (bicubic), Appendix B.5.2. Files:
    the same square after a resize to size / crop pixels, Appendix B.5.1.
    """
    device = split.labels.device
    if isinstance(split.images, Tensor):
        side = max(1, round(crop * min(split.images.shape[2:])))
        fits_256_mb = max(1, 2**26 // split.images.shape[1:].numel())
        for batch in split.images.split(min(batch_size, fits_256_mb)):
            x = F.center_crop(batch.float() / 255, [side, side])
            x = F.resize(x, [size, size], InterpolationMode.BICUBIC, antialias=True)
            yield normalise(x.clamp_(0, 1), mean, std)
        return
    for x in pictures.centres(split.images, size, crop, batch_size, device):
        yield normalise(augment.to_device(x, device), mean, std)


def _generator(*key) -> torch.Generator:
    """Make a generator whose random numbers are a function of `key` alone."""
    text = " ".join(map(str, key))
    seed = random.Random(text).getrandbits(32)  # torch keeps no more
    return torch.Generator().manual_seed(seed)
