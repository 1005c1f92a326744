"""The paper's claim on CIFAR-10, run after run: pre-train, judge by both judges, and make the table of what there is.

    python -m tools.reproduce --precision bf16                          # 100 to 300 epochs a run; wants a GPU
    python -m tools.reproduce --plan cpu --dataset path/to/pictures     # 20 epochs of a small network a run
    python -m tools.reproduce --dataset path/to/pictures --trial --folder runs/trial
    CUDA_VISIBLE_DEVICES=1 python -m tools.reproduce --part 2/4         # and the other three parts beside it

Runs come in the order in which they tell most. Stop it at any time: the same command goes on with what is left. After
each run, `results` holds the logs of all and the table that tools.figures makes of them.
"""

import os
import re
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

from harness.settings import NOT_SETTINGS
from lib import cli
from lib.errors import InputError, Stopped
from lib.files import CKPT, LOG, write_whole
from lib.log import as_json
from pretrain import pretrain
from tools.logs import read_log
from tools.paper import is_row
from tools.table import is_finished

ROOT = Path(__file__).parent.parent
ALL = "--reg_on encoder,projector,predictor"
FIVE = ("", "--reg uniform", "--reg mhe", "--reg amhe", "--method simclr")
CIRCLE = "--model alexnet --out_dim 2 --epochs 100"
PLAN = [
    *["--epochs 2 --eval_every 0"],  # images a second, in the log's last row
    *[f"{method} --epochs 100" for method in FIVE],  # Table 3's methods and mhe, a third of Appendix B.2's epochs
    *[f"{method} --epochs 300" for method in ("", "--reg amhe")],  # Table C.7's first and last row
    *[f"{method} --epochs 100 --seed {seed}" for seed in (1, 2) for method in FIVE],
    *[f"{method} --epochs 100 --accumulate 8" for method in ("", "--reg uniform", "--reg amhe")],  # Figure 8
    *[f"--norm none --epochs 100 {reg}" for reg in ("", f"--reg amhe {ALL}")],  # Table 4
    *[f"{CIRCLE} {method}" for method in ("--method simclr", "", "--reg uniform", "--reg amhe")],  # Figure 3
    *[f"{CIRCLE} --norm none {reg}" for reg in ("", "--reg amhe --reg_on encoder,projector")],  # Figure 7
]
SMALL = "--recipe folder --model test_resnet --stem stride2 --epochs 20 --eval_every 5"
CPU_PLAN = [
    *[f"{SMALL} {method} --seed {seed}" for seed in (0, 1, 2) for method in FIVE],
    *[f"{SMALL} {method} --accumulate 8" for method in ("", "--reg amhe", "--reg uniform")],  # Figure 8
    *[f"{SMALL} --norm none {reg}" for reg in ("", f"--reg amhe {ALL}")],  # Table 4
]
QUARTER_PLAN = [f"{method} --epochs 30" for method in ("", "--reg amhe", "--reg uniform", "--method simclr")]
PLANS = {"gpu": PLAN, "cpu": CPU_PLAN, "quarter": QUARTER_PLAN}
TRIAL = {"model": "test_resnet", "hidden_dim": "32", "batch_size": "32", "lr": "0.5"}  # where the list says nothing
SHORT_PROBE = ["--epochs=1", "--batch_size=32"]  # the linear evaluation of a trial


