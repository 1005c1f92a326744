"""Digests of what six short runs compute: equal before and after a change that must change no result.

    python -m tools.fingerprint > before.txt
    python -m tools.fingerprint > after.txt && diff before.txt after.txt

Each run is started by its command line, on one thread of the CPU, so that this file needs to know no other. A digest
covers the names and bytes of the tensors of a file, or the rows of a log without what depends on the clock, the command
and the commit. The digests depend on the processor and on the versions of the packages.
"""

import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
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


def fingerprint():
    """Print one line for each file of each run: run, file, digest."""
    with tempfile.TemporaryDirectory() as place:
        make_pictures(Path(place, "pictures"))
        for name, flags in RUNS.items():
            run = Path(place, name)
            if name == "killed":
                process = launch("pretrain.py", f"{flags} --out {run}", place)
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


def launch(script: str, flags: str, folder: str) -> subprocess.Popen:
    """Start a stage in a folder, as a process on one thread of the CPU, with its standard output to read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / script), *flags.split()]
    pipe, nothing = subprocess.PIPE, subprocess.DEVNULL
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=nothing, text=True)


def make_pictures(folder: Path) -> None:
    """Write JPEG files of two sizes and three classes: parts of the embedded photographs."""
    photos = data.load("photos")
    for part, split, count in (("train", photos.train, 16), ("test", photos.test, 6)):
        for label in range(3):
            place = folder / part / photos.classes[label]
            place.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                height = 24 if i % 2 else 32
                write_jpeg(image[:, :height].contiguous(), str(place / f"{i:02}.jpg"))


def digest_of_tensors(path: Path) -> str:
    """Digest of names, types, shapes and bytes of all tensors of a safetensors file."""
    sha = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(tensor.contiguous().reshape(-1).view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def digest_of_rows(path: Path, place: str) -> str:
    """Digest and number of the rows of a log, without what depends on the clock, the command and the folder."""
    rows = []
    for line in path.read_text().replace(place, "").splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if name not in NOT_COMPARED})
    digest = hashlib.sha256(json.dumps(rows, sort_keys=True).encode()).hexdigest()
    return f"{digest[:16]} ({len(rows)} rows)"


if __name__ == "__main__":
    cli.run(fingerprint)
