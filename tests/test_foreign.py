"""Weights of other projects are found wherever they lie in a file, and judged like ours."""

import argparse
import pickle
import zipfile
from collections import defaultdict

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch import nn

import models
from harness import checkpoint, foreign
from knn_eval import knn_eval
from lib.errors import InputError
from linear_eval import linear_eval

TORCHVISION = {
    "conv1": 0,
    "bn1": 1,
    "layer1": 4,
    "layer2": 5,
    "layer3": 6,
    "layer4": 7,
}  # places of a ResNet's children
NO_POOLING = {"conv1": 0, "bn1": 1, "layer1": 3, "layer2": 4, "layer3": 5, "layer4": 6}


def under(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def by_number(number_of, tensors):
    """The names of a torch.nn.Sequential of the children."""
    return {f"{number_of[name.split('.')[0]]}.{name.partition('.')[2]}": x for name, x in tensors.items()}


def zeros(tensors):
    return {name: torch.zeros_like(x) for name, x in tensors.items()}


class AttributeDict(dict):
    """As the flags of a training are saved by some."""


HEAD = {"fc.weight": torch.ones(3), "fc.bias": torch.ones(10)}
NAMINGS = {  # content of a file, the --prefix that picks an encoder if there are several, the prefix that is told
    "timm": lambda x: (x, None, ""),
    "torchvision": lambda x: ({n: w for n, w in x.items() if "num_batches" not in n} | HEAD, None, ""),
    "simsiam": lambda x: ({"epoch": 1, "state_dict": under("module.encoder.", x)}, None, "state_dict.module.encoder."),
    "barlow": lambda x: ({"model": under("module.backbone.", x | HEAD)}, None, "model.module.backbone."),
    "moco": lambda x: (
        {"state_dict": under("module.encoder_k.", zeros(x)) | under("module.encoder_q.", x | HEAD)},
        "encoder_q",
        "state_dict.module.encoder_q.",
    ),
    "moco v3": lambda x: (
        {"state_dict": under("module.base_encoder.", x) | under("module.momentum_encoder.", zeros(x))},
        "module.base_encoder.",
        "state_dict.module.base_encoder.",
    ),
    "dino": lambda x: (
        {
            "student": under("module.backbone.", zeros(x)),
            "teacher": under("backbone.", x),
            "args": argparse.Namespace(lr=0.1),
        },
        "teacher",
        "teacher.backbone.",
    ),
    "compiled": lambda x: (under("_orig_mod.module.", x), None, "_orig_mod.module."),
    "lightly": lambda x: ({"state_dict": under("backbone.", by_number(TORCHVISION, x))}, None, "state_dict.backbone."),
    "simclr on cifar": lambda x: (under("f.", by_number(NO_POOLING, x)) | {"g.0.weight": torch.ones(2)}, None, "f."),
    "lightning": lambda x: (
        {
            "hyper_parameters": AttributeDict(lr=0.1),
            "best": np.float64(0.5),
            "callbacks": {AttributeDict: defaultdict(list, a=[1])},
            "optimizer_states": [{"state": {0: {"momentum_buffer": torch.ones(2)}}}],
            "state_dict": under("model.net.", x),
        },
        None,
        "state_dict.model.net.",
    ),
    "the same twice": lambda x: ({"model": x, "ema": {n: w.clone() for n, w in x.items()}}, None, "model."),
    "at the top and below": lambda x: (x | under("ema.", zeros(x)), ".", ""),
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return models.build_encoder("test_resnet", "imagenet")


@pytest.mark.parametrize("old_format", [False, True])
@pytest.mark.parametrize("name", NAMINGS)
def test_an_encoder_is_found_by_any_prefix(encoder, tmp_path, capsys, name, old_format):
    wanted = encoder.state_dict()
    content, prefix, told = NAMINGS[name](wanted)
    path = tmp_path / "weights"
    torch.save(content, path, _use_new_zipfile_serialization=not old_format)
    found, found_prefix = foreign.adopt(path, "test_resnet", "imagenet", prefix)
    assert found_prefix == told and not found.training
    state = found.state_dict()
    for key, x in wanted.items():
        is_counter = key.endswith("num_batches_tracked")
        assert is_counter or torch.equal(state[key], x), key
    err = capsys.readouterr().err
    assert "tensors of test_resnet" in err and "it has no digest, so it is unchecked" in err
    assert (f" under {told}" in err) == bool(told) and ("numbers for children" in err) == (
        name in ("lightly", "simclr on cifar")
    )
    several = prefix is not None
    if several:
        with pytest.raises(InputError, match=r"holds test_resnet 2 times, under .*; choose one by --prefix, as --pref"):
            foreign.adopt(path, "test_resnet", "imagenet")
        with pytest.raises(
            InputError, match=r"--prefix nope: .*weights: holds test_resnet under .*; take one of these"
        ):
            foreign.adopt(path, "test_resnet", "imagenet", "nope")


def test_prefixes_that_are_close(encoder, tmp_path):
    """A whole prefix goes before a part of another; equal copies can be named; another precision is another copy."""
    x = encoder.state_dict()
    halves = {name: w.half() for name, w in x.items()}
    torch.save(under("net.", x) | under("ema.net.", x) | under("low.net.", halves), tmp_path / "x")
    for prefix, told in (
        ("net.", "net."),
        ("net", "net."),
        ("ema", "ema.net."),
        ("ema.net", "ema.net."),
        ("low", "low.net."),
    ):
        assert foreign.adopt(tmp_path / "x", "test_resnet", "imagenet", prefix)[1] == told
    with pytest.raises(InputError, match=r"holds test_resnet 3 times, under net., ema.net., low.net.; choose one"):
        foreign.adopt(tmp_path / "x", "test_resnet", "imagenet")
    torch.save({name: (w * 9).to(torch.int8) for name, w in x.items()}, tmp_path / "x")
    with pytest.raises(InputError, match="few of its names"):
        foreign.adopt(tmp_path / "x", "test_resnet", "imagenet")


def test_lightlys_encoder_has_torchvisions_features(tmp_path):
    """An oracle from outside: torchvision's ResNet-18 as a torch.nn.Sequential of its children, as lightly has it."""
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18().eval()
    backbone = nn.Sequential(*list(theirs.children())[:-1])
    torch.save(under("backbone.", backbone.state_dict()), tmp_path / "lightly.ckpt")
    found, _ = foreign.adopt(tmp_path / "lightly.ckpt", "resnet18", "imagenet")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(x), backbone(x).flatten(1), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "held, asked, advice",
    [
        (("resnet18", "cifar"), ("resnet18", "imagenet"), "take --model resnet18 --stem cifar"),
        (("resnet18", "imagenet"), ("resnet18", "cifar"), "take --model resnet18 --stem imagenet"),
        (("resnet34", "imagenet"), ("resnet18", "imagenet"), "take --model resnet34 --stem imagenet"),
        (
            ("test_resnet", "imagenet"),
            ("resnet18", "imagenet"),
            "few of its names belong to resnet18, under any prefix",
        ),
    ],
)
def test_another_model_is_told_with_its_flags(tmp_path, held, asked, advice):
    """Also where its tensors complete the one that was asked for: those of ResNet-34 hold all names of ResNet-18."""
    torch.save(under("net.", models.build_encoder(*held).state_dict()), tmp_path / "x.pth")
    with pytest.raises(InputError, match=advice):
        foreign.adopt(tmp_path / "x.pth", *asked)


def test_what_is_missing_and_a_shard_are_told(encoder, tmp_path):
    tensors = dict(list(encoder.state_dict().items())[:-8])
    for name, advice in (
        (
            "half.bin",
            r"is not test_resnet with the imagenet stem: layer4.0.bn2.running_var is missing, .* and 3 more; name",
        ),
        ("pytorch_model-00001-of-00002.bin", r"a shard \(00001-of-00002\) of a checkpoint; join the tensors of all"),
    ):
        torch.save(tensors, tmp_path / name)
        with pytest.raises(InputError, match=advice):
            foreign.adopt(tmp_path / name, "test_resnet", "imagenet")


def test_a_checkpoint_of_torch_distributed_is_to_be_joined(tmp_path):
    """Whether its folder is named or one of its parts."""
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / ".metadata").touch()
    archive(tmp_path / "parts" / "__0_0.distcp", "data.pkl", "x")
    for name in ("parts", "parts/__0_0.distcp"):
        with pytest.raises(InputError, match=r"format_utils dcp_to_torch \S+parts whole.pth"):
            foreign.adopt(tmp_path / name, "test_resnet", "imagenet")


