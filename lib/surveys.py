"""Surveys of the pictures of a folder, which each start needs, and which are kept from one to the next.

    with Kept(root) as kept:
        rows, surveys = kept.survey(paths, skip_broken)

They are kept in a hidden file beside the pictures, or in the user's cache where that folder is read-only. A picture of
another size in bytes, or another time of change, is surveyed again. So the first of several processes reads the
pictures, by workers, and the others read the file.
"""

import contextlib
import hashlib
import os
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lib.errors import InputError
from lib.files import write_whole
from lib.pictures import SURVEY, looks, survey, workers

FILE = ".surveys.safetensors"
MEANING = {"surveys": "2"}  # another number where `survey` would give other numbers for the same file
COLUMNS = SURVEY.itemsize // 8  # whole numbers of 8 bytes
PICTURES_A_WORKER = 64  # at least: a worker takes as long to start as to read some
GONE = (-1, -1)

Stored = tuple[dict[str, int], np.ndarray]  # row by name, and rows: size in bytes, time of change, survey


class Kept:
    """The surveys of the pictures below a folder, which are kept when the block is left, however that happens."""

    def __init__(self, root: Path):
        self.root = root
        self.places = [root / FILE]
        cache = _cache_folder()
        if cache:
            name = hashlib.sha256(os.fsencode(os.path.realpath(root))).hexdigest()
            self.places.append(cache / f"{name[:32]}.safetensors")
        self.stored = [_stored(place) for place in self.places]
        self.names = []
        self.rows = []
        self.has_new = False

    def __enter__(self) -> "Kept":
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        if error:  # perhaps before all parts of the folder were surveyed: what is stored of the others stays
            self._keep_others()
        if self.has_new:
            self._save()

    def survey(self, paths: list[str], skip_broken: bool) -> tuple[list[int], np.ndarray]:
        """Return the rows of the pictures that can be read, and of each what SURVEY lists.

        InputError for the first that cannot, unless these are to be skipped: then they are named.
        """
        start = len(str(self.root / "x")) - 1  # of the names below the root
        names = [path[start:] for path in paths]
        rows = np.zeros((len(paths), 2 + COLUMNS), np.int64)
        rows[:, :2] = np.array([_stamp(path) for path in paths], np.int64).reshape(-1, 2)
        is_known = self._fill(names, rows)
        surveys = np.ascontiguousarray(rows[:, 2:]).view(SURVEY).reshape(-1)
        missing = np.flatnonzero(~is_known)
        n_workers = min(workers(), len(missing) // PICTURES_A_WORKER)
        try:
            paths_missing = [paths[row] for row in missing]
            for row, answer in looks(paths_missing, survey, skip_broken, len(paths), n_workers):
                surveys[missing[row]] = answer
                is_known[missing[row]] = self.has_new = True
        finally:
            rows[:, 2:] = surveys.view(np.int64).reshape(-1, COLUMNS)
            sound = np.flatnonzero(is_known)
            self.names += [names[row] for row in sound]
            self.rows.append(rows[sound])
        return sound.tolist(), surveys[sound]

    def _fill(self, names: list[str], rows: np.ndarray) -> np.ndarray:
        """Write the surveys that are stored into rows, which hold sizes and times so far; return which they are."""
        is_known = np.zeros(len(names), bool)
        for row_by_name, stored in self.stored:
            places = np.array([row_by_name.get(name, -1) for name in names], np.int64)
            is_there = np.flatnonzero(places >= 0)
            candidates = stored[places[is_there]]
            is_same = (candidates[:, :2] == rows[is_there, :2]).all(1)
            rows[is_there[is_same]] = candidates[is_same]
            is_known[is_there[is_same]] = True
        return is_known

    def _keep_others(self) -> None:
        """Keep what is stored of pictures that have not been surveyed again."""
        known = set(self.names)
        for row_by_name, stored in self.stored:
            others = {name: row for name, row in row_by_name.items() if name not in known}
            self.names += others
            self.rows.append(stored[list(others.values())].reshape(-1, 2 + COLUMNS))
            known |= others.keys()

    def _save(self) -> None:
        """Write what is known to the first place that can be written to, if any can."""
        names = b"\0".join(map(os.fsencode, self.names))
        arrays = {"names": np.frombuffer(names, np.uint8), "rows": np.concatenate(self.rows)}
        content = save(arrays, MEANING)
        for place in self.places:
            with contextlib.suppress(OSError, InputError):
                place.parent.mkdir(parents=True, exist_ok=True)
                with write_whole(place) as file:
                    file.write(content)
                return


def _stamp(path: str) -> tuple[int, int]:
    """Return size and time of change of a file, a link's those of what it leads to."""
    try:
        status = os.stat(path)
    except OSError:
        return GONE
    return status.st_size, status.st_mtime_ns


def _stored(place: Path) -> Stored:
    """Return what a file keeps, or nothing if it is missing or damaged, or if its numbers mean something else."""
    nothing = {}, np.zeros((0, 2 + COLUMNS), np.int64)
    try:
        with safe_open(place, "numpy") as file:
            if file.metadata() != MEANING:
                return nothing
            names = file.get_tensor("names").tobytes().split(b"\0")
            rows = file.get_tensor("rows")
    except (OSError, SafetensorError, ValueError):
        return nothing
    if rows.dtype != np.int64 or rows.shape != (len(names), 2 + COLUMNS):
        return nothing
    return {os.fsdecode(name): row for row, name in enumerate(names)}, rows


def _cache_folder() -> Path | None:
    """Return the user's folder for surveys of pictures that are read-only; None for a user without a home."""
    with contextlib.suppress(RuntimeError):
        cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        return Path(cache, "hyperspherical", "surveys")
    return None
