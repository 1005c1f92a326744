"""When a run saves its state, and the thread that writes it while the training goes on.

    schedule = Schedule("10min", step=0, is_new=True)
    schedule.is_due(step)  # within an epoch; at its end with at_epoch_end=True
    writer = Writer()
    writer.start(checkpoint.save, path, tensors, description)
    writer.wait()  # raises what the thread has raised

The thread hashes a state, writes it and waits for the disk. On a fast GPU that takes as long as many steps.
"""

import re
import threading
import time
from collections.abc import Callable

from lib.errors import InputError

SECONDS_BETWEEN_LOOKS = 5  # of several processes, for a signal or a save that is due: each look makes all of them wait


def interval(text: str) -> tuple[int, str]:
    """Return the number and the unit, min or steps, of a --save_every. InputError for any other spelling."""
    match = re.fullmatch(r"([1-9][0-9]{0,8})(min|steps)", str(text))
    if not match:
        shown = str(text)[:40]
        raise InputError(f"--save_every {shown}: expected a whole number with its unit, as 10min or 500steps")
    return int(match[1]), match[2]


class Schedule:
    """When a run saves: once the interval has passed, or at an epoch's end if it would pass before the next one's.

    So a save is within an epoch only if the epoch is longer than the interval. A new run saves at the end of its first
    epoch in any case, so that a full disk shows early.
    """

    def __init__(self, text: str, step: int, is_new: bool):
        """Begin to count at a step; a run is new if its folder lacks a file. InputError for a text like "500"."""
        number, self.unit = interval(text)
        self.length = number if self.unit == "steps" else 60 * number  # steps or seconds
        self.is_new = is_new
        self._saved_at = self._epoch_began = self._now(step)

    def begin_epoch(self, step: int) -> None:
        """Note the beginning of an epoch, for how long it takes."""
        self._epoch_began = self._now(step)

    def is_due(self, step: int, at_epoch_end: bool = False) -> bool:
        """Whether to save after this step; see the class."""
        now = self._now(step)
        passed = now - self._saved_at
        if at_epoch_end:
            passed += now - self._epoch_began  # the next epoch is taken to last as long as this one
        return passed >= self.length or (at_epoch_end and self.is_new)

    def saved(self, step: int) -> None:
        """Note a save."""
        self._saved_at = self._now(step)
        self.is_new = False

    def _now(self, step: int) -> float:
        """The present, in steps or seconds."""
        return step if self.unit == "steps" else seconds()


def seconds() -> float:
    """Read a clock that is never set back."""
    return time.monotonic()


def steps_to_next_look(steps: int, duration: float) -> int:
    """Return how many steps take SECONDS_BETWEEN_LOOKS, but at least 1, if the last `steps` took so many seconds."""
    return max(1, round(steps * SECONDS_BETWEEN_LOOKS / max(duration, 1e-6)))


class Writer:
    """A thread that does one piece of work at a time. What it raises comes out of the next call here."""

    def __init__(self):
        self._thread, self._fault = None, None

    def start(self, work: Callable, *args) -> None:
        """Begin work(*args), once the last work is done.

        The thread is a daemon: a second Ctrl-C ends the process at once, although something is being written.
        """
        self.wait()
        self._thread = threading.Thread(target=self._do, args=(work, *args), name="writer", daemon=True)
        self._thread.start()

    def _do(self, work: Callable, *args) -> None:
        try:
            work(*args)
        except BaseException as e:
            self._fault = e

    def wait(self) -> None:
        """Return when all work is done; raise what it has raised.

        It waits in turns of a second: a signal that comes just before a turn begins would not end it.
        """
        while self._thread and self._thread.is_alive():
            self._thread.join(timeout=1)
        self._thread = None
        fault, self._fault = self._fault, None
        if fault:
            raise fault

    def raise_fault(self) -> None:
        """Raise what the work has raised, if it has; do not wait."""
        if self._fault:
            self.wait()
