"""Every scalar of the paper as a plain function of tensors.

    alignment(x, y)     Eq. A.1; with alpha = 2 it is BYOL's loss, Eq. 3
    uniformity(x)       Eq. 2
    info_nce(x, y)      Eq. 1
    mhe(weight)         Eq. 5, over the N (N - 1) ordered pairs of Eq. 7
    amhe(weight)        Eq. A.3, likewise

Each projects its rows to the unit sphere itself, computes in fp32 (float64 stays float64) whatever autocast says,
and gives a zero row the gradient 0. Equations are those of Durrant & Leontidis, "Hyperspherically Regularized Networks
for Self-Supervision" (2022).
"""

import math

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ZERO = 1e-12  # a row no longer than this has no direction (torch.nn.functional.normalize draws the same line)
SMALLEST = 1e-4  # distances count as at least this, so that coincident neurons have a finite energy and gradient
NEAR = 0.99  # beyond this |cosine| a pair's distance is taken from the rows: their Gram matrix has lost its digits
CPU_BLOCK = 512  # rows a block: one block of the Gram matrix is 1 MB in fp32 and stays in the cache
GPU_BLOCK = 2048  # 16 MB, few launches


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Mean distance of positive pairs to the power alpha, Eq. A.1: E ||x - y||^alpha of unit rows, within [0, 2^alpha].

    x, y: (n, d), row i of both from the same image. ValueError unless the shapes agree and alpha > 0.
    """
    if x.shape != y.shape or x.ndim != 2 or alpha <= 0:
        raise ValueError(
            f"alignment takes two (n, d) tensors and alpha > 0, not {tuple(x.shape)}, {tuple(y.shape)}, {alpha}"
        )
    distance = torch.linalg.vector_norm(unit(x) - unit(y), dim=1).clamp_min(1e-30)  # no infinite slope for alpha < 1
    return distance.pow(alpha).mean()


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    """Log of the mean Gaussian potential over all pairs i < j, Eq. 2: log E exp(-t ||x_i - x_j||^2), within [-4t, 0].

    x: (n, d), n >= 2, else ValueError. Eq. 2's expectation admits i = j; like its authors' estimator, this does not.
    """
    if x.ndim != 2 or len(x) < 2 or t <= 0:
        raise ValueError(f"uniformity takes (n, d) with n >= 2 and t > 0, not {tuple(x.shape)}, {t}")
    with torch.autocast(x.device.type, enabled=False):
        x = unit(x)
        exponent = 2 * t * (x @ x.T - 1)  # = -t ||x_i - x_j||^2
        others = exponent.masked_fill(torch.eye(len(x), dtype=torch.bool, device=x.device), -math.inf)
        return others.flatten().logsumexp(0) - math.log(len(x) * (len(x) - 1))


def info_nce(x: Tensor, y: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss, Eq. 1: mean over the 2n rows of both tensors of -log softmax(cosines / temperature) at its pair.

    x, y: (n, d), row i of both from the same image. The other 2n - 2 rows are negatives; the paper's M = 2B - 1 counts
    the positive. ValueError unless the shapes agree and temperature > 0.
    """
    if x.shape != y.shape or x.ndim != 2 or temperature <= 0:
        shapes = f"{tuple(x.shape)}, {tuple(y.shape)}"
        raise ValueError(f"info_nce takes two (n, d) tensors and temperature > 0, not {shapes}, {temperature}")
    with torch.autocast(x.device.type, enabled=False):
        z = unit(torch.cat([x, y]))
        itself = torch.eye(len(z), dtype=torch.bool, device=z.device)
        similarity = (z @ z.T / temperature).masked_fill(itself, -math.inf)
        return torch.nn.functional.cross_entropy(similarity, torch.arange(len(z), device=z.device).roll(len(x)))