def reproduce(
    *,
    dataset: Annotated[str, "as in pretrain.py; a copy of CIFAR-10 as a folder of pictures will do"] = "cifar10",
    data_dir: Annotated[str, "as in pretrain.py"] = "data",
    plan: Annotated[
        Literal[tuple(PLANS)], "the paper's setting, one for two cores, or for a quarter of an hour of a GPU"
    ] = "gpu",
    part: Annotated[str, "2/4: only the second of four parts, for four processes side by side"] = "1/1",
    folder: Annotated[str, "the folder of the run folders"] = "runs/cifar10",
    results: Annotated[str, "the folder that logs and table are copied to; None = --folder and -table"] | None = None,
    precision: Annotated[Literal["no", "bf16", "fp16"], "of pre-training, as accelerate's --mixed_precision"] = "no",
    trial: Annotated[bool, "runs of 1 to 3 epochs of a tiny network, to see that the list runs through"] = False,
):
    """Do what is left of the list of runs, or of a part of it."""
    runs = PLANS[plan]
    results = results or f"{folder.rstrip('/')}-table"
    match = re.fullmatch(r"([1-9][0-9]{0,3})/([1-9][0-9]{0,3})", part)
    first, parts = map(int, match.groups()) if match else (1, 0)
    if not first <= parts <= len(runs):
        expected = f"the number of a part and how many parts there are, at most {len(runs)}, as 2/4"
        raise InputError(f"--part {part[:40]}: expected {expected}")
    own = list(enumerate(runs, 1))[first - 1 :: parts]  # so that each part begins with what tells most
    # without a precision no variable: it also says that a launcher has set the number of threads
    environment = {} if precision == "no" else {"ACCELERATE_MIXED_PRECISION": precision}
    probe = ["--cached"] if plan == "quarter" else []  # flags of the linear evaluation
    probe += SHORT_PROBE if trial else []
    failed = []
    if plan == "quarter" and first == 1:
        failed += time_steps(Path(results), environment, seconds=1 if trial else 4)
    for number, words in own:
        flags = flags_of(words, dataset, data_dir, trial)
        run = Path(folder, name_of(words))
        done = stages_done(run, flags, bool(probe))
        commands = commands_of(run, flags, probe)
        left = {stage: command for stage, command in commands.items() if stage not in done}
        for stage, command in left.items():
            print(f"[{number} of {len(runs)}] python {shlex.join(command)}", file=sys.stderr, flush=True)
            exit_code = run_child(command, environment if stage == "pretrain" else {})
            if exit_code:
                failed.append(f"{run} (exit code {exit_code})")
                if not (run / LOG).exists():  # it never began, so no other run would
                    raise InputError(f"the list stops at {failed[-1]}, for the reason above")
                break
        if left:
            exit_code = collect(Path(folder), Path(results), runs)
            if exit_code:
                failed.append(f"{results}/table.md (exit code {exit_code})")
    if failed:
        raise InputError(f"failed, and tried again by the same command: {', '.join(failed)}")
    end = f"all {len(runs)} runs are done" if parts == 1 else f"part {part} is done, {len(own)} of {len(runs)} runs"
    print(f"{end}; {results}/table.md is the table of all there are", file=sys.stderr)


def time_steps(results: Path, environment: dict[str, str], seconds: int) -> list[str]:
    """Time a step eagerly and as Inductor compiles it, unless a table of it is there; return what failed."""
    failed = []
    for backend in ("no", "inductor"):
        table = results / f"step-{backend}.md"
        if not table.exists():
            command = [str(ROOT / "tools" / "bench.py"), "--only=step", f"--seconds={seconds}", f"--out={table}"]
            if run_child(command, environment | {"ACCELERATE_DYNAMO_BACKEND": backend}):
                failed.append(str(table))
    return failed


