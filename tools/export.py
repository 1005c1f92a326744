"""A trained encoder as a folder that is ready for the Hugging Face Hub, or for a colleague.

    python -m tools.export runs/photos-amhe --to exports/photos-amhe

The folder gets model.safetensors, timm's config.json and a model card, README.md: how to load the encoder, how it was
trained, and its scores from the log with their protocol. Paths of this machine are cut to their last names. timm has no
name for some encoders; they come without config.json, and their card says how this project loads them.
`hf upload NAME FOLDER` does the rest, NAME being user/repository on the Hub.
"""

import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError
from timm.models import save_for_hf
from torch import nn

import models
from harness import checkpoint
from harness.settings import Settings, formula
from lib import cli, processes
from lib.errors import InputError
from lib.files import CONFIG, WEIGHTS
from lib.log import PLACES
from tools.groups import method_name
from tools.logs import RunLog, read_log

LICENSE = "mit"  # that of this code; the weights are the user's to license
TEMPERATURE = 0.07  # of the vote in rows of pretrain.py, which do not name it
PROTOCOL = ("split", "k", "temperature", "eval_crop", "dataset", "precision", "labels")  # columns of a vote
FLOORS = {"untrained": "a random network", "init": "the weights that it began from", "pixels": "the pixels of the view"}
CITATION = """@misc{durrant2022hyperspherically,
  title  = {Hyperspherically Regularized Networks for Self-Supervision},
  author = {Durrant, Aiden and Leontidis, Georgios},
  year   = {2022},
  eprint = {2105.00925},
  archivePrefix = {arXiv}
}"""
LOAD_BY_TIMM = """import timm
from PIL import Image

encoder = timm.create_model("local-dir:.", pretrained=True).eval()  # in this folder; or "hf-hub:NAME"
view = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))
image = Image.open("picture.jpg").convert("RGB")
features = encoder(view(image)[None])"""
LOAD_BY_US = """from harness.checkpoint import load_encoder  # of the code named above, as timm has no name for it
encoder, description = load_encoder("model.safetensors")  # description["view"]: size, crop, mean and std"""
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

Its input is {size} x {size} pixels, the central {crop:g} of the picture's side.

## How it was trained

On {images} images of `{dataset}`, whose labels were not used, for {done} of {epochs} epochs, by `{command}`.

```text
{formula}
```

| setting | value |
|---|---|
{settings}

## Scores

{scores}

## Cite

```bibtex
{citation}
```
"""


def export(
    run: Annotated[str, "folder that pretrain.py made"],
    *,
    to: Annotated[str, "folder to write; it must be new, or empty"] | None = None,
    license: Annotated[str, "of the weights, by the Hub's short name: mit, apache-2.0, cc-by-nc-4.0, other"] = LICENSE,
):
    """Write the encoder of a run with its model card into a folder."""
    if to is None:
        raise InputError("--to is missing: name a new folder")
    folder = Path(os.path.abspath(os.path.expanduser(to)))
    if folder.exists() and not (folder.is_dir() and not any(folder.iterdir())):
        raise InputError(f"--to {to}: is not an empty folder; name a new one")
    log = read_log(Path(run))
    if not Path(run, WEIGHTS).is_file():
        raise InputError(f"{run}: holds no {WEIGHTS}; a run writes it at the end of its first epoch")
    encoder, description = checkpoint.load_encoder(Path(run, WEIGHTS))
    description = without_paths(description)
    view = None
    if checkpoint.is_timms(description["settings"]):
        try:
            view = json.loads(Path(run, CONFIG).read_text())["pretrained_cfg"]
        except (OSError, ValueError, LookupError, TypeError) as e:
            raise InputError(f"{Path(run, CONFIG)}: not the file that pretrain.py wrote ({e!r})") from e
    text = card(Path(run).resolve().name, log, description, view is not None, license)
    write_folder(folder, encoder, description, view, text)
    done, epochs = description["epoch"], description["settings"]["epochs"]
    if done < epochs:
        processes.say(f"{run}: its training is not finished, {done} of {epochs} epochs are done; the card says so")
    choice = "--license"
    if license == LICENSE:
        choice = "the default; --license names another, and the choice is yours"
    print(f"{to}: {', '.join(sorted(os.listdir(folder)))}; licence of the weights: {license} ({choice})")
    print(f"hf upload NAME {shlex.quote(to)}  # NAME: user/repository")


def without_paths(description: dict) -> dict:
    """Cut the paths in a description to their last names: those of a machine are nobody else's matter."""
    settings = dict(description["settings"])
    for name in PLACES:
        if settings[name]:
            settings[name] = Path(settings[name]).name
    words = [re.sub(r"^(--[\w-]+=)?.*/(?=[^/])", r"\1", word) for word in shlex.split(description["command"])]
    return {**description, "settings": settings, "command": shlex.join(words)}


