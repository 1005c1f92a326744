"""What both judges share: an encoder from a file of any project, the data it is judged on, and its features of them."""

import math
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import data
import models
from harness.checkpoint import build_described, load_encoder
from harness.foreign import adopt
from lib import encoders, processes
from lib.errors import InputError
from lib.files import weights_file
from lib.log import contents, is_main, log_of, other_data
from lib.sources import IN_DATA_DIR, MAKERS, WITHOUT_FILES, Channels, has_no_data_dir

DEFAULT_DATA_DIR = "data"
Ckpt = Annotated[str, "a run's folder, its ckpt.safetensors or encoder, or with --model a file of another project"]


@dataclass(frozen=True)
class Judged:
    """An encoder that is judged, on its device and in evaluation mode, and what it is judged on."""

    accelerator: Accelerator
    encoder: nn.Module
    settings: dict  # those of the run that trained it
    dataset: str
    images: data.Dataset
    view: dict  # of the evaluation, see data.evaluation_views
    columns: dict  # of each row of scores: what was judged, and how
    log: Path | None  # of the run whose folder the file lies in


def shared_flags(
    *,
    dataset: Annotated[str, "as in pretrain.py; None = the one the checkpoint was trained on"] | None = None,
    data_dir: Annotated[str, "as in pretrain.py; None = as in training"] | None = None,
    model: Annotated[str, "ResNet or ViT of timm, for another project's file; then --dataset is needed"] | None = None,
    stem: Annotated[Literal[tuple(models.STEMS)], "of such a file; None = imagenet"] | None = None,
    prefix: Annotated[str, "of such a file: what stands before the encoder's names, if it holds several"] | None = None,
    mean: Annotated[str, "of such a file's input: R,G,B as parts of 1, or one number; None = the set's"] | None = None,
    std: Annotated[str, "likewise; --mean 0 --std 1 changes nothing"] | None = None,
    net: Annotated[Literal["online", "target"], "the network that is judged"] = "online",
    eval_crop: Annotated[float, "> 0", "<= 1", "part of the side the view keeps; None = as in training"] | None = None,
    labels: Annotated[float, "> 0", "<= 1", "part of each class's training images to learn from; a fixed draw"] = 1.0,
    skip_broken: Annotated[bool, "leave out pictures that cannot be read; done in any case if training did"] = False,
    workers: Annotated[int, ">= 0", "processes that read pictures ahead; None = as in pretrain.py"] | None = None,
    json: Annotated[bool, "rows as in the log on a terminal, too, where a table is printed for people"] = False,
) -> dict:
    """Return the flags that both judges have, by name, those that are not given with their defaults."""
    return dict(locals())


def open_judged(accelerator: Accelerator, ckpt: str, shared: dict, without_classes: bool = False) -> Judged:
    """Open what the shared flags of a judge name, if given. InputError for flags, a file or a data set at fault.

    `without_classes` allows a folder of pictures without classes: all are in `train`, and `test` is empty.
    """
    flags = shared_flags(**shared)
    refuse_unjudged_flags(flags)
    own_view = {name: channels(name, flags[name]) for name in ("mean", "std") if flags[name] is not None}
    of_encoder = {name: flags[name] for name in ("net", "model", "stem", "dataset", "prefix")}
    encoder, description = open_encoder(ckpt, **of_encoder)
    encoder.to(accelerator.device).requires_grad_(False)
    encoder.forward = accelerator.autocast()(encoder.forward)  # the launcher's --mixed_precision
    settings = description["settings"]
    dataset = flags["dataset"] or settings["dataset"]
    with processes.first_alone(accelerator):  # it downloads a set, the others find it
        of_images = {name: flags[name] for name in ("dataset", "data_dir", "skip_broken", "workers")}
        images = open_images(description, **of_images, without_classes=without_classes)

    view = images.view(data.EVAL_CROP)
    differences = other_data({"view": view, "data": contents(images)}, description)
    if differences and not flags["dataset"]:
        fault = f"not the images of the training: {', '.join(differences)}; mean and std of those are used"
        processes.say(f"dataset {dataset}: {fault}")
    view |= description.get("view", {})
    view |= own_view
    view["crop"] = flags["eval_crop"] or view["crop"]
    encoders.refuse_unfit_views(encoder, view["size"])

    columns = {"net": flags["net"], "eval_crop": view["crop"], "trained_epochs": description.get("epoch")}
    columns |= {"dataset": dataset, "split": "test", "precision": accelerator.mixed_precision}
    if flags["labels"] < 1:
        columns["labels"] = flags["labels"]
        images = with_labels(images, flags["labels"])
    if flags["model"]:
        columns |= {name: settings[name] for name in ("model", "stem", "prefix")}
        columns |= {"mean": list(view["mean"]), "std": list(view["std"])}
        assumed = f"the strides of --stem {settings['stem']}, and mean {view['mean']} and std {view['std']}"
        processes.say(f"{ckpt}: assumed, as tensors do not show it: {assumed} of its input")
    else:
        columns["own_data"] = not differences
    return Judged(accelerator, encoder, settings, dataset, images, view, columns, log_of(ckpt, description))


def refuse_unjudged_flags(flags: dict) -> None:
    """Raise InputError for flags that do not go together."""
    model = flags["model"]
    for name in ("stem", "prefix", "mean", "std"):
        if flags[name] is not None and not model:
            raise InputError(f"--{name} {flags[name]}: has no effect without --model")
    if model and not flags["dataset"]:
        raise InputError(f"--model {model}: takes --dataset, too; leave out both for a file of this project")
    if model and flags["net"] == "target":
        raise InputError(f"--net target: has no effect with --model {model}; --prefix picks one of several encoders")
    mean, std = flags["mean"], flags["std"]
    if (mean is None) != (std is None):
        raise InputError(f"--mean {mean} --std {std}: give both, or neither; --mean 0 --std 1 changes nothing")


