"""Judge a frozen encoder by a weighted vote of its nearest neighbours.

    python knn_eval.py runs/photos-amhe/ckpt.safetensors

The training set is the bank, the test set asks. Features are the encoder's pooled output, compared by cosine; each of
the k nearest votes for its class with weight exp(cosine / temperature), as in Wu et al. (2018) and DINO. One row a k:

    {"stage": "knn_eval", "of": "trained", "k": 20, "top1": 78.4, "top5": 99.2, ...}

The same vote on an untrained network (the run's own initial weights) and on raw pixels: floors that a score stands on.
"""

from typing import Annotated, Literal

import torch
from accelerate import Accelerator
from torch import Tensor, nn

import data
import models
from harness import cli, processes

SMALL = 10_000  # images in the bank: up to here the floors come unasked
TILE = 2**9, 2**16  # queries and rows of the bank whose similarities are looked at together: 128 MB


def knn_eval(
    ckpt: str,
    *,
    k: tuple[Annotated[int, ">= 1"], ...] = (10, 20, 100, 200),
    temperature: Annotated[float, "> 0"] = 0.07,
    dataset: str | None = None,
    data_dir: str | None = None,
    model: str | None = None,
    stem: Literal["cifar", "imagenet"] | None = None,
    net: Literal["online", "target"] = "online",
    eval_crop: Annotated[float, "> 0", "<= 1"] | None = None,
    skip_broken: bool = False,
    floors: bool | None = None,
):
    """Print the top-1 and top-5 accuracy (%) of a weighted k-NN vote on the features of a checkpoint.

    Args:
        ckpt: ckpt.safetensors or encoder.safetensors of a run, or with --model a file of another project
        k: numbers of neighbours; where the bank holds fewer, all of it votes
        temperature: of the votes' weights exp(cosine / temperature); DINO's 0.07
        dataset: as in pretrain.py; None = the one the checkpoint was trained on
        data_dir: as in pretrain.py; None = as in training
        model: any ResNet of timm, for a checkpoint of another project (.pth, .safetensors); then --dataset is needed
        stem: of such a checkpoint, cifar or imagenet; None = imagenet
        net: the network that is judged, online or target
        eval_crop: part of the side that the evaluation view keeps; None = as in training
        skip_broken: leave out pictures that cannot be read, as in pretrain.py; it is done if it was done in training
        floors: judge the untrained network and raw pixels, too; None = if the bank has at most 10,000 images
    """
    accelerator = processes.start()
    encoder, description = models.load_encoder(ckpt, net, model, stem, dataset)
    settings = description["settings"]
    name = dataset or settings["dataset"]
    with accelerator.main_process_first():  # the others find what it has downloaded
        images, view = data.judged(description, dataset, data_dir, skip_broken, eval_crop)
    train, test = images.train.to(accelerator.device), images.test.to(accelerator.device)
    if floors and isinstance(train.images, data.Files):
        raise cli.UsageError(f"--floors: pictures of {name} are not in memory and of one size; take --nofloors")
    log = cli.log_of(ckpt, settings)

    judges = {"trained": encoder}
    if floors or (floors is None and len(train.labels) <= SMALL and isinstance(train.images, Tensor)):
        torch.manual_seed(settings["seed"])
        untrained = models.build_encoder(settings["model"], settings["stem"], settings["norm"])
        judges |= {"untrained": untrained, "pixels": nn.Flatten()}
    how = {"temperature": temperature, "net": net, "eval_crop": view["crop"]}
    how["trained_epochs"] = description.get("epoch")
    where = {"dataset": name, "split": "test", "bank": len(train.labels), "queries": len(test.labels)}
    for of, judge in judges.items():
        tops = nearest_neighbours(judge.to(accelerator.device), train, test, view, accelerator, k, temperature)
        for n, scores in tops.items() if accelerator.is_main_process else ():
            cli.emit({"stage": "knn_eval", "of": of, "k": n, **scores, **how, **where}, log)


def nearest_neighbours(
    encoder: nn.Module,
    bank: data.Split,
    queries: data.Split,
    view: dict,
    accelerator: Accelerator,
    k: tuple[int, ...] = (20,),
    temperature: float = 0.07,
) -> dict[int, dict[str, float]]:
    """The `vote` on an encoder's features of the evaluation views of two splits; k and temperature are DINO's.

    Each process embeds its share of the images, and takes the vote over all of them.
    """

    def embed(split: data.Split) -> Tensor:
        return models.embed(encoder, data.evaluation_views(split, **view))

    features, asking = (processes.in_shares(embed, split, accelerator) for split in (bank, queries))
    return vote(features, bank.labels, asking, queries.labels, k, temperature)


@torch.no_grad()
def vote(
    bank: Tensor, bank_labels: Tensor, queries: Tensor, labels: Tensor, k: tuple[int, ...], temperature: float
) -> dict[int, dict[str, float]]:
    """Accuracy in percent, {k: {"top1": ..., "top5": ...}}, of the vote of the k rows of the bank nearest by cosine.

    bank (n, d), queries (m, d): features, rows of any length; bank_labels (n,), labels (m,): classes from 0. k is
    clipped to n.
    """
    classes = int(max(bank_labels.max(), labels.max())) + 1
    ks = list(dict.fromkeys(min(n, len(bank)) for n in k))
    ranks, index = {n: [] for n in ks}, torch.arange(classes, device=bank.device)
    for similarity, nearest, truth in zip(*(x.split(TILE[0]) for x in (*neighbours(queries, bank, max(ks)), labels))):
        weight = ((similarity - similarity[:, :1]).double() / temperature).exp()  # the nearest weighs 1
        for n in ks:
            votes = weight.new_zeros(len(truth), classes).scatter_add_(1, bank_labels[nearest[:, :n]], weight[:, :n])
            won = votes.gather(1, truth[:, None])
            # of equal votes the lower class comes first; a class without a vote has no rank
            before = (votes > won) | ((votes == won) & (index < truth[:, None]))
            ranks[n].append(before.sum(1).masked_fill(won[:, 0] == 0, max(classes, 5)))
    within = {n: {t: (torch.cat(rank) < t).double().mean().item() for t in (1, 5)} for n, rank in ranks.items()}
    return {n: {f"top{t}": round(100 * share, 4) for t, share in shares.items()} for n, shares in within.items()}


def neighbours(queries: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Cosines (m, k) of each query (m, d) with the k nearest rows of the bank (n, d), in falling order, and which rows.

    Beyond one tile of cosines, there is a normalised copy of the queries and of a part of the bank.
    """
    queries = nn.functional.normalize(queries)
    best, rows = queries.new_empty(len(queries), 0), torch.empty(len(queries), 0, dtype=torch.long, device=bank.device)
    tile = queries.new_empty(TILE[0] * min(TILE[1], len(bank)))  # one for all: new pages cost a CPU a fifth of the time
    for start, part in zip(range(0, len(bank), TILE[1]), bank.split(TILE[1])):
        part, found = nn.functional.normalize(part), []
        for some in queries.split(TILE[0]):
            cosines = torch.mm(some, part.T, out=tile[: len(some) * len(part)].view(len(some), len(part)))
            found.append(cosines.topk(min(k, len(part))))
        values, at = (torch.cat(x) for x in zip(*found))
        best, order = torch.cat([best, values], 1).topk(min(k, best.shape[1] + values.shape[1]))
        rows = torch.cat([rows, at + start], 1).gather(1, order)
    return best, rows


if __name__ == "__main__":
    cli.run(knn_eval, data.DataError, models.ModelError, processes.LaunchError)
