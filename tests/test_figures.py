"""Figures and tables from run folders: the numbers under them, and what happens to folders that hold no run."""

import csv
import dataclasses
import json
import math
import os
import shutil
import subprocess
import sys

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from conftest import ROOT
from matplotlib.colors import to_hex
from torch import nn

import data
import models
from harness.checkpoint import load_encoder
from pretrain import RECIPES, pretrain
from tools.figures import ANGLES, GRID, angle_density, batch, dynamics, figures, knn, plane_density, rank
from tools.groups import by_data, groups
from tools.logs import read_log as read
from tools.neighbours import RIGHT, WRONG, draw_queries, draw_sheet, find_neighbours
from tools.paper import is_row, paper_rows
from tools.table import table, table_lines

SETTINGS = {"dataset": "photos", "data_dir": "data", "method": "byol", "norm": "bn", "reg": "none", "s": 2.0}
SETTINGS |= {"weight": 0.0, "reg_on": ["projector", "predictor"], "batch_size": 64, "accumulate": 1, "out_dim": 256}
SETTINGS |= {"eval_crop": 0.875, "epochs": 2, "model": "resnet18", "stem": "cifar"}


def write_run(folder, seed=0, scores=(60.0, 70.0), linear=None, images=None, **changes):
    """A log as pretrain.py and its judges write it."""
    folder.mkdir()
    settings = {**SETTINGS, "seed": seed, **changes}
    rows = [{"stage": "pretrain", "settings": settings, "data": images or {"classes": [settings["dataset"]]}}]
    floors = {"untrained": 30.0 + seed, "pixels": 20.0}
    for of, top1 in floors.items():
        rows.append({"stage": "pretrain", "step": 0, "epoch": 0, "of": of, "split": "test", "k": 20, "top1": top1})
    for epoch, top1 in enumerate(scores, 1):
        where = {"stage": "pretrain", "epoch": epoch, "step": 10 * epoch}
        means = {"loss": 1.0, "uniformity": -2.0 - seed, "alignment": 0.5, "energy": 1.6 / epoch, "images_per_s": 100.0}
        means |= {f"energy/{part}.out": 0.8 / epoch for part in settings["reg_on"]}
        rows += [{**where, **means}, {**where, "of": "online", "split": "test", "k": 20, "top1": top1}]
        measured = {"g2": 0.1, "rank": 10.0 * epoch + seed, "uniformity_share": 0.5 + seed / 10}
        rows += [{**where, "of": "representations", **measured, "block/layer1.0": 0.9, "block/layer1.1": 0.8}]
    where = {"split": "test", "net": "online", "dataset": rows[0]["settings"]["dataset"], "eval_crop": 0.875}
    judged = {"stage": "knn_eval", "of": "trained", "temperature": 0.07, **where}
    rows += [{**judged, "k": 10, "top1": 1.0}, {**judged, "k": 20, "top1": scores[-1]}]
    rows += [{"stage": "linear_eval", "sweep": 0.1, "top1": 2.0, "split": "holdout"}]
    rows += [{**judged, "k": 20, "top1": 3.0, "net": "target"}, {**judged, "k": 20, "top1": 4.0, "dataset": "another"}]
    rows += [{"stage": "linear_eval", "features": "cached", "top1": 5.0, **where}]
    probe = {"stage": "linear_eval", "features": "augmented", "top1": linear, **where}
    probe |= {"epochs": 80, "weight_decay": 0.0, "lr": 0.2, "swept": False}
    variants = [{**probe, "epochs": 1, "top1": 6.0}, {**probe, "lr": 5.0, "top1": 7.0}]
    variants += [{**probe, "batch_size": 1000, "train": 1800, "top1": 8.0}]
    cached = [{**probe, "features": "cached", "top1": linear - 1}] if linear else []
    rows += [probe, *variants, *cached] if linear is not None else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def test_a_run_that_is_under_way_has_no_part_in_the_table(tmp_path):
    finished = read(write_run(tmp_path / "finished", 0, [50, 60]))
    early = read(write_run(tmp_path / "early", 1, [50]))
    (row,) = table([finished, early])
    assert (row["uniformity"], row["uniformity n"], row["seeds"]) == (-2, 1, 2)


