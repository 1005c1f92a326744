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
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from safetensors import safe_open
from torchvision.io import write_jpeg

import data
from lib import cli

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
JUDGES = {"knn_eval.py": ["--k", "5,20"], "linear_eval.py": ["--epochs", "2"]}
NOT_COMPARED = ("images_per_s", "command", "git")


def fingerprint():
    """Print one line for each file of each run: run, file, digest."""
    with tempfile.TemporaryDirectory() as place:
        make_pictures(Path(place, "pictures"))
        for name, flags in RUNS.items():
            run = Path(place, name)
            if name == "killed":
                start(flags, run, kill_in_epoch=2)
            start(flags, run)
            for script, judge_flags in JUDGES.items():
                words = [str(run / "ckpt.safetensors"), *judge_flags]
                python(script, words, Path(place)).wait()
            for file in ("ckpt.safetensors", "encoder/model.safetensors"):
                print(f"{name:10} {file:25} {digest_of_tensors(run / file)}", flush=True)
            print(f"{name:10} {'metrics.jsonl':25} {digest_of_rows(run / 'metrics.jsonl', place)}", flush=True)


def start(flags: str, run: Path, kill_in_epoch: int | None = None) -> None:
    """Train in a run folder, to the end or until the row of an epoch appears."""
    words = [*flags.split(), "--out", str(run)]
    process = python("pretrain.py", words, run.parent)
    for line in process.stdout:
        if kill_in_epoch and f'"epoch": {kill_in_epoch - 1}, ' in line:
            process.send_signal(signal.SIGKILL)
            break
    code = process.wait()
    if code and not kill_in_epoch:
        sys.exit(f"{run.name}: exit code {code}")


def python(script: str, words: list[str], folder: Path) -> subprocess.Popen:
    """Start a stage as a process on one thread, with its standard output to read."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / script), *words]
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=subprocess.PIPE, text=True)


def make_pictures(folder: Path) -> None:
    """Write JPEG files of two sizes and three classes: parts of the embedded photographs."""
    photos = data.load("photos")
    for part, split, count in (("train", photos.train, 16), ("test", photos.test, 6)):
        for label in range(3):
            place = folder / part / photos.classes[label]
            place.mkdir(parents=True)
            images = split.images[split.labels == label][:count]
            for i, image in enumerate(images):
                height = 24 if i % 2 else 32
                part_of_image = image[:, :height].contiguous()
                write_jpeg(part_of_image, str(place / f"{i:02}.jpg"))


def digest_of_tensors(path: Path) -> str:
    """Digest of names, types, shapes and bytes of all tensors of a safetensors file."""
    sha = hashlib.sha256()
    with safe_open(path, "pt") as file:
        for name in sorted(file.keys()):
            tensor = file.get_tensor(name)
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            numbers = tensor.contiguous().reshape(-1)
            sha.update(numbers.view(torch.uint8).numpy())
    return sha.hexdigest()[:16]


def digest_of_rows(path: Path, place: str) -> str:
    """Digest and number of the rows of a log, without what depends on the clock, the command and the folder."""
    rows = []
    for line in path.read_text().replace(place, "").splitlines():
        row = json.loads(line)
        rows.append({name: x for name, x in row.items() if name not in NOT_COMPARED})
    text = json.dumps(rows, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    return f"{digest[:16]} ({len(rows)} rows)"


if __name__ == "__main__":
    cli.run(fingerprint)
