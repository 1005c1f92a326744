"""What a run is asked to do: flags checked before anything is read, then every setting with the value in force.

    folder = check(flags, defaults, recipes)
    cfg, images = resolve(flags, recipes, accelerator)

A flag that is None takes its value from the recipe, from the data set or from other flags. The stage passes its flags,
their defaults and its recipes as arguments, so that this file does not import it.
"""

import math
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import torch
from accelerate import Accelerator
from torch import Tensor

import data
import models
from harness import saving
from harness.initial import refuse_unfit_weights
from lib import augment, pictures, processes
from lib.errors import InputError
from lib.files import CKPT, RUN_FILES, WEIGHTS, run_folder, weights_file
from lib.sources import has_no_data_dir, has_no_files

NOT_SETTINGS = ("out", "save_every", "resume", "tracker", "workers")  # flags that change nothing in what a run computes
TERMS = {"none": None, "mhe": "energy", "amhe": "energy", "uniform": "uniformity"}  # what --weight weighs
NARROW = 3  # a layer whose neurons have fewer dimensions is regularized only if --reg_on names its network
LONGEST_QUEUE = 65_536  # of MoCo, by default: its authors' for ImageNet
FOLDER_RECIPE = "folder"  # of a folder of pictures, unless --recipe names another


@dataclass(frozen=True)
class Settings:
    """Every setting that decides what a run computes, with the value in force. pretrain.py explains the flags."""

    dataset: str
    data_dir: str
    recipe: str
    method: str
    model: str
    stem: str
    norm: str
    reg: str
    s: float
    weight: float
    reg_on: list[str]  # networks, or layers of a network that is not regularized as a whole
    temperature: float
    epochs: int
    batch_size: int
    accumulate: int
    lr: float
    weight_decay: float
    warmup: float
    tau: float
    hidden_dim: int
    out_dim: int
    blur_p: tuple[float, float]  # of the first and the second view
    eval_crop: float
    holdout: bool
    skip_broken: bool
    seed: int
    eval_every: int
    optimizer: str
    tau_end: float
    predictor: str
    queue: int  # keys
    jitter: float  # part of BYOL's strength
    grey: float
    init: str | None  # where the weights lie that the encoder begins from
    prefix: str | None
    init_digest: str | None = None  # of these weights; known once they are read, see `run.Run`

    @property
    def term(self) -> str | None:
        """The term of the objective that `weight` weighs."""
        return TERMS[self.reg]

    @property
    def peak_lr(self) -> float:
        """The rate of a step after the warm-up, Appendix B.2."""
        return self.lr * self.batch_size / 256


# ---------------------------------------------------------------------------------------------------------------------
# Before anything is read
# ---------------------------------------------------------------------------------------------------------------------


def check(flags: dict, defaults: dict, recipes: Mapping) -> Path:
    """Return the run folder. InputError for whatever can be seen to be wrong before a file is read."""
    folder = Path(flags["out"] or Path("runs", run_name(flags, defaults))).expanduser()
    refuse_idle_flags(flags, defaults, is_new=not os.path.exists(folder / CKPT))
    saving.interval(flags["save_every"])  # raises InputError for another spelling
    if "predictor" in (flags["reg_on"] or ()) and "predictor" not in parts_of(flags):
        raise InputError(f"--reg_on predictor: {flags['method']} has none here; take encoder, projector or both")
    if flags["resume"] == "never" and any((folder / name).exists() for name in RUN_FILES):
        raise InputError(f"--out {folder}: already holds a run; name another folder, or take --resume auto")
    if flags["init"] and not (folder / CKPT).exists():  # a run that goes on has its own weights
        refuse_unfit_weights(flags)
    tracker = flags["tracker"]
    if tracker != "none" and find_spec(tracker) is None:
        raise InputError(f"--tracker {tracker}: is not installed; pip install {tracker}")
    recipe_name(flags, recipes)
    refuse_unwritable(folder)
    with torch.device("meta"):
        encoder = models.build_encoder(flags["model"], "imagenet")
    if "encoder" in (flags["reg_on"] or ()):
        models.neurons(SimpleNamespace(encoder=encoder), ["encoder"])
    return folder


