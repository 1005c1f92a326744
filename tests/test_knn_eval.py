"""The vote against one written by hand, and what is judged."""

import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import random, rows_of
from torch import nn

import data
from harness import checkpoint, judging
from knn_eval import knn_eval, nearest_neighbours, vote
from lib import nearest
from linear_eval import linear_eval
from tools.logs import read_log


def test_vote_is_the_one_written_by_hand():
    bank, queries = random(300, 8), random(40, 8, seed=1)
    bank_labels, labels = torch.arange(300) % 7, torch.arange(40) % 7
    for temperature in (0.07, 1.0, 1e-5):
        scores = vote([bank], bank_labels, queries, labels, (1, 20, 500), temperature)
        assert list(scores) == [1, 20, 300]
        for k, score in scores.items():
            right = {1: 0, 5: 0}
            of_class = {label: [] for label in labels.tolist()}
            for query, label in zip(queries.double(), labels.tolist()):
                similarity = torch.nn.functional.cosine_similarity(query[None], bank.double())
                nearest = similarity.argsort(descending=True)[:k].tolist()
                votes = {}  # logarithms: at a low temperature weights would be 0 but for the nearest's
                for c in bank_labels[nearest].unique().tolist():
                    exponents = [similarity[i] / temperature for i in nearest if bank_labels[i] == c]
                    votes[c] = torch.stack(exponents).logsumexp(0).item()
                order = sorted(votes, key=lambda c: (-votes[c], c))
                for n in right:
                    right[n] += label in order[:n]
                of_class[label].append(label in order[:1])
            expected = {f"top{n}": 100 * right[n] / 40 for n in right}
            recalls = [sum(found) / len(found) for found in of_class.values()]
            expected["balanced"] = 100 * sum(recalls) / len(recalls)
            assert score == pytest.approx(expected, abs=1e-3), (k, temperature)


@pytest.mark.parametrize("tile, part", [((7, 9), 13), ((512, 30), 40), ((1, 1), 1)])
def test_vote_by_parts_and_tiles_is_the_vote(monkeypatch, tile, part):
    """Parts and tiles that divide neither the bank nor the queries, smaller and larger than k and than each other."""
    bank, queries = random(40, 6, dtype=torch.float64), random(25, 6, dtype=torch.float64, seed=1)
    there = [bank], torch.arange(40) % 4, queries, torch.arange(25) % 4
    whole = vote(*there, (1, 15, 40), 0.07)
    monkeypatch.setattr(nearest, "QUERIES_IN_TILE", tile[0])
    monkeypatch.setattr(nearest, "BANK_IN_TILE", tile[1])
    monkeypatch.setattr("knn_eval.QUERIES_AT_ONCE", tile[0])
    parts = iter(bank.split(part))  # can be read once
    assert vote(parts, *there[1:], (1, 15, 40), 0.07) == whole


def test_a_bank_that_is_not_the_labels_is_refused():
    bank, labels = torch.eye(4), torch.arange(4)
    for parts, n in (([], 0), ([bank[:3]], 3), ([bank, bank], 8)):
        with pytest.raises(ValueError, match=f"the bank has {n} rows in its parts, not 4"):
            vote(iter(parts), labels, bank, labels, (1,), 0.07)


def test_a_bank_is_embedded_in_parts(photos, monkeypatch, embedded):
    bank, queries = photos.train.rows(torch.arange(0, 2000, 4)), photos.test
    of = nn.Flatten(), bank, queries, photos.view(data.EVAL_CROP)
    whole = nearest_neighbours(*of)
    assert whole == nearest_neighbours(*of, (20,), 0.07)  # DINO's, as the judge takes them
    monkeypatch.setattr(nearest, "BATCHES_IN_PART", 2)
    monkeypatch.setattr(data.evaluation_views, "__defaults__", (90,))  # images in a batch
    embedded.clear()
    assert nearest_neighbours(*of) == whole
    assert [len(features) for _, _, features in embedded] == [500, 180, 180, 140]  # the queries, then the bank


