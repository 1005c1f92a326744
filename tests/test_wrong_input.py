"""Every wrong turn ends in one line that names the culprit, with nothing written: all stages, one table."""

import os
import pickle

import pytest
import torch
from conftest import SETTINGS, VIEW, Evil
from PIL import Image
from safetensors.torch import save_file

import data
import models
from harness import checkpoint
from knn_eval import knn_eval
from linear_eval import linear_eval
from pretrain import pretrain

PRETRAIN = {
    "--device cpu": "--device: no such flag; did you mean --gpu_ids 0 of accelerate launch, before",
    "--lr 1e9": "--lr 1e9: expected a number > 0 and < 1e6",
    "--reg amhe --reg_on target": "--reg_on target: expected values separated by commas, each once: encoder, projector",
    "--method simclr --reg_on predictor --reg mhe": "--reg_on predictor: simclr has none",
    "--method simsiam --tau 0.9": "--tau 0.9: has no effect with --method simsiam",
    "--reg koleo --reg_on encoder": "--reg_on encoder: has no effect with --reg koleo",
    "--method moco --queue 2000": "--queue 2000: photos has 2000 images to train on; take fewer",
    "--dataset cifar10 --recipe imagenet-300": "is not for cifar10, which has cifar10-300, cifar10-1000",
    "--init bare": "bare: a folder without ckpt.safetensors or model.safetensors; name a file",
    "--init evil.pth": "evil.pth: not a file of tensors alone (nothing in it was run)",
    "--dataset bare": "dataset bare: no picture that can be read",
    "--dataset imagenet --data_dir nowhere": "--data_dir nowhere: nowhere/train is no folder of two or more classes",
    "--model resnet19": "model resnet19: not a name timm knows (did you mean resnet18?)",
    "--model convnext_atto": "model convnext_atto: not of timm.models.resnet or vision_transformer",
    "--model test_vit --stem cifar": "--stem cifar: has no effect with --model test_vit",
    "--model vit_small_patch14_dinov2": "--model: its patches of 14 pixels do not divide views of 32; take another",
    "--optimizer adamw": "--optimizer adamw: takes --lr, too, such as 0.004",
    "--model resnext50_32x4d --reg amhe --reg_on encoder": "encoder.layer1.0.conv2 is a grouped convolution",
    "--out occupied/run": "--out occupied/run: cannot be written (occupied is no folder)",
    "--out foreign": "foreign/metrics.jsonl: line 1 was not written by a command of this project",
    "--out pickled": "pickled/ckpt.safetensors: cannot be read as a safetensors file",
}
KNN = {
    "good.safetensors --k 5,5": "--k 5,5: expected values separated by commas, each once: a whole number >= 1",
    "nowhere.safetensors": "nowhere.safetensors: no such file",
    "bare": "bare: a folder without ckpt.safetensors; name a run's folder, its ckpt.safetensors, or its encoder",
    "huge.safetensors": "huge.safetensors: its tensors are not those of its description",
    "plain.safetensors": "plain.safetensors: not written by pretrain.py; a judge takes it with --model and --dataset",
    "list.pth --model resnet18 --dataset photos": "list.pth: holds no tensors with names",
    "good.safetensors --model resnet18 --dataset photos": "--model resnet18 has no effect, the file says what it is",
    "weights.pth --model resnet18 --dataset photos --mean 0.5": "--mean 0.5 --std None: give both, or neither",
    "weights.pth --model resnet18 --dataset photos --mean 123 --std 1": "--mean 123: expected three numbers",
    "weights.pth --model resnet50_gn --dataset photos": "model resnet50_gn: is normalised by GroupNorm",
    "good.safetensors --stem cifar": "--stem cifar: has no effect without --model",
    "good.safetensors --labels 0.001 --dataset photos": "--labels 0.001: class astronaut would keep none of its 200 "
    "training images; 0.005 keeps one of each class",
}
LINEAR = {
    "good.safetensors --epochs 0": "--epochs 0: expected a whole number >= 1",
    "good.safetensors --batch_size 2001 --dataset photos": "--batch_size 2001: photos has 2000 images to train on",
    "good.safetensors --sweep --lr 1": "--lr 1.0: has no effect with --sweep",
}
STAGES = {pretrain: PRETRAIN, knn_eval: KNN, linear_eval: LINEAR}
TABLE = [(stage, words, line) for stage, lines in STAGES.items() for words, line in lines.items()]


