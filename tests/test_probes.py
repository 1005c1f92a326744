"""What is measured beside the loss: effective rank, the floors of a run, and the warning of poor features."""

import math

import pytest
import torch
from conftest import rows_of
from torch import nn

import data
from harness import probes, settings
from knn_eval import knn_eval
from pretrain import pretrain


def test_effective_rank_has_its_closed_forms():
    assert probes.effective_rank(torch.eye(8)) == pytest.approx(8)
    assert probes.effective_rank(torch.ones(9, 5)) == pytest.approx(1)
    assert probes.effective_rank(torch.zeros(9, 5)) == 1
    rows = torch.zeros(6, 4)
    rows[0, 0], rows[1, 1] = 3, 1  # singular values 3 and 1
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert probes.effective_rank(rows) == pytest.approx(math.exp(entropy))


def test_effective_rank_is_that_of_the_gram_matrix():
    x = torch.randn(40, 12, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 13)
    values = torch.linalg.eigvalsh((x.T @ x).double()).clamp_min(0).sqrt()
    shares = values / values.sum()
    expected = (-(shares * shares.log()).sum()).exp().item()
    assert probes.effective_rank(x) == pytest.approx(expected, rel=1e-5)
    assert probes.effective_rank(x.half() * 1e-3) == pytest.approx(expected, rel=1e-2)


@pytest.mark.parametrize(
    "top1, rank, fault",
    [
        (50, 20.0, ""),
        (40, 20.0, ""),  # equal to a floor is not below it
        (35, 20.0, "the k-NN accuracy, 35 %, lies below its floors: pixels 40"),
        (20, 20.0, "the k-NN accuracy, 20 %, lies below its floors: untrained 30, pixels 40"),
        (50, 1.2, "collapse? the effective rank of the features is 1.20"),
    ],
)
def test_poor_features_are_named(top1, rank, fault):
    told = probes.poor_features(top1, {"untrained": 30, "pixels": 40}, rank)
    assert told.startswith(fault) and bool(told) == bool(fault)


def test_floors_of_a_run_are_those_of_knn_eval(command, trained):
    """Once, before the first step, and equal to the floors that the judge makes afterwards."""
    rows = rows_of(trained)
    floors = [row for row in rows if row.get("of") in ("untrained", "pixels") and row["stage"] == "pretrain"]
    assert [(row["of"], row["epoch"], row["step"]) for row in floors] == [("untrained", 0, 0), ("pixels", 0, 0)]
    code, judged, _ = command(knn_eval, trained / "ckpt.safetensors", "--k", 20)
    top1 = {row["of"]: row["top1"] for row in judged}
    assert code == 0 and all(row["top1"] == top1[row["of"]] for row in floors)


def test_floors_are_for_small_sets(photos):
    assert probes.floors_are_cheap(photos.train, photos.test, 32)
    assert not probes.floors_are_cheap(photos.train, photos.test, 2000)  # 120 GB of pixels
    many = data.Split(photos.train.images, torch.zeros(10_001))
    assert not probes.floors_are_cheap(many, photos.test, 32)


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
    assert warnings[0]["text"] == "the k-NN accuracy, 30 %, lies below its floors: pixels 60"
    assert err.count("WARNING: the k-NN accuracy, 30 %, lies below its floors: pixels 60; try a smaller --lr") == 1


@pytest.mark.parametrize(
    "n, batch_size", [(5, 5), (31, 31), (100, 32), (5000, 32), (8192, 64), (50_000, 256), (10**6, 512)]
)
def test_the_batch_of_a_folder_follows_its_size(n, batch_size):
    assert settings.batch_size_for(n) == batch_size


def test_a_folder_takes_the_recipe_folder(command, folder):
    flags = "--model test_resnet --stem stride2 --epochs 1".split()
    code, rows, err = command(pretrain, "--dataset", folder, *flags, "--out", "run")
    in_force = rows[0]["settings"]
    assert code == 0 and "recipe folder: batch_size 32, optimizer sgd, " in err
    assert (in_force["recipe"], in_force["batch_size"], in_force["optimizer"]) == ("folder", 32, "sgd")
    code, _, err = command(pretrain, "--dataset", folder, *flags, "--accumulate", 3, "--out", "other")
    assert code == 2 and "--batch_size 32: must be a multiple of 3, and at least twice that" in err
