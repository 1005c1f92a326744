"""Pre-train an image encoder by BYOL, or by SimCLR and others, with or without the paper's regularizers.

    accelerate launch pretrain.py --reg amhe --s 2

trains ResNet-18 on the embedded photographs (minutes on two CPU cores) and leaves a run folder with
ckpt.safetensors (all networks), encoder/ (the encoder, for timm) and metrics.jsonl (its log).
"""

import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from timm.optim import Lars
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

import data
import models
from harness import settings
from harness.foreign import begin_from
from harness.measure import representations
from harness.run import Run
from harness.settings import Settings
from knn_eval import nearest_neighbours
from lib import cli, encoders, processes
from lib.rivals import directions, koleo, orthogonality, sigreg
from models import Pair
from regularizers import Layers, alignment, energy_of, uniformity, unit


@dataclass(frozen=True)
class Recipe:
    """What a data set is trained with, unless a flag says otherwise."""

    epochs: int
    batch_size: int | None  # images in one optimizer step, over all processes; None = by the size of the set
    lr: float  # per 256 images: the peak rate is lr * batch_size / 256, Appendix B.2
    weight_decay: float
    warmup: float  # epochs
    tau: float  # of the target's moving average at the start
    energy_weight: float  # lambda of mhe and amhe
    temperature: float  # of simclr; moco has its own
    uniformity_weight: float = 0.125  # lambda of uniform, Section 4
    hidden_dim: int = 4096  # Section 3.6
    out_dim: int = 256  # Section 3.6
    eval_every: int = 10  # epochs
    optimizer: str = "lars"
    tau_end: float = 1.0


# Appendix B.2; it gives no decay for CIFAR and STL-10, which have ImageNet's at 300 epochs. Lambda of energies:
# Appendix C.1, for ImageNet Section 4. The temperatures are SimCLR's. photos is ours: its few steps need a large rate
# and a tau near 1. folder is ours, too: LARS and a tau near 1 kept BYOL below raw pixels, docs/results.md.
RECIPES = {
    #                     epochs batch   lr   decay  warm-up  tau  lambda temp.
    "photos":        Recipe(   9,   64,    6,   1e-6,   0, 0.996,   10,  0.5, hidden_dim=512, eval_every=1),
    "folder":        Recipe(  40, None, 0.48,   5e-4,   0,   0.9,   10,  0.5, hidden_dim=512, eval_every=4,
                            optimizer="sgd", tau_end=0.9),
    "cifar10-300":   Recipe( 300, 1024,  1.5,   1e-6,  10,  0.99,   10,  0.5),
    "cifar10-1000":  Recipe(1000, 1024,  1.0,   1e-6,  10, 0.996,   10,  0.5),
    "cifar100-300":  Recipe( 300, 1024,  1.5,   1e-6,  10,  0.99,   10,  0.5),
    "cifar100-1000": Recipe(1000, 1024,  1.0,   1e-6,  10, 0.996,   10,  0.5),
    "stl10-1000":    Recipe(1000, 1024, 0.45,   1e-6,  10, 0.996,   10,  0.5),
    "imagenet-300":  Recipe( 300,  512,  0.3,   1e-6,  10,  0.99,    1,  0.1),
    "imagenet-1000": Recipe(1000, 4096,  0.2, 1.5e-6,  10, 0.996,    1,  0.1),
}  # fmt: skip
PARTS = ("encoder", "projector", "predictor")
Terms = dict[str, Tensor]  # of the objective, by name
Fraction = Annotated[float, ">= 0", "<= 1"]
Width = Annotated[int, ">= 1", "<= 65536"]


