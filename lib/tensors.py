"""Tensors out of a file of any project: the first bytes tell its format, its name does not, and nothing in it is run.

tensors = read_tensors("moco_v2_800ep_pretrain.pth.tar")
"""

import json
import os
from collections import OrderedDict
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from torch.nn import Parameter
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from lib import processes
from lib.errors import InputError

INDEX = "model.safetensors.index.json"
ZIP = b"PK\x03\x04"  # how files of torch.save begin since torch 1.6
OLD_TORCH = bytes.fromhex("80028a0a6cfc9c46f920")  # how they began before: a pickle of torch's magic number
OLD_FLAGS = ("argparse.Namespace", "numpy.core.multiarray.scalar", "numpy.dtype")  # torch lists those of a zip alone


class Placeholder(list):
    """Stands for an object of a class that torch does not know to be harmless; the reader appends to lists alone."""

    def __init__(self, *_, **__): ...

    def __setstate__(self, state: object) -> None: ...


class DictPlaceholder:
    """Stands for one of a class of dicts: the reader sets items of its own kinds of dicts alone."""

    def __new__(cls, *_, **__):
        return OrderedDict()


def read_tensors(path: str | Path, mapped: bool = False) -> dict[str, Tensor]:
    """Read the tensors of a file, by name.

    Keys of dicts within dicts are joined by dots. Left out is what is of a subclass and, named, what is sparse, nested,
    quantized or without memory. A folder of shards, as the Hub has large models, is one file. mapped: those of
    safetensors stay in their files, and take memory only while they are used. InputError for a file of neither format,
    not whole, or without named tensors.
    """
    index = os.path.join(path, INDEX)
    if os.path.isfile(index):
        file_by_name = _shards(index)
        shards = [_read_safetensors(os.path.join(path, file), mapped) for file in sorted({*file_by_name.values()})]
        tensors = {name: x for shard in shards for name, x in shard.items()}
        lost = file_by_name.keys() - tensors.keys()
        if lost:
            raise InputError(f"{index}: lists {min(lost)}, which its files do not hold; download the folder again")
        return tensors
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder without ckpt.safetensors or model.safetensors; name a file")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; a checkpoint is the ckpt.safetensors or the folder encoder of a run")
    try:
        with open(path, "rb") as file:
            start = file.read(len(OLD_TORCH))
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    is_safetensors = start[8:9] == b"{"  # the header's length, then the header
    return _read_safetensors(path, mapped) if is_safetensors else _read_torch(path, start)


def _shards(index: str) -> dict[str, str]:
    """Return the names of the files that an index lists, by the names of their tensors."""
    try:
        return {name: str(file) for name, file in json.loads(Path(index).read_bytes())["weight_map"].items()}
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(f"{index}: not an index of safetensors files; download it again") from e


def _read_safetensors(path: str | Path, mapped: bool) -> dict[str, Tensor]:
    try:
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            if not mapped:  # a mapped file keeps its space on the disk after a newer one takes its name
                tensors = {name: tensor.clone() for name, tensor in tensors.items()}
            return tensors
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e}); download it again") from e


def _read_torch(path: str | Path, start: bytes) -> dict[str, Tensor]:
    advice = "save the network's state_dict() by torch.save"
    try:
        if not start.startswith((ZIP, OLD_TORCH)):
            raise ValueError(start)
        with open(path, "rb") as file:  # of a path torch looks at the suffix, and takes .safetensors for what it says
            unknown = get_unsafe_globals_in_checkpoint(file) if start.startswith(ZIP) else OLD_FLAGS
            file.seek(0)
            placeholders = [DictPlaceholder if name.lower().endswith("dict") else Placeholder for name in unknown]
            with safe_globals(list(zip(placeholders, unknown))):
                content = torch.load(file, map_location="cpu", weights_only=True)
        found = _flatten(content) if isinstance(content, dict) else {}
    except Exception as e:  # torch raises errors of many types on a file that it cannot read
        fault = "not a file of tensors alone (nothing in it was run)"
        raise InputError(f"{path}: {fault}; {advice}, or, if it is cut short, download it again") from e
    tensors = {}
    for name, x in found.items():
        if x.layout == torch.strided and not (x.is_meta or x.is_quantized or x.is_nested):
            tensors[name] = x.detach()
    if not tensors:
        raise InputError(f"{path}: holds no tensors with names; {advice}")
    if len(found) > len(tensors):
        processes.say(f"{path}: left out, sparse, quantized or empty: {', '.join(sorted(found.keys() - tensors))}")
    return tensors


def _flatten(content: dict, prefix: str = "") -> dict[str, Tensor]:
    tensors = {}
    for key, value in content.items():
        if isinstance(value, dict):
            tensors |= _flatten(value, f"{prefix}{key}.")
        elif type(value) in (Tensor, Parameter):
            tensors[f"{prefix}{key}"] = value
    return tensors
