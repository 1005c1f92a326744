"""The paper's figures and tables from run folders; nothing is trained again for them.

    python -m tools.figures table runs/photos-*
    python -m tools.figures knn runs/photos-byol runs/photos-byol-seed1 runs/photos-amhe runs/photos-amhe-seed1
    python -m tools.figures circle runs/photos-simclr-out_dim2 runs/photos-byol-out_dim2
    python -m tools.figures views --dataset photos
    python -m tools.figures neighbours runs/photos-amhe

circle: Figures 3 and 7. energy: Figure 4. dynamics: Figure 5. knn: Figure 6. rank: effective rank of features, which
falls in a collapse. batch: Figure 8. table: mean and sample standard deviation over seeds. views: what augmentations
look like. neighbours: test pictures, each with its nearest training pictures. Runs that differ in their seed alone make
one line, with a band of one standard deviation.
Each command prints the files that it wrote, PNG and SVG, or Markdown and CSV.
"""

import math
import os
import statistics
import sys
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
from scipy.stats import norm, vonmises
from torch import Tensor, nn

import data
import models
from harness.checkpoint import build_described, load_network
from harness.judging import open_images
from harness.settings import name_of_weights
from lib import cli
from lib.errors import InputError
from lib.files import CKPT, write_whole
from lib.sources import has_no_data_dir
from tools.groups import Groups, by_data, groups, mean_and_std, wrapped
from tools.logs import RunLog, read_log
from tools.table import FLOORS, write_table

# Before the import, which refuses the backend that a notebook names for its children where that is not installed
os.environ["MPLBACKEND"] = "agg"
import matplotlib.pyplot as plt
from matplotlib.colors import to_rgb
from matplotlib.ticker import MaxNLocator

from tools.neighbours import draw_sheet, find_neighbours, pixels_of

plt.rcParams["font.size"] = 9  # points

# The colour of a method alone, and of any method with a regularizer, the same in every figure: Okabe and Ito's, and of
# Tol's those that the colour-blind tell from them
COLOURS = {"byol": "#000000", "simclr": "#E69F00", "simsiam": "#332288", "moco": "#999933", "barlow": "#AA4499"}
COLOURS |= {"mhe": "#0072B2", "amhe": "#D55E00", "uniform": "#009E73"}
COLOURS |= {"ortho": "#CC79A7", "koleo": "#56B4E9", "sigreg": "#882255"}
GREY = "#777777"  # of floors, and of a name without a colour
DASHES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)), (0, (8, 3)))  # for black and white
FEW_POINTS = 20  # of a line, which are marked
LABEL = 44  # letters of a line of the legend
DISTANCES = {"mhe": "chord"}  # of an energy, where it is not the angle
JUDGES = {"linear": "linear_eval", "k-NN": "knn_eval"}  # and their stages
EXTENT = 1.4  # densities on the plane are drawn on -1.4 ... 1.4 in both directions
GRID = torch.linspace(-EXTENT, EXTENT, 113)
ANGLES = torch.linspace(-math.pi, math.pi, 361)
WIDTH, KAPPA = 0.1, 100.0  # of the kernels: a standard deviation, and von Mises' concentration


def figures(
    name: Annotated[
        Literal["circle", "energy", "dynamics", "knn", "rank", "batch", "table", "views", "neighbours"],
        "what to draw or print",
    ],
    *runs: Annotated[str, "folders that pretrain.py made"],
    dataset: Annotated[str, "of views, neighbours and circle, as in pretrain.py"] | None = None,
    data_dir: Annotated[str, "of these, as in pretrain.py; None = data, or as in training"] | None = None,
    out: Annotated[str, "folder that the files are written to"] = "figures",
):
    """Draw a figure, or make a table, of run folders."""
    refuse_idle_arguments(name, runs, dataset, data_dir)
    if name == "views":
        images = data.load(dataset, data_dir or "data", pretraining=dataset not in data.FACTS)
        save_figure(contact_sheet(images), Path(out, f"views-{Path(dataset).resolve().name}"))
        return
    if name == "neighbours":
        sheet = find_neighbours(runs[0], dataset, data_dir)
        save_figure(draw_sheet(sheet), Path(out, f"neighbours-{name_of_weights(runs[0])}"))
        return
    logs = [read_log(Path(run)) for run in runs]
    if name == "table":
        write_table(logs, Path(out))
        return
    datasets = by_data(logs)
    if len(datasets) > 1:
        raise InputError(f"{name}: runs of different data sets in one figure: {', '.join(sorted(datasets))}")
    draw = {"energy": energy, "dynamics": dynamics, "knn": knn, "rank": rank, "batch": batch}
    figure = circle(logs, dataset, data_dir) if name == "circle" else draw[name](logs)
    save_figure(figure, Path(out, name))


