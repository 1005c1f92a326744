"""Networks: their sizes, their views, and what of them is a neuron."""

import copy
import shutil

import pytest
import torch
from conftest import random
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm
from torch.nn.utils.parametrize import register_parametrization

import models
from harness.measure import embed_blocks
from lib.errors import InputError
from regularizers import energy_of


@pytest.fixture(scope="module")
def byol():
    torch.manual_seed(0)
    return models.BYOL("resnet18", "imagenet", "bn", 16, 8)


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
    assert count(models.mlp(512, 4096, 256)) == 512 * 4096 + 4096 + 2 * 4096 + 4096 * 256


def test_alexnet_is_the_one_written_by_hand():
    """Five convolutions, max-pooling after the first, second and last, two linear layers of 4096: SmallAlexNet of Wang
    and Isola (2020), but for its last pooling, which here makes 3 x 3 of any map."""
    alexnet = models.build_encoder("alexnet", "cifar")
    widths = [(3, 96), (96, 192), (192, 384), (384, 384), (384, 192)]
    linear = [(192 * 9, 4096), (4096, 4096)]
    assert count(alexnet) == sum(9 * i * o + 2 * o for i, o in widths) + sum(i * o + 2 * o for i, o in linear)
    x = random(2, 3, 40, 40)
    ours = alexnet.eval()(x)
    for i in range(1, 8):
        layer = getattr(alexnet, f"conv{i}" if i < 6 else f"linear{i}")
        x = F.conv2d(x, layer.weight, padding=1) if i < 6 else F.linear(x, layer.weight)
        x = F.relu(x / (1 + 1e-5) ** 0.5)  # fresh statistics are 0 and 1
        if i in (1, 2):
            x = F.max_pool2d(x, 3, 2)
        if i == 5:
            x = F.adaptive_max_pool2d(x, 3).flatten(1)
    torch.testing.assert_close(ours, x)


def test_simsiams_heads():
    """Its projector ends in BatchNorm without weights, its predictor narrows to a quarter."""
    network = models.SimSiam("test_resnet", "imagenet", "bn", 64, 16)
    assert network.predictor.hidden.weight.shape == (4, 16)
    z, _, _ = network(*random(2, 8, 3, 32, 32))
    for view in z:
        torch.testing.assert_close(view.mean(0), torch.zeros(16), rtol=0, atol=1e-5)
        torch.testing.assert_close(view.std(0, correction=0), torch.ones(16), rtol=0, atol=1e-2)
    assert [name for name, _ in network.projector.named_parameters() if name.startswith("end")] == []
    assert network.loss(z, (z[1], z[0]), z).item() == pytest.approx(-1, abs=1e-6)


def test_mocos_queue_holds_the_latest_keys_in_their_order():
    network = models.MoCo("test_resnet", "imagenet", "bn", 8, 3, queue=5)
    torch.testing.assert_close(network.queue.norm(dim=1), torch.ones(5))
    start, t = network.queue.clone(), random(3, 2, 2, 3)
    keys = torch.nn.functional.normalize(t.reshape(12, 3))
    network.loss(*[tuple(torch.randn(2, 2, 3))] * 2, tuple(t[0]))
    assert torch.equal(network.queue, start)  # until the step is done
    network.update_target(1.0)
    torch.testing.assert_close(network.queue, torch.cat([keys[:4], start[4:]]))
    network.loss(*[tuple(torch.randn(2, 2, 3))] * 2, tuple(t[1]))
    network.update_target(1.0)
    torch.testing.assert_close(network.queue, torch.stack([keys[i] for i in (5, 6, 7, 3, 4)]))
    for part in (1, 2):  # two micro-batches of a step, of more keys than there are places
        network.loss(*[tuple(torch.randn(2, 2, 3))] * 2, tuple(t[part]))
    network.update_target(1.0)
    torch.testing.assert_close(network.queue[network.queue[:, 0].argsort()], keys[7:][keys[7:, 0].argsort()])
    assert {"queue", "oldest"} <= network.state_dict().keys()


def norms_of_five(dtype=torch.float32, affine=True):
    """torch's BatchNorm and ours, of 5 channels with the same weights."""
    plain = nn.BatchNorm2d(5, affine=affine).to(dtype)
    plain._check_input_dim = lambda x: None
    if affine:
        nn.init.uniform_(plain.weight, 0.5, 2)
        nn.init.uniform_(plain.bias)
    ours = models.with_norm(nn.Sequential(copy.deepcopy(plain)), "bn")[0].to(dtype)
    ours.load_state_dict(plain.state_dict())
    return plain, ours


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize(
    "dtype, shape", [(torch.float32, (8, 5)), (torch.float64, (8, 5, 3, 3)), (torch.bfloat16, "channels_last")]
)
def test_norm_is_torchs_on_each_view(shape, dtype, affine):
    """Bit for bit: outputs, gradients and running statistics; bf16 has fp32 weights and statistics, as in autocast."""
    x = random(*(8, 5, 3, 3) if shape == "channels_last" else shape)
    x[4:] = 3 * x[4:] + 2  # the second view has another mean and spread
    x = x.to(dtype)
    if shape == "channels_last":
        x = x.to(memory_format=torch.channels_last)
    weight = x.flip(0)
    results = []
    plain, ours = norms_of_five(torch.float64 if dtype == torch.float64 else torch.float32, affine)
    for norm, run in ((plain, lambda x: torch.cat([plain(view) for view in x.chunk(2)])), (ours, ours)):
        inputs = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == torch.bfloat16):
            outputs = run(inputs)
        assert outputs.dtype == dtype and outputs.stride() == x.stride()
        (weight * outputs).sum().backward()
        gradients = [inputs.grad, *[p.grad for p in norm.parameters()]]
        results.append([outputs, *gradients, norm.running_mean, norm.running_var, norm.eval()(x[:3])])
    torch.testing.assert_close(results[1], results[0], rtol=0, atol=0)


