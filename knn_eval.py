"""Judge a frozen encoder by a weighted vote of its nearest neighbours.

    python knn_eval.py runs/photos-amhe/ckpt.safetensors

The training set is the bank, the test set is classified. Each of the k nearest by cosine votes for its class, weighted
by exp(cosine / temperature), as in Wu et al. (2018) and DINO. The floors are that vote on random weights and on pixels.
"""

from collections.abc import Iterable
from typing import Annotated

import torch
from torch import Tensor, nn

import models
from data import Split, evaluation_views
from harness import judging
from harness.measure import floors_are_cheap, geometry
from lib import cli, processes
from lib.log import emit, show
from lib.nearest import finest, in_parts, nearest

QUERIES_AT_ONCE = 512  # of the vote
HEAD = "encoder       k   top-1   top-5  balanced    rank  alignment  uniformity"
Scores = dict[int, dict[str, float]]  # {k: {"top1": percent, ...}}


def knn_eval(
    ckpt: judging.Ckpt,
    *,
    k: Annotated[tuple[Annotated[int, ">= 1"], ...], "numbers of neighbours, of the bank at most"] = (10, 20, 100, 200),
    temperature: Annotated[float, "> 0", "of the votes' weights exp(cosine / temperature); DINO's 0.07"] = 0.07,
    floors: Annotated[bool, "judge an untrained network and pixels, too; None = on small data sets"] | None = None,
    **shared: judging.shared_flags,
):
    """Print the accuracy (%) of a weighted k-NN vote on the features of a checkpoint, and where they lie."""
    accelerator = processes.start()
    judged = judging.open_judged(accelerator, ckpt, shared)
    train = judged.images.train.to(accelerator.device)
    test = judged.images.test.to(accelerator.device)
    if floors is None:
        floors = floors_are_cheap(judged.images)

    encoders = {"trained": judged.encoder}
    if floors:
        encoders["untrained"] = judging.untrained_encoder(judged)
        encoders["pixels"] = nn.Flatten()
    protocol = {"temperature": temperature, "bank": len(train.labels), "queries": len(test.labels)}
    scores_of = {}
    show(HEAD)
    for of, encoder in encoders.items():
        scores_of[of] = nearest_neighbours(encoder, train, test, judged.view, k, temperature)
        on_sphere = geometry(encoder, judged.images, judged.view, accelerator.device)
        for neighbours, scores in scores_of[of].items():
            row = {"stage": "knn_eval", "of": of, "k": neighbours, **scores, **on_sphere}
            emit(row | protocol | judged.columns, judged.log, table_line(row))
    show(verdict(scores_of))


def table_line(row: dict) -> str:
    """What people at a terminal read in place of a row, under HEAD."""
    scores = f"{row['top1']:7.1f} {row['top5']:7.1f} {row['balanced']:9.1f}"
    return f"{row['of']:10} {row['k']:4} {scores} {row['rank']:7.1f} {row['alignment']:10.2f} {row['uniformity']:11.2f}"


def verdict(scores_of: dict[str, Scores]) -> str:
    """Compare the accuracy of an encoder's k-NN vote with its floors in a sentence."""
    by_k = scores_of["trained"]
    k = 20 if 20 in by_k else min(by_k)
    top1 = by_k[k]["top1"]
    compared = []
    for of, scores in scores_of.items():
        if of != "trained":
            floor = scores[k]["top1"]
            side = "above" if top1 >= floor else "BELOW"
            compared.append(f"{abs(top1 - floor):.1f} points {side} {of} ({floor:.1f})")
    return f"top-1 {top1:.1f} % where k is {k}" + (f": {', '.join(compared)}" if compared else "")


def nearest_neighbours(
    encoder: nn.Module, bank: Split, queries: Split, view: dict, k=(20,), temperature=0.07
) -> Scores:
    """Take the `vote` on an encoder's features of the evaluation views of two splits; k = 20 and 0.07 are DINO's."""
    query_features = judging.embedded(encoder, queries, view)
    bank_views = evaluation_views(processes.own_part(bank), **view)
    bank_features = (models.embed(encoder, views) for views in in_parts(bank_views))  # ImageNet's take 10 GB
    return vote(bank_features, bank.labels, query_features, queries.labels, k, temperature)


@torch.no_grad()
def vote(
    bank: Iterable[Tensor], bank_labels: Tensor, queries: Tensor, labels: Tensor, k: tuple, temperature: float
) -> Scores:
    """Accuracy of the vote of the k rows of the bank nearest by cosine; k is clipped to n.

    bank: features in parts (n_i, d), each process its own, see `nearest`: ValueError unless they have n rows. queries:
    (m, d). bank_labels (n,), labels (m,): classes from 0. A class without a vote is a miss.
    """
    classes = int(max(bank_labels.max(), labels.max())) + 1
    ks = sorted({min(neighbours, len(bank_labels)) for neighbours in k})
    cosines, rows = nearest(queries, bank, len(bank_labels), max(ks))
    ranks = {neighbours: [] for neighbours in ks}
    per_query = (cosines, rows, labels)
    chunks = [processes.my_rows(x).split(QUERIES_AT_ONCE) for x in per_query]
    for cosine, voters, truth in zip(*chunks):
        voted = bank_labels[voters]
        advantage = cosine - cosine[:, :1]
        exponent = advantage.to(finest(cosine.device)) / temperature  # of a vote's weight over the nearest's
        for neighbours in ks:
            votes = log_votes(voted[:, :neighbours], exponent[:, :neighbours], classes)
            ranks[neighbours].append(judging.rank_of(truth, votes))
    scores = {}
    for neighbours, parts in ranks.items():
        ranks_of_all = processes.gather(torch.cat(parts))[: len(labels)]
        scores[neighbours] = judging.accuracy(ranks_of_all, labels)
    return scores


def log_votes(voted: Tensor, exponent: Tensor, classes: int) -> Tensor:
    """Log of the sum of exp(exponent) (m, k) over the votes for each class, (m, classes); voted: (m, k)."""
    nobody = exponent.new_full((len(voted), classes), -torch.inf)
    highest = nobody.scatter_reduce(1, voted, exponent, "amax")  # of a class: its own, or small weights would be 0
    weight = (exponent - highest.gather(1, voted)).exp()
    votes = torch.zeros_like(nobody).scatter_add_(1, voted, weight)
    return highest + votes.log()


if __name__ == "__main__":
    cli.run(knn_eval)