def refuse_idle_arguments(name: str, runs: tuple[str, ...], dataset: str | None, data_dir: str | None) -> None:
    """Raise InputError for arguments that a figure does not take, and for those that it lacks."""
    rules = {
        "views": ("--dataset and no runs", dataset and not runs),
        "neighbours": ("one run folder, or a checkpoint in it", len(runs) == 1),
    }
    takes, is_right = rules.get(name, ("run folders", runs))
    if not is_right:
        raise InputError(f"{name}: takes {takes}")
    has_pictures = name in ("circle", "views", "neighbours")
    if dataset and not has_pictures:
        raise InputError(f"--dataset {dataset}: has no effect on {name}")
    takes_place = has_pictures and not (dataset and has_no_data_dir(dataset))
    if data_dir and not takes_place:
        raise InputError(f"--data_dir {data_dir}: has no effect on {name} {dataset or ''}".rstrip())


def save_figure(figure, stem: Path) -> None:
    """Write PNG and SVG of a figure, and print their names. InputError if they cannot be written."""
    figure.set_layout_engine("constrained")
    for suffix in ("png", "svg"):
        path = Path(f"{stem}.{suffix}")
        with write_whole(path) as file:
            figure.savefig(file, format=suffix, dpi=160)
        print(path)
    plt.close(figure)


def styled(found: Groups) -> list[tuple[str, list[RunLog], dict]]:
    """Return label, runs and style of each line: its colour, paler for each further line of that, and a dash."""
    lines = []
    names = []
    for i, (label, group) in enumerate(found.items()):
        settings = group[0].settings
        name = settings["method"] if settings["reg"] == "none" else settings["reg"]
        strength = max(0.3, 0.65 ** names.count(name))
        names.append(name)
        colour = 1 - strength * (1 - np.array(to_rgb(COLOURS.get(name, GREY))))
        style = {"color": tuple(colour), "linestyle": DASHES[i % len(DASHES)]}
        lines.append(("\n".join(wrapped(label, LABEL)), group, style))
    return lines


def curves(runs: list[RunLog], panels: list[tuple[str, str | None, str]], per_epoch: bool = False):
    """Draw a panel for each column of the logs: its name, the kind of row it stands in, and what it is."""
    columns = min(4, len(panels))
    rows = math.ceil(len(panels) / columns)
    lines = styled(groups(runs))
    size = (max(4.5, 3 * columns), 2.6 * rows + 0.6 + 0.15 * sum(label.count("\n") + 1 for label, _, _ in lines))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for axis, panel in zip(axes.flat, panels):
        draw_lines(axis, lines, *panel, per_epoch)
    for axis in axes.flat[len(panels) :]:
        axis.remove()
    explain(figure, runs, {len(group) for _, group, _ in lines}, "band")
    return figure


