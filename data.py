"""From a data set's name to tensors: images in memory as uint8, the two views of BYOL, the view of the evaluations.

    dataset = load("photos")                                  # or "cifar10", or a folder of pictures
    for images, labels, u in batches(dataset.train, 64, seed=0, epoch=0):
        v1, v2 = two_views(images, u, dataset.size, dataset.mean, dataset.std)

Images stay uint8 until a batch is on its device. Views are made there, a batch at a time, each image with draws of its
own.
"""

import contextlib
import difflib
import math
import os
import random
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor
from torchvision import datasets
from torchvision.transforms import InterpolationMode
from torchvision.transforms.v2 import functional as F
from tqdm import tqdm


class DataError(ValueError):
    """A data set that is not there, or is not what a data set has to be."""


class Split(NamedTuple):
    """Images, uint8 (n, 3, h, w), and their classes, int64 (n,)."""

    images: Tensor
    labels: Tensor

    def to(self, device) -> "Split":
        """The same on another device."""
        return Split(self.images.to(device), self.labels.to(device))


@dataclass(frozen=True)
class Dataset:
    """What is known of a data set; `size` is the side of a view in pixels, mean and std are of its pixels in [0, 1]."""

    classes: tuple[str, ...]
    train: Split
    test: Split
    size: int
    stem: str
    eval_crop: float
    mean: tuple[float, ...]
    std: tuple[float, ...]


# size: side of the views, Appendix B.5.2. stem: Appendix B.1. eval_crop: the part of the side that the evaluation view
# keeps, 28 of 32 pixels in Appendix B.5.2. mean, std: of the training pixels; None = computed when the set is read.
FACTS = {
    "photos": dict(size=32, stem="imagenet", eval_crop=28 / 32, mean=None, std=None),
    "cifar10": dict(
        size=32, stem="cifar", eval_crop=28 / 32, mean=(0.4914, 0.4822, 0.4465), std=(0.2470, 0.2435, 0.2616)
    ),
}


PHOTOGRAPHS = (
    *("astronaut", "brick", "chelsea", "coffee", "coins"),
    *("grass", "gravel", "hubble_deep_field", "immunohistochemistry", "retina"),
)


def load(name: str, data_dir: str = "data") -> Dataset:
    """The data set called `name`, or the folder of pictures at that path.

    photos: 2,000 + 500 patches of ten photographs that ship inside scikit-image. cifar10: torchvision's, found in or
    downloaded to `data_dir`. A folder: train/ and test/ (or val/) with one sub-folder a class, pictures of one size.
    Raises DataError.
    """
    if name == "photos":
        read, facts = _photos(), FACTS[name]
    elif name == "cifar10":
        read, facts = _cifar10(data_dir), FACTS[name]
    elif os.path.isdir(name):
        read = _folder(Path(name))
        side = min(read[1].images.shape[2:])
        facts = dict(
            size=min(side, 224), stem="cifar" if side <= 32 else "imagenet", eval_crop=28 / 32, mean=None, std=None
        )
    else:
        near = difflib.get_close_matches(name, FACTS, 1)
        hint = f" (did you mean {near[0]}?)" if near else ""
        raise DataError(f"dataset {name}: neither {', '.join(FACTS)} nor a folder{hint}")
    classes, train, test = read
    if facts["mean"] is None:
        mean, std = pixel_statistics(train.images)
        facts = facts | dict(mean=mean, std=std)
    return Dataset(classes, train, test, **facts)


