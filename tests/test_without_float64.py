"""What runs on the device makes no float64, which Apple's mps does not have."""

import dataclasses

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import data
import knn_eval
import models
import pretrain
from harness import judging, measure, settings
from lib import nearest, processes


class WithoutFloat64(TorchDispatchMode):
    """Refuses each operation that takes or makes a tensor of float64."""

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        result = operation(*args, **(kwargs or {}))
        for x in tree_leaves((args, kwargs, result)):
            if isinstance(x, torch.Tensor) and x.dtype == torch.float64:
                raise TypeError(f"{operation}: float64")
        return result


def test_a_vote_and_accuracies(monkeypatch):
    """The vote takes this device for Apple's."""
    finest = nearest.finest
    assert finest(torch.device("mps")) == torch.float32 and finest(torch.device("cpu")) == torch.float64
    monkeypatch.setattr(knn_eval, "finest", lambda _: finest(torch.device("mps")))
    with WithoutFloat64(), pytest.raises(TypeError, match="float64"):
        torch.ones(2).double()
    bank, queries = torch.eye(6), torch.eye(6)[:4]
    with WithoutFloat64():
        scores = knn_eval.vote([bank], torch.arange(6), queries, torch.tensor([0, 1, 2, 5]), (1, 6), 0.07)
        labels = torch.tensor([0, 1, 5])
        linear = judging.accuracy(judging.rank_of(labels, bank[:3] - torch.arange(6) / 100), labels)
    three_of_four = {"top1": 75.0, "top5": 75.0, "balanced": 75.0}
    assert scores == {k: three_of_four for k in (1, 6)}  # of equal votes the lower class is first
    assert linear == {"top1": 66.6667, "top5": 66.6667, "balanced": 66.6667}


@pytest.mark.parametrize(
    "flags", [{"reg": "amhe"}, {"reg": "sigreg"}, *({"method": name, "reg": "uniform"} for name in models.METHODS)]
)
def test_a_training_step_and_what_is_measured(photos, monkeypatch, flags):
    monkeypatch.setattr(measure, "effective_rank", lambda _: 1.0)  # on the CPU by its own words
    small = {"model": "test_resnet", "hidden_dim": 32, "out_dim": 16, "batch_size": 16}
    flags = {**pretrain.pretrain.__kwdefaults__, **small, **flags}
    accelerator = processes.start(1)
    values = settings.resolve_recipe(flags, pretrain.RECIPES, 1)
    cfg = settings.resolve_images(values, flags, photos)
    training = pretrain.build(cfg, photos, accelerator)
    crops, _, u = next(data.batches(photos.train, photos.size, 16, seed=0, steps=[0]))
    noise = torch.randint(256, (16, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    split = data.Split(noise, torch.arange(16))
    with WithoutFloat64():
        terms = pretrain.train_micro_batch(training, crops, u, 0.1, 0.99, step=0)
        measure.representations(nn.Flatten(), split, photos.view(0.875))
        measure.geometry(nn.Flatten(), dataclasses.replace(photos, test=split), photos.view(0.875), split.labels.device)
    assert terms["loss"].isfinite()