def explain(figure, runs: list[RunLog], seeds: set[int], spread: str) -> None:
    """Say above the panels what the runs share, and below, where it covers no lines, what a line is and averages."""
    handles = {}
    for axis in figure.axes:
        drawn, labels = axis.get_legend_handles_labels()
        handles = dict(zip(labels, drawn)) | handles
    averaged = f"mean of {' or '.join(map(str, sorted(seeds)))} seeds, {spread}: ± one standard deviation"
    title = "one seed a line" if seeds == {1} else averaged
    longest = max(len(line) for label in handles for line in label.splitlines())
    columns = max(1, int(figure.get_figwidth() / (0.065 * longest + 0.6)))  # inches of a letter, and of a handle
    style = {"loc": "outside lower center", "fontsize": 8, "title_fontsize": 8, "frameon": False, "handlelength": 3}
    figure.legend(handles.values(), handles, title=title, ncols=min(columns, len(handles)), **style)
    networks = {run.settings["model"] for run in runs}
    shared = [*by_data(runs), *(networks if len(networks) == 1 else ())]
    figure.suptitle(", ".join(shared), fontsize=9)


def draw_lines(axis, lines: list, key: str, of: str | None, name: str, per_epoch: bool) -> None:
    """Draw one line a group of seeds, at the steps that all its seeds have. InputError where some or all have none."""
    for label, group, style in lines:
        series = [run.series(key, of) for run in group]
        if any(series) and not all(series):
            raise InputError(f"{group[series.index({})].folder}: has no row with {key}; leave it out")
        steps = sorted(set.intersection(*(set(values) for values in series)))
        if not steps:
            print(f"{label}: has no row with {key}, so no line", file=sys.stderr)
            continue
        epoch_of = {row["step"]: row["epoch"] for row in group[0].rows if "step" in row}
        x = [epoch_of[step] for step in steps] if per_epoch else steps
        mean, std = np.array([mean_and_std([values[step] for values in series]) for step in steps]).T
        marker = "o" if len(steps) <= FEW_POINTS else None  # a line of one point would be invisible
        axis.plot(x, mean, marker=marker, markersize=3, label=label, **style)
        if len(group) > 1:
            axis.fill_between(x, mean - std, mean + std, color=style["color"], alpha=0.15, linewidth=0)
    if not axis.lines:
        raise InputError(f"no run has a row with {key}; pretrain.py writes it every --eval_every epochs")
    axis.set(xlabel="epoch" if per_epoch else "iteration", ylabel=name)
    axis.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10], integer=True))
    axis.spines[["top", "right"]].set_visible(False)


def energy(runs: list[RunLog]):
    """Draw Figure 4: energy of the outputs of each residual block."""
    keys = {key: None for run in runs for row in run.rows for key in row}  # each once, in their order
    blocks = [key for key in keys if key.startswith("block/")]
    if not blocks:
        raise InputError("no run has energies of blocks; pretrain.py writes them every --eval_every epochs, of ResNets")
    name = "energy of the features\n(chord, s = 0), "
    return curves(runs, [(block, "representations", name + block.removeprefix("block/")) for block in blocks])


def dynamics(runs: list[RunLog]):
    """Draw Figure 5: G2 of the representations, and the energy of the regularized layers."""
    kinds = sorted({kind_of_energy(run) for run in runs if run.series("energy")})
    if len(kinds) > 1:
        raise InputError(f"dynamics: energies ({') and ('.join(kinds)}) do not compare; draw these runs apart")
    g2 = "G2 of the features: mean of\nexp(-2 d²) over pairs of images"
    weights = "\n".join(wrapped(f"energy of the weights: {''.join(kinds)}", 36))
    return curves(runs, [("g2", "representations", g2), ("energy", None, weights)])


def kind_of_energy(run: RunLog) -> str:
    """Say what the energies of a log are of; those of one kind compare."""
    layers = {key.removeprefix("energy/") for row in run.rows for key in row if key.startswith("energy/")}
    parts = sorted({layer.partition(".")[0] for layer in layers})
    distance = DISTANCES.get(run.settings["reg"], "angle")
    return f"{distance}, s = {run.settings['s']:g}, sum over {len(layers)} layers, {' and '.join(parts)}"


def knn(runs: list[RunLog]):
    """Draw Figure 6: k-NN accuracy against the epoch, above its floors."""
    figure = curves(runs, [("top1", "online", "k-NN top-1, k = 20 (%)")], per_epoch=True)
    draw_floors(figure.axes[0], runs)
    return figure


