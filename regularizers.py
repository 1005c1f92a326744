"""Every scalar of the paper as a plain function of tensors.

    alignment(x, y)     Eq. A.1; with alpha = 2 it is BYOL's loss, Eq. 3
    uniformity(x)       Eq. 2
    info_nce(x, y)      Eq. 1
    mhe(weight)         Eq. 5, the mean over the N (N - 1) ordered pairs of Eq. 7
    amhe(weight)        Eq. A.3, the same mean with angles

Each function projects its rows to the unit sphere, and computes in fp32 (float64 stays float64) even under autocast. A
zero row, of length 1e-12 or less, stays at the centre: at distance 1 and angle pi/2 from other rows, at 0 from other
zero rows, with gradient 0. torch.func, vmap, forward AD, export and higher derivatives work with the first three; mhe
and amhe have the gradient by backward alone, raise otherwise, and run as they are under torch.compile.
Equations: Durrant & Leontidis (2022). To copy this file, torch is all you need.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F

ZERO = 1e-12  # a row of at most this length has no direction; torch.nn.functional.normalize uses the same bound


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Mean distance of positive pairs to the power alpha, Eq. A.1: E ||x - y||^alpha of unit rows, within [0, 2^alpha].

    x, y: (n, d), row i of both from the same image. ValueError unless the shapes agree and alpha > 0.
    """
    if x.shape != y.shape or x.ndim != 2 or not 0 < alpha < math.inf:
        shapes = f"{tuple(x.shape)}, {tuple(y.shape)}"
        raise ValueError(f"alignment takes two (n, d) tensors and alpha > 0, not {shapes}, {alpha}")
    distance = torch.linalg.vector_norm(unit(x) - unit(y), dim=1)
    return distance.clamp_min(1e-30).pow(alpha).mean()  # at 0 the slope would be infinite for alpha < 1


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    """Log of the mean Gaussian potential over pairs, Eq. 2: log E exp(-t ||x_i - x_j||^2) over i != j, within [-4t, 0].

    x: (n, d), n >= 2. ValueError for another shape or t <= 0. The expectation of Eq. 2 includes i = j; the estimator of
    its authors leaves these pairs out, and so does this function.
    """
    if x.ndim != 2 or len(x) < 2 or not 0 < t < math.inf:
        raise ValueError(f"uniformity takes (n, d) with n >= 2 and t > 0, not {tuple(x.shape)}, {t}")
    with torch.autocast(x.device.type, enabled=False):
        x = unit(x)
        half = torch.linalg.vector_norm(x.detach(), dim=1).round() / 2  # of the squared length, which is 1 or 0
        halves = (half[:, None] + half).fill_diagonal_(math.inf)  # i = j is not a pair
        exponent = 2 * t * (x @ x.T - halves)  # = -t ||x_i - x_j||^2
        return exponent.flatten().logsumexp(0) - math.log(len(x) * (len(x) - 1))