def mhe(weight: Tensor, s: float = 2) -> Tensor:
    """Hyperspherical energy of a layer, Eq. 5 over N (N - 1): mean over i != j of ||w_i - w_j||^-s for unit rows w.

    weight: (N, ...), one neuron a row of weight.flatten(1); N = 1 has no pair and the energy 0. s >= 0; s = 0 is the
    mean of log(1 / ||w_i - w_j||). Distances below 1e-4 count as 1e-4. ValueError for a weight below 2-d or s < 0.

    The code of Liu et al. (2018), wy1iu/MHE, differs in constants alone: its s = 0 is log(1 / |.|^2), twice Eq. 5, and
    its rows are divided by sqrt(|w|^2 + 1e-4).
    """
    return _energy(weight, s, angular=False)


def amhe(weight: Tensor, s: float = 2) -> Tensor:
    """Angular hyperspherical energy of a layer, Eq. A.3 over N (N - 1): `mhe` with the angle arccos(w_i . w_j), in
    radians, in place of the chord.

    Shapes, errors and the smallest distance (1e-4 rad) are those of `mhe`. wy1iu/MHE divides the angle by pi, adds 1e-4
    to it and hides a factor 0.1 in its a1 and a2.
    """
    return _energy(weight, s, angular=True)


def energy_by_definition(weight: Tensor, s: float, angular: bool) -> Tensor:
    """Eq. 5 and Eq. A.3 as they are printed, over N (N - 1): what `mhe` and `amhe` are tested against, in float64.

    It keeps several N x N matrices for autograd, and in fp32 it loses close pairs' digits: 2 % at an angle of 1e-3.
    """
    w = torch.nn.functional.normalize(weight.flatten(1))
    i, j = torch.triu_indices(len(w), len(w), 1, device=w.device)
    z = (w @ w.T)[i, j].clamp(-1, 1).arccos() if angular else torch.cdist(w, w)[i, j]
    return z.pow(-s).mean() if s > 0 else -z.log().mean()


def unit(x: Tensor) -> Tensor:
    """Rows of x (n, d) projected to the unit sphere, in fp32 or float64; a zero row stays zero, with gradient 0."""
    return x.to(_precision(x)) * _inverse_norm(x.to(_precision(x)))


def _precision(x: Tensor) -> torch.dtype:
    """float64 for float64, else float32."""
    return torch.promote_types(x.dtype, torch.float32)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x_i| of the rows of x (n, d), as (n, 1); 0 for a zero row."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (norm > ZERO) / norm.clamp_min(ZERO)


def _energy(weight: Tensor, s: float, angular: bool) -> Tensor:
    if weight.ndim < 2 or not 0 <= s < math.inf:
        raise ValueError(
            f"an energy takes a weight (N, ...) of 2 dimensions or more and s >= 0, not {tuple(weight.shape)}, {s}"
        )
    return _Energy.apply(weight, s, angular)


class _Energy(torch.autograd.Function):
    """The mean of f_s over all pairs and its gradient, in one sweep over blocks of the Gram matrix.

    With c_ij = w_i . w_j for unit rows, dE/dw_i = 2 / (N (N - 1)) sum_j f'(c_ij) w_j: again a product of a matrix and
    rows, so a block of cosines yields its share of energy and gradient and is forgotten. f'(c_ij) is symmetric, so only
    blocks on and above the diagonal are visited. Nothing of size N x N is kept.
    """

    @staticmethod
    def forward(ctx, weight: Tensor, s: float, angular: bool) -> Tensor:
        rows = weight.flatten(1).to(_precision(weight))
        scale = _inverse_norm(rows)
        w = rows * scale
        pairs = max(1, len(w) * (len(w) - 1))  # a single neuron has none, and the energy 0
        with torch.autocast(weight.device.type, enabled=False):
            energy, grad = _sweep(rows, w, s, angular, want_grad=ctx.needs_input_grad[0])
        if grad is not None:
            grad.addcmul_(w, (grad * w).sum(1, keepdim=True), value=-1)  # E does not change with a row's length
            ctx.save_for_backward(grad.mul_(scale * (2 / pairs)).to(weight.dtype).view_as(weight))
        return energy / pairs

    @staticmethod
    @once_differentiable
    def backward(ctx, grad_output: Tensor):
        (grad,) = ctx.saved_tensors
        return (grad * grad_output).to(grad.dtype), None, None


