"""The figure neighbours: test pictures, each with its nearest training pictures by the features of an encoder.

    python -m tools.figures neighbours runs/photos-amhe

The queries are drawn by a fixed seed and spread over the classes, so that all encoders are asked the same ones.
"""

from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt  # tools.figures chooses the backend before it imports this file
import torch
from torch import Tensor

import data
from harness import judging
from lib import processes
from lib.errors import InputError
from lib.nearest import nearest
from tools.groups import method_name

QUERIES = 10
NEIGHBOURS = 8
RIGHT, WRONG = "#009E73", "#D55E00"  # Okabe and Ito's green, and vermilion, which pages call orange
LONGEST_NAME = 20  # letters of a class's name that fit below a picture


@dataclass(frozen=True)
class Sheet:
    """What is drawn: m queries, and the k neighbours of each, one after the other."""

    title: str
    queries: data.Split
    neighbours: data.Split
    cosines: Tensor  # (m, k), falling
    classes: tuple[str, ...]
    view: dict

    @property
    def is_right(self) -> Tensor:
        """Whether neighbours are of the class of their query, (m, k)."""
        return self.neighbours.labels.view_as(self.cosines) == self.queries.labels[:, None]


def find_neighbours(ckpt: str, dataset: str | None, data_dir: str | None) -> Sheet:
    """Find the nearest training pictures of some queries. dataset, data_dir: None = as in training."""
    accelerator = processes.start()
    if accelerator.num_processes > 1:
        raise InputError(f"neighbours: {accelerator.num_processes} processes would do the same; launch one")
    judged = judging.open_judged(accelerator, ckpt, {"dataset": dataset, "data_dir": data_dir})
    bank, test = judged.images.train, judged.images.test
    queries = test.rows(draw_queries(test.labels, QUERIES))
    bank_features = judging.embedded(judged.encoder, bank.to(accelerator.device), judged.view, "train")
    query_features = judging.embedded(judged.encoder, queries.to(accelerator.device), judged.view, "queries")
    n = len(bank.labels)
    cosines, rows = (found.cpu() for found in nearest(query_features, [bank_features], n, NEIGHBOURS))
    m, k = cosines.shape
    name = Path(judged.dataset).resolve().name
    counts = f"{m} test pictures, each with its {k} nearest of {n:,} to train on"
    title = f"{method_name(judged.settings)}, on {name}: {counts}"
    return Sheet(title, queries, bank.rows(rows.flatten()), cosines, judged.images.classes, judged.view)


def draw_queries(labels: Tensor, n: int) -> Tensor:
    """Draw up to n rows of labels by a fixed seed: one of each class, then a second of each; return them by class."""
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    places = torch.empty_like(labels)  # of each image in its class, by that order
    for label in labels.unique():
        rows = order[labels[order] == label]
        places[rows] = torch.arange(len(rows))
    drawn = order[places[order].argsort(stable=True)[:n]]
    return drawn[labels[drawn].argsort(stable=True)]


def draw_sheet(sheet: Sheet):
    """Draw a row for each query: its picture, then its neighbours, framed by whether their class is the query's."""
    m, k = sheet.cosines.shape
    widths = [1, 0.2, *[1] * k]  # the second column is a gap
    size = (0.9 * sum(widths), 1.1 * m + 0.6)
    figure, axes = plt.subplots(m, len(widths), figsize=size, width_ratios=widths, squeeze=False)
    right = (
        f"{sheet.is_right.sum()} of {m * k} have the class of their query (green frame; orange: another, named below)"
    )
    figure.suptitle(f"{sheet.title}\nnumbers: cosine of the features; {right}", fontsize=9)
    query_pixels, pixels = pixels_of(sheet.queries, sheet.view), pixels_of(sheet.neighbours, sheet.view)
    for i, (query, gap, *others) in enumerate(axes):
        gap.set_axis_off()
        draw_picture(query, query_pixels[i], sheet.classes[sheet.queries.labels[i]][:LONGEST_NAME])
        for j, axis in enumerate(others):
            is_right = sheet.is_right[i, j]
            wrong_class = " " if is_right else sheet.classes[sheet.neighbours.labels[i * k + j]][:LONGEST_NAME]
            draw_picture(axis, pixels[i * k + j], f"{sheet.cosines[i, j]:.3f}\n{wrong_class}")
            axis.spines[:].set_visible(True)
            axis.spines[:].set(color=RIGHT if is_right else WRONG, linewidth=2.5)
    return figure


def draw_picture(axis, pixels: Tensor, caption: str) -> None:
    """Draw a picture (3, size, size) of values in [0, 1] without a frame, and its caption below."""
    axis.imshow(pixels.permute(1, 2, 0).numpy(), interpolation="nearest")
    axis.set(xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_xlabel(caption, fontsize=5.5, labelpad=3)


def pixels_of(split: data.Split, view: dict) -> Tensor:
    """Return the evaluation views of a split, (n, 3, size, size), as pixels in [0, 1]."""
    plain = view | {"mean": (0, 0, 0), "std": (1, 1, 1)}
    return torch.cat(list(data.evaluation_views(split, **plain)))
