"""Judge a frozen encoder by a linear classifier on its features, Appendix C and D.

    python linear_eval.py runs/photos-amhe/ckpt.safetensors

SGD with Nesterov momentum 0.9; the rate follows a cosine to 0, updated every step. Crops and flips are the only
augmentation. --cached computes the features of the evaluation view once: much faster, but another protocol.
"""

import math
from collections.abc import Iterator
from itertools import cycle, islice
from typing import Annotated, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import data
from harness import judging
from harness.judging import Judged
from lib import cli, processes
from lib.augment import normalise
from lib.errors import InputError
from lib.log import emit, progress

LR = 0.2  # per 256 images, Appendix D
BATCH_SIZE = 100  # Appendix D
SWEEP = (0.4, 0.3, 0.2, 0.1, 0.05)  # BYOL's rates, per 256 images


class Features(NamedTuple):
    """The encoder's features of a split's images, (n, d), and their labels (n,)."""

    x: Tensor
    labels: Tensor


def linear_eval(
    ckpt: judging.Ckpt,
    *,
    epochs: Annotated[int, ">= 1", "length of the training"] = 80,
    batch_size: Annotated[int, ">= 1", "images in one step; None = 100, or all of a smaller set"] | None = None,
    lr: Annotated[float, "> 0", "< 1e6", "per 256 images at the start; falls to 0; None = 0.2"] | None = None,
    sweep: Annotated[bool, "take the best of 0.4, 0.3, 0.2, 0.1, 0.05 for lr, judged on a hold-out"] = False,
    weight_decay: Annotated[float, ">= 0", "of the classifier"] = 0.0,
    seed: Annotated[int, ">= 0", "< 1e9", "of the classifier's weights, the order and the crops"] = 0,
    cached: Annotated[bool, "train on features of the evaluation view, in place of crops and flips"] = False,
    **shared: judging.shared_flags,
):
    """Print the accuracy (%) of a linear classifier trained on the frozen features of a checkpoint."""
    if sweep and lr:
        raise InputError(f"--lr {lr}: has no effect with --sweep")
    accelerator = processes.start()
    judged = judging.open_judged(accelerator, ckpt, shared)
    images = judged.images
    tuning = data.hold_out(images) if sweep else images
    n = len(tuning.train.labels)
    if batch_size and batch_size > n:
        raise InputError(f"--batch_size {batch_size}: {judged.dataset} has {n} images to train on; take fewer")
    batch_size = batch_size or min(BATCH_SIZE, n)
    hyper = {"epochs": epochs, "batch_size": batch_size, "weight_decay": weight_decay, "seed": seed}

    row = {"stage": "linear_eval", "features": "cached" if cached else "augmented"}
    lr = best_rate(judged, tuning, cached, row, hyper) if sweep else lr or LR
    train = features_of(judged, images.train) if cached else images.train.to(accelerator.device)
    test = features_of(judged, images.test)
    classifier = fit(judged, train, {lr: row}, **hyper)[lr]
    scores = scores_of(classifier, test)
    protocol = {**hyper, "lr": lr, "swept": sweep}
    protocol |= {"train": len(train.labels), "test": len(test.labels)}
    row["epoch"] = epochs
    log_row(judged, row | scores | protocol | judged.columns)


def log_row(judged: Judged, row: dict) -> None:
    """Print a row, or at a terminal what people want to know of it, and add it to the log of the run."""
    emit(row, judged.log, classifier_line(row))


def classifier_line(row: dict) -> str:
    """Say what a row holds; nothing of an epoch in which several rates are tried."""
    if "loss" in row and "sweep" in row:
        return ""
    if "loss" in row:
        return f"epoch {row['epoch']}  loss {row['loss']:.3f}  train {row['train_top1']:.1f} %"
    scores = f"top-1 {row['top1']:.1f} %  top-5 {row['top5']:.1f} %  balanced {row['balanced']:.1f} %"
    if "sweep" in row:
        return f"lr {row['sweep']} on the hold-out: {scores}"
    return f"linear classifier, lr {row['lr']}: {scores}"


def best_rate(judged: Judged, tuning: data.Dataset, cached: bool, row: dict, hyper: dict) -> float:
    """Return the rate of SWEEP whose classifier is best on the held-out images."""
    train = features_of(judged, tuning.train) if cached else tuning.train.to(judged.accelerator.device)
    held_out = features_of(judged, tuning.test)
    rows = {rate: {**row, "sweep": rate} for rate in SWEEP}
    top1_of = {}  # not of a rate that diverged
    for rate, classifier in fit(judged, train, rows, **hyper).items():
        scores = scores_of(classifier, held_out)
        log_row(judged, {**rows[rate], "epoch": hyper["epochs"], **scores, "split": "holdout"})
        top1_of[rate] = scores["top1"]
    return max(top1_of, key=top1_of.get)


