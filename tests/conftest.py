"""Small real data: patches of the embedded photographs, written as a folder of PNG files."""

import json
import os
import sys
from pathlib import Path

import pytest
from torchvision.transforms.v2.functional import to_pil_image

import data
from lib import cli
from pretrain import pretrain

os.environ["ACCELERATE_USE_CPU"] = "true"  # a GPU may round otherwise each time; read when an Accelerator is made
ROOT = Path(__file__).parent.parent
SMALL = "--recipe cifar10-300 --model test_resnet --stem imagenet --hidden_dim 32 --out_dim 16".split()
SMALL += "--batch_size 16 --epochs 2 --eval_every 1 --lr 8".split()


@pytest.fixture(scope="session")
def photos():
    return data.load("photos")


@pytest.fixture(scope="session")
def folder(photos, tmp_path_factory):
    """Three classes, 16 + 6 pictures of 32x32 each."""
    root = tmp_path_factory.mktemp("pictures")
    for part, split, n in (("train", photos.train, 16), ("test", photos.test, 6)):
        for label in range(3):
            place = root / part / photos.classes[label]
            place.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:n]):
                to_pil_image(image).save(place / f"{i:02}.png")
    return root


@pytest.fixture
def shell(monkeypatch, capsys, tmp_path):
    """Run a stage as its command line does, in an empty folder: exit code, lines of standard output, standard error."""
    monkeypatch.chdir(tmp_path)

    def run(stage, *words):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, words)])
        code = 0
        try:
            cli.run(stage)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


@pytest.fixture
def command(shell):
    """The same, with the JSON rows of standard output."""

    def run(stage, *words):
        code, lines, err = shell(stage, *words)
        return code, [json.loads(line) for line in lines if line.startswith("{")], err

    return run


def rows_of(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def trained(folder, tmp_path_factory):
    """A finished run on the small folder."""
    out = tmp_path_factory.mktemp("runs") / "run"
    argv = ["pretrain.py", "--dataset", str(folder), "--reg", "mhe", "--out", str(out), *SMALL]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        pretrain(
            dataset=str(folder), recipe="cifar10-300", model="test_resnet", reg="mhe", out=str(out), stem="imagenet",
            hidden_dim=32, out_dim=16, batch_size=16, epochs=2, eval_every=1, lr=8.0,
        )  # fmt: skip
    return out
