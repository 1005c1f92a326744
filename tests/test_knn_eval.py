"""The vote against one written by hand, and what is judged."""

import math
import shutil

import pytest
import torch
from accelerate.state import AcceleratorState
from conftest import rows_of
from torch import nn

import data
import models
from harness import checkpoint, judging
from harness.settings import name_of_weights
from knn_eval import knn_eval, nearest_neighbours, vote
from lib import nearest, processes
from linear_eval import linear_eval
from tools.logs import read_log


def test_vote_is_the_one_written_by_hand():
    generator = torch.Generator().manual_seed(0)
    bank, queries = torch.randn(300, 8, generator=generator), torch.randn(40, 8, generator=generator)
    bank_labels, labels = (torch.randint(7, (n,), generator=generator) for n in (300, 40))
    for temperature in (0.07, 1.0, 1e-4, 1e-50):
        scores = vote([bank], bank_labels, queries, labels, (1, 20, 500), temperature)
        assert list(scores) == [1, 20, 300]
        for k, score in scores.items():
            right = {1: 0, 5: 0}
            of_class = {label: [] for label in labels.tolist()}
            for query, label in zip(queries.double(), labels.tolist()):
                similarity = torch.nn.functional.cosine_similarity(query[None], bank.double())
                nearest = similarity.argsort(descending=True)[:k].tolist()
                votes = dict.fromkeys(bank_labels[nearest].tolist(), 0.0)
                for i in nearest:
                    votes[bank_labels[i].item()] += math.exp((similarity[i] - similarity[nearest[0]]) / temperature)
                order = sorted((c for c in votes if votes[c] > 0), key=lambda c: (-votes[c], c))
                for n in right:
                    right[n] += label in order[:n]
                of_class[label].append(label in order[:1])
            expected = {f"top{n}": 100 * right[n] / 40 for n in right}
            recalls = [sum(found) / len(found) for found in of_class.values()]
            expected["balanced"] = 100 * sum(recalls) / len(recalls)
            assert score == pytest.approx(expected, abs=1e-3), (k, temperature)


@pytest.mark.parametrize("tile", [(7, 9), (512, 30), (1, 1)])
@pytest.mark.parametrize("part", [40, 13, 1])
def test_vote_by_parts_and_tiles_is_the_vote(monkeypatch, tile, part):
    """Parts and tiles that divide neither the bank nor the queries, smaller and larger than k and than each other."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(n, 6, generator=generator, dtype=torch.float64) for n in (40, 25))
    there = [bank], torch.arange(40) % 4, queries, torch.arange(25) % 4
    whole = vote(*there, (1, 15, 40), 0.07)
    monkeypatch.setattr("lib.nearest.QUERIES_IN_TILE", tile[0])
    monkeypatch.setattr("lib.nearest.BANK_IN_TILE", tile[1])
    monkeypatch.setattr("knn_eval.QUERIES_AT_ONCE", tile[0])
    parts = iter(there[0][0].split(part))  # can be read once
    assert vote(parts, *there[1:], (1, 15, 40), 0.07) == whole


def test_a_bank_that_is_not_the_labels_is_refused():
    bank, labels = torch.eye(4), torch.arange(4)
    for parts, n in (([], 0), ([bank[:3]], 3), ([bank, bank], 8)):
        with pytest.raises(ValueError, match=f"the bank has {n} rows in its parts, not 4"):
            vote(iter(parts), labels, bank, labels, (1,), 0.07)


def test_a_process_without_images_has_no_rows(photos):
    """Of five images and four processes, the last one."""
    none = photos.train.rows(torch.arange(0))
    for views in nearest.in_parts(data.evaluation_views(none, **photos.view(data.EVAL_CROP))):
        assert models.embed(nn.Flatten(), views).shape == (0, 3072)


def test_a_bank_is_embedded_in_parts(photos, monkeypatch):
    bank, queries = photos.train.rows(torch.arange(0, 2000, 4)), photos.test
    of = nn.Flatten(), bank, queries, photos.view(data.EVAL_CROP), processes.start()
    whole = nearest_neighbours(*of)
    monkeypatch.setattr(nearest, "BATCHES_IN_PART", 2)
    monkeypatch.setattr(data.evaluation_views, "__defaults__", (90,))  # images in a batch
    embedded, embed = [], models.embed

    def spy(encoder, views):
        embedded.append(embed(encoder, views))
        return embedded[-1]

    monkeypatch.setattr(models, "embed", spy)
    assert nearest_neighbours(*of) == whole
    assert [len(features) for features in embedded] == [500, 180, 180, 140]  # the queries, then the bank


def test_online_vote_is_dinos(photos):
    """20 neighbours at a temperature of 0.07, on the pixels of the evaluation view: other numbers give other scores."""
    bank, queries = photos.train.rows(torch.arange(0, 2000, 4)), photos.test
    view = photos.view(data.EVAL_CROP)
    scores = nearest_neighbours(nn.Flatten(), bank, queries, view, processes.start())
    pixels = [torch.cat([*data.evaluation_views(split, **view)]).flatten(1) for split in (bank, queries)]
    features = [pixels[0]], bank.labels, pixels[1], queries.labels
    assert scores == vote(*features, (20,), 0.07)
    assert scores[20] not in [vote(*features, (k,), t)[k] for k, t in ((20, 0.1), (20, 0.05), (10, 0.07))]


def test_vote_on_few_classes_and_images():
    bank = torch.eye(2)
    for labels, part in (([0, 1], 100.0), ([1, 0], 0.0)):
        scores = {"top1": part, "top5": part, "balanced": part}
        assert vote([bank], torch.tensor([0, 1]), bank, torch.tensor(labels), (1,), 0.07) == {1: scores}
    scores = {"top1": 100.0, "top5": 100.0, "balanced": 100.0}
    assert vote([bank], torch.tensor([0, 1]), bank, torch.tensor([0, 1]), (20,), 0.07) == {2: scores}


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


def test_every_name_of_a_run_leads_to_its_encoder_and_its_log(command, trained, monkeypatch):
    """The run folder, the encoder's folder, the file in it, from within as well; and the file of earlier versions."""
    earlier = trained / "encoder.safetensors"
    earlier.write_bytes((trained / "encoder" / "model.safetensors").read_bytes())
    names = [(".", trained), (".", trained / "encoder"), ("model.safetensors", trained / "encoder")]
    names += [(place, trained.parent) for place in ("run", "run/encoder", "run/encoder/", "run/encoder.safetensors")]
    scores = set()
    for name, place in names:
        monkeypatch.chdir(place)
        code, (row,), err = command(knn_eval, name, "--k", 5, "--nofloors")
        assert code == 0 and rows_of(trained)[-1] == row, (name, err)
        scores.add(row["top1"])
    earlier.unlink()
    assert len(scores) == 1


