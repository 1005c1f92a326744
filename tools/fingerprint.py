"""Losses of the steps of six kinds of runs, compared with those that a file holds.

    python -m tools.fingerprint --check results/fingerprint.json
    cp results/fingerprint.json mine.json && python -m tools.fingerprint --store mine.json

--check holds on any processor: it trains the runs of a file again, a step an epoch, and compares the loss of each step
with the stored one. They may differ by the file's tolerance, a part of the loss, or of 1 if that is more: another
processor rounds otherwise. On the processor and with the torch that the file names they have to be the same bits.
--store replaces the losses of a file by those of this processor, for --check after a change that must change none.
"""

import contextlib
import itertools
import json
import math
import os
import platform
import re
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import torch
from torchvision.io import write_jpeg

import data
from lib import cli
from lib.errors import InputError
from lib.files import write_whole
from lib.log import read_rows
from pretrain import pretrain


def fingerprint(
    *,
    check: Annotated[str, "file of losses to compare with; exit code 1 if one differs"] | None = None,
    store: Annotated[str, "file whose losses are replaced by those of this processor"] | None = None,
):
    """Train the runs of a file anew, on one thread; name the first loss of each that differs, or store the losses."""
    if (check is None) == (store is None):
        raise InputError("--check, --store: give one of the two, with a file such as results/fingerprint.json")
    path, replaces = Path(check or store), store is not None
    try:
        stored = json.loads(path.read_text())
        flags = {name: f"{stored['flags']} {run['flags']}" for name, run in stored["runs"].items()}
        losses = {name: [float(word) for word in run["losses"].split()] for name, run in stored["runs"].items()}
        is_named = stored["processor"] == processor()
        tolerance = 0.0 if is_named else float(stored["tolerance"])
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as e:
        raise InputError(f"{path}: no file of losses such as results/fingerprint.json") from e
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


def make_pictures(folder: Path, heights: tuple[int, int] = (32, 24)) -> None:
    """Write JPEG files of two heights and three classes: parts of the embedded photographs."""
    photos = data.load("photos")
    for part, split, count in (("train", photos.train, 16), ("test", photos.test, 6)):
        for label in range(3):
            place = folder / part / photos.classes[label]
            place.mkdir(parents=True)
            for i, image in enumerate(split.images[split.labels == label][:count]):
                write_jpeg(image[:, : heights[i % 2]].contiguous(), str(place / f"{i:02}.jpg"))


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
