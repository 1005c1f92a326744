"""An exported folder: what timm and the lines of its card load, what the card says, and what is refused."""

import contextlib
import os
import re
import shutil

import pytest
import timm
import torch
import yaml
from conftest import ROOT, rows_of
from PIL import Image

import models
from harness import checkpoint
from knn_eval import knn_eval
from linear_eval import linear_eval
from tools.export import export, scores, without_paths
from tools.logs import read_log


def run_lines(folder):
    """Run the lines of a card in its folder or at the top of the clone, as it says; return the names they define."""
    (block,) = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.S)
    names = {}
    with contextlib.chdir(folder if "import timm" in block else ROOT):
        exec(block.replace(f"path/to/{folder.name}", str(folder)), names)
    return names


@pytest.mark.parametrize("changes", [{}, {"model": "resnet18"}, {"stem": "cifar"}])
def test_the_lines_of_the_card_load_the_encoder(shell, trained, tmp_path, changes):
    """Of other architectures, with statistics of a training."""
    run = shutil.copytree(trained, tmp_path / "run")
    _, description = checkpoint.load_file(run / "encoder" / "model.safetensors")
    settings = description["settings"]
    settings |= changes
    encoder = models.build_encoder(settings["model"], settings["stem"], settings["norm"])
    encoder(torch.randn(8, 3, 32, 32))
    config = checkpoint.timm_config(settings, description["view"])
    checkpoint.save_encoder(run, encoder.state_dict(), description, config)
    code, lines, err = shell(export, run, "--to", "out")
    assert code == 0 and lines[1] == "hf upload NAME out  # NAME: user/repository", err
    card = (tmp_path / "out" / "README.md").read_text()
    is_timms = "stem" not in changes
    assert ("library_name: timm" in card) == (tmp_path / "out" / "config.json").exists() == is_timms
    Image.effect_noise((50, 40), 60).convert("RGB").save(tmp_path / "out" / "picture.jpg")
    names = run_lines(tmp_path / "out")
    image = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(names["encoder"](image), encoder.eval()(image), rtol=0, atol=1e-5)
    if is_timms:
        assert names["view"](names["image"]).shape[1:] == (description["view"]["size"],) * 2


def test_the_folder_is_timms_and_ours(shell, command, folder, trained, tmp_path):
    for more in ([], ["--cached"]):
        command(linear_eval, trained / "ckpt.safetensors", "--batch_size", 16, *more)
    _, judged, _ = command(knn_eval, trained, "--k", 20)
    command(knn_eval, trained, "--k", 20, "--labels", 0.5)  # whose floors are others
    code, lines, err = shell(export, trained, "--to", "deep/er/out", "--license", "no")
    out = tmp_path / "deep" / "er" / "out"
    assert code == 0 and "README.md, config.json, model.safetensors; licence of the weights: no" in lines[0]
    encoder = timm.create_model(f"local-dir:{out}", pretrained=True)
    view, described = timm.data.resolve_model_data_config(encoder), rows_of(trained)[0]["view"]
    assert [list(view["mean"]), list(view["std"]), view["crop_pct"]] == [described[x] for x in ("mean", "std", "crop")]
    _, header, text = (out / "README.md").read_text().split("---\n", 2)
    facts = yaml.safe_load(header)
    assert "\n# out\n" in text and facts["license"] == "no"
    assert facts["pipeline_tag"] == "image-feature-extraction" and "byol" in facts["tags"]
    linear, cached = [row for row in rows_of(trained) if row["stage"] == "linear_eval" and "top5" in row][-2:]
    by = {row["of"]: row for row in judged}
    for protocol, row in (
        ("weighted vote of the 20 nearest neighbours", by["trained"]),
        ("the same vote on a random network", by["untrained"]),
        ("the same vote on the pixels", by["pixels"]),
        ("crops and flips, 80 epochs of SGD, batch 16, rate 0.2 per 256 images", linear),
        ("no crops or flips, 80 epochs of SGD, batch 16, rate 0.2 per 256 images", cached),
    ):
        (line,) = [line for line in text.splitlines() if protocol in line]
        assert line.endswith(f"| {row['top1']:.1f} | {row['top5']:.1f} |")
    assert "loss = byol + 10 energy" in text and "layers: projector.hidden (32 x" in text
    assert "On 48 images" in text and "for 2 of 2 epochs" in text and "in fp32, with" in text

    for file in out.iterdir():  # no path of this machine
        content = file.read_bytes()
        assert str(folder.parent).encode() not in content and str(trained.parent).encode() not in content
    code, again, err = command(knn_eval, out, "--dataset", folder, "--k", 20, "--nofloors")
    assert code == 0 and again[0]["top1"] == by["trained"]["top1"] and again[0]["own_data"], err


@pytest.mark.parametrize("name", ["byol", "amhe", "uniform"])
def test_an_encoder_to_take_away(command, name):
    """Its card's lines load it, and its card has the log's scores; with CIFAR10_JPEG, a folder, it gives them again."""
    folder = ROOT / "results" / "encoders" / name
    log = read_log(ROOT / "results" / "cifar10-60-epochs" / name)
    assert "\n".join(scores(log)) in (folder / "README.md").read_text()
    names = run_lines(folder)
    with torch.no_grad():
        features = names["encoder"](torch.randn(8, 3, 32, 32))
    assert features.shape == (8, names["encoder"].num_features) and features.std(0).mean() > 0
    if "CIFAR10_JPEG" in os.environ:
        _, (row,), _ = command(knn_eval, folder, "--dataset", os.environ["CIFAR10_JPEG"], "--k", 20, "--nofloors")
        assert f"| {row['top1']:.1f} | {row['top5']:.1f} |" in (folder / "README.md").read_text()


def test_a_command_keeps_its_flags_without_their_paths():
    words = "pretrain.py --init=/home/me/x.pth --data-dir=/home/me/sets --out /home/me/run"
    settings = {"dataset": "/home/me/pictures", "data_dir": "data", "init": None}
    shown = without_paths({"settings": settings, "command": words})
    assert shown["command"] == "pretrain.py --init=x.pth --data-dir=sets --out run"
    assert shown["settings"]["dataset"] == "pictures"


@pytest.mark.parametrize(
    "words, line",
    [
        ("run", "--to is missing: name a new folder"),
        ("run --to run", "--to run: is already there; name a new folder"),
        ("run --to run/metrics.jsonl/out", "out: cannot be written ([Errno 20] Not a directory"),
        ("young --to out", "young: holds no encoder/model.safetensors; a run writes it at the end of its first epoch"),
    ],
)
def test_one_line_and_nothing_written(shell, trained, tmp_path, words, line):
    for name in ("run", "young"):
        shutil.copytree(trained, tmp_path / name)
    shutil.rmtree(tmp_path / "young" / "encoder")
    code, lines, err = shell(export, *words.split(" "))
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1, err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "young"]
