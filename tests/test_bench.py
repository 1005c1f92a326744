"""The table says what was measured, and of what."""

import sys
from pathlib import Path

import pytest
import torch

import data
from regularizers import amhe
from tools import bench


def test_ratios_are_medians_over_turns(monkeypatch):
    clock = iter([2.0, 6.0, 4.0, 3.0, 6.0, 9.0, 1.0, 5.0, 1.0])  # ours, fast, bound; three turns
    monkeypatch.setattr(bench, "timed", lambda *_: next(clock))
    calls = []
    rivals = [
        bench.Rival("fast", lambda: calls.append("fast"), ">= 2.5"),
        bench.Rival("absent", None, ">= 1", "no-such-package"),
        bench.Rival("bound", lambda: calls.append("bound"), "<= 1.5"),
    ]
    contest = bench.Contest("what", lambda: calls.append("ours"), rivals, 64)
    fast, bound, absent = bench.compare(contest, torch.device("cpu"), 1e-9)
    assert calls == ["ours", "fast", "bound"] * 2  # to warm up, and for memory
    assert fast["ours"] == 2 and fast["theirs"] == 6 and fast["ratio"] == 3  # 3, 2, 5
    assert bound["theirs"] == 4 and bound["ratio"] == 0.5  # 1/2, 1/3, 1
    assert absent["against"] == "absent: skipped, pip install no-such-package" and "ratio" not in absent


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_that_of_the_call():
    assert bench.peak(lambda: torch.ones(30_000_000), torch.device("cpu")) == pytest.approx(120, abs=10)


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_an_energy_takes_the_memory_of_a_few_blocks():
    """The Gram matrix of 8,192 neurons takes 268 MB."""
    weight = torch.randn(8192, 64, requires_grad=True)
    assert bench.peak(lambda: amhe(weight).backward(), torch.device("cpu")) < 60


def test_table_and_rows(shell, command, monkeypatch):
    monkeypatch.setattr(bench, "HEADS", ((300, 20), (10, 60)))
    code, lines, err = shell(bench.bench, "--only", "energy", "--seconds", "1e-9")
    assert code == 0, err
    assert lines[0].startswith("Python ") and f"torch {torch.__version__.partition('+')[0]}" in lines[0]
    assert lines[2].split(" | ")[:3] == ["| row", "what", "ours"] and len(lines) == 4 + 2 * 6
    assert all(line.count("|") == lines[2].count("|") for line in lines[3:])
    code, rows, _ = command(bench.bench, "--only", "energy", "--seconds", "1e-9", "--json")
    assert code == 0 and [row["to reach"] for row in rows] == [">= 3.5", "<= 1.5"] * 6
    assert all(row["stage"] == "bench" and row["ours"] > 0 and row["ratio"] > 0 for row in rows)


@pytest.mark.parametrize("name", ["knn", "linear"])
def test_the_judges_rows_run(monkeypatch, name):
    """On 300 rows to learn from and 100 to judge by, in place of 50,000 and 10,000."""
    rows, labels = torch.randn(400, 8), torch.arange(400) % 3
    parts = [data.Split(rows[part], labels[part]) for part in (slice(300), slice(300, 400))]
    monkeypatch.setattr(bench, "features", lambda _: parts)
    (contest,) = bench.ROWS[name](bench.processes.start())
    contest.ours()
    assert contest.what and contest.rivals


def test_memory_that_cannot_be_read_is_none(monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(Path, "write_text", refuse)
    assert bench.peak(lambda: 1, torch.device("cpu")) is None


def test_every_part_of_a_step_moves():
    training, step = bench.trainer(bench.processes.start(), 8, model="test_resnet", hidden_dim=16, reg="amhe")
    before = {name: x.clone() for name, x in training.network.state_dict().items()}
    step()
    moved = {name for name, x in training.network.state_dict().items() if not torch.equal(x, before[name])}
    for part in ("encoder.conv1", "projector.out", "predictor.out", "target.encoder.conv1"):
        assert any(name.startswith(part) for name in moved), part


@pytest.mark.parametrize("flags", [["--only", "knn2"], ["--scaling", "--only", "views"]])
def test_rows_that_there_are_not(shell, flags):
    code, lines, err = shell(bench.bench, *flags)
    assert code == 2 and lines == [] and err.startswith(f"bench.py: --only {flags[-1]}: no such row; there are energy")
