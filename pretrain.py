"""Pre-train an image encoder by BYOL, with or without the paper's regularizers.

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
from regularizers import alignment, amhe, mhe, uniformity, unit


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
    eval_every: int  # epochs


RECIPES = {
    # ours: tuned on the photographs for three minutes on two cores; so few steps want a large rate and a slow target
    "photos": Recipe(8, 64, 6, 1e-6, 0, 0.996, 512, 256, 1),
    # Appendix B.2, CIFAR for 300 epochs; heads of Section 3.6; the weight decay, missing there, is that of ImageNet
    "cifar10": Recipe(300, 1024, 1.5, 1e-6, 10, 0.99, 4096, 256, 10),
}
WEIGHTS = {"none": 0.0, "mhe": 10.0, "amhe": 10.0, "uniform": 0.125}  # lambda: Appendix C.1, Section 4
TERMS = {"none": None, "mhe": "energy", "amhe": "energy", "uniform": "uniformity"}  # what lambda weighs


def pretrain(
    *,
    dataset: str = "photos",
    data_dir: str = "data",
    model: str = "resnet18",
    stem: Literal["cifar", "imagenet"] | None = None,
    reg: Literal["none", "mhe", "amhe", "uniform"] = "none",
    s: Annotated[float, ">= 0"] = 2.0,
    weight: Annotated[float, ">= 0"] | None = None,
    reg_on: tuple[Literal["encoder", "projector", "predictor"], ...] = ("projector", "predictor"),
    epochs: Annotated[int, ">= 1"] | None = None,
    batch_size: Annotated[int, ">= 2"] | None = None,
    lr: Annotated[float, "> 0", "< 1e6"] | None = None,
    weight_decay: Annotated[float, ">= 0"] | None = None,
    warmup: Annotated[float, ">= 0"] | None = None,
    tau: Annotated[float, ">= 0", "<= 1"] | None = None,
    hidden_dim: Annotated[int, ">= 1", "<= 65536"] | None = None,
    out_dim: Annotated[int, ">= 1", "<= 65536"] | None = None,
    seed: Annotated[int, ">= 0", "< 1e9"] = 0,
    out: str | None = None,
    eval_every: Annotated[int, ">= 0"] | None = None,
):
    """Pre-train a ResNet by BYOL. None = the value of the data set's recipe, which is printed before the first step.

    Args:
        dataset: photos (embedded), cifar10, or a folder with train/ and test/ of one sub-folder of pictures a class
        data_dir: where cifar10 lies or is downloaded to
        model: any ResNet of timm
        stem: cifar (3x3, no pooling) or imagenet; None = the data set's
        reg: none (BYOL), mhe or amhe (energy of the weights by chord or angle), uniform (uniformity of projections)
        s: power of the energy; 0 is logarithmic
        weight: lambda of the regularizer; None = 10 for mhe and amhe, 0.125 for uniform
        reg_on: the networks whose weights mhe and amhe regularize: any of encoder, projector, predictor
        epochs: length of the training
        batch_size: images in one step, over all processes
        lr: learning rate per 256 images, after the warm-up
        weight_decay: of all weights but biases and norms
        warmup: epochs of linear warm-up; None = the recipe's, in proportion to epochs
        tau: of the target's moving average at the start; it rises to 1
        hidden_dim: width of the hidden layer of projector and predictor
        out_dim: width of the projections
        seed: of weights, order and views
        out: run folder; None = runs/ and a name made of the flags
        eval_every: epochs between k-NN rows, 0 = never
    """
    flags = dict(locals())
    accelerator = Accelerator()
    folder = Path(out or Path("runs", run_name(flags)))
    refuse(flags, folder, accelerator.num_processes)
    images = data.load(dataset, data_dir)
    settings = in_force(flags, images, accelerator.num_processes)
    view = {"size": images.size, "crop": images.eval_crop, "mean": images.mean, "std": images.std}
    steps_per_epoch = len(images.train.labels) // settings["batch_size"]
    steps, warmup_steps = steps_per_epoch * settings["epochs"], round(steps_per_epoch * settings["warmup"])
    peak = settings["lr"] * settings["batch_size"] / 256

    use_cores(accelerator)
    set_seed(seed)
    network, parallel, optimizer = build(settings, accelerator)
    layers = models.neurons(network, settings["reg_on"])
    train, test = images.train.to(accelerator.device), images.test.to(accelerator.device)
    log = start_log(folder) if accelerator.is_main_process else None
    description = {"settings": settings, "view": view, **provenance()}
    if log:
        cli.emit({"stage": "pretrain", **description, **hardware(accelerator)}, log)
        print(formula(settings, layers), file=sys.stderr)
    step = 0
    with tqdm(total=steps, unit="step", disable=not log) as bar:
        for epoch in range(1, settings["epochs"] + 1):
            start, totals = time.perf_counter(), {}
            share = accelerator.process_index, accelerator.num_processes
            for x, _, u in data.batches(train, settings["batch_size"], seed, epoch, *share):
                for group in optimizer.param_groups:
                    group["lr"] = lr_at(step, steps, warmup_steps, peak)
                views = data.two_views(x, u, images.size, images.mean, images.std)
                terms = objective(*parallel(*views), layers, settings)
                optimizer.zero_grad()
                accelerator.backward(terms["loss"])
                optimizer.step()
                network.update_target(tau_now := tau_at(step, steps, settings["tau"]))
                totals = {name: totals.get(name, 0) + term.detach() for name, term in terms.items()}
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
            row |= {"lr": group["lr"], "tau": tau_now, "images_per_s": round(images_per_s, 1)}
            where = {"stage": "pretrain", "epoch": epoch, "step": step}
            cli.emit({**where, **row}, log)
            if settings["eval_every"] and epoch % settings["eval_every"] == 0:
                for k, scores in nearest_neighbours(network.encoder, train, test, view).items():
                    cli.emit({**where, "of": "online", "k": k, **scores}, log)
            save_pair(folder, network, {**description, "epoch": epoch})
    accelerator.end_training()
    if log:
        ckpt = shlex.quote(str(folder / "ckpt.safetensors"))
        print(f"{ckpt} is written; judge it by", file=sys.stderr)
        print(f"    python knn_eval.py {ckpt}\n    python linear_eval.py {ckpt}", file=sys.stderr)


def run_name(flags: dict) -> str:
    """Data set, method, and every other flag that is not a default: photos-amhe-s1-seed2."""
    defaults = {name: flag.default for name, flag in inspect.signature(pretrain).parameters.items()}
    given = {name: x for name, x in flags.items() if x != defaults[name] and name not in ("dataset", "reg")}
    others = [name + ("+".join(x) if isinstance(x, tuple) else str(x)) for name, x in given.items()]
    method = "byol" if flags["reg"] == "none" else flags["reg"]
    return re.sub(r"[^\w.+-]+", "_", "-".join([Path(flags["dataset"]).resolve().name, method, *others]))[:200]


def refuse(flags: dict, folder: Path, processes: int) -> None:
    """UsageError for what can be seen to be wrong before anything is read."""
    for name, reason in (("s", "energy"), ("reg_on", "energy"), ("weight", TERMS[flags["reg"]])):
        given = flags[name] != inspect.signature(pretrain).parameters[name].default
        if given and (reason is None or TERMS[flags["reg"]] != reason):
            raise cli.UsageError(f"--{name} {flags[name]}: has no effect with --reg {flags['reg']}")
    if any(os.path.exists(folder / name) for name in ("metrics.jsonl", "ckpt.safetensors", "encoder.safetensors")):
        raise cli.UsageError(f"--out {folder}: already holds a run; name another folder, or remove this one")
    if int(os.environ.get("WORLD_SIZE", 1)) != processes:
        raise cli.UsageError(
            f"WORLD_SIZE is {os.environ['WORLD_SIZE']}, but Accelerate sees {processes} process; on a machine without "
            "a GPU, set ACCELERATE_USE_CPU=true"
        )


def in_force(flags: dict, images: data.Dataset, processes: int) -> dict:
    """Every setting with its value in force. Raises UsageError where they do not go together."""
    recipe = RECIPES.get(flags["dataset"], RECIPES["cifar10"])
    epochs, n = flags["epochs"] or recipe.epochs, len(images.train.labels)
    derived = {"stem": images.stem, "weight": WEIGHTS[flags["reg"]], "warmup": recipe.warmup * epochs / recipe.epochs}
    defaults = asdict(recipe) | derived
    settings = {name: defaults.get(name) if x is None else x for name, x in flags.items() if name != "out"}
    settings["reg_on"] = [part for part in ("encoder", "projector", "predictor") if part in flags["reg_on"]]
    batch_size, warmup = settings["batch_size"], settings["warmup"]
    if warmup >= epochs:
        raise cli.UsageError(f"--warmup {warmup}: has to be shorter than the training, {epochs} epochs")
    if batch_size > n:
        raise cli.UsageError(f"--batch_size {batch_size}: {flags['dataset']} has {n} images to train on; take fewer")
    if batch_size % processes or batch_size < 2 * processes:
        raise cli.UsageError(
            f"--batch_size {batch_size}: has to be a multiple of the {processes} processes, twice or more"
        )
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
    network = models.BYOL(settings["model"], settings["stem"], settings["hidden_dim"], settings["out_dim"])
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


def objective(p: list[Tensor], z: list[Tensor], t: list[Tensor], layers: dict[str, Tensor], settings: dict) -> dict:
    """The loss and its terms, unweighted: predictions p, projections z and the target's t are (b, out_dim) a view.

    byol is Eq. 3 in both directions, 0 ... 8; the loss is Eq. 7 with an energy, Eq. 4 with uniformity. alignment and
    std of the normalised projections are for the log; std is 1 / sqrt(out_dim) where they fill the sphere, 0 where
    they collapse.
    """
    terms = {"loss": None, "byol": alignment(p[0], t[1]) + alignment(p[1], t[0])}
    with torch.set_grad_enabled(settings["reg"] == "uniform"):
        terms["uniformity"] = sum(uniformity(gather(x)) for x in z) / 2
    with torch.no_grad():
        terms |= {"alignment": alignment(*z), "std": sum(unit(x).std(0).mean() for x in z) / 2}
    if settings["reg"] in ("mhe", "amhe"):
        terms |= layer_energies(layers, settings)
    term = TERMS[settings["reg"]]
    terms["loss"] = terms["byol"] + (settings["weight"] * terms[term] if term else 0)
    return terms


def layer_energies(layers: dict[str, Tensor], settings: dict) -> dict[str, Tensor]:
    """The sum of Eq. 7 without lambda and, layer by layer, what it adds: by chord for --reg mhe, else by angle."""
    energy = mhe if settings["reg"] == "mhe" else amhe
    each = {f"energy/{name}": energy(weight, settings["s"]) for name, weight in layers.items()}
    return {"energy": sum(each.values()), **each}


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
    reg, s, term = settings["reg"], settings["s"], TERMS[settings["reg"]]
    lines = [f"loss = byol + {settings['weight']:g} {term}" if term else "loss = byol"]
    lines += ["byol = E |p1 - t2|^2 + E |p2 - t1|^2 of unit rows, 0 ... 8 (Eq. 3 in both directions)"]
    if term == "uniformity":
        lines += ["uniformity = log E exp(-2 |z_i - z_j|^2) of unit rows, averaged over both views (Eq. 2)"]
    if term == "energy":
        distance, equation = ("|w_i - w_j|", "Eq. 5") if reg == "mhe" else ("arccos(w_i . w_j)", "Eq. A.3")
        potential = f"{distance}^-{s:g}" if s else f"log(1 / {distance})"
        lines += [f"energy = sum over layers of the mean over i != j of {potential} of unit rows ({equation}, Eq. 7)"]
        lines += [f"layers: {', '.join(f'{name} ({len(w)} x {w[0].numel()})' for name, w in layers.items())}"]
    return "\n  ".join(lines)


if __name__ == "__main__":
    cli.run(pretrain, data.DataError, models.ModelError)