@pytest.fixture(scope="module")
def traps(tmp_path_factory):
    """Files and folders that the table names."""
    root = tmp_path_factory.mktemp("traps")
    encoder = models.build_encoder("resnet18", "imagenet")
    settings = SETTINGS | {"model": "resnet18", "hidden_dim": 65536, "out_dim": 65536}
    description = {"settings": settings, "view": VIEW, "holds": "encoder"}
    checkpoint.save(root / "good.safetensors", encoder.state_dict(), description)
    heads = {f"encoder.{name}": x for name, x in encoder.state_dict().items()}
    checkpoint.save(root / "huge.safetensors", heads, {**description, "holds": "checkpoint"})
    (root / "occupied").write_text("a file")
    save_file({"x": torch.ones(2)}, root / "plain.safetensors")
    torch.save({"state_dict": {f"module.{name}": x for name, x in encoder.state_dict().items()}}, root / "weights.pth")
    torch.save([torch.ones(2)], root / "list.pth")
    (root / "evil.pth").write_bytes(pickle.dumps(Evil()))
    for folder in ("bare", "foreign", "pickled"):
        (root / folder).mkdir()
    (root / "foreign" / "metrics.jsonl").write_text("epoch,loss\n1,2\n")
    (root / "pickled" / "ckpt.safetensors").write_bytes(pickle.dumps(Evil()))
    return root


def everything(root):
    """Each path below a folder with its size and the time of its last change, but for locks."""
    return {p: (p.stat().st_size, p.stat().st_mtime_ns) for p in root.rglob("*") if p.is_file() and p.name != ".lock"}


@pytest.mark.parametrize("stage, words, line", TABLE)
def test_one_line_no_trace(shell, traps, monkeypatch, stage, words, line):
    monkeypatch.chdir(traps)
    before = everything(traps)
    code, lines, err = shell(stage, *words.split())
    last = err.splitlines()[-1]
    assert code == 2 and lines == [] and last.startswith(f"{stage.__name__}.py: ") and line in last, err
    assert "Traceback" not in err
    assert everything(traps) == before


@pytest.mark.parametrize(
    "words, line",
    [
        ("--batch_size 15 --accumulate 2", "--batch_size 15: must be a multiple of 2"),
        ("--warmup 4 --epochs 3", "--warmup 4.0: must be shorter than the training"),
        ("--out locked/run", "--out locked/run: cannot be written (locked is read-only)"),
    ],
)
def test_what_needs_no_image_is_found_before_one_is_read(shell, monkeypatch, tmp_path, words, line):
    (tmp_path / "locked").mkdir()
    monkeypatch.setattr(os, "access", lambda place, _: place.name != "locked")  # root writes everywhere
    monkeypatch.setattr(data, "load", None)
    code, lines, err = shell(pretrain, *words.split())
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1, err


def test_blur_of_views_that_are_too_small_for_it_is_refused(shell, tmp_path):
    for place in ("train/a", "train/b", "test/a", "test/b"):
        (tmp_path / "tiny" / place).mkdir(parents=True)
        Image.effect_noise((16, 16), 60).convert("RGB").save(tmp_path / "tiny" / place / "1.png")
    code, lines, err = shell(pretrain, *"--dataset tiny --blur_p 1 --out run --model test_resnet --epochs 1".split())
    told = "pretrain.py: --blur_p 1.0: has no effect on views of 16 pixels; they must have 20"
    assert code == 2 and lines == [] and err.splitlines()[-1] == told, err
    assert not (tmp_path / "run").exists()
