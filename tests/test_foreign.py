"""Weights of other projects are judged like ours."""

import pytest
import torch
from safetensors.torch import save_file

import models
from harness import foreign
from knn_eval import knn_eval
from linear_eval import linear_eval

NAMINGS = {
    "timm.pth": lambda x: x,
    "simsiam.pth.tar": lambda x: {"epoch": 1, "state_dict": {f"module.encoder.{n}": w for n, w in x.items()}},
    "moco.pth.tar": lambda x: {
        "arch": "resnet50",
        "state_dict": {f"module.encoder_{q}.{n}": w * (q == "q") for q in "qk" for n, w in x.items()}
        | {"module.queue": torch.ones(3), "module.encoder_q.fc.weight": torch.ones(3)},
    },
    "barlow.pth": lambda x: {
        "model": {f"module.backbone.{n}": w for n, w in x.items()} | {"module.bn.bias": torch.ones(2)}
    },
    "torchvision.pth": lambda x: {n: w for n, w in x.items() if "num_batches" not in n} | {"fc.bias": torch.ones(10)},
}


@pytest.mark.parametrize("name", NAMINGS)
def test_weights_of_other_projects_are_judged_like_ours(command, folder, tmp_path, name):
    torch.manual_seed(0)
    encoder = models.build_encoder("resnet50", "imagenet")
    torch.save(NAMINGS[name](encoder.state_dict()), tmp_path / name)
    flags = ["--model", "resnet50", "--dataset", folder]
    code, rows, err = command(knn_eval, name, *flags, "--k", 5)
    assert code == 0 and "tensors of resnet50" in err and "it has no digest, so it is unchecked" in err
    assert ("left out" in err) == (name in ("moco.pth.tar", "barlow.pth", "torchvision.pth"))
    by = {row["of"]: row["top1"] for row in rows}
    assert by.keys() == {"trained", "untrained", "pixels"} and by["trained"] == by["untrained"]  # both are of seed 0
    found = foreign.adopt(tmp_path / name, "resnet50", "imagenet")
    assert all(torch.equal(x, found.state_dict()[n]) for n, x in encoder.state_dict().items())


def test_foreign_safetensors_and_a_probe(command, folder, tmp_path):
    encoder = models.build_encoder("test_resnet", "imagenet")
    save_file({n: x.contiguous() for n, x in encoder.state_dict().items()}, tmp_path / "timm.safetensors")
    flags = ["--model", "test_resnet", "--dataset", folder, "--epochs", 1, "--batch_size", 16, "--cached"]
    code, rows, err = command(linear_eval, "timm.safetensors", *flags)
    assert code == 0 and "top1" in rows[-1] and "unchecked" in err
