"""Networks, what of them is a neuron, and files that come back bit for bit or not at all."""

import copy
import json
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import models
from regularizers import alignment

SETTINGS = {"method": "byol", "model": "resnet18", "stem": "imagenet", "norm": "bn", "hidden_dim": 16, "out_dim": 8}
SETTINGS |= {"dataset": "photos", "data_dir": "data", "seed": 0}
VIEW = {"size": 32, "crop": 0.875, "mean": [0.5] * 3, "std": [0.2] * 3}


@pytest.fixture(scope="module")
def byol():
    torch.manual_seed(0)
    return models.BYOL("resnet18", "imagenet", "bn", 16, 8)


@pytest.fixture
def pair(byol, tmp_path):
    """ckpt.safetensors and encoder.safetensors as pretrain writes them."""
    for name, part, holds in (("ckpt", byol, "checkpoint"), ("encoder", byol.encoder, "encoder")):
        description = {"settings": SETTINGS, "view": VIEW, "holds": holds}
        models.save(tmp_path / f"{name}.safetensors", part.state_dict(), description)
    return tmp_path


def count(module):
    return sum(p.numel() for p in module.parameters())


def test_parameters_are_those_counted_by_hand():
    """ResNet-18: stem, four stages of two blocks, two BatchNorm parameters a channel, 1x1 shortcuts at a new width."""

    def stage(i, o):
        blocks = 9 * (i * o + 3 * o * o) + 4 * 2 * o
        return blocks + (0 if i == o else i * o + 2 * o)

    body = 2 * 64 + stage(64, 64) + stage(64, 128) + stage(128, 256) + stage(256, 512)
    assert count(models.build_encoder("resnet18", "imagenet")) == 7 * 7 * 3 * 64 + body
    assert count(models.build_encoder("resnet18", "cifar")) == 3 * 3 * 3 * 64 + body

    def bottlenecks(i, width, n):
        first = i * width + 9 * width**2 + 4 * width**2 + 2 * (2 * width + 4 * width)
        others = 4 * width**2 + 9 * width**2 + 4 * width**2 + 2 * (2 * width + 4 * width)
        return first + (n - 1) * others + 4 * width * i + 2 * 4 * width

    body = (
        2 * 64
        + bottlenecks(64, 64, 3)
        + bottlenecks(256, 128, 4)
        + bottlenecks(512, 256, 6)
        + bottlenecks(1024, 512, 3)
    )
    assert count(models.build_encoder("resnet50", "imagenet")) == 7 * 7 * 3 * 64 + body
    assert count(models.build_encoder("resnet50", "cifar")) == 3 * 3 * 3 * 64 + body
    assert count(models.mlp(512, 4096, 256)) == 512 * 4096 + 4096 + 2 * 4096 + 4096 * 256


def test_maps_of_the_two_stems():
    x = torch.zeros(2, 3, 32, 32)
    assert models.build_encoder("resnet18", "cifar").eval().forward_features(x).shape == (2, 512, 4, 4)
    assert models.build_encoder("resnet18", "imagenet").eval().forward_features(x).shape == (2, 512, 1, 1)


def test_cifar_stem_starts_as_timms_convolutions_do():
    torch.manual_seed(0)
    weight = models.build_encoder("resnet18", "cifar").conv1.weight
    assert weight.std().item() == pytest.approx((2 / (9 * 64)) ** 0.5, rel=0.05)


def test_residual_branches_start_at_one():
    assert models.build_encoder("resnet18", "imagenet").layer4[1].bn2.weight.min() == 1


def test_alexnet_takes_images_of_any_size():
    alexnet = models.build_encoder("alexnet", "cifar").eval()
    for size in (28, 32, 64):
        assert alexnet(torch.zeros(2, 3, size, size)).shape == (2, alexnet.num_features)
    assert sum(isinstance(x, (nn.Conv2d, nn.Linear)) for x in alexnet.modules()) == 7
    assert len(models.neurons(models.BYOL("alexnet", "cifar", "bn", 16, 2), ["encoder", "projector"])) == 9


