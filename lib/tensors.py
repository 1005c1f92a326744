"""Tensors out of a file of any project: the first bytes tell its format, its name does not, and nothing in it is run.

    tensors, header = read_tensors("moco_v2_800ep_pretrain.pth.tar")

A safetensors file has a header, texts by their keys; for a file of torch.save it is empty.
"""

import os
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING  # today's names of modules that pickles call by those of Python 2
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lib.errors import InputError

ZIP = b"PK\x03\x04"  # how files of torch.save begin since torch 1.6
OLD_TORCH = bytes.fromhex("80028a0a6cfc9c46f920")  # how they began before: a pickle of torch's magic number
PICKLE = b"\x80"
PART = ".distcp"  # how names of parts of a checkpoint of torch.distributed end
LONGEST_HEADER = 10**8  # bytes, of safetensors
DEEPEST = 20  # dicts in dicts, below which no tensor is looked for

AGAIN = "download or copy it again"
UNPACK = "unpack it and name the file in it"
CONVERT = "convert it to torch's tensors and save these by torch.save"
OTHERS = {  # how other files begin, what they are, and what to do
    b"version https://git-lfs": ("a Git LFS pointer, not the file itself", "fetch that with git lfs pull"),
    b"<!doctype html": ("an HTML page", "its link leads to a page about the file; download the file itself"),
    b"<html": ("an HTML page", "its link leads to a page about the file; download the file itself"),
    b"<": ("an HTML or XML page", "its link leads to a page, or to an error; download the file itself"),
    b"{": ("JSON, which holds no tensors", "if it is the index of a sharded checkpoint, join the shards in one file"),
    b"\x1f\x8b": ("packed by gzip", UNPACK),
    b"BZh": ("packed by bzip2", UNPACK),
    b"\xfd7zXZ": ("packed by xz", UNPACK),
    b"\x28\xb5\x2f\xfd": ("packed by zstd", UNPACK),
    b"7z\xbc\xaf": ("a 7z archive", UNPACK),
    b"Rar!": ("a RAR archive", UNPACK),
    b"\x89HDF": ("an HDF5 file, as Keras writes it", CONVERT),
    b"\x93NUMPY": ("a NumPy array", CONVERT),
}


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors of a file with their names, and its header. InputError, with the cure, for any other file."""
    _refuse_parts(path)
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder without ckpt.safetensors or model.safetensors; name a file")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; a checkpoint is the ckpt.safetensors or the folder encoder of a run")
    try:
        with open(path, "rb") as file:
            start = file.read(512)
    except OSError as e:
        raise InputError(f"{path}: cannot be read ({e.strerror})") from e
    header_length = int.from_bytes(start[:8], "little")
    if header_length <= LONGEST_HEADER and start[8:9] == b"{":
        return _read_safetensors(path)
    if start.startswith((ZIP, PICKLE)):
        return _read_torch(path, start), {}
    raise InputError(f"{path}: {_kind_of(start)}")


def _refuse_parts(path: str | Path) -> None:
    """Raise InputError for a checkpoint that torch.distributed wrote in parts: its folder, or one of the parts."""
    folder = Path(path)
    if folder.suffix == PART:
        folder = folder.parent
    if os.path.isfile(folder / ".metadata"):
        command = f"python -m torch.distributed.checkpoint.format_utils dcp_to_torch {folder} whole.pth"
        raise InputError(f"{path}: of a checkpoint of torch.distributed in parts; join them: {command}")


def _kind_of(start: bytes) -> str:
    """Say what a file is that holds no tensors, by its first bytes, and what to do."""
    text = start.lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    for signature, (kind, advice) in OTHERS.items():
        if text.startswith(signature.lower()):
            return f"{kind}; {advice}"
    if start[257:262] == b"ustar":
        return f"a tar archive; {UNPACK}"
    content = f"it begins with {start[:16]!r}" if start else "it is empty"
    return f"not a whole safetensors file, nor one of torch.save: {content}; {AGAIN}"


def _read_safetensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and the header of a safetensors file."""
    try:
        with safe_open(path, "pt") as file:
            # clone: a tensor that maps the file would keep its space on the disk after a newer file takes its name
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e}); {AGAIN}") from e


# ---- Files of torch.save ---------------------------------------------------------------------------------------------


class Placeholder(list):
    """What an object of a file becomes if torch does not know its class to be harmless: nothing of it is kept.

    So a file that holds the flags of its training beside the tensors is read, and runs nothing. It is a list, because
    torch's reader appends to lists alone.
    """

    def __new__(cls, *_, **__):
        return super().__new__(cls)

    def __init__(self, *_, **__):
        super().__init__()

    def __setstate__(self, state: object) -> None: ...


