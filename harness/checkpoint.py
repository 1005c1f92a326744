"""The safetensors files that stages pass on: written whole, read with their digest checked.

    save("ckpt.safetensors", network.state_dict(), description)
    tensors, description = load_file("ckpt.safetensors")
    encoder, description = load_encoder("ckpt.safetensors")

A file holds tensors and, under one key of its header, a description as JSON: the settings of the run, the evaluation
view, and a digest of tensors and description. In a run's ckpt.safetensors, names with a slash belong to the state of
the run, all others to the network.
"""

import hashlib
import json
import math
from pathlib import Path

import timm
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

import models
from lib.errors import InputError
from lib.files import CKPT, CONFIG, WEIGHTS, write_whole

FORMAT = 1  # of a description; raise it when an older reader would misread a file


def save(path: str | Path, tensors: dict[str, Tensor], description: dict) -> None:
    """Write tensors and their description, with a digest of both, to a safetensors file: whole or not at all.

    The description is one JSON text under one header key, because safetensors writes several keys in random order and
    equal content is to make equal files. InputError if the file cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    description = {"format": FORMAT, **description}
    description["digest"] = digest(tensors, description)
    header = {"description": json.dumps(description, sort_keys=True)}
    with write_whole(Path(path)) as file:
        file.write(to_bytes(tensors, header))


def digest(tensors: dict[str, Tensor], description: dict) -> str:
    """Compute SHA-256 over a description and over names, types, shapes and bytes of tensors on the CPU."""
    sha = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()


# ---- The encoder alone, for timm -------------------------------------------------------------------------------------
def save_encoder(folder: Path, tensors: dict[str, Tensor], description: dict, config: dict | None) -> None:
    """Write a run's encoder into its folder `encoder`, with timm's description of it, if there is one.

    config.json is the same as long as the run lasts, and comes first: whenever the process is killed, the two files
    belong together, or timm says that there are no weights yet. InputError if one cannot be written.
    """
    if config is None:
        (folder / CONFIG).unlink(missing_ok=True)  # left by a run that ended before its first checkpoint
    else:
        with write_whole(folder / CONFIG) as file:
            file.write(json.dumps(config, indent=2).encode() + b"\n")
    save(folder / WEIGHTS, tensors, {**description, "holds": "encoder"})


def timm_config(settings: dict, view: dict, in_files: bool = False) -> dict | None:
    """Return timm's config.json for an encoder; None if timm has no name for it.

    timm shrinks a picture's shorter side to floor(size / crop_pct) pixels, `data.evaluation_views` of pictures in files
    to round(size / crop): where these differ, crop_pct is one that leads timm to the same number.
    """
    if settings["model"] == "alexnet" or settings["stem"] != "imagenet" or settings["norm"] != "bn":
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
    positions = {"dynamic_img_size": True, "img_size": timms.input_size[-1]}  # else timm would resample those of a ViT
    options = {"model_args": positions} if timms.fixed_input_size else {}
    return {"architecture": name, "num_classes": 0, **options, "pretrained_cfg": pretrained_cfg}


# ---- Files read back -------------------------------------------------------------------------------------------------
def description_of(path: str | Path) -> dict | None:
    """Read the description in a file's header; None for a file that `save` did not write.

    InputError for one of another format.
    """
    try:
        with safe_open(path, "pt") as file:
            description = {**json.loads(file.metadata()["description"])}
    except (SafetensorError, OSError, KeyError, ValueError, TypeError, RecursionError):
        return None
    if "digest" not in description:
        return None
    if description.get("format") != FORMAT:
        wrote = f"commit {description.get('git')} wrote it, and reads it"
        raise InputError(f"{path}: of format {description.get('format')}, not {FORMAT}; {wrote}")
    return description


def load_file(path: str | Path) -> tuple[dict[str, Tensor], dict]:
    """Read the tensors of a file that `save` wrote, and its description.

    InputError for another, a damaged or a missing file.
    """
    if not Path(path).is_file():
        fault = f"a folder without {CKPT}" if Path(path).is_dir() else "no such file"
        raise InputError(f"{path}: {fault}; name a run's folder, its {CKPT}, or its encoder")
    try:
        with safe_open(path, "pt") as file:
            description = description_of(path)
            if description is None:
                raise InputError(f"{path}: not written by pretrain.py; a judge takes it with --model and --dataset")
            # one that maps the file would keep its space on the disk
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as e:
        advice = "take another if it is cut short; for a file of another project give a judge --model and --dataset"
        raise InputError(f"{path}: cannot be read as a safetensors file ({e}); {advice}") from e
    stored_digest = description.pop("digest")
    if digest(tensors, description) != stored_digest:
        raise InputError(f"{path}: damaged: its content is not what was written (the digest differs)")
    return tensors, description


def load_encoder(path: str | Path, net: str = "online") -> tuple[nn.Module, dict]:
    """Load the online or the target encoder of a run's file, in evaluation mode, and the file's description."""
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

    Returns it with the file's description. InputError as from `load_file`, and for a description that does not fit.
    """
    tensors, description = load_file(path)
    tensors = {name: x for name, x in tensors.items() if "/" not in name}
    try:
        with torch.device("meta"):  # a hostile description may ask for more than there is memory
            build_described(description["holds"], description["settings"]).load_state_dict(tensors, assign=True)
        network = build_described(description["holds"], description["settings"])  # with buffers that no file holds
        network.load_state_dict(tensors)
    except InputError:
        raise
    except Exception as e:  # the constructors raise errors of many types on a wrong description
        reason = " ".join(str(e).split())[:200]
        raise InputError(f"{path}: its tensors are not those of its description ({reason})") from e
    return network.eval(), description


def build_described(holds: str, settings: dict) -> nn.Module:
    """Build the network that a description names, with fresh weights: an encoder, or the whole method."""
    architecture = (settings["model"], settings["stem"], settings["norm"])
    if holds == "encoder":
        return models.build_encoder(*architecture)
    heads = (settings["hidden_dim"], settings["out_dim"], settings["predictor"], settings["queue"])
    return models.METHODS[settings["method"]].network(*architecture, *heads)
