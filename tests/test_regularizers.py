"""The scalars of the paper against closed forms, float64 definitions and other people's formulas."""

import math

import pytest
import torch
import torch.distributed as dist
from conftest import random
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import normalize

from regularizers import SMALLEST, alignment, amhe, energy_by_definition, energy_of, info_nce, mhe, riesz, uniformity

ENERGIES = [(mhe, False), (amhe, True)]


def with_gradient(f, x, *args):
    x = x.clone().requires_grad_()
    value = f(x, *args)
    value.backward()
    return value.detach(), x.grad


@pytest.mark.parametrize("s", [0, 1, 2])
def test_orthonormal_rows(s):
    rows = torch.linalg.qr(random(8, 8, dtype=torch.float64)).Q
    for f, distance in (mhe, math.sqrt(2)), (amhe, math.pi / 2):
        expected = distance**-s if s else -math.log(distance)
        assert f(rows, s).item() == pytest.approx(expected, rel=1e-12)
        assert f(3 * rows.float(), s).item() == pytest.approx(expected, rel=1e-6)
    antipodal = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    for f, distance in (mhe, 2), (amhe, math.pi):
        expected = distance**-s if s else -math.log(distance)
        assert f(antipodal, s).item() == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("f, angular", ENERGIES)
@pytest.mark.parametrize(
    "s, shape", [(0, (700, 130)), (0.5, (700, 130)), (1, (700, 130)), (2, (700, 130)), (3, (64, 3, 3, 3))]
)
def test_energies_equal_their_definition(f, angular, s, shape):
    """In float64, over several blocks, value and gradient; in fp32 to 1e-5."""
    weight = random(*shape, dtype=torch.float64)
    value, gradient = with_gradient(f, weight, s)
    expected, expected_gradient = with_gradient(energy_by_definition, weight, s, angular)
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-9, atol=1e-15)

    value, gradient = with_gradient(f, weight.float(), s)
    assert value.dtype == gradient.dtype == torch.float32
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - expected_gradient).norm() < 1e-5 * expected_gradient.norm()


@pytest.mark.parametrize("f, _", ENERGIES)
def test_degenerate_rows(f, _):
    weight = random(6, 5)
    weight[1] = 2 * weight[0]  # coincident
    weight[3] = -weight[2]  # antipodal
    weight[4] = 0
    energy, gradient = with_gradient(f, weight, 2)
    assert energy.isfinite() and gradient.isfinite().all()
    assert gradient[4].abs().max() == 0
    assert energy.item() == pytest.approx(2 * 1e8 / 30, rel=1e-4)  # the smallest distance is 1e-4
    close = torch.tensor([[1.0, 0.0], [1.0, 3e-5]])
    lengths = with_gradient(f, close, 2)[1].norm(dim=1).tolist()
    assert lengths == pytest.approx([6e11, 6e11], rel=1e-3)  # 0.3 of that at 1e-4
    energy, gradient = with_gradient(f, random(1, 7), 2)  # a single neuron
    assert energy == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("n, minimum", [(4, 3.674234614), (6, 9.985281374), (12, 49.165253058), (32, 412.261274651)])
