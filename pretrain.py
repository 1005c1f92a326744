"""Pre-train an image encoder by BYOL or SimCLR, with or without the paper's regularizers.

    accelerate launch pretrain.py --reg amhe --s 2

trains ResNet-18 on the embedded photographs (one to three minutes on two CPU cores) and leaves a run folder with
ckpt.safetensors (online network and target), encoder.safetensors (the encoder alone, under timm's names) and
metrics.jsonl (the rows that were printed).
"""

import inspect
import json
import math
import os
import re
import shlex
import signal
import sys
import time
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import set_seed
from timm.optim import Lars
from torch import Tensor, nn
from tqdm import tqdm

import data
import models
from harness import cli, processes
from harness import run as runs
from harness.augment import two_views
from knn_eval import nearest_neighbours
from regularizers import alignment, amhe, info_nce, mhe, uniformity, unit

Pair = tuple[Tensor, Tensor]  # of both views


@dataclass(frozen=True)
class Recipe:
    """What a data set is trained with, unless a flag says otherwise."""

    epochs: int
    batch_size: int  # images in one optimizer step, over all processes
    lr: float  # per 256 images: the peak rate is lr * batch_size / 256, Appendix B.2
    weight_decay: float
    warmup: float  # epochs
    tau: float  # of the target's moving average at the start; it ends at 1
    hidden_dim: int
    out_dim: int
    energy_weight: float  # lambda of mhe and amhe
    uniformity_weight: float  # lambda of uniform
    temperature: float  # of simclr
    eval_every: int  # epochs


# Rates, batches, epochs, warm-up, tau, weight decay: Appendix B.2; the decay that it leaves out for CIFAR and STL-10 is
# ImageNet's. Heads: Section 3.6. lambda of energies: Appendix C.1, for ImageNet Section 4; of uniformity: Section 4.
# Temperatures, which the paper does not give: SimCLR's. photos is ours: minutes on two cores; so few steps want a
# large rate and a slow target.
RECIPES = {
    #                     epochs batch   lr   decay warm-up  tau  hidden  out  lambdas   temp. eval
    "photos":        Recipe(   9,   64,    6,   1e-6,  0, 0.996,   512, 256, 10, 0.125,  0.5,   1),
    "cifar10-300":   Recipe( 300, 1024,  1.5,   1e-6, 10,  0.99,  4096, 256, 10, 0.125,  0.5,  10),
    "cifar10-1000":  Recipe(1000, 1024,  1.0,   1e-6, 10, 0.996,  4096, 256, 10, 0.125,  0.5,  10),
    "cifar100-300":  Recipe( 300, 1024,  1.5,   1e-6, 10,  0.99,  4096, 256, 10, 0.125,  0.5,  10),
    "cifar100-1000": Recipe(1000, 1024,  1.0,   1e-6, 10, 0.996,  4096, 256, 10, 0.125,  0.5,  10),
    "stl10-1000":    Recipe(1000, 1024, 0.45,   1e-6, 10, 0.996,  4096, 256, 10, 0.125,  0.5,  10),
    "imagenet-300":  Recipe( 300,  512,  0.3,   1e-6, 10,  0.99,  4096, 256,  1, 0.125,  0.1,  10),
    "imagenet-1000": Recipe(1000, 4096,  0.2, 1.5e-6, 10, 0.996,  4096, 256,  1, 0.125,  0.1,  10),
}  # fmt: skip
HOW = ("out", "save_every", "resume", "tracker")  # flags that change nothing in what a run computes
TERMS = {"none": None, "mhe": "energy", "amhe": "energy", "uniform": "uniformity"}  # what lambda weighs


