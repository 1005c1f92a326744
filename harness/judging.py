"""What both judges open: an encoder from the file of a run or of another project, and the data it is judged on."""

import contextlib
import functools
import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import data
import models
from harness.checkpoint import load_encoder
from harness.foreign import adopt
from lib import pictures, processes
from lib.errors import InputError
from lib.files import weights_file
from lib.log import contents, log_of, other_data, same_place
from lib.sources import IN_DATA_DIR, MAKERS, Channels, has_no_data_dir, has_no_files

FOREIGN_FLAGS = ("stem", "prefix", "mean", "std")  # of a file of another project alone: a run's file says all this
DEFAULT_DATA_DIR = "data"
ASSUMED = {  # of the encoder in a file of another project, by its stem
    "cifar": "its 3x3 stem has stride 1, padding 1 and no max-pooling",
    "stride2": "its 3x3 stem has stride 2, padding 1 and no max-pooling",
    "imagenet": "its blocks are timm's, with the stride in the 3x3 convolutions",
}


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


def open_judged(accelerator: Accelerator, ckpt: str, flags: dict, without_classes: bool = False) -> Judged:
    """Open what the shared flags of a judge name. InputError for flags, a file or a data set at fault.

    `without_classes` allows a folder of pictures without classes: all are in `train`, and `test` is empty.
    """
    dataset = flags["dataset"]
    refuse_idle_flags(flags)
    pictures.choose_workers(flags["workers"])
    own_view = {name: channels(name, flags[name]) for name in ("mean", "std") if flags[name] is not None}
    encoder, description = open_encoder(ckpt, flags["net"], flags["model"], flags["stem"], dataset, flags["prefix"])
    encoder.to(accelerator.device).requires_grad_(False)
    compute_in_precision(encoder, accelerator)
    settings = description["settings"]
    with processes.first_alone(accelerator):  # it downloads a set, the others find it
        images, view, is_own = open_images(
            description, dataset, flags["data_dir"], flags["skip_broken"], without_classes
        )
    view |= own_view
    if flags["eval_crop"]:
        view["crop"] = flags["eval_crop"]
    name = dataset or settings["dataset"]
    images = data.with_labels(images, flags["labels"])
    columns = {"net": flags["net"], "eval_crop": view["crop"], "trained_epochs": description.get("epoch")}
    columns |= {"dataset": name, "split": "test", "precision": accelerator.mixed_precision}
    if flags["labels"] < 1:
        columns["labels"] = flags["labels"]
    if flags["model"]:
        columns |= foreign_columns(ckpt, settings, view, name, has_mean=flags["mean"] is not None)
    else:
        columns["own_data"] = is_own
    log = log_of(ckpt, description)
    return Judged(accelerator, encoder, settings, name, images, view, columns, log)


# ---- Flags -----------------------------------------------------------------------------------------------------------

Ckpt = Annotated[str, "a run's folder, its ckpt.safetensors or encoder, or with --model a file of another project"]


def shared_flags(
    *,
    dataset: Annotated[str, "as in pretrain.py; None = the one the checkpoint was trained on"] | None = None,
    data_dir: Annotated[str, "as in pretrain.py; None = as in training"] | None = None,
    model: Annotated[str, "any ResNet of timm, for a file of another project; then --dataset is needed"] | None = None,
    stem: Annotated[Literal[*models.STEMS], "of such a file; None = imagenet"] | None = None,
    prefix: Annotated[str, "of such a file: what stands before the encoder's names, if it holds several"] | None = None,
    mean: Annotated[str, "of such a file's input: R,G,B as parts of 1, or one number; None = the set's"] | None = None,
    std: Annotated[str, "likewise; --mean 0 --std 1 changes nothing"] | None = None,
    net: Annotated[Literal["online", "target"], "the network that is judged"] = "online",
    eval_crop: Annotated[float, "> 0", "<= 1", "part of the side the view keeps; None = as in training"] | None = None,
    labels: Annotated[float, "> 0", "<= 1", "part of each class's training images to learn from; a fixed draw"] = 1.0,
    skip_broken: Annotated[bool, "leave out pictures that cannot be read; done in any case if training did"] = False,
    workers: Annotated[int, ">= 0", "processes that read pictures ahead; None = as in pretrain.py"] | None = None,
) -> dict:
    """Return the flags that both judges have, by name; without arguments, their defaults."""
    return dict(locals())


