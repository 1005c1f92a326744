"""The list of runs: what is done is not done again, what fails is named, and the table is of all there is."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

from harness.settings import check
from knn_eval import knn_eval
from lib import cli
from lib.errors import InputError
from linear_eval import linear_eval
from pretrain import RECIPES, pretrain
from tools import reproduce
from tools.figures import figures

STAGES = {stage.__name__: stage for stage in (pretrain, knn_eval, linear_eval, figures)}


@pytest.fixture
def typed(monkeypatch):
    """Stages are called in this process; the commands in order, each the name of its stage and its words."""
    commands = []

    def child(command, how):
        script, *words = map(str, command)
        if Path(script).stem == "bench":  # minutes
            commands.append(("bench", words, how))
            Path(words[-1].removeprefix("--out=")).touch()
            return 0
        stage = STAGES[Path(script).stem]
        commands.append((stage.__name__, words, how))
        flags = cli.values_of(words, stage)
        places = [flags.pop(name) for name in ("ckpt", "name") if name in flags] + [*flags.pop("runs", ())]
        try:
            stage(*places, **flags)
        except InputError:
            return 2
        return 1 if "--seed=1" in words else 0  # a run that diverged, say

    monkeypatch.setattr(reproduce, "run_child", child)
    return commands


def stages(typed):
    return [name for name, *_ in typed]


def test_list_goes_on_where_it_stopped(typed, shell, folder, tmp_path, monkeypatch):
    monkeypatch.setitem(reproduce.PLANS, "gpu", ["--epochs 2 --eval_every 0", "--epochs 100 --seed 1", "--epochs 100"])
    words = ["--dataset", folder, "--precision", "bf16", "--trial", "--folder", "r", "--results", "out"]
    code, _, err = shell(reproduce.reproduce, *words)
    assert code == 2 and err.splitlines()[-1].endswith("by the same command: r/epochs-100-seed-1 (exit code 1)")
    expected = ["pretrain", "figures", "pretrain", "figures", "pretrain", "knn_eval", "linear_eval", "figures"]
    assert stages(typed) == expected
    assert all((how == {"ACCELERATE_MIXED_PRECISION": "bf16"}) == (name == "pretrain") for name, _, how in typed)
    found = {path.parent.name for path in Path("out").glob("*/metrics.jsonl")}
    assert found == {"epochs-2-eval_every-0", "epochs-100-seed-1", "epochs-100"}
    rows = [json.loads(line) for line in Path("out/epochs-100/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["settings"]["epochs"] == 1 and rows[-1]["stage"] == "linear_eval" and rows[-1]["epoch"] == 1
    assert Path("out/table.md").read_text().count("| BYOL, epochs ") == 2

    typed.clear()
    log = Path("r/epochs-100/metrics.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if row["stage"] != "linear_eval"))
    monkeypatch.setitem(reproduce.PLANS, "gpu", reproduce.PLANS["gpu"][::2])
    code, _, err = shell(reproduce.reproduce, *words)
    assert code == 0 and stages(typed) == ["pretrain", "linear_eval", "figures"]  # the first ends at once
    assert err.splitlines()[-1] == "all 2 runs are done; out/table.md is the table of all there are"

    typed.clear()
    code, _, err = shell(reproduce.reproduce, *(word for word in words if word != "--trial"))
    assert code == 2 and set(stages(typed)) == {"pretrain", "figures"}  # a trial's runs are not those of the list
    assert "failed, and tried again by the same command: r/epochs-2-eval_every-0 (exit code 2), r/epochs-100" in err

    typed.clear()
    code, _, err = shell(reproduce.reproduce, "--dataset", "nowhere", "--folder", "new", "--results", "new/table")
    assert code == 2 and stages(typed) == ["pretrain"] and not Path("new").exists()
    assert "the list stops at new/epochs-2-eval_every-0 (exit code 2), for the reason above" in err


def test_a_table_that_cannot_be_written_is_no_success(tmp_path):
    run = tmp_path / "r" / reproduce.name_of("--epochs 2")
    run.mkdir(parents=True)
    settings = {"dataset": "x", "method": "byol", "reg": "none", "accumulate": 1}
    row = {"stage": "pretrain", "settings": settings, "loss": 1.0}
    (run / "metrics.jsonl").write_text(json.dumps(row))
    (tmp_path / "out").write_text("a file")
    with pytest.raises(InputError, match=r"metrics.jsonl: cannot be written \(Not a directory\)"):
        reproduce.collect(tmp_path / "r", tmp_path / "out", ["--epochs 2"])


def test_a_signal_is_passed_on_and_awaited(tmp_path):
    stage, ended = tmp_path / "stage.py", tmp_path / "ended"
    stage.write_text(
        "import pathlib, signal, sys, time, a_package, lib.errors\n"
        "def finish(*_):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(ended)!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, finish)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    packages = tmp_path / "packages"  # a child finds what its parent finds
    packages.mkdir()
    (packages / "a_package.py").touch()
    environment = {**os.environ, "PYTHONPATH": str(packages)}
    code = "from lib import cli\nfrom tools import reproduce\n"
    code += f"def stage():\n    reproduce.run_child([{str(stage)!r}], {{}})\ncli.run(stage)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, **pipes)
    assert driver.stdout.readline() == b"ready\n"
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 143 and ended.exists() and b"SIGTERM; the same command goes on" in err


def test_a_run_stays_done_where_its_set_has_moved():
    settings = pretrain.__kwdefaults__ | {"dataset": "cifar10", "data_dir": "there", "epochs": 3}
    assert reproduce.has_settings(settings, {"dataset": "cifar10", "data_dir": "here", "epochs": "3"})
    assert not reproduce.has_settings(settings, {"dataset": "cifar100", "data_dir": "there", "epochs": "3"})


def test_parts_share_the_list_out(typed, shell, folder, monkeypatch):
    """Two of two do each run once; the last table has both."""
    runs = [f"--epochs 100 --reg {reg}" for reg in ("none", "mhe", "uniform")]
    monkeypatch.setitem(reproduce.PLANS, "quarter", runs)
    words = ["--plan", "quarter", "--dataset", folder, "--trial", "--folder", "r", "--results", "out"]
    code, _, err = shell(reproduce.reproduce, *words, "--part", "2/2")
    assert code == 0 and stages(typed) == ["pretrain", "knn_eval", "linear_eval", "figures"]
    assert all(how == {} for *_, how in typed)  # without --precision no run takes itself for launched
    assert "[2 of 3] python" in err and "--reg=mhe" in typed[0][1]
    assert err.splitlines()[-1] == "part 2/2 is done, 1 of 3 runs; out/table.md is the table of all there are"
    typed.clear()
    assert shell(reproduce.reproduce, *words, "--part", "1/2")[0] == 0
    backends = [how["ACCELERATE_DYNAMO_BACKEND"] for name, _, how in typed if name == "bench"]
    assert stages(typed)[:2] == ["bench", "bench"] and backends == ["no", "inductor"]
    assert {path.name for path in Path("out").glob("*.md")} == {"step-no.md", "step-inductor.md", "table.md"}
    assert len(typed) == 2 + 8 and not any("--reg=mhe" in words for name, words, _ in typed if name == "pretrain")
    assert Path("out/table.md").read_text().count("| BYOL") == 3
    typed.clear()
    assert shell(reproduce.reproduce, *words)[0] == 0 and typed == []


@pytest.mark.parametrize("part", ["0/2", "3/2", "½/2", "1/30"])
def test_a_part_is_two_numbers(shell, part):
    code, _, err = shell(reproduce.reproduce, "--part", part)
    assert code == 2
    expected = "the number of a part and how many parts there are, at most 29, as 2/4"
    assert err == f"reproduce.py: --part {part}: expected {expected}\n"


@pytest.mark.parametrize("plan, runs", [("gpu", 29), ("cpu", 20), ("quarter", 4)])
def test_every_run_of_a_list_is_one_of_pretrain(plan, runs):
    """Its flags exist and go together, and no two runs share a folder."""
    names = [reproduce.name_of(words) for words in reproduce.PLANS[plan]]
    assert len(names) == len(set(names)) == runs
    defaults = pretrain.__kwdefaults__
    for words in reproduce.PLANS[plan]:
        flags = cli.values_of(words.split(), pretrain)
        assert flags.keys() == reproduce.as_typed(words).keys()
        check({**defaults, **flags, "dataset": "cifar10", "out": "run"}, defaults, RECIPES)
