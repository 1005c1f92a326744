"""The log of a run, metrics.jsonl: rows out as they are printed, and rows back in.

    emit({"stage": "knn_eval", "top1": 78.4}, log)
    rows = read_rows(Path("runs/photos-amhe"))

A row is one JSON object on one line. Its first keys say who wrote it and what it is about: "stage" and "of".
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

from tqdm import tqdm

from lib import files
from lib.errors import InputError
from lib.files import LOG, run_folder, weights_file, write_whole

ROUNDING = 1e-6  # of mean and std: another processor sums in another order
LONGEST_LINE = 2**20  # bytes at a log's end in which a line that was cut short is looked for
PLACES = ("dataset", "data_dir", "init")  # settings that say where something lies: `other_data` compares what data hold


def is_main() -> bool:
    """Whether this is the only process, or the first of several, which alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def emit(row: dict, log: Path | None = None) -> None:
    """Print a row as one line of JSON on standard output and, with `log`, add it to that file before.

    Of several processes the first does so. ValueError for a NaN; InputError if the log, or standard output, cannot be
    written to.
    """
    if not is_main():
        return
    line = json.dumps(row, allow_nan=False)
    if log is not None:
        _append(line, log)  # first, so that the row is kept where standard output fails
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()


def _append(line: str, log: Path) -> None:
    """Add a line to a log, in place of a last line without an end, left by a process that was killed as it wrote."""
    with _alone(log) as file:
        end = file.seek(0, os.SEEK_END)
        file.seek(max(0, end - LONGEST_LINE))
        cut_line = file.read().rpartition(b"\n")[2]
        file.truncate(end - len(cut_line))
        file.write(line.encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())  # a checkpoint is on the disk at once: a power cut must not take the rows before it


@contextlib.contextmanager
def _alone(log: Path) -> Iterator[BinaryIO]:
    """Yield a log, to read and add to; other processes that call this for it wait, where there are locks.

    A run that goes on puts a new file in place of its log; who waited for the old one takes the new one. InputError if
    the log cannot be written to.
    """
    is_current = False
    try:
        while not is_current:
            with open(log, "ab+") as file:
                with contextlib.suppress(OSError):  # there are no locks; `run.claim` has said so
                    files.lock(file, wait=True)
                is_current = os.path.exists(log) and os.path.samestat(os.fstat(file.fileno()), os.stat(log))
                if is_current:
                    yield file
    except OSError as e:
        raise InputError(f"{log}: cannot be written ({e.strerror})") from e


def contents(images, holdout: bool = False) -> dict:
    """Return what a data.Dataset holds, for `other_data`; with `holdout` its test set is of its training set."""
    counts = {"train": len(images.train.labels), "test": len(images.test.labels)}
    if holdout:
        counts = {"train": sum(counts.values())}
    return {"classes": list(images.classes), **counts}


def other_data(mine: dict, theirs: dict) -> list[str]:
    """Name what the data of one run hold that those of another did not, of the facts that both descriptions have.

    A description is that of a checkpoint, or the first row of a log: classes and counts stand in its "data", size, mean
    and std in its "view". A folder may move; its path decides only where nothing is known of what it holds.
    """
    mine, theirs = as_json(mine), as_json(theirs)
    facts = mine.get("view", {}) | mine.get("data", {})
    their_facts = theirs.get("view", {}) | theirs.get("data", {})
    known = [name for name in facts if name in their_facts and name != "crop"]  # the crop is a setting
    if not known:
        place, their_place = (each.get("settings", {}).get("dataset", "") for each in (mine, theirs))
        return [] if same_place(place, their_place) else [f"dataset {place} (it was {their_place})"]
    faults = []
    for name in known:
        value, their_value = facts[name], their_facts[name]
        if name == "classes":
            new = sorted({*value} - {*their_value})
            gone = sorted({*their_value} - {*value})
            faults += [f"class {each} is new" for each in new[:3]] + [f"class {each} is gone" for each in gone[:3]]
        elif not _equal(value, their_value):
            faults.append(f"{name} {value} (it was {their_value})")
    return faults