def pretrain(
    *,
    dataset: Annotated[str, "photos (embedded), cifar10, cifar100, stl10, imagenet, or a folder"] = "photos",
    data_dir: Annotated[str, "where cifar10, cifar100 and stl10 lie or are downloaded to; imagenet's folder"] = "data",
    recipe: Annotated[Literal[tuple(RECIPES)], "None = the shorter of the data set, or folder"] | None = None,
    method: Annotated[Literal[tuple(models.METHODS)], "the loss, with its network"] = "byol",
    predictor: Annotated[Literal["mlp", "none"], "of byol and simsiam; none compares projections"] = "mlp",
    queue: Annotated[int, ">= 1", "of moco: earlier projections; None = half the set, up to 65536"] | None = None,
    model: Annotated[str, "any ResNet or ViT of timm, or alexnet"] = "resnet18",
    stem: Annotated[Literal[tuple(models.STEMS)], "3x3 of stride 1 or 2, or timm's; None = the data set's"]
    | None = None,
    init: Annotated[str, "weights that the encoder begins from: of a run, or a file of another project"] | None = None,
    prefix: Annotated[str, "of such a file: what stands before the encoder's names, if it holds several"] | None = None,
    norm: Annotated[Literal["bn", "none"], "BatchNorm, or networks without it"] = "bn",
    reg: Annotated[Literal[tuple(settings.TERMS)], "energy by chord, angle; uniformity; cos^2; KoLeo; SIGReg"] = "none",
    s: Annotated[float, ">= 0", "<= 8", "power of the energy; 0 is logarithmic"] = 2.0,
    weight: Annotated[float, ">= 0", "lambda of the regularizer; None = its own"] | None = None,
    reg_on: Annotated[tuple[Literal[PARTS], ...], "None = the heads, but no neurons below 3-d"] | None = None,
    temperature: Annotated[float, "> 0", "of simclr and moco"] | None = None,
    epochs: Annotated[int, ">= 1", "length of the training"] | None = None,
    batch_size: Annotated[int, ">= 2", "images in one step, over all processes"] | None = None,
    accumulate: Annotated[int, ">= 1", "micro-batches of a batch; their gradients are averaged before the step"] = 1,
    optimizer: Annotated[Literal["lars", "sgd", "adamw"], "momentum 0.9; betas 0.9, 0.999"] | None = None,
    lr: Annotated[float, "> 0", "< 1e6", "learning rate per 256 images, after the warm-up"] | None = None,
    weight_decay: Annotated[float, ">= 0", "of all weights but biases, norms, a ViT's tokens"] | None = None,
    warmup: Annotated[float, ">= 0", "epochs of linear warm-up; None = the recipe's part of all epochs"] | None = None,
    tau: Annotated[Fraction, "of the target's moving average at the start"] | None = None,
    tau_end: Annotated[Fraction, "of the target's moving average at the end"] | None = None,
    hidden_dim: Annotated[Width, "width of the hidden layers of the heads"] | None = None,
    out_dim: Annotated[Width, "width of the projections"] | None = None,
    blur_p: Annotated[Fraction, "probability of blur in both views; None = the data set's"] | None = None,
    jitter: Annotated[Fraction, "part of BYOL's colour jitter; 0 where colour tells classes"] = 1.0,
    grey: Annotated[Fraction, "probability of grey in both views"] = data.GREY_P,
    eval_crop: Annotated[float, "> 0", "<= 1", "part of the side that the evaluation view keeps"] = data.EVAL_CROP,
    holdout: Annotated[bool, "judge on images held out of the training set, not on the test set"] = False,
    skip_broken: Annotated[bool, "leave out pictures of a folder that cannot be read, instead of stopping"] = False,
    seed: Annotated[int, ">= 0", "< 1e9", "of weights, order and views"] = 0,
    out: Annotated[str, "run folder; None = runs/ and the flags, in this order"] | None = None,
    eval_every: Annotated[int, ">= 0", "epochs between k-NN rows, besides the last epoch; 0 = never"] | None = None,
    save_every: Annotated[str, "the most work between two saves: minutes or steps, as 10min or 500steps"] = "10min",
    resume: Annotated[Literal["auto", "never"], "auto continues the folder's run; never stops with an error"] = "auto",
    workers: Annotated[int, ">= 0", "processes that read pictures; None = by cores and shared memory"] | None = None,
    tracker: Annotated[Literal["none", "tensorboard", "wandb", "trackio"], "gets the log's numbers, too"] = "none",
    json: Annotated[bool, "rows as in the log on a terminal, too, where lines are printed for people"] = False,
):
    """Pre-train an encoder by BYOL or another method. None = the value of the recipe, printed before the first step."""
    flags = dict(locals())
    folder = settings.check(flags, pretrain.__kwdefaults__, RECIPES)  # before the data are read
    accelerator = processes.start(accumulate, tracker, folder)
    cfg, images = settings.resolve(flags, RECIPES, accelerator)
    images = images.to(accelerator.device)
    steps_per_epoch = len(images.pretraining.labels) // cfg.batch_size
    steps = steps_per_epoch * cfg.epochs

    set_seed(cfg.seed)
    training = build(cfg, images, accelerator)
    encoder = training.network.encoder
    run = Run(folder, training, steps, flags["save_every"])  # goes on with the run in the folder, if there is one
    run.announce(settings.announcement(cfg, flags, training.layers))
    share = (accelerator.process_index, accelerator.num_processes)
    rest = range(run.step, steps)
    micro_batches = data.batches(images.pretraining, images.size, cfg.batch_size, cfg.seed, rest, cfg.accumulate, share)
    warmup_steps = round(steps_per_epoch * cfg.warmup)
    rates = [lr_at(step, steps, warmup_steps, cfg.peak_lr) for step in range(steps)]
    taus = [tau_at(step, steps, cfg.tau, cfg.tau_end) for step in range(steps)]
    view = images.view(cfg.eval_crop)
    judged_on = (images.train, images.test, view)

    with run:  # a signal ends the run between two steps, with its state saved
        if run.wants_floors():
            before = "init" if cfg.init else "untrained"
            run.log_scores(before, nearest_neighbours(encoder, *judged_on))
            run.log_scores("pixels", nearest_neighbours(nn.Flatten(), *judged_on))
        for _ in run.epochs():
            for crops, _, u in run.rest_of_epoch(micro_batches):
                step = run.step
                terms = train_micro_batch(training, crops, u, rates[step], taus[step], step)
                run.after(terms)  # sums for the log; counts the step; saves or stops if that is due
            last = run.step - 1
            row = epoch_row(training, run.means(), rates[last], taus[last])
            run.log(**row, images_per_s=run.images_per_s)
            if run.judges_now():
                run.log_scores("online", nearest_neighbours(encoder, *judged_on))
                run.log(of="representations", **representations(encoder, images.test, view))
            run.end_epoch()
    run.finish()


