"""Runs that are killed at random moments, and go on: a longer trial, by hand, of what tests/test_resume.py tests.

    python -m tools.trial --runs 20 --signal_name SIGKILL

Each run is killed once to three times, at moments drawn from the length of a run that nothing stops, the start of
Python included, and started again by the same command. Every one has to end in the tensors and, but for the clock's,
in the rows of that run. Prints one line a run; exit code 1 if one differs.
"""

import random
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Annotated, Literal

from lib import cli
from lib.files import CKPT, LOG, WEIGHTS
from tools.fingerprint import RUNS, digest_of_rows, digest_of_tensors, launch

FLAGS = f"{RUNS['killed']} --out"


def trial(
    *,
    runs: Annotated[int, ">= 1", "how many are killed"] = 20,
    signal_name: Annotated[Literal["SIGKILL", "SIGTERM"], "what kills them"] = "SIGKILL",
    seed: Annotated[int, ">= 0", "of the moments"] = 0,
):
    """Kill runs at random moments and compare how they end with one that nothing stopped."""
    generator = random.Random(seed)
    kills, different = 0, 0
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        if launch("pretrain.py", f"{FLAGS} whole", place).wait():
            sys.exit("the run that nothing stops did not end well")
        length = time.perf_counter() - begun
        whole = ending(Path(place, "whole"))
        for i in range(runs):
            flags, codes = f"{FLAGS} {i}", []
            for _ in range(generator.randint(1, 3)):
                process = launch("pretrain.py", flags, place)
                time.sleep(generator.uniform(0, 0.8 * length))
                process.send_signal(signal.Signals[signal_name])
                codes.append(process.wait())
            codes.append(launch("pretrain.py", flags, place).wait())
            is_same = codes[-1] == 0 and ending(Path(place, str(i))) == whole
            kills += sum(code != 0 for code in codes)
            different += not is_same
            print(f"run {i}: exit codes {codes}, {'the same bits' if is_same else 'DIFFERENT'}", flush=True)
    print(f"{runs} runs, stopped {kills} times in all by {signal_name}; {different} differ")
    sys.exit(different > 0)


def ending(run: Path) -> list[str]:
    """Return the names of a run's files, and the digests of its tensors and rows."""
    names = sorted(str(path.relative_to(run)) for path in run.rglob("*"))
    digests = [digest_of_tensors(run / file) for file in (CKPT, WEIGHTS)]
    return [*names, *digests, digest_of_rows(run / LOG, str(run))]


if __name__ == "__main__":
    cli.run(trial)
