"""Runs that are killed at random moments, and go on: a longer trial, by hand, of what tests/test_resume.py tests.

    python -m tools.trial --runs 20 --signal_name SIGKILL

Each run trains on photos in a process of its own, which is killed once to three times at moments drawn from the length
of a run that nothing stops, the start of Python included, and started again by the same command. Every one has to end
in the tensors and, but for the clock's, in the rows of that run. Prints one line a run; exit code 1 if one differs.
"""

import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

import torch

from harness import checkpoint
from lib import cli
from lib.files import CKPT, LOG, WEIGHTS
from tools.fingerprint import NOT_COMPARED

ROOT = Path(__file__).parent.parent
FLAGS = (
    "--model test_resnet --hidden_dim 64 --out_dim 16 --batch_size 250 --epochs 2 --save_every 3steps --eval_every 2"
)


def trial(
    *,
    runs: Annotated[int, ">= 1", "how many are killed"] = 20,
    signal_name: Annotated[Literal["SIGKILL", "SIGTERM"], "what kills them"] = "SIGKILL",
    seed: Annotated[int, ">= 0", "of the moments"] = 0,
):
    """Kill runs at random moments and compare how they end with one that nothing stopped."""
    generator = random.Random(seed)
    number = signal.Signals[signal_name]
    stopped, kills, different = 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        assert train(Path(place, "whole")).wait() == 0
        length = time.perf_counter() - start
        whole = ending(Path(place, "whole"))
        for i in range(runs):
            run = Path(place, str(i))
            codes = []
            for _ in range(generator.randint(1, 3)):
                process = train(run)
                time.sleep(generator.uniform(0, 0.8 * length))
                process.send_signal(number)
                codes.append(process.wait())
            codes.append(train(run).wait())
            is_same = codes[-1] == 0 and ending(run) == whole
            kills += sum(code != 0 for code in codes)
            stopped += any(codes)
            different += not is_same
            print(f"run {i}: exit codes {codes}, {'the same bits' if is_same else 'DIFFERENT'}", flush=True)
    print(f"{runs} runs, {stopped} of them stopped, {kills} times in all, by {signal_name}; {different} differ")
    sys.exit(different > 0)


def train(run: Path) -> subprocess.Popen:
    """Start, or go on with, a run in a process."""
    command = [sys.executable, str(ROOT / "pretrain.py"), *FLAGS.split(), "--out", str(run)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}  # a GPU may round otherwise each time
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def ending(run: Path) -> tuple:
    """Return the names of a run's files, the digests of its tensors, and its rows without the clock's numbers."""
    rows = []
    for line in (run / LOG).read_text().splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if name not in NOT_COMPARED})
    digests = []
    for file in (CKPT, WEIGHTS):
        tensors, _ = checkpoint.load_file(run / file)
        assert all(x.isfinite().all() for x in tensors.values() if x.dtype == torch.float32)
        digests.append(checkpoint.digest(tensors, {}))
    return sorted(str(path.relative_to(run)) for path in run.rglob("*")), digests, rows


if __name__ == "__main__":
    cli.run(trial)
