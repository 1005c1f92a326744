"""What both judges share: ranks and accuracies against their definitions, and a part of the labels."""

import dataclasses
import math

import pytest
import torch

import data
from harness.judging import accuracy, rank_of, with_labels
from knn_eval import knn_eval
from lib.errors import InputError
from linear_eval import linear_eval
from tools.logs import read_log


def test_ranks_and_accuracies_by_hand():
    """Seven classes, eight rows, whose true class has rank 0, 0, 0, 1, 3, 4, 5 and 6."""
    ranks = torch.tensor([0, 0, 0, 1, 3, 4, 5, 6])
    labels = torch.tensor([3, 1, 4, 1, 5, 2, 6, 0])
    logits = torch.stack([-(torch.arange(7) - label + rank).remainder(7).float() for label, rank in zip(labels, ranks)])
    assert torch.equal(rank_of(labels, logits), ranks)
    recalls = [0, 1 / 2, 0, 1, 1, 0, 0]  # of the classes 0 ... 6
    assert accuracy(ranks, labels) == {"top1": 37.5, "top5": 75.0, "balanced": round(100 * sum(recalls) / 7, 4)}


def test_ties_and_classes_without_a_score():
    """Of equal scores the lower class is first; -inf and NaN are never found, also among fewer than five classes."""
    scores = torch.tensor([[0.0, 0.0, -1.0], [0.0, 0.0, -1.0], [-math.inf, 0.0, -math.inf], [math.nan, 0.0, 1.0]])
    assert rank_of(torch.tensor([0, 1, 0, 0]), scores).tolist() == [0, 1, 5, 5]
    assert rank_of(torch.tensor([2]), torch.full((1, 9), -math.inf)).tolist() == [9]


def unequal(counts, holdout=4):
    """A data set of as many training images a class, in mixed order; each image's pixel is its row number."""
    labels = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    labels = labels[torch.randperm(len(labels), generator=torch.Generator().manual_seed(1))]
    images = torch.arange(len(labels), dtype=torch.uint8)[:, None, None, None]
    train = data.Split(images, labels)
    classes = tuple("abc"[: len(counts)])
    return data.Dataset(classes, train, train, None, 1, "imagenet", (0.5,) * 3, (0.5,) * 3, holdout)


def test_a_part_of_the_labels_is_of_each_class_and_always_the_same():
    whole = unequal([40, 10, 6])
    half, quarter = with_labels(whole, 0.5), with_labels(whole, 0.25)
    assert half.train.labels.bincount().tolist() == [20, 5, 3]
    assert quarter.train.labels.bincount().tolist() == [10, 2, 2]  # round(2.5) and round(1.5), as Python has them
    rows = half.train.images.flatten().long()
    assert torch.equal(whole.train.labels[rows], half.train.labels) and rows.unique().tolist() == rows.tolist()
    assert {*quarter.train.images.flatten().tolist()} < {*rows.tolist()}
    assert torch.equal(with_labels(whole, 0.5).train.images, half.train.images)
    assert half.test is whole.test
    assert (half.holdout, quarter.holdout, with_labels(whole, 0.2).holdout) == (2, 1, 0.8)
    told = "--labels 0.05: class b would keep none of its 10 training images; 0.1667 keeps one of each class"
    with pytest.raises(InputError, match=told):
        with_labels(whole, 0.05)
    assert with_labels(whole, 0.1667).train.labels.bincount().min() == 1


def test_the_bank_is_a_part_of_the_labels(command, trained):
    """All labels are today's rows; fewer are another protocol, which the rows name and no score takes."""
    flags = [trained / "ckpt.safetensors", "--k", "20,40", "--nofloors"]
    _, whole, _ = command(knn_eval, *flags)
    assert "labels" not in whole[0] and whole[0]["bank"] == 48
    before = read_log(trained).score("knn_eval")
    code, half, _ = command(knn_eval, *flags, "--labels", 0.5)
    assert code == 0 and [(row["k"], row["bank"], row["labels"]) for row in half] == [(20, 24, 0.5), (24, 24, 0.5)]
    log = read_log(trained)
    assert log.rows[-1] == half[-1] and log.score("knn_eval") == before == whole[0]["top1"]
    raised = [{**row, "top1": 99.0} if "labels" in row else row for row in log.rows]
    assert dataclasses.replace(log, rows=raised).score("knn_eval") == before


def test_a_sweep_holds_out_of_the_labels_that_are_left(command, trained, monkeypatch):
    """Of 16 images a class the sweep holds out 2; of 8 it holds out 1, and of 1 it cannot."""
    held = []
    hold_out = data.hold_out
    monkeypatch.setattr(data, "hold_out", lambda *of: held.append(hold_out(*of)) or held[-1])
    flags = [trained / "ckpt.safetensors", "--sweep", "--cached", "--epochs", 1]
    code, rows, _ = command(linear_eval, *flags, "--labels", 0.5)
    assert code == 0 and (rows[-1]["labels"], rows[-1]["train"], rows[-1]["batch_size"]) == (0.5, 24, 21)
    assert [len(split.labels) for split in (held[0].train, held[0].test)] == [21, 3]
    assert read_log(trained).score("linear_eval") is None
    code, rows, err = command(linear_eval, *flags, "--labels", 0.0625)
    assert code == 2 and rows == [] and "linear_eval.py: hold-out: class" in err.splitlines()[-1]
