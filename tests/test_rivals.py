"""Regularizers of others: by definition, in closed forms, at the edges, and in a run."""

import math

import numpy as np
import pytest
import torch
from conftest import assert_same_run, killed_after, random, tiny

import pretrain as page
from lib.rivals import directions, koleo, orthogonality, sigreg
from pretrain import pretrain

F64 = torch.float64


def sigreg_of(x):
    return sigreg(x, directions(x, seed=3, step=7))


RIVALS = (orthogonality, koleo, sigreg_of)


def test_each_is_its_definition():
    x = random(7, 5, dtype=F64) * random(7, 1, dtype=F64, seed=1).exp()
    rows = [row / row.norm() for row in x]
    others = [[b for b in rows if b is not a] for a in rows]
    squares = [float(a @ b) ** 2 for a, beside in zip(rows, others) for b in beside]
    assert orthogonality(x.view(7, 5, 1, 1)).item() == pytest.approx(np.mean(squares), rel=1e-12)
    nearest = [min(float((a - b).norm()) for b in beside) for a, beside in zip(rows, others)]
    assert koleo(x).item() == pytest.approx(-np.mean(np.log(nearest)), abs=3e-8)

    slices = directions(x, seed=3, step=7).double().numpy()
    t = np.linspace(-3, 3, 33)
    statistics = []
    for numbers in (x.numpy() @ slices).T:
        characteristic = np.mean([np.exp(1j * t * number) for number in numbers], 0)
        integrand = np.abs(characteristic - np.exp(-(t**2) / 2)) ** 2 * np.exp(-(t**2) / 2)
        statistics.append(7 * np.trapezoid(integrand, t))
    assert len(statistics) == 256 and sigreg_of(x).item() == pytest.approx(np.mean(statistics), rel=1e-6)


def integral_of_normal(power):
    """The integral of exp(-power t^2 / 2) from -3 to 3."""
    return math.sqrt(2 * math.pi / power) * math.erf(3 * math.sqrt(power / 2))


def test_closed_forms():
    assert orthogonality(random(1000, 64)).item() == pytest.approx(1 / 64, rel=0.01)
    assert orthogonality(1e20 * random(1000, 64)).item() == pytest.approx(1 / 64, rel=0.01)  # its squares overflow
    assert orthogonality(torch.linalg.qr(random(6, 6, dtype=F64)).Q).item() == pytest.approx(0, abs=1e-30)
    simplex = torch.eye(9, dtype=F64) - 1 / 9  # nine points, all at one distance
    assert koleo(simplex).item() == pytest.approx(-math.log(2 * 9 / 8) / 2, rel=1e-7)
    expected = integral_of_normal(1) - integral_of_normal(3)
    of_normal_numbers = [sigreg_of(random(128, 32, dtype=F64, seed=seed)).item() for seed in range(20)]
    assert np.mean(of_normal_numbers) == pytest.approx(expected, rel=0.03)
    of_one_point = integral_of_normal(1) - 2 * integral_of_normal(2) + integral_of_normal(3)
    assert sigreg_of(torch.zeros(10, 4)).item() == pytest.approx(10 * of_one_point, rel=1e-3)


@pytest.mark.parametrize("f", RIVALS)
def test_gradients_are_those_of_differences(f):
    assert torch.autograd.gradcheck(f, random(6, 4, dtype=F64).requires_grad_())


@pytest.mark.parametrize("f", RIVALS)
def test_zero_rows_duplicates_and_half_precision(f):
    x = random(6, 4)
    x[1], x[3:5] = x[0], 0
    for edge in (x, torch.zeros(3, 4), x[:1], torch.ones(3, 4, dtype=torch.float16)):
        edge = edge.clone().requires_grad_()
        f(edge).backward()
        assert f(edge).isfinite() and f(edge).dtype == torch.float32
        assert edge.grad.isfinite().all() and edge.grad.abs().max() < 10
    expected = f(random(6, 4).bfloat16().float())
    with torch.autocast("cpu", torch.bfloat16):
        assert f(random(6, 4).bfloat16()) == expected


def test_directions_are_those_of_seed_and_step():
    x = random(2, 6)
    first = directions(x, seed=1, step=2)
    torch.testing.assert_close(first.norm(dim=0), torch.ones(256))
    assert torch.equal(first, directions(x, seed=1, step=2))
    for other in directions(x, seed=1, step=3), directions(x, seed=2, step=2), directions(x, seed=2, step=1):
        assert (first - other).abs().min() > 0


def test_a_run_with_new_directions_each_step_goes_on_to_the_same_bits(command, folder, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(page, "directions", lambda x, *key: drawn.append(key) or directions(x, *key))
    flags = ["--dataset", folder, *tiny(epochs=2, lr=8, eval_every=0, seed=4, reg="sigreg", save_every="2steps")]
    assert command(pretrain, *flags, "--out", "whole")[0] == 0
    assert drawn == [(4, step) for step in range(6)]
    with killed_after(4):
        command(pretrain, *flags, "--out", "resumed")
    assert command(pretrain, *flags, "--out", "resumed")[0] == 0
    assert_same_run(tmp_path / "resumed", tmp_path / "whole")
