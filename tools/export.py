"""A trained encoder as a folder that is ready for the Hugging Face Hub, or for a colleague.

    python -m tools.export runs/photos-amhe --to exports/photos-amhe

The folder gets model.safetensors, timm's config.json and a model card, README.md: how to load the encoder, how it was
trained, and its scores from the log with their protocol. Paths of this machine are cut to their last names. timm has no
name for some encoders; their card holds the lines of code that build them. `hf upload NAME FOLDER` does the rest, NAME
being user/repository on the Hub.
"""

import inspect
import json
import os
import re
import shlex
import shutil
from pathlib import Path
from typing import Annotated

import torch
from torch import Tensor

import data
import models
from harness import checkpoint
from harness.settings import Settings, formula
from lib import cli, encoders, processes
from lib.errors import InputError
from lib.files import CONFIG, LOG, WEIGHTS, write_whole
from lib.log import PLACES
from tools.logs import EARLIER, RunLog, read_log

LICENSE = "mit"  # that of this code; the weights are the user's to license
SHOWN_SETTINGS = ["epochs", "batch_size", "optimizer", "lr", "weight_decay", "warmup", "hidden_dim", "out_dim", "seed"]
UNITS = {"lr": " per 256 images", "warmup": " epochs", "blur_p": " in the first and the second view"}
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
CARD = """---
library_name: timm
pipeline_tag: image-feature-extraction
license: {license}
tags:
- timm
- image-feature-extraction
- self-supervised-learning
- {method}
---

# {name}

An image encoder ({model}), trained without labels by {objective}, with an open
implementation of *Hyperspherically Regularized Networks for Self-Supervision* (Durrant and Leontidis, 2022).

## Load it

```python
{code}
```

## How it was trained

On {data}, for {epochs_done} of {epochs} epochs.

```text
{formula}
```

| setting | value |
|---|---|
{settings}
| evaluation view | {view} |
| command | `{command}` |
| versions | {versions} |

## Scores

{scores}

## Cite

```bibtex
{citation}
```
"""
IMAGE = 'image = Image.open("picture.jpg").convert("RGB")'
FEATURES = "features = encoder(view(image)[None])"


def export(
    run: Annotated[str, "folder that pretrain.py made"],
    *,
    to: Annotated[str, "folder to write; it must be new, or empty"] | None = None,
    license: Annotated[str, "of the weights, by the Hub's short name: mit, apache-2.0, cc-by-nc-4.0, other"] = LICENSE,
):
    """Write the encoder of a run with its model card into a folder."""
    if to is None:
        raise InputError("--to is missing: name a new folder")
    if not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", license):
        raise InputError(f"--license {license}: expected a short name such as mit, apache-2.0, cc-by-nc-4.0 or other")
    folder = Path(os.path.abspath(os.path.expanduser(to)))
    refuse_occupied(folder, to)
    refuse_what_is_no_run(Path(run))
    log = read_log(Path(run))
    tensors, description = read_encoder(Path(run))
    description = without_paths(description)
    config = read_config(Path(run), description)
    texts = {"README.md": card(Path(run).resolve().name, log, tensors, description, config, license)}
    if config:
        texts["config.json"] = json.dumps(config, indent=2) + "\n"
    write_folder(folder, tensors, description, texts)
    done, epochs = description["epoch"], description["settings"]["epochs"]
    if done < epochs:
        processes.say(f"{run}: its training is not finished, {done} of {epochs} epochs are done; the card says so")
    choice = "--license"
    if license == LICENSE:
        choice = "the default; --license names another, and the choice is yours"
    print(f"{to}: {', '.join(['model.safetensors', *sorted(texts)])}; licence of the weights: {license} ({choice})")
    print(f"hf upload NAME {shlex.quote(to)}  # NAME: user/repository")


# ---- What a run holds ------------------------------------------------------------------------------------------------


def refuse_occupied(folder: Path, to: str) -> None:
    """Raise InputError for a place that is a file, or a folder that is not empty."""
    if not folder.exists():
        return
    if not folder.is_dir():
        raise InputError(f"--to {to}: is a file; name a new folder")
    if any(folder.iterdir()):
        raise InputError(f"--to {to}: is not empty; name a new folder")


def refuse_what_is_no_run(path: Path) -> None:
    """Raise InputError for what is no run's folder; name the folder if the path leads into one."""
    if (path / LOG).exists():
        return
    hint = ""
    for folder in (path.parent, path.parent.parent):
        if (folder / LOG).is_file():
            hint = f": here {folder}"
            break
    raise InputError(f"{path}: not a run's folder, it holds no {LOG}; name the run's folder{hint}")


