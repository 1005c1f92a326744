"""What a run is asked to do: flags checked before anything is read, then every setting with the value in force.

    folder = check(flags, defaults, recipes)
    cfg, images = resolve(flags, recipes, accelerator)

A flag that is None takes its value from the recipe, from the data set or from other flags.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn

import data
import models
from harness import state
from harness.foreign import refuse_unfit_weights
from lib import augment, encoders, processes
from lib.errors import InputError
from lib.files import CKPT, RUN_FILES, WEIGHTS, run_folder, weights_file
from lib.log import PLACES, as_json, other_data, same_place
from lib.rivals import SLICES
from lib.sources import WITHOUT_FILES, has_no_data_dir

NOT_SETTINGS = ("out", "save_every", "resume", "tracker", "workers", "json")  # they change nothing that is computed
ANNOUNCED = ("epochs", "batch_size", "optimizer", "lr", "weight_decay", "warmup", "hidden_dim", "out_dim", "jitter")
ANNOUNCED += ("grey", "blur_p", "init")  # settings that a run prints before its first step
GROUPS = {"dataset": "data", "method": "method", "reg": "regularizer"}  # titles in --help, by first flags
GROUPS |= {"temperature": "recipe", "blur_p": "views", "seed": "run"}
TERMS = {"none": None, "mhe": "energy", "amhe": "energy", "uniform": "uniformity"}  # what --weight weighs
TERMS |= {"ortho": "ortho", "koleo": "koleo", "sigreg": "sigreg"}
ON_NEURONS = ("energy", "ortho")  # terms on which --reg_on acts
RIVAL_WEIGHTS = {"ortho": 1.0, "koleo": 0.3, "sigreg": 0.1}  # lambda of terms of others, docs/results.md
FORMULAS = {
    "uniformity": "log E exp(-2 |z_i - z_j|^2) of unit rows, averaged over both views (Eq. 2)",
    "ortho": "sum over layers of the mean over i != j of (w_i . w_j)^2 of unit rows (Bansal et al. 2018)",
    "koleo": "E -log |z_i - z_j| of unit rows, j the nearest, averaged over both views (Sablayrolles et al. 2019)",
    "sigreg": f"Epps-Pulley statistic of z along {SLICES} directions, their mean, averaged over both views (LeJEPA)",
}
NARROW = 3  # a layer whose neurons have fewer dimensions is regularized only if --reg_on names its network
LONGEST_QUEUE = 65_536  # of MoCo, by default: its authors' for ImageNet
HEADS = ("projector", "predictor")  # what --reg_on names by default, Appendix B.1
IDLE = {  # flags that have no effect where another has a value
    ("reg", "none"): ("s", "reg_on", "weight"),
    ("reg", "uniform"): ("s", "reg_on"),
    ("reg", "ortho"): ("s",),
    ("reg", "koleo"): ("s", "reg_on"),
    ("reg", "sigreg"): ("s", "reg_on"),
    ("init", None): ("prefix",),
}
FOLDER_RECIPE = "folder"  # of a folder of pictures, unless --recipe names another


class Settings(SimpleNamespace):
    """Every setting that decides what a run computes, in force, by the name of its flag; init_digest is of --init."""

    @property
    def term(self) -> str | None:
        """The term of the objective that `weight` weighs."""
        return TERMS[self.reg]

    @property
    def peak_lr(self) -> float:
        """The rate of a step after the warm-up, Appendix B.2."""
        return self.lr * self.batch_size / 256


# ---- Before the data are read ----------------------------------------------------------------------------------------
def check(flags: dict, defaults: dict, recipes: Mapping) -> Path:
    """Return the run folder. InputError for whatever can be seen to be wrong before the data are read."""
    folder = Path(flags["out"] or Path("runs", run_name(flags, defaults))).expanduser()
    refuse_unwritable(folder)
    refuse_idle_flags(flags, defaults)
    recipe_name(flags, recipes)
    state.Schedule(flags["save_every"], 0, is_new=True)  # InputError for another spelling
    if "predictor" in (flags["reg_on"] or ()) and "predictor" not in trained_parts(flags):
        advice = "take encoder, projector, or encoder,projector"
        raise InputError(f"--reg_on predictor: {flags['method']} has none here; {advice}")
    if flags["resume"] == "never" and any(os.path.exists(folder / name) for name in RUN_FILES):
        raise InputError(f"--out {folder}: already holds a run; name another folder, or take --resume auto")
    if flags["init"] and not os.path.exists(folder / CKPT):  # a run that goes on has its own weights
        refuse_unfit_weights(flags)
    if flags["tracker"] not in ("none", *map(str, get_available_trackers())):
        raise InputError(f"--tracker {flags['tracker']}: is not installed; pip install {flags['tracker']}")
    with torch.device("meta"):
        encoder = models.build_encoder(flags["model"], "imagenet")
    if "encoder" in (flags["reg_on"] or ()):
        models.neurons(nn.ModuleDict({"encoder": encoder}), ["encoder"])
    return folder


def run_name(flags: dict, defaults: dict) -> str:
    """Name a run by its data set, method, regularizer and every other flag that is not a default: photos-amhe-s1.0."""
    unnamed = ("dataset", "method", "reg", "data_dir", *NOT_SETTINGS)  # named already, or no matter of the run
    parts = [Path(flags["dataset"]).resolve().name]
    if flags["method"] != "byol" or flags["reg"] == "none":
        parts.append(flags["method"])
    if flags["reg"] != "none":
        parts.append(flags["reg"])
    for name, value in flags.items():
        if value != defaults[name] and name not in unnamed:
            text = "+".join(value) if isinstance(value, tuple) else str(value)
            parts.append(name + (name_of_weights(text) if name == "init" else text))
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:200]


def name_of_weights(path: str) -> str:
    """Name weights in the name of a run: by the run that they are of, or by their file without its endings."""
    file = Path(weights_file(Path(path).expanduser().resolve()))
    if file.is_dir() or file.name in (CKPT, Path(WEIGHTS).name):
        return run_folder(file / CKPT if file.is_dir() else file).name
    return file.name.partition(".")[0]


def idle_flags(values: dict) -> dict[str, str]:
    """Return the flags that have no effect beside the value of another, and that other, by name."""
    own_flags = models.METHODS[values["method"]].flags
    idle_beside = {name: "method" for method in models.METHODS.values() for name in {*method.flags} - {*own_flags}}
    for (other, value), names in IDLE.items():
        if values.get(other) == value:
            idle_beside |= dict.fromkeys(names, other)
    return idle_beside


def refuse_idle_flags(flags: dict, defaults: dict) -> None:
    """Raise InputError for a flag that has no effect beside another, or on the data set."""
    idle_beside = idle_flags(flags)
    if has_no_data_dir(flags["dataset"]):
        idle_beside["data_dir"] = "dataset"
    if flags["model"] == "alexnet" or encoders.is_vit(flags["model"]):
        idle_beside["stem"] = "model"
    if flags["dataset"] in WITHOUT_FILES:
        idle_beside["skip_broken"] = "dataset"
    for name, other in idle_beside.items():
        if flags[name] != defaults[name]:
            typed = ",".join(flags[name]) if isinstance(flags[name], tuple) else f"{flags[name]}".removesuffix(".0")
            raise InputError(f"--{name} {typed}: has no effect with --{other} {flags[other]}")


def refuse_unwritable(folder: Path) -> None:
    """Raise InputError if a run folder cannot be made."""
    place = next(place for place in (folder, *folder.parents) if os.path.lexists(place))
    if not place.is_dir():
        raise InputError(f"--out {folder}: cannot be written ({place} is no folder)")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: cannot be written ({place} is read-only)")


def recipe_name(flags: dict, recipes: Mapping) -> str:
    """Return the name of the recipe in force. InputError for one that belongs to another data set."""
    dataset, name = flags["dataset"], flags["recipe"]
    own = [recipe for recipe in recipes if recipe.partition("-")[0] == dataset]
    if name and own and name not in (*own, FOLDER_RECIPE):
        raise InputError(f"--recipe {name}: is not for {dataset}, which has {', '.join(own)}")
    return name or (own or [FOLDER_RECIPE])[0]


# ---- Every setting with its value in force ---------------------------------------------------------------------------
def resolve(flags: dict, recipes: Mapping, accelerator: Accelerator) -> tuple[Settings, data.Dataset]:
    """Return the settings in force and the data set. InputError for settings that do not go together."""
    values = resolve_recipe(flags, recipes, accelerator.num_processes)
    with processes.first_alone(accelerator):  # it downloads a set, the others find it
        images = data.load(flags["dataset"], flags["data_dir"], True, flags["skip_broken"], flags["workers"])
    if flags["holdout"]:
        images = data.hold_out(images)
    cfg = resolve_images(values, flags, images)
    refuse_uneven_batch(cfg.batch_size, cfg.accumulate, accelerator.num_processes)
    return cfg, images


def resolve_recipe(flags: dict, recipes: Mapping, world: int) -> dict:
    """Return every setting that flags and recipe decide. InputError for settings that do not go together."""
    chosen = recipe_name(flags, recipes)
    recipe, term = recipes[chosen], TERMS[flags["reg"]]
    epochs = flags["epochs"] or recipe.epochs
    weights = {None: 0.0, "energy": float(recipe.energy_weight), "uniformity": recipe.uniformity_weight}
    weights |= RIVAL_WEIGHTS
    own = {"recipe": chosen, "weight": weights[term], "warmup": recipe.warmup * epochs / recipe.epochs, "queue": 0}
    defaults = {**flags, **asdict(recipe), **own, **models.METHODS[flags["method"]].numbers}
    given = {name: value for name, value in flags.items() if value is not None}
    values = {name: given.get(name, defaults[name]) for name in flags if name not in NOT_SETTINGS}
    values["reg_on"] = [part for part in trained_parts(flags) if part in (flags["reg_on"] or HEADS)]
    if flags["reg_on"] is None:
        values["reg_on"] = wide_layers(values)
    if values["optimizer"] == "adamw" and not flags["lr"]:
        raise InputError("--optimizer adamw: takes --lr, too, such as 0.004; those of the recipes are for LARS and SGD")
    if values["warmup"] >= epochs:
        raise InputError(f"--warmup {values['warmup']}: must be shorter than the training, {epochs} epochs")
    if values["batch_size"]:
        refuse_uneven_batch(values["batch_size"], values["accumulate"], world)
    return values


def trained_parts(flags: dict) -> list[str]:
    """Return the networks of a method that are trained by gradients."""
    has_predictor = models.METHODS[flags["method"]].network.has_predictor and flags["predictor"] == "mlp"
    return ["encoder", "projector", "predictor"] if has_predictor else ["encoder", "projector"]


def wide_layers(values: dict) -> list[str]:
    """Name the heads, and of a head that has a narrow layer its other layers.

    On a circle 4,096 neurons lie 1.5e-3 apart at best: at s = 2 their energy is 340 at least and 10,000 at random. It
    would outweigh the loss by far, and its gradient comes from the few pairs that happen to be closest.
    """
    hidden_dim, out_dim = values["hidden_dim"], values["out_dim"]
    predictor_width = models.METHODS[values["method"]].network.predictor_width(hidden_dim, out_dim)
    dimensions = {"projector.out": hidden_dim, "predictor.hidden": out_dim, "predictor.out": predictor_width}
    kept = []
    for part in values["reg_on"]:
        layers = (f"{part}.hidden", f"{part}.out")
        wide = [layer for layer in layers if dimensions.get(layer, NARROW) >= NARROW]
        kept += [part] if len(wide) == 2 else wide
    return kept


def batch_size_for(n: int, micro_batches: int) -> int:
    """Return the largest power of two of which n images make 128 batches, but at least 32, or n, and at most 512.

    It is rounded down to equal micro-batches, or up to two images in each, whatever the number of processes.
    """
    power = 2 ** int(math.log2(max(1, n / 128)))
    batch_size = min(max(power, 32), 512, n)
    return max(batch_size // micro_batches, 2) * micro_batches


def refuse_uneven_batch(batch_size: int, accumulate: int, world: int) -> None:
    """Raise InputError unless each micro-batch of each process has the same number of images, two at least."""
    shares = accumulate * world
    if batch_size % shares == 0 and batch_size >= 2 * shares:
        return
    suggestions = sorted({max(2, batch_size // shares + more) * shares for more in (0, 1)})
    rule = f"must be a multiple of {shares}, and at least twice that: {accumulate} micro-batches, {world} processes"
    raise InputError(f"--batch_size {batch_size}: {rule}; take {' or '.join(map(str, suggestions))}")


def resolve_images(values: dict, flags: dict, images: data.Dataset) -> Settings:
    """Add the settings that the data set decides. InputError if it is too small, or has no classes to judge by."""
    n, dataset = len(images.pretraining.labels), flags["dataset"]
    batch_size = values["batch_size"] or batch_size_for(n, values["accumulate"])
    blur_p = images.blur_p if flags["blur_p"] is None else (flags["blur_p"], flags["blur_p"])
    stem = "imagenet" if encoders.is_vit(flags["model"]) else flags["stem"] or images.stem
    values = {**values, "batch_size": batch_size, "stem": stem, "blur_p": blur_p}
    if batch_size > n:
        source = "" if flags["batch_size"] else f" (recipe {values['recipe']})"
        raise InputError(f"--batch_size {batch_size}{source}: {dataset} has {n} images to train on; take fewer")
    if not images.classes:
        if flags["eval_every"]:
            reason = f"{dataset} has fewer than two classes, so nothing can be judged; leave it out"
            raise InputError(f"--eval_every {flags['eval_every']}: {reason}")
        values["eval_every"] = 0
    if flags["blur_p"] and images.size < augment.SMALLEST_BLURRED:
        least = f"views of {images.size} pixels; they must have {augment.SMALLEST_BLURRED}"
        raise InputError(f"--blur_p {flags['blur_p']}: has no effect on {least}")
    if "queue" in models.METHODS[flags["method"]].flags:
        values["queue"] = values["queue"] or max(1, min(LONGEST_QUEUE, n // 2))
        if values["queue"] >= n:
            raise InputError(f"--queue {values['queue']}: {dataset} has {n} images to train on; take fewer")
    return Settings(**values, init_digest=None)  # until the weights are read


def refuse_other_run(folder: Path, description: dict, stored: dict) -> None:
    """Raise InputError if a folder's run has other settings, or trains on other images, than the one described.

    The weights of --init may be gone, since the run has its own: then their digest is taken from the stored state.
    """
    settings, stored_settings = description["settings"], stored["settings"]
    is_gone = settings["init"] and settings["init_digest"] is None
    if is_gone and same_place(settings["init"], stored_settings["init"] or ""):
        processes.say(f"--init {settings['init']}: is gone, so it is unchecked; the run goes on from its own weights")
        settings["init_digest"] = stored_settings["init_digest"]
    faults = []
    for name, value in as_json(settings).items():
        before = stored_settings.get(name)
        if name == "init_digest" and value != before:  # two files may have the same name
            faults.append(f"--init {settings['init']} [{value}] (it was {stored_settings['init']} [{before}])")
        elif name not in PLACES and value != before:
            faults.append(f"--{name} {value} (it was {before})")
    new_data = other_data(description, stored)
    if faults and not new_data:
        other = f"holds a run with other settings, {', '.join(faults)}"
        raise InputError(f"--out {folder}: {other}; take what it was, or name another folder")
    for name in ("images", "steps"):
        if description[name] != stored[name]:
            new_data.append(f"{name} {description[name]} (it was {stored[name]})")
    if new_data:
        raise InputError(f"--out {folder}: holds a run on other images, {', '.join(new_data)}; name another folder")


# ---- What a run says of itself before its first step -----------------------------------------------------------------
def announcement(cfg: Settings, flags: dict, layers: dict[str, Tensor]) -> list[str]:
    """Write the objective and the numbers in force: lines."""
    lines = formula(cfg, layers)
    heads = trained_parts(vars(cfg))[1:]
    if cfg.term in ON_NEURONS and flags["reg_on"] is None and cfg.reg_on != heads:
        narrow = f"layers whose neurons have fewer than {NARROW} dimensions"
        lines.append(f"left out: {narrow}; --reg_on {','.join(heads)} takes them in")
    names = (*ANNOUNCED, *models.METHODS[cfg.method].flags)
    numbers = ", ".join(f"{name} {getattr(cfg, name)}" for name in names if getattr(cfg, name) is not None)
    lines.append(f"recipe {cfg.recipe} and flags: {numbers}; peak rate {cfg.peak_lr:g} (lr * batch_size / 256)")
    return lines


def formula(cfg: Settings, layers: dict[str, Tensor]) -> list[str]:
    """Write the objective with every number in force."""
    term = f" + {cfg.weight:g} {cfg.term}" if cfg.term else ""
    lines = [f"loss = {cfg.method}{term}", models.METHODS[cfg.method].formula.format(**vars(cfg))]
    if cfg.predictor == "none":
        lines.append("p = z, as there is no predictor")
    if cfg.term in FORMULAS:
        lines.append(f"{cfg.term} = {FORMULAS[cfg.term]}")
    if cfg.term == "energy":
        distance, equation = ("|w_i - w_j|", "Eq. 5") if cfg.reg == "mhe" else ("arccos(w_i . w_j)", "Eq. A.3")
        potential = f"{distance}^-{cfg.s:g}" if cfg.s else f"log(1 / {distance})"
        mean = f"mean over i != j of {potential} of unit rows ({equation}, Eq. 7)"
        lines.append(f"energy = sum over layers of the {mean}")
    if cfg.term in ON_NEURONS:
        shapes = [f"{name} ({len(weight)} x {weight[0].numel()})" for name, weight in layers.items()]
        lines.append(f"layers: {', '.join(shapes)}")
    return lines