# ---- What a file is --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x", "x.torch", "x.pkl", "x.PTH", "x.pth.tar", "x.safetensors"])
def test_the_suffix_does_not_decide_the_format(encoder, tmp_path, name):
    tensors = {key: x.contiguous() for key, x in encoder.state_dict().items()}
    for write in (torch.save, save_file):
        write(tensors, tmp_path / name)
        found, _ = foreign.adopt(tmp_path / name, "test_resnet", "imagenet")
        assert torch.equal(found.layer1[0].conv1.weight, encoder.layer1[0].conv1.weight)


def archive(path, name, content):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(name, content)


class Evil:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (open, ("ran", "w"))


NOT_TENSORS = {
    "empty": (lambda p: p.touch(), "it is empty; download or copy it again"),
    "text": (lambda p: p.write_text("no weights"), "it begins with b'no weights'; download or copy it again"),
    "web page": (lambda p: p.write_text("\n<!DOCTYPE html><html>"), "an HTML page; its link leads to a page about the"),
    "error": (
        lambda p: p.write_text("<?xml version='1.0'?><Error>"),
        "an HTML or XML page; .*download the file itself",
    ),
    "lfs": (
        lambda p: p.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"),
        "a Git LFS pointer, not the file itself; fetch that with git lfs pull",
    ),
    "index": (lambda p: p.write_text('{"weight_map": {"a": "b"}}'), "JSON, .*the index of a sharded checkpoint, join"),
    "json": (lambda p: p.write_text('{"aaa": {"b": 1}}'), "JSON, which holds no tensors"),
    "gzip": (lambda p: p.write_bytes(b"\x1f\x8b\x08rest"), "packed by gzip; unpack it and name the file in it"),
    "tar": (lambda p: p.write_bytes(b"a.pth".ljust(257, b"\0") + b"ustar"), "a tar archive; unpack it and name the"),
    "zip": (lambda p: archive(p, "model/weights.pth", "x"), "a zip archive of model/weights.pth; unpack it and name"),
    "npz": (lambda p: archive(p, "a.npy", "x"), "a zip archive of a.npy; convert it to torch's tensors"),
    "script": (lambda p: archive(p, "x/constants.pkl", "x"), "a TorchScript program; save the state_dict"),
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"x": Evil()})), "nothing in it was run.: pickle wrote it; save"),
    "network": (lambda p: torch.save(nn.Linear(2, 2), p), "nothing in it was run.: it holds an object; save the netw"),
    "evil": (lambda p: torch.save(Evil(), p), "nothing in it was run.: it holds an object"),
    "list": (lambda p: torch.save([torch.ones(2)], p), "holds a list; it must hold tensors with names"),
    "numbers": (lambda p: torch.save({"a": 1}, p), "none of its names belongs to test_resnet.* it holds no tensor"),
}