def flags_of(words: str, dataset: str, data_dir: str, trial: bool) -> dict[str, str]:
    """Return the flags of a run of the list; a trial's network is tiny and it has 1 to 3 epochs."""
    flags = {"dataset": dataset, "data_dir": data_dir, "recipe": "cifar10-300"}  # a folder would take another recipe
    flags |= (TRIAL if trial else {}) | as_typed(words)
    if trial:
        epochs = int(flags["epochs"])
        flags["epochs"] = str(epochs // 100 or min(epochs, 2))
    return flags


def as_typed(words: str) -> dict[str, str]:
    """Return the flags of a command line by name: "--epochs 2 --seed 1"."""
    typed = words.split()
    return {name.removeprefix("--"): value for name, value in zip(typed[::2], typed[1::2])}


def name_of(words: str) -> str:
    """Name the folder of a run by its flags, with "cpu" for those of SMALL."""
    parts = ["cpu"] if words.startswith(SMALL) else []
    parts += [f"{name}-{value}" for name, value in as_typed(words.removeprefix(SMALL)).items()]
    return "-".join(parts).replace(",", "+")


def commands_of(run: Path, flags: dict[str, str], probe: list[str]) -> dict[str, list[str]]:
    """Return the command of each stage of a run; a run without k-NN rows is not judged."""
    typed = [f"--{name}={value}" for name, value in flags.items()]
    commands = {"pretrain": [str(ROOT / "pretrain.py"), *typed, f"--out={run}"]}
    if flags.get("eval_every") != "0":
        commands["knn_eval"] = [str(ROOT / "knn_eval.py"), str(run / CKPT)]
        commands["linear_eval"] = [str(ROOT / "linear_eval.py"), str(run / CKPT), *probe]
    return commands


def stages_done(run: Path, flags: dict[str, str], has_own_probe: bool) -> set[str]:
    """Return the stages that a run with these flags has behind it: none if its folder holds a run with other flags."""
    try:
        log = read_log(run)
    except InputError:
        return set()
    if not is_finished(log) or not has_settings(log.settings, flags):
        return set()
    epochs = log.settings["epochs"]
    judged = {row["stage"] for row in log.rows if row.get("trained_epochs") == epochs and "top5" in row}
    if log.score("linear_eval") is None and not has_own_probe:  # one of another protocol is no score
        judged.discard("linear_eval")
    # without a judge's row pretrain.py is asked, too: it ends at once, unless it was killed before its last checkpoint
    is_judged = judged >= {"knn_eval", "linear_eval"} or flags.get("eval_every") == "0"
    return judged | {"pretrain"} if is_judged else judged


def has_settings(settings: dict, flags: dict[str, str]) -> bool:
    """Whether a run has the settings that its flags, and the defaults of the others, ask for."""
    typed = [f"--{name}={value}" for name, value in flags.items()]
    wanted = pretrain.__kwdefaults__ | cli.values_of(typed, pretrain)
    idle = (*NOT_SETTINGS, "data_dir")  # the set may have moved
    return is_row(settings, as_json({x: value for x, value in wanted.items() if value is not None and x not in idle}))


def run_child(command: list[str], environment: dict[str, str]) -> int:
    """Run a script to its end, with these environment variables beside those of this process; return its exit code.

    A signal is passed on to it, and Stopped is raised once it has ended.
    """

    def stop(number: int, _frame) -> None:
        raise Stopped(f"{signal.Signals(number).name}; the same command goes on", 128 + number)

    paths = filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))  # a child finds the packages that we find
    variables = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), **environment}
    handlers = {number: signal.signal(number, stop) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        # in a session of its own, so that Ctrl-C reaches it once; leaving the block waits for its end
        with subprocess.Popen([sys.executable, *command], env=variables, start_new_session=True) as child:
            try:
                return child.wait()
            except Stopped as e:
                _, exit_code = e.args
                child.send_signal(exit_code - 128)
                raise
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def collect(folder: Path, results: Path, runs: list[str]) -> int:
    """Copy the logs of the runs that have an epoch behind them, and make their table; return its exit code."""
    copies = []
    for run in (folder / name_of(words) for words in runs):
        try:
            rows = read_log(run).rows
        except InputError:  # it has not begun, or is not ours
            continue
        if any("loss" in row for row in rows):
            copy = results / run.name
            with write_whole(copy / LOG) as file:  # another part may read it
                file.write((run / LOG).read_bytes())
            copies.append(str(copy))
    if not copies:
        return 0
    return run_child([str(ROOT / "tools" / "figures.py"), "table", *copies, f"--out={results}"], {})


if __name__ == "__main__":
    cli.run(reproduce)
