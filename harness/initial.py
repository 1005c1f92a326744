"""What --init names: released weights from which the encoder of a run begins, and the target's with it.

    refuse_unfit_weights(flags)  # before the data set is read
    encoder = initial_encoder(cfg)
    digest = initial_digest(encoder, cfg, stored)
    begin_from(encoder, network)

The file is one of a run, or of another project in any layout that the judges read. Its encoder has to be that of the
run's --model, --stem and --norm. A digest of its tensors is a setting of the run, whatever file they lie in; a run that
goes on has its weights in its own checkpoint, so its file may be gone by then.
"""

import os

import torch
from torch import nn

import models
from harness import checkpoint
from harness.foreign import adopt, complete_copies
from lib.errors import InputError
from lib.files import weights_file
from lib.tensors import read_tensors

DIGITS = 16  # of a digest of 64, enough to tell files from each other


def refuse_unfit_weights(flags: dict) -> None:
    """Raise InputError for weights that are not there, cannot be read, or are of another encoder.

    Without --stem the data set decides the stem, and is not read yet: then a file that fits with any stem will do.
    """
    place = os.path.expanduser(flags["init"])
    if not os.path.exists(place):
        raise InputError(f"--init {flags['init']}: no such file")
    path = weights_file(place)
    try:
        tensors, header = read_tensors(path)
    except InputError as e:
        raise InputError(f"--init: {e}") from e
    if checkpoint.described(header):
        description = checkpoint.described(header)
        if description.get("holds") not in ("encoder", "checkpoint"):
            raise InputError(f"--init {flags['init']}: holds {description.get('holds')}, not an encoder")
        settings = description.get("settings", {})
        return refuse_other_encoder(path, settings, flags)
    if flags["norm"] == "none":
        raise InputError(f"--norm none: {path} is of another project, whose encoders have BatchNorm; take --norm bn")
    stems = [flags["stem"]] if flags["stem"] else ["imagenet", *models.STEMS]
    for stem in stems:
        with torch.device("meta"):
            wanted = models.build_encoder(flags["model"], stem).state_dict()
        if complete_copies(tensors, wanted):
            return None
    adopt(path, flags["model"], stems[0], flags["prefix"])  # raises InputError, with what the file holds in place of it


def refuse_other_encoder(path: str, of_file: dict, of_run: dict) -> None:
    """Raise InputError if a run's file, with these settings, is not of the encoder of another run."""
    if of_run["prefix"]:
        raise InputError(f"--prefix {of_run['prefix']}: has no effect on {path}, which is of a run")
    needed, given = [], []
    for name in ("model", "stem", "norm"):
        is_open = of_run[name] is None or (name == "stem" and of_run["model"] == "alexnet")
        if not is_open and of_file.get(name) != of_run[name]:
            needed.append(f"--{name} {of_file.get(name)}")
            given.append(str(of_run[name]))
    if needed:
        raise InputError(f"--init {path}: its encoder needs {' '.join(needed)}; this run has {', '.join(given)}")


def initial_encoder(cfg) -> nn.Module | None:
    """Load the encoder that a run begins from; None without --init, or if its file is gone.

    InputError for a file that does not hold an encoder of the run's architecture, or holds several.
    """
    if not cfg.init or not os.path.exists(os.path.expanduser(cfg.init)):
        return None
    path = weights_file(os.path.expanduser(cfg.init))
    _, header = read_tensors(path)
    if not checkpoint.described(header):
        encoder, _ = adopt(path, cfg.model, cfg.stem, cfg.prefix)
        return encoder
    encoder, description = checkpoint.load_encoder(path)
    refuse_other_encoder(path, description["settings"], vars(cfg))
    return encoder


def begin_from(encoder: nn.Module, network: nn.Module) -> str:
    """Copy an encoder's weights and BatchNorm statistics to a network's encoder, and to its target's if it has one.

    Returns a digest of them.
    """
    weights = encoder.state_dict()
    network.encoder.load_state_dict(weights)
    if hasattr(network, "target"):
        network.target.encoder.load_state_dict(weights)
    return checkpoint.digest(weights, {})[:DIGITS]