def read_encoder(run: Path) -> tuple[dict[str, Tensor], dict]:
    """Return the tensors and the description of a run's encoder. InputError if it has none yet, or a damaged one."""
    for name in (WEIGHTS,):
        if (run / name).is_file():
            encoder, description = checkpoint.load_encoder(run / name)
            return encoder.state_dict(), description
    raise InputError(f"{run}: holds no {WEIGHTS}; a run writes it at the end of its first epoch")


def read_config(run: Path, description: dict) -> dict | None:
    """Return timm's description of a run's encoder, as the run wrote it; None where timm has no name for it."""
    path = run / CONFIG
    if not checkpoint.is_timms(description["settings"]) or not path.is_file():
        return checkpoint.timm_config(description["settings"], description["view"])
    try:
        config = json.loads(path.read_text())
        is_whole = config["architecture"] and config["pretrained_cfg"]["input_size"]
    except (OSError, ValueError, LookupError, TypeError) as e:
        raise InputError(f"{path}: not the file that pretrain.py wrote ({e!r}); remove it") from e
    model = description["settings"]["model"].partition(".")[0]
    if not is_whole or config["architecture"] != model:
        raise InputError(f"{path}: is of {config['architecture']}, the weights beside it are of {model}; remove it")
    return config


def without_paths(description: dict) -> dict:
    """Cut the paths in a description to their last names: those of a machine are nobody else's matter."""
    settings = EARLIER | description["settings"]
    for name in PLACES:
        if settings[name]:
            settings[name] = Path(settings[name]).name
    words = [re.sub(r"^(--[\w-]+=)?.*/(?=[^/])", r"\1", word) for word in shlex.split(description.get("command", ""))]
    return {**description, "settings": settings, "command": shlex.join(words)}


# ---- The card --------------------------------------------------------------------------------------------------------


def card(name: str, log: RunLog, tensors: dict, description: dict, config: dict | None, license: str) -> str:
    """Write the model card of an encoder."""
    settings, view = description["settings"], description["view"]
    objective = models.METHODS[settings["method"]].title
    if settings["reg"] != "none":
        objective += f" with the regularizer `{settings['reg']}`"
    rows = [f"| {setting} | {value} |" for setting, value in shown_settings(settings)]
    versions = [f"{package} {version}" for package, version in description.get("versions", {}).items()]
    return CARD.format(
        license=license,
        method=settings["method"],
        name=name,
        model=settings["model"],
        objective=objective,
        code="\n".join(code(settings, view, config, tensors)),
        data=data_line(description),
        epochs_done=description["epoch"],
        epochs=settings["epochs"],
        formula="\n".join(formula_of(settings)),
        settings="\n".join(rows),
        view=view_line(view),
        command=description["command"],
        versions=", ".join(versions),
        scores="\n".join(scores(log)),
        citation=CITATION,
    )


def data_line(description: dict) -> str:
    """Name the data of a training, and count them."""
    facts = description.get("data", {})  # not of runs of earlier versions
    counts = []
    images = description.get("images", facts.get("train"))
    if images:
        counts.append(f"{images} training images")
    if facts.get("classes"):
        counts.append(f"{len(facts['classes'])} classes, whose labels were not used")
    more = f" ({', '.join(counts)})" if counts else ""
    return f"`{description['settings']['dataset']}`{more}"


def view_line(view: dict) -> str:
    """Describe the evaluation view."""
    mean, std = (", ".join(f"{x:.4f}" for x in view[name]) for name in ("mean", "std"))
    return f"{view['size']} x {view['size']} pixels, the central {view['crop']:g} of the side; mean {mean}; std {std}"


def formula_of(settings: dict) -> list[str]:
    """Write the objective of a run with every number in force."""
    cfg = Settings(**{name: settings[name] for name in Settings.__dataclass_fields__})
    with torch.device("meta"):
        network = checkpoint.build_described("checkpoint", settings)
    return formula(cfg, models.neurons(network, cfg.reg_on))


def shown_settings(settings: dict) -> list[tuple[str, str]]:
    """Return the settings that matter, with their values."""
    names = ["model", "stem", "norm", *SHOWN_SETTINGS]
    names += models.METHODS[settings["method"]].flags
    if settings["reg"] != "none":
        names += ["reg", "weight"]
    if settings["init"]:
        names.append("init")
    for name, default in default_augmentation(settings["dataset"]).items():
        if settings[name] != default:
            names.append(name)
    return [(name, f"{settings[name]}{UNITS.get(name, '')}") for name in names]


def default_augmentation(dataset: str) -> dict:
    """Return the settings of the two views that a run on this data set has by default."""
    facts = data.FACTS.get(dataset, {})
    return {"jitter": 1.0, "grey": data.GREY_P, "blur_p": list(facts.get("blur_p", (0.0, 0.0)))}