def judge(stage: Callable) -> Callable:
    """Give a stage the shared flags behind its own; it takes them, defaults too, as its last argument, **shared."""
    *own, _ = inspect.signature(stage).parameters.values()
    shared = inspect.signature(shared_flags).parameters.values()
    signature = inspect.Signature([*own, *shared])

    @functools.wraps(stage)
    def with_shared_flags(*places, **given):
        signature.bind(*places, **given)  # TypeError for a flag that there is not
        stage(*places, **(shared_flags() | given))

    with_shared_flags.__signature__ = signature
    return with_shared_flags


def refuse_idle_flags(flags: dict) -> None:
    """Raise InputError for flags that do not go together."""
    model, net = flags["model"], flags["net"]
    for name in FOREIGN_FLAGS:
        if flags[name] is not None and not model:
            raise InputError(f"--{name} {flags[name]}: has no effect without --model")
    if model and not flags["dataset"]:
        raise InputError(f"--model {model}: takes --dataset, too; leave out both for a file of this project")
    if model and net == "target":
        raise InputError(f"--net target: has no effect with --model {model}; --prefix picks one of several encoders")
    for name, other in (("mean", "std"), ("std", "mean")):
        if flags[name] is not None and flags[other] is None:
            raise InputError(f"--{name} {flags[name]}: takes --{other}, too; --mean 0 --std 1 changes nothing")


def channels(flag: str, text: str) -> Channels:
    """Return the numbers for red, green and blue of --mean or --std. InputError for a text that does not say them.

    The type of a flag does not: it takes each number once, and 0.5,0.5,0.5 is common.
    """
    try:
        numbers = [float(part) for part in text.strip("()[] ").split(",")]
    except ValueError:
        numbers = []
    in_range = all(0 <= number <= 1 for number in numbers)  # not true of NaN
    if flag == "std":
        in_range = in_range and all(numbers)
    if len(numbers) not in (1, 3) or not in_range:
        bounds = "0 ... 1" if flag == "mean" else "above 0, up to 1"
        raise InputError(
            f"--{flag} {text}: expected three numbers separated by commas, {bounds}, or one for all channels; numbers "
            "for pixels up to 255 are to be divided by 255"
        )
    return tuple(numbers * 3) if len(numbers) == 1 else tuple(numbers)


# ---- The encoder -----------------------------------------------------------------------------------------------------


def open_encoder(
    ckpt: str,
    net: str = "online",
    model: str | None = None,
    stem: str | None = None,
    dataset: str | None = None,
    prefix: str | None = None,
) -> tuple[nn.Module, dict]:
    """Load the encoder of a run's file or, with `model`, of a file of another project, and its description.

    A folder will do for the file in it: see `files.weights_file`. The description of another project's file has
    settings alone. InputError as from `load_encoder` and `adopt`.
    """
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
    architecture = [judged.settings[name] for name in ("model", "stem", "norm")]
    encoder = models.build_encoder(*architecture).to(judged.accelerator.device)
    compute_in_precision(encoder, judged.accelerator)
    return encoder


@contextlib.contextmanager
def unchanged(encoder: nn.Module) -> Iterator[None]:
    """Raise RuntimeError if what is done in the block changes an encoder."""
    before = {name: x.clone() for name, x in encoder.state_dict().items()}
    yield
    for name, x in encoder.state_dict().items():
        if not torch.equal(x, before[name]):
            raise RuntimeError(f"the frozen encoder has changed: {name}")


def compute_in_precision(encoder: nn.Module, accelerator: Accelerator) -> None:
    """Have an encoder compute in the launcher's --mixed_precision; the judges take its features as fp32 from there."""
    encoder.forward = accelerator.autocast()(encoder.forward)


def foreign_columns(ckpt: str, settings: dict, view: dict, dataset: str, has_mean: bool) -> dict:
    """Return the columns of rows about a file of another project; say what its tensors cannot show and is assumed."""
    assumed = []
    if settings["model"] != "alexnet":
        assumed.append(ASSUMED[settings["stem"]])
    if not has_mean:
        assumed.append(f"its input was normalised by mean and std of {dataset}; --mean and --std say otherwise")
    if assumed:
        processes.say(f"{ckpt}: assumed, as tensors do not show it: {'; '.join(assumed)}")
    columns = {name: settings[name] for name in ("model", "stem", "prefix")}
    columns |= {"mean": list(view["mean"]), "std": list(view["std"]), "assumed": assumed}
    return columns


# ---- The images ------------------------------------------------------------------------------------------------------


