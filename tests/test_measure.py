"""What is measured beside the loss: effective rank, the floors of a run, and the warning of poor features."""

import dataclasses
import json
import math

import pytest
import scipy.special
import torch
from conftest import random, rows_of, tiny
from torch import nn

import data
from harness import measure, settings
from lib import processes
from lib.errors import InputError
from pretrain import pretrain
from regularizers import uniformity


def test_effective_rank_has_its_closed_forms():
    assert measure.effective_rank(torch.eye(8)) == pytest.approx(8)
    assert measure.effective_rank(torch.ones(9, 5)) == pytest.approx(1)
    assert measure.effective_rank(torch.zeros(9, 5)) == 1
    rows = torch.zeros(6, 4)
    rows[0, 0], rows[1, 1] = 3, 1  # singular values 3 and 1
    entropy = -0.75 * math.log(0.75) - 0.25 * math.log(0.25)
    assert measure.effective_rank(rows) == pytest.approx(math.exp(entropy))


def test_the_floor_of_uniformity_has_its_closed_forms():
    """Two points, the circle, the sphere; many dimensions, in which all cosines are 0."""
    closed = {1: (1 + math.exp(-8)) / 2, 2: scipy.special.i0(4) * math.exp(-4), 3: math.sinh(4) / 4 * math.exp(-4)}
    for d, potential in closed.items():
        assert measure.uniform_floor(d) == pytest.approx(math.log(potential), rel=1e-12)
    assert measure.uniform_floor(10**9) == pytest.approx(-4, abs=1e-7)


def test_the_share_of_uniform_points_is_one_and_of_one_point_zero():
    x = random(2000, 16)
    row = measure.sphere_statistics(7 * x)
    assert row["uniformity"] == pytest.approx(uniformity(x).item(), rel=1e-5)
    assert row["uniformity_share"] == pytest.approx(1, abs=5e-3)
    for x in (torch.ones(9, 4), torch.zeros(9, 4)):
        share = measure.sphere_statistics(x)["uniformity_share"]
        assert share == pytest.approx(0, abs=1e-7) and math.copysign(1, share) == 1
    opposite = measure.sphere_statistics(torch.tensor([[0.0, 1.0], [0.0, -1.0]]))
    assert opposite["uniformity_share"] == pytest.approx(-8 / measure.uniform_floor(2)) and opposite["rank"] == 1


def test_geometry_is_that_of_256_images_and_their_two_views(photos):
    """Pixels as features: the spread of the evaluation views, and Eq. A.1 by its definition in float64."""
    view, cpu = photos.view(data.EVAL_CROP), torch.device("cpu")
    row = measure.geometry(nn.Flatten(), photos, view, cpu)
    assert row == measure.geometry(nn.Flatten(), photos, view, cpu)
    sample = photos.test.rows(torch.linspace(0, 499, 256).long())
    pixels = torch.cat([*data.evaluation_views(sample, **view)]).flatten(1)
    assert {name: row[name] for name in ("rank", "uniformity", "uniformity_share")} == measure.sphere_statistics(pixels)
    distances = []
    for crops, _, u in data.batches(sample, 32, 64, 0, range(4), drop_last=False):
        x, y = (v.flatten(1).double() for v in data.two_views(crops, u, photos.mean, photos.std))
        distances += (2 - 2 * torch.cosine_similarity(x, y)).tolist()
    assert len(distances) == 256 and row["alignment"] == pytest.approx(sum(distances) / 256, rel=1e-5)
    blurred = dataclasses.replace(photos, blur_p=(1.0, 1.0))  # as the set has it
    assert measure.geometry(nn.Flatten(), blurred, view, cpu)["alignment"] < row["alignment"]


@pytest.mark.parametrize(
    "top1, rank, fault",
    [
        (40, 20.0, ""),  # equal to a floor is not below it
        (35, 20.0, "the k-NN accuracy, 35 %, lies below its floors: pixels 40; what may help: a smaller --lr, --opt"),
        (20, 20.0, "the k-NN accuracy, 20 %, lies below its floors: untrained 30, pixels 40; what"),
        (50, 1.2, "collapse? the features differ in one direction alone, their effective rank is 1.20; what may"),
    ],
)
def test_poor_features_are_named(top1, rank, fault):
    told = measure.poor_features(top1, {"untrained": 30, "pixels": 40}, rank)
    assert told.startswith(fault) and bool(told) == bool(fault)


