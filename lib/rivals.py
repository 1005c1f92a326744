"""Regularizers of others, beside the paper's own: of neurons `orthogonality`, of projections `koleo` and `sigreg`.

Each is a plain function of tensors, in fp32 or float64, under autocast, too. Zero rows get no gradient from the first
two. torch is all that this file needs.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

CLOSEST = 1e-8  # added to a distance before its logarithm, as in DINOv2: a row with a duplicate counts 18.4
SLICES = 256  # directions of a step, as many as in LeJEPA's listings


def orthogonality(weight: Tensor) -> Tensor:
    """Mean of (w_i . w_j)^2 over i != j of the neurons w, unit rows of weight (N, ...); 0 ... 1, of random rows 1 / d.

    Soft orthogonality, |W W' - 1|^2 of Bansal et al. (2018), of directions alone. A single neuron has the value 0.
    """
    with torch.autocast(weight.device.type, enabled=False):
        w = _unit(weight.flatten(1))
        cosine = (w @ w.T).fill_diagonal_(0)
        pairs = max(1, len(w) * (len(w) - 1))
        return cosine.square().sum() / pairs


def koleo(x: Tensor) -> Tensor:
    """Mean of -log |x_i - x_j| over unit rows of x (n, d), n >= 2, where x_j is the nearest other row; -log 2 or more.

    Sablayrolles et al. (2019), of unit rows as in DINOv2. Between equal rows there is no gradient.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = _unit(x)
        cosine = (x.detach() @ x.detach().T).fill_diagonal_(-2)
        nearest = x[cosine.argmax(1)]
        distance = torch.linalg.vector_norm(x - nearest, dim=1)
        return -(distance + CLOSEST).log().mean()


def sigreg(x: Tensor, directions: Tensor) -> Tensor:
    """Epps and Pulley's statistic of x (n, d) along directions (d, k), their mean; of normal numbers 1.05 on average.

    It is n times the integral of |f(t) - g(t)|^2 g(t) from -3 to 3: f is the characteristic function of the n numbers,
    g(t) = exp(-t^2 / 2) that of N(0, 1). LeJEPA, arXiv 2511.08544, with the 17 points t >= 0 of its authors' code.
    """
    with torch.autocast(x.device.type, enabled=False):
        x = x.to(torch.promote_types(x.dtype, torch.float32))
        t = torch.linspace(0, 3, 17, dtype=x.dtype, device=x.device)
        g = (-t.square() / 2).exp()
        angle = (x @ directions.to(x.dtype))[:, :, None] * t
        real, imaginary = angle.cos().mean(0), angle.sin().mean(0)
        gap = (real - g).square() + imaginary.square()
        return 2 * len(x) * torch.trapezoid(gap * g, t).mean()


def directions(x: Tensor, seed: int, step: int) -> Tensor:
    """Draw directions for the columns of x (n, d), unit columns (d, 256): the same of a seed and step everywhere."""
    generator = torch.Generator().manual_seed(1_000_003 * seed + step)  # it keeps 32 bits
    drawn = torch.randn(x.shape[1], SLICES, generator=generator)  # on the CPU: a GPU has other numbers
    return F.normalize(drawn, dim=0).to(x.device, non_blocking=x.is_cuda)


def _unit(x: Tensor) -> Tensor:
    """Unit rows of x (n, d), in fp32 or float64; a zero row stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    x = x / x.detach().abs().amax(1, keepdim=True).clamp_min(1)  # the square of 1e20 overflows
    length = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return torch.where(length > 1e-12, x / length.clamp_min(1e-12), 0)
