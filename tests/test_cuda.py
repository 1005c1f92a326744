"""What a step, the judges and the files do on a GPU, as far as a machine without one can see: tests/pretend_cuda.py."""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from conftest import random
from pretend_cuda import CUDA, OnCuda, PretendCuda
from torch import nn

import data
import models
from harness import measure, state
from harness.settings import TERMS
from knn_eval import nearest_neighbours
from lib import augment, norms
from linear_eval import feature_batches
from pretrain import Lars, Training, parameter_groups, train_micro_batch
from regularizers import mhe

VIEW = {"size": 32, "crop": 0.875, "mean": (0.5, 0.5, 0.5), "std": (0.25, 0.25, 0.25)}
CASES = [(method, "mhe", 1) for method in models.METHODS]  # with the micro-batches of a step
CASES += [("byol", "none", 1), ("byol", "uniform", 1), ("byol", "amhe", 2)]
CASES += [("byol", "ortho", 2), ("byol", "koleo", 1), ("byol", "sigreg", 1)]
BATCH = 4


class Accelerator(SimpleNamespace):
    """What a stage asks of Accelerate, for one process on the pretended device."""

    def __init__(self):
        super().__init__(device=CUDA, num_processes=1, process_index=0, is_main_process=True, scaler=None)
        self.sync_gradients, self.optimizer_step_was_skipped = True, False
        self.accumulate = lambda network: contextlib.nullcontext()
        self.backward = lambda loss: loss.backward()
        self.gather = lambda x: x


@pytest.fixture(autouse=True)
def no_kept_tensors():
    """What `normalise` keeps for cuda:0 is of the real device before a test, if there is one, and pretended after."""
    augment._per_channel.cache_clear()
    yield
    augment._per_channel.cache_clear()


def images(n=2 * BATCH, size=32):
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (n, 3, size, size), dtype=torch.uint8, generator=generator)
    return data.Split(pixels, torch.arange(n) % 3)


def on_cuda(split):
    return data.Split(split.images.to("cuda:0"), split.labels.to("cuda:0"))


def training_of(method="byol", reg="none", model="test_resnet", stem="imagenet", hidden_dim=32):
    """What a step works with, on the pretended device."""
    torch.manual_seed(0)
    network = models.METHODS[method].network(model, stem, "bn", hidden_dim, 16, queue=8).to("cuda:0")
    optimizer = Lars(parameter_groups(network, 1e-6), momentum=0.9, trust_coeff=1e-3)
    parts = ["projector", "predictor"] if network.has_predictor else ["projector"]
    cfg = SimpleNamespace(method=method, reg=reg, term=TERMS[reg], s=2, weight=1.0, temperature=0.5, accumulate=1)
    cfg.seed, cfg.blur_p, cfg.jitter, cfg.grey = 0, (0.5, 0.5), 1.0, 0.2
    dataset = SimpleNamespace(mean=VIEW["mean"], std=VIEW["std"], solarise_p=(0.0, 0.2))
    layers = models.neurons(network, parts)
    return Training(cfg, dataset, Accelerator(), network, network, optimizer, layers)