def scores(log: RunLog) -> list[str]:
    """Write the scores of a run's log, with the protocol of each."""
    rows = []
    knn, linear = log.score_row("knn_eval"), log.score_row("linear_eval")
    if knn:
        temperature = knn.get("temperature", TEMPERATURE)
        vote = f"weighted vote of the {knn['k']} nearest neighbours (cosine, temperature {temperature:g})"
        vote += " in the training set"
        rows.append((f"{vote}, on the test set", knn))
        for of, what in FLOORS.items():
            floors = [row for row in log.rows if row.get("of") == of and is_of_one_vote(row, knn)]
            rows += [(f"the same vote on {what}", floors[-1])] if floors else []
    if linear:
        fit = f"{linear['epochs']} epochs of SGD, batch {linear['batch_size']}, rate {linear['lr']:g} per 256 images"
        rows.append((f"linear classifier on frozen features, crops and flips, {fit}, on the test set", linear))
    if not rows:
        return ["The log holds no score of the finished run."]
    lines = [f"| {protocol} | {row['top1']:.1f} | {row['top5']:.1f} |" for protocol, row in rows]
    return ["| protocol | top-1 (%) | top-5 (%) |", "|---|---|---|", *lines]


def is_of_one_vote(row: dict, other: dict) -> bool:
    """Whether two rows are of one protocol. Rows of pretrain.py leave out columns, which then count as equal."""
    return all(row.get(name, other.get(name)) == other.get(name) for name in PROTOCOL)


def code(settings: dict, view: dict, config: dict | None, tensors: dict[str, Tensor]) -> list[str]:
    """Write the lines that load the encoder in its folder and embed a picture."""
    if config:
        return [
            "import timm",
            "from PIL import Image",
            "",
            'encoder = timm.create_model("local-dir:.", pretrained=True).eval()  # in this folder; or "hf-hub:NAME"',
            "view = timm.data.create_transform(**timm.data.resolve_model_data_config(encoder))",
            *[IMAGE, FEATURES],
        ]
    arguments = {"input_size": (3, view["size"], view["size"]), "crop_pct": view["crop"], "interpolation": "bicubic"}
    arguments |= {"mean": tuple(view["mean"]), "std": tuple(view["std"])}
    return [
        "from collections import OrderedDict",
        "from itertools import pairwise",
        "",
        "import safetensors.torch",
        "import timm",
        "from PIL import Image",
        "from torch import nn",
        "",
        *lines_that_build(settings, tensors),
        'encoder.load_state_dict(safetensors.torch.load_file("model.safetensors"))',
        "encoder.eval()",
        f"view = timm.data.create_transform({', '.join(f'{name}={value!r}' for name, value in arguments.items())})",
        *[IMAGE, FEATURES],
    ]


def lines_that_build(settings: dict, tensors: dict[str, Tensor]) -> list[str]:
    """Write the lines that build an encoder that timm has no name for."""
    if settings["model"] == "alexnet":
        lines = [*inspect.getsource(encoders.AlexNet).splitlines(), "", "", "encoder = AlexNet()"]
    else:
        lines = [f'encoder = timm.create_model("{settings["model"]}", num_classes=0)']
        stride = models.STEMS[settings["stem"]]
        if stride:
            width = len(tensors["conv1.weight"])
            lines.append(f"encoder.conv1 = nn.Conv2d(3, {width}, 3, stride={stride}, padding=1, bias=False)")
            lines.append("encoder.maxpool = nn.Identity()")
    if settings["norm"] == "none":
        lines.append("for name, module in list(encoder.named_modules()):")
        lines.append("    if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):")
        lines.append("        encoder.set_submodule(name, nn.Identity())")
    return lines


# ---- The folder ------------------------------------------------------------------------------------------------------


def write_folder(folder: Path, tensors: dict[str, Tensor], description: dict, texts: dict[str, str]) -> None:
    """Write the files into a folder that appears whole or not at all. InputError if it cannot be written."""
    temporary = folder.with_name(f".{folder.name}.{os.getpid()}")
    try:
        temporary.mkdir(parents=True)
        checkpoint.save(temporary / "model.safetensors", tensors, description)
        for name, text in texts.items():
            with write_whole(temporary / name) as file:
                file.write(text.encode(errors="backslashreplace"))
        if folder.exists():
            folder.rmdir()  # it is empty
        temporary.rename(folder)
    except OSError as e:
        raise InputError(f"--to {folder}: cannot be written ({e.strerror})") from e
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


if __name__ == "__main__":
    cli.run(export)