def pixel_statistics(images: Tensor) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Mean and standard deviation of each channel of uint8 images (n, 3, h, w), as parts of 255, to 4 digits."""
    values = torch.arange(256, dtype=torch.float64) / 255
    counts = torch.stack([torch.bincount(c.flatten(), minlength=256) for c in images.unbind(1)]).double()
    share = counts / counts.sum(1, keepdim=True)
    mean = share @ values
    variance = (share @ values.square() - mean.square()).clamp_min(1 / 255**2)  # one flat colour has none
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


def _cifar10(data_dir: str) -> tuple[tuple[str, ...], Split, Split]:
    root = Path(data_dir)
    new = [folder for folder in (root, *root.parents) if not os.path.exists(folder)]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # standard output is for rows
            sets = [datasets.CIFAR10(root, train=train, download=True) for train in (True, False)]
    except (OSError, RuntimeError) as e:
        with contextlib.suppress(OSError):
            for folder in new:
                folder.rmdir()
        raise DataError(
            f"dataset cifar10: cannot be read from or downloaded to {root} ({e}); put its python version at "
            f"{root / datasets.CIFAR10.base_folder}, or take the embedded set, --dataset photos"
        ) from e
    splits = [Split(torch.from_numpy(s.data).permute(0, 3, 1, 2).contiguous(), torch.tensor(s.targets)) for s in sets]
    return tuple(sets[0].classes), *splits


def _folder(root: Path) -> tuple[tuple[str, ...], Split, Split]:
    held_out = next((root / s for s in ("test", "val") if (root / s).is_dir()), root / "test")
    for part in (root / "train", held_out):
        if not part.is_dir():
            raise DataError(
                f"dataset {root}: no folder {part}; train/ and test/ (or val/) hold one sub-folder of pictures a class"
            )
    try:
        train, test = datasets.ImageFolder(root / "train"), datasets.ImageFolder(held_out)
    except FileNotFoundError as e:  # torchvision's first sentence names the folder or the classes that are empty
        raise DataError(f"dataset {root}: {str(e).splitlines()[0].split(' Supported')[0]}") from e
    if train.classes != test.classes:
        odd = sorted(set(train.classes) ^ set(test.classes))
        raise DataError(f"dataset {root}: train and {held_out.name} do not hold the same classes: {', '.join(odd[:5])}")
    if len(train.classes) < 2:
        raise DataError(f"dataset {root}: one class, {train.classes[0]}; judging an encoder takes two or more")
    shape = _read(train.samples[0][0]).shape
    return tuple(train.classes), _read_all(train, shape), _read_all(test, shape)


def _read_all(folder: datasets.ImageFolder, shape: torch.Size) -> Split:
    images = torch.empty((len(folder), *shape), dtype=torch.uint8)
    for i, (path, _) in enumerate(tqdm(folder.samples, desc=f"reading {folder.root}", delay=2, leave=False)):
        image = _read(path)
        if image.shape != shape:
            size, first = ("x".join(map(str, s[:0:-1])) for s in (image.shape, shape))
            raise DataError(
                f"{path}: {size} pixels, the first picture has {first}; a folder holds pictures of one size"
            )
        images[i] = image
    return Split(images, torch.tensor(folder.targets))


def _read(path: str) -> Tensor:
    try:
        return F.pil_to_tensor(datasets.folder.pil_loader(path))
    except Exception as e:  # Pillow raises errors of many types on broken files
        raise DataError(f"{path}: not a picture that can be read ({e})") from e


def batches(
    split: Split, batch_size: int, seed: int, epoch: int, rank: int = 0, world: int = 1, drop_last: bool = True
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Yield images (b, 3, h, w), labels (b,) and the draws of their views u (2, b, sum(DRAWS)) of one shuffled epoch.

    `batch_size` is global: process `rank` of `world` gets its share of each batch. Order and draws are functions of
    (seed, epoch) alone, whatever the device and the number of processes; u is on the CPU.
    """
    generator = torch.Generator().manual_seed(random.Random(f"{seed} {epoch}").getrandbits(32))  # torch keeps 32 bits
    for rows in torch.randperm(len(split.labels), generator=generator).split(batch_size):
        if drop_last and len(rows) < batch_size:
            return
        u = torch.rand(2, len(rows), sum(DRAWS), generator=generator)
        mine = slice(len(rows) * rank // world, len(rows) * (rank + 1) // world)
        rows = rows[mine].to(split.images.device)
        yield split.images[rows], split.labels[rows], u[:, mine]


# How many of an image's uniform draws each of its choices takes; a crop is tried ten times, as torchvision does.
DRAWS = (10, 10, 2, 1, 1, 4, 4, 1)  # area, aspect, corner, flip, jitter, its factors, its order, grey


def two_views(images: Tensor, u: Tensor, size: int, mean: tuple, std: tuple) -> tuple[Tensor, Tensor]:
    """Two random views (b, 3, size, size) of uint8 images (b, 3, h, w), Appendix B.5; no blur, no solarisation (B.5.2).

    u: (2, b, sum(DRAWS)), uniform on [0, 1). Crop, flip, colour jitter, grey, then normalisation by mean and std.
    """
    return tuple(normalise(recolour(crop_flip(images, v, size), v), mean, std) for v in u)


def evaluation_views(
    images: Tensor, size: int, crop: float, mean: tuple, std: tuple, batch_size: int = 500
) -> Iterator[Tensor]:
    """Yield batches (b, 3, size, size) of the evaluation view of uint8 images (n, 3, h, w), Appendix B.5.2.

    It is the central square of `crop` times the shorter side, resized (bicubic) and normalised.
    """
    side = round(crop * min(images.shape[2:]))
    for batch in images.split(batch_size):
        x = F.center_crop(batch.float() / 255, [side, side])
        yield normalise(F.resize(x, [size, size], InterpolationMode.BICUBIC, antialias=True).clamp_(0, 1), mean, std)


def normalise(x: Tensor, mean: tuple, std: tuple) -> Tensor:
    """x (b, 3, h, w) in [0, 1], less the mean and over the std of each channel."""
    return F.normalize(x, list(mean), list(std))


def crop_flip(images: Tensor, u: Tensor, size: int) -> Tensor:
    """Random resized crop (8-100 % of the area, aspect 3/4-4/3, bicubic) and flip, Appendix B.5.

    uint8 (b, 3, h, w) to (b, 3, size, size) in [0, 1]. Crop, antialiased resize and flip of an image are together
    W_y @ image @ W_x^T, with one row of weights per output pixel.
    """
    height, width = images.shape[2:]
    area, aspect, corner, flip = u.split(DRAWS, 1)[:4]
    top, left, h, w = (x.to(images.device) for x in crop_boxes(area, aspect, corner, height, width))
    w_y = _resampling(top, h, size, height)[:, None]
    w_x = _resampling(left, w, size, width)
    w_x = torch.where((flip < 0.5)[:, :, None].to(images.device), w_x.flip(1), w_x)[:, None]
    return (w_y @ (images.float() / 255) @ w_x.mT).clamp_(0, 1)  # bicubic weights overshoot


def crop_boxes(
    area: Tensor, aspect: Tensor, corner: Tensor, height: int, width: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Top, left, height and width (b,) of crops: the first of an image's ten tries that fits, else its centre."""
    area = (0.08 + 0.92 * area) * height * width
    ratio = torch.exp((2 * aspect - 1) * math.log(4 / 3))
    h, w = (area / ratio).sqrt().round(), (area * ratio).sqrt().round()
    fits = (h >= 1) & (h <= height) & (w >= 1) & (w <= width)
    first = fits.int().argmax(1, keepdim=True)
    some = fits.any(1)
    h = torch.where(some, h.gather(1, first)[:, 0], min(height, round(width * 4 / 3)))
    w = torch.where(some, w.gather(1, first)[:, 0], min(width, round(height * 4 / 3)))
    top = torch.where(some, corner[:, 0] * (height - h + 1), (height - h) / 2).floor()
    left = torch.where(some, corner[:, 1] * (width - w + 1), (width - w) / 2).floor()
    return top, left, h, w


def _resampling(start: Tensor, length: Tensor, size: int, full: int) -> Tensor:
    """Weights (b, size, full) that resize `length` of `full` pixels from `start` on to `size`: Pillow's bicubic."""
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(full, device=start.device) - start
    scale = length / size
    target = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = ((pixel + 0.5 - target) / scale.clamp_min(1)).abs()
    weight = torch.where(x < 1, (1.5 * x - 2.5) * x * x + 1, ((-0.5 * x + 2.5) * x - 4) * x + 2)  # a = -1/2
    weight = weight.masked_fill((x >= 2) | (pixel < 0) | (pixel >= length), 0)
    return weight / weight.sum(2, keepdim=True)


def recolour(x: Tensor, u: Tensor) -> Tensor:
    """Colour jitter with probability 0.8, greyscale with 0.2, of images x (b, 3, h, w) in [0, 1]; changes x in place.

    Strengths are BYOL's: brightness and contrast 0.4, saturation 0.2, hue 0.1. Each image has an order of its own.
    """
    jitter, factors, order, grey = u.split(DRAWS, 1)[4:]
    factors = (2 * factors - 1) * torch.tensor([0.4, 0.4, 0.2, 0.1]) + torch.tensor([1, 1, 1, 0])
    order = order.argsort(1).masked_fill(jitter >= 0.8, -1)
    for turn in order.unbind(1):
        for i, adjust in enumerate((brightness, contrast, saturation, hue)):
            if len(rows := (turn == i).nonzero()[:, 0]):
                rows, factor = rows.to(x.device), factors[rows, i].to(x.device)
                x[rows] = adjust(x[rows], factor[:, None, None, None])
    return torch.where((grey < 0.2)[:, :, None, None].to(x.device), luma(x), x)


def luma(x: Tensor) -> Tensor:
    """0.2989 r + 0.5870 g + 0.1140 b of images (b, 3, h, w): (b, 1, h, w), Appendix B.5."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], drawn to or from black. `factor` is (b, 1, 1, 1), here and below."""
    return (factor * x).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], drawn to or from the mean of their luma."""
    return (factor * x + (1 - factor) * luma(x).mean((2, 3), keepdim=True)).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], drawn to or from their luma."""
    return (factor * x + (1 - factor) * luma(x)).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], with the hue of each pixel turned by `shift` of a full turn."""
    high, low = x.amax(1), x.amin(1)
    chroma = high - low
    r, g, b = (x / chroma.clamp_min(1e-12)[:, None]).unbind(1)  # a grey pixel has no chroma to turn
    sextant = torch.where(high == x[:, 0], g - b, torch.where(high == x[:, 1], 2 + b - r, 4 + r - g))
    k = (sextant[:, None] + 6 * shift + torch.tensor([5.0, 3.0, 1.0], device=x.device)[:, None, None]).remainder(6)
    return high[:, None] - chroma[:, None] * torch.minimum(k, 4 - k).clamp_(0, 1)
