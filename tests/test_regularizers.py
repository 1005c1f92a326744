"""The scalars of the paper against closed forms, float64 definitions and other people's formulas."""

import math

import pytest
import torch

from regularizers import alignment, amhe, energy_by_definition, info_nce, mhe, uniformity

ENERGIES = [(mhe, False), (amhe, True)]


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def with_gradient(f, x, *args):
    x = x.clone().requires_grad_()
    value = f(x, *args)
    value.backward()
    return value.detach(), x.grad


@pytest.mark.parametrize(
    "f, s, expected",
    [
        (mhe, 0, -math.log(2) / 2),
        (mhe, 1, 2**-0.5),
        (mhe, 2, 0.5),
        (amhe, 0, -math.log(math.pi / 2)),
        (amhe, 1, 2 / math.pi),
        (amhe, 2, 4 / math.pi**2),
    ],
)
def test_orthonormal_rows(f, s, expected):
    rows = torch.linalg.qr(random(8, 8, dtype=torch.float64)).Q
    assert f(rows, s).item() == pytest.approx(expected, rel=1e-12)
    assert f(3 * rows.float(), s).item() == pytest.approx(expected, rel=1e-6)


def test_antipodal_pair():
    pair = torch.tensor([[3.0, 4.0], [-3.0, -4.0]])
    assert mhe(pair, 2).item() == pytest.approx(1 / 4, rel=1e-6)
    assert amhe(pair, 1).item() == pytest.approx(1 / math.pi, rel=1e-6)


@pytest.mark.parametrize("n", [2, 5, 40])
def test_regular_simplex_is_the_minimum(n):
    simplex = torch.eye(n, dtype=torch.float64) - 1 / n
    energy, gradient = with_gradient(mhe, simplex, 2)
    assert energy.item() == pytest.approx((n - 1) / (2 * n), rel=1e-12)
    assert gradient.abs().max() < 1e-12
    assert mhe(random(n, n - 1 if n > 2 else 2, dtype=torch.float64), 2) >= energy


@pytest.mark.parametrize("f, angular", ENERGIES)
@pytest.mark.parametrize("s", [0, 0.5, 1, 2, 3])
@pytest.mark.parametrize("shape", [(64, 3, 3, 3), (700, 130)])
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


@pytest.mark.parametrize("shape", [(4096, 512), (256, 4096)])
def test_energy_of_the_papers_heads(shape):
    """amhe at s = 2 in fp32 against float64, at the sizes of Section 3.6, the definition written once more."""
    weight = random(*shape)
    value, gradient = with_gradient(amhe, weight, 2)
    wide = weight.double().requires_grad_()
    cosine = torch.nn.functional.normalize(wide) @ torch.nn.functional.normalize(wide).T
    off_diagonal = ~torch.eye(len(weight), dtype=torch.bool)
    expected = cosine.masked_select(off_diagonal).arccos().pow(-2).mean()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-5)
    assert (gradient - wide.grad).norm() < 1e-5 * wide.grad.norm()


@pytest.mark.parametrize("f, _", ENERGIES)
def test_gradcheck(f, _):
    for s in (0.0, 1.0, 2.0):
        assert torch.autograd.gradcheck(lambda w, s=s: f(w, s), random(6, 4, dtype=torch.float64).requires_grad_())


@pytest.mark.parametrize("angle", [1e-3, 1e-2, 0.1, 0.15, 1.0, 3.0, 3.14])
def test_close_and_opposite_pairs_keep_their_digits(angle):
    turn = torch.linalg.qr(random(300, 300, dtype=torch.float64)).Q
    pair = (torch.tensor([[1, 0], [math.cos(angle), math.sin(angle)]], dtype=torch.float64) @ turn[:2]).float()
    energy, gradient = with_gradient(amhe, pair, 1)
    assert energy.item() == pytest.approx(1 / angle, rel=2e-5)
    assert gradient[0].norm().item() == pytest.approx(1 / angle**2, rel=1e-4)
    assert mhe(pair, 1).item() == pytest.approx(1 / (2 * math.sin(angle / 2)), rel=2e-5)


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
    assert with_gradient(f, close, 2)[1].norm(dim=1).tolist() == pytest.approx([2e12, 2e12], rel=1e-3)


def test_many_coincident_rows_across_blocks():
    """1,100 rows of which 600 are the same: the pairs apart are treated as ever, the others count as 1e-4 apart."""
    weight = random(1100, 16)
    weight[:600] = weight[0]
    energy, gradient = with_gradient(mhe, weight, 1)
    wide = torch.nn.functional.normalize(weight.double())
    distance = (2 - 2 * (wide @ wide.T)).clamp_min(1e-8).sqrt()
    expected = (distance.reciprocal().sum() - 1100 / 1e-4) / (1100 * 1099)
    assert energy.item() == pytest.approx(expected.item(), rel=1e-4)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("f, _", ENERGIES)
def test_single_neuron_has_no_energy(f, _):
    energy, gradient = with_gradient(f, random(1, 7), 2)
    assert energy == 0 and gradient.abs().max() == 0


@pytest.mark.parametrize("f, _", ENERGIES)
def test_invariances(f, _):
    weight = random(30, 12, dtype=torch.float64)
    energy, gradient = with_gradient(f, weight, 2)
    turn = torch.linalg.qr(random(12, 12, dtype=torch.float64, seed=1)).Q
    lengths = random(30, 1, dtype=torch.float64, seed=2).exp()
    for same in (weight * lengths, weight @ turn, weight.flip(0), weight.view(30, 3, 2, 2)):
        assert f(same, 2).item() == pytest.approx(energy.item(), rel=1e-12)
    assert (gradient * weight).sum(1).abs().max() < 1e-14  # orthogonal to the row