def _equal(fact: object, other: object) -> bool:
    """Whether two facts are equal, mean and std but for ROUNDING."""
    if isinstance(fact, list) and isinstance(other, list) and len(fact) == len(other):
        return all(abs(x - y) <= ROUNDING for x, y in zip(fact, other))
    return fact == other


def same_place(place: str, other: str) -> bool:
    """Whether two paths lead to one folder, or two names of data sets are one."""
    return os.path.realpath(os.path.expanduser(place)) == os.path.realpath(os.path.expanduser(other))


def as_json(values: dict) -> dict:
    """Return the values as they come back from a file: tuples as lists."""
    return json.loads(json.dumps(values))


def log_of(checkpoint: str, description: dict) -> Path | None:
    """Return the log of the run folder that a checkpoint lies in, for a judge to add its rows to.

    A checkpoint is a file in that folder or in its folder `encoder`, or one of these two folders. None where there is
    no log, where it cannot be written to, or where it is of a run with other settings or other data: a checkpoint that
    was copied into the folder of another run must not leave its scores there. The data may have moved. `description` is
    the checkpoint's.
    """
    nowhere = dict.fromkeys(PLACES)
    log = run_folder(weights_file(checkpoint)) / LOG
    try:
        with open(log) as file:
            first_row = json.loads(file.readline())
        same_stage = first_row["stage"] == "pretrain"
        same_settings = first_row["settings"] | nowhere == description["settings"] | nowhere
        same_data = not other_data(description, first_row)
    except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError):
        return None
    if same_stage and same_settings and same_data and os.access(log, os.W_OK):
        return log
    return None


def read_rows(folder: Path) -> list[dict]:
    """Return the rows of a run's log; a last line that was cut short does not count.

    A broken line is left out, and named on standard error. InputError for a log that cannot be read, or whose first
    line is no row of a stage.
    """
    try:
        content = (folder / LOG).read_bytes()
    except OSError as e:
        raise InputError(f"{folder}: not a run folder, its {LOG} cannot be read ({e.strerror})") from e
    return _rows(content, folder / LOG)


def _rows(content: bytes, log: Path) -> list[dict]:
    """Return the rows of a log's content, as `read_rows` does."""
    whole_lines = content.split(b"\n")[:-1]
    rows = []
    for n, line in enumerate(whole_lines, 1):
        try:
            row = json.loads(line)
            _ = row["stage"]
        except (ValueError, KeyError, TypeError, RecursionError) as e:
            if n == 1:
                raise InputError(f"{log}: line 1 was not written by a command of this project") from e
            if is_main():
                print(f"{log}: line {n} is broken, and left out", file=sys.stderr)
            continue
        rows.append(row)
    return rows


def rewind(folder: Path, epoch: int) -> list[dict]:
    """Drop from a log the rows of epochs after `epoch`, which will be written again; return the rows that stay.

    The first row counts as epoch 0, so that -1 drops all of a run. Broken lines go, too, and one that was cut short.
    """
    log = folder / LOG
    with _alone(log) as file:
        file.seek(0)
        rows = _rows(file.read(), log)
        kept = [row for row in rows if row["stage"] != "pretrain" or row.get("epoch", 0) <= epoch]
        if files.fcntl is None:
            file.close()  # Windows puts no file in place of one that is open
        with write_whole(log) as new:
            for row in kept:
                new.write(json.dumps(row).encode() + b"\n")
    return kept


def provenance() -> dict:
    """Name the command, the versions and the commit that make a run."""
    packages = ("torch", "torchvision", "timm", "accelerate", "safetensors")
    versions = {name: version(name) for name in packages}
    return {"command": shlex.join(sys.argv), "versions": versions, "git": commit_of(Path(__file__).parent.parent)}


def commit_of(folder: Path) -> str | None:
    """Return the commit of the repository whose top level is this folder; None if it has none of its own."""
    git = ["git", f"--git-dir={folder / '.git'}", f"--work-tree={folder}", "describe", "--always", "--dirty"]
    described = subprocess.run(git, capture_output=True, text=True, check=False) if shutil.which("git") else None
    return described.stdout.strip() or None if described else None
