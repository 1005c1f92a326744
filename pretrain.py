"""Pre-train an image encoder by BYOL or SimCLR, with or without the paper's regularizers.

    accelerate launch pretrain.py --reg amhe --s 2

trains ResNet-18 on the embedded photographs (about three minutes on two CPU cores) and leaves a run folder with
ckpt.safetensors (online network and target), encoder.safetensors (the encoder alone, under timm's names) and
metrics.jsonl (the rows that were printed).
"""

import inspect
import math
import os
import re
import shlex
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Literal

import torch
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import Lars
from torch import Tensor
from tqdm import tqdm

import cli
import data
import models
from knn_eval import nearest_neighbours
from regularizers import alignment, amhe, info_nce, mhe, uniformity, unit
from views import two_views

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
# Temperatures, which the paper does not give: SimCLR's. photos is ours: three minutes on two cores; so few steps want a
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
    seed: Annotated[int, ">= 0", "< 1e9"] = 0,
    out: str | None = None,
    eval_every: Annotated[int, ">= 0"] | None = None,
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
        seed: of weights, order and views
        out: run folder; None = runs/ and a name made of the flags
        eval_every: epochs between k-NN rows, of which the last epoch has one, too; 0 = never
        tracker: none, tensorboard, wandb or trackio, which gets the numbers of metrics.jsonl, too
    """
    flags = dict(locals())
    folder = Path(out or Path("runs", run_name(flags)))
    refuse(flags, folder)
    log_with = None if tracker == "none" else tracker
    accelerator = Accelerator(gradient_accumulation_steps=accumulate, log_with=log_with, project_dir=folder)
    refuse_launch(accelerator.num_processes)
    with accelerator.main_process_first():  # the others find what it has downloaded
        images = data.load(dataset, data_dir, pretraining=True)
    images = data.hold_out(images) if holdout else images
    settings = in_force(flags, images, accelerator.num_processes)
    view = {"size": images.size, "crop": eval_crop, "mean": images.mean, "std": images.std}
    steps_per_epoch = len(images.pretraining.labels) // settings["batch_size"]
    steps, warmup_steps = steps_per_epoch * settings["epochs"], round(steps_per_epoch * settings["warmup"])
    peak = settings["lr"] * settings["batch_size"] / 256

    use_cores(accelerator)
    set_seed(seed)
    network, parallel, optimizer = build(settings, accelerator)
    layers = models.neurons(network, settings["reg_on"])
    pretraining, train, test = (x.to(accelerator.device) for x in (images.pretraining, images.train, images.test))
    log = start_log(folder) if accelerator.is_main_process else None
    description = {"settings": settings, "view": view, **provenance()}
    if log:
        cli.emit({"stage": "pretrain", **description, **hardware(accelerator)}, log)
        accelerator.init_trackers("pretrain", {name: str(x) for name, x in settings.items()})
        print(formula(settings, layers), *in_use(flags, settings), sep="\n  ", file=sys.stderr)
    step = 0
    share = {"parts": accumulate, "rank": accelerator.process_index, "world": accelerator.num_processes}
    with tqdm(total=steps, unit="step", disable=not log) as bar:
        for epoch in range(1, settings["epochs"] + 1):
            start, totals = time.perf_counter(), {}
            for crops, _, u in data.batches(pretraining, settings["batch_size"], images.size, seed, epoch, **share):
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(step, steps, warmup_steps, peak)
                v1, v2 = two_views(crops, u, images.mean, images.std, settings["blur_p"], images.solarise)
                with accelerator.accumulate(parallel):
                    terms = objective(settings, layers, *parallel(v1, v2))
                    accelerator.backward(terms["loss"])
                    optimizer.step()
                    optimizer.zero_grad()
                totals = {name: totals.get(name, 0) + term.detach() / accumulate for name, term in terms.items()}
                if accelerator.sync_gradients:
                    if method == "byol" and not accelerator.optimizer_step_was_skipped:
                        network.update_target(tau_at(step, steps, settings["tau"]))
                    step += 1
                    bar.update()
            row = {name: accelerator.reduce(x, "mean").item() / steps_per_epoch for name, x in totals.items()}
            images_per_s = steps_per_epoch * settings["batch_size"] / (time.perf_counter() - start)
            if not (math.isfinite(row["loss"]) and all(p.isfinite().all() for p in network.parameters())):
                raise cli.UsageError(f"epoch {epoch}: the loss is not finite; a smaller --lr or --weight may help")
            if not log:
                continue
            if "energy" not in row:  # the objective has none: what the weights have come to
                row |= {name: x.item() for name, x in layer_energies(layers, settings).items()}
            if method == "byol":
                row["tau"] = tau_at(step - 1, steps, settings["tau"])
            where = {"stage": "pretrain", "epoch": epoch, "step": step}
            report({**where, **row, "lr": group["lr"], "images_per_s": round(images_per_s, 1)}, log, accelerator)
            if settings["eval_every"] and (epoch % settings["eval_every"] == 0 or epoch == settings["epochs"]):
                judged = {"of": "online", "split": "holdout" if holdout else "test"}
                for k, scores in nearest_neighbours(network.encoder, train, test, view).items():
                    report({**where, **judged, "k": k, **scores}, log, accelerator)
                inner = representations(network.encoder, test, view)
                report({**where, "of": "representations", **inner}, log, accelerator)
            save_pair(folder, network, {**description, "epoch": epoch})
    accelerator.end_training()
    if log:
        ckpt = shlex.quote(str(folder / "ckpt.safetensors"))
        print(f"{ckpt} is written; judge it by", file=sys.stderr)
        print(f"    python knn_eval.py {ckpt}\n    python linear_eval.py {ckpt}", file=sys.stderr)


def run_name(flags: dict) -> str:
    """Data set, method, regularizer, and every other flag that is not a default: photos-amhe-s1-seed2."""
    named = ("dataset", "method", "reg", "tracker")
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
    if any(os.path.exists(folder / name) for name in ("metrics.jsonl", "ckpt.safetensors", "encoder.safetensors")):
        raise cli.UsageError(f"--out {folder}: already holds a run; name another folder, or remove this one")
    if flags["tracker"] != "none" and find_spec(flags["tracker"]) is None:
        raise cli.UsageError(f"--tracker {flags['tracker']}: is not installed; pip install {flags['tracker']}")
    recipe_of(flags)
    with torch.device("meta"):
        models.build_encoder(model, "imagenet")


def refuse_launch(processes: int) -> None:
    """UsageError for a launcher whose processes do not see each other: each would write to the run folder."""
    if int(os.environ.get("WORLD_SIZE", 1)) != processes:
        raise cli.UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but Accelerate sees {processes} process; on a machine without "
            "a GPU, set ACCELERATE_USE_CPU=true"
        )


def recipe_of(flags: dict) -> str:
    """The name of the recipe in force. UsageError for one that is another data set's."""
    dataset, name = flags["dataset"], flags["recipe"]
    own = [recipe for recipe in RECIPES if recipe.partition("-")[0] == dataset]
    if name and own and name not in own:
        raise cli.UsageError(f"--recipe {name}: is not for {dataset}, which has {', '.join(own)}")
    return name or (own or ["cifar10-300"])[0]