def test_descent_reaches_the_minima_of_thomsons_problem(n, minimum):
    """Charges on a sphere, sums over pairs as Wikipedia's table of Thomson's problem has them."""
    x = random(n, 3, dtype=torch.float64).requires_grad_()
    optimizer = torch.optim.LBFGS([x], max_iter=500, tolerance_change=1e-14, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        energy = mhe(x, 1)
        energy.backward()
        return energy

    optimizer.step(closure)
    assert mhe(x, 1).item() * n * (n - 1) / 2 == pytest.approx(minimum, rel=1e-9)


@pytest.mark.parametrize("zeros, length, t", [(0, 1e-9, 2), (1, 1e19, 3.5), (3, 1e30, 2), (6, 1, 2)])
def test_uniformity_is_wang_and_isolas_line(zeros, length, t):
    """Wang and Isola's line on normalised rows: two zero rows coincide, a zero row is at distance 1 from the others."""
    x = random(6, 4) * length
    x[:zeros] = 0
    wide = normalize(x.double())
    expected = torch.pdist(wide).pow(2).mul(-t).exp().mean().log()
    value, gradient = with_gradient(uniformity, x, t)
    assert value.item() == pytest.approx(expected.item(), abs=1e-6)
    _, expected_gradient = with_gradient(uniformity, x.double() / length, t)
    torch.testing.assert_close(gradient.double() * length, expected_gradient, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype, length", [(torch.float32, 1e19), (torch.float32, 3e37), (torch.float64, 1e200)])
def test_long_rows_are_rows_of_length_1(dtype, length):
    x, y = random(6, 5, dtype=dtype), random(6, 5, dtype=dtype, seed=1)
    x, y = normalize(x), normalize(y)
    for f in (mhe, amhe, lambda w: energy_by_definition(w, 2, False), lambda w: energy_by_definition(w, 2, True)):
        value, gradient = with_gradient(f, x * length)
        expected, expected_gradient = with_gradient(f, x)
        assert value.item() == pytest.approx(expected.item(), rel=1e-5)
        torch.testing.assert_close(gradient * length, expected_gradient, rtol=1e-4, atol=1e-5)
    assert alignment(x * length, y).item() == pytest.approx(alignment(x, y).item(), rel=1e-5)
    assert info_nce(x * length, y).item() == pytest.approx(info_nce(x, y).item(), rel=1e-5)


@pytest.mark.parametrize("f, angular", ENERGIES)
@pytest.mark.parametrize("s, n, zeros", [(0, 7, 1), (1, 7, 2), (2, 7, 7), (0, 700, 1), (2, 700, 300)])
def test_energy_of_zero_rows(f, angular, s, n, zeros):
    """Distance 1 or angle pi/2 to other rows, as by definition; 0 to each other, which counts as the smallest."""
    weight = random(n, 20)
    weight[n - zeros :] = 0
    others = n - zeros
    distances = torch.tensor([math.pi / 2 if angular else 1.0, SMALLEST], dtype=torch.float64)
    mixed, coincident = riesz(distances, s).tolist()
    total = 2 * zeros * others * mixed + zeros * (zeros - 1) * coincident
    expected_gradient = torch.zeros(n, 20)
    if others:
        rest, gradient = with_gradient(f, weight[:others], s)
        pairs = others * (others - 1)
        total += pairs * rest.item()
        expected_gradient[:others] = gradient * pairs / (n * (n - 1))
    value, gradient = with_gradient(f, weight, s)
    assert value.item() == pytest.approx(total / (n * (n - 1)), rel=1e-5)
    torch.testing.assert_close(gradient, expected_gradient, rtol=1e-4, atol=1e-9)
    if zeros == 1:
        assert value.item() == pytest.approx(energy_by_definition(weight.double(), s, angular).item(), rel=1e-5)


def test_energy_of_a_network_is_that_of_its_neurons():
    torch.manual_seed(0)
    layers = {"conv": nn.Conv2d(3, 8, 3), "norm": nn.LayerNorm([8, 4, 4]), "words": nn.Embedding(10, 6)}
    layers |= {"depthwise": nn.Conv2d(8, 8, 3, groups=8), "up": nn.ConvTranspose2d(8, 5, 2), "out": nn.Linear(6, 10)}
    layers |= {"tied": nn.Linear(6, 10), "up again": nn.ConvTranspose2d(8, 5, 2)}
    layers["tied"].weight = layers["out"].weight
    layers["up again"].weight = layers["up"].weight
    model = nn.ModuleDict(layers)
    neurons = {"conv": model["conv"].weight, "up": model["up"].weight.transpose(0, 1), "out": model["out"].weight}
    energies = energy_of(model, s=1)
    assert energies.keys() == neurons.keys()
    for layer, rows in neurons.items():
        assert energies[layer].item() == pytest.approx(energy_by_definition(rows.double(), 1, True).item(), rel=1e-5)
        assert energy_of(model, 2, angular=False)[layer] == mhe(rows)
    along_the_wrong_axis = amhe(model["up"].weight, 1)
    assert abs(along_the_wrong_axis - energies["up"]) > 1e-3

    sum(energies.values()).backward()
    for layer, rows in neurons.items():
        _, expected = with_gradient(amhe, rows.detach(), 1)
        gradient = model[layer].weight.grad
        torch.testing.assert_close(gradient.transpose(0, 1) if layer == "up" else gradient, expected)


def test_wrapped_networks_have_the_same_layers(tmp_path):
    plain = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))
    plain.add_module("module", nn.Sequential(nn.Linear(3, 4)))
    names = list(energy_of(plain))
    assert names == ["0", "2", "module.0"]
    assert list(energy_of(torch.compile(plain))) == names
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        parallel = nn.parallel.DistributedDataParallel(plain)
        energy = amhe(plain[2].weight)
        assert list(energy_of(parallel)) == names and energy_of(parallel)["2"] == energy
        assert list(energy_of(torch.compile(parallel))) == names
        sharded = energy_of(fully_shard(plain, mesh=init_device_mesh("cpu", (1,))))
        sharded["2"].backward()
        assert [*sharded] == names and sharded["2"] == energy and plain[2].weight.grad.full_tensor().any()
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("angular", [False, True])
def test_half_space_appends_the_opposite_neurons(angular):
    """Two orthogonal neurons become four on a square: of 12 ordered pairs, 8 at a right angle and 4 opposite."""
    across, opposite = (math.pi / 2, math.pi) if angular else (math.sqrt(2), 2)
    expected = (8 * across**-2 + 4 * opposite**-2) / 12
    rows = {"layer": 3 * torch.eye(2)}
    assert energy_of(rows, 2, angular, half_space=True)["layer"].item() == pytest.approx(expected, rel=1e-6)
    mirrored = {"layer": torch.tensor([[3.0, 0], [0, -3.0]])}
    assert energy_of(mirrored, 2, angular, half_space=True) == energy_of(rows, 2, angular, half_space=True)


