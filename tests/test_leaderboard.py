"""results/README.md and its CSV are what `python -m tools.leaderboard` makes of the logs, and of entries alone."""

import csv
import json
import shutil

import pytest
from conftest import ROOT

from lib.errors import InputError
from tools import leaderboard


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A copy of the logs on CIFAR-10, which can be changed."""
    shutil.copytree(ROOT / "results" / "cifar10", tmp_path / "cifar10")
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path)
    return tmp_path


def change(log, **changes):
    """Change the first row of a log."""
    first, *others = log.read_text().splitlines()
    log.write_text("\n".join([json.dumps(json.loads(first) | changes), *others]))


def test_the_tables_are_what_the_logs_say(tmp_path, monkeypatch):
    ours = ROOT / "results"
    shutil.copytree(ours, tmp_path / "copy", ignore=shutil.ignore_patterns("*.png", "*.csv"))
    monkeypatch.setattr(leaderboard, "RESULTS", tmp_path / "copy")
    by_hand = (ours / "README.md").read_text().partition("\n## ")[0]
    (tmp_path / "copy" / "README.md").write_text(f"{by_hand}\n## old\n")
    leaderboard.leaderboard()
    for name in ("README.md", "leaderboard.csv"):
        again = "after a log is added, run python -m tools.leaderboard"
        assert (tmp_path / "copy" / name).read_text() == (ours / name).read_text(), again


def test_scores_are_those_of_the_front_page():
    """Whose table is computed from the logs by tests/test_results.py, in another way."""
    table = (ROOT / "README.md").read_text().split("\n## Results")[1].split("\n## ")[0]
    shown = {line.split(" | ")[1] for line in table.splitlines() if " | " in line}
    with open(ROOT / "results" / "leaderboard.csv", newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["data"] == "cifar10-jpeg"]
    assert {row["k-NN"] for row in rows} >= {score for score in shown if score[0].isdigit()}
    assert len(rows) == 12 and rows[-1]["k-NN"] == "34.8"


def test_only_entries_have_a_row(results):
    """Three seeds, one of them by code that no commit holds, are two; a single run is none."""
    change(results / "cifar10" / "cpu-seed-1" / "metrics.jsonl", git="40e58e3-dirty")
    methods = [row["method"] for row in leaderboard.board(results)]
    of_the_recipe = ["BYOL + uniformity", "BYOL-MHE, s = 2", "BYOL-aMHE, s = 2", "SimCLR"]  # floors: in a log of BYOL
    of_half_the_rate = ["BYOL", "BYOL-aMHE, s = 2", "BYOL + ortho", "BYOL + uniformity", "BYOL + koleo"]
    expected = [f"{method}, lr 0.48" for method in of_the_recipe] + [f"{name}, lr 0.24" for name in of_half_the_rate]
    assert sorted(methods) == sorted(expected)


def test_results_without_an_entry_are_refused(results):
    """Before anything is written."""
    shutil.rmtree(results / "cifar10")
    (results / "README.md").write_text("# Leaderboard")
    with pytest.raises(InputError, match=r": holds no setting with the seeds 0, 1 and 2$"):
        leaderboard.leaderboard()
    assert [path.name for path in results.iterdir()] == ["README.md"]
    assert (results / "README.md").read_text() == "# Leaderboard"


def test_votes_of_another_protocol_are_no_scores(results):
    before = leaderboard.board(results)
    log = results / "cifar10" / "cpu-seed-0" / "metrics.jsonl"
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    linear = next(row for row in reversed(rows) if row.get("features") == "cached")
    floor = next(row for row in rows if row.get("of") == "pixels")
    with open(log, "a") as file:
        for row in (linear | {"net": "target", "top1": 2.0}, floor | {"split": "holdout", "top1": 12.3}):
            file.write(json.dumps(row) + "\n")
    assert leaderboard.board(results) == before


def test_a_mean_of_fewer_seeds_says_so(results):
    log = results / "cifar10" / "cpu-reg-mhe-seed-0" / "metrics.jsonl"
    rows = [row for row in log.read_text().splitlines(keepends=True) if '"cached"' not in row]
    log.write_text("".join(rows))
    (row,) = [row for row in leaderboard.board(results) if row["method"].startswith("BYOL-MHE")]
    assert row["linear"].endswith(" (2)") and row["k-NN"] == "62.0 ± 0.7"


def test_entries_of_other_data_are_refused(results):
    for seed in range(3):
        change(results / "cifar10" / f"cpu-reg-uniform-seed-{seed}" / "metrics.jsonl", view={"size": 64})
    with pytest.raises(
        InputError, match=r"cpu-reg-uniform-seed-0: its data are not those of .*seed-0: size 64 \(it was 32\)"
    ):
        leaderboard.board(results)
