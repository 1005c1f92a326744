"""Encoders in the files of other projects: timm's or torchvision's names for a ResNet, under a prefix.

encoder = adopt("moco_v2_800ep_pretrain.pth.tar", "resnet50", "imagenet")
"""

from pathlib import Path

import torch
from torch import Tensor, nn

from harness import processes
from harness.checkpoint import fill, read_tensors
from harness.errors import InputError
from models import build_encoder

# What other projects put before an encoder's names: DataParallel, then Barlow Twins, SimSiam, MoCo and lightly.
WRAPPERS = ("", "module.")
PARTS = ("", "backbone.", "encoder.", "encoder_q.")
PREFIXES = [wrapper + part for wrapper in WRAPPERS for part in PARTS]


def adopt(path: str | Path, model: str, stem: str) -> nn.Module:
    """Load the encoder in a file of another project, by the prefix that fits, in evaluation mode.

    Prints what matched on standard error. InputError if the file is one of ours, or if no prefix of PREFIXES turns its
    names into those of the encoder.
    """
    tensors, header = read_tensors(path)
    if "description" in header:
        raise InputError(f"{path}: --model {model} has no effect, the file says what it is")
    with torch.device("meta"):
        encoder = build_encoder(model, stem)
    wanted = encoder.state_dict()
    prefix = best_prefix(tensors, wanted)
    found = {}
    for name, tensor in wanted.items():
        if prefix + name in tensors:
            found[name] = tensors[prefix + name].to(tensor.dtype)
    if not found:
        sample = ", ".join(list(tensors)[:3]) or "no tensor"
        raise InputError(f"{path}: none of its names belongs to {model}, under any known prefix; it holds {sample}")
    counters = {name: torch.tensor(0) for name in wanted if name.endswith("num_batches_tracked")}
    fill(encoder, counters | found, path)  # files of old versions of torch have no counters
    under = f" under {prefix}" if prefix else ""
    rest = left_out(tensors, {prefix + name for name in found})
    processes.say(f"{path}: {len(found)} tensors of {model}{under}{rest}; it has no digest, so it is unchecked")
    return encoder.to(memory_format=torch.channels_last).eval()


def best_prefix(tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> str:
    """Find the prefix under which the file holds the most of the wanted names; the first of equals."""
    counts = {prefix: sum(prefix + name in tensors for name in wanted) for prefix in PREFIXES}
    return max(counts, key=counts.get)


def left_out(tensors: dict[str, Tensor], used: set[str]) -> str:
    """Name the tensors of a file that are not used."""
    unused = [name for name in tensors if name not in used]
    if not unused:
        return ""
    more = f" and {len(unused) - 4} more" if len(unused) > 4 else ""
    return f"; left out: {', '.join(unused[:4])}{more}"