@pytest.mark.skipif(not shutil.which("g++"), reason="Inductor needs a C++ compiler")
def test_norm_is_compiled_whole():
    """As --dynamo_backend inductor does."""
    _, norm = norms_of_five()
    compiled, again = torch.compile(norm, fullgraph=True), copy.deepcopy(norm)
    x = torch.randn(8, 5, 2, 2)
    for run in (compiled, again):
        run(x).square().sum().backward()
    torch.testing.assert_close(norm.weight.grad, again.weight.grad)
    torch.testing.assert_close(norm.state_dict(), again.state_dict())


def test_embed_is_in_evaluation_mode_and_puts_the_mode_back():
    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3), nn.Dropout(0.9))
    x = torch.randn(5, 3, 1, 1)
    features = models.embed(net, [x[:2], x[2:]])
    torch.testing.assert_close(features, x.flatten(1) / (1 + 1e-5) ** 0.5)
    assert net.training and not features.requires_grad
    with pytest.raises(InputError, match="not finite"):
        models.embed(nn.Flatten(), [x / 0])


def test_outputs_of_blocks_are_those_of_timms_stages(byol):
    """The last block of a stage gives what timm says the stage gives; the last of all, pooled, is the embedding."""
    views = random(2, 3, 3, 64, 64)
    (_, blocks), x = embed_blocks(byol.encoder, views), views.flatten(0, 1)
    assert list(blocks) == [f"layer{stage}.{block}" for stage in (1, 2, 3, 4) for block in (0, 1)]
    with torch.no_grad():
        stages = byol.encoder.eval().forward_intermediates(x, intermediates_only=True)[1:]
    byol.encoder.train()
    for stage, outputs in enumerate(stages, 1):
        torch.testing.assert_close(blocks[f"layer{stage}.1"], outputs.mean((2, 3)))
    torch.testing.assert_close(blocks["layer4.1"], models.embed(byol.encoder, views))
    assert not any(module._forward_hooks for module in byol.encoder.modules())


def test_a_parametrized_weight_that_layers_share_counts_once_and_stays_as_it_is():
    network = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6), nn.Linear(6, 6))
    network[1].weight = network[0].weight
    for layer in network:
        spectral_norm(layer)
    before = {name: x.clone() for name, x in network.state_dict().items()}
    energies = energy_of(network)
    sum(energies.values()).backward()
    assert list(energies) == ["0", "2"] and network[0].parametrizations.weight.original.grad.abs().max() > 0
    assert all(torch.equal(x, before[name]) for name, x in network.state_dict().items())  # in training mode, too
    assert all(module.training for module in network.modules())


class LowRank(nn.Module):
    """A weight plus an update of its own, as LoRA has it."""

    def __init__(self):
        super().__init__()
        self.update = nn.Parameter(random(6, 1) @ random(1, 6, seed=1))

    def forward(self, weight):
        return weight + self.update


def test_layers_made_of_one_tensor_in_different_ways_all_count():
    """Adapters on one base, the base itself, a transposed convolution; and a part in evaluation mode stays in it."""
    base, decoder = nn.Linear(6, 6), nn.ConvTranspose2d(5, 4, 3)
    one, two, encoder = nn.Linear(6, 6), nn.Linear(6, 6), nn.Conv2d(4, 5, 3)
    encoder.weight = decoder.weight
    for layer in (one, two):
        layer.weight = base.weight
        register_parametrization(layer, "weight", LowRank())
    one.parametrizations.weight[0].eval()
    energies = energy_of(nn.Sequential(base, one, two, encoder, decoder))
    sum(energies.values()).backward()
    assert list(energies) == ["0", "1", "2", "3", "4"]
    assert all(layer.parametrizations.weight[0].update.grad.any() for layer in (one, two)) and base.weight.grad.any()
    assert one.parametrizations.weight.training and not one.parametrizations.weight[0].training


@pytest.mark.parametrize("constant", [0.1, 3.7])
def test_a_feature_without_variance_correlates_with_nothing(constant):
    """Rounding makes 0.1 vary about its mean by 1e-8; the gradient stays that of the other features."""
    z = random(2, 96, 4)
    twins = models.BarlowTwins
    rest = twins.loss(twins, z, z, z)
    dead = torch.cat([z, torch.full((2, 96, 1), constant)], 2).requires_grad_()
    loss = twins.loss(twins, dead, dead, dead)
    loss.backward()
    assert loss.item() == pytest.approx(rest.item() + 1, rel=1e-5) and dead.grad.abs().max() < 1


def test_a_grouped_encoder_will_do_where_the_heads_are_regularized():
    with torch.device("meta"):
        grouped = models.BYOL("resnext50_32x4d", "imagenet", "bn", 16, 8)
    assert list(models.neurons(grouped, ["projector"])) == ["projector.hidden", "projector.out"]


def test_the_target_begins_as_a_copy_and_keeps_its_statistics():
    byol = models.BYOL("test_resnet", "imagenet", "bn", 16, 8)
    for part in ("encoder", "projector"):
        for x, y in zip(byol.target.get_submodule(part).parameters(), byol.get_submodule(part).parameters()):
            assert torch.equal(x, y)
    before = byol.target.encoder.bn1.running_mean.clone()
    byol.encoder.bn1.running_mean += 7
    byol.update_target(0.75)
    assert torch.equal(byol.target.encoder.bn1.running_mean, before)
