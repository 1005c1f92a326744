"""An exported folder: what timm and the lines of its card load, what the card says, and what is refused."""

import contextlib
import json
import re
import shutil

import pytest
import timm
import torch
import yaml
from conftest import ROOT, files_of, rows_of
from PIL import Image

import models
from harness import checkpoint, judging
from knn_eval import knn_eval
from linear_eval import linear_eval
from tools.export import CITATION, data_line, export, without_paths


@pytest.fixture
def run_of(trained, tmp_path):
    """Make a run folder with the encoder of another architecture, its statistics those of a training."""

    def make(**changes):
        _, description = checkpoint.load_file(trained / "encoder" / "model.safetensors")
        settings = description["settings"] | changes
        torch.manual_seed(0)
        encoder = models.build_encoder(settings["model"], settings["stem"], settings["norm"])
        encoder(torch.randn(8, 3, 32, 32))
        description = {**description, "settings": settings}
        config = checkpoint.timm_config(settings, description["view"])
        (tmp_path / "made").mkdir()
        checkpoint.save_encoder(tmp_path / "made", encoder.state_dict(), description, config)
        first, *rest = rows_of(trained)
        rows = [{**first, "settings": settings}, *rest]
        (tmp_path / "made" / "metrics.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
        return tmp_path / "made"

    return make


def run_card(folder):
    """Run the Python of a card in its folder, with a picture there, and return its names."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    Image.effect_noise((50, 40), 60).convert("RGB").save(folder / "picture.jpg")
    names = {"__name__": "card"}
    with contextlib.chdir(folder):
        exec(block, names)
    return names


NAMED = [{}, {"model": "resnet18"}]
UNNAMED = [
    {"model": "resnet18", "stem": "cifar"},
    {"model": "resnet26d", "stem": "stride2"},  # its own stem has three convolutions
    {"model": "resnet18", "norm": "none"},
    {"model": "resnet18", "stem": "cifar", "norm": "none"},
    {"model": "alexnet"},
    {"model": "alexnet", "norm": "none"},
]


@pytest.mark.parametrize("changes", NAMED + UNNAMED)
def test_the_lines_of_the_card_load_the_encoder(shell, run_of, tmp_path, changes):
    run = run_of(**changes)
    code, lines, err = shell(export, run, "--to", "out")
    assert code == 0 and lines[1] == "hf upload NAME out  # NAME: user/repository", err
    files = ["README.md", "config.json", "model.safetensors"]
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == files[:: 1 if changes in NAMED else 2]
    loaded = run_card(tmp_path / "out")
    ours, description = judging.open_encoder(run / "encoder")
    image = loaded["view"](loaded["image"])[None]
    assert image.shape[2:] == (description["view"]["size"],) * 2 and loaded["features"].abs().max() > 0
    torch.testing.assert_close(loaded["features"], ours(image), rtol=0, atol=1e-5)


def test_the_folder_is_timms_and_ours(shell, command, folder, trained, tmp_path):
    command(linear_eval, trained / "ckpt.safetensors", "--batch_size", 16)
    _, judged, _ = command(knn_eval, trained, "--k", 20)
    command(knn_eval, trained, "--k", 20, "--labels", 0.5)  # whose floors are others
    code, lines, err = shell(export, trained, "--to", "deep/er/out", "--license", "cc-by-nc-4.0")
    out = tmp_path / "deep" / "er" / "out"
    assert code == 0 and "licence of the weights: cc-by-nc-4.0 (--license)" in lines[0], err
    encoder = timm.create_model(f"local-dir:{out}", pretrained=True)
    view = timm.data.resolve_model_data_config(encoder)
    described = rows_of(trained)[0]["view"]
    assert {name: view[name] for name in ("mean", "std")} == {name: described[name] for name in ("mean", "std")}
    assert view["input_size"] == [3, described["size"], described["size"]] and view["crop_pct"] == described["crop"]

    card = (out / "README.md").read_text()
    _, header, text = card.split("---\n", 2)
    facts = yaml.safe_load(header)
    assert facts["library_name"] == "timm" and facts["pipeline_tag"] == "image-feature-extraction"
    assert facts["license"] == "cc-by-nc-4.0" and "byol" in facts["tags"]
    linear = next(row for row in reversed(rows_of(trained)) if row["stage"] == "linear_eval")
    by = {row["of"]: row for row in judged}
    for protocol, row in (
        ("weighted vote of the 20 nearest neighbours", by["trained"]),
        ("the same vote on a random network", by["untrained"]),
        ("the same vote on the pixels", by["pixels"]),
        ("80 epochs of SGD, batch 16, rate 0.2 per 256 images", linear),
    ):
        (line,) = [line for line in text.splitlines() if protocol in line]
        assert line.endswith(f"| {row['top1']:.1f} | {row['top5']:.1f} |")
    assert "loss = byol + 10 energy" in text and "layers: projector.hidden (32 x" in text
    assert "for 2 of 2 epochs" in text
    assert "| lr | 8.0 per 256 images |" in text and "48 training images, 3 classes" in text

    for file in out.iterdir():  # no path of this machine
        content = file.read_bytes()
        assert str(folder.parent).encode() not in content and str(trained.parent).encode() not in content
    assert checkpoint.load_file(out / "model.safetensors")[1]["settings"]["dataset"] == folder.name
    code, again, err = command(knn_eval, out, "--dataset", folder, "--k", 20, "--nofloors")
    assert code == 0 and again[0]["top1"] == by["trained"]["top1"] and again[0]["own_data"], err


def test_a_run_of_an_earlier_version_is_exported(shell, trained, tmp_path):
    shutil.copytree(trained, tmp_path / "run")
    (tmp_path / "run" / "encoder" / "model.safetensors").rename(tmp_path / "run" / "encoder.safetensors")
    shutil.rmtree(tmp_path / "run" / "encoder")
    assert shell(export, "run", "--to", "out")[0] == 0
    config = (trained / "encoder" / "config.json").read_text()
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == json.loads(config)


def test_an_unfinished_run_is_exported_with_a_warning(shell, run_of, tmp_path):
    code, _, err = shell(export, run_of(epochs=400), "--to", "out")
    assert code == 0 and err.endswith(
        "made: its training is not finished, 2 of 400 epochs are done; the card says so\n"
    )
    assert err.count("\n") == 1 and "for 2 of 400 epochs" in (tmp_path / "out" / "README.md").read_text()


def test_the_licence_is_said_to_be_a_default(shell, trained):
    _, lines, err = shell(export, trained, "--to", "out")
    assert err == "" and lines[0].endswith(
        "weights: mit (the default; --license names another, and the choice is yours)"
    )


def test_settings_of_the_views_are_shown_where_they_are_no_default(shell, run_of, tmp_path):
    names = ("jitter", "grey", "blur_p")
    run = run_of(jitter=0.5, blur_p=[0.1, 0.1])
    assert shell(export, run, "--to", "out")[0] == 0
    card = (tmp_path / "out" / "README.md").read_text()
    shown = [line for line in card.splitlines() if line.startswith(tuple(f"| {name} |" for name in names))]
    assert shown == ["| jitter | 0.5 |", "| blur_p | [0.1, 0.1] in the first and the second view |"]


def test_the_card_counts_the_images_that_were_trained_on():
    """Of STL-10 100,000 without labels, and not the 5,000 that judges learn from."""
    facts = {"train": 5000, "test": 8000, "classes": ["cat", "dog"]}
    description = {"settings": {"dataset": "stl10"}, "data": facts}
    assert "(5000 training images, 2 classes" in data_line(description)  # of an earlier version
    assert "(100000 training images, 2 classes" in data_line(description | {"images": 100_000})


def test_a_command_keeps_its_flags_without_their_paths():
    words = "pretrain.py --init=/home/me/x.pth --data-dir=/home/me/sets --out /home/me/run"
    description = {"settings": {"dataset": "photos", "data_dir": "data"}, "command": words}
    shown = without_paths(description)["command"]
    assert shown == "pretrain.py --init=x.pth --data-dir=sets --out run"


def test_one_citation_everywhere():
    assert f"~~~bibtex\n{CITATION}\n~~~" in (ROOT / "README.md").read_text()
    cited = yaml.safe_load((ROOT / "CITATION.cff").read_text())["preferred-citation"]
    authors = " and ".join(f"{author['family-names']}, {author['given-names']}" for author in cited["authors"])
    assert [f"{{{value}}}" in CITATION for value in (cited["title"], authors, cited["year"])] == [True] * 3


@pytest.mark.parametrize(
    "words, line",
    [
        ("run", "--to is missing: name a new folder"),
        ("run --to occupied", "--to occupied: is not empty; name a new folder"),
        ("run --to file", "--to file: is a file; name a new folder"),
        ("run --to file/out", "out: cannot be written (Not a directory)"),
        ("run --to out --license MIT\\n", "--license MIT\\n: expected a short name such as mit"),
        ("nowhere --to out", "nowhere: not a run's folder, it holds no metrics.jsonl; name the run's folder\n"),
        ("file --to out", "file: not a run's folder, it holds no metrics.jsonl; name the run's folder\n"),
        (
            "run/encoder --to out",
            "run/encoder: not a run's folder, it holds no metrics.jsonl; name the run's folder: here run",
        ),
        ("run/ckpt.safetensors --to out", "name the run's folder: here run\n"),
        ("run/encoder/model.safetensors --to out", "name the run's folder: here run\n"),
        ("young --to out", "young: holds no encoder/model.safetensors; a run writes it at the end of its first epoch"),
        ("cut --to out", "cut/encoder/model.safetensors: not a whole safetensors file"),
        (
            "other --to out",
            "other/encoder/config.json: is of resnet50, the weights beside it are of test_resnet; remove",
        ),
        ("text --to out", "text/encoder/config.json: not the file that pretrain.py wrote"),
    ],
)
def test_one_line_and_nothing_written(shell, trained, tmp_path, words, line):
    for name in ("run", "young", "cut", "other", "text"):
        shutil.copytree(trained, tmp_path / name)
    shutil.rmtree(tmp_path / "young" / "encoder")
    weights = tmp_path / "cut" / "encoder" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-9])
    config = tmp_path / "other" / "encoder" / "config.json"
    config.write_text(config.read_text().replace('"test_resnet"', '"resnet50"'))
    (tmp_path / "text" / "encoder" / "config.json").write_text("{")
    shutil.copytree(trained, tmp_path / "occupied")
    (tmp_path / "file").touch()
    before = files_of(tmp_path)
    code, lines, err = shell(export, *words.split(" "))
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1, err
    assert files_of(tmp_path) == before and not (tmp_path / "out").exists()


def test_a_full_disk_leaves_nothing(shell, trained, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    (tmp_path / "out").mkdir()
    monkeypatch.setattr("os.fsync", full)
    code, _, err = shell(export, trained, "--to", "out")
    assert code == 2 and "cannot be written (No space left on device)" in err
    assert [p.name for p in tmp_path.iterdir()] == ["out"] and not list((tmp_path / "out").iterdir())