def draw_floors(axis, runs: list[RunLog]) -> None:
    """Draw the floors, means over seeds, as dashed lines; those of several networks with the names of these."""
    for of, name in FLOORS.items():
        networks = {}
        for run in runs:
            network = "" if of == "pixels" else " ".join(run.settings[key] for key in ("model", "stem", "norm"))
            network += f" {run.settings['init']}" if of == "init" else ""
            score = run.score("knn_eval", of)
            if score is not None:
                networks.setdefault(network, {})[run.settings["seed"]] = score
        for network, scores in networks.items():
            floor = statistics.fmean(scores.values())
            text = f"{name} {floor:.1f}" if len(networks) == 1 else f"{name} {network} {floor:.1f}"
            axis.axhline(floor, color=GREY, linestyle=(0, (6, 3)), linewidth=1, zorder=0)
            place = {"xycoords": axis.get_yaxis_transform(), "xytext": (0, 2), "textcoords": "offset points"}
            axis.annotate(text, (1, floor), color=GREY, fontsize=8, ha="right", **place)


def rank(runs: list[RunLog]):
    """Draw the effective rank of the features (RankMe, Garrido et al., 2023) against the iteration."""
    figure = curves(runs, [("rank", "representations", "effective rank of the features")])
    figure.axes[0].set_yscale("log", base=2)
    figure.axes[0].yaxis.set_major_formatter("{x:g}")
    return figure


def batch(runs: list[RunLog]):
    """Draw Figure 8: loss of accuracy when micro-batches shrink, by the linear evaluation if all have it, else k-NN."""
    judges = [judge for judge, stage in JUDGES.items() if all(run.score(stage) is not None for run in runs)]
    if not judges:
        raise InputError("batch: not all runs have been judged; run linear_eval.py, or knn_eval.py, on each")
    figure, axis = plt.subplots(figsize=(4.5, 3.6))
    all_sizes, seeds = set(), set()
    for label, group, style in styled(groups(runs, apart=("accumulate",))):
        curve = {}
        for run in group:
            size = run.settings["batch_size"] // run.settings["accumulate"]
            curve.setdefault(size, []).append(run.score(JUDGES[judges[0]]))
        sizes = sorted(curve, reverse=True)
        all_sizes |= curve.keys()
        seeds |= {len(scores) for scores in curve.values()}
        whole = statistics.fmean(curve[sizes[0]])
        points = [mean_and_std([score - whole for score in curve[size]]) for size in sizes]
        mean, std = zip(*points)
        bars = std if any(std) else None
        axis.errorbar(sizes, mean, bars, label=label, marker="o", markersize=3, capsize=2, **style)
    if len(all_sizes) < 2:
        raise InputError("batch: takes runs that differ in --accumulate; these have one micro-batch size")
    axis.set_xscale("log", base=2)
    axis.set_xticks(sorted(all_sizes), map(str, sorted(all_sizes)))
    axis.invert_xaxis()
    axis.set_xlabel("images in a micro-batch")
    axis.set_ylabel(f"change of {judges[0]} top-1 against\nthe largest (percentage points)")
    axis.spines[["top", "right"]].set_visible(False)
    explain(figure, runs, seeds, "bar")
    return figure