@pytest.mark.parametrize("name", ["resnet18", "alexnet"])
def test_without_norm_there_is_none(name):
    """Every BatchNorm of f, g and q is gone, Table 4, and nothing else."""
    whole, bare = (models.BYOL(name, "imagenet", norm, 16, 8).state_dict() for norm in ("bn", "none"))
    norms = {key.rpartition(".")[0] for key in whole if key.endswith("running_mean")}
    assert norms and bare.keys() == {key for key in whole if key.rpartition(".")[0] not in norms}


def test_simclr_is_byols_encoder_and_projector(byol):
    simclr = models.SimCLR("resnet18", "imagenet", "bn", 16, 8)
    simclr.load_state_dict({k: x for k, x in byol.state_dict().items() if k.startswith(("encoder.", "projector."))})
    views = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(simclr(*views)[0], byol(*views)[0])


@pytest.mark.parametrize(
    "name, hint",
    [
        ("resnet19", "did you mean resnet18"),
        ("vit_tiny_patch16_224", "not a ResNet"),
        ("resnet18.x", "cannot make"),
        ("resnet50_gn", "normalised by GroupNorm"),
    ],
)
def test_other_names_are_refused(name, hint):
    with pytest.raises(models.ModelError, match=hint):
        models.build_encoder(name, "imagenet")


def test_forward_and_where_gradients_go(byol):
    v1, v2 = torch.randn(2, 4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    z, p, t = byol(v1, v2)
    assert [x.shape for x in (*p, *z, *t)] == [(4, 8)] * 6
    (alignment(p[0], t[1]) + alignment(p[1], t[0])).backward()
    assert all(x.grad is None for x in byol.target.parameters())
    for part in (byol.encoder, byol.projector, byol.predictor):
        assert all(x.grad is not None and x.grad.abs().max() > 0 for x in part.parameters())
    byol.zero_grad()


@pytest.mark.parametrize("norm", ["bn", "sync"])
def test_a_frozen_target_gets_frozen_norms(norm):
    """Several processes on CUDA change the norms of a finished network; one that learns and is not used ends DDP."""
    network = models.with_norm(models.BYOL("test_resnet", "imagenet", "bn", 8, 4), norm)
    layers = [module for module in network.target.modules() if isinstance(module, models.NORMS[norm])]
    assert len(layers) == 16 and not any(p.requires_grad for p in network.target.parameters())
    assert all(p.requires_grad for part in (network.encoder, network.projector) for p in part.parameters())


def test_views_in_one_batch_are_views_one_after_the_other(byol):
    """Against timm's and torch's own BatchNorm: outputs, running statistics and gradients."""
    head = OrderedDict(
        hidden=nn.Linear(512, 16), norm=nn.BatchNorm1d(16), relu=nn.ReLU(), out=nn.Linear(16, 8, bias=False)
    )
    plain = nn.Sequential(timm.create_model("resnet18", num_classes=0), nn.Sequential(head)).double()
    ours = copy.deepcopy(byol).double()
    plain[0].load_state_dict(ours.encoder.state_dict())
    plain[1].load_state_dict(ours.projector.state_dict())
    v1, v2 = torch.randn(2, 4, 3, 64, 64, dtype=torch.float64)
    views = v1, 2 * v2 + 1
    z, each = ours(*views)[0], [plain(v) for v in views]
    torch.testing.assert_close(list(z), each)
    buffers = [*ours.encoder.buffers(), *ours.projector.buffers()]
    torch.testing.assert_close(buffers, list(plain.buffers()))
    for x, y in (z, each):
        alignment(x, y).backward()
    online = (*ours.encoder.parameters(), *ours.projector.parameters())
    for x, y in zip(plain.parameters(), online):
        torch.testing.assert_close(x.grad, y.grad)


def test_target_is_a_moving_average(byol):
    byol = models.BYOL("resnet18", "imagenet", "bn", 16, 8)
    assert all(torch.equal(x, y) for x, y in zip(byol.target.encoder.parameters(), byol.encoder.parameters()))
    with torch.no_grad():
        for x in byol.parameters():
            x.fill_(1.0 if x.requires_grad else 3.0)
    mean = byol.target.encoder.bn1.running_mean.clone()
    byol.encoder.bn1.running_mean.fill_(7)
    byol.update_target(0.75)
    assert all((x == 0.75 * 3 + 0.25 * 1).all() for x in byol.target.parameters())
    assert torch.equal(byol.target.encoder.bn1.running_mean, mean)
    byol.update_target(1.0)
    assert all((x == 2.5).all() for x in byol.target.parameters())


def test_neurons(byol):
    heads = models.neurons(byol, ["projector", "predictor"])
    shapes = {name: tuple(weight.shape) for name, weight in heads.items()}
    assert shapes == {
        "projector.hidden": (16, 512),
        "projector.out": (8, 16),
        "predictor.hidden": (16, 8),
        "predictor.out": (8, 16),
    }
    encoder = models.neurons(byol, ["encoder"])
    assert len(encoder) == 20 and encoder["encoder.conv1"] is byol.encoder.conv1.weight
    grouped = models.BYOL("resnext50_32x4d", "imagenet", "bn", 16, 8)
    assert models.neurons(grouped, ["projector"])
    with pytest.raises(models.ModelError, match="grouped"):
        models.neurons(grouped, ["encoder"])


def test_embed_is_in_evaluation_mode_and_puts_the_mode_back():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.9))
    x = torch.randn(5, 3, 1, 1)
    features = models.embed(net, [x[:2], x[2:]])
    torch.testing.assert_close(features, x.flatten(1) / (1 + 1e-5) ** 0.5)
    assert net.training and not features.requires_grad
    with pytest.raises(models.ModelError, match="not finite"):
        models.embed(nn.Flatten(), [x / 0])


