"""The paper's claim on CIFAR-10, run after run: pre-train, judge by both judges, and make the table of what there is.

    python reproduce.py --precision bf16                          # 100 to 300 epochs a run; wants a GPU
    python reproduce.py --dataset path/to/pictures --precision bf16
    python reproduce.py --dataset path/to/a/few --trial           # that the list runs through

Runs come in the order in which they tell most. Each command is printed before it starts. What is done is not done
again, and a run that was stopped goes on: stop it at any time, and give the same command. After each run, `results`
holds the logs of all and the table that figures.py makes of them; checkpoints stay in the folder of runs.
"""

import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Literal

import cli
import models
import runs

HERE = Path(__file__).parent
ALL = "--reg_on encoder,projector,predictor"
FIVE = ("", "--reg uniform", "--reg mhe", "--reg amhe", "--method simclr")
CIRCLE = "--model alexnet --out_dim 2 --epochs 100"
PLAN = [
    *["--epochs 2 --eval_every 0"],  # images a second, in the log's last row; with --compile in another folder
    *[f"{method} --epochs 100" for method in FIVE],  # Table 3's methods, at a third of Appendix B.2's 300 epochs
    *[f"{method} --epochs 300" for method in ("", "--reg amhe")],  # Table C.7's first and last row
    *[f"{method} --epochs 100 --seed {seed}" for seed in (1, 2) for method in FIVE],
    *[f"{method} --epochs 100 --accumulate 8" for method in ("", "--reg uniform", "--reg amhe")],  # Figure 8
    *[f"--norm none --epochs 100 {reg}" for reg in ("", f"--reg amhe {ALL}")],  # Table 4
    *[f"{CIRCLE} {method}" for method in ("--method simclr", "", "--reg uniform", "--reg mhe")],  # Figure 3
    *[f"{CIRCLE} --norm none {reg}" for reg in ("", f"--reg mhe {ALL}")],  # Figure 7
]
TRIAL = {"epochs": "1", "model": "test_resnet", "hidden_dim": "32", "batch_size": "32", "lr": "0.5"}
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
        precision: of pre-training, that of accelerate launch --mixed_precision
        compile: pre-train with accelerate launch --dynamo_backend inductor
        trial: one epoch of a tiny network a run, to see that the list runs through on this machine and data set
    """
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--quiet", "--mixed_precision", precision]
    launch += ["--dynamo_backend", "inductor"] if compile else []
    failed = []
    for number, words in enumerate(PLAN, 1):
        flags = {"dataset": dataset, "data_dir": data_dir, **pairs(words), **(TRIAL if trial else {})}
        run = Path(folder, name_of(words))
        typed = [f"--{name}={value}" for name, value in flags.items()]
        stages = [[*launch, HERE / "pretrain.py", *typed, f"--out={run}"]]
        stages += [[sys.executable, HERE / "knn_eval.py", run / runs.CKPT]]
        stages += [[sys.executable, HERE / "linear_eval.py", run / runs.CKPT, *SHORT * trial]]
        missing = [stage for stage, done in zip(stages, progress(run)) if not done]
        if "--eval_every 0" in words:
            missing = [stage for stage in missing if stage is stages[0]]
        for stage in missing:
            print(f"[{number} of {len(PLAN)}] {shlex.join(map(str, stage))}", file=sys.stderr, flush=True)
            if code := child(stage):
                failed.append(f"{run} (exit code {code})")
                break
        if missing:
            collect(Path(folder), Path(results))
    if failed:
        raise cli.UsageError(
            f"{len(failed)} of {len(PLAN)} runs failed, the same command tries again: {', '.join(failed)}"
        )
    print(f"all {len(PLAN)} runs are done; {results}/table.md is their table", file=sys.stderr)


def pairs(words: str) -> dict[str, str]:
    """Flags as they are typed, by name."""
    typed = words.split()
    return {name.removeprefix("--"): value for name, value in zip(typed[::2], typed[1::2])}


def name_of(words: str) -> str:
    """The folder of a run: its flags."""
    return "-".join(f"{name}-{value}".replace(",", "+") for name, value in pairs(words).items())


def progress(run: Path) -> tuple[bool, bool, bool]:
    """Whether a run is trained to its end, judged by k-NN, and by the linear probe."""
    try:
        done = runs.read(run)
    except runs.RunError:
        return False, False, False
    trained = any(row.get("epoch") == done.settings["epochs"] for row in done.rows if row["stage"] == "pretrain")
    judged = {row["stage"] for row in done.rows if row.get("of") == "trained" or "train" in row}
    return trained and (run / runs.CKPT).exists(), "knn_eval" in judged, "linear_eval" in judged


def child(command: list) -> int:
    """Run a command to its end; its exit code. A signal is passed on to all of its processes, and awaited."""
    process = subprocess.Popen(list(map(str, command)), start_new_session=True)

    def stop(number: int, _) -> None:
        os.killpg(process.pid, number)
        process.wait()
        raise cli.Stopped(f"{signal.Signals(number).name}; the same command goes on", 128 + number)

    before = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        return process.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def collect(folder: Path, results: Path) -> None:
    """Copy the logs of all runs that have an epoch behind them, and make their table."""
    found = []
    for log in sorted(folder.glob(f"*/{runs.LOG}")):
        if any("loss" in row for row in runs.read(log.parent).rows):
            copy = results / log.parent.name / runs.LOG
            copy.parent.mkdir(parents=True, exist_ok=True)
            with models.whole(copy) as file:
                file.write(log.read_bytes())
            found.append(copy.parent)
    if found:
        child([sys.executable, HERE / "figures.py", "table", *found, f"--out={results}"])


if __name__ == "__main__":
    cli.run(reproduce, models.ModelError, runs.RunError)