def pretrain(
    *,
    dataset: str = "photos",
    data_dir: str = "data",
    recipe: Literal[*RECIPES] | None = None,
    method: Literal["byol", "simclr"] = "byol",
    model: str = "resnet18",
    stem: Literal["cifar", "imagenet"] | None = None,
    norm: Literal["bn", "none"] = "bn",
    reg: Literal["none", "mhe", "amhe", "uniform"] = "none",
    s: Annotated[float, ">= 0"] = 2.0,
    weight: Annotated[float, ">= 0"] | None = None,
    reg_on: tuple[Literal["encoder", "projector", "predictor"], ...] | None = None,
    temperature: Annotated[float, "> 0"] | None = None,
    epochs: Annotated[int, ">= 1"] | None = None,
    batch_size: Annotated[int, ">= 2"] | None = None,
    accumulate: Annotated[int, ">= 1"] = 1,
    lr: Annotated[float, "> 0", "< 1e6"] | None = None,
    weight_decay: Annotated[float, ">= 0"] | None = None,
    warmup: Annotated[float, ">= 0"] | None = None,
    tau: Annotated[float, ">= 0", "<= 1"] | None = None,
    hidden_dim: Annotated[int, ">= 1", "<= 65536"] | None = None,
    out_dim: Annotated[int, ">= 1", "<= 65536"] | None = None,
    blur_p: Annotated[float, ">= 0", "<= 1"] | None = None,
    eval_crop: Annotated[float, "> 0", "<= 1"] = data.EVAL_CROP,
    holdout: bool = False,
    skip_broken: bool = False,
    seed: Annotated[int, ">= 0", "< 1e9"] = 0,
    out: str | None = None,
    eval_every: Annotated[int, ">= 0"] | None = None,
    save_every: Annotated[int, ">= 0"] = 500,
    resume: Literal["auto", "never"] = "auto",
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none",
):
    """Pre-train an encoder by BYOL or SimCLR. None = the value of the recipe, which is printed before the first step.

    Args:
        dataset: photos (embedded), cifar10, cifar100, stl10, imagenet, or a folder with train/ and test/ (or val/)
        data_dir: where cifar10, cifar100 and stl10 lie or are downloaded to; the folder of imagenet
        recipe: a row of the table of recipes; None = the data set's shorter one, for a folder cifar10-300
        method: byol or simclr
        model: any ResNet of timm, or alexnet
        stem: cifar (3x3, no pooling) or imagenet; None = the data set's
        norm: bn, or none for networks without BatchNorm
        reg: none, mhe or amhe (energy of the weights by chord or angle), uniform (uniformity of projections)
        s: power of the energy; 0 is logarithmic
        weight: lambda of the regularizer
        reg_on: networks that mhe and amhe regularize, of encoder, projector, predictor; None = all but the encoder
        temperature: of simclr
        epochs: length of the training
        batch_size: images in one step, over all processes
        accumulate: micro-batches that a batch is cut into; their gradients are averaged before the step
        lr: learning rate per 256 images, after the warm-up
        weight_decay: of all weights but biases and norms
        warmup: epochs of linear warm-up; None = the recipe's, in proportion to epochs
        tau: of the target's moving average at the start; it rises to 1
        hidden_dim: width of the hidden layer of projector and predictor
        out_dim: width of the projections
        blur_p: probability of blur in both views; None = the data set's
        eval_crop: part of the side that the evaluation view keeps
        holdout: judge on images held out of the training set, not on the test set
        skip_broken: leave out pictures of a folder that cannot be read, and name them, in place of stopping
        seed: of weights, order and views
        out: run folder; None = runs/ and a name made of the flags
        eval_every: epochs between k-NN rows, of which the last epoch has one, too; 0 = never
        save_every: steps between checkpoints within an epoch, whose end has one, too; 0 = none
        resume: auto goes on with the run that the folder holds; never refuses such a folder
        tracker: none, tensorboard, wandb or trackio, which gets the numbers of metrics.jsonl, too
    """
    flags = dict(locals())
    folder = Path(out or Path("runs", run_name(flags)))
    refuse(flags, folder)
    log_with = None if tracker == "none" else tracker
    accelerator = processes.start(gradient_accumulation_steps=accumulate, log_with=log_with, project_dir=folder)
    settings = in_force(flags, accelerator.num_processes)
    with accelerator.main_process_first():  # the others find what it has downloaded
        images = data.load(dataset, data_dir, pretraining=True, skip_broken=skip_broken)
    images = data.hold_out(images) if holdout else images
    settings |= of_images(settings, flags, images)
    view = images.view(eval_crop)
    steps_per_epoch = len(images.pretraining.labels) // settings["batch_size"]
    steps, warmup_steps = steps_per_epoch * settings["epochs"], round(steps_per_epoch * settings["warmup"])
    peak = settings["lr"] * settings["batch_size"] / 256
    description = {"settings": settings, "view": view, "steps": steps, **runs.provenance()}
    with accelerator.main_process_first():
        lock = runs.claim(folder) if accelerator.is_main_process else None
        tensors, was = runs.saved(folder)
    done, step = position(description, was, folder)
    processes.agree(accelerator, **settings, view=view, steps=steps, step=step)

    set_seed(seed)
    training = build(settings, images, accelerator)
    network = training.network
    sums = runs.restore(tensors, was, network, training.optimizer, accelerator) if tensors else {}
    del tensors  # as large as the network, thrice
    train, test = images.train.to(accelerator.device), images.test.to(accelerator.device)
    pretraining = train if images.pretraining is images.train else images.pretraining.to(accelerator.device)
    log = runs.start_log(folder, description, done, step, accelerator) if lock else None
    if log and step < steps:
        accelerator.init_trackers("pretrain", {name: str(x) for name, x in settings.items()})
        told = [*in_use(flags, settings), *shared_out(settings, accelerator)]
        print(formula(settings, training.layers), *told, sep="\n  ", file=sys.stderr)
    share = {"parts": accumulate, "rank": accelerator.process_index, "world": accelerator.num_processes}
    share["passed"] = step - done * steps_per_epoch
    ahead = range(done + 1, settings["epochs"] + 1)
    batches = data.batches(pretraining, settings["batch_size"], images.size, seed, ahead, **share)
    seen, flat = {}, 0

    def save(done: int, sums: dict[str, Tensor]) -> None:
        refuse_faults(seen, network, folder, accelerator)
        now = runs.capture(network, training.optimizer, sums, accelerator)
        if log:
            runs.save(folder, now, {**description, "epoch": done, "step": step}, accelerator.scaler)

    with (
        runs.signals() as caught,
        tqdm(total=steps, initial=step, unit="step", disable=not log or step == steps) as bar,
    ):
        for epoch in ahead:
            start, first = time.perf_counter(), step
            for crops, _, u in islice(batches, (epoch * steps_per_epoch - step) * accumulate):
                rates = lr_at(step, steps, warmup_steps, peak), tau_at(step, steps, settings["tau"])
                terms, norms = train_step(training, crops, u, *rates)
                seen = watch(seen, {"step": torch.full((), step, device=accelerator.device), **terms, **norms})
                sums = {name: sums.get(name, 0) + term / accumulate for name, term in terms.items()}
                if not accelerator.sync_gradients:
                    continue
                step += 1
                bar.update()
                told = runs.told_to_stop(caught, step, accelerator)
                if told or (save_every and step % save_every == 0 and step < epoch * steps_per_epoch):
                    save(epoch - 1, sums)
                if told:
                    stop(told, step, steps, folder, accelerator)
            row = {name: accelerator.reduce(x, "mean").item() / steps_per_epoch for name, x in sums.items()}
            images_per_s = (step - first) * settings["batch_size"] / (time.perf_counter() - start)
            refuse_faults(seen, network, folder, accelerator)
            if "energy" not in row:  # the objective has none: what the weights have come to
                row |= {name: x.item() for name, x in layer_energies(training.layers, settings).items()}
            if method == "byol":
                row["tau"] = tau_at(step - 1, steps, settings["tau"])
            where = {"stage": "pretrain", "epoch": epoch, "step": step}
            rate = lr_at(step - 1, steps, warmup_steps, peak)
            report({**where, **row, "lr": rate, "images_per_s": round(images_per_s, 1)}, log, accelerator)
            flat = warn_of_collapse(row["std"] * settings["out_dim"] ** 0.5, flat)
            if settings["eval_every"] and (epoch % settings["eval_every"] == 0 or epoch == settings["epochs"]):
                judged = {"of": "online", "split": "holdout" if holdout else "test"}
                processes.same_buffers(network.encoder, accelerator)
                for k, scores in nearest_neighbours(network.encoder, train, test, view, accelerator).items():
                    report({**where, **judged, "k": k, **scores}, log, accelerator)
                inner = representations(network.encoder, test, view)
                report({**where, "of": "representations", **inner}, log, accelerator)
            sums = {}
            save(epoch, sums)
            if step < steps and (told := runs.told_to_stop(caught, 0, accelerator)):
                stop(told, step, steps, folder, accelerator)
    accelerator.wait_for_everyone()
    for tracker in accelerator.trackers:
        tracker.finish()
    if log:
        ckpt = shlex.quote(str(folder / runs.CKPT))
        judges = f"; judge it by\n    python knn_eval.py {ckpt}\n    python linear_eval.py {ckpt}"
        print(f"{ckpt} is whole{judges if images.classes else ''}", file=sys.stderr)