def info_nce(x: Tensor, y: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss, Eq. 1: mean over the 2n rows of both tensors of -log softmax(cosines / temperature) at its pair.

    x, y: (n, d), row i of both from the same image. The other 2n - 2 rows are negatives; the paper's M = 2B - 1 counts
    the positive. ValueError unless the shapes agree and temperature > 0.
    """
    if x.shape != y.shape or x.ndim != 2 or not 0 < temperature < math.inf:
        shapes = f"{tuple(x.shape)}, {tuple(y.shape)}"
        raise ValueError(f"info_nce takes two (n, d) tensors and temperature > 0, not {shapes}, {temperature}")
    with torch.autocast(x.device.type, enabled=False):
        z = unit(torch.cat([x, y]))
        similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)
        other_view = torch.arange(len(z), device=z.device).roll(len(x))
        return F.cross_entropy(similarity, other_view)


def mhe(weight: Tensor, s: float = 2) -> Tensor:
    """Hyperspherical energy of a layer, Eq. 5 / (N (N - 1)): mean over i != j of ||w_i - w_j||^-s for unit rows w.

    weight: (N, ...), one neuron a row of weight.flatten(1); N = 1 has no pair and the energy 0. s >= 0; s = 0 is the
    mean of log(1 / ||w_i - w_j||). Distances below 1e-4 count as 1e-4. ValueError for a weight below 2-d or s < 0.
    wy1iu/MHE, the code of Liu et al. (2018), has log(1 / |.|^2) for s = 0, and divides rows by sqrt(|w|^2 + 1e-4).
    """
    return _energy(weight, s, angular=False)


def amhe(weight: Tensor, s: float = 2) -> Tensor:
    """Angular hyperspherical energy of a layer, Eq. A.3 / (N (N - 1)): `mhe` with the angle arccos(w_i . w_j) in
    radians in place of the chord.

    Shapes, errors and the smallest distance (1e-4 rad) are those of `mhe`. wy1iu/MHE divides the angle by pi, adds 1e-4
    to it, and multiplies its energies for s = 1 and 2 by 0.1.
    """
    return _energy(weight, s, angular=True)


def energy_by_definition(weight: Tensor, s: float, angular: bool) -> Tensor:
    """Eq. 5 and Eq. A.3 as they are printed, / (N (N - 1)): the reference that tests compare with.

    Arguments as for `mhe`, but N >= 2, at most one zero row; angular chooses Eq. A.3. It keeps several N x N matrices
    for autograd, and in fp32 close pairs lose their digits: the result is 2 % off at an angle of 1e-3.
    """
    w = unit(weight.flatten(1))
    i, j = torch.triu_indices(len(w), len(w), 1, device=w.device)
    z = torch.cdist(w, w)[i, j]
    if angular:
        z = (w @ w.T)[i, j].clamp(-1, 1).arccos()
    return riesz(z, s).mean()


def riesz(z: Tensor, s: float) -> Tensor:
    """f_s(z) of Eq. 5 for distances z > 0: z^-s, or log(1 / z) for s = 0."""
    return z.pow(-s) if s > 0 else z.log().neg_()


def unit(x: Tensor) -> Tensor:
    """Rows of x (n, d) projected to the unit sphere, in fp32 or float64; a zero row stays zero, with gradient 0."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(1, keepdim=True)
    x = x / largest.where(largest > 1e15, 1)  # the square of 1e19 would overflow
    return x * _inverse_norm(x)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x_i| of the rows of x (n, d), as (n, 1); 0 for a zero row."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (norm > ZERO) / norm.clamp_min(ZERO)


# ---- The same energies, fast and exact -------------------------------------------------------------------------------
#
# The gradient has a closed form: with cosines c_ij = w_i . w_j, dE/dw_i = 2 / (N (N - 1)) sum_j f'(c_ij) w_j. So one
# sweep over blocks of the symmetric Gram matrix yields energy and gradient together, and keeps no block. A cosine near
# 1 or -1 has lost the digits of its angle: a few such pairs are computed from their rows; with many, all is in float64.

SMALLEST = 1e-4  # smaller distances count as this, so that the energy is finite; close neurons are still pushed apart
NEAR = 0.99  # pairs beyond this |cosine| are computed in float64
CPU_BLOCK = 512  # rows in a block: 1 MB of cosines, to fit a cache
GPU_BLOCK = 2048  # for few launches


def _energy(weight, s, angular) -> Tensor:
    if weight.ndim < 2 or not 0 <= s < math.inf:
        wrong = f"{tuple(weight.shape)}, {s}"
        raise ValueError(f"an energy takes a weight (N, ...) of 2 dimensions or more and s >= 0, not {wrong}")
    return _Energy.apply(weight, s, angular)


class _Energy(torch.autograd.Function):
    """Mean of f_s(z) = z^-s, or log(1 / z) for s = 0, over all pairs of neurons; its gradient comes with the value."""

    @staticmethod
    def forward(ctx, weight, s, angular):
        rows = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
        inverse_norm = _inverse_norm(rows)
        w = rows * inverse_norm
        has_zeros = not inverse_norm.all()
        if has_zeros:  # the rows are zero, or their squares have overflowed
            w = unit(rows)
            norm = (w * rows).sum(1, keepdim=True)
            inverse_norm = torch.where(norm > 0, 1 / norm, 0)
        pairs = max(1, len(w) * (len(w) - 1))  # a single neuron has no pair and the energy 0
        arguments = (has_zeros, s, angular, ctx.needs_input_grad[0])
        with torch.autocast(weight.device.type, enabled=False):
            sums = _sweep(w, rows, *arguments)
            if sums is None:
                w = unit(_double(rows))
                sums = _sweep(w, None, *arguments)
        energy, grad = sums
        if grad is not None:
            along_row = (grad * w).sum(1, keepdim=True)
            grad.addcmul_(w, along_row, value=-1)  # the energy does not change with the length of a row
            grad = grad.to(rows).mul_(inverse_norm * (2 / pairs))
            ctx.save_for_backward(grad.view_as(weight))
        return (energy / pairs).to(rows)

    @staticmethod
    def backward(ctx, grad_output):
        if torch.is_grad_enabled():  # create_graph=True; autograd would take the gradient for a constant
            raise RuntimeError("mhe and amhe have no second derivative; energy_by_definition has")
        (grad,) = ctx.saved_tensors
        return grad * grad_output, None, None  # autograd rounds the product to weight's type; in fp16 grad could be 0


def _sweep(w, rows, has_zeros, s, angular, want_grad):
    """Sum of f_s over ordered pairs of unit rows w, and sum_j f'(c_ij) w_j for each row i, up to a multiple of w_i.

    rows: w before it was projected; None if w is in float64. Returns None if it has to be, as near pairs are too many.
    """
    energy = w.new_zeros(())
    grad = torch.zeros_like(w) if want_grad else None
    size = CPU_BLOCK if w.device.type == "cpu" else GPU_BLOCK
    for a in range(0, len(w), size):
        for b in range(a, len(w), size):
            i = slice(a, a + size)
            j = slice(b, b + size)
            on_diagonal = a == b
            times = 1 if on_diagonal else 2  # a block above the diagonal counts for its mirror image, too
            cosine = w[i] @ w[j].T
            if has_zeros:
                zeros = (w[i] == 0).all(1).int()[:, None] + (w[j] == 0).all(1)
                cosine[zeros == 1] = 0 if angular else 0.5  # one of the two: a right angle, or distance 1
                cosine[zeros == 2] = 1
            if on_diagonal:
                cosine.fill_diagonal_(0)  # i = j is not a pair; `_clear` zeroes its terms
            near = None if rows is None else _near_pairs(cosine)
            if rows is None:
                cosine.clamp_(-1 + 2e-16, 1 - SMALLEST**2 / 2)
            if near is not None:
                if len(near[0]) * (w.shape[1] + 16) > max(2**14, cosine.numel()):
                    return None
                cosine.clamp_(-NEAR, NEAR)
            value, slope = _potential(cosine, s, angular, want_grad)
            energy += times * _clear(value, on_diagonal, near).sum()
            if want_grad:
                _clear(slope, on_diagonal, near)
                grad[i].addmm_(slope, w[j])
                if not on_diagonal:
                    grad[j].addmm_(slope.T, w[i])
            if near is not None:
                p, q = near
                energy += times * _exact_pairs(rows, grad, p + a, q + b, s, angular, on_diagonal)
    return energy, grad


def _near_pairs(cosine):
    """Rows and columns of the pairs beyond NEAR; None if there are none, which is usual."""
    low, high = cosine.aminmax()
    if torch.maximum(-low, high) <= NEAR:
        return None
    return (cosine.abs() > NEAR).nonzero(as_tuple=True)


def _clear(block, on_diagonal, near):
    """Set to zero the entries of a block that are not pairs, or that `_exact_pairs` adds."""
    if on_diagonal:
        block.fill_diagonal_(0)
    if near is not None:
        block[near] = 0
    return block


def _potential(cosine, s, angular, want_slope) -> tuple[Tensor, Tensor | None]:
    """f_s(z) and its derivative by the cosine, for cosines within NEAR, which are overwritten."""
    if angular:
        angle = cosine.arccos()
        value = riesz(angle, s)
    else:
        bend = cosine.mul_(-2).add_(2)  # |w_i - w_j|^2
        value = bend.pow(-s / 2) if s > 0 else bend.log().div_(-2)
    if not want_slope:
        return value, None
    # bend = z |dc / dz|, so that the slope f'(c) is s f / bend, or 1 / bend for s = 0
    if angular:
        square_of_sine = torch.addcmul(cosine.new_ones(()), cosine, cosine, value=-1, out=cosine)
        bend = angle.mul_(square_of_sine.sqrt_())
    slope = torch.div(value, bend, out=bend).mul_(s) if s > 0 else bend.reciprocal_()
    return value, slope


def _exact_pairs(rows, grad, p, q, s, angular, on_diagonal):
    """Sum of f_s over the near pairs (p, q) in float64, from rows; adds their share of the gradient to `grad`."""
    x = unit(_double(rows[p]))
    y = unit(_double(rows[q]))
    apart = (x - y).norm(dim=1)
    across = (x + y).norm(dim=1)
    z = dc_dz = apart
    if angular:
        z = 2 * torch.atan2(apart, across)
        dc_dz = apart * across / 2  # the sine of the angle
    z = z.clamp_min(SMALLEST)
    value = riesz(z, s)
    if grad is not None:
        bend = z * dc_dz.clamp_min(1e-30)
        slope = (s * value if s > 0 else 1) / bend
        slope = slope[:, None]
        side = torch.where(apart < across, 1, -1)[:, None]
        pull_p = slope * (y - side * x)  # subtracting side * x changes nothing along the sphere, but keeps all digits
        grad.index_add_(0, p, pull_p.to(grad))
        if not on_diagonal:
            pull_q = slope * (x - side * y)
            grad.index_add_(0, q, pull_q.to(grad))
    return value.sum().to(rows)


def _double(x):
    """Convert to float64, on the CPU if the device has none (Apple's MPS)."""
    return x.cpu().double() if x.device.type == "mps" else x.double()
