"""The paper's claim on CIFAR-10, run after run: pre-train, judge by both judges, and make the table of what there is.

    python -m tools.reproduce --precision bf16                          # 100 to 300 epochs a run; wants a GPU
    python -m tools.reproduce --dataset path/to/pictures --precision bf16
    python -m tools.reproduce --dataset path/to/pictures --trial --folder runs/trial --results runs/trial/table

Runs come in the order in which they tell most. Each command is printed before it starts. What is done is not done
again, and a run that was stopped goes on: stop it at any time, and give the same command. After each run, `results`
holds the logs of all and the table that figures.py makes of them; checkpoints stay in the folder of runs.
"""

import contextlib
import inspect
import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

from safetensors import SafetensorError, safe_open

import models
from harness import cli
from harness import run as runs
from pretrain import HOW, pretrain

HERE = Path(__file__).parent.parent
ALL = "--reg_on encoder,projector,predictor"
FIVE = ("", "--reg uniform", "--reg mhe", "--reg amhe", "--method simclr")
CIRCLE = "--model alexnet --out_dim 2 --epochs 100"
PLAN = [
    *["--epochs 2 --eval_every 0"],  # images a second, in the log's last row
    *[f"{method} --epochs 100" for method in FIVE],  # Table 3's methods, at a third of Appendix B.2's 300 epochs
    *[f"{method} --epochs 300" for method in ("", "--reg amhe")],  # Table C.7's first and last row
    *[f"{method} --epochs 100 --seed {seed}" for seed in (1, 2) for method in FIVE],
    *[f"{method} --epochs 100 --accumulate 8" for method in ("", "--reg uniform", "--reg amhe")],  # Figure 8
    *[f"--norm none --epochs 100 {reg}" for reg in ("", f"--reg amhe {ALL}")],  # Table 4
    *[f"{CIRCLE} {method}" for method in ("--method simclr", "", "--reg uniform", "--reg mhe")],  # Figure 3
    *[f"{CIRCLE} --norm none {reg}" for reg in ("", f"--reg mhe {ALL}")],  # Figure 7
]
TRIAL = {"model": "test_resnet", "hidden_dim": "32", "batch_size": "32", "lr": "0.5"}  # where the list says nothing
SHORT = ["--epochs=1", "--batch_size=32"]  # of a trial's linear evaluation


