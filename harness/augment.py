"""The two views of BYOL, Appendix B.5: crop and flip, colour jitter, grey, blur, solarisation, normalisation.

    crops = torch.stack([crop_flip(images, v, size) for v in u])    # u: draws (2, b, sum(DRAWS)), uniform on [0, 1)
    v1, v2 = two_views(crops, u, mean, std)

All on batches of images, on their device, each image with draws of its own; torchvision's transforms draw once a batch.
"""

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad
from torchvision.transforms.v2 import functional as F

# How many of an image's uniform draws each choice of a view takes: area, aspect (a crop is tried ten times, as
# torchvision does), corner, flip, jitter, its factors, its order, grey, blur, its width, solarisation.
DRAWS = (10, 10, 2, 1, 1, 4, 4, 1, 1, 1, 1)


def two_views(
    crops: Tensor,
    u: Tensor,
    mean: tuple,
    std: tuple,
    blur: tuple[float, float] = (0.0, 0.0),
    solarise: tuple[float, float] = (0.0, 0.0),
) -> tuple[Tensor, Tensor]:
    """The two views (b, 3, size, size) of crops (2, b, 3, size, size), Appendix B.5; changes crops in [0, 1] in place.

    crops: uint8, or in [0, 1]. u: draws (2, b, sum(DRAWS)), uniform on [0, 1). After crop and flip come colour jitter,
    grey, blur and solarisation, the last two with a probability for each view, then normalisation by mean and std.
    """
    how = zip(crops, u, blur, solarise)
    return tuple(in_chunks(one_view, x, v, mean, std, blurred, solarised) for x, v, blurred, solarised in how)


def one_view(x: Tensor, u: Tensor, mean: tuple, std: tuple, blurred: float, solarised: float) -> Tensor:
    """One view of crops x (b, 3, size, size), u (b, sum(DRAWS)), normalised; changes an x in [0, 1] in place.

    blurred, solarised: the probabilities of either.
    """
    x = recolour(F.to_dtype(x, scale=True), u)
    *_, p, width, q = u.split(DRAWS, 1)
    if len(rows := (p[:, 0] < blurred).nonzero()[:, 0]):
        change(x, rows, gaussian_blur, (0.1 + 1.9 * width)[p < blurred])
    if len(rows := (q[:, 0] < solarised).nonzero()[:, 0]):
        change(x, rows, lambda some: torch.where(some >= 0.5, 1 - some, some))
    return normalise(x, mean, std)


def change(x: Tensor, rows: Tensor, how: Callable, *numbers: Tensor) -> None:
    """Put how(images, *numbers) in place of some rows of x. rows and numbers are on the CPU: a GPU waits for none.

    Rows are copied, as x[rows] = ... takes a CPU twice as long.
    """
    rows, *numbers = (t.to(x.device, non_blocking=True) for t in (rows, *numbers))
    x.index_copy_(0, rows, how(x.index_select(0, rows), *numbers))


