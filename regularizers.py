"""Every scalar of the paper, Durrant & Leontidis (2022), as a plain function of tensors; torch is all it needs.

    alignment(x, y)     Eq. A.1; with alpha = 2 BYOL's loss, Eq. 3
    uniformity(x)       Eq. 2
    info_nce(x, y)      Eq. 1
    mhe(weight)         Eq. 5, the mean over the N (N - 1) ordered pairs of Eq. 7
    amhe(weight)        Eq. A.3, the same mean with angles
    energy_of(model)    the same for each layer of a network

Each projects its rows to the unit sphere, and computes in fp32 or float64, under autocast, too. A zero row is one of
length 1e-12 or less: at distance 1 and angle pi/2 from other rows, at 0 from zero rows, with gradient 0. ValueError for
other shapes, and for numbers out of range.

Energies have first derivatives alone. torch.compile runs them between two graphs, one break of the graph; RuntimeError
under its fullgraph=True, in torch.export, in torch.func's transforms such as grad and vmap, and for second derivatives.
energy_by_definition has these, and works in all of them but forward-mode derivatives (jvp, hessian; jacrev twice does).
"""

import itertools
import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.nn.utils.parametrize import is_parametrized

Layers = dict[str, Tensor]  # the weight of each layer, by the layer's name
ZERO = 1e-12  # a row of at most this length has no direction; the bound of torch.nn.functional.normalize


def alignment(x: Tensor, y: Tensor, alpha: float = 2) -> Tensor:
    """Mean of ||x_i - y_i||^alpha over positive pairs, rows of x and y (n, d), Eq. A.1; 0 ... 2^alpha, alpha > 0."""
    _check_pairs(x, y, "alpha", alpha)
    distance = torch.linalg.vector_norm(unit(x) - unit(y), dim=1)
    return distance.clamp_min(1e-30).pow(alpha).mean()  # at 0 the slope would be infinite for alpha < 1


def uniformity(x: Tensor, t: float = 2) -> Tensor:
    """Log of the mean of exp(-t ||x_i - x_j||^2) over rows i != j of x (n, d), n >= 2, Eq. 2: -4t ... 0. t <= 10."""
    if x.ndim != 2 or len(x) < 2 or not 0 < t <= 10:  # t multiplies the rounding of cosines
        raise ValueError(f"uniformity takes (n, d) with n >= 2, and 0 < t <= 10, not {tuple(x.shape)}, {t}")
    with torch.autocast(x.device.type, enabled=False):
        x = unit(x)
        half = x.detach().any(1) / 2  # of the squared length, which is 1 or 0
        halves = (half[:, None] + half).fill_diagonal_(math.inf)  # Eq. 2 has i = j, too, its authors' code has not
        exponent = 2 * t * (x @ x.T - halves)  # = -t ||x_i - x_j||^2
        pairs = len(x) * (len(x) - 1)
        return exponent.flatten().logsumexp(0) - math.log(pairs)


def info_nce(x: Tensor, y: Tensor, temperature: float = 0.5) -> Tensor:
    """SimCLR's loss, Eq. 1: mean over the rows of x and y (n, d) of -log softmax(cosines / temperature) at its pair."""
    _check_pairs(x, y, "temperature", temperature)
    with torch.autocast(x.device.type, enabled=False):
        z = unit(torch.cat([x, y]))
        similarity = (z @ z.T / temperature).fill_diagonal_(-math.inf)  # the paper's M = 2n - 1 counts the positive
        other_view = torch.arange(len(z), device=z.device).roll(len(x))
        return F.cross_entropy(similarity, other_view)


def _check_pairs(x, y, name, number):
    if x.shape != y.shape or x.ndim != 2 or not 0 < number < math.inf:
        raise ValueError(f"takes two (n, d) tensors and {name} > 0, not {[*x.shape]}, {[*y.shape]} and {number}")


def mhe(weight: Tensor, s: float = 2) -> Tensor:
    """Hyperspherical energy of a layer, Eq. 5 / (N (N - 1)): mean over i != j of ||w_i - w_j||^-s for unit rows w.

    weight: (N, ...), a row a neuron, which alone has energy 0. s: 0 ... 8; at 0 the mean of log(1 / ||w_i - w_j||).
    """
    return energy_of({"": weight}, s, angular=False)[""]


def amhe(weight: Tensor, s: float = 2) -> Tensor:
    """Angular hyperspherical energy: `mhe` by the angle arccos(w_i . w_j) in radians, Eq. A.3 / (N (N - 1))."""
    return energy_of({"": weight}, s)[""]


