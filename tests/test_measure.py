"""What is measured beside the loss: effective rank, the floors of a run, and the warning of poor features."""

import dataclasses
import json
import math
from types import SimpleNamespace

import pytest
import scipy.integrate
import scipy.special
import torch
from conftest import rows_of
from torch import nn

import data
from harness import measure, settings
from knn_eval import knn_eval
from pretrain import pretrain
from regularizers import uniformity

CFG = SimpleNamespace(method="byol", reg="none", optimizer="lars")


def test_effective_rank_has_its_closed_forms():
    assert measure.effective_rank(torch.eye(8)) == pytest.approx(8)
    assert measure.effective_rank(torch.ones(9, 5)) == pytest.approx(1)
    assert measure.effective_rank(torch.zeros(9, 5)) == 1
    rows = torch.zeros(6, 4)
    rows[0, 0], rows[1, 1] = 3, 1  # singular values 3 and 1
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert measure.effective_rank(rows) == pytest.approx(math.exp(entropy))


def test_effective_rank_is_that_of_the_gram_matrix():
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    values = torch.linalg.eigvalsh((x.T @ x).double()).clamp_min(0).sqrt()
    shares = values / values.sum()
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert measure.effective_rank(x) == pytest.approx(expected, rel=1e-5)
    assert measure.effective_rank(x.half() * 1e-3) == pytest.approx(expected, rel=1e-2)


def test_the_floor_of_uniformity_has_its_closed_forms():
    """Two points, the circle, the sphere; many dimensions, in which all cosines are 0."""
    closed = {1: (1 + math.exp(-8)) / 2, 2: scipy.special.i0(4) * math.exp(-4), 3: math.sinh(4) / 4 * math.exp(-4)}
    for d, potential in closed.items():
        assert measure.uniform_floor(d) == pytest.approx(math.log(potential), rel=1e-12)
    assert measure.uniform_floor(10**9) == pytest.approx(-4, abs=1e-7)


@pytest.mark.parametrize("d", [2, 5, 64, 512])
def test_the_floor_of_uniformity_is_its_integral(d):
    """Over the angle of two uniform points, whose density is sin^(d - 2)."""
    density, _ = scipy.integrate.quad(lambda t: math.sin(t) ** (d - 2), 0, math.pi, points=[math.pi / 2])
    weighted, _ = scipy.integrate.quad(
        lambda t: math.sin(t) ** (d - 2) * math.exp(-2 * (2 - 2 * math.cos(t))), 0, math.pi, points=[math.pi / 2]
    )
    assert measure.uniform_floor(d) == pytest.approx(math.log(weighted / density), rel=1e-9)


@pytest.mark.parametrize("d", [1, 3, 16, 512])
def test_the_share_of_uniform_points_is_one(d):
    x = torch.randn(2000, d, generator=torch.Generator().manual_seed(d))
    row = measure.sphere_statistics(7 * x)
    assert row["uniformity"] == pytest.approx(uniformity(x).item(), rel=1e-5)
    assert row["uniformity_share"] == pytest.approx(1, abs=5e-3)


