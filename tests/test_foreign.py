"""Weights of other projects are found wherever they lie in a file, and judged like ours; nothing in a file is run."""

import argparse
import pickle

import pytest
import torch
import torchvision
from conftest import Evil
from safetensors.torch import save_file
from torch import nn

import models
from harness import foreign
from knn_eval import knn_eval
from lib.errors import InputError
from lib.tensors import read_tensors

HEAD = {"fc.weight": torch.ones(3), "fc.bias": torch.ones(10)}


def under(prefix, tensors):
    return {prefix + name: x for name, x in tensors.items()}


def both(other, own, tensors):
    """Two encoders, of which the other is all zeros."""
    return under(other, {name: torch.zeros_like(x) for name, x in tensors.items()}) | under(own, tensors)


class AttributeDict(dict):
    """As the flags of a training are saved by some."""


MOMENTUM = {"state": {0: {"momentum_buffer": torch.ones(2)}}}
FLAGS = argparse.Namespace(lr=0.1)
LAYOUTS = {  # by the prefix that is told: the --prefix that picks one of two encoders, the content of the file
    "": (None, lambda x: {name: w for name, w in x.items() if "num_batches" not in name} | HEAD),  # torchvision's
    "state_dict.module.encoder_q.": (
        "encoder_q",
        lambda x: {"state_dict": both("module.encoder_k.", "module.encoder_q.", x), "optimizer": MOMENTUM, "o": FLAGS},
    ),
    "teacher.backbone.": (
        "teacher.backbone",
        lambda x: both("student.module.backbone.", "teacher.backbone.", x) | {"args": FLAGS},
    ),
    "state_dict.model.": (
        None,
        lambda x: {"flags": AttributeDict(lr=0.1), "state_dict": under("model.", x), "calls": {AttributeDict: Evil()}},
    ),
    "net.": ("net", lambda x: both("ema.net.", "net.", x)),
    "no prefix": (".", lambda x: both("ema.", "", x)),
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(0)
    return models.build_encoder("test_resnet", "imagenet")


@pytest.fixture(autouse=True)
def nothing_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    yield
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("told", LAYOUTS)
def test_an_encoder_is_found_by_its_prefix(encoder, capsys, told):
    prefix, content = LAYOUTS[told]
    is_old = prefix == "encoder_q"  # MoCo's files were written before torch 1.6
    torch.save(content(encoder.state_dict()), "x", _use_new_zipfile_serialization=not is_old)
    found, found_prefix = foreign.adopt("x", "test_resnet", "imagenet", prefix)
    state = found.state_dict()
    assert all(torch.equal(state[name], x) for name, x in encoder.state_dict().items())
    assert found_prefix == told.replace("no prefix", "")
    err = capsys.readouterr().err
    assert f"tensors of test_resnet under {told or 'no prefix'}; left out: " in err and err.count("\n") == 1
    assert ("left out: fc.weight, fc.bias; it has no digest, so it is unchecked" in err) == (told == "")
    if prefix:
        for wrong, typed in ((None, ""), ("nope", "--prefix nope: ")):
            with pytest.raises(InputError, match=f"^{typed}x: holds test_resnet under .*, .*; --prefix takes one of"):
                foreign.adopt("x", "test_resnet", "imagenet", wrong)


def test_lightlys_encoder_has_torchvisions_features():
    """An oracle from outside: torchvision's ResNet-18 as a torch.nn.Sequential of its children, as lightly has it."""
    theirs = torchvision.models.resnet18().eval()
    backbone = nn.Sequential(*list(theirs.children())[:-1])
    torch.save({"state_dict": under("backbone.", backbone.state_dict()) | {"head.0.weight": torch.ones(2)}}, "x")
    found, prefix = foreign.adopt("x", "resnet18", "imagenet")
    x = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(found(x), backbone(x).flatten(1), rtol=1e-4, atol=1e-5)
    assert prefix == "state_dict.backbone." and not found.training


def test_a_vit_whose_tokens_stand_in_no_module_is_found():
    vit = models.build_encoder("test_vit", "imagenet").state_dict()
    torch.save({"teacher": under("backbone.", vit) | {"head.last_layer.weight": torch.ones(2)}}, "x")
    found, prefix = foreign.adopt("x", "test_vit", "imagenet")
    assert prefix == "teacher.backbone." and all(torch.equal(x, vit[name]) for name, x in found.state_dict().items())


MISFITS = {  # where ResNet-18 is looked for: the model in the file, how much of it is there, and what is wrong
    "stem": ("resnet18", "cifar", 999, r"conv1.weight is \(64, 3, 3, 3\) in the file, \(64, 3, 7, 7\) in the encoder"),
    # it has all names of ResNet-18
    "larger": ("resnet34", "imagenet", 999, "layer1.2.conv1.weight is .* in the file, absent in the encoder"),
    "half": ("resnet18", "imagenet", 60, "layer3.0.conv1.weight is absent in the file"),
    "integers": ("resnet18", "imagenet", 999, "conv1.weight is torch.int8 in the file"),
}


@pytest.mark.parametrize("case", MISFITS)
def test_what_keeps_a_file_from_being_the_encoder_is_told(case):
    model, stem, n, fault = MISFITS[case]
    state = list(models.build_encoder(model, stem).state_dict().items())
    dtype = torch.int8 if case == "integers" else torch.float16  # which are taken
    torch.save(under("net.", {name: x.to(dtype) for name, x in state[:n]}) | HEAD, "x")
    with pytest.raises(InputError, match=f"^x: does not hold resnet18 with the imagenet stem, {fault}.*; name the --m"):
        foreign.adopt("x", "resnet18", "imagenet")


def test_the_suffix_does_not_decide_the_format():
    for name in ("x.safetensors", "x.pth.tar"):
        for write in (torch.save, save_file):
            write({"a": torch.arange(3.0)}, name)
            assert read_tensors(name)["a"].tolist() == [0, 1, 2]


def test_tensors_without_numbers_of_their_own_are_left_out_and_named(capsys):
    content = {"a": torch.ones(2), "b": {"c": nn.Parameter(torch.ones(3)), "meta": torch.empty(2, device="meta")}}
    nested = torch.nested.nested_tensor([torch.ones(1), torch.ones(2)], layout=torch.strided)
    torch.save(content | {"sparse": torch.eye(3).to_sparse(), "nested": nested, 7: "text"}, "x")
    assert {name: len(x) for name, x in read_tensors("x").items()} == {"a": 2, "b.c": 3}
    assert capsys.readouterr().err == "x: left out, sparse, quantized or empty: b.meta, nested, sparse\n"


def cut(path, write, **options):
    write({"x": torch.ones(9000)}, path, **options)
    path.write_bytes(path.read_bytes()[:20_000])


REFUSED = (
    r"x: not a file of tensors alone \(nothing in it was run\); save the network's state_dict\(\).*download it aga"
)
NO_TENSORS = "x: holds no tensors with names; save the network's state_dict"
NOT_TENSORS = {
    "pickle": (lambda p: p.write_bytes(pickle.dumps({"x": Evil()})), REFUSED),
    "network": (lambda p: torch.save({"model": nn.Linear(2, 2), "x": Evil()}, p), NO_TENSORS),
    "cut, old": (lambda p: cut(p, torch.save, _use_new_zipfile_serialization=False), REFUSED),
    "cut, safe": (lambda p: cut(p, save_file), "x: not a whole safetensors file.*; download it again"),
}


@pytest.mark.parametrize("kind", NOT_TENSORS)
def test_a_file_without_tensors_is_told_with_its_cure(tmp_path, kind):
    make, message = NOT_TENSORS[kind]
    make(tmp_path / "x")
    with pytest.raises(InputError, match=message) as e:
        foreign.adopt("x", "test_resnet", "imagenet")
    assert str(e.value).count("\n") == 0


def test_a_folder_of_timm_is_judged_like_ours(command, encoder, folder, tmp_path, embedded):
    """The floor is the same network, of seed 0. --mean and --std change the encoder's input, and what is assumed."""
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "config.json").write_text('{"architecture": "test_resnet"}')
    tensors = {name: x.contiguous() for name, x in encoder.state_dict().items()}
    save_file(tensors, "hub/model.safetensors", {"description": '{"a": 1}', "format": "pt"})
    flags = ["hub", "--model", "test_resnet", "--dataset", folder, "--k", 5]
    code, (row, untrained, _), err = command(knn_eval, *flags)
    assert code == 0 and row["top1"] == untrained["top1"] and row["prefix"] == "", err
    assert f"the strides of --stem imagenet, and mean {tuple(row['mean'])} and std {tuple(row['std'])}" in err
    own = embedded[0][1]
    embedded.clear()
    code, (given,), err = command(knn_eval, *flags, "--nofloors", "--mean", "0.5,0.5,0.5", "--std", "0.25")
    assert code == 0 and "and mean (0.5, 0.5, 0.5) and std (0.25, 0.25, 0.25)" in err and given["mean"] == [0.5] * 3
    pixels = own * torch.tensor(row["std"])[:, None, None] + torch.tensor(row["mean"])[:, None, None]
    torch.testing.assert_close(embedded[0][1], (pixels - 0.5) / 0.25, rtol=1e-4, atol=1e-5)
