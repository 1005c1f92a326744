"""The paper's figures and tables from run folders; nothing is run again for them.

    python -m tools.figures table runs/photos-*
    python -m tools.figures knn runs/photos-byol runs/photos-byol-seed1 runs/photos-amhe runs/photos-amhe-seed1
    python -m tools.figures circle runs/photos-simclr-out_dim2 runs/photos-byol-out_dim2
    python -m tools.figures views --dataset photos

circle: Figures 3 and 7. energy: Figure 4. dynamics: Figure 5. knn: Figure 6. batch: Figure 8. table: mean and sample
standard deviation over seeds. views: what a data set's augmentations look like. Runs that differ in their seed alone
make one line, with a band of one standard deviation. Each command prints the files that it wrote, PNG and SVG, or
Markdown and CSV.
"""

import csv
import io
import json
import math
import statistics
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Literal

import matplotlib
import torch
from torch import Tensor

import data
import models
from harness import cli
from harness.augment import two_views
from harness.run import Run, RunError, read
from pretrain import RECIPES

matplotlib.use("Agg")
import matplotlib.pyplot as plt

# Okabe and Ito's colours, told apart by the colour-blind, each with a dash of its own for black and white
STYLES = [
    *[("#000000", "-"), ("#D55E00", "--"), ("#0072B2", "-."), ("#009E73", ":")],
    *[("#CC79A7", (0, (5, 1))), ("#E69F00", (0, (1, 1))), ("#56B4E9", (0, (3, 1, 1, 1))), ("#999999", (0, (8, 3)))],
]
METHODS = {"byol": "BYOL", "simclr": "SimCLR"}
LOCAL = ("seed", "data_dir", "eval_every")  # settings that make no difference to what is compared


def figures(
    name: Literal["circle", "energy", "dynamics", "knn", "batch", "table", "views"],
    *runs: str,
    dataset: str | None = None,
    data_dir: str | None = None,
    out: str = "figures",
):
    """Draw a figure, or make a table, of run folders.

    Args:
        name: circle, energy, dynamics, knn, batch, table or views
        runs: folders that pretrain.py made
        dataset: of views, as in pretrain.py
        data_dir: of views and circle, as in pretrain.py; None = data, or as in training
        out: folder that the files are written to
    """
    if (name == "views") != bool(dataset) or (name == "views") == bool(runs):
        raise cli.UsageError(f"{name}: takes {'--dataset and no runs' if name == 'views' else 'run folders'}")
    if name == "views":
        return write(
            contact_sheet(data.load(dataset, data_dir or "data", pretraining=True, skip_broken=True)),
            Path(out, f"views-{Path(dataset).resolve().name}"),
        )
    if data_dir and name != "circle":
        raise cli.UsageError(f"--data_dir {data_dir}: has no effect on {name}")
    read_runs = [read(Path(run)) for run in runs]
    if len(sets := {run.settings["dataset"] for run in read_runs}) > 1 and name != "table":
        raise cli.UsageError(f"{name}: runs of different data sets in one figure: {', '.join(sorted(sets))}")
    if name == "table":
        return write_table(read_runs, Path(out))
    draw = {
        "circle": partial(circle, data_dir=data_dir),
        "energy": energy,
        "dynamics": dynamics,
        "knn": knn,
        "batch": batch,
    }
    return write(draw[name](read_runs), Path(out, name))


