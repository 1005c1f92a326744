"""Files that come back bit for bit or not at all."""

import contextlib
from pathlib import Path

import pytest
import timm
import torch
from conftest import SETTINGS, VIEW
from safetensors.torch import save_file
from torchvision.transforms.v2 import functional as F

import data
import models
from harness import checkpoint, judging
from lib import pictures
from lib.errors import InputError


@pytest.fixture(scope="module")
def byol():
    torch.manual_seed(0)
    return models.BYOL("test_resnet", "imagenet", "bn", 16, 8)


@pytest.fixture
def pair(byol, tmp_path):
    """ckpt.safetensors and encoder.safetensors as pretrain writes them."""
    for name, part, holds in (("ckpt", byol, "checkpoint"), ("encoder", byol.encoder, "encoder")):
        description = {"settings": SETTINGS, "view": VIEW, "holds": holds}
        checkpoint.save(tmp_path / f"{name}.safetensors", part.state_dict(), description)
    return tmp_path


def test_the_pair_comes_back_bit_for_bit(byol, pair):
    tensors, description = checkpoint.load_file(pair / "ckpt.safetensors")
    assert description["settings"] == SETTINGS and tensors.keys() == byol.state_dict().keys()
    assert all(torch.equal(x, byol.state_dict()[name]) for name, x in tensors.items())
    for name in ("ckpt", "encoder"):
        encoder, _ = judging.open_encoder(pair / f"{name}.safetensors")
        assert not encoder.training
        assert all(torch.equal(x, byol.encoder.state_dict()[key]) for key, x in encoder.state_dict().items())
    assert sorted(p.name for p in pair.iterdir()) == ["ckpt.safetensors", "encoder.safetensors"]
    (pair / "plain").touch()
    assert (pair / "ckpt.safetensors").stat().st_mode == (pair / "plain").stat().st_mode  # as readable as any file
    description = {"holds": "checkpoint", "view": VIEW, "settings": SETTINGS}
    checkpoint.save(pair / "again.safetensors", byol.state_dict(), description)
    assert (pair / "again.safetensors").read_bytes() == (pair / "ckpt.safetensors").read_bytes()


def rewrite(path, tensors=None, **changes):
    """A file with other tensors or another description, and a digest that agrees."""
    old, description = checkpoint.load_file(path)
    checkpoint.save(path, old if tensors is None else tensors(old), {**description, **changes})


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda p: p.write_bytes(p.read_bytes()[:-9] + b"\x01" * 9), "damaged: its content is not what was written"),
        (lambda p: save_file({"x": torch.ones(2)}, p, {"description": "[" * 200_000}), "not written by pretrain.py"),
        (lambda p: rewrite(p, format=0), "of format 0, not 1"),
        (lambda p: rewrite(p, lambda t: {**t, "encoder.bn1.bias": torch.ones(2)}), r"encoder.bn1.bias.*\[2\]"),
    ],
)
def test_what_is_no_checkpoint_is_refused_by_name(pair, damage, message):
    path = pair / "ckpt.safetensors"
    damage(path)
    with pytest.raises(InputError, match=message) as e:
        judging.open_encoder(path)
    assert str(path) in str(e.value)


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="tells what is mapped on Linux alone")
def test_loaded_tensors_let_go_of_their_file(pair):
    """What maps the file would hold its space on the disk when a newer one takes its name."""
    tensors, _ = checkpoint.load_file(pair / "ckpt.safetensors")
    assert "ckpt.safetensors" not in Path("/proc/self/maps").read_text() and tensors


