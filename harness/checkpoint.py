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
import math
from pathlib import Path

import timm
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import models
from lib.errors import InputError
from lib.files import CONFIG, ENCODER, WEIGHTS, write_whole
from lib.tensors import read_tensors

# What a reader of a description relies on. Its view is that of the images that its network was trained on.
SETTING_KINDS = {"dataset": str, "data_dir": str, "seed": int}
VIEW_KINDS = {"size": int, "crop": (int, float), "mean": list, "std": list}


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


def save_encoder(folder: Path, tensors: dict[str, Tensor], description: dict, config: dict | None) -> None:
    """Write a run's encoder into its folder `encoder`, with timm's description of it, if there is one.

    config.json is the same as long as the run lasts, and comes first: whenever the process is killed, the two files
    belong together, or timm says that there are no weights yet.  InputError if one cannot be written.
    """
    try:
        (folder / ENCODER).mkdir(exist_ok=True)
        if config is None:
            (folder / CONFIG).unlink(missing_ok=True)  # left by a run that ended before its first checkpoint
    except OSError as e:
        raise InputError(f"{folder / ENCODER}: cannot be written ({e.strerror})") from e
    if config is not None:
        with write_whole(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
    save(folder / WEIGHTS, tensors, {**description, "holds": "encoder"})


def timm_config(settings: dict, view: dict, in_files: bool = False) -> dict | None:
    """Return timm's config.json for an encoder; None if timm has no name for it.

    timm shrinks a picture's shorter side to floor(size / crop_pct) pixels, `data.evaluation_views` of pictures in files
    to round(size / crop): where these differ, crop_pct is one that leads timm to the same number.
    """
    if not is_timms(settings):
        return None
    name = settings["model"].partition(".")[0]  # without the name of timm's weights, from which no run begins
    size, crop = view["size"], view["crop"]
    side = round(size / crop)
    if in_files and math.floor(size / crop) != side:
        crop = size / (side + 0.5)
    timms = timm.get_pretrained_cfg(name)
    pretrained_cfg = {
        "num_classes": 0,
        "input_size": [3, size, size],
        "mean": list(view["mean"]),
        "std": list(view["std"]),
        "crop_pct": crop,
        "crop_mode": "center",
        "interpolation": "bicubic",
        "first_conv": timms.first_conv,  # which timm fits to in_chans, and the next to num_classes
        "classifier": timms.classifier,
    }
    return {"architecture": name, "num_classes": 0, "pretrained_cfg": pretrained_cfg}


def is_timms(settings: dict) -> bool:
    """Whether timm builds the encoder of these settings by its name alone."""
    return settings["model"] != "alexnet" and settings["stem"] == "imagenet" and settings["norm"] == "bn"


def load(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors and the description of a file that `save` wrote. InputError for another or a damaged file."""
    tensors, header = read_tensors(path)
    if "description" not in header:
        raise InputError(f"{path}: has no description, so pretrain.py did not write it; name its --model and --dataset")
    try:
        description = parse_description(header)
        stored_digest = description.pop("digest")
        is_intact = stored_digest == digest(tensors, description)
    except (ValueError, KeyError, RecursionError) as e:
        raise InputError(_not_ours(path, e)) from e
    if not is_intact:
        raise InputError(f"{path}: damaged: its content is not what was written (the digest differs)")
    return tensors, description


def parse_description(header: dict[str, str]) -> dict:
    """Return the description in a header, with its digest. KeyError, ValueError or RecursionError if it is not ours."""
    description = json.loads(header["description"])
    if not isinstance(description, dict) or "digest" not in description:
        raise ValueError("it has no digest")
    return description


def is_ours(header: dict[str, str]) -> bool:
    """Whether `save` wrote a file with this header: other projects use the key "description", too."""
    try:
        parse_description(header)
    except (KeyError, ValueError, RecursionError):
        return False
    return True


def _not_ours(path: str | Path, error: Exception) -> str:
    """Return the message for a description that `save` did not write, or wrote of something else than a run."""
    return (
        f"{path}: its description is not one that pretrain.py writes ({error!r}); a file of another project takes "
        "--model and --dataset"
    )


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
            raise InputError(f"{path}: holds no target network; a ckpt.safetensors of --method byol or moco does")
        network = network.target
    if description["holds"] == "encoder":
        return network, description
    return network.encoder, description


def load_network(path: str | Path) -> tuple[nn.Module, dict]:
    """Load the network of a ckpt.safetensors, or the encoder of a file with the encoder alone, in evaluation mode.

    Returns it with the file's description. InputError as from `load` and `fill`.
    """
    tensors, description = load(path)
    try:
        settings = description["settings"]
        refuse_other_kinds(settings, SETTING_KINDS)
        refuse_other_kinds(description["view"], VIEW_KINDS)
        with torch.device("meta"):  # a hostile description may ask for more than there is memory
            network = build_described(description["holds"], settings)
    except InputError:
        raise
    except Exception as e:  # the constructors raise errors of many types on a wrong description
        raise InputError(_not_ours(path, e)) from e
    weights = {name: tensor for name, tensor in tensors.items() if "/" not in name}
    fill(network, weights, path)
    return network.to(memory_format=torch.channels_last).eval(), description


def refuse_other_kinds(values: dict, kinds: dict) -> None:
    """Raise an error for a value that is missing or of another kind, or for a list that is not of three numbers."""
    for key, kind in kinds.items():
        value = values[key]
        is_right = isinstance(value, kind)
        if kind is list and is_right:
            is_right = len(value) == 3 and all(isinstance(number, (int, float)) for number in value)
        if not is_right:
            raise TypeError(f"{key} is {value!r:.40}")


def build_described(holds: str, settings: dict) -> nn.Module:
    """Build the network that a description names, with fresh weights: an encoder, or the whole method."""
    architecture = (settings["model"], settings["stem"], settings["norm"])
    if holds == "encoder":
        return models.build_encoder(*architecture)
    method = models.METHODS[settings["method"]].network
    heads = [settings["hidden_dim"], settings["out_dim"]]
    return method(*architecture, *heads, settings.get("predictor", "mlp"), settings.get("queue", 0))


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