def write_folder(folder: Path, encoder: nn.Module, description: dict, view: dict | None, text: str) -> None:
    """Write the files into a folder that appears whole or not at all. InputError if it cannot be written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        if view:
            encoder = encoder.to(memory_format=torch.contiguous_format)  # safetensors takes no other
            save_for_hf(encoder, temporary, data_config=view, safe_serialization=True)
        # in place of timm's file: the same weights, with the description that the judges read
        checkpoint.save(temporary / "model.safetensors", encoder.state_dict(), description)
        (temporary / "README.md").write_text(text, errors="backslashreplace")
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except (OSError, SafetensorError) as e:
        raise InputError(f"--to {folder}: cannot be written ({e})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


# ---- The card --------------------------------------------------------------------------------------------------------


def card(name: str, log: RunLog, description: dict, is_timms: bool, license: str) -> str:
    """Write the model card of an encoder."""
    settings, task = description["settings"], "image-feature-extraction"
    library = "timm" if is_timms else None
    tags = [task, "self-supervised-learning", settings["method"], *([library] if library else [])]
    metadata = ModelCardData(license=license, library_name=library, pipeline_tag=task, tags=tags)
    cfg = Settings(**settings)
    with torch.device("meta"):
        network = checkpoint.build_described("checkpoint", settings)
    values = {key: value for key, value in settings.items() if value is not None} | description["versions"]
    return CARD.format(
        metadata=metadata.to_yaml(),
        name=name,
        model=settings["model"],
        method=method_name(settings),
        code=LOAD_BY_TIMM if is_timms else LOAD_BY_US,
        **{key: description["view"][key] for key in ("size", "crop")},
        images=description["images"],
        dataset=settings["dataset"],
        done=description["epoch"],
        epochs=settings["epochs"],
        command=description["command"],
        formula="\n".join(formula(cfg, models.neurons(network, cfg.reg_on))),
        settings="\n".join(f"| {key} | {value} |" for key, value in values.items()),
        scores="\n".join(scores(log)),
        citation=CITATION,
    )


def scores(log: RunLog) -> list[str]:
    """Write the scores of a run's log, with the protocol of each."""
    rows = {}
    knn, linear = log.score_row("knn_eval"), log.score_row("linear_eval")
    if knn:
        temperature = knn.get("temperature", TEMPERATURE)
        vote = f"weighted vote of the {knn['k']} nearest neighbours (cosine, temperature {temperature:g})"
        rows[f"{vote} in the training set, on the test set"] = knn
        for row in log.rows:
            # rows of pretrain.py leave out columns, which then count as equal
            is_of_one_vote = all(row.get(name, knn.get(name)) == knn.get(name) for name in PROTOCOL)
            if row.get("of") in FLOORS and is_of_one_vote:
                rows[f"the same vote on {FLOORS[row['of']]}"] = row  # the last one counts
    if linear:
        fit = f"{linear['epochs']} epochs of SGD, batch {linear['batch_size']}, rate {linear['lr']:g} per 256 images"
        rows[f"linear classifier on frozen features, crops and flips, {fit}, on the test set"] = linear
    if not rows:
        return ["The log holds no score of the finished run."]
    lines = [f"| {protocol} | {row['top1']:.1f} | {row['top5']:.1f} |" for protocol, row in rows.items()]
    return ["| protocol | top-1 (%) | top-5 (%) |", "|---|---|---|", *lines]


if __name__ == "__main__":
    cli.run(export)