def groups(runs: list[Run], apart: tuple[str, ...] = ()) -> dict[str, list[Run]]:
    """Runs that differ in their seed alone, by the method and whatever tells them from others of the same method.

    Settings `apart` may differ, too. UsageError for two runs that agree in their seed as well.
    """
    idle, alike, methods = (*LOCAL, *apart), {}, {}
    for run in runs:
        compared = {k: x for k, x in run.settings.items() if k not in idle}
        compared["precision"] = run.rows[0].get("precision")
        alike.setdefault(json.dumps(compared, sort_keys=True), []).append(run)
    for same in alike.values():
        seeds = {}
        for run in same:
            own = tuple(run.settings[k] for k in ("seed", *apart))
            if own in seeds:
                raise cli.UsageError(f"{seeds[own].folder} and {run.folder} have the same settings and seed; name one")
            seeds[own] = run
        methods.setdefault(method(same[0].settings), []).append(same)
    named = {}
    for label, same in methods.items():
        settings = [{k: "+".join(v) if k == "reg_on" else v for k, v in group[0].settings.items()} for group in same]
        differ = [k for k in settings[0] if k not in idle and len({str(s.get(k)) for s in settings}) > 1]
        named |= {", ".join([label, *(f"{k} {s.get(k)}" for k in differ)]): group for s, group in zip(settings, same)}
    return named


def method(settings: dict) -> str:
    """BYOL, SimCLR, with the regularizer."""
    s = f"{settings['s']:g}"
    extra = {"none": "", "uniform": " + uniformity", "mhe": f"-MHE, s = {s}", "amhe": f"-aMHE, s = {s}"}
    return METHODS[settings["method"]] + extra[settings["reg"]]