def test_a_run_may_be_called_encoder(command, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "encoder")
    for name in ("encoder", "encoder/ckpt.safetensors", "encoder/encoder"):
        code, (row,), _ = command(knn_eval, name, "--k", 5, "--nofloors")
        assert code == 0 and rows_of(tmp_path / "encoder")[-1] == row, name
    for name in ("encoder", "encoder/encoder"):
        assert name_of_weights(str(tmp_path / name)) == "encoder"


def test_the_target_and_another_crop_are_judged(command, trained):
    of = ["--k", 5, "--nofloors"]
    _, (online,), _ = command(knn_eval, trained / "ckpt.safetensors", *of)
    _, (target,), _ = command(knn_eval, trained / "ckpt.safetensors", *of, "--net", "target", "--eval_crop", "1")
    assert (online["net"], online["eval_crop"]) == ("online", 0.875) and (target["net"], target["eval_crop"]) == (
        "target",
        1,
    )
    online, _ = judging.open_encoder(trained / "ckpt.safetensors")
    target, _ = judging.open_encoder(trained / "ckpt.safetensors", "target")
    tensors, _ = checkpoint.load(trained / "ckpt.safetensors")
    assert torch.equal(target.bn1.weight, tensors["target.encoder.bn1.weight"])
    assert not torch.equal(target.bn1.weight, online.bn1.weight)
    code, _, err = command(linear_eval, trained / "encoder", "--net", "target")
    assert code == 2 and "encoder/model.safetensors: holds no target network" in err


def test_a_checkpoint_judges_another_set(command, trained):
    code, rows, _ = command(knn_eval, trained / "ckpt.safetensors", "--dataset", "photos", "--nofloors")
    assert code == 0 and (rows[0]["dataset"], rows[0]["bank"], rows[0]["queries"]) == ("photos", 2000, 500)
    assert [row["k"] for row in rows] == [10, 20, 100, 200] and rows[0]["temperature"] == 0.07


def test_a_checkpoint_elsewhere_is_judged_without_a_log(command, trained, tmp_path):
    (tmp_path / "moved.safetensors").write_bytes((trained / "encoder" / "model.safetensors").read_bytes())
    assert command(knn_eval, tmp_path / "moved.safetensors", "--k", 1, "--nofloors")[0] == 0
    assert [p.name for p in tmp_path.iterdir()] == ["moved.safetensors"]


def test_the_judges_compute_in_the_launchers_precision(command, trained, monkeypatch):
    """As --mixed_precision bf16: the encoder alone is under autocast, its features are fp32, and the row says so."""
    judged = []
    embed = models.embed

    def spy(encoder, views):
        views = list(views)
        features = embed(encoder, views)
        judged.append((encoder, torch.cat(views), features))
        return features

    monkeypatch.setattr(models, "embed", spy)
    of = [trained / "ckpt.safetensors", "--k", 5, "--floors"]
    code, rows, _ = command(knn_eval, *of)
    in_fp32 = [features for _, _, features in judged]
    assert code == 0 and {row["precision"] for row in rows} == {"no"}
    before = read_log(trained).score("knn_eval"), read_log(trained).score("linear_eval")
    judged.clear()
    monkeypatch.setitem(AcceleratorState._shared_state, "_mixed_precision", "bf16")
    code, rows, err = command(knn_eval, *of)
    assert code == 0 and {row["precision"] for row in rows} == {"bf16"}, err
    for (encoder, views, features), exact in zip(judged, in_fp32):
        assert views.dtype == features.dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            right = type(encoder).forward(encoder.eval(), views).float()
        assert torch.equal(features, right)
        is_network = not isinstance(encoder, torch.nn.Flatten)
        assert torch.equal(features, exact) != is_network
        torch.testing.assert_close(features, exact, rtol=0.05, atol=0.05 * exact.abs().max().item())
    code, rows, _ = command(linear_eval, trained / "ckpt.safetensors", "--epochs", 1)
    assert code == 0 and rows[-1]["precision"] == "bf16"
    assert before == (read_log(trained).score("knn_eval"), read_log(trained).score("linear_eval"))
