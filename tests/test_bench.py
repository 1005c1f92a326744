"""The table says what was measured, and of what."""

import sys
from pathlib import Path

import pytest
import torch

from linear_eval import Features
from regularizers import amhe
from tools import bench


@pytest.mark.parametrize("goal, ratio", [(">= 2.5", "3.00"), ("<= 1.5", "0.33")])
def test_ratios_are_medians_over_turns(monkeypatch, goal, ratio):
    clock = iter([9.0, 9.0, 2.0, 6.0, 3.0, 6.0, 1.0, 5.0])  # ours, theirs; after one, three turns: ratios 3, 2 and 5
    monkeypatch.setattr(bench, "timed", lambda *_: next(clock))
    contest = bench.Contest("what", lambda: None, "rival", lambda: None, goal, 64)
    cells = bench.compare(contest, torch.device("cpu"), 1e-9)
    assert cells[:6] == ["what", "2 s", "rival", "6 s", ratio, goal] and cells[6].endswith("(<= 64)")


@pytest.mark.skipif(sys.platform != "linux", reason="the peak of a process is read from /proc")
def test_memory_is_that_of_the_call():
    """Of a tensor, and of an energy, which keeps no Gram matrix: that of 8,192 neurons takes 268 MB."""
    weight = torch.randn(8192, 64, requires_grad=True)
    assert bench.peak(lambda: torch.ones(30_000_000), torch.device("cpu")) == pytest.approx(120, abs=10)
    assert bench.peak(lambda: amhe(weight).backward(), torch.device("cpu")) < 60


def test_a_table_of_rows(shell, monkeypatch):
    monkeypatch.setattr(bench, "HEADS", ((300, 20), (10, 60)))
    assert "--only knn2: no such row; there are energy" in shell(bench.bench, "--only", "knn2")[2]
    code, lines, err = shell(bench.bench, "--only", "energy", "--seconds", "1e-9", "--out", "kept/table.md")
    assert code == 0 and lines[0].startswith(f"Python 3.{sys.version_info[1]}."), err
    assert Path("kept/table.md").read_text().splitlines() == lines
    assert lines[2].split(" | ")[:3] == ["| row", "what", "ours"] and len(lines) == 4 + 6
    assert all(line.count("|") == lines[2].count("|") for line in lines[3:])


def test_a_peer_that_is_not_installed_is_named(shell, monkeypatch):
    """Its rows are left out, and those beside it are not. On 300 rows to learn from and 100 to judge by."""
    parts = [Features(torch.randn(n, 8), torch.arange(n) % 3) for n in (300, 100)]
    monkeypatch.setattr(bench, "features", lambda _: parts)
    monkeypatch.setitem(sys.modules, "faiss", None)
    code, lines, err = shell(bench.bench, "--only", "knn", "--seconds", "1e-9")
    assert code == 0 and len(lines) == 5 and "| product and top-k alone |" in lines[4]
    assert err.startswith("knn: a comparison is left out") and "faiss" in err and err.count("\n") == 1


def test_every_part_of_a_step_moves():
    training, step = bench.trainer(bench.processes.start(), 8, model="test_resnet", hidden_dim=16, reg="amhe")
    before = {name: x.clone() for name, x in training.network.state_dict().items()}
    step()
    for part in ("encoder.conv1", "projector.out", "predictor.out", "target.encoder.conv1"):
        names = [name for name in before if name.startswith(part)]
        assert any(not torch.equal(training.network.state_dict()[name], before[name]) for name in names), part
