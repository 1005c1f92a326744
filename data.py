"""Load a data set by name; make batches of random crops, the two augmented views and the evaluation view.

dataset = load("photos")  # or "cifar10", "imagenet", ..., or a folder of pictures
for crops, labels, u in batches(dataset.pretraining, dataset.size, 64, seed=0, steps=range(100)):
    v1, v2 = two_views(crops, u, dataset.mean, dataset.std)
"""

import itertools
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
# size: side of the views in pixels, Appendix B.5. stem: Appendix B.1. holdout: images that `hold_out` takes of a class,
# on average, Appendix B.4; None = IMAGENET_HOLDOUT of all. mean, std: of the training pixels in [0, 1]. blur_p,
# solarise_p: probabilities in either view, none in Appendix B.5.2; ImageNet's are BYOL's, Appendix B.3.
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
}  # fmt: skip
IMAGENET_HOLDOUT = 10_009
EVAL_CROP = 0.875  # of the shorter side: 28 of CIFAR's 32 pixels, 84 of STL-10's 96, 224 of 256, Appendix B.5


class Split(NamedTuple):
    """Images, uint8 (n, 3, h, w) or Files, and their classes, int64 (n,); -1 = none."""

    images: Tensor | pictures.Files
    labels: Tensor
    paths: np.ndarray | None = None  # (n,), of pictures

    def rows(self, rows: Tensor) -> "Split":
        """Return the images of these rows."""
        paths = None if self.paths is None else self.paths[rows.cpu().numpy()]
        return Split(self.images[rows], self.labels[rows], paths)

    def to(self, device) -> "Split":
        """Return the same on another device."""
        return Split(self.images.to(device), self.labels.to(device), self.paths)


@dataclass(frozen=True)
class Dataset:
    """A data set's splits, and its facts, which FACTS explains."""

    classes: tuple[str, ...]
    train: Split  # what the k-NN vote and the linear classifier learn from
    test: Split  # what they are tested on
    unlabeled: Split | None  # STL-10's images without classes
    size: int
    stem: str
    mean: tuple[float, ...]
    std: tuple[float, ...]
    holdout: float | None
    blur_p: tuple[float, float] = (0.0, 0.0)
    solarise_p: tuple[float, float] = (0.0, 0.0)

    @property
    def pretraining(self) -> Split:
        """What an encoder is trained on, without labels."""
        return self.unlabeled or self.train

    def to(self, device) -> "Dataset":
        """Return the same with its images on another device."""
        splits = {name: part.to(device) for name, part in vars(self).items() if isinstance(part, Split)}
        return replace(self, **splits)

    def view(self, crop: float) -> dict:
        """Return the keyword arguments of `evaluation_views`."""
        return {"size": self.size, "crop": crop, "mean": self.mean, "std": self.std}


def load(
    name: str, data_dir: str = "data", pretraining=False, skip_broken=False, workers: int | None = None
) -> Dataset:
    """Load the data set called `name`, or the folder of pictures at that path; docs/data.md describes them all.

    pretraining: STL-10's images without labels are read, too; a folder may lack classes. InputError if unreadable.
    """
    classes, parts, facts = sources.read_set(name, data_dir, FACTS, pretraining, skip_broken, workers)
    train, test, *others = [Split(*part) for part in parts]
    return Dataset(classes, train, test, others[0] if others else None, **facts)


def hold_out(dataset: Dataset) -> Dataset:
    """Judge on images of the training set, a fixed draw, Appendix B.4. InputError if a class has none left to learn."""
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
    return replace(dataset, train=train, test=dataset.train.rows(held))


def divided_classes(labels: Tensor, order: Tensor, wanted: Tensor) -> tuple[Tensor, Tensor]:
    """Return the rows that come first of each class in the order (n,), `wanted` (classes,) of them, and the others."""
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
    """Make the two views (b, 3, size, size) of crops (2, b, 3, size, size), uint8, or floats in [0, 1], which change.

    u: (2, b, DRAWS_PER_IMAGE), uniform on [0, 1), on the CPU. jitter: part of BYOL's. blur_p, solarise_p: of each view.
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
    chunks = [augmented(*parts) for parts in augment.in_chunks(*per_image)]
    return torch.cat(chunks).chunk(2)


def colour_changes(draws: dict, jitter=1.0, grey_p=GREY_P) -> list[Change]:
    """Choose colour jitter, in an order of each image, and grey, for `augment.change`."""
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
    views=2,
    drop_last=True,
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield crops (views, b, 3, size, size), labels (b,) and u (views, b, DRAWS_PER_IMAGE), which is for `two_views`.

    steps: from 0 over the whole run. share: (rank, world); a micro-batch is cut into equal shares. Order and u are
    functions of (seed, epoch, place in the epoch) alone. Crops are in [0, 1], of files uint8. InputError if unreadable.
    """
    n = len(split.labels)
    steps_per_epoch, rest = divmod(n, batch_size)
    if rest and not drop_last:
        steps_per_epoch += 1

    def plan() -> Iterator:
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
    """Yield batches (b, 3, size, size) of the evaluation view, on the device of the split's labels.

    It is the central square of `crop` times the shorter side, resized, Appendix B.5.2; of files B.5.1, resized first.
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
    """Make a generator whose numbers are a function of `key` alone."""
    text = " ".join(map(str, key))
    seed = random.Random(text).getrandbits(32)  # torch keeps no more
    return torch.Generator().manual_seed(seed)
