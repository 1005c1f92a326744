"""--init: a run begins in the bits of a file, and goes on from no other."""

import shutil

import pytest
import torch
from conftest import SMALL, Killed, rows_of
from safetensors.torch import save_file

import data
from harness import checkpoint, settings
from knn_eval import knn_eval
from pretrain import pretrain


@pytest.fixture
def first_state(command, folder, monkeypatch):
    """Return the tensors that a run has before its first step."""

    def run(*flags):
        def stop(training, *_):
            states.append({name: x.clone() for name, x in training.network.state_dict().items()})
            raise Killed

        states = []
        with monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr("pretrain.train_micro_batch", stop)
            command(pretrain, "--dataset", folder, *SMALL, *flags)
        return states[0]

    return run


@pytest.fixture
def released(trained, tmp_path):
    """Write the trained encoder in other layouts, and return its tensors."""
    encoder, _ = checkpoint.load_file(trained / "encoder" / "model.safetensors")
    student = {f"student.backbone.{name}": x * 0 for name, x in encoder.items()}
    teacher = {f"teacher.backbone.{name}": x for name, x in encoder.items()}
    torch.save(student | teacher, tmp_path / "dino.pth.tar")
    save_file(encoder, tmp_path / "theirs.safetensors")
    return encoder


@pytest.mark.parametrize("method, parts", [("byol", ["encoder.", "target.encoder."]), ("simclr", ["encoder."])])
def test_a_run_begins_in_the_bits_of_the_file(first_state, released, trained, tmp_path, method, parts):
    """Encoder and target, with BatchNorm's statistics; the heads are those of the same run without --init."""
    plain = first_state("--method", method, "--out", "plain")
    expected = plain | {part + name: x for part in parts for name, x in released.items()}
    assert released["bn1.running_mean"].any() and expected.keys() == plain.keys()
    files = [[trained], [trained / "encoder"], ["theirs.safetensors"], ["dino.pth.tar", "--prefix", "teacher"]]
    digests = set()
    for i, words in enumerate(files):
        state = first_state("--method", method, "--out", f"run{i}", "--init", *words)
        assert all(torch.equal(x, expected[name]) for name, x in state.items()), words
        digests.add(rows_of(tmp_path / f"run{i}")[0]["settings"]["init_digest"])
    assert digests == {checkpoint.digest(released, {})[:16]}


def test_the_first_vote_is_that_of_the_file(command, folder, trained):
    _, (judged, *_), _ = command(knn_eval, trained / "encoder", "--k", 20, "--nofloors")
    code, rows, err = command(pretrain, "--dataset", folder, *SMALL, "--init", trained / "encoder", "--out", "run")
    first, pixels, *_ = [row for row in rows if "top1" in row]
    assert code == 0 and (first["of"], pixels["of"]) == ("init", "pixels") and first["epoch"] == 0, err
    assert (first["top1"], first["top5"]) == (judged["top1"], judged["top5"])
    assert f"init {trained / 'encoder'}" in err
    # a judge of the run has no need of the file: its floor is a network with random weights
    code, rows, _ = command(knn_eval, "run", "--k", 20, "--floors")
    assert code == 0 and [row["of"] for row in rows] == ["trained", "untrained", "pixels"]


def test_a_run_goes_on_without_its_file_but_not_from_another(command, folder, released, tmp_path):
    (tmp_path / "a").mkdir()
    weights = tmp_path / "a" / "weights.safetensors"
    shutil.copy(tmp_path / "theirs.safetensors", weights)
    flags = ["--dataset", folder, *SMALL[:-4], "--eval_every", 0, "--out", "run", "--init"]
    code, rows, _ = command(pretrain, *flags, weights)
    digest = rows[0]["settings"]["init_digest"]
    assert code == 0
    code, _, err = command(pretrain, *flags, "theirs.safetensors")
    assert code == 0 and f"init: theirs.safetensors (it was {weights}); it holds the same" in err
    save_file({name: x + 1 for name, x in released.items()}, weights)
    code, rows, err = command(pretrain, *flags, weights)
    assert code == 2 and rows == [] and f"{weights} [{digest}]); take what it was, or name another folder" in err
    weights.unlink()
    code, rows, err = command(pretrain, *flags, weights)
    assert code == 0 and rows == [] and "is gone, so it is unchecked" in err and "run: is finished" in err
    code, rows, err = command(pretrain, *flags, "gone.safetensors")
    assert code == 2 and rows == [] and "--init gone.safetensors [None] (it was " in err
    code, rows, err = command(pretrain, *flags[:-1])
    assert code == 2 and rows == [] and f"--init None [None] (it was {weights} [{digest}])" in err


def test_weights_that_do_not_fit_are_refused_before_data_are_read(command, released, trained, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "load", None)
    checkpoint.save(tmp_path / "features.safetensors", {"features": torch.ones(3, 4)}, {"holds": "features"})
    checkpoint.save(tmp_path / "later.safetensors", {}, {"holds": "encoder", "format": 2})
    reasons = {
        "nowhere": "--init nowhere: no such file",
        "later.safetensors": "later.safetensors: of format 2, not 1",
        f"{trained} --model resnet18 --stem cifar": "its encoder needs --model test_resnet --stem imagenet",
        f"{trained} --model test_resnet --prefix x": "--prefix x: has no effect on",
        "features.safetensors": "--init features.safetensors: holds features, not an encoder",
        "theirs.safetensors --model test_resnet --norm none": "--norm none: theirs.safetensors is of another project",
        "theirs.safetensors --model test_resnet --stem cifar": "does not hold test_resnet with the cifar stem, conv1",
    }
    for flags, reason in reasons.items():
        code, rows, err = command(pretrain, "--init", *flags.split(), "--out", "run")
        assert code == 2 and rows == [] and reason in err and not (tmp_path / "run").exists(), (flags, err)


def test_the_name_of_a_run_has_the_name_of_its_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "photos-s1.5" / "encoder").mkdir(parents=True)
    flags = pretrain.__kwdefaults__
    files = ("", "encoder/model.safetensors", "ckpt.safetensors")
    names = {f"runs/photos-s1.5/{file}": "photos-s1.5" for file in files}
    names |= {"path/to/moco_v2_800ep.pth.tar": "moco_v2_800ep", "hub/dinov2/model.safetensors": "dinov2"}
    for path, name in names.items():
        assert settings.run_name(flags | {"init": path}, flags) == f"photos-byol-init{name}", path