def open_images(
    description: dict, dataset: str | None, data_dir: str | None, skip_broken: bool, without_classes: bool = False
) -> tuple[data.Dataset, dict, bool]:
    """Load the data set that an encoder is judged on and make its evaluation view; None = as in training.

    Also tells whether it holds what the training's did, wherever it lies. A description without a view, of another
    project's file, gets the data set's own. InputError as from `data.load`.
    """
    settings = description["settings"]
    name = dataset or settings["dataset"]
    if data_dir and has_no_data_dir(name):
        raise InputError(f"--data_dir {data_dir}: has no effect with --dataset {name}")
    if skip_broken and has_no_files(name):
        raise InputError(f"--skip_broken: has no effect with --dataset {name}")
    pretraining = without_classes and name not in data.FACTS  # of a named set it would read more images
    skip_broken = skip_broken or settings.get("skip_broken", False)
    try:
        images = data.load(name, data_dir or place_of(name, settings["data_dir"]), pretraining, skip_broken)
    except InputError as e:
        if dataset:
            raise
        flag = "data_dir" if name in IN_DATA_DIR else "dataset"
        hint = f"the checkpoint was trained on it; --{flag} says where it is now"
        raise InputError(f"{e}; {hint}") from e
    own_view = images.view(data.EVAL_CROP)
    view = dict(description.get("view") or own_view)
    found = {"settings": {**settings, "dataset": name}, "view": own_view, "data": contents(images)}
    faults = other_data(found, description)
    if faults and not dataset:
        processes.say(
            f"dataset {name}: not the images of the training: {', '.join(faults)}; mean and std of those are used"
        )
    if dataset and not faults and not same_place(dataset, settings["dataset"]):
        processes.say(f"dataset {dataset}: holds what the training had in {settings['dataset']}")
    return images, view, not faults


def place_of(name: str, recorded: str) -> str:
    """Return where to look for a data set that no flag places: where a file says it was, if the set is there.

    A set that is not there is downloaded, and a file of a stranger must not say where to: that is the flag's, or the
    default. Sets that are never downloaded are looked for where the file says.
    """
    if name not in MAKERS or Path(recorded) == Path(DEFAULT_DATA_DIR):
        return recorded
    try:
        MAKERS[name](recorded)  # checks the sums of all files, and downloads nothing
    except (OSError, RuntimeError):
        pass
    else:
        return recorded
    processes.say(f"dataset {name}: not in {recorded}, where the checkpoint's was; taken from {DEFAULT_DATA_DIR}")
    return DEFAULT_DATA_DIR


# ---- Scores ----------------------------------------------------------------------------------------------------------


@torch.no_grad()
def rank_of(truth: Tensor, scores: Tensor) -> Tensor:
    """Ranks from 0 (n,) of the true classes (n,) by scores (n, classes); of equal scores the lower class comes first.

    A true class whose score is -inf or NaN is a miss: its rank is 5 or more.
    """
    classes = scores.shape[1]
    index = torch.arange(classes, device=scores.device)
    score = scores.gather(1, truth[:, None])
    is_tied_before = (scores == score) & (index < truth[:, None])
    rank = ((scores > score) | is_tied_before).sum(1)
    is_scored = score[:, 0] > -math.inf
    return rank.masked_fill(~is_scored, max(classes, 5))


def accuracy(ranks: Tensor, labels: Tensor) -> dict[str, float]:
    """Percent, to 4 digits, of the images whose true class, of `labels` (n,), has rank 0, or is among the first five.

    "balanced" is the mean over classes of the first; classes without an image do not count. Counted in whole numbers,
    as mps has no float64.
    """
    n = len(labels)
    first, among_five = ((ranks < places).sum().item() for places in (1, 5))
    counts = labels.bincount().tolist()
    first_by_class = labels[ranks < 1].bincount(minlength=len(counts)).tolist()
    recalls = [right / count for right, count in zip(first_by_class, counts) if count]
    parts = {"top1": first / n, "top5": among_five / n, "balanced": fmean(recalls)}
    return {name: round(100 * part, 4) for name, part in parts.items()}


def note_divergence(rate: float, epoch: int, of_rates: int, all_diverged: bool) -> None:
    """Say that the classifier of one of some rates has diverged. InputError if all have."""
    fault = f"the loss is not finite after epoch {epoch}"
    if of_rates == 1:
        raise InputError(f"--lr {rate}: {fault}; take a smaller one")
    processes.say(f"--sweep: rate {rate}: {fault}; the sweep goes on without it")
    if all_diverged:
        raise InputError("--sweep: the loss of none of its rates is finite; take a smaller rate by --lr in its place")