def test_the_first_step_with_a_fault_is_kept(tmp_path):
    """Of three steps the second has an infinite loss, the third is finite again."""
    stored = {}
    for step, loss in enumerate((1.0, math.inf, 2.0)):
        stored = measure.first_fault(stored, {"step": torch.tensor(step), "loss": torch.tensor(loss)})
    network, accelerator = nn.Linear(2, 2), processes.start()
    fault = "^step 2: not finite: loss inf; no checkpoint is written; try a smaller --lr"
    with pytest.raises(InputError, match=fault):
        measure.refuse_faults(stored, network, tmp_path, accelerator)
    network.weight.data[0, 0] = math.nan
    with pytest.raises(InputError, match=r"^step 1: not finite: weights nan; "):
        measure.refuse_faults({"step": torch.tensor(0)}, network, tmp_path, accelerator)


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
        flags = tiny(lr=0.1, epochs=6, eval_every=1, save_every="1steps", out="run")
        return command(pretrain, "--dataset", folder, *flags)

    return run


def test_poor_features_are_told_once_in_a_run_that_is_stopped(poor_run, tmp_path):
    """After a third of its length; floors are the run's own, whatever a judge has added to its log."""

    def at_vote(votes):
        if votes == 4:  # before the second epoch is looked at
            row = {"stage": "knn_eval", "of": "pixels", "top1": 99.0, "trained_epochs": 1}
            with open(tmp_path / "run" / "metrics.jsonl", "a") as log:
                log.write(json.dumps(row) + "\n")
        if votes == 7:  # two floors, four epochs, and the fifth
            raise KeyboardInterrupt

    code, _, err = poor_run(at_vote)
    told = f"the k-NN accuracy, 30 %, lies below its floors: pixels 60; {measure.ADVICE}"
    assert code == 130 and err.count("WARNING: ") == err.count(f"WARNING: {told}\n") == 1
    code, _, err = poor_run(lambda _: None)
    assert code == 0 and "goes on after" in err and "WARNING: " not in err
    warnings = [row for row in rows_of(tmp_path / "run") if row.get("of") == "warning"]
    assert [(row["epoch"], row["text"]) for row in warnings] == [(2, told)]


def test_a_dead_network_is_told_once_in_a_run_that_is_stopped(poor_run, monkeypatch):
    """Its rows say so each time."""
    monkeypatch.setattr("pretrain.unit", lambda x: x * 0)

    def at_vote(votes):
        if votes == 5:  # in the third epoch
            raise KeyboardInterrupt

    code, rows, err = poor_run(at_vote)
    assert code == 130 and err.count("WARNING: dead network: ") == err.count("WARNING: ") == 1
    assert [row["dead"] for row in rows if "loss" in row] == [True] * 3
    code, _, err = poor_run(lambda _: None)
    assert code == 0 and "WARNING: dead network: " not in err


@pytest.mark.parametrize(
    "n, micro_batches, batch_size",
    [
        *[(5, 1, 5), (100, 1, 32), (8192, 1, 64), (10**6, 1, 512)],
        *[(25, 2, 24), (50_000, 12, 252), (50_000, 300, 600)],  # two images in each micro-batch at least
    ],
)
def test_the_batch_of_a_folder_follows_its_size(n, micro_batches, batch_size):
    """It falls into equal micro-batches."""
    assert settings.batch_size_for(n, micro_batches) == batch_size


def test_a_folder_takes_the_recipe_folder(command, folder):
    flags = "--model test_resnet --stem stride2 --epochs 1".split()
    code, rows, err = command(pretrain, "--dataset", folder, *flags, "--out", "run")
    in_force = rows[0]["settings"]
    assert code == 0 and "recipe folder and flags: epochs 1, batch_size 32, optimizer sgd, " in err
    assert (in_force["recipe"], in_force["batch_size"], in_force["optimizer"]) == ("folder", 32, "sgd")