def in_force(flags: dict, images: data.Dataset, processes: int) -> dict:
    """Every setting with its value in force. Raises UsageError where they do not go together."""
    name = recipe_of(flags)
    recipe, n = RECIPES[name], len(images.pretraining.labels)
    epochs, term = flags["epochs"] or recipe.epochs, TERMS[flags["reg"]]
    weights = {None: 0.0, "energy": float(recipe.energy_weight), "uniformity": recipe.uniformity_weight}
    derived = {"recipe": name, "stem": images.stem, "weight": weights[term], "blur_p": images.blur}
    derived |= {"warmup": recipe.warmup * epochs / recipe.epochs, "reg_on": ("projector", "predictor")}
    defaults = asdict(recipe) | derived
    settings = {
        flag: defaults.get(flag) if x is None else x for flag, x in flags.items() if flag not in ("out", "tracker")
    }
    parts = ("encoder", "projector", *["predictor"] * (flags["method"] == "byol"))
    settings["reg_on"] = [part for part in parts if part in settings["reg_on"]]
    if flags["blur_p"] is not None:
        settings["blur_p"] = (flags["blur_p"],) * 2
    batch_size, warmup, share = settings["batch_size"], settings["warmup"], processes * settings["accumulate"]
    if warmup >= epochs:
        raise cli.UsageError(f"--warmup {warmup}: has to be shorter than the training, {epochs} epochs")
    if batch_size > n:
        raise cli.UsageError(f"--batch_size {batch_size}: {flags['dataset']} has {n} images to train on; take fewer")
    if batch_size % share or batch_size < 2 * share:
        among = f"{settings['accumulate']} micro-batches of {processes} process{'es' * (processes > 1)}"
        raise cli.UsageError(f"--batch_size {batch_size}: has to be a multiple of {share}, twice or more, for {among}")
    return settings


