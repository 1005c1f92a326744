"""The safetensors files that stages pass on: written whole, read with their digest checked.

    save("ckpt.safetensors", network.state_dict(), description)
    tensors, description = load("ckpt.safetensors")
    encoder, description = load_encoder("ckpt.safetensors")

A file holds tensors and, under one key of its header, a description as JSON: the settings of the run, the view that its
network was trained on, and a digest of all. In a run's ckpt.safetensors, names with a slash belong to the state of the
run, all others to the network.
"""

import hashlib
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import models
from harness.errors import InputError
from harness.files import write_whole

PICKLE_SUFFIXES = (".pth", ".pt", ".ckpt", ".bin", ".tar")  # how files of other projects end
VIEW_KEYS = ("size", "crop", "mean", "std")  # what a description says of the images that its network was trained on


def save(path: str | Path, tensors: dict[str, Tensor], description: dict) -> None:
    """Write tensors and their description, with a digest of both, to a safetensors file: whole or not at all.

    The description is one JSON text under one header key, because safetensors writes several keys in random order and
    equal content is to make equal files. InputError if the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = description | {"digest": digest(tensors, description)}
    header = {"description": json.dumps(description, sort_keys=True)}
    with write_whole(Path(path)) as file:
        file.write(to_bytes(tensors, header))


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and the description of a file that `save` wrote. InputError for another or a damaged file."""
    tensors, header = read_tensors(path)
    if "description" not in header:
        raise InputError(f"{path}: has no description, so pretrain.py did not write it; name its --model and --dataset")
    try:
        description = json.loads(header["description"])
        stored_digest = description.pop("digest")
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: its description is not one that pretrain.py writes ({e!r})") from e
    if stored_digest != digest(tensors, description):
        raise InputError(f"{path}: damaged: its content is not what was written (the digest differs)")
    return tensors, description


def digest(tensors: dict[str, Tensor], description: dict) -> str:
    """Compute SHA-256 over a description and over names, types, shapes and bytes of tensors on the CPU."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


def load_encoder(path: str | Path, net: str = "online") -> tuple[nn.Module, dict]:
    """Load the online or the target encoder of a run's file, in evaluation mode, with the file's description.

    InputError as from `load_network`, or if net is "target" and the file holds none.
    """
    network, description = load_network(path)
    if net == "target":
        if not hasattr(network, "target"):
            raise InputError(f"{path}: holds no target network; a ckpt.safetensors of --method byol does")
        network = network.target
    if description["holds"] == "encoder":
        return network, description
    return network.encoder, description


def load_network(path: str | Path) -> tuple[nn.Module, dict]:
    """Load the network of a ckpt.safetensors, or the encoder of an encoder.safetensors, in evaluation mode.

    Returns it with the file's description. InputError as from `load` and `fill`.
    """
    tensors, description = load(path)
    try:
        settings = description["settings"]
        required = [settings[key] for key in ("dataset", "data_dir", "seed")]
        required += [description["view"][key] for key in VIEW_KEYS]
        with torch.device("meta"):  # a hostile description may ask for more than there is memory
            network = build_described(description["holds"], settings)
    except InputError:
        raise
    except Exception as e:  # the constructors raise errors of many types on a wrong description
        raise InputError(f"{path}: its description is not one that pretrain.py writes ({e!r})") from e
    weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    fill(network, weights, path)
    return network.to(memory_format=torch.channels_last).eval(), description


def build_described(holds: str, settings: dict) -> nn.Module:
    """Build the network that a description names, with fresh weights: an encoder, or the whole method."""
    architecture = (settings["model"], settings["stem"], settings["norm"])
    if holds == "encoder":
        return models.build_encoder(*architecture)
    method = models.METHODS[settings["method"]]
    return method(*architecture, settings["hidden_dim"], settings["out_dim"])


def fill(network: nn.Module, tensors: dict[str, Tensor], path: str | Path) -> None:
    """Put the tensors of a file into a network. InputError if one is missing, superfluous or of another shape or type.

    A network on the meta device takes the tensors as its own.
    """
    expected = network.state_dict()
    _refuse_names("missing", expected.keys() - tensors.keys(), path)
    _refuse_names("superfluous", tensors.keys() - expected.keys(), path)
    for name, tensor in expected.items():
        stored, wanted = _kind(tensors[name]), _kind(tensor)
        if stored != wanted:
            raise InputError(f"{path}: {name} is {stored}; the described network has {wanted}")
    on_meta = any(tensor.is_meta for tensor in expected.values())
    network.load_state_dict(tensors, assign=on_meta)


def _refuse_names(fault: str, names: set[str], path: str | Path) -> None:
    """Raise InputError if there are names that should not be, or that should be and are not."""
    if names:
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        raise InputError(f"{path}: {fault} for the described network: {', '.join(sorted(names)[:3])}{more}")


def _kind(tensor: Tensor) -> str:
    """Name the shape and type of a tensor: (64, 3, 7, 7) float32."""
    return f"{tuple(tensor.shape)} {tensor.dtype}".replace("torch.", "")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and the header of a safetensors file, or the tensors alone of a pickle, known by its suffix.

    Nothing in a pickle is run. InputError for whatever is not such a file.
    """
    if os.path.isdir(path):
        raise InputError(f"{path}: a folder; name the ckpt.safetensors or encoder.safetensors in it")
    if not os.path.isfile(path):
        raise InputError(f"{path}: no such file; a checkpoint is the ckpt.safetensors or encoder.safetensors of a run")
    if str(path).endswith(PICKLE_SUFFIXES):
        return _read_pickle(path), {}
    try:
        with safe_open(path, "pt") as file:
            # clone: a tensor that maps the file would keep its space on the disk after a newer file takes its name
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
            return tensors, file.metadata() or {}
    except (SafetensorError, OSError, ValueError, RuntimeError) as e:
        raise InputError(f"{path}: not a whole safetensors file ({e})") from e


def _read_pickle(path: str | Path) -> dict[str, Tensor]:
    """Read the tensors of a .pth file, at its top or under "state_dict" or "model", without running anything in it."""
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # torch raises errors of many types on a file that does not hold tensors
        advice = "save the network's state_dict() in it"
        raise InputError(f"{path}: not a file of tensors alone (nothing in it was run); {advice}") from e
    while isinstance(content, dict) and {"state_dict", "model"} & content.keys():
        content = content["state_dict"] if "state_dict" in content else content["model"]
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds a {type(content).__name__}; it must hold tensors with names")
    return {str(name): tensor for name, tensor in content.items() if isinstance(tensor, Tensor)}