def spread(values: list[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; that of one value is 0."""
    return statistics.fmean(values), statistics.stdev(values) if len(values) > 1 else 0.0


def lines(axis, runs: list[Run], key: str, of: str | None = None, per_epoch: bool = False) -> None:
    """One line a group of seeds on an axis, at the steps that all seeds have; UsageError where there is nothing."""
    drawn = False
    for (label, group), (colour, dash) in zip(groups(runs).items(), STYLES * 9):
        series = [run.series(key, of) for run in group]
        steps = sorted(set.intersection(*(set(x) for x in series)))
        if not steps:
            continue
        epochs = {r["step"]: r["epoch"] for r in group[0].rows if "step" in r}
        x = [epochs[step] if per_epoch else step for step in steps]
        mean, std = zip(*(spread([s[step] for s in series]) for step in steps))
        marker = "o" if len(steps) == 1 else None  # a line of one point is not seen
        axis.plot(x, mean, color=colour, linestyle=dash, marker=marker, label=label)
        low, high = ([m + sign * d for m, d in zip(mean, std)] for sign in (-1, 1))
        axis.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
        drawn = True
    if not drawn:
        raise cli.UsageError(f"no run has a row with {key}; pretrain.py writes it every --eval_every epochs")
    axis.set_xlabel("epoch" if per_epoch else "iteration")
    axis.spines[["top", "right"]].set_visible(False)


def energy(runs: list[Run]):
    """Figure 4: energy of the outputs of each residual block."""
    blocks = list(dict.fromkeys(key for run in runs for row in run.rows for key in row if key.startswith("block/")))
    if not blocks:
        raise cli.UsageError(
            "no run has energies of blocks; pretrain.py writes them every --eval_every epochs, of ResNets"
        )
    columns = 4 if len(blocks) > 3 else len(blocks)
    figure, axes = plt.subplots(
        -(-len(blocks) // columns), columns, figsize=(3 * columns, 2.4 * -(-len(blocks) // columns)), squeeze=False
    )
    for axis, block in zip(axes.flat, blocks):
        lines(axis, runs, block, "representations")
        axis.set_title(block.removeprefix("block/"), fontsize=9)
        axis.set_ylabel("energy, s = 0")
    for axis in list(axes.flat)[len(blocks) :]:
        axis.remove()
    named = axes[0, 0].get_legend_handles_labels()
    figure.legend(*named, loc="outside lower center", ncols=4, fontsize=8, frameon=False)  # on no panel's lines
    return figure


def dynamics(runs: list[Run]):
    """Figure 5: G2 of the representations, and the energy of the regularized layers."""
    kinds = {("chord" if run.settings["reg"] == "mhe" else "angle", run.settings["s"]) for run in runs}
    if len(kinds) > 1:
        each = " and ".join(sorted(f"by the {distance} at s = {s:g}" for distance, s in kinds))
        raise cli.UsageError(f"dynamics: energies {each} do not compare; draw these runs apart")
    figure, (left, right) = plt.subplots(1, 2, figsize=(8, 3))
    lines(left, runs, "g2", "representations")
    left.set_ylabel("G2 of the representations")
    lines(right, runs, "energy")
    ((distance, s),) = kinds
    right.set_ylabel(f"energy of the weights\n({distance}, s = {s:g})")
    left.legend(fontsize=7, frameon=False)
    return figure


def knn(runs: list[Run]):
    """Figure 6: k-NN accuracy against the epoch."""
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    lines(axis, runs, "top1", "online", per_epoch=True)
    axis.set_ylabel("k-NN top-1, k = 20 (%)")
    axis.legend(fontsize=7, frameon=False)
    return figure


def batch(runs: list[Run]):
    """Figure 8: loss of accuracy when micro-batches shrink, from the linear evaluation, else from k-NN."""
    stage = next((s for s in ("linear_eval", "knn_eval") if all(run.score(s) is not None for run in runs)), None)
    if stage is None:
        raise cli.UsageError("batch: not all runs have been judged; run linear_eval.py, or knn_eval.py, on each")
    curves = {}
    for label, group in groups(runs, apart=("accumulate",)).items():
        for run in group:
            size = run.settings["batch_size"] // run.settings["accumulate"]
            curves.setdefault(label, {}).setdefault(size, []).append(run.score(stage))
    if max(map(len, curves.values())) < 2:
        raise cli.UsageError("batch: takes runs that differ in --accumulate; these have one micro-batch size")
    figure, axis = plt.subplots(figsize=(4.5, 3.2))
    for (label, curve), (colour, dash) in zip(curves.items(), STYLES * 9):
        sizes = sorted(curve, reverse=True)
        base = statistics.fmean(curve[sizes[0]])
        mean, std = zip(*(spread([score - base for score in curve[size]]) for size in sizes))
        axis.errorbar(sizes, mean, std, color=colour, linestyle=dash, marker="o", markersize=3, capsize=2, label=label)
    axis.set_xscale("log", base=2)
    axis.invert_xaxis()
    axis.set_xlabel("images in a micro-batch")
    axis.set_ylabel(f"change of {'linear' if stage == 'linear_eval' else 'k-NN'} top-1 (points)")
    axis.spines[["top", "right"]].set_visible(False)
    axis.legend(fontsize=7, frameon=False)
    return figure


def circle(runs: list[Run], data_dir: str | None = None):
    """Figures 3 and 7: projections of the test set on the unit circle, the first run's untrained network in front."""
    for run in runs:
        if (n := run.settings["out_dim"]) != 2:
            raise cli.UsageError(f"{run.folder}: projects to {n} dimensions; a circle takes pretrain.py --out_dim 2")
    first = runs[0].settings
    images = data.load(first["dataset"], data_dir or first["data_dir"])
    torch.manual_seed(first["seed"])
    networks = {"untrained\n": (models.build(**first), runs[0].rows[0]["view"])}
    for run in runs:
        network, description = models.load_network(run.folder / "ckpt.safetensors")
        scores = {"linear": run.score("linear_eval"), "k-NN": run.score("knn_eval")}
        scores = [f"{judge} {top1:.1f} %" for judge, top1 in scores.items() if top1 is not None]
        bare = ", no BatchNorm" if run.settings["norm"] == "none" else ""
        networks[f"{method(run.settings)}{bare}\n{''.join(scores[:1])}"] = network, description["view"]
    classes = images.test.labels.unique()[:3].tolist()
    figure, axes = plt.subplots(2 + len(classes), len(networks), figsize=(2.2 * len(networks), 10), squeeze=False)
    for column, (title, (network, view)) in zip(axes.T, networks.items()):
        pair = torch.nn.Sequential(network.encoder, network.projector)
        z = torch.nn.functional.normalize(models.embed(pair, data.evaluation_views(images.test, **view)))
        column[0].set_title(title, fontsize=8)
        on_plane(column[0], z)
        theta = torch.linspace(-math.pi, math.pi, 361)
        column[1].fill_between(theta.numpy(), von_mises_fisher_kde(z, theta).numpy(), color="#0072B2", linewidth=0)
        column[1].set_xticks([-math.pi, 0, math.pi], ["-π", "0", "π"])
        column[1].set_ylim(bottom=0)
        column[1].spines[["top", "right"]].set_visible(False)
        for axis, c in zip(column[2:], classes):
            on_plane(axis, z[images.test.labels == c])
    for axis, label in zip(axes[:, 0], ("all classes", "density of the angle", *(images.classes[c] for c in classes))):
        axis.set_ylabel(label, fontsize=8)
    return figure


def on_plane(axis, z: Tensor) -> None:
    """The Gaussian KDE of points on the unit circle, dark where they are dense."""
    side = torch.linspace(-1.4, 1.4, 113)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1)
    axis.imshow(
        gaussian_kde(z, grid.reshape(-1, 2)).view(113, 113).numpy(),
        origin="lower",
        extent=(-1.4, 1.4) * 2,
        cmap="Blues",
    )
    axis.set_xticks([])
    axis.set_yticks([])


def gaussian_kde(z: Tensor, x: Tensor, width: float = 0.1) -> Tensor:
    """Density at points x (m, 2) of samples z (n, 2), by Gaussians of standard deviation `width`."""
    density = sum(torch.exp(-torch.cdist(x, some).square() / (2 * width**2)).sum(1) for some in z.split(1000))
    return density / (2 * math.pi * width**2 * len(z))


def von_mises_fisher_kde(z: Tensor, theta: Tensor, kappa: float = 100.0) -> Tensor:
    """Density at angles theta (m,) of samples z (n, 2) on the unit circle, by von-Mises-Fisher kernels."""
    cosine = torch.stack([theta.cos(), theta.sin()], 1) @ z.T
    scale = 2 * math.pi * torch.special.i0e(torch.tensor(kappa))  # i0e(x) = exp(-x) I_0(x)
    return torch.exp(kappa * (cosine - 1)).mean(1) / scale


def contact_sheet(images: data.Dataset, n: int = 8, pairs: int = 3):
    """Images of a data set, a row each: the whole central square, the evaluation view, and pairs of the two views."""
    some = images.train.rows(torch.linspace(0, len(images.train.labels) - 1, n).long())
    some = data.Split(some.images, torch.arange(len(some.labels)))  # labels that tell which image a view is of
    plain = {"size": images.size, "mean": (0, 0, 0), "std": (1, 1, 1)}
    columns = [torch.cat(list(data.evaluation_views(some, crop=crop, **plain))) for crop in (1.0, data.EVAL_CROP)]
    for epoch in range(pairs):
        ((crops, order, u),) = data.batches(some, len(order := some.labels), images.size, seed=0, epochs=[epoch])
        views = two_views(crops, u, plain["mean"], plain["std"], images.blur, images.solarise)
        columns += [view[order.argsort()] for view in views]
    titles = ["image", "evaluation", *["view 1", "view 2"] * pairs]
    figure, axes = plt.subplots(len(some.labels), len(columns), figsize=(len(columns), len(some.labels)), squeeze=False)
    for column, pictures, title in zip(axes.T, columns, titles):
        column[0].set_title(title, fontsize=7)
        for axis, picture in zip(column, pictures):
            axis.imshow(picture.clamp(0, 1).permute(1, 2, 0).numpy(), interpolation="nearest")
            axis.set_axis_off()
    return figure


def paper_rows() -> list[tuple[str, float, dict]]:
    """Rows of the paper's tables, in their order: name, top-1 of the linear evaluation (%), settings that make it."""
    both, every = ["projector", "predictor"], ["encoder", "projector", "predictor"]
    byol = dict(method="byol", norm="bn", reg="none", accumulate=1)
    uni = byol | dict(reg="uniform", weight=0.125)
    amhe = byol | dict(reg="amhe", s=2.0, weight=10.0, reg_on=both)
    mhe, simclr = amhe | dict(reg="mhe"), byol | dict(method="simclr")
    rows = []
    for table, recipe, scores in (("1", "imagenet-1000", (74.1, 74.4)), ("2", "imagenet-300", (71.9, 72.4))):
        where = dict(dataset="imagenet", recipe=recipe, model="resnet50")
        rows += [(f"{table}, BYOL*", scores[0], where | byol)]
        rows += [(f"{table}, BYOL-MHE", scores[1], where | amhe | dict(weight=1.0))]
    for name, dataset, scores in (
        ("CIFAR-10", "cifar10", (93.81, 94.46, 94.84, 94.78)),
        ("CIFAR-100", "cifar100", (70.98, 72.10, 72.62, 72.56)),
        ("STL-10", "stl10", (82.40, 82.81, 83.19, 83.96)),
    ):
        where = dict(dataset=dataset, recipe=f"{dataset}-1000", model="resnet50")
        methods = zip(("SimCLR*", "BYOL*", "BYOL + Uni", "BYOL-MHE"), scores, (simclr, byol, uni, amhe))
        rows += [(f"3, {name}, {label}", score, where | settings) for label, score, settings in methods]
    where = dict(dataset="cifar10", recipe="cifar10-300", model="resnet18")
    ablations = [
        ("4, neither", 28.76, byol | dict(norm="none")),
        ("4, BN", 90.74, byol),
        ("4, MHE", 45.72, amhe | dict(norm="none", reg_on=every)),
        ("4, BN and MHE", 91.22, amhe | dict(reg_on=every)),
        ("5, none", 90.74, byol),
        ("5, g and q", 91.64, amhe),
        ("5, g", 91.38, amhe | dict(reg_on=["projector"])),
        ("5, q", 91.10, amhe | dict(reg_on=["predictor"])),
        ("5, f", 90.96, amhe | dict(reg_on=["encoder"])),
        ("5, f, g and q", 91.22, amhe | dict(reg_on=every)),
    ]
    for weight, score in zip((0.001, 0.01, 1, 10, 100), (90.74, 91.12, 91.20, 91.34, 91.14)):
        ablations += [(f"C.6, {weight:g}", score, mhe | dict(weight=float(weight)))]
    ablations += [("C.7, BYOL", 90.74, byol)]
    for label, settings, scores in (("MHE", mhe, (91.12, 91.24, 91.34)), ("aMHE", amhe, (91.14, 90.94, 91.64))):
        ablations += [(f"C.7, {label}, s = {s}", x, settings | dict(s=float(s))) for s, x in enumerate(scores)]
    for label, settings, scores in (
        ("BYOL", byol, (90.74, 89.10, 87.50, 85.00)),
        ("BYOL + Uni", uni, (91.48, 90.22, 86.84, 82.42)),
        ("BYOL-MHE", amhe, (91.64, 90.02, 88.10, 85.76)),
    ):
        for n, score in zip((1, 2, 4, 8), scores):
            ablations += [(f"C.8, {label}, {1024 // n}", score, settings | dict(accumulate=n))]
    return rows + [(label, score, where | settings) for label, score, settings in ablations]


def table(runs: list[Run]) -> list[dict]:
    """A row for each group of seeds: mean, sample standard deviation and number of each column."""
    paper, rows = paper_rows(), []
    for label, group in groups(runs).items():
        s = group[0].settings
        at = [i for i, (_, _, settings) in enumerate(paper) if is_row(s, settings)]
        columns = {
            "k-NN": [run.score("knn_eval") for run in group],
            "linear": [run.score("linear_eval") for run in group],
        }
        for key in ("uniformity", "alignment", "energy", "images_per_s"):
            columns[key] = [list(run.series(key).values() or [None])[-1] for run in group]
        cells = {key: [x for x in column if x is not None] for key, column in columns.items()}
        row = {"run": label, "dataset": s["dataset"], "seeds": len(group), "order": min(at, default=len(paper))}
        for key, values in cells.items():
            mean, std = spread(values) if values else (None, None)
            row |= {key: mean, f"{key} std": std if len(values) > 1 else None, f"{key} n": len(values)}
        row["paper"] = "; ".join(f"{paper[i][1]:.2f} ({paper[i][0]})" for i in at)
        rows.append(row)
    rows.sort(key=lambda row: (row["order"], row["dataset"]))
    return [{key: x for key, x in row.items() if key != "order"} for row in rows]


def is_row(settings: dict, paper: dict) -> bool:
    """Whether a run's settings are those of a row of the paper, with the numbers of its recipe and data set."""
    facts = data.FACTS[paper["dataset"]]
    expected = {k: x for k, x in asdict(RECIPES[paper["recipe"]]).items() if k in settings and k not in LOCAL}
    expected |= {"holdout": False, "stem": facts["stem"], "blur_p": list(facts.get("blur", (0.0, 0.0)))} | paper
    return all(settings.get(k) == x for k, x in expected.items())


def write_table(runs: list[Run], folder: Path) -> None:
    """table.md and table.csv; prints the first to standard output, and the names of both."""
    rows = table(runs)
    columns = ("k-NN", "linear", "uniformity", "alignment", "energy", "images_per_s")
    digits = dict.fromkeys(("k-NN", "linear", "images_per_s"), 1) | dict(uniformity=2, alignment=2, energy=3)

    def cell(row: dict, key: str) -> str:
        if row[key] is None:
            return ""
        std, n = row[f"{key} std"], row[f"{key} n"]
        of = f" ({n})" if n != row["seeds"] else ""
        return f"{row[key]:.{digits[key]}f}" + (f" ± {std:.{digits[key]}f}" if std is not None else "") + of

    heads = ["run", "data set", "seeds", "k-NN (%)", "linear (%)", *columns[2:5], "images/s", "the paper's linear (%)"]
    lines = [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads)]
    for row in rows:
        cells = [
            row["run"],
            Path(row["dataset"]).name,
            str(row["seeds"]),
            *(cell(row, key) for key in columns),
            row["paper"],
        ]
        lines.append(f"| {' | '.join(cells)} |")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with models.whole(folder / "table.md") as file:
            file.write("".join(f"{line}\n" for line in lines).encode())
        with models.whole(folder / "table.csv") as file, io.StringIO() as text:
            writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
            file.write(text.getvalue().encode())
    except OSError as e:
        raise cli.UsageError(f"--out {folder}: cannot be written ({e.strerror})") from e
    print("\n".join(lines), folder / "table.md", folder / "table.csv", sep="\n")


def write(figure, stem: Path) -> None:
    """PNG and SVG of a figure; prints their names. UsageError if they cannot be written."""
    figure.set_layout_engine("constrained")
    try:
        stem.parent.mkdir(parents=True, exist_ok=True)
        for suffix in ("png", "svg"):
            with models.whole(Path(f"{stem}.{suffix}")) as file:
                figure.savefig(file, format=suffix, dpi=200)
            print(f"{stem}.{suffix}")
    except OSError as e:
        raise cli.UsageError(f"--out {stem.parent}: cannot be written ({e.strerror})") from e
    finally:
        plt.close(figure)


if __name__ == "__main__":
    cli.run(figures, data.DataError, models.ModelError, RunError)