@dataclass(frozen=True)
class Training:
    """What a step works with."""

    cfg: Settings
    images: data.Dataset
    accelerator: Accelerator
    network: models.Method
    parallel: nn.Module  # the same network, as it runs on all processes
    optimizer: Optimizer
    layers: Layers  # the weights that Eq. 7 sums over


def build(cfg: Settings, images: data.Dataset, accelerator: Accelerator) -> Training:
    """Build a network, with fresh weights or an encoder of --init, and its optimizer; LARS: Appendix B.2."""
    heads = (cfg.hidden_dim, cfg.out_dim, cfg.predictor, cfg.queue)
    network = models.METHODS[cfg.method].network(cfg.model, cfg.stem, cfg.norm, *heads)
    encoders.refuse_unfit_views(network.encoder, images.size)
    if cfg.init:
        cfg.init_digest = begin_from(cfg, network)
    groups = parameter_groups(network, cfg.weight_decay)
    if cfg.optimizer == "lars":
        optimizer = Lars(groups, momentum=0.9, trust_coeff=1e-3)
    elif cfg.optimizer == "adamw":
        optimizer = AdamW(groups)
    else:
        optimizer = SGD(groups, momentum=0.9)
    parallel, optimizer = accelerator.prepare(network, optimizer)
    network = accelerator.unwrap_model(parallel, keep_torch_compile=False)
    layers = models.neurons(network, cfg.reg_on)
    return Training(cfg, images, accelerator, network, parallel, optimizer, layers)


def parameter_groups(network: nn.Module, weight_decay: float) -> list[dict]:
    """Separate weights, which decay and LARS adapts, from biases and norms, Appendix B.2, and from a ViT's tokens."""
    parameters = [p for p in network.parameters() if p.requires_grad]
    encoder = network.encoder
    tokens = set(encoder.parameters(recurse=False))  # and positions: what belongs to no layer
    weights = [p for p in parameters if p.ndim > 1 and p not in tokens]
    others = [p for p in parameters if p.ndim <= 1 or p in tokens]
    adapted = {"params": weights, "weight_decay": weight_decay, "always_adapt": True}
    return [adapted, {"params": others, "weight_decay": 0}]