def channels(flag: str, text: str) -> Channels:
    """Return the numbers for red, green and blue of --mean or --std. InputError for a text that does not say them."""
    try:
        numbers = [float(part) for part in text.split(",")]
    except ValueError:
        numbers = []
    lowest, bounds = (0, "0 ... 1") if flag == "mean" else (1e-6, "above 0, up to 1")
    if len(numbers) not in (1, 3) or not all(lowest <= number <= 1 for number in numbers):
        expected = f"expected three numbers separated by commas, {bounds}, or one for all channels"
        raise InputError(f"--{flag} {text}: {expected}; numbers for pixels up to 255 are to be divided by 255")
    return tuple(numbers * 3)[:3]


def open_encoder(ckpt: str, net="online", model=None, stem=None, dataset=None, prefix=None) -> tuple[nn.Module, dict]:
    """Load the encoder of a run's file or folder or, with `model`, of another project's file, and its description."""
    ckpt = weights_file(ckpt)
    if not model:
        return load_encoder(ckpt, net)
    stem = stem or "imagenet"
    encoder, prefix = adopt(ckpt, model, stem, prefix)
    settings = {"dataset": dataset, "data_dir": DEFAULT_DATA_DIR, "seed": 0, "skip_broken": False}
    settings |= {"model": model, "stem": stem, "norm": "bn", "prefix": prefix}
    return encoder, {"settings": settings}


def untrained_encoder(judged: Judged) -> nn.Module:
    """Build the encoder that the run had before its first step, or would have had without --init."""
    torch.manual_seed(judged.settings["seed"])
    encoder = build_described("encoder", judged.settings).to(judged.accelerator.device)
    encoder.forward = judged.accelerator.autocast()(encoder.forward)
    return encoder


def embedded(encoder: nn.Module, split: data.Split, view: dict, name: str | None = None) -> Tensor:
    """Embed the evaluation views of a split, (n, d), which all processes divide; with a name, under a bar of it."""
    views = data.evaluation_views(processes.own_share(split), **view)
    bar = tqdm(views, desc=name, unit="batch", disable=None if name and is_main() else True)
    return processes.gather(models.embed(encoder, bar))[: len(split.labels)]


def open_images(
    description: dict, dataset: str | None, data_dir: str | None, skip_broken: bool, workers=None, without_classes=False
) -> data.Dataset:
    """Load the data set that an encoder is judged on; None = as in training. InputError as from `data.load`."""
    settings = description["settings"]
    name = dataset or settings["dataset"]
    if data_dir and has_no_data_dir(name):
        raise InputError(f"--data_dir {data_dir}: has no effect with --dataset {name}")
    if skip_broken and name in WITHOUT_FILES:
        raise InputError(f"--skip_broken: has no effect with --dataset {name}")
    place = data_dir or place_of(name, settings["data_dir"])
    pretraining = without_classes and name not in data.FACTS  # of a named set it would read more images
    try:
        return data.load(name, place, pretraining, skip_broken or settings.get("skip_broken", False), workers)
    except InputError as e:
        if dataset:
            raise
        flag = "data_dir" if name in IN_DATA_DIR else "dataset"
        raise InputError(f"{e}; the checkpoint was trained on it; --{flag} says where it is now") from e


def with_labels(dataset: data.Dataset, part: float) -> data.Dataset:
    """Keep this part of each class's training images and hold-out, a fixed draw; InputError if a class keeps none."""
    if not dataset.classes:
        raise InputError(f"--labels {part:g}: the pictures have no classes")
    labels = dataset.train.labels
    counts = labels.bincount()
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    kept, _ = data.divided_classes(labels, order, part * counts.double())
    enough = math.ceil(1e4 / int(counts.min())) / 1e4  # rounded up, so that the number that is printed is enough
    train = data.rows_to_learn_from(dataset, kept, f"--labels {part:g}", f"{enough:g} keeps one of each class")
    per_class = dataset.holdout or data.IMAGENET_HOLDOUT / len(dataset.classes)
    return replace(dataset, train=train, holdout=part * per_class)


def place_of(name: str, recorded: str) -> str:
    """Return where to look for a data set that no flag places: where a file of weights says, if it is there."""
    if name not in MAKERS or Path(recorded, MAKERS[name].base_folder).is_dir():
        return recorded
    return DEFAULT_DATA_DIR  # it is downloaded, and a file of a stranger must not say where to


@torch.no_grad()
def rank_of(truth: Tensor, scores: Tensor) -> Tensor:
    """Ranks from 0 (n,) of the true classes (n,) by scores (n, classes); of equal scores the lower class comes first.

    A class without a score, -inf or NaN, is a miss: its rank is 5 or more, however few classes there are.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ranks = (order == truth[:, None]).int().argmax(1)
    is_scored = scores.gather(1, truth[:, None])[:, 0] > -math.inf
    return ranks.masked_fill(~is_scored, max(scores.shape[1], 5))


def accuracy(ranks: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent, to 4 digits, of the images whose true class, of `labels` (n,), has rank 0, or is among the first five.

    "balanced" is the mean of the first over classes with images. Counted in whole numbers: mps has no float64.
    """
    n = len(labels)
    first, among_five = ((ranks < places).sum().item() for places in (1, 5))
    counts = labels.bincount().tolist()
    first_by_class = labels[ranks < 1].bincount(minlength=len(counts)).tolist()
    recalls = [right / count for right, count in zip(first_by_class, counts) if count]
    parts = {"top1": first / n, "top5": among_five / n, "balanced": fmean(recalls)}
    return {name: round(100 * part, 4) for name, part in parts.items()}
