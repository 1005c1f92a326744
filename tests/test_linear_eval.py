"""The probe: its sweep, its batches, and an encoder that stays as it was."""

import math

import pytest
import torch

import models
from linear_eval import linear_eval


@pytest.mark.parametrize("cached", [[], ["--cached"]])
def test_a_sweep_takes_the_best_rate_on_the_hold_out(command, trained, cached):
    """Of each class, the folder's 16 training images give 2; the test set is judged once, at the end."""
    flags = ["--sweep", "--epochs", 2, "--batch_size", 20, *cached]
    code, rows, _ = command(linear_eval, trained / "encoder.safetensors", *flags)
    assert code == 0
    tops = {row["sweep"]: row["top1"] for row in rows if row.get("split") == "holdout"}
    assert list(tops) == [0.4, 0.3, 0.2, 0.1, 0.05]
    last = rows[-1]
    assert last["swept"] and tops[last["lr"]] == max(tops.values()) and (last["split"], last["train"]) == ("test", 48)
    assert [row.get("split") for row in rows].count("test") == 1
    code, _, err = command(linear_eval, trained / "encoder.safetensors", "--sweep", "--lr", "0.1")
    assert code == 2 and "--lr 0.1: has no effect with --sweep" in err


def test_a_batch_larger_than_the_set(command, trained):
    """It is refused; without the flag all 48 images are one batch, and the rate is that batch's."""
    code, rows, err = command(linear_eval, trained / "ckpt.safetensors", "--batch_size", 49)
    assert code == 2 and rows == [] and "has 48 images to train on; take fewer" in err
    given, own = (
        command(linear_eval, trained / "ckpt.safetensors", "--epochs", 2, *flag)[1]
        for flag in (["--batch_size", 48], [])
    )
    assert given == own and own[-1]["batch_size"] == 48 and own[0]["rate"] == pytest.approx(0.2 * 48 / 256)


def test_a_linear_probe_that_diverges_says_so(command, trained, monkeypatch):
    monkeypatch.setattr("linear_eval.cross_entropy", lambda scores, labels: scores.sum() * math.nan)
    code, rows, err = command(linear_eval, trained / "encoder.safetensors", "--batch_size", 24)
    assert code == 2 and rows == [] and "--lr 0.2: the loss is not finite after epoch 1" in err.splitlines()[-1]


def test_a_column_has_one_unit(command, trained):
    """lr is per 256 images, in the last row alone; rate is the optimizer's, in the rows of epochs alone."""
    flags = ["--epochs", 2, "--batch_size", 24, "--lr", 0.4, "--cached"]
    code, (first, second, last), _ = command(linear_eval, trained / "encoder.safetensors", *flags)
    assert code == 0 and last["lr"] == 0.4 and "rate" not in last
    assert (first["rate"], second["rate"]) == pytest.approx((0.4 * 24 / 256, 0.4 * 24 / 256 / 2))  # a cosine of 4 steps
    assert "lr" not in first and "lr" not in second


@pytest.mark.parametrize("cached", [[], ["--cached"]])
def test_a_rate_that_diverges_leaves_the_sweep(command, trained, monkeypatch, cached):
    """The others go on as if it had not been there; if none is left, the sweep ends."""
    exact = torch.nn.functional.cross_entropy

    def overflowing(logits, labels):
        return exact(logits, labels) * (math.nan if logits.abs().max() > 1e6 else 1)

    monkeypatch.setattr("linear_eval.cross_entropy", overflowing)
    flags = ["--sweep", "--epochs", 2, "--batch_size", 20, *cached]
    monkeypatch.setattr("linear_eval.SWEEP", (0.1,))
    _, alone, _ = command(linear_eval, trained / "encoder.safetensors", *flags)
    monkeypatch.setattr("linear_eval.SWEEP", (1e9, 0.1))
    code, rows, err = command(linear_eval, trained / "encoder.safetensors", *flags)
    assert code == 0 and rows == alone and rows[-1]["lr"] == 0.1
    assert "--sweep: rate 1000000000.0: the loss is not finite after epoch 1; the sweep goes on without it" in err
    monkeypatch.setattr("linear_eval.SWEEP", (1e9, 1e8))
    code, rows, err = command(linear_eval, trained / "encoder.safetensors", *flags)
    assert code == 2 and rows == [] and "--sweep: the loss of none of its rates is finite; take a smaller" in err


def test_linear_eval_leaves_the_encoder_as_it_was(command, trained, monkeypatch):
    """An encoder that is touched in training, here by BatchNorm in training mode, is found out."""
    monkeypatch.setattr(models, "embed", lambda encoder, views: torch.cat([encoder.train()(v) for v in views]))
    with pytest.raises(RuntimeError, match="frozen encoder has changed"):
        command(linear_eval, trained / "ckpt.safetensors", "--epochs", 1, "--batch_size", 24)