def _sweep(rows: Tensor, w: Tensor, s: float, angular: bool, want_grad: bool) -> tuple[Tensor, Tensor | None]:
    """Sum of f_s over ordered pairs of unit rows w, and sum_j f'(c_ij) w_j for each row i, up to a multiple of w_i."""
    energy = w.new_zeros(())
    grad = torch.zeros_like(w) if want_grad else None
    block = CPU_BLOCK if w.device.type == "cpu" else GPU_BLOCK
    for a in range(0, len(w), block):
        for b in range(a, len(w), block):
            i, j = slice(a, a + block), slice(b, b + block)
            cosine = w[i] @ w[j].T
            if a == b:
                cosine.fill_diagonal_(0)  # no pair: its share is removed below
            if (near := _near(cosine)) is not None:
                cosine.clamp_(-NEAR, NEAR)
            value, slope = _riesz(cosine, s, angular, want_grad)
            for x in (value, slope) if want_grad else (value,):
                if a == b:
                    x.fill_diagonal_(0)
                if near is not None:
                    x[near] = 0
            times = 1 if a == b else 2
            energy += times * value.sum()
            if want_grad:
                grad[i].addmm_(slope, w[j])
                if a != b:
                    grad[j].addmm_(slope.T, w[i])
            if near is not None:
                chunks = (k.split(max(1, 2**22 // w.shape[1])) for k in near)
                for p, q in zip(*chunks):
                    energy += times * _exact_pairs(rows, grad, p + a, q + b, s, angular, both=a != b)
    return energy, grad


def _near(cosine: Tensor) -> tuple[Tensor, Tensor] | None:
    """Rows and columns of the pairs that are close or opposite, usually none."""
    low, high = cosine.aminmax()
    if torch.maximum(-low, high) <= NEAR:
        return None
    return (cosine.abs() > NEAR).nonzero(as_tuple=True)


def _riesz(cosine: Tensor, s: float, angular: bool, want_slope: bool) -> tuple[Tensor, Tensor | None]:
    """f_s(z), z^-s or log(1 / z), and its derivative by the cosine, of cosines within NEAR, which are written over."""
    if angular:
        z = cosine.arccos()
        value = z.pow(-s) if s > 0 else z.log().neg_()
    else:
        bend = cosine.mul_(-2).add_(2)  # z^2; dz/dc = -1 / z, so f' = s f / z^2
        value = bend.pow(-s / 2) if s > 0 else bend.log().div_(-2)
    if not want_slope:
        return value, None
    if angular:
        sine = torch.addcmul(cosine.new_ones(()), cosine, cosine, value=-1, out=cosine).sqrt_()
        bend = z.mul_(sine)  # dz/dc = -1 / sin z, so f' = s f / (z sin z)
    return value, torch.div(value, bend, out=bend).mul_(s) if s > 0 else bend.reciprocal_()


def _exact_pairs(
    rows: Tensor, grad: Tensor | None, p: Tensor, q: Tensor, s: float, angular: bool, both: bool
) -> Tensor:
    """Sum of f_s over the pairs (p, q), close or opposite, from the difference and the sum of their rows in float64."""
    x, y = unit(rows[p].double()), unit(rows[q].double())
    apart, across = (x - y).norm(dim=1), (x + y).norm(dim=1)
    z = (2 * torch.atan2(apart, across) if angular else apart).clamp_min(SMALLEST)
    value = z.pow(-s) if s > 0 else -z.log()
    if grad is not None:
        bend = z * (apart * across / 2 if angular else apart).clamp_min(1e-30)  # sin z = apart across / 2
        slope = ((s * value if s > 0 else 1) / bend)[:, None]
        side = torch.where(apart < across, 1, -1)[:, None]  # y -+ x points along the sphere as y does, with all digits
        grad.index_add_(0, p, (slope * (y - side * x)).to(grad.dtype))
        if both:
            grad.index_add_(0, q, (slope * (x - side * y)).to(grad.dtype))
    return value.sum().to(rows.dtype)