def start_log(folder: Path) -> Path:
    """The empty metrics.jsonl of a new run folder. Raises UsageError if it cannot be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "metrics.jsonl").touch(exist_ok=False)
    except OSError as e:
        raise cli.UsageError(f"--out {folder}: cannot be written ({e.strerror})") from e
    return folder / "metrics.jsonl"


def use_cores(accelerator: Accelerator) -> None:
    """Share the cores among processes on the CPU: accelerate's launcher gives each one thread unless told not to."""
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and launched:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        torch.set_num_threads(max(1, cores // accelerator.num_processes))


def build(settings: dict, accelerator: Accelerator) -> tuple[models.BYOL, torch.nn.Module, Lars]:
    """The network on its device, the same as it runs on all processes, and LARS, Appendix B.2."""
    network = models.build(**settings)
    optimizer = Lars(parameter_groups(network, settings["weight_decay"]), momentum=0.9, trust_coeff=1e-3)
    parallel, optimizer = accelerator.prepare(network, optimizer)
    return accelerator.unwrap_model(parallel, keep_torch_compile=False), parallel, optimizer


def save_pair(folder: Path, network: models.BYOL, description: dict) -> None:
    """ckpt.safetensors, the whole network, and encoder.safetensors, its encoder under timm's names."""
    models.save(folder / "ckpt.safetensors", network.state_dict(), {**description, "holds": "checkpoint"})
    models.save(folder / "encoder.safetensors", network.encoder.state_dict(), {**description, "holds": "encoder"})


def hardware(accelerator: Accelerator) -> dict:
    """What the run runs on; it is no part of a checkpoint's description."""
    device = {"device": str(accelerator.device), "precision": accelerator.mixed_precision}
    return {**device, "processes": accelerator.num_processes}


def provenance() -> dict:
    """The command, the versions and the commit that make a run."""
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors")}
    try:
        describe, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
        git = subprocess.check_output(describe, cwd=here, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        git = None
    return {"command": shlex.join(sys.argv), "versions": versions, "git": git}


def report(row: dict, log: Path, accelerator: Accelerator) -> None:
    """Print a row, add it to the log, and give its numbers to the tracker."""
    cli.emit(row, log)
    of = f"{row['of']}/" if "of" in row else ""
    accelerator.log({of + name: x for name, x in row.items() if isinstance(x, float)}, step=row["step"])


def parameter_groups(network: models.BYOL, weight_decay: float) -> list[dict]:
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
        terms = {"loss": None, "simclr": info_nce(gather(z[0]), gather(z[1]), settings["temperature"])}
    with torch.set_grad_enabled(settings["reg"] == "uniform"):
        terms["uniformity"] = sum(uniformity(gather(x)) for x in z) / 2
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


def representations(encoder: torch.nn.Module, test: data.Split, view: dict) -> dict[str, float]:
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


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, with gradient: Eq. 2 speaks of the whole batch."""
    return Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


class Gather(torch.autograd.Function):
    """all_gather of rows. Its backward sums over processes, so that DDP's mean is the gradient of one large batch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]


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
    cli.run(pretrain, data.DataError, models.ModelError)
