"""Judge a frozen encoder by a linear classifier on its features, Appendix C and D.

    python linear_eval.py runs/photos-amhe/ckpt.safetensors

80 epochs of SGD with Nesterov momentum 0.9, batches of 100, a rate of 0.2 per 256 images that falls by a cosine step by
step, crops and flips as the only augmentation. One row an epoch; the last row holds the result, after the last epoch:

    {"stage": "linear_eval", "epoch": 80, "top1": 81.2, "top5": 99.4, "features": "augmented", ...}

--cached computes the features of the evaluation view once: minutes become seconds, but the protocol is another.
"""

import math
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import data
import models
from harness import cli, processes
from harness.augment import normalise

RATES = (0.4, 0.3, 0.2, 0.1, 0.05)  # BYOL's list, per 256 images


def linear_eval(
    ckpt: str,
    *,
    epochs: Annotated[int, ">= 1"] = 80,
    batch_size: Annotated[int, ">= 1"] | None = None,
    lr: Annotated[float, "> 0", "< 1e6"] | None = None,
    sweep: bool = False,
    weight_decay: Annotated[float, ">= 0"] = 0.0,
    seed: Annotated[int, ">= 0", "< 1e9"] = 0,
    cached: bool = False,
    dataset: str | None = None,
    data_dir: str | None = None,
    model: str | None = None,
    stem: Literal["cifar", "imagenet"] | None = None,
    net: Literal["online", "target"] = "online",
    eval_crop: Annotated[float, "> 0", "<= 1"] | None = None,
    skip_broken: bool = False,
):
    """Print the top-1 and top-5 accuracy (%) of a linear classifier trained on the frozen features of a checkpoint.

    Args:
        ckpt: ckpt.safetensors or encoder.safetensors of a run, or with --model a file of another project
        epochs: length of the training
        batch_size: images in one step; None = 100, or all where the set holds fewer
        lr: learning rate per 256 images at the start; it falls to 0 by a cosine; None = 0.2
        sweep: take the best of 0.4, 0.3, 0.2, 0.1, 0.05 for lr, judged on images held out of the training set
        weight_decay: of the classifier
        seed: of the classifier's weights, the order and the crops
        cached: train on features of the evaluation view, computed once, in place of crops and flips
        dataset: as in pretrain.py; None = the one the checkpoint was trained on
        data_dir: as in pretrain.py; None = as in training
        model: any ResNet of timm, for a checkpoint of another project (.pth, .safetensors); then --dataset is needed
        stem: of such a checkpoint, cifar or imagenet; None = imagenet
        net: the network that is judged, online or target
        eval_crop: part of the side that the evaluation view keeps; None = as in training
        skip_broken: leave out pictures that cannot be read, as in pretrain.py; it is done if it was done in training
    """
    if sweep and lr:
        raise cli.UsageError(f"--lr {lr}: has no effect with --sweep")
    accelerator = processes.start()
    encoder, description = models.load_encoder(ckpt, net, model, stem, dataset)
    encoder.to(accelerator.device).requires_grad_(False)
    settings = description["settings"]
    name = dataset or settings["dataset"]
    with accelerator.main_process_first():  # the others find what it has downloaded
        images, view = data.judged(description, dataset, data_dir, skip_broken, eval_crop)
    halves = data.hold_out(images) if sweep else images
    if (batch_size or 0) > (n := len(halves.train.labels)):
        raise cli.UsageError(f"--batch_size {batch_size}: {name} has {n} images to train on; take fewer")
    batch_size = batch_size or min(100, n)
    frozen = {key: x.clone() for key, x in encoder.state_dict().items()}
    log = cli.log_of(ckpt, settings)

    how = {"epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay, "seed": seed}
    row = {"stage": "linear_eval", "features": "cached" if cached else "augmented"}

    def embed(split: data.Split) -> Tensor:
        return models.embed(encoder, data.evaluation_views(split, **view))

    def ready(split: data.Split, cached: bool) -> data.Split:
        """On the device; where features are cached, these in place of the images."""
        split = split.to(accelerator.device)
        return split._replace(images=processes.in_shares(embed, split, accelerator)) if cached else split

    if sweep:
        sweeps = {rate: {**row, "sweep": rate} for rate in RATES}
        train, held, tops = ready(halves.train, cached), ready(halves.test, True), {}
        classifiers = fit(encoder, train, len(images.classes), view, how, sweeps, log, accelerator)
        for rate, classifier in classifiers.items():
            tops[rate] = accuracy(classifier(held.images), held.labels)
            cli.emit({**sweeps[rate], "epoch": epochs, **tops[rate], "split": "holdout"}, log)
        lr = max(tops, key=lambda rate: tops[rate]["top1"])
    how["lr"] = lr = lr or 0.2
    train, test = ready(images.train, cached), ready(images.test, True)
    classifier = fit(encoder, train, len(images.classes), view, how, {lr: row}, log, accelerator)[lr]
    if any(not torch.equal(x, frozen[key]) for key, x in encoder.state_dict().items()):
        raise RuntimeError("the frozen encoder has changed")
    how |= {"net": net, "eval_crop": view["crop"], "swept": sweep}
    how["trained_epochs"] = description.get("epoch")
    where = {"dataset": name, "split": "test", "train": len(images.train.labels), "test": len(test.labels)}
    cli.emit({**row, "epoch": epochs, **accuracy(classifier(test.images), test.labels), **how, **where}, log)


def fit(
    encoder: nn.Module,
    train: data.Split,
    classes: int,
    view: dict,
    how: dict,
    rows: dict[float, dict],
    log: Path | None,
    accelerator: Accelerator,
) -> dict[float, nn.Linear]:
    """A linear classifier for each rate of `rows`, all on the same features, trained as `how` says.

    train is a split of images, or of features in their place. Each rate gets a row an epoch, which begins as it does in
    `rows`. Several processes embed a share of each batch, and train the same classifiers on the whole of it.
    """
    batch_size, epochs, n = how["batch_size"], how["epochs"], len(train.labels)
    classifiers = {}
    for rate in rows:
        torch.manual_seed(how["seed"])
        classifiers[rate] = nn.Linear(encoder.num_features, classes).to(train.labels.device)
    groups = [{"params": [*c.parameters()], "lr": rate * batch_size / 256} for rate, c in classifiers.items()]
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=how["weight_decay"])
    steps = -(-n // batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps * epochs)
    batches = inputs(encoder, train, how, view, accelerator)
    with tqdm(total=steps * epochs, unit="step", disable=not accelerator.is_main_process) as bar:
        for epoch in range(1, epochs + 1):
            loss, right = torch.zeros(2, len(rows), device=train.labels.device)
            now = schedule.get_last_lr()
            for features, labels in islice(batches, steps):
                scores = [classifier(features) for classifier in classifiers.values()]
                losses = torch.stack([nn.functional.cross_entropy(x, labels) for x in scores])
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
                schedule.step()
                loss += losses.detach() * len(labels)
                right += torch.stack([(x.argmax(1) == labels).sum() for x in scores])
                bar.update()
            for (rate, row), *of in zip(rows.items(), (loss / n).tolist(), (100 * right / n).tolist(), now):
                if not math.isfinite(of[0]):
                    raise cli.UsageError(f"--lr {rate}: the loss is not finite after epoch {epoch}; take a smaller one")
                cli.emit({**row, "epoch": epoch, "loss": of[0], "train_top1": round(of[1], 4), "lr": of[2]}, log)
    return classifiers


def inputs(
    encoder: nn.Module, train: data.Split, how: dict, view: dict, accelerator: Accelerator
) -> Iterator[tuple[Tensor, Tensor]]:
    """Features (b, d) and labels (b,) of all epochs: of random crops and flips of images, or features as they are."""
    epochs, batch_size, n = range(1, how["epochs"] + 1), how["batch_size"], len(train.labels)
    if isinstance(train.images, Tensor) and train.images.ndim == 2:
        generator = torch.Generator().manual_seed(how["seed"])
        for _ in epochs:
            for rows in torch.randperm(n, generator=generator).to(train.labels.device).split(batch_size):
                yield train.images[rows], train.labels[rows]
        return
    share = {"views": 1, "drop_last": False, "rank": accelerator.process_index, "world": accelerator.num_processes}
    sizes = [min(batch_size, n - start) for start in range(0, n, batch_size)]  # a share has rows beyond these
    crops = data.batches(train, batch_size, view["size"], how["seed"], epochs, **share)
    for (x, labels, _), size in zip(crops, cycle(sizes)):
        with torch.no_grad():
            features = encoder(normalise(x[0], view["mean"], view["std"])).float()
        yield accelerator.gather(features)[:size], accelerator.gather(labels)[:size]


@torch.no_grad()
def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent of scores (n, classes)."""
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return {f"top{k}": round(100 * best[:, :k].any(1).double().mean().item(), 4) for k in (1, 5)}


if __name__ == "__main__":
    cli.run(linear_eval, data.DataError, models.ModelError, processes.LaunchError)
