"""What the views are made of: crop and flip, colour operations, blur, solarisation, of whole batches of images.

    v1, v2 = crop_flip(images, u, size)         # u: (2, b, DRAWS_PER_IMAGE), uniform on [0, 1), on the CPU
    change(v1, [(hue, is_turned, shift)])       # some images of the batch, each by a number of its own

torchvision's transforms draw once a batch; here each image has numbers of its own. Strengths and probabilities stand in
`data.two_views`. This file needs torch, torchvision and numpy alone, so that you can copy it.
"""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

# How many of the numbers u of an image each choice of a view takes. A crop is tried ten times, as in torchvision.
DRAWS = {
    "area": 10,
    "aspect": 10,
    "corner": 2,
    "flip": 1,
    "jitter": 1,
    "factors": 4,  # of brightness, contrast, saturation, hue
    "order": 4,
    "grey": 1,
    "blur": 1,
    "sigma": 1,
    "solarise": 1,
}
DRAWS_PER_IMAGE = sum(DRAWS.values())
Change = tuple[Callable, Tensor, Tensor]  # an operation, whether each image gets it (b,), and with which number (b,)

SMALLEST_BLURRED = 20  # pixels a side: in smaller views the kernel of the blur is a single pixel and changes nothing
CHUNK_ON_CPU = 2**20  # numbers: what a cache holds
CHUNK_ON_GPU = 2**26  # numbers: 256 MB in fp32


def named_draws(u: Tensor) -> dict[str, Tensor]:
    """Return u (..., DRAWS_PER_IMAGE) by the name of each choice: (..., DRAWS[name]), or (...) for a single number."""
    columns = u.split(list(DRAWS.values()), -1)
    return {name: column.squeeze(-1) for name, column in zip(DRAWS, columns)}


def normalise(x: Tensor, mean: tuple, std: tuple) -> Tensor:
    """Return images x (b, 3, h, w), uint8 or in [0, 1], less the mean and over the std of each channel."""
    # Not F.normalize, which compares std with 0 and so waits for a GPU.
    x = F.to_dtype(x, scale=True)
    return x.sub(_per_channel(tuple(mean), x.device)).div_(_per_channel(tuple(std), x.device))


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """Return x (...) on a device, and do not wait for CUDA to copy it.

    On MPS the memory of a temporary x could be taken again before it is copied (pytorch/pytorch issue 139550).
    """
    return x.to(device, non_blocking=device.type == "cuda")


@functools.cache  # each is copied to a GPU once
def _per_channel(values: tuple, device: torch.device) -> Tensor:
    """Return one number for each channel of images, (3, 1, 1)."""
    column = to_device(torch.tensor(values), device)
    return column[:, None, None]


def change(x: Tensor, changes: list[Change]) -> None:
    """Put operation(images, numbers) in place of those images of x that get it, for one operation after the other.

    Operations take images (n, 3, h, w) and a number for each, (n, 1, 1, 1). The tensors of `changes` are on the CPU:
    a GPU gets all of them in two copies, and nobody waits for it.
    """
    operations, is_changed, numbers = zip(*changes)
    is_changed = torch.stack(is_changed)
    rows = to_device(is_changed.nonzero()[:, 1], x.device)
    numbers = to_device(torch.stack(numbers)[is_changed], x.device)[:, None, None, None]
    lengths = is_changed.sum(1).tolist()
    for operation, changed_rows, number in zip(operations, rows.split(lengths), numbers.split(lengths)):
        if len(changed_rows) > 0:
            changed = operation(x.index_select(0, changed_rows), number)
            x.index_copy_(0, changed_rows, changed)  # x[changed_rows] = changed takes a CPU twice as long


