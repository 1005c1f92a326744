"""Judge a frozen encoder by a linear classifier on its features, Appendix C and D.

    python linear_eval.py runs/photos-amhe/ckpt.safetensors

80 epochs of SGD with Nesterov momentum 0.9, batches of 100, a rate of 0.2 per 256 images that falls by a cosine step by
step, crops and flips as the only augmentation. One row an epoch; the last row holds the result, after the last epoch:

    {"stage": "linear_eval", "epoch": 80, "top1": 81.2, "top5": 99.4, "features": "augmented", ...}

--cached computes the features of the evaluation view once: minutes become seconds, but the protocol is another.
"""

from typing import Annotated

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from tqdm import tqdm

import cli
import data
import models


def linear_eval(
    ckpt: str,
    *,
    epochs: Annotated[int, ">= 1"] = 80,
    batch_size: Annotated[int, ">= 1"] = 100,
    lr: Annotated[float, "> 0", "< 1e6"] = 0.2,
    weight_decay: Annotated[float, ">= 0"] = 0.0,
    seed: Annotated[int, ">= 0", "< 1e9"] = 0,
    cached: bool = False,
    dataset: str | None = None,
    data_dir: str | None = None,
):
    """Print the top-1 and top-5 accuracy (%) of a linear classifier trained on the frozen features of a checkpoint.

    Args:
        ckpt: ckpt.safetensors or encoder.safetensors of a run
        epochs: length of the training
        batch_size: images in one step
        lr: learning rate per 256 images at the start; it falls to 0 by a cosine
        weight_decay: of the classifier
        seed: of the classifier's weights, the order and the crops
        cached: train on features of the evaluation view, computed once, in place of crops and flips
        dataset: photos, cifar10 or a folder; None = the one the checkpoint was trained on
        data_dir: where cifar10 lies; None = as in training
    """
    accelerator = Accelerator()
    if not accelerator.is_main_process:
        return  # one process judges
    device = accelerator.device
    encoder, description = models.load_encoder(ckpt)
    encoder.to(device).requires_grad_(False)
    settings, view = description["settings"], description["view"]
    name = dataset or settings["dataset"]
    judged = data.load(name, data_dir or settings["data_dir"])
    train, test = judged.train.to(device), judged.test.to(device)
    if batch_size > len(train.labels):
        raise cli.UsageError(
            f"--batch_size {batch_size}: {name} has {len(train.labels)} images to train on; take fewer"
        )
    frozen = {key: x.clone() for key, x in encoder.state_dict().items()}
    log = cli.log_of(ckpt)

    torch.manual_seed(seed)
    classifier = nn.Linear(encoder.num_features, len(judged.classes)).to(device)
    optimizer = torch.optim.SGD(
        classifier.parameters(), lr * batch_size / 256, momentum=0.9, nesterov=True, weight_decay=weight_decay
    )
    steps = -(-len(train.labels) // batch_size) * epochs
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    if cached:
        train = data.Split(models.embed(encoder, data.evaluation_views(train.images, **view)), train.labels)
    row = {"stage": "linear_eval", "features": "cached" if cached else "augmented"}
    with tqdm(total=steps, unit="step") as bar:
        for epoch in range(1, epochs + 1):
            loss, right, rate = 0.0, 0.0, schedule.get_last_lr()[0]
            for x, labels, u in data.batches(train, batch_size, seed, epoch, drop_last=False):
                scores = classifier(x if cached else models.embed(encoder, [random_crop(x, u[0], view)]))
                step_loss = nn.functional.cross_entropy(scores, labels)
                optimizer.zero_grad()
                step_loss.backward()
                optimizer.step()
                schedule.step()
                loss += step_loss.detach() * len(labels)
                right += (scores.argmax(1) == labels).sum()
                bar.update()
            if not torch.isfinite(loss):
                raise cli.UsageError(f"--lr {lr}: the loss is not finite after epoch {epoch}; take a smaller one")
            n = len(train.labels)
            means = {"loss": float(loss / n), "train_top1": round(float(100 * right / n), 4)}
            cli.emit({**row, "epoch": epoch, **means, "lr": rate}, log)

    with torch.no_grad():
        scores = classifier(models.embed(encoder, data.evaluation_views(test.images, **view)))
    if any(not torch.equal(x, frozen[key]) for key, x in encoder.state_dict().items()):
        raise RuntimeError("the frozen encoder has changed")
    how = {"batch_size": batch_size, "lr": lr, "weight_decay": weight_decay, "seed": seed}
    where = {"dataset": name, "train": len(train.labels), "test": len(test.labels)}
    cli.emit({**row, "epoch": epochs, **accuracy(scores, test.labels), **how, **where}, log)


def random_crop(images: Tensor, u: Tensor, view: dict) -> Tensor:
    """Crop and flip at the size, mean and std of the encoder's own training."""
    return data.normalise(data.crop_flip(images, u, view["size"]), view["mean"], view["std"])


def accuracy(scores: Tensor, labels: Tensor) -> dict[str, float]:
    """Top-1 and top-5 accuracy in percent of scores (n, classes)."""
    best = scores.topk(min(5, scores.shape[1])).indices == labels[:, None]
    return {f"top{k}": round(100 * best[:, :k].any(1).double().mean().item(), 4) for k in (1, 5)}


if __name__ == "__main__":
    cli.run(linear_eval, data.DataError, models.ModelError)