def energy_of(network: nn.Module | Layers, s: float = 2, angular: bool = True, half_space: bool = False) -> dict:
    """Energy of each layer, {layer: scalar}, of a network or of {layer: weight}: `amhe`, or `mhe` if not angular.

    half_space: -w is a neuron, too, for each w, as in wy1iu/MHE. ValueError also for a network without layers.
    """
    if torch.compiler.is_dynamo_compiling():  # it would break at each level of calls, and compile each shape anew
        return torch.compiler.disable(energy_of)(network, s, angular, half_space)
    layers = network if isinstance(network, dict) else layers_of(network)
    if not layers:
        raise ValueError("the network has no linear layer or convolution whose neurons have an energy")
    weights = list(layers.values())
    if half_space:
        weights = [torch.cat([weight, -weight]) for weight in weights]
    flattest = min(weights, key=Tensor.dim)
    if flattest.ndim < 2 or not 0 <= s <= 8:  # at 8 two equal rows have 1e32, which fp32 holds
        raise ValueError(f"an energy takes weights (N, d, ...), and 0 <= s <= 8, not {[*flattest.shape]}, {s}")
    with torch.autocast(weights[0].device.type, enabled=False):
        energies = _Energies.apply(s, angular, *weights)
    return dict(zip(layers, energies))


def layers_of(network: nn.Module) -> Layers:
    """Weights (N, ...) of a network's linear layers and ungrouped convolutions, {layer: weight}; a shared one once."""
    network = getattr(network, "_orig_mod", network)  # of torch.compile
    if isinstance(network, nn.parallel.DistributedDataParallel):
        network = network.module
    found = {}
    for name, module in network.named_modules():
        is_grouped = getattr(module, "groups", 1) > 1  # its rows see different inputs, so they have no angle
        if isinstance(module, (nn.Linear, _ConvNd)) and not is_grouped:
            weight, sources = _weight_of(module)
            if hasattr(weight, "full_tensor"):  # of fully_shard: the whole, made anew at each call
                weight = weight.full_tensor()
            is_transposed = isinstance(module, _ConvTransposeNd)
            if is_transposed:  # (in, N, ...): a convolution that shares it has other neurons
                weight = weight.transpose(0, 1)
            found.setdefault((is_transposed, *sources), (name.replace("_orig_mod.", ""), weight))
    return dict(found.values())


def _weight_of(module):
    """The weight of a layer, and what it is made of, and how: a parametrized one is new at each access."""
    if not is_parametrized(module, "weight"):
        return module.weight, (module.weight,)
    maker = module.parametrizations.weight
    modes = {part: part.training for part in maker.modules()}
    weight = maker.eval()()  # in training mode spectral_norm would take a step of its iteration
    for part, mode in modes.items():
        part.training = mode
    return weight, (*maker.parameters(), *maker.buffers(recurse=False), *map(type, maker))


def energy_by_definition(weight: Tensor, s: float, angular: bool) -> Tensor:
    """Eq. 5, or Eq. A.3 if angular, as printed, / (N (N - 1)), N >= 2: the reference of tests, for float64."""
    w = unit(weight.flatten(1))
    is_pair = ~torch.eye(len(w), dtype=bool, device=w.device)
    z = torch.cdist(w, w)[is_pair]
    if angular:
        z = (w @ w.T)[is_pair].clamp(-1, 1).arccos()
    return riesz(z, s).mean()


def riesz(z: Tensor, s: float) -> Tensor:
    """f_s(z) of Eq. 5 for distances z > 0: z^-s, or log(1 / z) for s = 0."""
    return z.pow(-s) if s > 0 else z.log().neg_()