def test_outputs_of_blocks_are_those_of_timms_stages(byol):
    """The last block of a stage gives what timm says the stage gives; the last of all, pooled, is the embedding."""
    views = torch.randn(2, 3, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    blocks, x = models.embed_blocks(byol.encoder, views), views.flatten(0, 1)
    assert list(blocks) == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    with torch.no_grad():
        stages = byol.encoder.eval().forward_intermediates(x, intermediates_only=True)[1:]
    byol.encoder.train()
    for stage, outputs in enumerate(stages, 1):
        torch.testing.assert_close(blocks[f"layer{stage}.1"], outputs.mean((2, 3)))
    torch.testing.assert_close(blocks["layer4.1"], models.embed(byol.encoder, views))
    assert not any(module._forward_hooks for module in byol.encoder.modules())


def test_the_pair_comes_back_bit_for_bit(byol, pair):
    tensors, description = models.load(pair / "ckpt.safetensors")
    assert description["settings"] == SETTINGS and tensors.keys() == byol.state_dict().keys()
    assert all(torch.equal(x, byol.state_dict()[name]) for name, x in tensors.items())
    for name in ("ckpt", "encoder"):
        encoder, _ = models.load_encoder(pair / f"{name}.safetensors")
        assert not encoder.training
        assert all(torch.equal(x, byol.encoder.state_dict()[key]) for key, x in encoder.state_dict().items())
    assert sorted(p.name for p in pair.iterdir()) == ["ckpt.safetensors", "encoder.safetensors"]
    (pair / "plain").touch()
    assert (pair / "ckpt.safetensors").stat().st_mode == (pair / "plain").stat().st_mode  # as readable as any file


def test_equal_content_makes_equal_files(byol, pair, tmp_path):
    description = {"holds": "checkpoint", "view": VIEW, "settings": SETTINGS}
    models.save(tmp_path / "again.safetensors", byol.state_dict(), description)
    assert (tmp_path / "again.safetensors").read_bytes() == (pair / "ckpt.safetensors").read_bytes()


def test_timm_loads_the_encoder(byol, pair):
    path = str(pair / "encoder.safetensors")
    encoder = timm.create_model("resnet18", num_classes=0, checkpoint_path=path)
    assert all(torch.equal(x, byol.encoder.state_dict()[key]) for key, x in encoder.state_dict().items())


def test_timm_loads_an_encoder_with_the_cifar_stem(tmp_path):
    """By the lines in the README."""
    ours = models.build_encoder("resnet18", "cifar")
    models.save(tmp_path / "encoder.safetensors", ours.state_dict(), {})
    encoder = timm.create_model("resnet18", num_classes=0)
    encoder.conv1, encoder.maxpool = nn.Conv2d(3, 64, 3, 1, 1, bias=False), nn.Identity()
    encoder.load_state_dict(load_file(tmp_path / "encoder.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(encoder.eval()(x), ours.eval()(x))


def test_a_failed_save_leaves_the_old_file(byol, pair, monkeypatch):
    before = (pair / "ckpt.safetensors").read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(
        models.ModelError, match=r"ckpt.safetensors: cannot be written \(No space left on device\); what"
    ):
        models.save(pair / "ckpt.safetensors", {"x": torch.ones(3)}, {})
    assert (pair / "ckpt.safetensors").read_bytes() == before
    assert sorted(p.name for p in pair.iterdir()) == ["ckpt.safetensors", "encoder.safetensors"]


def rewrite(path, tensors=None, **changes):
    """A file with other tensors or another description, and a digest that agrees."""
    old, description = models.load(path)
    models.save(path, old if tensors is None else tensors(old), {**description, **changes})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.unlink(), "no such file"),
        (lambda p: p.write_bytes(b""), "not a whole safetensors file"),
        (lambda p: p.write_bytes(b"\x80\x04pickle" * 9), "not a whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-1000]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:50]), "not a whole safetensors file"),
        (lambda p: p.write_bytes(p.read_bytes()[:-9] + b"\x01" + p.read_bytes()[-8:]), "damaged"),
        (lambda p: save_file({"x": torch.ones(2)}, p), "without a description"),
        (lambda p: save_file({"x": torch.ones(2)}, p, {"description": "{"}), "not one that pretrain.py writes"),
        (lambda p: save_file({"x": torch.ones(2)}, p, {"description": json.dumps([1])}), "not one that"),
        (
            lambda p: rewrite(p, lambda t: {k: x for k, x in t.items() if k != "encoder.bn1.bias"}),
            "missing.*encoder.bn1.bias",
        ),
        (lambda p: rewrite(p, lambda t: {**t, "encoder.extra": torch.ones(2)}), "superfluous.*encoder.extra"),
        (lambda p: rewrite(p, lambda t: {**t, "encoder.bn1.bias": torch.ones(2)}), r"encoder.bn1.bias is \(2,\)"),
        (lambda p: rewrite(p, settings=SETTINGS | {"model": "resnet34"}), "missing, for what is described"),
        (lambda p: rewrite(p, settings=SETTINGS | {"out_dim": 9}), r"projector.out.weight is \(8, 16\)"),
        (lambda p: rewrite(p, settings=SETTINGS | {"model": "resnet17"}), "resnet17"),
        (lambda p: rewrite(p, settings={}), "not one that pretrain.py writes"),
        (lambda p: rewrite(p, view={}), "not one that pretrain.py writes"),
        (lambda p: (p.unlink(), p.mkdir()), "a folder; name the ckpt.safetensors"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(pair, damage, message):
    path = pair / "ckpt.safetensors"
    damage(path)
    with pytest.raises(models.ModelError, match=message) as e:
        models.load_encoder(path)
    assert str(path) in str(e.value) or "resnet17" in str(e.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped on Linux alone")
def test_loaded_tensors_let_go_of_their_file(pair):
    """What maps the file would hold its space on the disk when a newer one takes its name."""
    tensors, _ = models.load(pair / "ckpt.safetensors")
    assert "ckpt.safetensors" not in Path("/proc/self/maps").read_text() and tensors