def test_the_share_of_one_point_is_zero():
    for x in (torch.ones(9, 4), torch.zeros(9, 4)):
        share = measure.sphere_statistics(x)["uniformity_share"]
        assert share == pytest.approx(0, abs=1e-7) and math.copysign(1, share) == 1
    opposite = measure.sphere_statistics(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert opposite["uniformity_share"] == pytest.approx(-8 / measure.uniform_floor(2)) and opposite["rank"] == 1


def test_geometry_is_that_of_256_images_and_their_two_views(photos):
    """Pixels as features: the spread of the evaluation views, and Eq. A.1 by its definition in float64."""
    view, cpu = photos.view(data.EVAL_CROP), torch.device("cpu")
    state = torch.get_rng_state()
    row = measure.geometry(nn.Flatten(), photos, view, cpu)
    assert row == measure.geometry(nn.Flatten(), photos, view, cpu) and torch.equal(state, torch.get_rng_state())
    sample = photos.test.rows(torch.linspace(0, 499, 256).long())
    pixels = torch.cat([*data.evaluation_views(sample, **view)]).flatten(1)
    assert {name: row[name] for name in ("rank", "uniformity", "uniformity_share")} == measure.sphere_statistics(pixels)
    distances = []
    for crops, _, u in data.batches(sample, 32, 64, seed=0, steps=range(4), drop_last=False):
        x, y = (v.flatten(1).double() for v in data.two_views(crops, u, photos.mean, photos.std))
        distances += (2 - 2 * torch.cosine_similarity(x, y)).tolist()
    assert len(distances) == 256 and row["alignment"] == pytest.approx(sum(distances) / 256, rel=1e-5)
    own = {"mean": (0.0,) * 3, "std": (1.0,) * 3}
    assert measure.geometry(nn.Flatten(), photos, view | own, cpu)["alignment"] < row["alignment"] / 2
    blurred = dataclasses.replace(photos, blur_p=(1.0, 1.0))  # as the set has it
    assert measure.geometry(nn.Flatten(), blurred, view, cpu)["alignment"] < row["alignment"]


def test_an_encoder_that_sees_nothing_is_aligned_and_one_point(photos):
    class Blind(nn.Module):
        def forward(self, x):
            return torch.ones(len(x), 8)

    row = measure.geometry(Blind(), photos, photos.view(data.EVAL_CROP), torch.device("cpu"))
    assert row == pytest.approx({"rank": 1, "uniformity": 0, "uniformity_share": 0, "alignment": 0}, abs=1e-6)


@pytest.mark.parametrize(
    "top1, rank, fault",
    [
        (50, 20.0, ""),
        (40, 20.0, ""),  # equal to a floor is not below it
        (35, 20.0, "the k-NN accuracy, 35 %, lies below its floors: pixels 40; try a smaller --lr, or --optimizer sgd"),
        (20, 20.0, "the k-NN accuracy, 20 %, lies below its floors: untrained 30, pixels 40; try"),
        (50, 1.2, "collapse? the effective rank of the features is 1.20: they differ in one direction alone; try a sm"),
    ],
)
def test_poor_features_are_named(top1, rank, fault):
    told = measure.poor_features(top1, {"untrained": 30, "pixels": 40}, rank, CFG)
    assert told.startswith(fault) and bool(told) == bool(fault)


@pytest.mark.parametrize(
    "changed, told",
    [
        ({}, "try a smaller --lr, or --optimizer sgd, or a --tau and --tau_end further from 1, or --reg uniform"),
        ({"optimizer": "sgd", "reg": "uniform"}, "try a smaller --lr, or a --tau and --tau_end further from 1"),
        ({"method": "simclr", "optimizer": "sgd", "reg": "uniform"}, "try a smaller --lr"),
    ],
)
def test_advice_is_of_flags_that_have_an_effect(changed, told):
    cfg = SimpleNamespace(**vars(CFG) | changed)
    assert measure.advice(measure.LEARNING, cfg) == told


def test_floors_of_a_run_are_those_of_knn_eval(command, trained):
    """Once, before the first step, and equal to the floors that the judge makes afterwards."""
    rows = rows_of(trained)
    floors = [row for row in rows if row.get("of") in ("untrained", "pixels") and row["stage"] == "pretrain"]
    assert [(row["of"], row["epoch"], row["step"]) for row in floors] == [("untrained", 0, 0), ("pixels", 0, 0)]
    code, judged, _ = command(knn_eval, trained / "ckpt.safetensors", "--k", 20)
    top1 = {row["of"]: row["top1"] for row in judged}
    assert code == 0 and all(row["top1"] == top1[row["of"]] for row in floors)


def test_floors_are_for_small_sets(photos):
    assert measure.floors_are_cheap(photos.train, photos.test, 32)
    assert not measure.floors_are_cheap(photos.train, photos.test, 2000)  # 120 GB of pixels
    many = data.Split(photos.train.images, torch.zeros(10_001))
    assert not measure.floors_are_cheap(many, photos.test, 32)


def test_a_run_below_its_floors_warns_once(command, folder, monkeypatch):
    """Nothing before a third of its length; then one row, one line, and no second one."""

    def vote(encoder, *_):
        top1 = 60.0 if isinstance(encoder, nn.Flatten) else 30.0
        return {20: {"top1": top1, "top5": 90.0}}

    monkeypatch.setattr("pretrain.nearest_neighbours", vote)
    flags = "--model test_resnet --stem imagenet --hidden_dim 32 --out_dim 16 --batch_size 16 --lr 0.1".split()
    code, rows, err = command(pretrain, "--dataset", folder, *flags, "--epochs", 6, "--eval_every", 1, "--out", "run")
    warnings = [row for row in rows if row.get("of") == "warning"]
    assert code == 0 and [row["epoch"] for row in warnings] == [2]
    cures = "try a smaller --lr, or a --tau and --tau_end further from 1, or --reg uniform"
    text = f"the k-NN accuracy, 30 %, lies below its floors: pixels 60; {cures}"
    assert warnings[0]["text"] == text and err.count(f"WARNING: {text}\n") == 1


@pytest.fixture
def poor_run(command, folder, monkeypatch):
    """A run of six epochs whose features are worse than pixels; `at_vote` is called with the number of each vote."""

    def run(at_vote):
        votes = []

        def vote(encoder, *_):
            votes.append(1)
            at_vote(len(votes))
            return {20: {"top1": 60.0 if isinstance(encoder, nn.Flatten) else 30.0, "top5": 90.0}}

        monkeypatch.setattr("pretrain.nearest_neighbours", vote)
        flags = "--model test_resnet --stem imagenet --hidden_dim 32 --out_dim 16 --batch_size 16 --lr 0.1".split()
        flags += "--epochs 6 --eval_every 1 --save_every 1steps --out run".split()
        return command(pretrain, "--dataset", folder, *flags)

    return run


def interrupt_at(number):
    def at_vote(votes):
        if votes == number:
            raise KeyboardInterrupt

    return at_vote


def test_a_run_that_goes_on_does_not_warn_again(poor_run, tmp_path):
    """Nor does its log have a second row of it."""
    code, _, err = poor_run(interrupt_at(7))  # two floors, four epochs, and the fifth
    assert code == 130 and err.count("WARNING: ") == 1
    code, _, err = poor_run(lambda _: None)
    assert code == 0 and "goes on after" in err and "WARNING: " not in err
    warnings = [row for row in rows_of(tmp_path / "run") if row.get("of") == "warning"]
    assert [row["epoch"] for row in warnings] == [2]


def test_the_epochs_of_a_collapse_are_counted_over_a_stop(poor_run, monkeypatch):
    monkeypatch.setattr("pretrain.unit", lambda x: x * 0)
    code, _, err = poor_run(interrupt_at(5))  # in the third epoch
    assert code == 130 and err.count("WARNING: collapse? For 3 epochs") == 1
    code, _, err = poor_run(lambda _: None)  # the third once more
    assert code == 0 and [err.count(f"WARNING: collapse? For {n} epochs") for n in (1, 3, 4, 6)] == [0, 1, 1, 1]


def test_the_rows_of_a_judge_are_no_floors(poor_run, tmp_path):
    """Of a run that is still going on; it may have judged another set, or with other k."""

    def judge(votes):
        if votes == 4:  # before the second epoch is looked at
            row = {"stage": "knn_eval", "of": "pixels", "top1": 99.0, "trained_epochs": 1}
            with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")

    code, rows, _ = poor_run(judge)
    (warning,) = (row["text"] for row in rows if row.get("of") == "warning")
    assert code == 0 and "lies below its floors: pixels 60; " in warning


@pytest.mark.parametrize(
    "n, micro_batches, batch_size",
    [
        *[(5, 1, 5), (31, 1, 31), (100, 1, 32), (5000, 1, 32), (8192, 1, 64), (50_000, 1, 256), (10**6, 1, 512)],
        *[(25, 2, 24), (4, 2, 4), (50_000, 12, 252), (50_000, 300, 600)],  # two images in each micro-batch at least
    ],
)
def test_the_batch_of_a_folder_follows_its_size(n, micro_batches, batch_size):
    """It falls into equal micro-batches."""
    assert settings.batch_size_for(n, micro_batches) == batch_size


def test_a_folder_may_be_too_small_for_its_shares(command, folder, tmp_path):
    code, rows, err = command(pretrain, "--dataset", folder, "--accumulate", 25, "--out", tmp_path / "run")
    need = "a batch takes two for each micro-batch of each process, 50; take fewer of these"
    assert code == 2 and rows == []
    assert err.splitlines()[-1] == f"pretrain.py: dataset {folder}: has 48 images to train on; {need}"
    assert not (tmp_path / "run").exists()


def test_a_folder_takes_the_recipe_folder(command, folder):
    flags = "--model test_resnet --stem stride2 --epochs 1".split()
    code, rows, err = command(pretrain, "--dataset", folder, *flags, "--out", "run")
    in_force = rows[0]["settings"]
    assert code == 0 and "recipe folder: batch_size 32, optimizer sgd, " in err
    assert (in_force["recipe"], in_force["batch_size"], in_force["optimizer"]) == ("folder", 32, "sgd")
    code, rows, _ = command(pretrain, "--dataset", folder, *flags, "--accumulate", 3, "--out", "other")
    assert code == 0 and rows[0]["settings"]["batch_size"] == 30
