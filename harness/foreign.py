"""Encoders in the files of other projects, and the weights that --init names, from which a run begins.

    encoder, prefix = adopt("moco_v2_800ep_pretrain.pth.tar", "resnet50", "imagenet", "encoder_q")

An encoder has timm's names, or torchvision's for a ResNet, wherever they lie in the file; what stands before them is
its prefix, as `state_dict.module.encoder_q.`. Where it is a torch.nn.Sequential of a ResNet's children, numbers stand
for their names: 0 for conv1, 1 for bn1, 4 for layer1.
"""

import os
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from textwrap import shorten

import torch
from torch import Tensor, nn

import models
from harness import checkpoint
from lib import processes
from lib.errors import InputError
from lib.files import weights_file
from lib.tensors import read_tensors

Tensors = dict[str, Tensor]


def adopt(path: str | Path, model: str, stem: str, prefix: str | None = None) -> tuple[nn.Module, str]:
    """Load the encoder in a file of another project, in evaluation mode, and return it with its prefix.

    InputError if the file is one of ours, holds no such encoder, or several, unless a part of `prefix` picks one.
    """
    if checkpoint.description_of(path):
        raise InputError(f"{path}: --model {model} has no effect, the file says what it is")
    tensors = read_tensors(path)
    copies = find_copies(tensors, model, [stem], path)
    prefix = choose(copies, prefix, f"{path}: holds {model}")
    copy = copies[prefix]
    encoder = models.build_encoder(model, stem)
    encoder.load_state_dict(copy, strict=False)  # old files lack BatchNorm's counters
    used = {id(x) for x in copy.values()}
    others = [name for name, x in tensors.items() if id(x) not in used]
    left_out = shorten(", ".join(others) or "nothing", 100, placeholder=" ...")
    matched = f"{len(copy)} tensors of {model} under {prefix or 'no prefix'}; left out: {left_out}"
    processes.say(f"{path}: {matched}; it has no digest, so it is unchecked")
    return encoder.eval(), prefix


def find_copies(tensors: Tensors, model: str, stems: Iterable[str], path: str | Path) -> dict[str, Tensors]:
    """Return the copies of an encoder in a file, by prefix, with the first stem that fits. InputError if none does."""
    for stem in stems:
        with torch.device("meta"):
            wanted = models.build_encoder(model, stem).state_dict()
        parts = by_prefix(tensors, wanted)
        copies = {prefix: part for prefix, part in parts.items() if not misfit(part, wanted)}
        if copies:
            return copies
    fullest = max(parts.values(), key=len, default={})
    fault = f"does not hold {model} with the {stem} stem, {misfit(fullest, wanted)}"
    raise InputError(f"{path}: {fault}; name the --model and --stem that it was trained with")


def by_prefix(tensors: Tensors, wanted: Tensors) -> dict[str, Tensors]:
    """Return, by prefix, the tensors whose names go on with a child of the encoder, or with a number in its place."""
    children = list(dict.fromkeys(name.partition(".")[0] for name in wanted))
    parts = defaultdict(dict)
    for name, x in tensors.items():
        words = name.split(".")
        for i, word in enumerate(words):
            if word in children or word.isdecimal():
                prefix = ".".join([*words[:i], ""])
                parts[prefix][tuple(words[i:])] = x
    for prefix, part in parts.items():
        numbers = sorted({word for word, *_ in part if word.isdecimal()}, key=int)
        child_of = dict(zip(children, children)) | dict(zip(numbers, children))
        parts[prefix] = {".".join([child_of[word], *rest]): x for (word, *rest), x in part.items() if word in child_of}
    return parts


def misfit(part: Tensors, wanted: Tensors) -> str:
    """Name the first tensor that is not as the encoder has it; nothing if all are. BatchNorm's counters may differ."""
    found, needed = ({name: in_short(x) for name, x in tensors.items() if x.ndim} for tensors in (part, wanted))
    for name in [*needed, *found]:
        if found.get(name) != needed.get(name):
            return f"{name} is {found.get(name, 'absent')} in the file, {needed.get(name, 'absent')} in the encoder"
    return ""


def in_short(x: Tensor) -> str:
    """Describe a tensor by its shape; one of whole numbers, which is no weight, by its type."""
    return str(tuple(x.shape) if x.is_floating_point() else x.dtype)


def choose(copies: dict[str, Tensors], prefix: str | None, holds: str) -> str:
    """Return the prefix of the copy that --prefix means; a dot means none. InputError if there is none, or several."""
    asked = prefix and prefix.strip(".")
    whole = [copy for copy in copies if copy.strip(".") == asked]
    found = whole or [copy for copy in copies if prefix is None or f".{asked}." in f".{copy}"]
    if len(found) != 1:
        listed = ", ".join(copy or "." for copy in copies)
        typed = f"--prefix {prefix}: " if prefix else ""
        raise InputError(f"{typed}{holds} under {listed}; --prefix takes one of these")
    return found[0]


# ---- The weights that a run begins from ------------------------------------------------------------------------------
def refuse_unfit_weights(flags: dict) -> None:
    """Raise InputError for weights that are not there, cannot be read, or are of another encoder than the run's.

    Without --stem the data set decides the stem, and is not read yet: then a file that fits with any stem will do.
    """
    path = weights_file(os.path.expanduser(flags["init"]))
    if not os.path.exists(path):
        raise InputError(f"--init {flags['init']}: no such file")
    description = checkpoint.description_of(path)
    if description:
        refuse_other_encoder(path, description, flags)
    elif flags["norm"] == "none":
        raise InputError(f"--norm none: {path} is of another project, whose encoders have BatchNorm; take --norm bn")
    else:
        find_copies(read_tensors(path), flags["model"], [flags["stem"]] if flags["stem"] else models.STEMS, path)


def refuse_other_encoder(path: str | Path, description: dict, of_run: dict) -> None:
    """Raise InputError if a file of this project holds no encoder, or another than a run with these settings has."""
    if of_run["prefix"]:
        raise InputError(f"--prefix {of_run['prefix']}: has no effect on {path}, which is of a run")
    if description.get("holds") not in ("encoder", "checkpoint"):
        raise InputError(f"--init {path}: holds {description.get('holds')}, not an encoder")
    names = ("model", "norm") if of_run["model"] == "alexnet" else ("model", "stem", "norm")
    settings = description.get("settings", {})
    needed = [f"--{name} {settings.get(name)}" for name in names if of_run[name] not in (None, settings.get(name))]
    if needed:
        raise InputError(f"--init {path}: its encoder needs {' '.join(needed)}")


def begin_from(cfg, network: nn.Module) -> str | None:
    """Copy the weights that --init names to a network's encoder, and to its target's; return a digest.

    None if their file is gone: a run that goes on has its own. InputError for a file without such an encoder.
    """
    path = weights_file(os.path.expanduser(cfg.init))
    if not os.path.exists(path):
        return None
    if checkpoint.description_of(path):
        encoder, description = checkpoint.load_encoder(path)
        refuse_other_encoder(path, description, vars(cfg))
    else:
        encoder, _ = adopt(path, cfg.model, cfg.stem, cfg.prefix)
    weights = encoder.state_dict()
    network.encoder.load_state_dict(weights)
    if hasattr(network, "target"):
        network.target.encoder.load_state_dict(weights)
    return checkpoint.digest(weights, {})[:16]  # enough to tell files apart