def train_micro_batch(training: Training, crops: Tensor, u: Tensor, lr: float, tau: float, step: int) -> Terms:
    """Backpropagate a micro-batch of `data.batches`; after the last of a step, update the weights and the target."""
    cfg, images = training.cfg, training.images
    network, accelerator = training.network, training.accelerator
    for group in training.optimizer.param_groups:
        group["lr"] = lr
    strengths = (cfg.blur_p, images.solarise_p, cfg.jitter, cfg.grey)
    v1, v2 = data.two_views(crops, u, images.mean, images.std, *strengths)
    with accelerator.accumulate(training.parallel):
        outputs = training.parallel(v1, v2)
        is_last = accelerator.sync_gradients  # energies need no images: this one has them for all
        terms = objective(cfg, network, training.layers if is_last else {}, step, *outputs)
        accelerator.backward(terms["loss"])
        training.optimizer.step()
        training.optimizer.zero_grad()
    if is_last and network.has_target:
        was_skipped = accelerator.optimizer_step_was_skipped  # by fp16's scaler: the weights are what they were
        network.update_target(1 if was_skipped else tau)
    return {name: term.detach() for name, term in terms.items()}


def objective(cfg: Settings, network: models.Method, layers: Layers, step: int, z: Pair, p: Pair, t: Pair) -> Terms:
    """Compute the loss, Eq. 7 or Eq. 4, and its terms without lambda, of a network's outputs (b, out_dim) a view."""
    z, p, t = ([processes.gather(view) for view in pair] for pair in (z, p, t))
    z1, z2 = z
    terms = {cfg.method: network.loss(z, p, t, cfg.temperature)}
    with torch.set_grad_enabled(cfg.reg == "uniform"):
        terms["uniformity"] = (uniformity(z1) + uniformity(z2)) / 2
    with torch.no_grad():
        terms["alignment"] = alignment(z1, z2)
        std1, std2 = unit(z1).std(0), unit(z2).std(0)
        terms["std"] = (std1.mean() + std2.mean()) / 2  # out_dim^-0.5 if they fill the sphere, 0 if they collapse
    if cfg.term == "energy" and layers:
        for name, energy in layer_energies(layers, cfg).items():
            terms[name] = cfg.accumulate * energy  # gradients and terms are averaged
    if cfg.reg == "ortho" and layers:
        squares = map(orthogonality, layers.values())
        terms["ortho"] = cfg.accumulate * sum(squares)
    if cfg.reg == "koleo":
        terms["koleo"] = (koleo(z1) + koleo(z2)) / 2
    if cfg.reg == "sigreg":
        drawn = directions(z1, cfg.seed, step)
        terms["sigreg"] = (sigreg(z1, drawn) + sigreg(z2, drawn)) / 2
    loss = terms[cfg.method]
    if cfg.term in terms:  # what --reg adds
        loss = loss + cfg.weight * terms[cfg.term]
    return {"loss": loss, **terms}


def layer_energies(layers: Layers, cfg: Settings) -> Terms:
    """Compute the sum of Eq. 7 without lambda, and what each layer adds; by angle, but for --reg mhe."""
    energies = energy_of(layers, cfg.s, angular=cfg.reg != "mhe")
    terms = {"energy": sum(energies.values())}
    for layer, energy in energies.items():
        terms[f"energy/{layer}"] = energy
    return terms


def epoch_row(training: Training, means: dict, lr: float, tau: float) -> dict:
    """Complete the mean terms of an epoch to its row; lr and tau are those of its last step."""
    cfg = training.cfg
    row = {**means, "lr": lr}
    if cfg.term != "energy":  # then it is that of the weights as they are now
        weights = {}  # that ask for no gradients, which would cost as much again
        for name, weight in training.layers.items():
            weights[name] = weight.detach()
        for name, energy in layer_energies(weights, cfg).items():
            row[name] = energy.item()
    if training.network.has_target:
        row["tau"] = tau
    return row


# ---- Schedules, Appendix B.2 -----------------------------------------------------------------------------------------
def lr_at(step: int, steps: int, warmup_steps: int, peak: float) -> float:
    """Rate of step 0 ... steps - 1: linear from peak / warmup_steps to peak, then a cosine towards 0."""
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    cosine = math.cos(math.pi * (step - warmup_steps) / (steps - warmup_steps))
    return peak * (1 + cosine) / 2


def tau_at(step: int, steps: int, tau: float, end=1) -> float:
    """end - (end - tau) (cos(pi k / K) + 1) / 2 at step k of K: from tau to end, which is 1 in the paper."""
    cosine = math.cos(math.pi * step / steps)
    return end - (end - tau) * (cosine + 1) / 2


if __name__ == "__main__":
    cli.run(pretrain, settings.GROUPS)
