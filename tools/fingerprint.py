"""Digests of what six short runs compute: equal before and after a change that must change no result.

    python -m tools.fingerprint > before.txt
    python -m tools.fingerprint > after.txt && diff before.txt after.txt
    python -m tools.fingerprint --check results/fingerprint.json

Each run is started by its command line, on one thread of the CPU, so that this file needs to know no other. A digest
covers the names and bytes of the tensors of a file, or the rows of a log without what depends on the clock, the command
and the commit. The digests depend on the processor and on the versions of the packages.

--check holds on any processor: it trains the runs of a file again, a step an epoch, and compares the loss of each step
with the stored one. They may differ by the file's tolerance, a part of the loss, or of 1 if that is more: another
processor rounds otherwise. On the processor and with the torch that the file names they have to be the same bits.
"""

import contextlib
import hashlib
import itertools
import json
import math
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
from torchvision.io import write_jpeg

import data
from harness import checkpoint
from lib import cli
from lib.errors import InputError
from lib.files import CKPT, LOG, WEIGHTS, write_whole
from lib.log import read_rows
from pretrain import pretrain

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
    check: Annotated[str, "file of losses to compare with; exit code 1 if one differs"] | None = None,
    store: Annotated[str, "file whose losses are replaced by those of this processor"] | None = None,
):
    """Print one line for each file of each run: run, file, digest; or check or store the losses of a file's runs."""
    if check and store:
        raise InputError("--store: replaces what --check compares with; give one of the two")
    if check or store:
        compare_losses(Path(check or store), replaces=bool(store))
        return
    with tempfile.TemporaryDirectory() as place:
        make_pictures(Path(place, "pictures"))
        for name, flags in RUNS.items():
            run = Path(place, name)
            if name == "killed":
                process = launch("pretrain.py", f"{flags} --out {run}", place, subprocess.PIPE)
                for line in process.stdout:
                    if '"epoch": 1, ' in line:
                        process.kill()
                        break
                process.wait()
            if launch("pretrain.py", f"{flags} --out {run}", place).wait():
                sys.exit(f"{name}: did not end well")
            for script, judge_flags in JUDGES.items():
                launch(script, f"{run / CKPT} {judge_flags}", place).wait()
            for file in (CKPT, WEIGHTS):
                print(f"{name:10} {file:25} {digest_of_tensors(run / file)}", flush=True)
            print(f"{name:10} {LOG:25} {digest_of_rows(run / LOG, place)}", flush=True)


def launch(script: str, flags: str, folder: str, stdout: int = subprocess.DEVNULL) -> subprocess.Popen:
    """Start a stage in a folder, as a process on one thread of the CPU."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / script), *flags.split()]
    nothing = subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=stdout, stderr=nothing, text=True)


def make_pictures(folder: Path, heights: tuple[int, int] = (32, 24)) -> None:
    """Write JPEG files of two heights and three classes: parts of the embedded photographs."""
    photos = data.load("photos")
    for part, split, count in (("train", photos.train, 16), ("test", photos.test, 6)):
        for label in range(3):
            place = folder / part / photos.classes[label]
            place.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                write_jpeg(image[:, : heights[i % 2]].contiguous(), str(place / f"{i:02}.jpg"))


def digest_of_tensors(path: Path) -> str:
    """Digest of names, types, shapes and bytes of all tensors of a safetensors file."""
    tensors, _ = checkpoint.load_file(path)
    return checkpoint.digest(tensors, {})[:16]


def digest_of_rows(path: Path, place: str) -> str:
    """Digest and number of the rows of a log, without what depends on the clock, the command and the folder."""
    rows = []
    for line in path.read_text().replace(place, "").splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if name not in NOT_COMPARED})
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return f"{digest[:16]} ({len(rows)} rows)"


# ---- Stored losses ---------------------------------------------------------------------------------------------------
def compare_losses(path: Path, replaces: bool) -> None:
    """Train a file's runs, on one thread of the CPU, and name the first loss of each that differs; or store them."""
    try:
        stored = json.loads(path.read_text())
        flags = {name: f"{stored['flags']} {run['flags']}" for name, run in stored["runs"].items()}
        losses = {name: [float(word) for word in run["losses"].split()] for name, run in stored["runs"].items()}
        is_named = stored["processor"] == processor()
        tolerance = 0.0 if is_named else float(stored["tolerance"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: no file of losses such as results/fingerprint.json ({e!r})") from e
    os.environ["ACCELERATE_USE_CPU"] = "true"
    torch.set_num_threads(1)
    largest, different = 0.0, set()
    with tempfile.TemporaryDirectory() as place:
        make_pictures(Path(place, "pictures"))
        make_pictures(Path(place, "patches"), heights=(32, 32))  # of one size: read whole, not in every epoch
        for name in flags:
            found = losses_of(flags[name], Path(place), name)
            pairs = itertools.zip_longest(found, found if replaces else losses[name], fillvalue=math.inf)
            for step, (new, old) in enumerate(pairs, 1):
                change = abs(new - old) / min(max(1, abs(old)), 1e9)  # infinite where one is missing
                largest = max(largest, change)
                if change > tolerance and name not in different:
                    different.add(name)
                    print(f"{name}, step {step}: loss {new}, stored {old}", flush=True)
            stored["runs"][name]["losses"] = " ".join(map(str, found))
    if replaces:
        with write_whole(path) as file:
            file.write(json.dumps({**stored, "processor": processor()}, indent=1).encode() + b"\n")
        print(path)
        return
    which = "the processor that" if is_named else "another processor than"
    allowed = f"allowed {tolerance:g} on {which} the file names"
    print(f"{len(different)} of {len(flags)} runs differ; largest difference {largest:.1e}, {allowed}")
    sys.exit(len(different) > 0)


def processor() -> str:
    """Name what the bits of a loss depend on: the processor, its vector instructions and the version of torch."""
    names = [platform.processor()]
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():  # Linux; several processors are called AMD EPYC
        facts = dict(re.findall("^(model name|cpu family|model)\\s*: (.*)", cpuinfo.read_text(), re.M))
        names = [f"{name} {value}" for name, value in facts.items()]
    return ", ".join([*names, torch.backends.cpu.get_cpu_capability(), f"torch {torch.__version__}"])


def losses_of(flags: str, folder: Path, name: str) -> list[float]:
    """Train by flags in a folder, in this process and with nothing printed, and return the loss of each epoch."""
    values = cli.values_of([*flags.split(), "--out", name], pretrain)
    with (
        open(os.devnull, "w") as nowhere,
        contextlib.redirect_stdout(nowhere),
        contextlib.redirect_stderr(nowhere),
        contextlib.chdir(folder),
    ):
        pretrain(**values)
    return [row["loss"] for row in read_rows(folder / name) if "loss" in row]


if __name__ == "__main__":
    cli.run(fingerprint)
