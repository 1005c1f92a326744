"""Runs that are killed at random moments, and go on: a longer trial, by hand, of what tests/test_resume.py tests.

    python -m tools.trial --runs 20 --signal_name SIGKILL

Each run trains on photos by a process of its own, which is killed once to three times at moments drawn from the length
of a run that nothing stops, the start of Python included, and started again with the same command. Every one has to end
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

import fire
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))
import models  # noqa: E402

FLAGS = "--model test_resnet --hidden_dim 64 --out_dim 16 --batch_size 250 --epochs 2 --save_every 3 --eval_every 2"


def trial(runs: int = 20, signal_name: str = "SIGKILL", seed: int = 0):
    """Kill `runs` runs by SIGKILL or SIGTERM and compare how they end with one that nothing stopped."""
    draw, number, kills, hit, wrong = random.Random(seed), signal.Signals[signal_name], 0, 0, 0
    with tempfile.TemporaryDirectory() as place:
        start = time.perf_counter()
        assert train(Path(place, "whole")).wait() == 0
        length = time.perf_counter() - start
        for i in range(runs):
            run, codes = Path(place, str(i)), []
            for _ in range(draw.randint(1, 3)):
                process = train(run)
                time.sleep(draw.uniform(0, 0.8 * length))
                process.send_signal(number)
                codes.append(process.wait())
            codes.append(train(run).wait())
            kills += sum(code != 0 for code in codes)
            hit += any(codes)
            same = codes[-1] == 0 and ending(run) == ending(Path(place, "whole"))
            wrong += not same
            print(f"run {i}: exit codes {codes}, {'the same bits' if same else 'DIFFERENT'}", flush=True)
    print(f"{runs} runs, {hit} of them stopped, {kills} times in all, by {signal_name}; {runs - wrong} the same bits")
    sys.exit(wrong > 0)


def train(run: Path) -> subprocess.Popen:
    """The process that starts, or goes on with, a run."""
    command = [sys.executable, ROOT / "pretrain.py", *FLAGS.split(), "--out", run]
    return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=os.environ)


def ending(run: Path) -> tuple:
    """Names of the files, digests of the tensors, and the rows without the clock's."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rows = [{k: x for k, x in row.items() if k not in ("images_per_s", "command")} for row in rows]
    tensors = [models.load(run / f"{name}.safetensors")[0] for name in ("ckpt", "encoder")]
    assert all(x.isfinite().all() for x in tensors[0].values() if x.dtype == torch.float32)
    return sorted(p.name for p in run.iterdir()), [models.digest(x, {}) for x in tensors], rows


if __name__ == "__main__":
    fire.Fire(trial)