def test_a_damaged_checkpoint_is_refused_or_intact(tmp_path):
    """200 random cuts and flips of a valid file: the clear error, or the very tensors that were written."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"n": torch.tensor(3), "layer.weight": torch.randn(7, 5, generator=generator)}
    checkpoint.save(tmp_path / "good", tensors, {"settings": {"lr": 0.1}, "epoch": 2})
    whole, description = (tmp_path / "good").read_bytes(), checkpoint.load_file(tmp_path / "good")[1]
    refused, path = 0, tmp_path / "bad"
    for case in range(200):
        flips = case % 4  # of a bit each; none: a cut
        damaged = bytearray(whole)
        for at in torch.randint(len(whole), (flips,), generator=generator).tolist():
            damaged[at] ^= 1 << case % 8
        path.write_bytes(damaged if flips else whole[: case * len(whole) // 200])
        try:
            held, told = checkpoint.load_file(path)
        except InputError as e:
            refused += 1
            assert str(path) in str(e) and "\n" not in str(e).strip()
        else:
            assert told == description and held.keys() == tensors.keys()
            assert all(torch.equal(x, tensors[name]) for name, x in held.items())
    assert refused > 180


@pytest.fixture
def encoder_folder(tmp_path):
    """Write an encoder as a run does, its BatchNorm statistics those of a training, and return it with the folder."""

    def write(model, stem="imagenet", norm="bn", view=VIEW, in_files=False):
        torch.manual_seed(0)
        encoder = models.build_encoder(model, stem, norm)
        encoder(torch.randn(8, 3, 64, 64))
        settings = SETTINGS | {"model": model, "stem": stem, "norm": norm}
        config = checkpoint.timm_config(settings, view, in_files)
        checkpoint.save_encoder(tmp_path, encoder.state_dict(), {"settings": settings, "view": view}, config)
        return encoder.eval(), tmp_path / "encoder"

    return write


# resnet26d's first layer is conv1.0; resnetblur18 has buffers that are in no file
@pytest.mark.parametrize("model", ["resnet18.a1_in1k", "resnet26d", "resnetblur18"])
def test_timm_builds_the_encoder_and_prepares_its_images(encoder_folder, monkeypatch, model):
    monkeypatch.setattr("socket.socket", None)  # nothing is asked for elsewhere
    ours, folder = encoder_folder(model)
    theirs = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(theirs(x), ours(x), rtol=0, atol=1e-5)
    assert torch.equal(checkpoint.load_encoder(folder / "model.safetensors")[0](x), ours(x))
    view = timm.data.resolve_model_data_config(theirs)
    assert view == {
        "input_size": [3, 32, 32], "interpolation": "bicubic", "crop_pct": 0.875, "crop_mode": "center",
        "mean": [0.5] * 3, "std": [0.2] * 3,
    }  # fmt: skip
    grey = timm.create_model(f"local-dir:{folder}", pretrained=True, num_classes=5, in_chans=1).eval()
    assert grey(x[:, :1]).shape == (2, 5)
    torch.testing.assert_close(grey.forward_features(x[:, :1]), theirs.forward_features(x[:, :1].expand_as(x)))


@pytest.mark.parametrize("size, crop", [(160, 0.875), (100, 0.3)])
def test_timms_view_of_a_picture_is_the_runs(photos, tmp_path, size, crop):
    """To the rounding of a resize: a crop that is half a pixel off would differ by ten times as much."""
    image = F.resize(photos.test.images[7], [300, 360])
    F.to_pil_image(image).save(tmp_path / "1.png")
    files = pictures.Files([tmp_path / "1.png"], 255)
    (ours,) = data.evaluation_views(data.Split(files, torch.zeros(1)), **(VIEW | {"size": size, "crop": crop}))
    config = checkpoint.timm_config(SETTINGS, VIEW | {"size": size, "crop": crop}, in_files=True)["pretrained_cfg"]
    transform = timm.data.create_transform(**timm.data.resolve_data_config(pretrained_cfg=config))
    off = (transform(F.to_pil_image(image)) - ours[0]) * 0.2 * 255
    assert off.abs().max() <= 3 and off.abs().mean() < 0.02  # of 255; half a pixel makes 1 on average
    assert config["crop_pct"] == pytest.approx(crop, rel=0.03)


@pytest.mark.parametrize("flags", [("test_resnet", "cifar"), ("test_resnet", "imagenet", "none")])
def test_what_timm_has_no_name_for_gets_no_config(encoder_folder, flags):
    _, folder = encoder_folder("test_resnet")
    _, folder = encoder_folder(*flags)  # in place of another run, which had no checkpoint yet
    assert [p.name for p in folder.iterdir()] == ["model.safetensors"]


def test_a_process_that_is_killed_between_the_two_files_leaves_no_wrong_pair(encoder_folder, monkeypatch, tmp_path):
    """The weights are missing, or are those of an earlier epoch."""

    def killed(*_):
        raise KeyboardInterrupt

    for fault in (pytest.raises(RuntimeError, match="No suitable checkpoints found"), contextlib.nullcontext()):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(checkpoint, "save", killed)
            encoder_folder("test_resnet")
        with fault:
            timm.create_model(f"local-dir:{tmp_path / 'encoder'}", pretrained=True)
        encoder_folder("test_resnet")


def test_a_file_does_not_say_where_a_set_is_downloaded_to(tmp_path, monkeypatch):
    """It may be a stranger's. Where the set is there, it is read there; the flag goes before both."""
    monkeypatch.chdir(tmp_path)
    theirs, places = str(tmp_path / "theirs"), []

    def load(name, data_dir="data", *_, **__):
        places.append((name, data_dir))
        raise InputError("no data")

    monkeypatch.setattr(data, "load", load)

    def look(name, dataset=None, data_dir=None):
        description = {"settings": SETTINGS | {"dataset": name, "data_dir": theirs}}
        with pytest.raises(InputError, match="no data"):
            judging.open_images(description, dataset, data_dir, False)

    look("stl10")
    look("stl10", dataset="stl10")
    look("stl10", data_dir="mine")
    (tmp_path / "theirs" / judging.MAKERS["stl10"].base_folder).mkdir(parents=True)
    look("stl10")
    look("imagenet")  # to which nothing is downloaded
    assert places == [("stl10", place) for place in ("data", "data", "mine", theirs)] + [("imagenet", theirs)]