def features_of(judged: Judged, split: data.Split) -> Features:
    """Compute the features of a split's evaluation views."""
    split = split.to(judged.accelerator.device)
    return Features(judging.embedded(judged.encoder, split, judged.view, "features"), split.labels)


def scores_of(classifier: nn.Linear, features: Features) -> dict[str, float]:
    """Compute the accuracies of a classifier, in percent."""
    ranks = judging.rank_of(features.labels, classifier(features.x))
    return judging.accuracy(ranks, features.labels)


def fit(
    judged: Judged, train: data.Split | Features, rows: dict[float, dict], epochs, batch_size, weight_decay, seed
) -> dict[float, nn.Linear]:
    """Train a classifier for each rate, a key of `rows`, all on the same features; return them by rate.

    Each logs a row after each epoch. One whose loss or weights are not finite is left out; InputError if none is left.
    """
    n, device = len(train.labels), train.labels.device
    classifiers, groups = {}, []
    for rate in rows:
        torch.manual_seed(seed)  # the same start for each rate
        classifiers[rate] = nn.Linear(judged.encoder.num_features, len(judged.images.classes)).to(device)
        groups.append({"params": classifiers[rate].parameters(), "lr": rate * batch_size / 256})
    optimizer = torch.optim.SGD(groups, momentum=0.9, nesterov=True, weight_decay=weight_decay)
    steps_per_epoch = math.ceil(n / batch_size)
    steps = steps_per_epoch * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    batches = feature_batches(judged, train, epochs, batch_size, seed)
    with progress(steps) as bar:
        for epoch in range(1, epochs + 1):
            total_loss, correct = torch.zeros(2, len(classifiers), device=device)
            rates_now = dict(zip(rows, schedule.get_last_lr()))
            for features, labels in islice(batches, steps_per_epoch):
                logits = [classifier(features) for classifier in classifiers.values()]
                losses = torch.stack([cross_entropy(x, labels) for x in logits])
                optimizer.zero_grad()
                losses.sum().backward()
                optimizer.step()
                schedule.step()
                total_loss += losses.detach() * len(labels)
                is_correct = [x.argmax(1) == labels for x in logits]
                correct += torch.stack(is_correct).sum(1)
                bar.update()
            mean_loss = (total_loss / n).tolist()
            train_top1 = (100 * correct / n).tolist()
            for rate, loss, top1 in zip([*classifiers], mean_loss, train_top1):
                if math.isfinite(loss) and classifiers[rate].weight.isfinite().all():
                    numbers = {"loss": loss, "train_top1": round(top1, 4), "rate": rates_now[rate]}
                    log_row(judged, {**rows[rate], "epoch": epoch, **numbers})
                    continue
                del classifiers[rate]
                if not classifiers:
                    raise InputError(f"--lr {rate}: the loss is not finite after epoch {epoch}; take a smaller one")
                processes.say(f"--lr {rate}: leaves the sweep, its loss is not finite after epoch {epoch}")
    return classifiers


def feature_batches(
    judged: Judged, train: data.Split | Features, epochs: int, batch_size: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (b, d) and labels (b,) of all epochs: of random crops and flips, or the features given."""
    n = len(train.labels)
    if isinstance(train, Features):
        generator = torch.Generator().manual_seed(seed)
        for _ in range(epochs):
            order = torch.randperm(n, generator=generator).to(train.labels.device)
            for chosen in order.split(batch_size):
                yield train.x[chosen], train.labels[chosen]
        return
    view, accelerator = judged.view, judged.accelerator
    share = (accelerator.process_index, accelerator.num_processes)
    lengths = [min(batch_size, n - start) for start in range(0, n, batch_size)]
    steps = range(epochs * len(lengths))
    crops = data.batches(train, view["size"], batch_size, seed, steps, share=share, views=1, drop_last=False)
    for (x, labels, _), length in zip(crops, cycle(lengths)):
        with torch.no_grad():
            views = normalise(x[0], view["mean"], view["std"])
            features = judged.encoder(views).float()
        features, labels = map(processes.gather, (features, labels))
        yield features[:length], labels[:length]  # shares are equal in length: rows past the end repeat


if __name__ == "__main__":
    cli.run(linear_eval)
