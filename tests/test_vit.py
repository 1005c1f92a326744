"""A ViT of timm trains by AdamW, goes on, and is timm's."""

import os
import signal

import timm
import torch
from conftest import VIT, acting_after, assert_same_run, words_of
from torch.optim import AdamW

import models
from harness import checkpoint
from pretrain import pretrain


def test_adamws_first_step_decays_weights_alone(command, folder, tmp_path):
    """Loshchilov & Hutter (2019), Algorithm 2: after one step the two averages are 0.1 g and 0.001 g^2."""
    flags = VIT | {"dataset": folder, "batch_size": 48, "epochs": 1, "lr": 0.16, "warmup": 0, "weight_decay": 0.1}
    assert command(pretrain, *words_of(flags | {"eval_every": 0, "seed": 5, "out": "run"}))[0] == 0
    tensors, _ = checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")
    torch.manual_seed(5)
    network = models.BYOL("test_vit", "imagenet", "bn", 32, 16)
    for name, w in network.named_parameters():
        if w.requires_grad:
            direction = tensors[f"exp_avg/{name}"] / 0.1 / ((tensors[f"exp_avg_sq/{name}"] / 0.001).sqrt() + 1e-8)
            decay = 0.1 if w.ndim > 1 and name not in ("encoder.cls_token", "encoder.pos_embed") else 0
            torch.testing.assert_close(tensors[name], w - 0.03 * (direction + decay * w), rtol=1e-4, atol=1e-6)
            assert tensors[f"step/{name}"] == 1 and direction.any(), name


def test_a_vit_that_a_signal_stops_goes_on_to_the_same_bits_and_is_timms(command, folder, tmp_path):
    """With the energy of its layers."""
    flags = VIT | {"dataset": folder, "lr": 0.004, "epochs": 2, "eval_every": 1, "reg": "amhe", "reg_on": "encoder"}
    code, rows, err = command(pretrain, *words_of(flags), "--out", "whole")
    assert code == 0 and {"energy/encoder.patch_embed.proj", "energy/encoder.blocks.5.attn.qkv"} < rows[3].keys(), err
    with acting_after(4, lambda: os.kill(os.getpid(), signal.SIGTERM), AdamW):
        assert command(pretrain, *words_of(flags), "--out", "run")[0] == 143
    assert "run: goes on after step 4" in command(pretrain, *words_of(flags), "--out", "run")[2]
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    ours, _ = checkpoint.load_encoder(tmp_path / "run" / "ckpt.safetensors")
    theirs = timm.create_model(f"local-dir:{tmp_path / 'run' / 'encoder'}", pretrained=True).eval()
    x = torch.randn(2, 3, 48, 48)
    assert torch.equal(theirs(x), ours(x))
