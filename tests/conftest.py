"""Small real data: patches of the embedded photographs, written as a folder of PNG files. What test files share."""

import os

# Before torch is imported, for this process and those that it starts: pytest has a worker a core, so each takes one
# thread. A GPU may round otherwise each time.
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", ACCELERATE_USE_CPU="true")

import contextlib
import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
from torchvision.transforms.v2.functional import to_pil_image

import data
import models
from harness import checkpoint
from lib import cli
from pretrain import Lars, pretrain

ROOT = Path(__file__).parent.parent
TINY = {"recipe": "cifar10-300", "model": "test_resnet", "stem": "imagenet", "hidden_dim": 32, "out_dim": 16}
TINY |= {"batch_size": 16}
VIT = {name: x for name, x in TINY.items() if name != "stem"} | {"model": "test_vit", "optimizer": "adamw"}
SETTINGS = {"method": "byol", "model": "test_resnet", "stem": "imagenet", "norm": "bn", "hidden_dim": 16, "out_dim": 8}
SETTINGS |= {"dataset": "photos", "data_dir": "data", "seed": 0, "predictor": "mlp", "queue": 0, "skip_broken": False}
VIEW = {"size": 32, "crop": 0.875, "mean": [0.5] * 3, "std": [0.2] * 3}  # both of the description of a file


class Killed(BaseException):
    """Ends a stage where it stands, as SIGKILL does."""


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


def words_of(flags):
    """The words of a command line that has these flags."""
    return [word for name, value in flags.items() for word in (f"--{name}", str(value))]


def tiny(**changes):
    """The words of a short training of a tiny network."""
    return words_of(TINY | changes)


SMALL = tiny(epochs=2, eval_every=1, lr=8)


def random(*shape, dtype=torch.float32, seed=0):
    """Normal numbers, the same in each type."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


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

    def run(stage, *words, groups=None):
        monkeypatch.setattr(sys, "argv", [f"{stage.__name__}.py", *map(str, words)])
        code = 0
        try:
            cli.run(stage, groups)
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


@pytest.fixture
def embedded(monkeypatch):
    """The calls of `models.embed` from now on: encoder, views and features of each."""
    calls, embed = [], models.embed

    def noting(encoder, views):
        views = list(views)
        calls.append((encoder, torch.cat(views), embed(encoder, views)))
        return calls[-1][2]

    monkeypatch.setattr(models, "embed", noting)
    return calls


def rows_of(run):
    """The rows of a run's log."""
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def files_of(run):
    """The bytes of each file of a run folder."""
    return {str(p.relative_to(run)): p.read_bytes() for p in run.rglob("*") if p.is_file()}


def timeless_rows(run):
    """The log without what depends on the clock, on how the command was typed, and on a commit made meanwhile."""
    return [{k: x for k, x in row.items() if k not in ("images_per_s", "command", "git")} for row in rows_of(run)]


def assert_same_run(run, whole):
    """Two runs have the same rows, files and bits."""
    assert timeless_rows(run) == timeless_rows(whole)
    for file in ("ckpt.safetensors", "encoder/model.safetensors"):
        (ours, told), (theirs, meant) = checkpoint.load_file(run / file), checkpoint.load_file(whole / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert {**told, "command": None, "git": None} == {**meant, "command": None, "git": None}
    assert files_of(run).keys() == files_of(whole).keys()
    assert (run / "encoder" / "config.json").read_bytes() == (whole / "encoder" / "config.json").read_bytes()


@pytest.fixture(scope="module")
def trained(finished, tmp_path_factory):
    """A finished run on the small folder, a copy for each test file: judges add rows to its log."""
    return shutil.copytree(finished, tmp_path_factory.mktemp("runs") / "run")


@pytest.fixture(scope="session")
def finished(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    call(pretrain, "--dataset", folder, "--reg", "mhe", "--out", out, *SMALL)
    return out


@contextlib.contextmanager
def acting_after(at, act, optimizer=Lars):
    """Call a function after a step of the run in the block; yields the list that steps are counted in."""
    step, steps = optimizer.step, []

    def stepping(stepped, closure=None):
        step(stepped, closure)
        steps.append(1)
        if len(steps) == at:
            act()

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer, "step", stepping)
        yield steps


@contextlib.contextmanager
def killed_after(at, last_act=lambda: None):
    """Kill the run in the block after so many steps."""

    def die():
        last_act()
        raise Killed

    with pytest.raises(Killed), acting_after(at, die):
        yield


def call(stage, *words):
    """Call a stage with the flags of a command line, where `command` cannot: in longer-lived fixtures and processes."""
    words = [str(word) for word in words]
    flags = cli.values_of(words, stage)
    checkpoint = [flags.pop("ckpt")] if "ckpt" in flags else []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", [f"{stage.__name__}.py", *words])
        stage(*checkpoint, **flags)
