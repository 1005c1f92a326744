"""The door of every stage: flags in, rows out.

A stage is a function whose signature is its command line. `run(stage)` holds what was typed against that signature
before Fire calls the stage: Fire alone runs the function first and rejects a misspelt flag afterwards. Annotations say
what a flag takes:

    reg: Literal["none", "mhe"]     k: tuple[int, ...]     s: Annotated[float, ">= 0"]     lr: float | None

`emit` prints a row of results as one line of JSON and adds it to a log.
"""

import difflib
import functools
import inspect
import json
import math
import operator
import os
import sys
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import fire
from tqdm import tqdm

from harness import processes

SWITCH = ("true", "false", "none")  # what may follow the name of a switch
RULES = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}


class UsageError(ValueError):
    """A command line that asks for something that cannot be done."""


class Stopped(Exception):
    """A stage that a signal has ended: why, and the exit code that a shell expects then."""


def run(stage: Callable, *errors: type[Exception]) -> None:
    """Call `stage` with the flags of the command line.

    UsageError and `errors`, the stage's own for input that is at fault, end the program with one line and exit code 2.
    """
    signature = inspect.signature(stage)
    asks_help = {"-h", "--help"} & set(sys.argv[1:])

    @functools.wraps(stage)
    def command(*_, **__):
        by_place = [name for name, flag in signature.parameters.items() if flag.kind is not flag.KEYWORD_ONLY]
        places = [values.pop(name) if is_many(signature.parameters[name]) else (values.pop(name),) for name in by_place]
        stage(*sum(places, ()), **values)

    takes = {name: words(flag.annotation).partition(":")[0] for name, flag in signature.parameters.items()}
    flags = [flag.replace(annotation=type(takes[name], (), {})) for name, flag in signature.parameters.items()]
    command.__signature__ = signature.replace(parameters=flags)  # for --help, which prints the names of types
    try:
        values = {} if asks_help else read(sys.argv[1:], signature.parameters)
        one = {name: value for name, value in values.items() if not is_many(signature.parameters[name])}
        typed = ["--help"] if asks_help else [f"--{name}={value}" for name, value in one.items()]
        fire.Fire(command, typed, name=Path(sys.argv[0]).name)
    except (UsageError, *errors) as e:
        fail(e, 2)
    except Stopped as e:
        fail(*e.args) if processes.is_main() else leave(e.args[1])
    except KeyboardInterrupt:
        fail("interrupted", 130) if processes.is_main() else leave(130)
    except RuntimeError as e:
        if "gloo" not in str(e):
            raise
        fail("another process has ended", 1, told_by_another=True)
    except BrokenPipeError:  # whoever read our rows has left: not even the interpreter's last flush can reach them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        leave(1)
    leave(0)


def fail(why: object, code: int, told_by_another: bool = False) -> None:
    """End the program with one line on standard error.

    Of several processes the first speaks for all: once it has ended the launcher ends the others, before they do.
    """
    if told_by_another or not processes.is_main():
        time.sleep(2)
    print(f"{Path(sys.argv[0]).name}: {' '.join(str(why).split())}", file=sys.stderr)
    leave(code)


def leave(code: int) -> None:
    """End the program. One of several processes does so at once: gloo's threads would abort some at the end."""
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if not code:
            processes.end()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if code:
        sys.exit(code)


def read(argv: list[str], flags: dict[str, inspect.Parameter]) -> dict[str, Any]:
    """The values that a command line gives to flags, each known, given once and of its type. Raises UsageError."""
    places = [name for name, flag in flags.items() if flag.kind is flag.POSITIONAL_OR_KEYWORD]
    many = next((name for name, flag in flags.items() if is_many(flag)), None)
    rest, values = list(argv), {many: ()} if many else {}
    while rest:
        word = rest.pop(0)
        if is_flag(word):
            typed, equals, text = word.partition("=")
            name, negated = find(typed, flags)
            switch = is_switch(flags[name])
            if negated and equals:
                raise UsageError(f"{word}: --no{name} takes no value")
            if not equals and rest and not is_flag(rest[0]) and (not switch or rest[0].lower() in SWITCH):
                text = rest.pop(0)
            elif not equals and switch:
                text = str(not negated)
        elif places:
            name, typed, text = places[0], places[0].upper(), word
        elif many:
            values[many] += (word,)
            continue
        else:
            raise UsageError(f"{word}: a stray word; flags are given as --name value, see --help")
        if name in values:
            raise UsageError(f"{typed} {text}: given twice")
        try:
            values[name] = parse(text, flags[name].annotation)
        except ValueError as e:
            raise UsageError(f"{typed} {text}".rstrip() + f": expected {e}") from e
        places = [place for place in places if place != name]
    if places:
        raise UsageError(f"{places[0].upper()} is missing, see --help")
    return values