def test_a_network_without_neurons_is_refused():
    with pytest.raises(ValueError, match="the network has no linear layer or convolution"):
        energy_of(nn.ReLU())
    with pytest.raises(ValueError, match=r"not \[3\], 2"):
        energy_of({"bias": torch.ones(3)})


@pytest.mark.parametrize("f, angular", ENERGIES)
@pytest.mark.parametrize("distance", [1e-1, 1e-3, 3e-4])
def test_crowds_keep_their_digits(f, angular, distance):
    """Around one direction and its opposite: against all distances from differences in float64, over two blocks."""
    centre = normalize(random(1, 12, dtype=torch.float64, seed=1))
    weight = (centre + distance / math.sqrt(24) * random(600, 12, dtype=torch.float64)).float()
    weight[::3] *= -1
    value, gradient = with_gradient(f, weight, 2)
    wide = weight.double().requires_grad_()
    w = normalize(wide)
    i, j = torch.triu_indices(600, 600, 1)
    apart, across = (w[i] - w[j]).norm(dim=1), (w[i] + w[j]).norm(dim=1)
    z = 2 * torch.atan2(apart, across) if angular else apart
    assert z.min() > SMALLEST / 10
    z = z.clamp_min(SMALLEST)
    expected = z.pow(-2).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-6)
    if z.min() > SMALLEST:
        assert (gradient - wide.grad).norm() < 1e-6 * wide.grad.norm()
    assert (gradient * weight).sum(1).abs().max() < 1e-5 * gradient.norm()