def unit(x: Tensor) -> Tensor:
    """Rows of x (n, d) projected to the unit sphere, in fp32 or float64; a zero row stays zero."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    largest = x.detach().abs().amax(1, keepdim=True).clamp_min(1e15)
    x = x / (largest / 1e15)  # by 1, unless a row has larger numbers: the square of 1e20 overflows
    return x * _inverse_norm(x)


def _inverse_norm(x: Tensor) -> Tensor:
    """1 / |x_i| of the rows of x (n, d), as (n, 1); 0 for a zero row."""
    norm = torch.linalg.vector_norm(x, dim=1, keepdim=True)
    return (norm > ZERO) / norm.clamp_min(ZERO)


# ---- The same energies, fast and exact -------------------------------------------------------------------------------
# With cosines c_ij, dE/dw_i = 2 / (N (N - 1)) sum_j f'(c_ij) w_j: one sweep over blocks of the symmetric Gram matrix
# yields energy and gradient, and keeps no block.
SMALLEST = 1e-4  # smaller distances count as this; close neurons are still pushed apart
NEAR = 0.99  # a |cosine| beyond this has lost digits of its angle in fp32: its layer is computed again in float64
CPU_BLOCK = 512  # rows in a block: 1 MB of cosines, to fit a cache
GPU_BLOCK = 2048  # for few launches


class _Energies(torch.autograd.Function):
    """Mean of f_s(z) over all pairs of neurons, for each weight, and its gradient."""

    @staticmethod
    def forward(ctx, s, angular, *weights):
        wanted = ctx.needs_input_grad[2:]
        sweeps = [_sweep(weight, s, angular, want_grad) for weight, want_grad in zip(weights, wanted)]
        energies, grads, is_coarse = map(list, zip(*sweeps))
        for i, needs_float64 in enumerate(torch.stack(is_coarse).tolist()):  # the only time a GPU is waited for
            if needs_float64:
                x = weights[i]
                if x.device.type == "mps":  # it has no float64
                    x = x.cpu()
                energy, grad, _ = _sweep(x.double(), s, angular, wanted[i], exact=True)
                energies[i] = energy.to(energies[i])
                grads[i] = grad if grad is None else grad.to(grads[i])
        ctx.save_for_backward(*grads)
        return tuple(energies)

    @staticmethod
    def backward(ctx, *grad_outputs):
        if torch.is_grad_enabled():  # create_graph=True; autograd would take the gradient for a constant
            raise RuntimeError("mhe and amhe have no second derivative; energy_by_definition has")
        pairs = zip(ctx.saved_tensors, grad_outputs)
        grads = [grad if grad is None else grad * factor for grad, factor in pairs]
        return None, None, *grads  # autograd rounds them to the weight's type, in which `grad` alone could be 0


def _sweep(weight, s, angular, want_grad, exact=False):
    """Mean energy of a weight, its gradient, and whether fp32 is too coarse for them; exact wants float64."""
    x = weight.flatten(1).to(torch.promote_types(weight.dtype, torch.float32))
    inverse_norm = _inverse_norm(x)
    w = x * inverse_norm
    lowest, highest = -NEAR, NEAR
    if exact:
        lowest, highest = -1 + 2e-16, 1 - SMALLEST**2 / 2  # at -1 the slope's divisor is 0
        w = unit(x)
        norm = (w * x).sum(1, keepdim=True)
        inverse_norm = torch.where(norm > 0, 1 / norm, 0)
    is_zero = (inverse_norm == 0).to(w)
    energy = w.new_zeros(())
    grad = torch.zeros_like(w) if want_grad else None
    size = CPU_BLOCK if w.device.type == "cpu" else GPU_BLOCK
    slices = [slice(start, start + size) for start in range(0, len(w), size)]
    blocks = list(itertools.combinations_with_replacement(slices, 2))  # on and above the diagonal
    peaks = w.new_zeros(len(blocks), 2)  # lowest and highest cosine of each; single ones would pin a block's memory
    for (i, j), peak in zip(blocks, peaks):
        cosine = w[i] @ w[j].T
        if exact and angular:
            cosine += is_zero[i] * is_zero[j].T  # between two zero rows: angle 0
        elif exact:
            cosine += (is_zero[i] + is_zero[j].T) / 2  # beside a zero row: chord 1; between two: chord 0
        if i == j:
            cosine.fill_diagonal_(0)  # i = j is not a pair; its terms become zero below
        torch.aminmax(cosine, out=tuple(peak))
        cosine.clamp_(lowest, highest)
        value, slope = _potential(cosine, s, angular, want_grad)
        if i == j:
            value.fill_diagonal_(0)
        energy.add_(value.sum(), alpha=1 if i == j else 2)  # a block off the diagonal has a mirror image
        if not want_grad:
            continue
        if i == j:
            slope.fill_diagonal_(0)
        else:
            grad[j].addmm_(slope.T, w[i])
        grad[i].addmm_(slope, w[j])
    is_coarse = is_zero.any() | (peaks.abs() > NEAR).any()  # rows whose squared length overflows count as zero
    pairs = max(1, len(w) * (len(w) - 1))  # a single neuron has no pair and the energy 0
    if want_grad:
        along_row = (grad * w).sum(1, keepdim=True)
        grad.addcmul_(w, along_row, value=-1)  # the energy does not change with the length of a row
        grad.mul_(2 / pairs * inverse_norm)
        grad = grad.view(weight.shape)
    return energy / pairs, grad, is_coarse


def _potential(cosine, s, angular, want_slope):
    """f_s(z) and f'(c) = s f / divisor, or 1 / divisor for s = 0; divisor = z |dc / dz|; cosines c are overwritten."""
    if angular:
        angle = cosine.arccos()
        value = riesz(angle, s)
    else:
        divisor = cosine.mul_(-2).add_(2)  # z^2 = |w_i - w_j|^2
        value = riesz(divisor, s / 2)
        if s == 0:
            value.div_(2)
    if not want_slope:
        return value, None
    if angular:
        square_of_sine = torch.addcmul(cosine.new_ones(()), cosine, cosine, value=-1, out=cosine)
        divisor = angle.mul_(square_of_sine.sqrt_())
    if s > 0:
        return value, torch.div(value, divisor, out=divisor).mul_(s)
    return value, divisor.reciprocal_()