def run_name(flags: dict, defaults: dict) -> str:
    """Name a run by its data set, method, regularizer and every other flag that is not a default: photos-amhe-s1."""
    unnamed = ("dataset", "method", "reg", "data_dir", *NOT_SETTINGS)  # named already, or no matter of the run
    parts = [Path(flags["dataset"]).resolve().name]
    if flags["method"] != "byol" or flags["reg"] == "none":
        parts.append(flags["method"])
    if flags["reg"] != "none":
        parts.append(flags["reg"])
    for name, value in flags.items():
        if value != defaults[name] and name not in unnamed:
            text = "+".join(value) if isinstance(value, tuple) else str(value)
            text = name_of_weights(text) if name == "init" else text
            parts.append(name + text)
    return re.sub(r"[^\w.+-]+", "_", "-".join(parts))[:200]


def name_of_weights(path: str) -> str:
    """Name weights in the name of a run: by the run that they are of, or by their file without its endings."""
    file = Path(weights_file(Path(path).expanduser().resolve()))
    if file.is_dir():
        file = file / Path(WEIGHTS).name
    if file.name in (CKPT, Path(WEIGHTS).name):
        return run_folder(file).name
    return file.name.partition(".")[0]


def idle_flags(method: str) -> set[str]:
    """Name the flags of other methods, which have no effect on this one."""
    of_methods = {name for other in models.METHODS.values() for name in other.flags}
    return of_methods - {*models.METHODS[method].flags}


def refuse_idle_flags(flags: dict, defaults: dict, is_new: bool) -> None:
    """Raise InputError for a flag that has no effect beside another. Earlier runs may have two of these, and go on."""
    term = TERMS[flags["reg"]]
    idle_beside = {}
    if term != "energy":
        idle_beside |= {"s": "reg", "reg_on": "reg"}
    if term is None:
        idle_beside["weight"] = "reg"
    idle_beside |= {name: "method" for name in sorted(idle_flags(flags["method"]))}
    if flags["model"] == "alexnet":
        idle_beside["stem"] = "model"
    if is_new and has_no_data_dir(flags["dataset"]):
        idle_beside["data_dir"] = "dataset"
    if is_new and has_no_files(flags["dataset"]):
        idle_beside["skip_broken"] = "dataset"
    for name, other in idle_beside.items():
        if flags[name] != defaults[name]:
            raise InputError(f"--{name} {written(flags[name])}: has no effect with --{other} {flags[other]}")
    if flags["prefix"] and not flags["init"]:
        raise InputError(f"--prefix {flags['prefix']}: has no effect without --init")


def written(value) -> str:
    """Write a flag's value as on a command line."""
    return ",".join(value) if isinstance(value, tuple) else str(value).removesuffix(".0")


def refuse_unwritable(folder: Path) -> None:
    """Raise InputError if a run folder cannot be made."""
    for place in (folder, *folder.parents):
        if os.path.exists(place):
            break
    if not place.is_dir():
        raise InputError(f"--out {folder}: cannot be written ({place} is a file)")
    if not os.access(place, os.W_OK | os.X_OK):
        raise InputError(f"--out {folder}: cannot be written ({place} is read-only)")


def recipe_name(flags: dict, recipes: Mapping) -> str:
    """Return the name of the recipe in force. InputError for one that belongs to another data set."""
    dataset, name = flags["dataset"], flags["recipe"]
    own = [recipe for recipe in recipes if recipe.partition("-")[0] == dataset]
    if name and own and name not in (*own, FOLDER_RECIPE):
        raise InputError(f"--recipe {name}: is not for {dataset}, which has {', '.join(own)}")
    if name:
        return name
    return own[0] if own else FOLDER_RECIPE