def run_name(flags: dict) -> str:
    """Data set, method, regularizer, and every other flag that is not a default: photos-amhe-s1-seed2."""
    named = ("dataset", "method", "reg", *HOW)
    defaults = {name: flag.default for name, flag in inspect.signature(pretrain).parameters.items()}
    given = {name: x for name, x in flags.items() if x != defaults[name] and name not in named}
    others = [name + ("+".join(x) if isinstance(x, tuple) else str(x)) for name, x in given.items()]
    what = [Path(flags["dataset"]).resolve().name, flags["method"], flags["reg"]]
    if what[2] == "none":
        what.pop(2)
    elif what[1] == "byol":
        what.pop(1)
    return re.sub(r"[^\w.+-]+", "_", "-".join([*what, *others]))[:200]


def refuse(flags: dict, folder: Path) -> None:
    """UsageError or ModelError for what can be seen to be wrong before anything is read."""
    term, method, model = TERMS[flags["reg"]], flags["method"], flags["model"]
    idle = {} if term == "energy" else {"s": "reg", "reg_on": "reg"}
    idle |= {} if term else {"weight": "reg"}
    idle |= {"temperature": "method"} if method == "byol" else {"tau": "method"}
    idle |= {"stem": "model"} if model == "alexnet" else {}
    for name, other in idle.items():
        if flags[name] != inspect.signature(pretrain).parameters[name].default:
            raise cli.UsageError(f"--{name} {flags[name]}: has no effect with --{other} {flags[other]}")
    if method == "simclr" and "predictor" in (flags["reg_on"] or ()):
        raise cli.UsageError("--reg_on predictor: simclr has none; take encoder, projector or both")
    if flags["resume"] == "never" and any((folder / name).exists() for name in runs.FILES):
        raise cli.UsageError(f"--out {folder}: already holds a run; name another folder, or take --resume auto")
    if flags["tracker"] != "none" and find_spec(flags["tracker"]) is None:
        raise cli.UsageError(f"--tracker {flags['tracker']}: is not installed; pip install {flags['tracker']}")
    recipe_of(flags)
    near = next(place for place in (folder, *folder.parents) if os.path.exists(place))
    if not near.is_dir() or not os.access(near, os.W_OK | os.X_OK):
        raise cli.UsageError(
            f"--out {folder}: cannot be written ({near} is {'read-only' if near.is_dir() else 'a file'})"
        )
    with torch.device("meta"):
        encoder = models.build_encoder(model, "imagenet")
    if "encoder" in (flags["reg_on"] or ()):
        models.neurons(SimpleNamespace(encoder=encoder), ["encoder"])