@pytest.mark.parametrize("file", ["ckpt.safetensors", "encoder"])
def test_both_files_are_judged_alike(command, trained, file):
    code, rows, _ = command(knn_eval, trained / file, "--k", "5,20,100", "--floors")
    assert code == 0 and [row["k"] for row in rows if row["of"] == "trained"] == [5, 20, 48]  # clipped to the bank
    assert [r["of"] for r in rows] == ["trained"] * 3 + ["untrained"] * 3 + ["pixels"] * 3
    code, probe, _ = command(linear_eval, trained / file, "--epochs", 4, "--batch_size", 20)
    assert code == 0 and [row["epoch"] for row in probe] == [1, 2, 3, 4, 4] and probe[-1]["features"] == "augmented"
    assert probe[-1]["top1"] > 40 and probe[-1]["top5"] == 100
    assert rows_of(trained)[-14:] == rows + probe
    measured = [row for row in rows_of(trained) if row.get("of") == "representations"][-1]
    for column in ("rank", "uniformity", "uniformity_share"):  # of the same images
        values = [row[column] for row in rows]
        assert values[0] == pytest.approx(measured[column], rel=1e-4)
        assert [values.count(value) for value in values] == [3] * 9  # three encoders, each with three k
    assert all(0 < row["alignment"] < 4 for row in rows)


def test_every_name_of_a_run_leads_to_its_encoder_and_its_log(command, trained, tmp_path, monkeypatch):
    """The run folder, the encoder's folder, the file in it, from within as well; elsewhere there is no log."""
    names = [(".", trained), ("model.safetensors", trained / "encoder"), ("run/encoder/", trained.parent)]
    scores = set()
    for name, place in names:
        monkeypatch.chdir(place)
        code, (row,), err = command(knn_eval, name, "--k", 5, "--nofloors")
        assert code == 0 and rows_of(trained)[-1] == row, (name, err)
        scores.add(row["top1"])
    assert len(scores) == 1
    shutil.copy("run/encoder/model.safetensors", tmp_path / "moved.safetensors")
    assert command(knn_eval, tmp_path / "moved.safetensors", "--k", 1, "--nofloors")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["moved.safetensors"]


def test_the_target_and_another_crop_are_judged(command, trained):
    of = ["--k", 5, "--nofloors"]
    _, (online,), _ = command(knn_eval, trained / "ckpt.safetensors", *of)
    _, (target,), _ = command(knn_eval, trained / "ckpt.safetensors", *of, "--net", "target", "--eval_crop", "1")
    assert (online["net"], online["eval_crop"]) == ("online", 0.875)
    assert (target["net"], target["eval_crop"]) == ("target", 1)
    online, _ = judging.open_encoder(trained / "ckpt.safetensors")
    target, _ = judging.open_encoder(trained / "ckpt.safetensors", "target")
    tensors, _ = checkpoint.load_file(trained / "ckpt.safetensors")
    assert torch.equal(target.bn1.weight, tensors["target.encoder.bn1.weight"])
    assert not torch.equal(target.bn1.weight, online.bn1.weight)
    code, _, err = command(linear_eval, trained / "encoder", "--net", "target")
    assert code == 2 and "encoder/model.safetensors: holds no target network" in err


def test_the_judges_compute_in_the_launchers_precision(command, trained, monkeypatch, embedded):
    """As --mixed_precision bf16: the encoder alone is under autocast, its features are fp32, and the row says so."""
    before = read_log(trained).score("knn_eval")
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "bf16")
    code, rows, err = command(knn_eval, trained / "ckpt.safetensors", "--k", 5, "--floors")
    assert code == 0 and {row["precision"] for row in rows} == {"bf16"}, err
    for encoder, views, features in embedded:
        assert views.dtype == features.dtype == torch.float32
        with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
            right = type(encoder).forward(encoder.eval(), views).float()
        assert torch.equal(features, right)
        in_fp32 = type(encoder).forward(encoder, views).detach()
        assert torch.equal(features, in_fp32) == isinstance(encoder, torch.nn.Flatten)
    assert before == read_log(trained).score("knn_eval")
