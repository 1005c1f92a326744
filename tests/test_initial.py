"""--init: a run begins in the bits of a file, and goes on from no other."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import SMALL, rows_of
from safetensors.torch import save_file

import data
from harness import checkpoint, settings
from harness.checkpoint import load_encoder
from knn_eval import knn_eval
from lib import cli
from pretrain import pretrain
from tools.logs import EARLIER


class Enough(BaseException):
    """Ends a run before its first step."""


@pytest.fixture
def first_state(command, folder, monkeypatch):
    """Return the tensors that a run has before its first step."""

    def run(*flags):
        def stop(training, *_):
            states.append({name: x.clone() for name, x in training.network.state_dict().items()})
            raise Enough

        states = []
        with monkeypatch.context() as patch, pytest.raises(Enough):
            patch.setattr("pretrain.train_step", stop)
            command(pretrain, "--dataset", folder, *SMALL, *flags)
        return states[0]

    return run


@pytest.fixture
def released(trained, tmp_path):
    """Write the trained encoder in other layouts, and return its tensors."""
    encoder, _ = checkpoint.load(trained / "encoder" / "model.safetensors")
    student = {f"student.backbone.{name}": x * 0 for name, x in encoder.items()}
    teacher = {f"teacher.backbone.{name}": x for name, x in encoder.items()}
    torch.save(student | teacher, tmp_path / "dino.pth.tar")
    (tmp_path / "hub").mkdir()
    save_file(encoder, tmp_path / "hub" / "model.safetensors")
    shutil.copy(trained / "encoder" / "model.safetensors", tmp_path / "encoder.safetensors")
    return encoder


def is_equal(state, prefix, encoder):
    """Whether a part of a state is this encoder, with its BatchNorm statistics."""
    part = {name.removeprefix(prefix): x for name, x in state.items() if name.startswith(prefix)}
    return part.keys() == encoder.keys() and all(torch.equal(x, encoder[name]) for name, x in part.items())


@pytest.mark.parametrize("method, parts", [("byol", ["encoder.", "target.encoder."]), ("simclr", ["encoder."])])
def test_a_run_begins_in_the_bits_of_the_file(first_state, released, trained, method, parts):
    """Encoder and target; the heads are those of the same run without --init."""
    files = [[trained], [trained / "encoder"], [trained / "ckpt.safetensors"], ["encoder.safetensors"], ["hub"]]
    files += [["hub/model.safetensors"], ["dino.pth.tar", "--prefix", "teacher"]]
    plain = first_state("--method", method, "--out", "plain")
    heads = [name for name in plain if "encoder." not in name]
    digests = set()
    for i, words in enumerate(files if method == "byol" else files[-1:]):
        state = first_state("--method", method, "--out", f"run{i}", "--init", *words)
        assert all(is_equal(state, part, released) for part in parts), words
        assert heads and all(torch.equal(state[name], plain[name]) for name in heads)
        digests.add(rows_of(Path(f"run{i}"))[0]["settings"]["init_digest"])
    assert len(digests) == 1 and released["bn1.running_mean"].any()
    assert not is_equal(plain, "encoder.", released)


def test_the_first_vote_is_that_of_the_file(command, folder, trained, tmp_path, monkeypatch):
    """The row is called init, and is a floor: a run that ends below what it began with warns."""
    _, (judged, *_), _ = command(knn_eval, trained / "encoder", "--k", 20, "--nofloors")
    monkeypatch.setattr("pretrain.Lars.step", lambda optimizer, closure=None: wreck(optimizer))
    code, rows, err = command(pretrain, "--dataset", folder, *SMALL, "--init", trained / "encoder", "--out", "run")
    first, pixels, *_ = [row for row in rows if "top1" in row]
    assert code == 0 and (first["of"], pixels["of"]) == ("init", "pixels") and first["epoch"] == 0, err
    assert (first["top1"], first["top5"]) == (judged["top1"], judged["top5"])
    assert f"encoder: begins from {trained / 'encoder'}" in err
    warning = next(row["text"] for row in rows if row.get("of") == "warning")
    assert f"init {first['top1']:g}" in warning or "collapse?" in warning
    assert not any(row.get("of") == "untrained" for row in rows)
    # a judge of the run has no need of the file: its floor is a network with random weights
    code, rows, _ = command(knn_eval, "run", "--k", 20, "--floors")
    assert code == 0 and [row["of"] for row in rows] == ["trained", "untrained", "pixels"]
    assert rows_of(tmp_path / "run")[-3:] == rows


def wreck(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.data.mul_(0.1)


def test_a_run_goes_on_without_its_file_but_not_from_another(command, folder, trained, tmp_path):
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "weights.safetensors"
    encoder, _ = checkpoint.load(trained / "encoder" / "model.safetensors")
    save_file(encoder, weights)
    flags = ["--dataset", folder, *SMALL, "--eval_every", 0]
    flags = [x for pair in zip(flags[::2], flags[1::2]) if pair != ("--eval_every", "1") for x in pair]
    code, rows, _ = command(pretrain, *flags, "--init", "a/weights.safetensors", "--out", "run")
    digest = rows[0]["settings"]["init_digest"]
    assert code == 0 and digest == checkpoint.digest(encoder, {})[:16]

    weights.rename(tmp_path / "moved.safetensors")
    code, rows, err = command(pretrain, *flags, "--init", "a/weights.safetensors", "--out", "run")
    assert code == 0 and rows == [] and "run: is finished" in err  # the file is gone
    code, rows, err = command(pretrain, *flags, "--init", "moved.safetensors", "--out", "run")
    assert code == 0 and "init: moved.safetensors (it was a/weights.safetensors); it holds the same" in err

    save_file({name: x + 1 for name, x in encoder.items()}, weights)
    others = {
        "a/weights.safetensors": f"a/weights.safetensors [{digest}]); take what it was, or name another folder",
        "a/gone.safetensors": "--init a/gone.safetensors: no such file",
        None: f"--init None (it was a/weights.safetensors [{digest}])",
    }
    for name, line in others.items():
        words = ["--init", name] if name else []
        code, rows, err = command(pretrain, *flags, *words, "--out", "run")
        assert code == 2 and rows == [] and line in err.splitlines()[-1], err
    weights.unlink()
    code, rows, err = command(pretrain, *flags, "--init", "a/weights.safetensors", "--prefix", ".", "--out", "run")
    assert code == 2 and rows == [] and "--prefix . (it was None)" in err


def test_weights_that_do_not_fit_are_refused_before_the_data_are_read(command, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    encoder, _ = load_encoder(trained / "ckpt.safetensors")
    torch.save(encoder.state_dict(), tmp_path / "theirs.pth")
    checkpoint.save(tmp_path / "features.safetensors", {"features": torch.ones(3, 4)}, {"holds": "features"})
    reasons = {
        f"{trained} --model resnet18": "its encoder needs --model test_resnet; this run has resnet18",
        f"{trained} --model test_resnet --prefix x": "--prefix x: has no effect on",
        "features.safetensors": "--init features.safetensors: holds features, not an encoder",
        "theirs.pth --model resnet18": "of its names belong to resnet18",
        "theirs.pth --model test_resnet --norm none": "--norm none: theirs.pth is of another project",
        "theirs.pth --model test_resnet --stem cifar": "take --model test_resnet --stem imagenet",
    }
    for flags, reason in reasons.items():
        code, rows, err = command(pretrain, "--init", *flags.split(), "--out", "run")
        assert code == 2 and rows == [] and reason in err and not (tmp_path / "run").exists(), (flags, err)


def test_the_name_of_a_run_has_the_name_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("runs/photos-amhe-s1.5/encoder").mkdir(parents=True)
    flags = cli.defaults(pretrain)
    run = "runs/photos-amhe-s1.5"
    names = {f"{run}/{file}": "photos-amhe-s1.5" for file in ("", "encoder", "encoder/model.safetensors")}
    names |= {f"{run}/{file}": "photos-amhe-s1.5" for file in ("ckpt.safetensors", "encoder.safetensors")}
    names |= {"path/to/moco_v2_800ep.pth.tar": "moco_v2_800ep", "hub/dinov2/model.safetensors": "dinov2"}
    for path, name in names.items():
        assert settings.run_name(flags | {"init": path}, flags) == f"photos-byol-init{name}", path


def test_runs_of_earlier_versions_had_random_weights():
    assert {name: EARLIER[name] for name in ("init", "init_digest", "prefix")} == dict.fromkeys(
        ("init", "init_digest", "prefix")
    )
