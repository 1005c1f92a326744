"""Standard output and standard error, whatever they are: missing, closed, full, or without a letter that is written.

Symptom: under cron, nohup or a notebook a stage ended in a traceback, because a stream was closed, its disk was full,
or it took ASCII alone. Cure: what is missing becomes the null device; messages that cannot be written are dropped, as
they are no reason to end a run; rows that cannot be written end the stage with one line; a letter that a stream does
not have is written in others.
"""

import codecs
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import TextIO

from lib.errors import InputError

IN_ASCII = {"±": "+-", "λ": "lambda", "π": "pi"}  # letters that a stream may lack; others become \xNN


@contextlib.contextmanager
def guarded() -> Iterator[None]:
    """Make standard output and standard error such that anything may be written to them; put them back at the end."""
    codecs.register_error("in_ascii", _in_ascii)
    _open_missing_descriptors()
    before = sys.stdout, sys.stderr
    nowhere = open(os.devnull, "w")  # noqa: SIM115  # stays open as long as it may be written to
    sys.stdout = Output(sys.stdout or nowhere)
    sys.stderr = Messages(sys.stderr or nowhere)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


class Messages:
    """A stream for people: what cannot be written to it is dropped."""

    def __init__(self, stream: TextIO):
        self.stream = stream
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="in_ascii")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, if that is possible; return its length."""
        try:
            self.stream.write(text)
        except (OSError, ValueError) as e:  # ValueError: the stream is closed
            self.fail(e)
        return len(text)

    def flush(self) -> None:
        """Hand on what was written, if that is possible."""
        try:
            self.stream.flush()
        except (OSError, ValueError) as e:
            self.fail(e)

    def fail(self, e: Exception) -> None:
        """Go on without the stream."""
        give_up(self.stream)


class Output(Messages):
    """A stream for rows: what cannot be written to it ends the stage."""

    def fail(self, e: Exception) -> None:
        """Raise InputError, or BrokenPipeError if the reader of the rows has left."""
        give_up(self.stream)
        if isinstance(e, BrokenPipeError):
            raise e
        reason = getattr(e, "strerror", None) or e
        raise InputError(f"standard output: cannot be written ({reason})") from e


def give_up(stream: TextIO) -> None:
    """Lead a stream to the null device: the interpreter would try again at its end to write what it still holds."""
    with contextlib.suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


def _open_missing_descriptors() -> None:
    """Open the null device for each of the first three descriptors that is closed.

    Otherwise the next file that is opened, a checkpoint for one, takes the number of standard error, and a library that
    writes a warning there writes it into that file.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.open(os.devnull, os.O_RDWR)
    os.close(descriptor)


def _in_ascii(e: UnicodeError) -> tuple[str, int]:
    """Return what is written in place of the letters that an encoding does not have, as codecs asks for it."""
    if not isinstance(e, UnicodeEncodeError):
        raise e
    letters = [IN_ASCII.get(letter) or ascii(letter)[1:-1] for letter in e.object[e.start : e.end]]
    return "".join(letters), e.end
