"""Figures and tables from run folders: the numbers under them, and what happens to folders that hold no run."""

import csv
import json
import math
import shlex

import numpy as np
import pytest
import scipy.stats
import torch
from torch import nn

import data
from figures import figures, gaussian_kde, paper_rows, read, von_mises_fisher_kde
from pretrain import pretrain, representations

SETTINGS = {"dataset": "photos", "data_dir": "data", "method": "byol", "norm": "bn", "reg": "none", "s": 2.0}
SETTINGS |= {"weight": 0.0, "reg_on": ["projector", "predictor"], "batch_size": 64, "accumulate": 1, "out_dim": 256}


def write_run(folder, seed=0, scores=(60.0, 70.0), linear=None, **changes):
    """A log as pretrain.py and its judges write it."""
    folder.mkdir()
    rows = [{"stage": "pretrain", "settings": {**SETTINGS, "seed": seed, **changes}, "view": {}}]
    for epoch, top1 in enumerate(scores, 1):
        where = {"stage": "pretrain", "epoch": epoch, "step": 10 * epoch}
        means = {"loss": 1.0, "uniformity": -2.0 - seed, "alignment": 0.5, "energy": 1.6 / epoch, "images_per_s": 100.0}
        rows += [{**where, **means}, {**where, "of": "online", "split": "test", "k": 20, "top1": top1}]
        rows += [{**where, "of": "representations", "g2": 0.1, "block/layer1.0": 0.9, "block/layer1.1": 0.8}]
    judged = {"stage": "knn_eval", "of": "trained", "split": "test"}
    rows += [{**judged, "k": 10, "top1": 1.0}, {**judged, "k": 20, "top1": scores[-1]}]
    rows += [{"stage": "linear_eval", "sweep": 0.1, "top1": 2.0, "split": "holdout"}]
    rows += [{"stage": "linear_eval", "top1": linear, "split": "test"}] if linear is not None else []
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def drawn(monkeypatch, capsys, tmp_path):
    """Run figures.py in an empty folder: exit code, lines of standard output and standard error."""
    monkeypatch.chdir(tmp_path)

    def run(*words):
        monkeypatch.setattr("sys.argv", ["figures.py", *map(str, words)])
        code = 0
        try:
            from figures import cli, models

            cli.run(figures, data.DataError, models.ModelError)
        except SystemExit as e:
            code = e.code
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def test_gaussian_kde_of_known_points():
    z = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
    side = torch.linspace(-2, 2, 401)
    grid = torch.stack(torch.meshgrid(side, side, indexing="xy"), -1).reshape(-1, 2)
    assert gaussian_kde(z, grid).sum().item() * 0.01**2 == pytest.approx(1, abs=1e-4)
    assert gaussian_kde(z, z[:1]).item() == pytest.approx(0.5 / (2 * math.pi * 0.01), rel=1e-5)


def test_von_mises_fisher_kde_is_scipys():
    angles, theta = torch.tensor([0.3, -2.0, 3.1]), torch.linspace(-math.pi, math.pi, 100)
    z = torch.stack([angles.cos(), angles.sin()], 1)
    theirs = np.mean([scipy.stats.vonmises.pdf(theta.numpy(), 100, loc=a) for a in angles.numpy()], 0)
    torch.testing.assert_close(von_mises_fisher_kde(z, theta), torch.from_numpy(theirs).float(), rtol=1e-3, atol=1e-5)
    uniform = torch.linspace(-math.pi, math.pi, 1001)[:-1]
    everywhere = von_mises_fisher_kde(torch.stack([uniform.cos(), uniform.sin()], 1), theta)
    torch.testing.assert_close(everywhere, torch.full((100,), 1 / (2 * math.pi)), rtol=1e-4, atol=0)


def test_g2_of_known_representations(monkeypatch):
    """Four unit vectors, two and two opposite: of six pairs four are at d^2 = 2 and two at d^2 = 4."""
    points = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0], [0.0, -1.0]])
    monkeypatch.setattr("models.embed", lambda encoder, views: 7 * points)
    split = data.Split(torch.zeros(4, 3, 8, 8, dtype=torch.uint8), torch.arange(4))
    view = {"size": 8, "crop": 1.0, "mean": (0,) * 3, "std": (1,) * 3}
    row = representations(nn.Flatten(), split, view)
    assert row == {"g2": pytest.approx((4 * math.exp(-4) + 2 * math.exp(-8)) / 6, rel=1e-5)}


def test_table_is_numpys_mean_and_sample_standard_deviation(drawn, tmp_path):
    scores = [(50, 61.0), (50, 64.5), (50, 63.2)]
    for seed, pair in enumerate(scores):
        write_run(tmp_path / f"byol{seed}", seed, pair, linear=80.0 + seed if seed else None)
    write_run(tmp_path / "amhe", reg="amhe", weight=10.0, dataset="cifar10", recipe="cifar10-300", model="resnet18")
    code, lines, _ = drawn("table", "byol0", "byol1", "byol2", "amhe")
    assert code == 0 and lines[-2:] == ["figures/table.md", "figures/table.csv"]
    assert lines[:-2] == (tmp_path / "figures" / "table.md").read_text().splitlines()
    with open(tmp_path / "figures" / "table.csv") as file:
        regularized, plain = csv.DictReader(file)  # the paper's rows come first, in its order
    last = [top1 for _, top1 in scores]
    assert float(plain["k-NN"]) == pytest.approx(np.mean(last)) and plain["seeds"] == plain["k-NN n"] == "3"
    assert float(plain["k-NN std"]) == pytest.approx(np.std(last, ddof=1))
    assert float(plain["linear"]) == 81.5 and plain["linear n"] == "2" and plain["paper"] == ""
    of = ("5, g and q", "C.7, aMHE, s = 2", "C.8, BYOL-MHE, 1024")
    assert regularized["paper"] == "; ".join(f"91.64 ({row})" for row in of) and regularized["k-NN std"] == ""
    assert "| BYOL | photos | 3 | 62.9 ± 1.8 | 81.5 ± 0.7 (2) | -3.00 ± 1.00 |" in "\n".join(lines)


