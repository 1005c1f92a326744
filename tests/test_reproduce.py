"""The list of runs: what is done is not done again, what fails is named, and the table is of all there is."""

import inspect
import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from harness.settings import check
from knn_eval import knn_eval
from lib import cli
from lib.errors import InputError
from linear_eval import linear_eval
from pretrain import RECIPES, pretrain
from tools import reproduce
from tools.figures import figures

ROOT = Path(__file__).parent.parent
TINY = "--model test_resnet --hidden_dim 32 --batch_size 32 --lr 0.5"
STAGES = {stage.__name__: stage for stage in (pretrain, knn_eval, linear_eval, figures)}


@pytest.fixture
def typed(monkeypatch):
    """Stages are called in this process; the commands in order, each the name of its stage and its words."""
    commands = []

    def child(command, how):
        script, *words = map(str, command)
        stage = STAGES[Path(script).stem]
        commands.append((stage.__name__, words, how))
        flags = cli.read(words, inspect.signature(stage).parameters)
        places = [flags.pop(name) for name in ("ckpt", "name") if name in flags] + [*flags.pop("runs", ())]
        try:
            stage(*places, **flags)
        except InputError:
            return 2
        return 1 if "--seed=1" in words else 0  # a run that diverged, say

    monkeypatch.setattr(reproduce, "run_child", child)
    monkeypatch.setattr(reproduce, "SMALL", TINY)
    return commands


def stages(typed):
    return [name for name, *_ in typed]


def test_list_goes_on_where_it_stopped(typed, shell, folder, tmp_path, monkeypatch):
    runs = [f"{TINY} {flags}" for flags in ("--epochs 2 --eval_every 0", "--epochs 1 --seed 1", "--epochs 1")]
    monkeypatch.setitem(reproduce.PLANS, "gpu", runs)
    words = ["--dataset", folder, "--precision", "bf16", "--folder", "r"]
    code, _, err = shell(reproduce.reproduce, *words)
    assert code == 2 and err.splitlines()[-1].endswith("by the same command: r/cpu-epochs-1-seed-1 (exit code 1)")
    assert " ".join(stages(typed)) == "pretrain figures pretrain figures pretrain knn_eval linear_eval figures"
    assert all((how == {"ACCELERATE_MIXED_PRECISION": "bf16"}) == (name == "pretrain") for name, _, how in typed)
    rows = [json.loads(line) for line in Path("r-table/cpu-epochs-1/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["settings"]["epochs"] == 1 and rows[-1]["stage"] == "linear_eval" and rows[-1]["epochs"] == 80
    assert Path("r-table/table.md").read_text().count("| BYOL, epochs ") == 2

    typed.clear()
    log = Path("r/cpu-epochs-1/metrics.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if row["stage"] != "linear_eval"))
    monkeypatch.setitem(reproduce.PLANS, "gpu", runs[::2])
    code, _, err = shell(reproduce.reproduce, *words)
    assert code == 0 and stages(typed) == ["pretrain", "linear_eval", "figures"]  # the first ends at once
    assert err.splitlines()[-1] == "all 2 runs are done; r-table/table.md is the table of all there are"

    typed.clear()
    code, _, err = shell(reproduce.reproduce, "--dataset", "nowhere", "--folder", "new")
    assert code == 2 and stages(typed) == ["pretrain"] and not Path("new").exists()
    assert "the list stops at new/cpu-epochs-2-eval_every-0 (exit code 2), for the reason above" in err


def test_a_signal_is_passed_on_and_awaited(tmp_path):
    stage, ended = tmp_path / "stage.py", tmp_path / "ended"
    stage.write_text(
        "import pathlib, signal, sys, time, lib.errors\n"
        "def finish(*_):\n"
        "    time.sleep(0.5)\n"
        f"    pathlib.Path({str(ended)!r}).touch()\n"
        "    sys.exit(143)\n"
        "signal.signal(signal.SIGTERM, finish)\n"
        "print('ready', flush=True)\n"
        "time.sleep(60)\n"
    )
    code = "from lib import cli\nfrom tools import reproduce\n"
    code += f"def stage():\n    reproduce.run_child([{str(stage)!r}], {{}})\ncli.run(stage)"
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    driver = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, **pipes)
    assert driver.stdout.readline() == b"ready\n"
    driver.send_signal(signal.SIGTERM)
    _, err = driver.communicate(timeout=30)
    assert driver.returncode == 143 and ended.exists() and b"SIGTERM; the same command goes on" in err


def test_a_run_stays_done_where_its_set_has_moved():
    settings = cli.defaults(pretrain) | {"dataset": "cifar10", "data_dir": "there", "epochs": 3}
    assert reproduce.has_settings(settings, {"dataset": "cifar10", "data_dir": "here", "epochs": "3"})
    assert not reproduce.has_settings(settings, {"dataset": "cifar100", "data_dir": "there", "epochs": "3"})


def test_parts_share_the_list_out(typed, shell, folder, monkeypatch):
    """Two of two do each run once; the last table has both."""
    runs = [f"{TINY} --epochs 1 --reg {reg}" for reg in ("none", "mhe", "uniform")]
    monkeypatch.setitem(reproduce.PLANS, "cpu", runs)
    words = ["--plan", "cpu", "--dataset", folder, "--folder", "r"]
    code, _, err = shell(reproduce.reproduce, *words, "--part", "2/2")
    assert code == 0 and stages(typed) == ["pretrain", "knn_eval", "linear_eval", "figures"]
    assert "[2 of 3] python" in err and "--reg=mhe" in typed[0][1]
    assert typed[0][2] == {}  # without --precision no run takes itself for launched
    assert err.splitlines()[-1] == "part 2/2 is done, 1 of 3 runs; r-table/table.md is the table of all there are"
    typed.clear()
    assert shell(reproduce.reproduce, *words, "--part", "1/2")[0] == 0
    assert len(typed) == 8 and not any("--reg=mhe" in words for name, words, _ in typed if name == "pretrain")
    assert Path("r-table/table.md").read_text().count("| BYOL") == 3
    typed.clear()
    assert shell(reproduce.reproduce, *words)[0] == 0 and typed == []
    for part in ("0/2", "3/2", "½/2", "1/4"):
        expected = f"--part {part}: expected the number of a part and how many parts there are, at most 3, as 2/4\n"
        assert shell(reproduce.reproduce, *words, "--part", part)[2].endswith(expected)


@pytest.mark.parametrize("plan, runs", [("gpu", 29), ("cpu", 19)])
def test_every_run_of_a_list_is_one_of_pretrain(plan, runs):
    """Its flags exist and go together, and no two runs share a folder."""
    defaults = cli.defaults(pretrain)
    assert len({reproduce.name_of(words) for words in reproduce.PLANS[plan]}) == len(reproduce.PLANS[plan]) == runs
    for words in reproduce.PLANS[plan]:
        flags = cli.read(words.split(), inspect.signature(pretrain).parameters)
        assert flags.keys() == reproduce.as_typed(words).keys()
        check({**defaults, **flags, "dataset": "cifar10", "out": "run"}, defaults, RECIPES)