# ---------------------------------------------------------------------------------------------------------------------
# Every setting with its value in force
# ---------------------------------------------------------------------------------------------------------------------


def resolve(flags: dict, recipes: Mapping, accelerator: Accelerator) -> tuple[Settings, data.Dataset]:
    """Return the settings in force and the data set. InputError for settings that do not go together."""
    values = resolve_recipe(flags, recipes, accelerator.num_processes)
    pictures.choose_workers(flags["workers"])
    with processes.first_alone(accelerator):  # it downloads a set, the others find it
        images = data.load(flags["dataset"], flags["data_dir"], pretraining=True, skip_broken=flags["skip_broken"])
    if flags["holdout"]:
        images = data.hold_out(images)
    if not values["batch_size"]:
        n = len(images.pretraining.labels)
        accumulate, world = flags["accumulate"], accelerator.num_processes
        if n < 2 * accumulate * world:
            need = f"a batch takes two for each micro-batch of each process, {2 * accumulate * world}"
            raise InputError(f"dataset {flags['dataset']}: has {n} images to train on; {need}; take fewer of these")
        values["batch_size"] = batch_size_for(n, accumulate)
        refuse_uneven_batch(values["batch_size"], accumulate, world)
    return resolve_images(values, flags, images), images


def resolve_recipe(flags: dict, recipes: Mapping, world: int) -> dict:
    """Return every setting that flags and recipe decide. InputError for settings that do not go together."""
    chosen = recipe_name(flags, recipes)
    recipe = recipes[chosen]
    epochs = flags["epochs"] or recipe.epochs
    weights = {None: 0.0, "energy": float(recipe.energy_weight), "uniformity": recipe.uniformity_weight}
    defaults = asdict(recipe) | models.METHODS[flags["method"]].numbers
    defaults["recipe"] = chosen
    defaults["weight"] = weights[TERMS[flags["reg"]]]
    defaults["reg_on"] = ("projector", "predictor")
    defaults["warmup"] = recipe.warmup * epochs / recipe.epochs
    values = {}
    for name, value in flags.items():
        if name not in NOT_SETTINGS:
            values[name] = defaults.get(name) if value is None else value
    if "queue" not in models.METHODS[flags["method"]].flags:
        values["queue"] = 0
    values["reg_on"] = [part for part in parts_of(flags) if part in values["reg_on"]]
    if flags["reg_on"] is None:
        values["reg_on"] = without_narrow_layers(values["reg_on"], values)
    if values["warmup"] >= epochs:
        raise InputError(f"--warmup {values['warmup']}: must be shorter than the training, {epochs} epochs")
    if values["batch_size"]:
        refuse_uneven_batch(values["batch_size"], values["accumulate"], world)
    return values


def parts_of(flags: dict) -> list[str]:
    """Return the networks of a method that are trained by gradients."""
    has_predictor = models.METHODS[flags["method"]].network.has_predictor and flags["predictor"] == "mlp"
    return ["encoder", "projector", "predictor"] if has_predictor else ["encoder", "projector"]