class DictPlaceholder:
    """The same for classes that are dicts: torch's reader sets items of its own kinds of dicts alone."""

    def __new__(cls, *_, **__):
        return OrderedDict()


def _read_torch(path: str | Path, start: bytes) -> dict[str, Tensor]:
    """Read the tensors of a file of torch.save, named by the dicts that they lie in, without running anything in it."""
    if start.startswith(ZIP):
        _refuse_other_archives(path)
    elif not start.startswith(OLD_TORCH[: len(start)]):
        raise InputError(
            f"{path}: not a file of tensors alone (nothing in it was run): pickle wrote it; save the network's "
            "state_dict() by torch.save"
        )
    try:
        unknown = [(_placeholder(name), name) for name in _classes_in(path)]
        # an open file: of a path torch looks at the suffix, and takes .safetensors for what it says
        with torch.serialization.safe_globals(unknown), open(path, "rb") as file:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises errors of many types on a file that it cannot read
        if "weights_only" in str(e).lower():  # torch's long advice begins after the first sentence of its reason
            reason = str(e).partition("Unpickler error:")[2] or "torch refuses it"
            raise InputError(_not_tensors(path, " ".join(reason.split()).partition(". ")[0])) from e
        raise InputError(f"{path}: cut short or damaged ({e or type(e).__name__}); {AGAIN}") from e
    if isinstance(content, Placeholder):
        raise InputError(_not_tensors(path, "it holds an object"))
    if not isinstance(content, Mapping):
        raise InputError(f"{path}: holds a {type(content).__name__}; it must hold tensors with names")
    return flatten(content)


def _not_tensors(path: str | Path, reason: str) -> str:
    """Return the message for a file whose objects cannot be left out."""
    return f"{path}: not a file of tensors alone (nothing in it was run): {reason}; save the network's state_dict()"


def _refuse_other_archives(path: str | Path) -> None:
    """Raise InputError for a zip file that is cut short, or that torch.save did not write."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
    except (zipfile.BadZipFile, OSError, ValueError) as e:
        raise InputError(f"{path}: cut short or damaged ({e}); {AGAIN}") from e
    parts = {name.rpartition("/")[2] for name in names}
    if "constants.pkl" in parts:
        raise InputError(f"{path}: a TorchScript program; save the state_dict() of torch.jit.load of it by torch.save")
    if "data.pkl" not in parts:
        listed = f" of {', '.join(names[:3])}" if names else ""
        arrays = all(name.endswith(".npy") for name in names)
        raise InputError(f"{path}: a zip archive{listed}; {CONVERT if arrays else UNPACK}")


def _classes_in(path: str | Path) -> set[str]:
    """Return the names of the classes and functions that a file of torch.save names, without loading any."""
    if zipfile.is_zipfile(path):
        with zipfile.ZipFile(path) as archive:
            pickled = next(name for name in archive.namelist() if name.rpartition("/")[2] == "data.pkl")
            with archive.open(pickled) as file:
                return _classes_in_pickle(file)
    with open(path, "rb") as file:
        heads = [_classes_in_pickle(file) for _ in ("magic number", "version", "system", "content")]
    return set().union(*heads)


def _classes_in_pickle(file: BinaryIO) -> set[str]:
    """Return the names that one pickle asks for, and leave the file at its end."""
    names = set()
    for opcode, argument, _ in pickletools.genops(file):
        if opcode.name == "GLOBAL":
            module, name = argument.split(" ", 1)
            module = IMPORT_MAPPING.get(module, module)  # __builtin__ is builtins
            names.add(f"{module}.{name}")
    return names


def _placeholder(name: str) -> type:
    """Return what takes the place of a class. Those that torch knows to be harmless it takes as they are."""
    return DictPlaceholder if name.lower().endswith("dict") else Placeholder


def flatten(content: Mapping, prefix: str = "", depth: int = 0) -> dict[str, Tensor]:
    """Return the tensors in dicts within dicts, their keys joined by dots and put behind a prefix."""
    tensors = {}
    for key, value in content.items():
        name = f"{prefix}{key}"
        if isinstance(value, Tensor):
            tensors[name] = value
        elif isinstance(value, Mapping) and depth < DEEPEST:
            tensors |= flatten(value, f"{name}.", depth + 1)
    return tensors
