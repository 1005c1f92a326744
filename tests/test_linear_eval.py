"""The probe: an epoch by hand, its sweep, its batches, and an encoder that stays as it was."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from conftest import random
from torch import nn
from torchvision.transforms.v2 import functional as F

import data
from harness import judging
from lib import processes
from linear_eval import Features, feature_batches, fit, linear_eval


@pytest.fixture
def judged(photos):
    """What `fit` reads of an encoder that is judged: here the pixels are the features."""
    accelerator = processes.start()
    view = photos.view(data.EVAL_CROP)
    encoder = nn.Flatten()
    encoder.num_features = 6
    return SimpleNamespace(accelerator=accelerator, encoder=encoder, images=photos, view=view, log=None)


def test_an_epoch_is_the_one_written_by_hand(judged, capsys):
    """Nesterov's momentum, the decay, and a cosine to 0 over three batches of 20, 20 and 8 rows, for two rates."""
    x, labels = random(48, 6), torch.arange(48) % 10
    rows = {rate: {"sweep": rate} for rate in (4.0, 1.0)}
    fitted = fit(judged, Features(x, labels), rows, epochs=1, batch_size=20, weight_decay=0.1, seed=3)
    logged = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert list(fitted) == [row["sweep"] for row in logged] == [4.0, 1.0]

    ones = torch.ones(48, 1, dtype=torch.float64)
    inputs = torch.cat([x.double(), ones], 1)  # the bias is one more weight
    truth = torch.eye(10, dtype=torch.float64)[labels]
    order = torch.randperm(48, generator=torch.Generator().manual_seed(3))
    for row, (rate, classifier) in zip(logged, fitted.items()):
        torch.manual_seed(3)
        fresh = nn.Linear(6, 10)
        w = torch.cat([fresh.weight, fresh.bias[:, None]], 1).detach().double()
        velocity, loss, correct = 0, 0, 0
        for step, chosen in enumerate(order.split(20)):
            logits = inputs[chosen] @ w.T
            probabilities = logits.softmax(1)
            loss -= (truth[chosen] * probabilities.log()).sum().item()
            correct += (logits.argmax(1) == labels[chosen]).sum().item()
            gradient = (probabilities - truth[chosen]).T @ inputs[chosen] / len(chosen) + 0.1 * w
            velocity = 0.9 * velocity + gradient
            w = w - rate * 20 / 256 * (1, 0.75, 0.25)[step] * (gradient + 0.9 * velocity)
        torch.testing.assert_close(classifier.weight.double(), w[:, :6], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(classifier.bias.double(), w[:, 6], rtol=1e-4, atol=1e-5)
        expected = {"sweep": rate, "epoch": 1, "loss": loss / 48, "train_top1": 100 * correct / 48}
        assert row == pytest.approx({**expected, "rate": rate * 20 / 256}, rel=1e-4)


def test_features_are_of_crops_and_flips_alone(judged):
    """Those of `data.batches`, less the mean and over the std; the last batch is what is left."""
    photos, train = judged.images, judged.images.train.rows(torch.arange(48))
    batches = list(feature_batches(judged, train, epochs=2, batch_size=20, seed=3))
    assert [len(labels) for _, labels in batches] == 2 * [20, 20, 8]
    crops = data.batches(train, 32, 20, 3, range(len(batches)), views=1, drop_last=False)
    for (features, labels), (x, true_labels, _) in zip(batches, crops):
        pixels = F.normalize(x[0], photos.mean, photos.std)
        torch.testing.assert_close(features, pixels.flatten(1))
        assert torch.equal(labels, true_labels)


def test_the_protocol_is_that_of_appendix_d(command, trained):
    """80 epochs and no decay; 0.2 per 256 images. lr is in the last row alone, rate in those of epochs alone."""
    _, rows, _ = command(linear_eval, trained / "encoder", "--cached")
    assert len(rows) == 81 and (rows[-1]["epoch"], rows[-1]["weight_decay"], rows[-1]["lr"]) == (80, 0, 0.2)
    assert rows[-1]["batch_size"] == 48 and rows[0]["rate"] == pytest.approx(0.2 * 48 / 256)
    assert rows[40]["rate"] == pytest.approx(0.1 * 48 / 256) and "lr" not in rows[0] and "rate" not in rows[-1]
    _, rows, _ = command(linear_eval, trained / "encoder", "--cached", "--dataset", "photos", "--epochs", 1)
    assert rows[-1]["batch_size"] == 100 and rows[0]["rate"] == pytest.approx(0.2 * 100 / 256)


def test_a_sweep_takes_the_best_rate_on_the_hold_out(command, trained):
    """Of each class, the folder's 16 training images give 2; the test set is judged once, at the end."""
    code, rows, _ = command(linear_eval, trained / "encoder", "--sweep", "--epochs", 2, "--batch_size", 20)
    assert code == 0
    tops = {row["sweep"]: row["top1"] for row in rows if row.get("split") == "holdout"}
    assert list(tops) == [0.4, 0.3, 0.2, 0.1, 0.05]
    last = rows[-1]
    assert last["swept"] and tops[last["lr"]] == max(tops.values()) and (last["split"], last["train"]) == ("test", 48)
    assert [row.get("split") for row in rows].count("test") == 1


def test_a_rate_that_diverges_leaves_the_sweep(command, trained, monkeypatch):
    """The others go on as if it had not been there; if none is left, and without a sweep, the command ends."""
    exact = torch.nn.functional.cross_entropy

    def overflowing(logits, labels):
        return exact(logits, labels) * (math.nan if logits.abs().max() > 1e6 else 1)

    monkeypatch.setattr("linear_eval.cross_entropy", overflowing)
    flags = ["--sweep", "--epochs", 2, "--batch_size", 20, "--cached"]
    monkeypatch.setattr("linear_eval.SWEEP", (0.1,))
    _, alone, _ = command(linear_eval, trained / "encoder", *flags)
    monkeypatch.setattr("linear_eval.SWEEP", (1e9, 0.1))
    code, rows, err = command(linear_eval, trained / "encoder", *flags)
    assert code == 0 and rows == alone and rows[-1]["lr"] == 0.1
    assert "--lr 1000000000.0: leaves the sweep, its loss is not finite after epoch 1" in err
    monkeypatch.setattr("linear_eval.SWEEP", (1e9, 1e8))
    code, rows, err = command(linear_eval, trained / "encoder", *flags)
    told = "--lr 100000000.0: the loss is not finite after epoch 1; take a smaller one\n"
    assert code == 2 and rows == [] and err.endswith(told)


def test_linear_eval_leaves_the_encoder_as_it_was(command, trained, monkeypatch):
    """Its weights, and the statistics of its BatchNorm."""
    opened, open_judged = [], judging.open_judged
    monkeypatch.setattr(judging, "open_judged", lambda *of: opened.append(open_judged(*of)) or opened[-1])
    code, _, _ = command(linear_eval, trained / "ckpt.safetensors", "--epochs", 1, "--batch_size", 24)
    fresh, _ = judging.open_encoder(trained / "ckpt.safetensors")
    assert code == 0 and not opened[0].encoder.training
    torch.testing.assert_close(opened[0].encoder.state_dict(), fresh.state_dict(), rtol=0, atol=0)
