"""The names of a run's files, the one way in which files are written, whole or not at all, and locks on them."""

import contextlib
import fcntl
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import IO, BinaryIO, TextIO

from lib.errors import InputError

LOG = "metrics.jsonl"  # a JSON object a row
CKPT = "ckpt.safetensors"  # the whole state of a run
ENCODER = "encoder"  # a folder with the encoder alone, as the last save at an epoch's end left it:
WEIGHTS = f"{ENCODER}/model.safetensors"
CONFIG = f"{ENCODER}/config.json"
RUN_FILES = (LOG, CKPT, WEIGHTS, CONFIG)


@contextlib.contextmanager
def write_whole(path: Path) -> Iterator[BinaryIO]:
    """Yield a file to write bytes to. It is hidden, and takes the name `path` in one step once it is on the disk.

    A process that is killed, or a disk that is full, leaves what was there before. InputError if it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as e:
        reason = f"{path.parent} is no folder" if path.parent.is_file() else e.strerror
        kept = "; its old content is unchanged" if path.exists() else ""
        raise InputError(f"{path}: cannot be written ({reason}){kept}") from e
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # the new name, too, where the file system can: a power cut would lose it
        descriptor = os.open(path.parent, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def weights_file(path: str | Path) -> str | Path:
    """Return the file of weights that a path names: itself, or of a run's folder its state, of timm's the weights."""
    for name in (CKPT, Path(WEIGHTS).name):
        file = os.path.join(path, name)
        if os.path.isfile(file):
            return file
    return path


def run_folder(file: str | Path) -> Path:
    """Return the folder of the run that a file of weights belongs to, by its name: where it lies, or one further up."""
    file = Path(os.path.abspath(file))
    is_encoder = file.match(WEIGHTS)
    return file.parent.parent if is_encoder else file.parent


def lock(file: IO, wait: bool) -> None:
    """Keep a file from the locks of other processes until it is closed.

    BlockingIOError if another process has it, unless this one is to wait; OSError where there are no locks, as on some
    network file systems. lockf, not flock, which workers of the loader would hold for seconds after this one is killed.
    """
    fcntl.lockf(file, fcntl.LOCK_EX if wait else fcntl.LOCK_EX | fcntl.LOCK_NB)


def claim(folder: Path) -> TextIO:
    """Make a run folder, and keep other processes out of it until this one ends, however it ends.

    Removes what a process that was killed has left half-written. InputError if another process has the folder, or if it
    cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claimed = open(folder / ".lock", "w")  # noqa: SIM115  # stays open as long as this process lives
        try:
            lock(claimed, wait=False)
        except BlockingIOError:
            raise InputError(f"--out {folder}: another process is training in it; name another folder") from None
        except OSError as e:  # there are no locks
            print(f"--out {folder}: cannot be locked ({e.strerror}); start no second run in it", file=sys.stderr)
        for path in (folder / name for name in RUN_FILES):
            for stray in path.parent.glob(f".{path.name}.*"):  # of `write_whole`
                stray.unlink(missing_ok=True)
    except OSError as e:
        raise InputError(f"--out {folder}: cannot be written ({e.strerror})") from e
    if (folder / ENCODER).is_file():
        raise InputError(f"--out {folder}: holds a file called {ENCODER}, where the encoder's folder belongs; move it")
    return claimed
