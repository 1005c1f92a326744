"""What both judges open: an encoder from the file of a run or of another project, and the data it is judged on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from accelerate import Accelerator
from torch import nn

import data
from harness import processes
from harness.checkpoint import load_encoder
from harness.errors import InputError
from harness.foreign import adopt
from harness.log import log_of

# The flags that both judges have
Ckpt = Annotated[str, "ckpt.safetensors or encoder.safetensors of a run, or with --model a file of another project"]
DatasetName = Annotated[str, "as in pretrain.py; None = the one the checkpoint was trained on"] | None
DataDir = Annotated[str, "as in pretrain.py; None = as in training"] | None
Model = Annotated[str, "any ResNet of timm, for a file of another project; then --dataset is needed"] | None
Stem = Annotated[Literal["cifar", "stride2", "imagenet"], "of such a file; None = imagenet"] | None
Net = Annotated[Literal["online", "target"], "the network that is judged"]
EvalCrop = Annotated[float, "> 0", "<= 1", "part of the side that the view keeps; None = as in training"] | None
SkipBroken = Annotated[bool, "leave out pictures that cannot be read; done in any case if it was done in training"]


@dataclass(frozen=True)
class Judged:
    """An encoder that is judged, on its device and in evaluation mode, and what it is judged on."""

    accelerator: Accelerator
    encoder: nn.Module
    settings: dict  # those of the run that trained it
    trained_epochs: int | None  # epochs that the run had behind it; None for a file of another project
    dataset: str
    images: data.Dataset
    view: dict  # of the evaluation, see data.evaluation_views
    log: Path | None  # of the run whose folder the file lies in


def open_judged(accelerator: Accelerator, flags: dict) -> Judged:
    """Open what the flags of a judge name. InputError for flags, a file or a data set at fault."""
    ckpt, dataset = flags["ckpt"], flags["dataset"]
    encoder, description = open_encoder(ckpt, flags["net"], flags["model"], flags["stem"], dataset)
    encoder.to(accelerator.device).requires_grad_(False)
    settings = description["settings"]
    with accelerator.main_process_first():  # the first process downloads a set, the others find it
        images, view = open_images(description, dataset, flags["data_dir"], flags["skip_broken"])
    if flags["eval_crop"]:
        view["crop"] = flags["eval_crop"]
    name = dataset or settings["dataset"]
    log = log_of(ckpt, settings)
    return Judged(accelerator, encoder, settings, description.get("epoch"), name, images, view, log)


def open_encoder(
    ckpt: str, net: str = "online", model: str | None = None, stem: str | None = None, dataset: str | None = None
) -> tuple[nn.Module, dict]:
    """Load the encoder of a run's file or, with `model`, of a file of another project, and its description.

    The description of another project's file has settings alone. InputError as from `load_encoder` and `adopt`, and for
    flags that do not go together.
    """
    if not model:
        if stem:
            raise InputError(f"--stem {stem}: has no effect without --model")
        return load_encoder(ckpt, net)
    if not dataset:
        raise InputError(f"--model {model}: takes --dataset, too; the file of another project does not say")
    if net == "target":
        raise InputError(f"--net target: has no effect with --model {model}")
    stem = stem or "imagenet"
    settings = {"dataset": dataset, "data_dir": "data", "seed": 0, "skip_broken": False}
    settings |= {"model": model, "stem": stem, "norm": "bn"}
    return adopt(ckpt, model, stem), {"settings": settings}


def open_images(
    description: dict, dataset: str | None, data_dir: str | None, skip_broken: bool
) -> tuple[data.Dataset, dict]:
    """Load the data set that an encoder is judged on and make its evaluation view; None = as in training.

    A description without a view, of another project's file, gets the data set's own. InputError as from `data.load`.
    """
    settings = description["settings"]
    name = dataset or settings["dataset"]
    skip_broken = skip_broken or settings["skip_broken"]
    try:
        images = data.load(name, data_dir or settings["data_dir"], skip_broken=skip_broken)
    except InputError as e:
        if dataset:
            raise
        hint = "the checkpoint was trained on it; --dataset or --data_dir say where it is now"
        raise InputError(f"{e}; {hint}") from e
    own_view = images.view(data.EVAL_CROP)
    view = dict(description.get("view") or own_view)
    other_images = any(list(view[key]) != list(own_view[key]) for key in ("mean", "std"))
    if other_images and not dataset:
        processes.say(
            f"dataset {name}: not the images of the training: mean and std differ; those of the training are used"
        )
    return images, view