@pytest.mark.parametrize("f, angular", ENERGIES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rows_are_finite_at_the_largest_power(f, angular, dtype):
    weight = random(3, 5, dtype=dtype)
    weight[1] = weight[0]
    value, gradient = with_gradient(f, weight, 8)
    assert value.item() == pytest.approx(1e32 / 3, rel=1e-6)  # of three pairs
    assert gradient.isfinite().all()


@pytest.mark.parametrize("f, dtype, unit_roundoff", [(mhe, torch.float16, 2**-11), (amhe, torch.bfloat16, 2**-8)])
def test_gradients_of_low_precision_weights_are_rounded_last(f, dtype, unit_roundoff):
    """A loss times 65536, as the scaler of fp16 has it: the gradients were 0, as each is below fp16's smallest."""
    weight = random(512, 64).to(dtype)
    w = weight.clone().requires_grad_()
    (65536 * f(w)).backward()
    _, expected = with_gradient(f, weight.double())
    assert w.grad.dtype == dtype and w.grad.abs().max() > 0
    assert (w.grad.double() / 65536 - expected).abs().max() <= 2 * unit_roundoff * expected.abs().max()


def test_second_derivatives_are_right_or_refused():
    weight = random(5, 4, dtype=torch.float64).requires_grad_()
    for f in (mhe, amhe):
        with pytest.raises(RuntimeError, match="no second derivative; energy_by_definition has"):
            torch.autograd.grad(f(weight), weight, create_graph=True)
        for transformed in (torch.func.grad(f), torch.vmap(f)):
            with pytest.raises(RuntimeError, match="with functorch transforms"):
                transformed(weight.detach()[None])


class Regularized(nn.Linear):
    """Its output is a loss with an energy in its midst."""

    def __init__(self, energy):
        super().__init__(6, 9)
        self.energy = energy

    def forward(self, x):
        return super().forward(x).square().mean() + self.energy(self.weight).log()


def gradient_of_weight(model, loss):
    return torch.autograd.grad(loss, model.weight)[0]


@pytest.mark.parametrize("energy", [amhe, lambda weight: energy_of({"": weight})[""]])
def test_compile_breaks_the_graph_once_and_export_is_refused(energy):
    model, x = Regularized(energy), random(4, 6)
    torch.compiler.reset()
    assert torch._dynamo.explain(model)(x).graph_break_count == 1
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    torch.testing.assert_close(gradient_of_weight(model, compiled(x)), gradient_of_weight(model, model(x)))
    with pytest.raises(RuntimeError, match=r"torch\.compiler\.disable"):
        torch.compile(model, backend="eager", fullgraph=True)(x)
    with pytest.raises(RuntimeError, match="data-dependent"):
        torch.export.export(model, (x,))


@pytest.mark.parametrize("angular", [False, True])
def test_the_definition_works_in_transforms(angular):
    def energy(w):
        return energy_by_definition(w, 2, angular)

    weights = random(2, 9, 6, dtype=torch.float64)
    values, gradients = zip(*[with_gradient(energy, weight) for weight in weights])
    assert torch.autograd.gradgradcheck(energy, weights[0].clone().requires_grad_())
    torch.testing.assert_close(torch.vmap(energy)(weights), torch.stack(values))
    torch.testing.assert_close(torch.vmap(torch.func.grad(energy))(weights), torch.stack(gradients))
    along = torch.func.jacrev(torch.func.grad(energy))(weights[0]).flatten(2) @ weights[0].flatten()
    torch.testing.assert_close(along, -gradients[0])  # as the gradient is homogeneous of degree -1

    model, x = Regularized(energy), random(4, 6)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(gradient_of_weight(model, compiled(x)), gradient_of_weight(model, model(x)))
    torch.testing.assert_close(torch.export.export(model, (x,)).module()(x), model(x))


def test_autocast_changes_nothing():
    weight, x = random(300, 64), random(64, 32)
    pair = x, x.flip(0)
    for f, *tensors in (mhe, weight), (amhe, weight), (uniformity, x), (alignment, *pair), (info_nce, *pair):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            inside = f(*tensors)
        assert inside.dtype == torch.float32 and inside == f(*tensors)
    low = weight.bfloat16()
    assert amhe(low).item() == pytest.approx(amhe(low.double()).item(), rel=1e-5)


def test_alignment_is_byols_loss():
    x, y = random(20, 16), random(20, 16, seed=1)
    byol = (2 - 2 * torch.nn.functional.cosine_similarity(x.double(), y.double())).mean()
    assert alignment(x, y).item() == pytest.approx(byol.item(), rel=1e-6)
    assert alignment(x, -x).item() == pytest.approx(4, rel=1e-6)
    assert alignment(x, -x, 3).item() == pytest.approx(8, rel=1e-6)
    assert alignment(x, 5 * x).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("temperature", [0.1, 2])
def test_info_nce_is_simclrs_loss(temperature):
    """Chen et al. (2020): each of the 2n views against its pair and the 2n - 2 views of other images, one by one."""
    x, y = random(7, 5, dtype=torch.float64), random(7, 5, dtype=torch.float64, seed=1)
    both = normalize(torch.cat([x, y])).tolist()
    losses = []
    for i, a in enumerate(both):
        cosines = [sum(p * q for p, q in zip(a, b)) for b in both]
        others = [math.exp(c / temperature) for j, c in enumerate(cosines) if j != i]
        losses.append(-math.log(math.exp(cosines[(i + 7) % 14] / temperature) / sum(others)))
    assert info_nce(x, y, temperature).item() == pytest.approx(sum(losses) / 14, rel=1e-12)
    assert info_nce(3 * x.float(), y.float(), temperature).item() == pytest.approx(sum(losses) / 14, rel=1e-5)
    assert torch.autograd.gradcheck(info_nce, (x.requires_grad_(), y.requires_grad_(), temperature))


def test_zero_and_coincident_rows_of_features():
    assert alignment(torch.zeros(5, 4), random(5, 4)) == pytest.approx(1)  # BYOL's code: |0 - y|^2, not 2 - 2 cos
    x = random(5, 4)
    x[0], x[2] = 0, x[1]
    y = x.roll(1, 0)
    for f, *others in (uniformity,), (info_nce, y), (alignment, y), (alignment, x, 0.5):
        gradient = with_gradient(f, x, *others)[1]
        assert gradient.isfinite().all() and gradient[0].abs().max() == 0


@pytest.mark.parametrize(
    "f, shapes, wrong_shapes",
    [
        (mhe, [(3, 2)], [(3,)]),
        (uniformity, [(3, 2)], [(1, 2)]),
        (alignment, [(3, 2), (3, 2)], [(3, 2), (2, 2)]),
        (info_nce, [(3, 2), (3, 2)], [(3, 2), (2, 2)]),
    ],
)
def test_wrong_arguments(f, shapes, wrong_shapes):
    wrong = [-1, math.nan, math.inf]
    wrong += [] if f is mhe else [0]
    wrong += {mhe: [8.1], uniformity: [10.1]}.get(f, [])
    for number in wrong:
        with pytest.raises(ValueError, match="takes"):
            f(*map(torch.ones, shapes), number)
    with pytest.raises(ValueError, match="takes"):
        f(*map(torch.ones, wrong_shapes))