def batches_on_cuda(**flags):
    return data.batches(on_cuda(images()), 32, BATCH, seed=0, steps=range(len(images().labels) // BATCH), **flags)


def test_the_instrument_counts_waits_and_launches_and_refuses_two_devices():
    with PretendCuda() as seen:
        x = torch.rand(4, 3, device="cuda:0")
        total = (x @ x.T)[:2].sum()
        assert x.device == total.device == CUDA and not seen.waits
        assert seen.launches == {"rand": 1, "mm": 1, "sum": 1}  # slices and transposes are views
        torch.ones(3).to("cuda:0", non_blocking=True)
        assert not seen.waits
        waiting = [total.item, total.cpu, lambda: bool(total), lambda: x[x > 0.5], lambda: torch.ones(3).to("cuda:0")]
        for n, wait in enumerate(waiting, 1):
            wait()
            assert sum(seen.waits.values()) == n, seen.waits
        with pytest.raises(RuntimeError, match=r"test_cuda.py:\d+: tensors on cuda:0 and on the cpu"):
            x + torch.rand(3)
    assert all("at test_cuda.py:" in place for place in seen.waits)


@pytest.mark.parametrize("size", [32, 224])
def test_batches_and_views_wait_for_nothing_and_are_those_of_a_cpu(size):
    blur_p, solarise_p = (1.0, 0.1), (0.0, 0.5)
    crops, _, u = next(data.batches(images(size=size), size, 8, seed=0, steps=[0]))
    expected = data.two_views(crops, u, VIEW["mean"], VIEW["std"], blur_p, solarise_p)
    with PretendCuda() as seen:
        split = on_cuda(images(size=size))
        seen.waits.clear()
        crops, labels, u = next(data.batches(split, size, 8, seed=0, steps=[0]))
        views = data.two_views(crops, u, VIEW["mean"], VIEW["std"], blur_p, solarise_p)
        assert labels.device == CUDA and not seen.waits
        for view, same in zip(views, expected):
            torch.testing.assert_close(view.cpu(), same, rtol=0, atol=1e-6)


@pytest.mark.parametrize("method, reg, micro_batches", CASES)
def test_a_step_waits_for_its_energies_alone(method, reg, micro_batches):
    """Once, with its last micro-batch."""
    with PretendCuda() as seen:
        training = training_of(method, reg)
        training.cfg.accumulate = micro_batches
        batches = enumerate(batches_on_cuda(micro_batches=micro_batches), 1)
        seen.waits.clear()
        for n, (crops, _, u) in batches:
            training.accelerator.sync_gradients = n % micro_batches == 0
            terms = train_micro_batch(training, crops, u, lr=0.1, tau=0.99, step=0)
            assert all(isinstance(x, OnCuda) for x in terms.values())
            assert ("energy" in terms) == (TERMS[reg] == "energy" and n % micro_batches == 0)
        assert n == 2 * micro_batches
        assert sum(seen.waits.values()) == (2 if TERMS[reg] == "energy" else 0), seen.waits  # of two steps


@pytest.mark.parametrize("shape", [(8, 4), (8, 4, 5, 5)])
def test_the_norm_of_several_processes_waits_for_nothing(shape, monkeypatch):
    """Two with the same images have the numbers of one. CUDA's backward wants statistics that the CPU's does not."""
    x, grad = (random(*shape, seed=seed) for seed in (0, 1))
    results = {}
    for world in (1, 2):
        norm = models.ViewNorm(4)
        monkeypatch.setattr(norms.dist, "is_initialized", lambda world=world: world > 1)
        monkeypatch.setattr(norms.dist, "get_world_size", lambda: 2)
        monkeypatch.setattr(norms.dist, "all_reduce", lambda sums: sums.mul_(2))
        with PretendCuda() as seen:
            norm.to("cuda:0")
            ours = x.to("cuda:0").requires_grad_()
            to_backpropagate = grad.to("cuda:0")
            seen.waits.clear()
            y = norm(ours)
            y.backward(to_backpropagate)
            assert not seen.waits
            results[world] = [t.cpu().detach() for t in (y, ours.grad, norm.weight.grad, norm.bias.grad)]
    torch.testing.assert_close(results[2], results[1], rtol=1e-5, atol=1e-5)


def test_a_step_that_the_scaler_skips_leaves_the_target():
    """In fp16. MoCo's queue gets its keys, which would otherwise wait, outside of any checkpoint, for the next step."""
    with PretendCuda():
        training = training_of("moco")
        training.accelerator.optimizer_step_was_skipped = True
        target = [p.cpu().clone() for p in training.network.target.parameters()]
        queue = training.network.queue.cpu().clone()
        for p in training.network.encoder.parameters():
            p.data.add_(1)
        crops, _, u = next(batches_on_cuda())
        train_micro_batch(training, crops, u, lr=0.1, tau=0.5, step=0)
        same = [torch.equal(p.cpu(), q) for p, q in zip(training.network.target.parameters(), target)]
        assert all(same) and training.network.keys == []
        assert not torch.equal(training.network.queue.cpu(), queue)


def test_only_cuda_is_not_waited_for():
    """The memory of a temporary could be taken again before MPS has copied it."""
    asked = {}

    class Asking(SimpleNamespace):
        def to(self, device, non_blocking):
            asked[device.type] = non_blocking

    for device in ("cpu", "mps", "cuda"):
        augment.to_device(Asking(), torch.device(device))
    assert asked == {"cpu": False, "mps": False, "cuda": True}


def test_a_step_of_resnet18_has_few_launches():
    """The bound may only fall."""
    with PretendCuda() as seen:
        training = training_of(reg="amhe", model="resnet18", stem="cifar", hidden_dim=64)
        batches = batches_on_cuda()
        for _ in range(2):  # the first step of an optimizer does more
            seen.launches.clear()
            crops, _, u = next(batches)
            train_micro_batch(training, crops, u, lr=0.1, tau=0.99, step=0)
    assert sum(seen.launches.values()) <= 1013, seen.launches.most_common(20)


def test_the_energy_of_a_wide_layer_takes_few_products():
    """The 4,096 neurons of Section 3.6 in blocks of a GPU, with the value that a CPU gets from smaller ones."""
    weight = random(4096, 64)
    with PretendCuda() as seen:
        energy = mhe(weight.to("cuda:0"))
        assert 0 < seen.launches["mm"] <= 10, seen.launches
        assert energy.item() == pytest.approx(mhe(weight).item(), rel=1e-6)


def test_judges_and_measurements_stay_on_the_device():
    with PretendCuda():
        encoder = models.build_encoder("test_resnet", "imagenet").to("cuda:0")
        split = on_cuda(images(24))
        accelerator = Accelerator()
        for judged in (encoder, nn.Flatten()):
            scores = nearest_neighbours(judged, split, split, VIEW, k=(1, 5))
            assert scores[1]["top1"] == 100
        assert measure.representations(encoder, split, VIEW)["rank"] >= 1
        dataset = data.Dataset(("a", "b", "c"), split, split, None, 32, "cifar", 0, VIEW["mean"], VIEW["std"])
        assert measure.geometry(encoder, dataset, VIEW, CUDA)["rank"] >= 1
        judged = SimpleNamespace(view=VIEW, accelerator=accelerator, encoder=encoder)
        features, labels = next(feature_batches(judged, split, 1, 8, 0))
        assert features.device == labels.device == CUDA and len(features) == 8


def test_a_state_is_saved_from_the_device_and_restored_to_it():
    with PretendCuda():
        first, second = training_of(reg="mhe"), training_of()
        crops, _, u = next(batches_on_cuda())
        terms = train_micro_batch(first, crops, u, lr=0.1, tau=0.99, step=0)
        tensors = state.captured(first.network, first.optimizer, {"loss": terms["loss"]}, first.accelerator)
        stored = {name: x.detach().cpu() for name, x in tensors.items()}
        again = second.network, second.optimizer
        sums = state.restore(stored, *again, second.accelerator)
        assert sums["loss"].device == CUDA
        copied = state.captured(*again, sums, second.accelerator)
        assert all(torch.equal(x.cpu(), stored[name]) for name, x in copied.items())