def test_random_rows_have_the_energy_of_a_uniform_sphere():
    d = 256
    assert mhe(random(2048, d), 2).item() == pytest.approx(0.5 * (1 + 1 / d), rel=1e-3)
    assert amhe(random(2048, d), 2).item() == pytest.approx(4 / math.pi**2 * (1 + 12 / (math.pi**2 * d)), rel=1e-3)


def test_autocast_changes_nothing():
    weight, x = random(300, 64), random(64, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = [mhe(weight), amhe(weight), uniformity(x), alignment(x, x.flip(0)), info_nce(x, x.flip(0))]
    outside = [mhe(weight), amhe(weight), uniformity(x), alignment(x, x.flip(0)), info_nce(x, x.flip(0))]
    assert inside == outside and all(x.dtype == torch.float32 for x in inside)
    low = weight.bfloat16()
    assert amhe(low).item() == pytest.approx(amhe(low.double()).item(), rel=1e-5)


@pytest.mark.parametrize("t", [1, 2, 3.5])
def test_uniformity_is_that_of_wang_and_isola(t):
    """Their estimator: log of the mean of exp(-t d^2) over pdist's pairs."""
    x = random(50, 8, dtype=torch.float64)
    value, gradient = with_gradient(uniformity, x, t)
    theirs = x.clone().requires_grad_()
    expected = torch.pdist(torch.nn.functional.normalize(theirs)).pow(2).mul(-t).exp().mean().log()
    expected.backward()
    assert value.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(gradient, theirs.grad)


def test_uniformity_of_known_configurations():
    assert uniformity(torch.ones(5, 3)).item() == pytest.approx(0, abs=1e-6)
    assert uniformity(torch.eye(6)).item() == pytest.approx(-4, rel=1e-6)
    assert uniformity(torch.tensor([[1.0], [-1.0]])).item() == pytest.approx(-8, rel=1e-6)


def test_alignment_is_byols_loss():
    x, y = random(20, 16), random(20, 16, seed=1)
    byol = (2 - 2 * torch.nn.functional.cosine_similarity(x.double(), y.double())).mean()
    assert alignment(x, y).item() == pytest.approx(byol.item(), rel=1e-6)
    assert alignment(x, -x).item() == pytest.approx(4, rel=1e-6)
    assert alignment(x, -x, 3).item() == pytest.approx(8, rel=1e-6)
    assert alignment(x, 5 * x).item() == pytest.approx(0, abs=1e-10)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2])
def test_info_nce_is_simclrs_loss(temperature):
    """Chen et al. (2020): each of the 2n views against its pair and the 2n - 2 views of other images, one by one."""
    x, y = random(7, 5, dtype=torch.float64), random(7, 5, dtype=torch.float64, seed=1)
    both = torch.nn.functional.normalize(torch.cat([x, y])).tolist()
    losses = []
    for i, a in enumerate(both):
        cosines = [sum(p * q for p, q in zip(a, b)) for b in both]
        others = [math.exp(c / temperature) for j, c in enumerate(cosines) if j != i]
        losses.append(-math.log(math.exp(cosines[(i + 7) % 14] / temperature) / sum(others)))
    assert info_nce(x, y, temperature).item() == pytest.approx(sum(losses) / 14, rel=1e-12)
    assert info_nce(3 * x.float(), y.float(), temperature).item() == pytest.approx(sum(losses) / 14, rel=1e-5)
    assert torch.autograd.gradcheck(info_nce, (x.requires_grad_(), y.requires_grad_(), temperature))


def test_info_nce_of_known_configurations():
    assert info_nce(torch.ones(4, 3), torch.ones(4, 3)).item() == pytest.approx(math.log(7), rel=1e-6)
    pairs = math.log(1 + 6 * math.exp(-1 / 0.5))  # pairs that coincide, orthogonal to all others
    assert info_nce(torch.eye(4), torch.eye(4)).item() == pytest.approx(pairs, rel=1e-6)


@pytest.mark.parametrize(
    "f",
    [
        *[uniformity, lambda x: info_nce(x, x.roll(1, 0))],
        *[lambda x: alignment(x, x.detach().roll(1, 0)), lambda x: alignment(x, x, 0.5)],
    ],
)
def test_zero_and_coincident_rows_of_features(f):
    x = random(5, 4)
    x[0], x[2] = 0, x[1]
    gradient = with_gradient(f, x)[1]
    assert gradient.isfinite().all() and gradient[0].abs().max() == 0


@pytest.mark.parametrize(
    "call",
    [
        lambda: mhe(torch.ones(3)),
        lambda: amhe(torch.ones(3, 2), -1),
        lambda: mhe(torch.ones(3, 2), math.nan),
        lambda: uniformity(torch.ones(1, 2)),
        lambda: uniformity(torch.ones(3, 2), 0),
        lambda: alignment(torch.ones(3, 2), torch.ones(2, 2)),
        lambda: alignment(torch.ones(3, 2), torch.ones(3, 2), 0),
        lambda: info_nce(torch.ones(3, 2), torch.ones(2, 2)),
        lambda: info_nce(torch.ones(3, 2), torch.ones(3, 2), 0),
    ],
)
def test_wrong_arguments(call):
    with pytest.raises(ValueError, match=r"takes"):
        call()