def in_chunks(*per_image: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield images, and what there is for each, such as its u, in as many rows as are quickest on their device."""
    images = per_image[0]
    chunk = CHUNK_ON_CPU if images.device.type == "cpu" else CHUNK_ON_GPU
    n = max(1, chunk // images[0].numel())
    return zip(*[x.split(n) for x in per_image])


# ---- Crop, resize and flip -------------------------------------------------------------------------------------------
def crop_flip(images: Tensor, u: Tensor, size: int) -> Tensor:
    """Random resized crops (8-100 % of the area, aspect 3/4-4/3, bicubic) and flips, Appendix B.5.

    uint8 (b, 3, h, w) and u (views, b, DRAWS_PER_IMAGE) to (views, b, 3, size, size) in [0, 1]. Crop, antialiased
    resize and flip of an image are together W_y @ image @ W_x^T, with one row of weights per output pixel.
    """
    height, width = images.shape[2:]
    crops = []
    for x, of_x in in_chunks(images.repeat(len(u), 1, 1, 1), u.flatten(0, 1)):  # all views pass together
        boxes = to_device(crop_boxes(of_x, height, width), x.device)
        top, left, box_height, box_width, is_flipped = boxes[:, :, None, None].unbind(1)
        w_y = _resampling(top, box_height, size, height)
        w_x = _resampling(left, box_width, size, width) / 255
        w_x = torch.where(is_flipped > 0, w_x.flip(1), w_x)
        rows = x.float().flatten(1, 2) @ w_x.mT  # (b, 3 h, size): one product for all three channels
        crop = w_y[:, None] @ rows.unflatten(1, (3, height))
        crops.append(crop.clamp_(0, 1))  # bicubic weights overshoot
    return torch.cat(crops).unflatten(0, (len(u), -1))


def crop_boxes(u: Tensor, height: int, width: int) -> Tensor:
    """Return crops (b, 5) by u (b, DRAWS_PER_IMAGE) on the CPU: top, left, height, width, and 1 for a flipped one.

    It is the first of ten tries that fits, else the image's centre. In NumPy: on the few numbers of one picture, as
    loader workers have them, torch takes three times as long.
    """
    draws = {name: numbers.numpy() for name, numbers in named_draws(u).items()}
    full = np.array([height, width], np.float32)
    pixels = (0.08 + 0.92 * draws["area"]) * height * width
    ratio = np.exp((2 * draws["aspect"] - 1) * math.log(4 / 3))  # of width to height, uniform in its logarithm
    sides = np.sqrt(np.stack([pixels / ratio, pixels * ratio], 2)).round()
    fits = ((sides >= 1) & (sides <= full)).all(2)
    first_fit = sides[np.arange(len(sides)), fits.argmax(1)]
    any_fits = fits.any(1)[:, None]
    widest = (full[::-1] * (4 / 3)).round()  # and highest, at an aspect of 4/3 and of 3/4
    length = np.where(any_fits, first_fit, np.minimum(full, widest))
    room = full - length
    start = np.where(any_fits, draws["corner"] * (room + 1), room / 2)
    boxes = np.column_stack([start, length, draws["flip"] < 0.5])
    return torch.from_numpy(boxes.astype(np.int64))


def _resampling(start: Tensor, length: Tensor, size: int, full: int) -> Tensor:
    """Return weights (b, size, full) that resize `length` of `full` pixels from `start` on to `size`: Pillow's bicubic.

    start and length are (b, 1, 1). Keys' cubic kernel, a = -1/2, is as wide as a pixel of the output, where that is the
    wider one: 1.5 x^3 - 2.5 x^2 + 1 of distances x up to 1, (1 - x) (2 - x)^2 / 2 up to 2.
    """
    scale = length / size
    pixel = torch.arange(full, device=start.device) - start
    target = torch.arange(0.5, size, device=start.device)[:, None] * scale
    distance = (pixel + 0.5 - target).abs_()
    distance /= scale.clamp_min(1)
    distance.masked_fill_((pixel < 0) | (pixel >= length), 2)  # where the kernel is 0
    # Without a case distinction: the second cubic everywhere, and up to 1 what the first has beyond it.
    to_two = (2 - distance).clamp_min_(0)
    to_one = (1 - distance).clamp_min_(0)
    outer = (to_two - 1).mul_(to_two.square_()).div_(2)
    weight = torch.addcmul(outer, 1 - 2 * to_one, to_one.square())
    return weight.div_(weight.sum(2, keepdim=True))


# ---- Colour: images are (b, 3, h, w) in [0, 1], a factor is (b, 1, 1, 1) ---------------------------------------------
def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Images drawn to black, by a factor below 1, or away from it."""
    return (factor * x).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Images drawn to the mean of their luma, 0.2989 r + 0.5870 g + 0.1140 b, Appendix B.5, or away from it."""
    mean = F.rgb_to_grayscale(x.mean((2, 3), keepdim=True))
    return torch.lerp(mean, x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Images drawn to their luma, or away from it; grey images by a factor of 0."""
    return torch.lerp(F.rgb_to_grayscale(x), x, factor).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Images with the hue of each pixel turned by `shift` (b, 1, 1, 1) of a full turn, up to 0.1.

    Hue is an angle in sextants, red at 0, green at 2, blue at -2. A channel stands at the pixel's highest value within
    one sextant of its colour, at its lowest beyond two, and in between on a straight line:

        channel = low + chroma * clamp(|distance - 3| - 1, 0, 1),    distance = |hue - colour|, either way round

    All angles are multiplied by chroma, so that a grey pixel, which has none, needs no division.
    """
    r, g, b = x[:, :, None].unbind(1)
    upper = torch.maximum(g, b)
    lower = torch.minimum(g, b)
    low = torch.minimum(r, lower)
    chroma = torch.maximum(r, upper).sub_(low)

    angle = upper - lower  # from red: the first sextant, as long as red is the highest channel
    angle += (upper - r).relu_()  # the second, while red is in between
    angle.add_((lower - r).relu_(), alpha=2)  # the third, while red is the lowest
    angle.copysign_(g - b)  # towards green, or towards blue
    angle.addcmul_(chroma, 6 * shift)

    colours = _per_channel((0.0, 2.0, -2.0), x.device)
    distance = torch.addcmul(angle, chroma, colours, value=-1).abs_()
    from_opposite = distance.sub_(chroma, alpha=3).abs_()
    above_low = from_opposite.sub_(chroma).relu_()
    torch.minimum(above_low, chroma, out=above_low)
    return above_low.add_(low)


def solarise(x: Tensor, threshold: Tensor) -> Tensor:
    """Images with all values from the threshold on inverted."""
    return torch.where(x >= threshold, 1 - x, x)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Images x (b, 3, n, n), each blurred with its sigma (b, 1, 1, 1), in pixels; 23x23 at 224 pixels, Appendix B.5.

    The kernel has an odd side of about n / 10 and sees the image reflected at its edges. Smaller than 20 pixels, an
    image stays as it is.
    """
    radius = x.shape[-1] // SMALLEST_BLURRED
    if radius == 0:
        return x
    distances = torch.arange(radius + 1, device=x.device)
    deviations = distances / sigma.view(-1, 1)
    weights = torch.exp(-0.5 * deviations.square())
    total = 2 * weights.sum(1, keepdim=True) - 1  # distance 0 counts once
    weights = (weights / total)[:, :, None, None, None]
    return _blur_along(3, _blur_along(2, x, weights), weights)


def _blur_along(direction: int, x: Tensor, weights: Tensor) -> Tensor:
    """Sums over pixels of x in direction 2 or 3, by weights (b, radius + 1, 1, 1, 1) of distances 0 ... radius."""
    n = x.shape[-1]
    radius = weights.shape[1] - 1
    edges = (radius, radius, 0, 0) if direction == 3 else (0, 0, radius, radius)
    padded = pad(x, edges, "reflect")
    x = x * weights[:, 0]  # takes the name of the input, whose memory the sums below can use again
    for distance in range(1, radius + 1):  # one pass for two pixels, which have the same weight
        before = padded.narrow(direction, radius - distance, n)
        after = padded.narrow(direction, radius + distance, n)
        x.addcmul_(before + after, weights[:, distance])
    return x
