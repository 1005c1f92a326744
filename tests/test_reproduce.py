"""The list of runs: what is done is not done again, what fails is named, and the table is of all there is."""

import inspect
import json
from pathlib import Path

import pytest

import cli
import reproduce
from figures import figures
from knn_eval import knn_eval
from linear_eval import linear_eval
from pretrain import pretrain, refuse

STAGES = {stage.__name__: stage for stage in (pretrain, knn_eval, linear_eval, figures)}


@pytest.fixture
def typed(monkeypatch):
    """Stages are called in this process; the commands in order, each the name of its stage and its words."""
    commands = []

    def child(words):
        words = [str(word) for word in words]
        at = next(i for i, word in enumerate(words) if word.endswith(".py"))
        stage = STAGES[Path(words[at]).stem]
        commands.append((stage.__name__, words[at + 1 :]))
        flags = cli.read(words[at + 1 :], inspect.signature(stage).parameters)
        places = [flags.pop(name) for name in ("ckpt", "name") if name in flags] + [*flags.pop("runs", ())]
        try:
            stage(*places, **flags)
        except cli.UsageError:
            return 2
        return 0

    monkeypatch.setattr(reproduce, "child", child)
    return commands


def test_list_goes_on_where_it_stopped(typed, shell, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(reproduce, "PLAN", ["--epochs 2 --eval_every 0", "--reg amhe --epochs 100", "--warmup 5"])
    words = ["--dataset", folder, "--trial", "--folder", "r", "--results", "out"]
    code, _, err = shell(reproduce.reproduce, *words)
    assert code == 2 and "1 of 3 runs failed, the same command tries again: r/warmup-5 (exit code 2)" in err
    stages = ["pretrain", "figures", "pretrain", "knn_eval", "linear_eval", "figures", "pretrain", "figures"]
    assert [stage for stage, _ in typed] == stages
    assert {path.parent.name for path in Path("out").glob("*/metrics.jsonl")} == {
        "epochs-2-eval_every-0",
        "reg-amhe-epochs-100",
    }
    rows = [json.loads(line) for line in Path("out/reg-amhe-epochs-100/metrics.jsonl").read_text().splitlines()]
    assert rows[0]["settings"]["epochs"] == 1 and rows[-1]["stage"] == "linear_eval" and rows[-1]["epoch"] == 1
    assert "| BYOL-aMHE, s = 2 | pictures" in Path("out/table.md").read_text()

    typed.clear()
    log = Path("r/reg-amhe-epochs-100/metrics.jsonl")
    log.write_text("".join(json.dumps(row) + "\n" for row in rows if row["stage"] != "linear_eval"))
    monkeypatch.setattr(reproduce, "PLAN", reproduce.PLAN[:2])
    code, _, err = shell(reproduce.reproduce, *words)
    assert code == 0 and [stage for stage, _ in typed] == ["linear_eval", "figures"]
    assert err.splitlines()[-1] == "all 2 runs are done; out/table.md is their table"


def test_every_run_of_the_list_is_one_of_pretrain():
    """Its flags exist and go together, and no two runs share a folder."""
    names = [reproduce.name_of(words) for words in reproduce.PLAN]
    assert len(names) == len(set(names)) == 29
    parameters = inspect.signature(pretrain).parameters
    defaults = {name: flag.default for name, flag in parameters.items()}
    for words in reproduce.PLAN:
        flags = cli.read(words.split(), parameters)
        assert flags.keys() == reproduce.pairs(words).keys()
        refuse({**defaults, **flags, "dataset": "cifar10"}, Path("run"))