def recipe_of(flags: dict) -> str:
    """The name of the recipe in force. UsageError for one that is another data set's."""
    dataset, name = flags["dataset"], flags["recipe"]
    own = [recipe for recipe in RECIPES if recipe.partition("-")[0] == dataset]
    if name and own and name not in own:
        raise cli.UsageError(f"--recipe {name}: is not for {dataset}, which has {', '.join(own)}")
    return name or (own or ["cifar10-300"])[0]


def in_force(flags: dict, world: int) -> dict:
    """Every setting with its value in force, but for those `of_images` adds. UsageError if they do not go together."""
    name = recipe_of(flags)
    recipe, epochs = RECIPES[name], flags["epochs"] or RECIPES[name].epochs
    weights = {None: 0.0, "energy": float(recipe.energy_weight), "uniformity": recipe.uniformity_weight}
    derived = {"recipe": name, "weight": weights[TERMS[flags["reg"]]], "reg_on": ("projector", "predictor")}
    derived |= {"warmup": recipe.warmup * epochs / recipe.epochs}
    defaults = asdict(recipe) | derived
    settings = {name: defaults.get(name) if x is None else x for name, x in flags.items() if name not in HOW}
    parts = ("encoder", "projector", *["predictor"] * (flags["method"] == "byol"))
    settings["reg_on"] = [part for part in parts if part in settings["reg_on"]]
    batch_size, warmup, share = settings["batch_size"], settings["warmup"], world * settings["accumulate"]
    if warmup >= epochs:
        raise cli.UsageError(f"--warmup {warmup}: has to be shorter than the training, {epochs} epochs")
    if batch_size % share or batch_size < 2 * share:
        among = f"{settings['accumulate']} micro-batches of {world} process{'es' * (world > 1)}"
        near = sorted({max(2, batch_size // share + more) * share for more in (0, 1)})
        told = f"has to be a multiple of {share}, twice or more, for {among}; take {' or '.join(map(str, near))}"
        raise cli.UsageError(f"--batch_size {batch_size}: {told}")
    return settings


def of_images(settings: dict, flags: dict, images: data.Dataset) -> dict:
    """The settings that a data set gives where no flag does. UsageError for what it is too small for, or has not."""
    dataset, batch_size, n = flags["dataset"], settings["batch_size"], len(images.pretraining.labels)
    if batch_size > n:
        own = "" if flags["batch_size"] else f" (recipe {settings['recipe']})"
        raise cli.UsageError(f"--batch_size {batch_size}{own}: {dataset} has {n} images to train on; take fewer")
    if not images.classes and flags["eval_every"]:
        raise cli.UsageError(f"--eval_every {flags['eval_every']}: {dataset} has no classes to judge by")
    blur = images.blur if flags["blur_p"] is None else (flags["blur_p"],) * 2
    every = settings["eval_every"] if images.classes else 0
    return {"stem": flags["stem"] or images.stem, "blur_p": blur, "eval_every": every}


def shared_out(settings: dict, accelerator: Accelerator) -> list[str]:
    """How several processes share a batch."""
    world, device = accelerator.num_processes, accelerator.device.type
    if world == 1:
        return []
    of = {"cuda": "all processes"}.get(device, "each process alone, as torch cannot share them on this device")
    norm = f"; statistics of BatchNorm: of {of}" if settings["norm"] == "bn" else ""
    return [f"{world} processes: {settings['batch_size'] // world} images of each step a process{norm}"]


def position(description: dict, was: dict | None, folder: Path) -> tuple[int, int]:
    """Epochs and steps that the run of a folder has behind it. UsageError if that run is another."""
    if was is None:
        return 0, 0
    if told := runs.differences(description["settings"], was["settings"]):
        raise cli.UsageError(
            f"--out {folder}: holds a run with other settings, {', '.join(told)}; take these, or name another folder"
        )
    now, then = ({**x["view"], "steps": x["steps"]} for x in (json.loads(json.dumps(description)), was))
    if told := [f"{name} {x} (it was {then.get(name)})" for name, x in now.items() if x != then.get(name)]:
        differs = ", ".join(told)
        raise cli.UsageError(f"--out {folder}: holds a run on other images, {differs}; name another folder")
    return was["epoch"], was["step"]


@dataclass(frozen=True)
class Training:
    """What a step works with."""

    settings: dict
    views: dict  # what `two_views` takes beside crops and draws
    accelerator: Accelerator
    network: models.BYOL | models.SimCLR
    parallel: nn.Module  # the same network, as it runs on all processes
    optimizer: AcceleratedOptimizer  # of Lars
    layers: dict[str, Tensor]  # the weights that Eq. 7 sums over


def build(settings: dict, images: data.Dataset, accelerator: Accelerator) -> Training:
    """A network with fresh weights, on its device, and LARS, Appendix B.2."""
    network = models.build(**settings)
    if accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        models.with_norm(network, "sync")
    optimizer = Lars(parameter_groups(network, settings["weight_decay"]), momentum=0.9, trust_coeff=1e-3)
    parallel, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(parallel, keep_torch_compile=False)
    views = {"mean": images.mean, "std": images.std, "blur": settings["blur_p"], "solarise": images.solarise}
    layers = models.neurons(network, settings["reg_on"])
    return Training(settings, views, accelerator, network, parallel, optimizer, layers)


def train_step(training: Training, crops: Tensor, u: Tensor, lr: float, tau: float) -> tuple[dict, dict]:
    """From crops of a micro-batch and their draws to gradients; behind the last of a batch, LARS and the target's step.

    crops (2, b, 3, size, size), which are changed, and u (2, b, sum(DRAWS)) are as `data.batches` yields them; lr and
    tau are those of this step. Returns the terms of `objective` and the norms of the gradients so far, on the device.
    """
    network, optimizer, accelerator = training.network, training.optimizer, training.accelerator
    for group in optimizer.param_groups:
        group["lr"] = lr
    v1, v2 = two_views(crops, u, **training.views)
    with accelerator.accumulate(training.parallel):
        terms = objective(training.settings, training.layers, *training.parallel(v1, v2))
        accelerator.backward(terms["loss"])
        norms = gradient_norms(network, accelerator)
        optimizer.step()
        optimizer.zero_grad()
    stepped = accelerator.sync_gradients and not accelerator.optimizer_step_was_skipped
    if training.settings["method"] == "byol" and stepped:
        network.update_target(tau)
    return {name: term.detach() for name, term in terms.items()}, norms


def gradient_norms(network: models.BYOL | models.SimCLR, accelerator: Accelerator) -> dict[str, Tensor]:
    """Norms of the gradients of encoder, projector and predictor; none in fp16, whose scaler skips infinite ones."""
    norms = {}
    for part in ("encoder", "projector", "predictor") if accelerator.scaler is None else ():
        grads = [p.grad for p in getattr(network, part, nn.Identity()).parameters() if p.grad is not None]
        norms |= {f"gradient of {part}": nn.utils.get_total_norm(grads)} if grads else {}
    return norms


def watch(seen: dict[str, Tensor], latest: dict[str, Tensor]) -> dict[str, Tensor]:
    """What is known of this step, or of the first in which some of it was not finite, on the device."""
    if not seen:
        return latest
    finite = torch.stack(list(seen.values())).isfinite().all()
    return {name: torch.where(finite, x, seen[name]) for name, x in latest.items()}


def refuse_faults(
    seen: dict[str, Tensor], network: models.BYOL | models.SimCLR, folder: Path, accelerator: Accelerator
) -> None:
    """UsageError, in all processes, for a step or for weights that are not finite: nothing of them is saved."""
    finite = torch.stack([x.isfinite().all() for x in network.state_dict().values()]).all()
    seen = {**seen, "weights": torch.where(finite, 0.0, math.nan)}
    each = accelerator.gather(torch.stack(list(seen.values()))[None])
    numbers = dict(zip(seen, min(each.tolist(), key=lambda row: all(map(math.isfinite, row)))))
    if all(map(math.isfinite, numbers.values())):
        return
    step = int(numbers.pop("step", -1)) + 1
    told = ", ".join(f"{name} {x}" for name, x in numbers.items() if not math.isfinite(x))
    kept = f"{folder / runs.CKPT} is as it was" if (folder / runs.CKPT).exists() else "no checkpoint is written"
    raise cli.UsageError(f"step {step}: not finite: {told}; {kept}; a smaller --lr or --weight may help")


def warn_of_collapse(spread: float, flat: int) -> int:
    """Epochs in a row in which projections were all but one point; spread is 1 where they fill the sphere."""
    flat = flat + 1 if spread < 0.1 else 0
    if flat >= 3:
        processes.say(
            f"WARNING: collapse? For {flat} epochs all projections have been nearly one point, std {spread:.1e} of "
            "a full sphere's. Try a smaller --lr, a --tau nearer 1, a longer --warmup, or --reg uniform"
        )
    return flat


def stop(told: signal.Signals, step: int, steps: int, folder: Path, accelerator: Accelerator) -> None:
    """Raise Stopped, once the first process has written: the launcher ends all behind the first that leaves."""
    accelerator.wait_for_everyone()
    why = f"{told.name} after step {step} of {steps}; {folder / runs.CKPT} holds it, and the same command goes on"
    raise cli.Stopped(why, 128 + told)


def report(row: dict, log: Path, accelerator: Accelerator) -> None:
    """Print a row, add it to the log, and give its numbers to the tracker."""
    cli.emit(row, log)
    of = f"{row['of']}/" if "of" in row else ""
    accelerator.log({of + name: x for name, x in row.items() if isinstance(x, float)}, step=row["step"])


def parameter_groups(network: models.BYOL | models.SimCLR, weight_decay: float) -> list[dict]:
    """Weights, which LARS adapts and decays, and biases and norms, which it does neither, Appendix B.2."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    return [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": weight_decay, "always_adapt": True},
        {"params": [p for p in parameters if p.ndim <= 1], "weight_decay": 0},
    ]


def lr_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Rate of step 0 ... steps - 1: linear from peak / warmup_steps to peak, then a cosine towards 0, Appendix B.2."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return peak * (1 + math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))) / 2


def tau_at(step: int, steps: int, tau: float) -> float:
    """1 - (1 - tau) (cos(pi k / K) + 1) / 2 at step k of K, from tau to 1, Appendix B.2."""
    return 1 - (1 - tau) * (math.cos(math.pi * step / steps) + 1) / 2


def objective(settings: dict, layers: dict[str, Tensor], z: Pair, p: Pair | None = None, t: Pair | None = None) -> dict:
    """The loss and its terms, unweighted, of projections z, predictions p, target projections t, (b, out_dim) a view.

    byol is Eq. 3 in both directions, 0 ... 8; simclr, which has no p and t, is Eq. 1. The loss is Eq. 7 with an energy,
    Eq. 4 with uniformity. alignment and std of the normalised projections are for the log; std is 1 / sqrt(out_dim)
    where they fill the sphere, 0 where they collapse.
    """
    if settings["method"] == "byol":
        terms = {"loss": None, "byol": alignment(p[0], t[1]) + alignment(p[1], t[0])}
    else:
        terms = {
            "loss": None,
            "simclr": info_nce(processes.gather(z[0]), processes.gather(z[1]), settings["temperature"]),
        }
    with torch.set_grad_enabled(settings["reg"] == "uniform"):
        terms["uniformity"] = sum(uniformity(processes.gather(x)) for x in z) / 2
    with torch.no_grad():
        terms |= {"alignment": alignment(*z), "std": sum(unit(x).std(0).mean() for x in z) / 2}
    if settings["reg"] in ("mhe", "amhe"):
        terms |= layer_energies(layers, settings)
    term = TERMS[settings["reg"]]
    terms["loss"] = terms[settings["method"]] + (settings["weight"] * terms[term] if term else 0)
    return terms


def layer_energies(layers: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The sum of Eq. 7 without lambda and, layer by layer, what it adds: by chord for --reg mhe, else by angle."""
    energy = mhe if settings["reg"] == "mhe" else amhe
    each = {f"energy/{name}": energy(weight, settings["s"]) for name, weight in layers.items()}
    return {"energy": sum(each.values()), **each}


def representations(encoder: nn.Module, test: data.Split, view: dict) -> dict[str, float]:
    """What Figures 4 and 5 follow, on 256 images spread over a split: energies of the blocks' outputs, and G2.

    The energy is `mhe` of the rows that a residual block's outputs are, averaged over their maps, at s = 0: two images
    that look the same would be all that counts at s = 2. G2 is the mean of exp(-2 |x - y|^2) over pairs of the
    encoder's normalised features, Appendix A.2: its logarithm is Eq. 2.
    """
    some = test.rows(torch.linspace(0, len(test.labels) - 1, min(256, len(test.labels))).long().to(test.labels.device))
    blocks = models.embed_blocks(encoder, data.evaluation_views(some, **view))
    features = models.embed(encoder, data.evaluation_views(some, **view))
    return {"g2": uniformity(features).exp().item()} | {
        f"block/{name}": mhe(x, s=0).item() for name, x in blocks.items()
    }


def formula(settings: dict, layers: dict[str, Tensor]) -> str:
    """The objective with every number in force."""
    method, reg, s, term = settings["method"], settings["reg"], settings["s"], TERMS[settings["reg"]]
    lines = [f"loss = {method}" + (f" + {settings['weight']:g} {term}" if term else "")]
    if method == "byol":
        lines += ["byol = E |p1 - t2|^2 + E |p2 - t1|^2 of unit rows, 0 ... 8 (Eq. 3 in both directions)"]
    else:
        lines += [f"simclr = E -log softmax(z_i . z_j / {settings['temperature']:g}) of unit rows (Eq. 1)"]
    if term == "uniformity":
        lines += ["uniformity = log E exp(-2 |z_i - z_j|^2) of unit rows, averaged over both views (Eq. 2)"]
    if term == "energy":
        distance, equation = ("|w_i - w_j|", "Eq. 5") if reg == "mhe" else ("arccos(w_i . w_j)", "Eq. A.3")
        potential = f"{distance}^-{s:g}" if s else f"log(1 / {distance})"
        lines += [f"energy = sum over layers of the mean over i != j of {potential} of unit rows ({equation}, Eq. 7)"]
        lines += [f"layers: {', '.join(f'{name} ({len(w)} x {w[0].numel()})' for name, w in layers.items())}"]
    return "\n  ".join(lines)


def in_use(flags: dict, settings: dict) -> list[str]:
    """The numbers of the recipe that are in force, and those that a flag has put in their place."""
    names = ["epochs", "batch_size", "lr", "weight_decay", "warmup", "hidden_dim", "out_dim"]
    names += ["tau"] if settings["method"] == "byol" else ["temperature"]
    names += ["weight"] if TERMS[settings["reg"]] else []
    sources = {f"recipe {settings['recipe']}": None, "flag": None}
    for source in sources:
        of = [name for name in names if (flags[name] is None) != (source == "flag")]
        sources[source] = ", ".join(f"{name} {settings[name]:g}" for name in of) or "nothing"
    return [f"{source}: {numbers}" for source, numbers in sources.items()]


if __name__ == "__main__":
    cli.run(pretrain, data.DataError, models.ModelError, processes.LaunchError, runs.RunError)
