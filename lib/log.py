"""The log of a run, metrics.jsonl: rows out as they are printed, and rows back in.

    emit({"stage": "knn_eval", "top1": 78.4}, log, "k-NN 78.4 %")
    rows = read_rows(Path("runs/photos-amhe"))

A row is one JSON object on one line. Its first keys say who wrote it and what it is about: "stage" and "of". People at
a terminal see a text in its place.
"""

import contextlib
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import BinaryIO

import numpy as np
from tqdm import tqdm

from lib import files
from lib.errors import InputError
from lib.files import LOG, run_folder, weights_file, write_whole

ROUNDING = 1e-6  # of mean and std: another processor sums in another order
rows_wanted = False  # by --json, on a terminal, too; `cli.run` sets it
PLACES = ("dataset", "data_dir", "init")  # settings that say where something lies: `other_data` compares what data hold


def is_main() -> bool:
    """Whether this is the only process, or the first of several, which alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def emit(row: dict, log: Path | None = None, text: str | None = None) -> None:
    """Print a row as one line of JSON and, with `log`, add it to that file before: standard output may be full.

    A terminal gets the text in its place, if there is one, and nothing for an empty one. Of several processes the first
    prints and writes. ValueError for a NaN; InputError if the log cannot be written to.
    """
    if not is_main():
        return
    line = json.dumps(row, allow_nan=False)
    if log is not None:
        with _alone(log), open(log, "ab+") as file:
            if file.tell():
                _end_last_line(file)
            file.write(line.encode() + b"\n")
            file.flush()
            os.fsync(file.fileno())  # as of a checkpoint: a power cut must not take the rows before it
    if text is not None and _for_people():
        line = text
    if line:
        tqdm.write(line, file=sys.stdout)
        sys.stdout.flush()


def show(text: str) -> None:
    """Print a text where people read, and no rows are printed."""
    if is_main() and _for_people():
        tqdm.write(text, file=sys.stdout)


def progress(total: int, initial: int = 0, is_silent: bool = False) -> tqdm:
    """Return a bar of steps, of the first process; in a file, which keeps each update, it moves twice a minute."""
    seconds = 0.1 if sys.stderr.isatty() else 30
    waits = {"mininterval": seconds, "maxinterval": max(10, seconds)}
    return tqdm(total=total, initial=initial, unit="step", disable=is_silent or not is_main(), **waits)


def _for_people() -> bool:
    """Whether standard output is a terminal, and --json is not given."""
    return sys.stdout.isatty() and not rows_wanted


def _end_last_line(file: BinaryIO) -> None:
    """End the last line of an open log, or drop one that a process has left cut short when it was killed."""
    file.seek(0)
    content = file.read()
    last_line = content.rpartition(b"\n")[2]
    if _row(last_line):
        file.write(b"\n")
    else:
        file.truncate(len(content) - len(last_line))


def read_rows(folder: Path) -> list[dict]:
    """Return the rows of a run's log, without broken lines, which are named, and a last one that was cut short.

    InputError for a log that cannot be read, or that begins with something else than a row of a stage.
    """
    log = folder / LOG
    try:
        *lines, last_line = log.read_bytes().split(b"\n")
    except OSError as e:
        raise InputError(f"{folder}: not a run folder, its {LOG} cannot be read ({e.strerror})") from e
    if _row(last_line):  # it lacks its end alone
        lines.append(last_line)
    rows = []
    for n, line in enumerate(lines, 1):
        row = _row(line)
        if row:
            rows.append(row)
        elif line.strip() and not rows:
            raise InputError(f"{log}: line {n} was not written by a command of this project")
        elif line.strip() and is_main():
            print(f"{log}: line {n} is broken, and left out", file=sys.stderr)
    return rows


def rewind(folder: Path, epoch: int) -> list[dict]:
    """Drop from a log the rows after `epoch`, -1 for all of a run, and broken lines; return the rows that stay."""
    log = folder / LOG
    with _alone(log):
        rows = read_rows(folder)
        kept = [row for row in rows if row["stage"] != "pretrain" or row.get("epoch", 0) <= epoch]
        with write_whole(log) as new:
            new.writelines(json.dumps(row).encode() + b"\n" for row in kept)
    return kept


@contextlib.contextmanager
def _alone(log: Path) -> Iterator[None]:
    """Have other processes wait that want to write to a log, where there are locks. InputError if it is read-only."""
    try:
        with open(log.with_name(".log.lock"), "w") as claimed:
            with contextlib.suppress(OSError):  # there are no locks; `files.claim` has said so
                files.lock(claimed, wait=True)
            yield
    except OSError as e:
        raise InputError(f"{log}: cannot be written ({e.strerror})") from e


def _row(line: bytes) -> dict | None:
    """Return the row that a line holds, if it holds one; a byte-order mark may stand before it."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and "stage" in row else None


def log_of(checkpoint: str, description: dict) -> Path | None:
    """Return the log of the run that a checkpoint, or its folder, belongs to, for a judge to add its rows to.

    None without one that can be written to, or if it is of another run than the checkpoint's `description`.
    """
    nowhere = dict.fromkeys(PLACES)
    log = run_folder(weights_file(checkpoint)) / LOG
    try:
        first_row = read_rows(log.parent)[0]
        is_same = first_row["settings"] | nowhere == description["settings"] | nowhere
        is_same = is_same and first_row["stage"] == "pretrain" and not other_data(description, first_row)
    except (ValueError, LookupError, TypeError, AttributeError):
        return None
    return log if is_same and all(os.access(place, os.W_OK) for place in (log, log.parent)) else None


def contents(images, holdout: bool = False) -> dict:
    """Return what a data.Dataset holds, for `other_data`; with `holdout` its test set is of its training set."""
    train, test = len(images.train.labels), len(images.test.labels)
    counts = {"train": train + test} if holdout else {"train": train, "test": test}
    return {"classes": list(images.classes), **counts}


def other_data(mine: dict, theirs: dict) -> list[str]:
    """Name what the data of one run hold that those of another did not, by "data" and "view" of their descriptions."""
    facts, their_facts = (as_json(each.get("view", {}) | each.get("data", {})) for each in (mine, theirs))
    faults = []
    for name, value in facts.items():
        their_value = their_facts.get(name, value)
        if name == "classes":
            faults += [f"class {each} is new" for each in sorted({*value} - {*their_value})[:3]]
            faults += [f"class {each} is gone" for each in sorted({*their_value} - {*value})[:3]]
        elif name != "crop" and not np.allclose(value, their_value, rtol=0, atol=ROUNDING):  # the crop is a setting
            faults.append(f"{name} {value} (it was {their_value})")
    return faults


def same_place(place: str, other: str) -> bool:
    """Whether two paths lead to one folder, or two names of data sets are one."""
    return os.path.realpath(os.path.expanduser(place)) == os.path.realpath(os.path.expanduser(other))


def as_json(values: dict) -> dict:
    """Return the values as they come back from a file: tuples as lists."""
    return json.loads(json.dumps(values))


def provenance() -> dict:
    """Name the command, the versions and the commit that make a run."""
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors")}
    return {"command": shlex.join(sys.argv), "versions": versions, "git": commit_of(Path(__file__).parent.parent)}


def commit_of(folder: Path) -> str | None:
    """Return the commit of the repository whose top level is this folder; None if it has none of its own."""
    git = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "describe", "--always", "--dirty"]
    described = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return described.stdout.strip() or None if described else None