def test_seeds_on_one_set_are_one_setting_wherever_it_lies(tmp_path):
    """pics, its absolute path and a copy elsewhere; not another set that took its place."""
    for seed, place in enumerate(["pics", str(tmp_path / "pics"), "/scratch/17/data", "pics"]):
        images = {"classes": ["cat", "dog"], "train": 8, "test": 4 + seed // 3}
        write_run(tmp_path / f"run{seed}", seed, images=images, dataset=place)
    found = by_data([read(tmp_path / f"run{seed}") for seed in range(4)])
    assert {name: len(group) for name, group in found.items()} == {"pics": 3, f"pics, as in {tmp_path / 'run3'}": 1}
    (rows, others) = (rows for rows in table([read(tmp_path / f"run{seed}") for seed in range(4)]))
    assert (rows["seeds"], others["seeds"]) == (3, 1)


def test_a_label_says_every_setting_that_differs_and_acts(tmp_path):
    """Not those that the method's name says, that have no effect on it, or that only runs with another term lack."""
    tiny = {"model": "test_resnet", "epochs": 1}
    runs = [{}, {"seed": 1}, {"reg": "amhe", "weight": 10.0}, {"reg": "mhe", "weight": 1.0, "tau": 0.9}, tiny]
    runs += [{"method": "simclr", "out_dim": 2, "tau": 0.9, "reg_on": ["projector"]}]
    for i, changes in enumerate(runs):
        write_run(tmp_path / f"run{i}", **({"tau": 0.99} | changes))
    found = groups([read(tmp_path / f"run{i}") for i in range(6)])
    assert {label: len(group) for label, group in found.items()} == {
        "BYOL, out_dim 256, epochs 2, model resnet18, tau 0.99": 2,
        "BYOL-aMHE, s = 2, weight 10.0, out_dim 256, epochs 2, model resnet18, tau 0.99": 1,
        "BYOL-MHE, s = 2, weight 1.0, out_dim 256, epochs 2, model resnet18, tau 0.9": 1,
        "BYOL, out_dim 256, epochs 1, model test_resnet, tau 0.99": 1,
        "SimCLR, out_dim 2, epochs 2, model resnet18": 1,
    }


def test_weights_have_the_name_of_their_run_or_file(tmp_path):
    """And of two of one name, the second has the folder of its run."""
    inits = ["a/timm.pth", "runs/i1/encoder/model.safetensors", None, "b/timm.pth"]
    for i, init in enumerate(inits):
        write_run(tmp_path / f"run{i}", init=init, init_digest=init and f"d{i}")
    found = list(groups([read(tmp_path / f"run{i}") for i in range(4)]))
    names = ["BYOL, init timm", "BYOL, init i1", "BYOL, init None"]
    assert found == [*names, f"BYOL, init timm, as {tmp_path / 'run3'}"]


def test_densities_are_sums_of_kernels():
    """On the plane of Gaussians, on the circle of von Mises' kernels."""
    angles = torch.tensor([0.3, -2.0, 3.1], dtype=torch.float64)
    z = torch.stack([angles.cos(), angles.sin()], 1)
    kernels = torch.exp(100 * (torch.cos(ANGLES - angles[:, None]) - 1)) / (2 * math.pi * scipy.special.i0e(100))
    np.testing.assert_allclose(angle_density(z), kernels.mean(0), rtol=1e-3, atol=1e-5)
    density = plane_density(z)
    for row, column in ((80, 90), (20, 30)):
        point = [GRID[column], GRID[row]]  # x, y
        theirs = np.mean([scipy.stats.multivariate_normal.pdf(point, c, 0.01) for c in z.numpy()])
        assert density[row, column] == pytest.approx(theirs, rel=1e-4, abs=1e-9)


@pytest.mark.parametrize("kind, change", [("loss", {"uniformity": -4.0}), ("g2", {"g2": 1.0})])
def test_the_table_calls_a_dead_network_dead(tmp_path, kind, change):
    """By its projections or its features; accuracies stay."""
    write_run(tmp_path / "alive")
    run = write_run(tmp_path / "dead", seed=1)
    rows = [row | change | {"dead": True} if kind in row else row for row in read(run).rows]
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = table([read(tmp_path / "alive"), read(run)])
    assert table_lines([row])[4].startswith("| BYOL (1 of 2 dead) | 2     | 70.0 ± 0.0 |")
    assert (row["uniformity"], row["alignment"], row["alignment n"]) == (-2, 0.5, 1)
    (row,) = table([read(run)])
    assert table_lines([row])[4].startswith("| BYOL (dead) | 1     | 70.0     |")
    assert row["uniformity"] is row["alignment"] is None and row["energy"] == 0.8


def test_table_is_numpys_mean_and_sample_standard_deviation(shell, tmp_path):
    scores = [(50, 61.0), (50, 64.5), (50, 63.2)]
    for seed, pair in enumerate(scores):
        write_run(tmp_path / f"byol{seed}", seed, pair, linear=80.0 + seed if seed else None)
    amhe = dataclasses.asdict(RECIPES["cifar10-300"]) | dict(recipe="cifar10-300", dataset="cifar10", model="resnet18")
    amhe |= dict(stem="cifar", blur_p=[0.0, 0.0], holdout=False, reg="amhe", weight=10.0)
    write_run(tmp_path / "amhe", **amhe)
    code, lines, _ = shell(figures, "table", "byol0", "byol1", "byol2", "amhe")
    assert code == 0 and lines[-2:] == ["figures/table.md", "figures/table.csv"]
    assert lines[:-2] == (tmp_path / "figures" / "table.md").read_text().splitlines()
    with open(tmp_path / "figures" / "table.csv") as file:
        regularized, plain = csv.DictReader(file)  # the paper's rows come first, in its order
    last = [top1 for _, top1 in scores]
    assert float(plain["k-NN"]) == pytest.approx(np.mean(last)) and plain["seeds"] == plain["k-NN n"] == "3"
    assert float(plain["k-NN std"]) == pytest.approx(np.std(last, ddof=1))
    assert (float(plain["rank"]), float(plain["uniformity_share"])) == (21, pytest.approx(0.6))  # of the last epoch
    assert float(plain["linear"]) == 81.5 and plain["linear n"] == "2" and plain["paper"] == ""
    assert regularized["paper's rows"] == "5, g and q; C.7, aMHE, s = 2; C.8, BYOL-MHE, 1024"
    assert regularized["paper"] == "91.64" and regularized["k-NN std"] == ""
    assert "| BYOL | 3     | 62.9 ± 1.8 | 81.5 ± 0.7 (2) | 80.5 ± 0.7 (2) | 31.0 ± 1.0 | 20.0 ± 0.0 |" in lines


def test_the_table_fits_a_terminal(tmp_path, monkeypatch):
    """A long name goes on below, between two settings where they fit; all of it is there, also beside many numbers."""
    for reg_on in (["projector"], ["encoder", "projector", "predictor"]):
        write_run(tmp_path / str(len(reg_on)), reg="amhe", reg_on=reg_on, out_dim=len(reg_on), linear=70.0)
    rows = table([read(tmp_path / "1"), read(tmp_path / "3")])
    assert max(map(len, table_lines(rows))) <= 100
    for width in (100, 60):
        monkeypatch.setattr("tools.table.WIDTH", width)
        names = "".join(line.split("|")[1].replace(" ", "") for line in table_lines(rows) if line.startswith("| "))
        assert "BYOL-aMHE,s=2,reg_onencoder+projector+predictor,out_dim3" in names


@pytest.fixture
def several(tmp_path):
    """Two seeds of one method, a run of a single point, and smaller micro-batches, in part without a number."""
    for seed in (0, 1):
        write_run(tmp_path / f"byol{seed}", seed, (50.0, 60.0 + seed))
    write_run(tmp_path / "amhe", reg="amhe", scores=(55.0,))
    write_run(tmp_path / "small", accumulate=4, scores=(40.0, math.nan, 45.0))
    return ["byol0", "byol1", "amhe", "small"]


@pytest.mark.parametrize("name", ["energy", "dynamics", "knn", "rank", "batch"])
def test_curves_are_drawn(shell, tmp_path, several, name):
    code, lines, err = shell(figures, name, *several, "--out", "drawn")
    assert (code, err) == (0, "") and lines == [f"drawn/{name}.png", f"drawn/{name}.svg"]
    assert "BYOL-aMHE, s = 2" in (tmp_path / lines[1]).read_text()


def test_curves_hold_the_numbers_of_the_logs(tmp_path, several):
    runs = [read(tmp_path / name) for name in several]
    (axis,) = knn(runs).axes
    lines = [line for line in axis.lines if not line.get_label().startswith("_")]
    assert {line.get_label(): line.get_xydata().tolist() for line in lines} == {
        "BYOL, accumulate 1": [[1, 50], [2, 60.5]],
        "BYOL, accumulate 4": [[1, 40], [3, 45]],
        "BYOL-aMHE, s = 2, accumulate 1": [[1, 55]],
    }
    assert len(axis.collections) == 1  # a band for the one line of two seeds
    assert [text.get_text() for text in axis.texts] == ["untrained 30.5", "raw pixels 20.0"]
    colours = {line.get_label(): to_hex(line.get_color()) for line in lines}
    (axis,) = knn(runs[2:]).axes  # fewer runs, in which the others keep their colours
    assert (
        to_hex(axis.lines[0].get_color()) == colours["BYOL-aMHE, s = 2, accumulate 1"] != colours["BYOL, accumulate 1"]
    )
    (axis,) = rank(runs[:1]).axes
    assert axis.lines[0].get_xydata().tolist() == [[10, 10], [20, 20]]
    _, right = dynamics(runs).axes
    assert right.lines[0].get_xydata().tolist() == [[10, 1.6], [20, 0.8]]
    (axis,) = batch(runs).axes
    (byol, _, bars), (amhe, _, no_bars) = axis.containers
    assert bars and not no_bars and [tick.get_text() for tick in axis.get_xticklabels()] == ["16", "64"]
    assert byol.get_xydata().tolist() == [[64, 0], [16, 45 - 60.5]] and amhe.get_xydata().tolist() == [[64, 0]]


def test_circle_from_real_runs(command, shell, folder):
    flags = "--model test_resnet --hidden_dim 32 --out_dim 2 --batch_size 16 --epochs 1".split()
    for out, method in (("simclr", ["--method", "simclr"]), ("byol", ["--norm", "none"])):
        assert command(pretrain, "--dataset", folder, *flags, *method, "--out", out)[0] == 0
    moved = shutil.copytree(folder, "moved")
    for words in (["simclr", "byol"], ["byol", "--dataset", moved]):
        code, lines, err = shell(figures, "circle", *words)
        assert code == 0 and lines == ["figures/circle.png", "figures/circle.svg"], err


def test_views_of_a_data_set(shell, folder):
    code, lines, err = shell(figures, "views", "--dataset", folder)
    assert code == 0 and lines == [f"figures/views-{folder.name}.{x}" for x in ("png", "svg")], err


def test_neighbours_are_the_nearest_training_pictures_framed_by_their_class(trained, folder, monkeypatch):
    """Of each query the cosines, in falling order, and the colours of the frames."""
    monkeypatch.setattr("tools.neighbours.QUERIES", 4)
    encoder, _ = load_encoder(trained / "ckpt.safetensors")
    images = data.load(str(folder))
    sheet = find_neighbours(str(trained / "ckpt.safetensors"), None, None)
    assert sheet.cosines.shape == (4, 8) and sorted(sheet.queries.labels.bincount().tolist()) == [1, 1, 2]
    query, found, bank = (
        nn.functional.normalize(models.embed(encoder, data.evaluation_views(split, **images.view(data.EVAL_CROP))))
        for split in (sheet.queries, sheet.neighbours, images.train)
    )
    torch.testing.assert_close(torch.einsum("md,mkd->mk", query, found.view(4, 8, -1)), sheet.cosines)
    torch.testing.assert_close((query @ bank.T).topk(8).values, sheet.cosines)
    figure, right = draw_sheet(sheet), int(sheet.is_right.sum())
    assert f"{right} of 32 have the class of their query" in figure.get_suptitle()
    frames = [axis.spines["left"] for axis in figure.axes if axis.images]
    colours = [to_hex(frame.get_edgecolor()).upper() for frame in frames if frame.get_visible()]
    assert (colours.count(RIGHT), colours.count(WRONG)) == (right, 32 - right) and 0 < right < 32


def test_queries_are_spread_over_the_classes_and_always_the_same():
    labels = torch.arange(3).repeat_interleave(torch.tensor([1, 50, 49]))
    rows = draw_queries(labels, 10)
    assert labels[rows].bincount().tolist() in ([1, 5, 4], [1, 4, 5]) and len(rows.unique()) == 10
    assert torch.equal(rows, draw_queries(labels, 10)) and labels[rows].tolist() == sorted(labels[rows].tolist())
    assert 0 < draw_queries(torch.arange(1000), 10).min() < 500  # not the first ten


def test_neighbours_of_pictures_in_files_and_without_classes(shell, trained, folder, monkeypatch):
    monkeypatch.setattr("lib.sources.MEMORY", 0)  # so that the pictures stay in their files
    code, lines, err = shell(figures, "neighbours", trained)
    assert code == 0 and lines == [f"figures/neighbours-run.{x}" for x in ("png", "svg")], err
    code, lines, err = shell(figures, "neighbours", trained, "--dataset", next((folder / "train").iterdir()))
    assert code == 2 and lines == [] and "is no folder of two or more classes" in err and err.count("\n") == 1


@pytest.mark.parametrize(
    "words, line",
    [
        ("nice runs", "NAME nice: expected circle, energy, dynamics"),
        ("knn gone", "gone: not a run folder, its metrics.jsonl cannot be read (No such file or directory)"),
        ("table --runs x", "--runs: no such flag; known: --name, --dataset"),
        ("views run", "views: takes --dataset and no runs"),
        ("circle run", "run: projects to 256 dimensions; a circle takes pretrain.py --out_dim 2"),
        ("knn empty", "empty/metrics.jsonl: its first row does not hold the settings of a run"),
        ("knn run other", "knn: runs of different data sets in one figure: cifar10, photos"),
        ("knn run silent", "silent: has no row with top1; leave it out"),
        ("energy silent", "no run has energies of blocks"),
        ("batch run silent", "batch: not all runs have been judged"),
        ("batch run", "batch: takes runs that differ in --accumulate"),
        ("knn run --out run/metrics.jsonl", "knn.png: cannot be written (run/metrics.jsonl is no folder)"),
        ("knn run run", "run and run have the same settings and seed; name one"),
        ("dynamics run chord", "energies (angle, s = 2, sum over 2 layers, predictor and projector) and (chord, s"),
        ("dynamics run one", "(angle, s = 2, sum over 1 layers, projector) and (angle, s = 2, sum over 2 layers, pred"),
        ("knn run --dataset photos", "--dataset photos: has no effect on knn"),
        ("knn run --data_dir x", "--data_dir x: has no effect on knn"),
        ("views --dataset photos --data_dir x", "--data_dir x: has no effect on views photos"),
    ],
)
def test_wrong_input_to_figures(shell, tmp_path, words, line):
    write_run(tmp_path / "run")
    write_run(tmp_path / "other", dataset="cifar10")
    write_run(tmp_path / "silent", seed=1)
    write_run(tmp_path / "chord", reg="mhe")
    write_run(tmp_path / "one", method="simclr", reg_on=["projector"])
    first_row = (tmp_path / "silent" / "metrics.jsonl").read_text().splitlines(keepends=True)[0]
    (tmp_path / "silent" / "metrics.jsonl").write_text(first_row)
    (tmp_path / "empty").mkdir()
    (tmp_path / "empty" / "metrics.jsonl").touch()
    before = sorted(p for p in tmp_path.rglob("*"))
    code, lines, err = shell(figures, *words.split())
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_scores_are_those_of_the_protocol(tmp_path):
    """Of no other set, network, crop, feature or k; without knn_eval, the online k-NN of the last epoch alone."""
    run = read(write_run(tmp_path / "run", scores=(50.0, 60.0), linear=70.0))
    assert (run.score("knn_eval"), run.score("linear_eval")) == (60, 70)
    rows = [row for row in run.rows if row["stage"] == "pretrain"]
    unjudged = dataclasses.replace(run, rows=[row if row.get("top1") != 60 else {**row, "top1": 61} for row in rows])
    assert (unjudged.score("knn_eval"), unjudged.score("linear_eval")) == (61, None)
    assert dataclasses.replace(unjudged, rows=rows[:4]).score("knn_eval") is None  # it is still in its first epoch


def test_a_notebooks_backend_is_not_taken(tmp_path):
    """A notebook names its backend to its children, and matplotlib's import fails where that is not installed."""
    environment = {**os.environ, "MPLBACKEND": "module://not_installed.backend_inline"}
    log = "results/photos/photos-byol"
    command = [sys.executable, "-m", "tools.figures", "table", log, "--out", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "BYOL" in done.stdout, done.stderr


def test_rows_of_the_paper_have_the_settings_that_it_says():
    rows = {row.name: row.settings() for row in paper_rows()}
    every = ["encoder", "projector", "predictor"]
    assert is_row(rows["4, MHE"], {"norm": "none", "reg": "amhe", "reg_on": every, "weight": 10.0, "model": "resnet18"})
    assert is_row(rows["C.8, BYOL, 128"], {"accumulate": 8, "batch_size": 1024, "reg": "none", "weight": 0.0})