def reproduce(
    *,
    dataset: str = "cifar10",
    data_dir: str = "data",
    folder: str = "runs/cifar10",
    results: str = "results/cifar10",
    precision: Literal["no", "bf16", "fp16"] = "no",
    compile: bool = False,
    trial: bool = False,
):
    """Do what is left of the list of runs.

    Args:
        dataset: as in pretrain.py; a copy of CIFAR-10 as a folder of pictures is one, too
        data_dir: as in pretrain.py
        folder: the folder of the run folders
        results: the folder that logs and table are copied to
        precision: of pre-training, as in accelerate launch --mixed_precision
        compile: pre-train as with accelerate launch --dynamo_backend inductor
        trial: runs of 1 to 3 epochs of a tiny network, to see that the list runs through on this machine and data set
    """
    environment = {"ACCELERATE_MIXED_PRECISION": precision} | (
        {"ACCELERATE_DYNAMO_BACKEND": "INDUCTOR"} if compile else {}
    )
    failed = []
    for number, words in enumerate(PLAN, 1):
        flags = {"dataset": dataset, "data_dir": data_dir, **(TRIAL if trial else {}), **pairs(words)}
        if trial:
            flags["epochs"] = str(int(flags["epochs"]) // 100 or flags["epochs"])
        run = Path(folder, name_of(words))
        done = progress(run, flags)
        stages = {"pretrain": [HERE / "pretrain.py", *(f"--{name}={x}" for name, x in flags.items()), f"--out={run}"]}
        if "eval_every" not in flags:
            stages["knn_eval"] = [HERE / "knn_eval.py", run / runs.CKPT]
            stages["linear_eval"] = [HERE / "linear_eval.py", run / runs.CKPT, *SHORT * trial]
        for name, command in stages.items():
            if name in done:
                continue
            print(f"[{number} of {len(PLAN)}] python {shlex.join(map(str, command))}", file=sys.stderr, flush=True)
            if code := child(command, environment if name == "pretrain" else {}):
                failed.append(f"{run} (exit code {code})")
                if not (run / runs.LOG).exists():  # it never began, and no other would
                    raise cli.UsageError(f"the list stops at {failed[-1]}, for the reason above")
                break
        if not stages.keys() <= done and (code := collect(Path(folder), Path(results))):
            failed.append(f"{results}/table.md (exit code {code})")
    if failed:
        raise cli.UsageError(f"failed, and tried again by the same command: {', '.join(failed)}")
    print(f"all {len(PLAN)} runs are done; {results}/table.md is their table", file=sys.stderr)


def pairs(words: str) -> dict[str, str]:
    """Flags as they are typed, by name."""
    typed = words.split()
    return {name.removeprefix("--"): value for name, value in zip(typed[::2], typed[1::2])}


def name_of(words: str) -> str:
    """The folder of a run: its flags."""
    return "-".join(f"{name}-{value}".replace(",", "+") for name, value in pairs(words).items())


def progress(run: Path, flags: dict[str, str]) -> set[str]:
    """The stages that a run with these flags has behind it; none of a folder with others, which pretrain.py refuses."""
    try:
        log = runs.read(run)
        with safe_open(run / runs.CKPT, "pt") as file:
            trained = json.loads(file.metadata()["description"])["epoch"] == log.settings["epochs"]
    except (runs.RunError, SafetensorError, OSError, ValueError, LookupError, TypeError):
        return set()
    parameters = inspect.signature(pretrain).parameters
    meant = {name: flag.default for name, flag in parameters.items() if flag.default is not None and name not in HOW}
    meant |= cli.read([f"--{name}={x}" for name, x in flags.items()], parameters)
    if not trained or any(log.settings.get(name) != json.loads(json.dumps(x)) for name, x in meant.items()):
        return set()
    voted = any(r["stage"] == "knn_eval" and r.get("trained_epochs") == log.settings["epochs"] for r in log.rows)
    probed = log.score("linear_eval") is not None
    return {"pretrain", *["knn_eval"] * voted, *["linear_eval"] * probed}


def child(command: list, environment: dict[str, str]) -> int:
    """Run a stage to its end, with these variables of the environment beside those of this process; its exit code.

    A signal is passed on to it, and Stopped is raised once it has ended.
    """
    caught, children = [], []

    def pass_on(number: int, _) -> None:  # and not wait here: whoever waits below holds a lock
        caught.append(signal.Signals(number))
        for process in children:
            process.send_signal(number)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        typed = [sys.executable, *command]
        variables = {**os.environ, "PYTHONPATH": str(HERE), **environment}
        children.append(subprocess.Popen(list(map(str, typed)), env=variables, start_new_session=True))
        code = children[0].wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    if caught:
        raise cli.Stopped(f"{caught[0].name}; the same command goes on", 128 + caught[0])
    return code


def collect(folder: Path, results: Path) -> int:
    """Copy the logs of all runs that have an epoch behind them, and make their table; the exit code of figures.py."""
    found = []
    for log in sorted(folder.glob(f"*/{runs.LOG}")):
        with contextlib.suppress(runs.RunError):
            if any("loss" in row for row in runs.read(log.parent).rows):
                copy = results / log.parent.name / runs.LOG
                copy.parent.mkdir(parents=True, exist_ok=True)
                with models.whole(copy) as file:
                    file.write(log.read_bytes())
                found.append(copy.parent)
    return child([HERE / "tools" / "figures.py", "table", *found, f"--out={results}"], {}) if found else 0


if __name__ == "__main__":
    cli.run(reproduce, models.ModelError, runs.RunError)