@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_a_file_without_tensors_is_told_with_its_cure(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    make, message = NOT_TENSORS[kind]
    make(tmp_path / "x.pth")
    with pytest.raises(InputError, match=message) as e:
        foreign.adopt(tmp_path / "x.pth", "test_resnet", "imagenet")
    assert str(e.value).count("\n") == 0 and not (tmp_path / "ran").exists()


@pytest.mark.parametrize("part", [0.001, 0.3, 0.9999])
def test_a_cut_file_is_to_be_downloaded_again(encoder, tmp_path, part):
    writers = {
        "new": torch.save,
        "old": lambda x, path: torch.save(x, path, _use_new_zipfile_serialization=False),
        "safe": save_file,
    }
    for name, write in writers.items():
        path = tmp_path / name
        write({key: x.contiguous() for key, x in encoder.state_dict().items()}, path)
        path.write_bytes(path.read_bytes()[: int(part * path.stat().st_size)])
        with pytest.raises(InputError, match=r"(cut short or damaged|not a whole safetensors file).*download or copy"):
            foreign.adopt(path, "test_resnet", "imagenet")


def test_what_torch_does_not_know_is_left_out_and_not_run(encoder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": encoder.state_dict(), "hook": Evil()}, "x.pth")
    foreign.adopt("x.pth", "test_resnet", "imagenet")
    assert not (tmp_path / "ran").exists()


# ---- Judged ----------------------------------------------------------------------------------------------------------


def test_weights_of_another_project_are_judged_like_ours(command, encoder, folder, tmp_path):
    """The floor is the same network: both are of seed 0."""
    torch.save({"model": under("module.", encoder.state_dict())}, tmp_path / "x.pkl")
    code, rows, err = command(knn_eval, "x.pkl", "--model", "test_resnet", "--dataset", folder, "--k", 5)
    assert code == 0, err
    by = {row["of"]: row["top1"] for row in rows}
    assert by.keys() == {"trained", "untrained", "pixels"} and by["trained"] == by["untrained"]
    assert (rows[0]["model"], rows[0]["stem"], rows[0]["prefix"]) == ("test_resnet", "imagenet", "model.module.")


@pytest.mark.parametrize("metadata", [None, {"description": "a ResNet"}, {"description": '{"a": 1}'}, {"format": "pt"}])
def test_safetensors_are_ours_by_their_digest_alone(command, encoder, folder, tmp_path, metadata):
    """Whatever another project writes into its metadata."""
    tensors = {name: x.contiguous() for name, x in encoder.state_dict().items()}
    save_file(tensors, tmp_path / "timm.safetensors", metadata)
    flags = ["--model", "test_resnet", "--dataset", folder, "--epochs", 1, "--batch_size", 16, "--cached"]
    code, rows, err = command(linear_eval, "timm.safetensors", *flags)
    assert code == 0 and "top1" in rows[-1] and "unchecked" in err
    checkpoint.save(tmp_path / "ours.safetensors", tensors, {"settings": {}})
    code, _, err = command(linear_eval, "ours.safetensors", *flags)
    assert code == 2 and "--model test_resnet has no effect, the file says what it is" in err


def test_what_tensors_do_not_show_is_told(command, folder, tmp_path, monkeypatch):
    """On standard error and in the row; mean and std of the input by flags, which the encoder's input follows."""
    torch.save(models.build_encoder("test_resnet", "cifar").state_dict(), tmp_path / "x.pth")
    inputs = []
    embed = models.embed

    def spy(encoder, views):
        views = list(views)
        inputs.append(torch.cat(views))
        return embed(encoder, views)

    monkeypatch.setattr(models, "embed", spy)
    flags = ["--model", "test_resnet", "--stem", "cifar", "--dataset", folder, "--k", 5, "--nofloors"]
    code, (row,), err = command(knn_eval, "x.pth", *flags)
    assert code == 0 and row["stem"] == "cifar"
    assert f"the strides of --stem cifar, and mean {tuple(row['mean'])} and std {tuple(row['std'])} of its input" in err
    code, (given,), err = command(knn_eval, "x.pth", *flags, "--mean", "0.5,0.5,0.5", "--std", "0.25")
    assert code == 0 and "and mean (0.5, 0.5, 0.5) and std (0.25, 0.25, 0.25) of its input" in err
    assert (given["mean"], given["std"]) == ([0.5] * 3, [0.25] * 3)
    half = len(inputs) // 2  # bank, queries, and the views of the probe without labels, for each command
    for own, of_flags in zip(inputs[:half], inputs[half:]):
        pixels = own * torch.tensor(row["std"])[:, None, None] + torch.tensor(row["mean"])[:, None, None]
        torch.testing.assert_close(of_flags, (pixels - 0.5) / 0.25, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "words, message",
    [
        ("--mean 0.5", "--mean 0.5: takes --std, too"),
        ("--std 0.5", "--std 0.5: takes --mean, too"),
        ("--mean 0.5,0.5 --std 1", "--mean 0.5,0.5: expected three numbers separated by commas, 0 ... 1, or one for"),
        ("--mean 123.7,116.3,103.5 --std 1", "numbers for pixels up to 255 are to be divided by 255"),
        ("--mean nan --std 1", "--mean nan: expected three numbers"),
        ("--mean 0 --std 0.2,0,0.2", "--std 0.2,0,0.2: expected three numbers separated by commas, above 0, up to 1"),
        ("--mean x --std 1", "--mean x: expected three numbers"),
    ],
)
def test_wrong_mean_and_std_are_refused(command, words, message):
    code, rows, err = command(knn_eval, "x.pth", "--model", "resnet18", "--dataset", "photos", *words.split())
    assert code == 2 and rows == [] and message in err and err.count("\n") == 1


@pytest.mark.parametrize("flag", ["prefix", "mean", "std"])
def test_flags_of_other_projects_are_refused_for_a_run(command, trained, flag):
    code, _, err = command(linear_eval, trained / "ckpt.safetensors", f"--{flag}", "0.5")
    assert code == 2 and f"--{flag} 0.5: has no effect without --model" in err