def batch_size_for(n: int, micro_batches: int) -> int:
    """Return the largest power of two of which n images make 128 batches, but at least 32, or n, and at most 512.

    It is rounded down to equal micro-batches, or up to two images in each. It does not depend on the processes: a run
    may go on with another number of them.
    """
    power = 2 ** int(math.log2(max(1, n / 128)))
    batch_size = min(max(power, 32), 512, n)
    return max(batch_size // micro_batches, 2) * micro_batches


def without_narrow_layers(parts: list[str], values: dict) -> list[str]:
    """Replace a head that has a narrow layer by its other layers.

    On a circle 4,096 neurons lie 1.5e-3 apart at best: at s = 2 their energy is 340 at least and 10,000 at random. It
    would outweigh the loss by far, and its gradient comes from the few pairs that happen to be closest.
    """
    kept = []
    for part in parts:
        layers = head_layers(part, values)
        wide = [name for name, weight in layers.items() if not is_narrow(weight)]
        kept += [part] if len(wide) == len(layers) else wide
    return kept


def head_layers(part: str, values: dict) -> dict[str, Tensor]:
    """Return the layers of a head, without memory; the width of the encoder's features is left open."""
    hidden_dim, out_dim = values["hidden_dim"], values["out_dim"]
    in_dim = NARROW
    if part == "predictor":
        in_dim = out_dim
        hidden_dim = models.METHODS[values["method"]].network.predictor_width(hidden_dim, out_dim)
    with torch.device("meta"):
        head = models.mlp(in_dim, hidden_dim, out_dim)
    return models.neurons(SimpleNamespace(**{part: head}), [part])


def is_narrow(weight: Tensor) -> bool:
    """Whether the neurons of a layer have too few dimensions to spread."""
    return weight[0].numel() < NARROW


def refuse_uneven_batch(batch_size: int, accumulate: int, world: int) -> None:
    """Raise InputError unless each micro-batch of each process has the same number of images, two at least."""
    shares = accumulate * world
    if batch_size % shares == 0 and batch_size >= 2 * shares:
        return
    below = batch_size // shares
    suggestions = sorted({max(2, images) * shares for images in (below, below + 1)})
    advice = " or ".join(map(str, suggestions))
    plural = "es" if world > 1 else ""
    among = f"{accumulate} micro-batches of {world} process{plural}"
    rule = f"must be a multiple of {shares}, and at least twice that, for {among}"
    raise InputError(f"--batch_size {batch_size}: {rule}; take {advice}")


def resolve_images(values: dict, flags: dict, images: data.Dataset) -> Settings:
    """Add the settings that the data set decides. InputError if it is too small, or has no classes to judge by."""
    dataset, batch_size = flags["dataset"], values["batch_size"]
    n = len(images.pretraining.labels)
    if batch_size > n:
        source = "" if flags["batch_size"] else f" (recipe {values['recipe']})"
        raise InputError(f"--batch_size {batch_size}{source}: {dataset} has {n} images to train on; take fewer")
    if not images.classes and flags["eval_every"]:
        reason = f"{dataset} has fewer than two classes, so nothing can be judged; leave it out"
        raise InputError(f"--eval_every {flags['eval_every']}: {reason}")
    if flags["blur_p"] and images.size < augment.SMALLEST_BLURRED:
        least = f"views of {images.size} pixels; they must have {augment.SMALLEST_BLURRED}"
        raise InputError(f"--blur_p {flags['blur_p']}: has no effect on {least}")
    values = dict(values)
    values["stem"] = flags["stem"] or images.stem
    values["blur_p"] = images.blur_p if flags["blur_p"] is None else (flags["blur_p"], flags["blur_p"])
    if not images.classes:
        values["eval_every"] = 0
    values["init_digest"] = None
    if values["queue"] != 0:
        values["queue"] = queue_length(values, n)
    return Settings(**{field.name: values[field.name] for field in fields(Settings)})


def queue_length(values: dict, n: int) -> int:
    """Return the number of keys in MoCo's queue. InputError unless it is below the number of images."""
    length = values["queue"] or max(1, min(LONGEST_QUEUE, n // 2))
    if length >= n:
        least = f"{values['dataset']} has {n} images to train on"
        why = "the longer the queue, the more images meet their own earlier projections in it"
        raise InputError(f"--queue {length}: {least}; take fewer, {why}")
    return length


# ---------------------------------------------------------------------------------------------------------------------
# What a run says of itself before its first step
# ---------------------------------------------------------------------------------------------------------------------


def announcement(cfg: Settings, flags: dict, layers: dict[str, Tensor], accelerator: Accelerator) -> list[str]:
    """Write the objective, the numbers in force with their sources, and how processes share a batch: lines."""
    begins_from = [f"encoder: begins from {cfg.init}"] if cfg.init else []
    lines = [*formula(cfg, layers), *left_out(cfg, flags), *begins_from]
    return [*lines, *numbers_in_force(cfg, flags), *sharing(cfg, accelerator)]


def formula(cfg: Settings, layers: dict[str, Tensor]) -> list[str]:
    """Write the objective with every number in force."""
    lines = [f"loss = {cfg.method}"]
    if cfg.term:
        lines[0] += f" + {cfg.weight:g} {cfg.term}"
    lines.append(models.METHODS[cfg.method].formula.format(**asdict(cfg)))
    if cfg.predictor == "none":
        lines.append("p = z, as there is no predictor")
    if cfg.term == "uniformity":
        lines.append("uniformity = log E exp(-2 |z_i - z_j|^2) of unit rows, averaged over both views (Eq. 2)")
    if cfg.term == "energy":
        distance, equation = ("|w_i - w_j|", "Eq. 5") if cfg.reg == "mhe" else ("arccos(w_i . w_j)", "Eq. A.3")
        potential = f"{distance}^-{cfg.s:g}" if cfg.s else f"log(1 / {distance})"
        lines.append(
            f"energy = sum over layers of the mean over i != j of {potential} of unit rows ({equation}, Eq. 7)"
        )
        lines.append(f"layers: {with_shapes(layers)}")
    return lines


def with_shapes(layers: dict[str, Tensor]) -> str:
    """List layers with their numbers of neurons and of dimensions."""
    return ", ".join(f"{name} ({len(weight)} x {weight[0].numel()})" for name, weight in layers.items())


def left_out(cfg: Settings, flags: dict) -> list[str]:
    """Name the narrow layers that have no energy because --reg_on does not name their network."""
    if cfg.term != "energy" or flags["reg_on"] is not None:
        return []
    values = asdict(cfg)
    heads = parts_of(values)[1:]
    narrow = {}
    for head in heads:
        layers = head_layers(head, values)
        narrow |= {name: weight for name, weight in layers.items() if is_narrow(weight)}
    if not narrow:
        return []
    reason = f"their neurons have fewer than {NARROW} dimensions"
    return [f"left out: {with_shapes(narrow)}: {reason}; --reg_on {','.join(heads)} takes them in"]


def numbers_in_force(cfg: Settings, flags: dict) -> list[str]:
    """Name the numbers of a run by where they come from: the recipe, the method, the data set or a flag."""
    method = models.METHODS[cfg.method]
    names = ["epochs", "batch_size", "optimizer", "lr", "weight_decay", "warmup", "hidden_dim", "out_dim"]
    names += [name for name in method.flags if name != "predictor"]
    if cfg.term:
        names.append("weight")
    numbers = {}
    for name in names:
        source = f"recipe {cfg.recipe}"
        if flags[name] is not None:
            source = "flag"
        elif name in method.numbers:
            source = f"method {cfg.method}"
        elif name == "queue":
            source = "data set"
        numbers.setdefault(source, []).append(f"{name} {_short(getattr(cfg, name))}")
    lines = [f"{source}: {', '.join(listed)}" for source, listed in numbers.items()]
    chances = ", ".join(f"{p:g}" for p in cfg.blur_p)
    lines.append(f"views: jitter {cfg.jitter:g}, grey {cfg.grey:g}, blur_p {chances}")
    lines.append(f"peak learning rate: {cfg.peak_lr:g} (lr * batch_size / 256)")
    return lines


def _short(value: float | str) -> str:
    return value if isinstance(value, str) else f"{value:g}"


def sharing(cfg: Settings, accelerator: Accelerator) -> list[str]:
    """Say how several processes share a batch and its statistics."""
    world = accelerator.num_processes
    if world == 1:
        return []
    line = f"{world} processes: {cfg.batch_size // world} images of each step a process"
    if cfg.norm == "bn":
        line += "; statistics of BatchNorm: of all processes"
    return [line]
