"""Digests of what six short runs compute: equal before and after a change that must change no result.

    python -m tools.fingerprint > before.txt
    python -m tools.fingerprint > after.txt && diff before.txt after.txt
    python -m tools.fingerprint --trials 20 --signal_name SIGKILL

Each run is started by its command line, on one thread of the CPU, so that this file needs to know no other. A digest
covers the names and bytes of the tensors of a file, or the rows of a log without what depends on the clock, the command
and the commit. The digests depend on the processor and on the versions of the packages.

--trials is a longer trial, by hand, of what tests/test_resume.py tests: each run is killed once to three times, at
moments drawn from the length of a run that nothing stops, the start of Python included, and started again by the same
command. It has to end in the files and digests of that run. Prints one line a run; exit code 1 if one differs.
"""

import hashlib
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

from safetensors.torch import load_file
from safetensors.torch import save as to_bytes
from torchvision.io import write_jpeg

import data
from lib import cli
from lib.files import CKPT, LOG, WEIGHTS

ROOT = Path(__file__).parent.parent
SMALL = "--model test_resnet --hidden_dim 32 --out_dim 16 --batch_size 250 --epochs 2 --eval_every 1 --lr 2"
RUNS = {
    "amhe": f"{SMALL} --reg amhe --s 2",
    "uniform": f"{SMALL} --reg uniform --accumulate 2",
    "simclr": f"{SMALL} --method simclr --reg mhe --s 1 --holdout",
    "no-norm": f"{SMALL} --norm none --reg amhe --reg_on encoder,projector,predictor",
    "streamed": "--dataset pictures --model test_resnet --hidden_dim 32 --out_dim 16 --batch_size 16 --epochs 2 --lr 2",
    "killed": f"{SMALL} --reg mhe --save_every 3steps",
}
JUDGES = {"knn_eval.py": "--k 5,20", "linear_eval.py": "--epochs 2"}
NOT_COMPARED = ("images_per_s", "command", "git")


def fingerprint(
    *,
    trials: Annotated[int, ">= 0", "in place of digests, runs that are killed at random moments"] = 0,
    signal_name: Annotated[Literal["SIGKILL", "SIGTERM"], "what kills them"] = "SIGKILL",
    seed: Annotated[int, ">= 0", "of the moments"] = 0,
):
    """Print one line for each file of each run: run, file, digest. Or kill runs, and compare how they end."""
    with tempfile.TemporaryDirectory() as place:
        if trials:
            sys.exit(trial(place, trials, signal.Signals[signal_name], random.Random(seed)))
        make_pictures(Path(place, "pictures"))
        for name, flags in RUNS.items():
            flags += f" --out {name}"
            if name == "killed":
                process = launch("pretrain.py", flags, place)
                for line in process.stdout:
                    if '"epoch": 1, ' in line:
                        break
                process.kill()
                process.wait()
            if launch("pretrain.py", flags, place).wait():
                sys.exit(f"{name}: did not end well")
            for script, judge_flags in JUDGES.items():
                launch(script, f"{name} {judge_flags}", place).wait()
            for file, digest in digests(Path(place, name)).items():
                print(f"{name:10} {file:25} {digest}", flush=True)


def trial(place: str, trials: int, kill: signal.Signals, generator: random.Random) -> int:
    """Kill runs at random moments and compare how they end with one that nothing stopped; return how many differ."""
    begun = time.perf_counter()
    if launch("pretrain.py", f"{RUNS['killed']} --out whole", place).wait():
        sys.exit("the run that nothing stops did not end well")
    length = time.perf_counter() - begun
    whole = digests(Path(place, "whole"))
    different = 0
    for i in range(trials):
        flags = f"{RUNS['killed']} --out {i}"
        codes = []
        for _ in range(generator.randint(1, 3)):
            process = launch("pretrain.py", flags, place)
            time.sleep(generator.uniform(0, 0.8 * length))
            process.send_signal(kill)
            codes.append(process.wait())
        codes.append(launch("pretrain.py", flags, place).wait())
        is_same = codes[-1] == 0 and digests(Path(place, str(i))) == whole
        different += not is_same
        print(f"run {i}: exit codes {codes}, {'the same bits' if is_same else 'DIFFERENT'}", flush=True)
    print(f"{trials} runs killed by {kill.name}, {different} differ")
    return min(different, 1)


def launch(script: str, flags: str, folder: str) -> subprocess.Popen:
    """Start a stage in a folder, as a process on one thread of the CPU, with its standard output to read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / script), *flags.split()]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def make_pictures(folder: Path) -> None:
    """Write 40 JPEG files of two sizes and ten classes, parts of the embedded photographs; a quarter is to test."""
    photos = data.load("photos").train
    for i, (image, label) in enumerate(zip(photos.images[::50], photos.labels[::50])):
        place = folder / ("test" if i % 4 == 0 else "train") / str(label.item())
        place.mkdir(parents=True, exist_ok=True)
        height = 24 if i % 2 else 32
        write_jpeg(image[:, :height].contiguous(), str(place / f"{i:02}.jpg"))


def digests(run: Path) -> dict[str, str]:
    """Name the files of a run, and return digests: of the tensors of two, and of the rows of its log."""
    found = {"files": " ".join(sorted(str(path.relative_to(run)) for path in run.rglob("*")))}
    for file in (CKPT, WEIGHTS):
        tensors = to_bytes(load_file(run / file))  # without the description
        found[file] = hashlib.sha256(tensors).hexdigest()[:16]
    rows = []
    for line in (run / LOG).read_text().splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if name not in NOT_COMPARED})
    text = json.dumps(rows, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return {**found, LOG: f"{digest[:16]} ({len(rows)} rows)"}


if __name__ == "__main__":
    cli.run(fingerprint)