@pytest.mark.parametrize("name", ["energy", "dynamics", "knn", "batch"])
def test_curves_are_drawn(drawn, tmp_path, name):
    """Two seeds of one method, one of another, and a run of a single point."""
    for seed in (0, 1):
        write_run(tmp_path / f"byol{seed}", seed, (50.0, 60.0 + seed))
    write_run(tmp_path / "amhe", reg="amhe", scores=(55.0,))
    write_run(tmp_path / "small", accumulate=4, scores=(40.0, math.nan, 45.0))
    code, lines, err = drawn(name, "byol0", "byol1", "amhe", "small", "--out", "drawn")
    assert (code, err) == (0, "") and lines == [f"drawn/{name}.png", f"drawn/{name}.svg"]
    assert (tmp_path / lines[0]).read_bytes()[:4] == b"\x89PNG" and "BYOL-aMHE, s = 2" in (
        tmp_path / lines[1]
    ).read_text()
    assert sorted(p.name for p in (tmp_path / "drawn").iterdir()) == sorted(f"{name}.{x}" for x in ("png", "svg"))


def test_circle_from_real_runs(command, drawn, folder, tmp_path):
    flags = "--stem imagenet --hidden_dim 32 --out_dim 2 --batch_size 16 --epochs 1".split()
    for out, method in (("simclr", ["--method", "simclr"]), ("byol", ["--norm", "none"])):
        assert command(pretrain, "--dataset", folder, *flags, *method, "--out", out)[0] == 0
    code, lines, err = drawn("circle", "simclr", "byol")
    assert (code, err) == (0, "") and lines == ["figures/circle.png", "figures/circle.svg"]
    write_run(tmp_path / "wide")
    code, lines, err = drawn("circle", "wide")
    assert code == 2 and lines == []
    assert "wide: projects to 256 dimensions; a circle takes pretrain.py --out_dim 2" in err


def test_views_of_a_data_set(drawn, folder):
    code, lines, err = drawn("views", "--dataset", folder)
    assert (code, err) == (0, "") and lines == [f"figures/views-{folder.name}.{x}" for x in ("png", "svg")]


@pytest.mark.parametrize(
    "words, line",
    [
        ("", "NAME is missing"),
        ("nice runs", "NAME nice: expected circle, energy, dynamics"),
        ("knn", "knn: takes run folders"),
        ("views run", "views: takes --dataset and no runs"),
        ("knn nowhere", "nowhere: no run, its metrics.jsonl cannot be read"),
        ("knn empty", "empty/metrics.jsonl: has no first row with a run's settings"),
        ("knn foreign", "foreign/metrics.jsonl: line 1 is not one that a stage writes"),
        ("knn run other", "knn: runs of different data sets in one figure: cifar10, photos"),
        ("knn silent", "no run has a row with top1"),
        ("energy silent", "no run has energies of blocks"),
        ("batch run silent", "batch: not all runs have been judged"),
        ("batch run", "batch: takes runs that differ in --accumulate"),
        ("knn run --out run/metrics.jsonl", "--out run/metrics.jsonl: cannot be written"),
        ("circle run --data_dirr x", "--data_dirr: no such flag; did you mean --data_dir?"),
    ],
)
def test_wrong_input_to_figures(drawn, tmp_path, words, line):
    write_run(tmp_path / "run")
    write_run(tmp_path / "other", dataset="cifar10")
    write_run(tmp_path / "silent")
    for name, text in (("empty", ""), ("foreign", "hello\n"), ("silent", None)):
        (tmp_path / name).mkdir(exist_ok=True)
        first = (tmp_path / "run" / "metrics.jsonl").read_text().split("\n")[0] + "\n"
        (tmp_path / name / "metrics.jsonl").write_text(first if text is None else text)
    before = sorted(p for p in tmp_path.rglob("*"))
    code, lines, err = drawn(*words.split())
    assert code == 2 and lines == [] and line in err and err.count("\n") == 1
    assert sorted(p for p in tmp_path.rglob("*")) == before


def test_a_last_line_that_is_cut_short_does_not_count(drawn, tmp_path):
    run = write_run(tmp_path / "run")
    whole = read(run).rows
    with open(run / "metrics.jsonl", "a") as file:
        file.write('{"stage": "pretrain", "epoch": 3, "of": "onl')
    assert read(run).rows == whole and drawn("knn", "run")[0] == 0


def test_rows_of_the_paper_are_those_of_the_readme():
    from test_readme import ROWS

    from pretrain import RECIPES, cli, inspect

    assert [(row, float(paper)) for row, _, paper in ROWS] == [(row, paper) for row, paper, _ in paper_rows()]
    for (row, flags, _), (_, _, settings) in zip(ROWS, paper_rows()):
        given = cli.read(shlex.split(flags), inspect.signature(pretrain).parameters)
        for name, value in given.items():
            assert settings[name] == (list(value) if isinstance(value, tuple) else value), (row, name)
        assert settings["recipe"] in RECIPES
