"""What --init names: released weights from which the encoder of a run begins, and the target's with it.

    encoder = initial_encoder(cfg)
    digest = initial_digest(encoder, cfg, stored)
    begin_from(encoder, network)

The file is one of a run, or of another project in any layout that the judges read. Its encoder has to be that of the
run's --model, --stem and --norm. A digest of its tensors is a setting of the run, whatever file they lie in; a run that
goes on has its weights in its own checkpoint, so its file may be gone by then.
"""

import os

from torch import nn

from harness import checkpoint
from harness.errors import InputError
from harness.files import weights_file
from harness.foreign import adopt
from harness.formats import read_tensors
from harness.log import same_place
from harness.settings import Settings

DIGITS = 16  # of a digest of 64, enough to tell files from each other


def initial_encoder(cfg: Settings) -> nn.Module | None:
    """Load the encoder that a run begins from; None without --init, or if its file is gone.

    InputError for a file that does not hold an encoder of the run's architecture, or holds several.
    """
    if not cfg.init or not os.path.exists(os.path.expanduser(cfg.init)):
        return None
    path = weights_file(os.path.expanduser(cfg.init))
    _, header = read_tensors(path)
    if checkpoint.is_ours(header):
        return _encoder_of_a_run(path, cfg)
    if cfg.norm == "none":
        raise InputError(f"--norm none: {path} is of another project, whose encoders have BatchNorm; take --norm bn")
    encoder, _ = adopt(path, cfg.model, cfg.stem, cfg.prefix)
    return encoder


def _encoder_of_a_run(path: str, cfg: Settings) -> nn.Module:
    """Load the online encoder of a run's file. InputError if it is of another architecture."""
    if cfg.prefix:
        raise InputError(f"--prefix {cfg.prefix}: has no effect on {path}, which is of a run")
    encoder, description = checkpoint.load_encoder(path)
    faults = []
    for name in ("model", "stem", "norm"):
        stored, mine = description["settings"][name], getattr(cfg, name)
        has_effect = name != "stem" or cfg.model != "alexnet"
        if stored != mine and has_effect:
            faults.append(f"--{name} {stored} (this run has {mine})")
    if faults:
        raise InputError(f"--init {path}: its encoder is of {', '.join(faults)}; take these")
    return encoder


def initial_digest(encoder: nn.Module | None, cfg: Settings, stored: dict | None) -> str | None:
    """Return the digest of the encoder that a run begins from, or began from if that file is gone.

    stored: the description of the run's state, if it goes on. InputError for a file that is not there and is not the
    one that the run began from.
    """
    if encoder is not None:
        return checkpoint.digest(encoder.state_dict(), {})[:DIGITS]
    if not cfg.init:
        return None
    began = stored["settings"] if stored else {}
    if began.get("init") is None or not same_place(began["init"], cfg.init):
        raise InputError(f"--init {cfg.init}: no such file")
    return began["init_digest"]


def begin_from(encoder: nn.Module, network: nn.Module) -> None:
    """Copy an encoder's weights and BatchNorm statistics to a network's encoder, and to its target's if it has one."""
    state = encoder.state_dict()
    network.encoder.load_state_dict(state)
    if hasattr(network, "target"):
        network.target.encoder.load_state_dict(state)