def in_chunks(make: Callable, images: Tensor, u: Tensor, *how) -> Tensor:
    """make(images, u, *how), of as many images at a time as a CPU's cache holds, or as are 256 MB in fp32 on a GPU."""
    n = max(1, 2 ** (20 if images.device.type == "cpu" else 26) // images[0].numel())
    return torch.cat([make(*part, *how) for part in zip(images.split(n), u.split(n))])


def normalise(x: Tensor, mean: tuple, std: tuple) -> Tensor:
    """x (b, 3, h, w), uint8 or in [0, 1], less the mean and over the std of each channel."""
    mean, std = (torch.tensor(t).to(x.device, non_blocking=True)[:, None, None] for t in (mean, std))
    return F.to_dtype(x, scale=True).sub(mean).div_(std)  # F.normalize has a GPU finish all before


def crop_flip(images: Tensor, u: Tensor, size: int) -> Tensor:
    """Random resized crop (8-100 % of the area, aspect 3/4-4/3, bicubic) and flip, Appendix B.5.

    uint8 (b, 3, h, w) to (b, 3, size, size) in [0, 1]. Crop, antialiased resize and flip of an image are together
    W_y @ image @ W_x^T, with one row of weights per output pixel.
    """
    return in_chunks(_crop_flip, images, u, size)


def _crop_flip(images: Tensor, u: Tensor, size: int) -> Tensor:
    height, width = images.shape[2:]
    area, aspect, corner, flip = u.split(DRAWS, 1)[:4]
    boxes = crop_boxes(area, aspect, corner, height, width).float()
    boxes, flip = (x.to(images.device, non_blocking=True) for x in (boxes, flip[:, :, None] < 0.5))
    top, left, h, w = boxes.unbind(1)
    w_y = _resampling(top, h, size, height)[:, None]
    w_x = _resampling(left, w, size, width) / 255
    w_x = torch.where(flip, w_x.flip(1), w_x)
    rows = images.float().flatten(1, 2) @ w_x.mT  # one product for all three channels
    return (w_y @ rows.unflatten(1, (3, height))).clamp_(0, 1)  # bicubic weights overshoot


def crop_boxes(area: Tensor, aspect: Tensor, corner: Tensor, height: int, width: int) -> Tensor:
    """Crops (b, 4) as top, left, height and width: the first of an image's ten tries that fits, else its centre.

    In NumPy: workers do this picture by picture, and torch's calls take three times as long on so few numbers.
    """
    area, aspect, corner = area.numpy(), aspect.numpy(), corner.numpy()
    full = np.array([height, width], np.float32)
    area = (0.08 + 0.92 * area) * height * width
    ratio = np.exp((2 * aspect - 1) * math.log(4 / 3))
    sides = np.sqrt(np.stack([area / ratio, area * ratio], 2)).round()
    fits = ((sides >= 1) & (sides <= full)).all(2)
    first = np.arange(len(fits)), fits.argmax(1)
    some = fits[first][:, None]
    central = np.minimum(full, (full[::-1] * (4 / 3)).round())
    length = np.where(some, sides[first], central)
    start = np.where(some, corner * (full - length + 1), (full - length) / 2)
    return torch.from_numpy(np.concatenate([start, length], 1).astype(np.int64))


def _resampling(start: Tensor, length: Tensor, size: int, full: int) -> Tensor:
    """Weights (b, size, full) that resize `length` of `full` pixels from `start` on to `size`: Pillow's bicubic."""
    start, length = start[:, None, None], length[:, None, None]
    pixel = torch.arange(full, device=start.device) - start
    scale = length / size
    target = (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = (pixel + 0.5 - target).abs_().div_(scale.clamp_min(1)).masked_fill_((pixel < 0) | (pixel >= length), 2)
    far, near = (2 - x).clamp_min_(0), (1 - x).clamp_min_(0)  # Keys' kernel, a = -1/2: one cubic of each
    weight = torch.addcmul((far - 1).mul_(far.square_()).div_(2), 1 - 2 * near, near.square())
    return weight.div_(weight.sum(2, keepdim=True))


def recolour(x: Tensor, u: Tensor) -> Tensor:
    """Colour jitter with probability 0.8, greyscale with 0.2, of images x (b, 3, h, w) in [0, 1]; changes x in place.

    Strengths are BYOL's: brightness and contrast 0.4, saturation 0.2, hue 0.1. Each image has an order of its own.
    """
    jitter, factors, order, grey = u.split(DRAWS, 1)[4:8]
    factors = (2 * factors - 1) * torch.tensor([0.4, 0.4, 0.2, 0.1]) + torch.tensor([1, 1, 1, 0])
    order = order.argsort(1).masked_fill(jitter >= 0.8, -1)
    for turn in order.unbind(1):
        for i, adjust in enumerate((brightness, contrast, saturation, hue)):
            if len(rows := (turn == i).nonzero()[:, 0]):
                change(x, rows, adjust, factors[rows, i][:, None, None, None])
    change(x, (grey[:, 0] < 0.2).nonzero()[:, 0], lambda some: luma(some).expand(-1, 3, -1, -1))
    return x


def luma(x: Tensor) -> Tensor:
    """0.2989 r + 0.5870 g + 0.1140 b of images (b, 3, h, w): (b, 1, h, w), Appendix B.5."""
    r, g, b = x.unbind(1)
    return (0.2989 * r + 0.587 * g + 0.114 * b)[:, None]


def brightness(x: Tensor, factor: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], drawn to or from black. `factor` is (b, 1, 1, 1), here and below."""
    return (factor * x).clamp_(0, 1)


def contrast(x: Tensor, factor: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], drawn to or from the mean of their luma."""
    return torch.lerp(luma(x.mean((2, 3), keepdim=True)), x, factor).clamp_(0, 1)


def saturation(x: Tensor, factor: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], drawn to or from their luma."""
    return torch.lerp(luma(x), x, factor).clamp_(0, 1)


def hue(x: Tensor, shift: Tensor) -> Tensor:
    """Images x (b, 3, h, w) in [0, 1], with the hue of each pixel turned by `shift` of a full turn, up to 0.1.

    All is in sextants times chroma, so that a grey pixel, which has no chroma, needs no division. Hue lies between -3
    and 3, red at 0, green at 2, blue at -2; a channel is high within one sextant of its colour, low beyond two.
    """
    r, g, b = x.unbind(1)
    upper, lower = torch.maximum(g, b), torch.minimum(g, b)
    low = torch.minimum(r, lower)
    chroma = torch.maximum(r, upper).sub_(low)
    turned = (upper - lower).add_((upper - r).relu_()).add_((lower - r).relu_(), alpha=2).copysign_(g - b)
    turned.addcmul_(chroma, 6 * shift[:, 0])
    low, chroma, turned = low[:, None], chroma[:, None], turned[:, None]
    colour = torch.tensor([0.0, 2.0, -2.0]).to(x.device, non_blocking=True)[:, None, None]
    near = torch.addcmul(turned, chroma, colour, value=-1).abs_().sub_(chroma, alpha=3).abs_().sub_(chroma).relu_()
    return torch.minimum(near, chroma, out=near).add_(low)


def gaussian_blur(x: Tensor, sigma: Tensor) -> Tensor:
    """Images x (b, 3, n, n), each blurred with its sigma (b,), in pixels; 23x23 at 224 pixels, Appendix B.5.

    The kernel has an odd side of about n / 10 and sees the image reflected at its edges. It is the same in both
    directions, one after the other, and symmetric: a pass over the batch for each pair of pixels at equal distance.
    """
    n, r = x.shape[-1], x.shape[-1] // 20
    kernel = torch.exp(-0.5 * (torch.arange(r + 1, device=x.device) / sigma[:, None]).square())
    kernel = kernel / (2 * kernel.sum(1, keepdim=True) - 1)  # of distance 0, which counts once, to r
    kernel = kernel[:, :, None, None, None]
    for direction, edges in ((2, (0, 0, r, r)), (3, (r, r, 0, 0))):
        near = pad(x, edges, "reflect")
        x = x * kernel[:, 0]
        for d in range(1, r + 1):
            x.addcmul_(near.narrow(direction, r - d, n) + near.narrow(direction, r + d, n), kernel[:, d])
    return x
