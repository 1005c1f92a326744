"""A trained encoder as a folder that is ready for the Hugging Face Hub, or for a colleague.

    python -m tools.export runs/photos-amhe --to exports/photos-amhe

The folder gets model.safetensors, timm's config.json and a model card, README.md: how to load the encoder, how it was
trained, and its scores from the log with their protocol. Paths of this machine are cut to their last names. timm has no
name for some encoders; they come without config.json, and their card says how this project loads them.
`hf upload NAME FOLDER` does the rest, NAME being user/repository on the Hub.
"""

import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

import models
from harness import checkpoint
from harness.settings import Settings, formula
from lib import cli
from lib.errors import InputError
from lib.files import CONFIG, WEIGHTS
from lib.log import PLACES
from tools.groups import method_name
from tools.logs import RunLog, read_log

LICENSE = "mit"  # that of this code; the weights are the user's to license
FLOORS = {"untrained": "a random network", "init": "the weights that it began from", "pixels": "the pixels of the view"}
LOAD_BY_TIMM = """import timm
from PIL import Image

encoder = timm.create_model("local-dir:.", pretrained=True).eval()  # in this folder; or "hf-hub:NAME"
view = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
image = Image.open("picture.jpg").convert("RGB")
features = encoder(view(image)[None])"""
LOAD_BY_US = """from harness.checkpoint import load_encoder  # at the top of this code's clone: timm has no name for it

encoder, description = load_encoder("path/to/{name}/model.safetensors")  # its "view": size, crop, mean and std"""
CARD = """---
{metadata}
---

# {name}

An image encoder ({model}), trained without labels by {method}, with an open implementation of
*Hyperspherically Regularized Networks for Self-Supervision* (Durrant and Leontidis, 2022).

## Load it

```python
{code}
```

Its input is {size} x {size} pixels, the central {crop:g} of the picture's side, with mean {mean} and deviation {std}.

## How it was trained

On {images} images of `{dataset}`, whose labels were not used, for {done} of {epochs} epochs,
by `{command}` at commit {git}, in {precision}, with {versions}.

```text
{formula}
```

## Scores

Of this one run:

{scores}
"""


def export(
    run: Annotated[str, "folder that pretrain.py made"],
    *,
    to: Annotated[str, "folder to write; it must be new"] | None = None,
    license: Annotated[str, "of the weights, by the Hub's short name: mit, apache-2.0, cc-by-nc-4.0, other"] = LICENSE,
):
    """Write the encoder of a run with its model card into a folder."""
    if to is None:
        raise InputError("--to is missing: name a new folder")
    folder = Path(os.path.abspath(os.path.expanduser(to)))
    if os.path.lexists(folder):
        raise InputError(f"--to {to}: is already there; name a new folder")
    log = read_log(Path(run))
    if not Path(run, WEIGHTS).is_file():
        raise InputError(f"{run}: holds no {WEIGHTS}; a run writes it at the end of its first epoch")
    tensors, description = checkpoint.load_file(Path(run, WEIGHTS))
    description = without_paths(description)
    config = Path(run, CONFIG)
    text = card(folder.name, log, description, config.is_file(), license)
    write_folder(folder, tensors, description, config, text)
    print(f"{to}: {', '.join(sorted(os.listdir(folder)))}; licence of the weights: {license}")
    print(f"hf upload NAME {shlex.quote(to)}  # NAME: user/repository")


def without_paths(description: dict) -> dict:
    """Cut the paths in a description to their last names: those of a machine are nobody else's matter."""
    settings = description["settings"]
    shown = settings | {name: Path(settings[name]).resolve().name for name in PLACES if settings[name]}
    words = [re.sub(r"^(--[\w-]+=)?.*/(?=[^/])", r"\1", word) for word in shlex.split(description["command"])]
    return {**description, "settings": shown, "command": shlex.join(words)}


def write_folder(folder: Path, tensors: dict[str, Tensor], description: dict, config: Path, text: str) -> None:
    """Write the files into a folder that appears whole or not at all. InputError if it cannot be written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        checkpoint.save(temporary / "model.safetensors", tensors, description)
        if config.is_file():
            shutil.copy(config, temporary)
        (temporary / "README.md").write_text(text, errors="backslashreplace")
        temporary.rename(folder)
    except OSError as e:
        raise InputError(f"--to {folder}: cannot be written ({e})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def card(name: str, log: RunLog, description: dict, is_timms: bool, license: str) -> str:
    """Write the model card of an encoder."""
    settings, view, task = description["settings"], description["view"], "image-feature-extraction"
    tags = [task, "self-supervised-learning", settings["method"]]
    library = "timm" if is_timms else None
    metadata = ModelCardData(license=license, library_name=library, pipeline_tag=task, tags=tags)
    cfg = Settings(**settings)
    with torch.device("meta"):
        network = checkpoint.build_described("checkpoint", settings)
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        model=settings["model"],
        method=method_name(settings),
        code=LOAD_BY_TIMM if is_timms else LOAD_BY_US.format(name=name),
        **view,
        images=description["images"],
        dataset=settings["dataset"],
        done=description["epoch"],
        epochs=settings["epochs"],
        command=description["command"],
        git=description["git"] or "unknown",
        precision=log.rows[0].get("precision", "no").replace("no", "fp32"),
        versions=", ".join(f"{package} {version}" for package, version in description["versions"].items()),
        formula="\n".join(formula(cfg, models.neurons(network, cfg.reg_on))),
        scores="\n".join(scores(log)),
    )


def scores(log: RunLog) -> list[str]:
    """Write the scores of a run's log, with the protocol of each."""
    rows = {}
    knn = log.score_row("knn_eval")
    if knn:
        vote = "weighted vote of the 20 nearest neighbours (cosine, temperature 0.07) in the training set"
        rows[f"{vote}, on the test set"] = knn
        for of, name in FLOORS.items():
            if floor := log.score_row("knn_eval", of):
                rows[f"the same vote on {name}"] = floor
    for features, inputs in (("augmented", "crops and flips"), ("cached", "no crops or flips")):
        if linear := log.score_row("linear_eval", features=features):
            fit = f"{linear['epochs']} epochs of SGD, batch {linear['batch_size']}, rate {linear['lr']:g} per 256"
            rows[f"linear classifier on frozen features, {inputs}, {fit} images, on the test set"] = linear
    if not rows:
        return ["The log holds no score of the finished run."]
    lines = [f"| {protocol} | {row['top1']:.1f} | {row['top5']:.1f} |" for protocol, row in rows.items()]
    return ["| protocol | top-1 (%) | top-5 (%) |", "|---|---|---|", *lines]


if __name__ == "__main__":
    cli.run(export)