def circle(runs: list[RunLog], dataset: str | None = None, data_dir: str | None = None):
    """Draw Figures 3 and 7: projections of the test set on the circle, the first run's untrained network in front."""
    labels = {run.folder: label for label, group in groups(runs).items() for run in group}
    columns = []
    for run in runs:
        out_dim = run.settings["out_dim"]
        if out_dim != 2:
            raise InputError(f"{run.folder}: projects to {out_dim} dimensions; a circle takes pretrain.py --out_dim 2")
        network, description = load_network(run.folder / CKPT)
        columns.append((score_title(labels[run.folder], run), network, description["view"]))
    images = open_images(description, dataset, data_dir, skip_broken=False)
    settings = runs[0].settings
    torch.manual_seed(settings["seed"])
    columns.insert(0, ("untrained", build_described("checkpoint", settings), columns[0][2]))
    classes = images.test.labels.unique()[:3].tolist()
    rows = ["all classes", "density of the angle (1/radian)", *(images.classes[label] for label in classes)]
    figure, axes = plt.subplots(len(rows), len(columns), figsize=(2.2 * len(columns), 10))
    for axis, label in zip(axes[:, 0], rows):
        axis.set_ylabel(label, fontsize=8)
    for (everything, density, *by_class), (title, network, view) in zip(axes.T, columns):
        pair = nn.Sequential(network.encoder, network.projector)
        z = nn.functional.normalize(models.embed(pair, data.evaluation_views(images.test, **view)))
        everything.set_title(title, fontsize=8)
        draw_plane(everything, z)
        density.fill_between(ANGLES.numpy(), angle_density(z), color="#0072B2", linewidth=0)
        density.set_xticks([-math.pi, 0, math.pi], ["-π", "0", "π"])
        density.spines[["top", "right"]].set_visible(False)
        for axis, label in zip(by_class, classes):
            draw_plane(axis, z[images.test.labels == label])
    highest = max(axis.get_ylim()[1] for axis in axes[1])
    for axis in axes[1]:
        axis.set_ylim(0, highest)
    figure.suptitle("projections of test pictures on the unit circle, dark where they are dense", fontsize=9)
    return figure


def score_title(label: str, run: RunLog) -> str:
    """Name a run, above its score, linear where there is one."""
    for judge, stage in JUDGES.items():
        top1 = run.score(stage)
        if top1 is not None:
            label += f", {judge} {top1:.1f} %"
            break
    return "\n".join(wrapped(label, 30))


def draw_plane(axis, z: Tensor) -> None:
    """Draw the density of points on the unit circle, dark where they are dense."""
    extent = (-EXTENT, EXTENT, -EXTENT, EXTENT)
    axis.imshow(plane_density(z), origin="lower", extent=extent, cmap="Blues")
    axis.set(xticks=[], yticks=[])


def plane_density(z: Tensor) -> np.ndarray:
    """Estimate the density of samples z (n, 2) on the grid of all y and x of GRID, by Gaussians."""
    along_x, along_y = (norm.pdf(GRID, z[:, i : i + 1], WIDTH) for i in range(2))
    return along_y.T @ along_x / len(z)


def angle_density(z: Tensor) -> np.ndarray:
    """Estimate the density at ANGLES of samples z (n, 2) on the unit circle, by von Mises' kernels."""
    angles = torch.atan2(z[:, 1], z[:, 0])
    return vonmises.pdf(ANGLES, KAPPA, angles[:, None]).mean(0)


def contact_sheet(images: data.Dataset, n: int = 8, pairs: int = 3):
    """Draw images of a data set, a row each: the central square, the evaluation view, and pairs of the two views."""
    rows = torch.linspace(0, len(images.train.labels) - 1, n).long()
    sample = data.Split(images.train.rows(rows).images, torch.arange(n))  # labels that tell which image a view is of
    plain = {"mean": (0, 0, 0), "std": (1, 1, 1)}
    columns = []
    for crop in (1.0, data.EVAL_CROP):
        columns.append(pixels_of(sample, images.view(crop)))
    for crops, order, u in data.batches(sample, images.size, n, seed=0, steps=range(pairs)):
        views = data.two_views(crops, u, **plain, blur_p=images.blur_p, solarise_p=images.solarise_p)
        columns += [view[order.argsort()] for view in views]
    titles = ["image", "evaluation", *["view 1", "view 2"] * pairs]
    figure, axes = plt.subplots(n, len(columns), figsize=(len(columns), n + 0.4), squeeze=False)
    figure.suptitle(f"training pictures: whole, as they are judged, and {pairs} pairs of the views of pre-training")
    for column, pictures, title in zip(axes.T, columns, titles):
        column[0].set_title(title, fontsize=7)
        for axis, picture in zip(column, pictures):
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
    return figure


if __name__ == "__main__":
    cli.run(figures)
