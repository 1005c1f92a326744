"""The file of features: its rows are those of the judges, in the order of its paths and labels; what is refused."""

import shutil

import pytest
import torch
from conftest import ROOT
from torchvision.transforms.v2.functional import pil_to_tensor

import data
import models
from harness.checkpoint import load_encoder, load_file
from knn_eval import knn_eval, vote
from lib.pictures import Files, rgb
from tools.embed import embed


@pytest.mark.parametrize("in_files", [False, True])
def test_features_are_those_that_the_judge_votes_with(command, trained, folder, tmp_path, monkeypatch, in_files):
    """Pictures in memory, and pictures that stay in files; each row belongs to its path and its label."""
    if in_files:
        monkeypatch.setattr("lib.sources.MEMORY", 0)
    code, (settings, last), err = command(embed, trained / "ckpt.safetensors")
    assert code == 0 and settings["dataset"] == str(folder) and settings["images"] == {"train": 48, "test": 18}, err
    tensors, description = load_file(tmp_path / "features.safetensors")
    assert last["tensors"] == {name: list(tensor.shape) for name, tensor in tensors.items()}
    parts = [tensors[f"{part}.{kind}"] for part in ("train", "test") for kind in ("features", "labels")]
    bank, *others = parts
    scores = vote([bank], *others, (5,), 0.07)[5]
    (judged,) = command(knn_eval, trained / "ckpt.safetensors", "--k", 5, "--no_floors")[1]
    assert {name: judged[name] for name in scores} == scores

    encoder, _ = load_encoder(trained / "ckpt.safetensors")
    for part in ("train", "test"):
        paths = [f"{description['folder']}/{path}" for path in description["paths"][part]]
        labels = tensors[f"{part}.labels"]
        assert [description["classes"][label] for label in labels] == [path.split("/")[-2] for path in paths]
        pixels = Files(paths) if in_files else torch.stack([pil_to_tensor(rgb(path)) for path in paths])
        views = data.evaluation_views(data.Split(pixels, labels), **description["view"])
        torch.testing.assert_close(models.embed(encoder, views), tensors[f"{part}.features"])


def test_a_folder_without_classes_has_paths_and_no_labels(command, trained, folder, tmp_path):
    place = tmp_path / "flat" / "deep"
    place.mkdir(parents=True)
    for i, path in enumerate(sorted(folder.rglob("*.png"))[:5]):
        shutil.copy(path, place / f"{i}.png")
    (place / "2.png").write_bytes(b"broken")
    words = [trained / "encoder", "--dataset", "flat", "--out", "flat.safetensors", "--skip_broken"]
    code, _, err = command(embed, *words)
    assert code == 0, err
    tensors, description = load_file(tmp_path / "flat.safetensors")
    assert {name: len(x) for name, x in tensors.items()} == {"train.features": 4}
    assert description["folder"] == "flat/deep" and description["classes"] == []
    assert description["paths"] == {"train": ["0.png", "1.png", "3.png", "4.png"]}


def test_the_lines_of_the_docs_read_a_file_and_a_judge_does_not(command, trained):
    assert command(embed, trained / "ckpt.safetensors")[0] == 0
    code, _, err = command(knn_eval, "features.safetensors")
    assert code == 2 and err.count("\n") == 1 and "its tensors are not those of its description" in err
    text = (ROOT / "docs" / "files.md").read_text()
    (lines,) = [block for block in text.split("~~~")[1::2] if "features.safetensors" in block]
    found = {}
    exec(lines.removeprefix("python\n"), found)
    assert len(found["paths"]) == len(found["features"]) == len(found["labels"]) == 48


def test_the_encoder_of_another_project_and_a_set_without_files(command, trained, photos, tmp_path):
    encoder, _ = load_encoder(trained / "ckpt.safetensors")
    torch.save({"state_dict": encoder.state_dict()}, tmp_path / "theirs.pth")
    words = ["theirs.pth", "--model", "test_resnet", "--dataset", "photos", "--mean", "0.5", "--std", "0.25"]
    code, (settings, _), err = command(embed, *words, "--split", "test")
    assert code == 0 and settings["model"] == "test_resnet", err
    tensors, description = load_file(tmp_path / "features.safetensors")
    assert description["view"]["std"] == [0.25] * 3 and "paths" not in description and "git" in description
    assert torch.equal(tensors["test.labels"], photos.test.labels) and len(tensors) == 2


@pytest.mark.parametrize(
    "words, line",
    [
        ("CKPT --out there", "--out there: is already there; name a new file"),
        ("CKPT --out there/f", "--out there/f: cannot be written (there is no folder)"),
        ("CKPT --labels 0.5 --dataset flat", "--labels 0.5: the pictures have no classes"),
        ("CKPT --split test --dataset flat", "--split test: dataset flat has no such images; take --split train"),
    ],
)
def test_wrong_input_to_embed(command, trained, folder, tmp_path, words, line):
    (tmp_path / "there").write_text("precious")
    (tmp_path / "flat").mkdir()
    shutil.copy(next(folder.rglob("*.png")), tmp_path / "flat")
    code, rows, err = command(embed, *words.replace("CKPT", str(trained / "ckpt.safetensors")).split())
    assert code == 2 and rows == [] and line in err.splitlines()[-1]
    assert (tmp_path / "there").read_text() == "precious" and not list(tmp_path.glob("*.safetensors"))