def is_flag(word: str) -> bool:
    """Whether a word of the command line begins with a hyphen and is no negative number."""
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "."


def is_many(flag: inspect.Parameter) -> bool:
    """Whether a flag is any number of texts, given by place."""
    return flag.kind is flag.VAR_POSITIONAL


def is_switch(flag: inspect.Parameter) -> bool:
    """Whether a flag is on or off, so that its name alone, or --no and its name, will do."""
    return bool in (flag.annotation, *get_args(flag.annotation))


def find(typed: str, flags: dict[str, inspect.Parameter]) -> tuple[str, bool]:
    """The flag that was typed, by its name or an initial that is no other's, and whether --no stood before it."""
    name = typed.lstrip("-").replace("-", "_")
    if name in flags:
        return name, False
    bare = name.removeprefix("no").lstrip("_")
    if name.startswith("no") and bare in flags and is_switch(flags[bare]):
        return bare, True
    if len(name) == 1 and len(same := [flag for flag in flags if flag.startswith(name)]) == 1:
        return same[0], False
    near = difflib.get_close_matches(name, flags, 1, cutoff=0.5)
    hint = f"did you mean --{near[0]}?" if near else f"known: {', '.join('--' + flag for flag in flags)}"
    raise UsageError(f"{typed}: no such flag; {hint}")


def parse(text: str, annotation: Any) -> Any:
    """The value of a flag from its text. A ValueError's message is what the annotation expects, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):  # X | None
        return None if text == "None" else parse(text, args[0])
    if origin is Literal and text not in args:
        near = difflib.get_close_matches(text, args, 1)
        raise ValueError(words(annotation) + (f" (did you mean {near[0]}?)" if near else ""))
    try:
        if origin is Literal:
            return text
        if origin is Annotated:
            value = parse(text, args[0])
            valid = all(RULES[sign](value, float(bound)) for sign, bound in map(str.split, args[1:]))
        elif origin is tuple:
            value = tuple(parse(part.strip(" '\""), args[0]) for part in text.strip("()[], ").split(","))
            valid = len(set(value)) == len(value)
        elif annotation is bool:
            value, valid = text.lower() == "true", text.lower() in ("true", "false")
        else:
            value = annotation(text)
            valid = value != "" and (annotation is not float or math.isfinite(value))
    except ValueError:
        valid = False
    if not valid:
        raise ValueError(words(annotation))
    return value


def words(annotation: Any) -> str:
    """What a flag takes, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):
        return words(args[0])
    if origin is Annotated:
        return f"{words(args[0])} {' and '.join(args[1:])}"
    if origin is tuple:
        return f"comma-separated, each once: {words(args[0])}"
    if origin is Literal:
        return ", ".join(args)
    return {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}[annotation]


def emit(row: dict, log: Path | None = None) -> None:
    """Print a row as one line of JSON on standard output and, with `log`, add it to that file.

    ValueError for a NaN; UsageError if the log cannot be written to.
    """
    if not processes.is_main():
        return
    line = json.dumps(row, allow_nan=False)
    tqdm.write(line, file=sys.stdout)
    sys.stdout.flush()
    if log is not None:
        try:
            with open(log, "ab+") as file:
                end = file.seek(0, os.SEEK_END)
                file.seek(max(0, end - 2**20))
                cut = file.read().rpartition(b"\n")[2]  # of a process that was killed while it wrote
                file.truncate(end - len(cut))
                file.write(line.encode() + b"\n")
        except OSError as e:
            raise UsageError(f"{log}: cannot be written ({e.strerror})") from e


def log_of(checkpoint: str, settings: dict) -> Path | None:
    """The log of the run folder that a checkpoint lies in; None where there is none, of a run with these settings."""
    log, moved = Path(checkpoint).with_name("metrics.jsonl"), {"data_dir": None}
    try:
        with open(log) as file:
            first = json.loads(file.readline())
        own = first["stage"] == "pretrain" and {**first["settings"], **moved} == {**settings, **moved}
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return log if own and os.access(log, os.W_OK) else None
