"""The door of every stage: flags in, exit codes out.

A stage is a function whose signature is its command line. A flag is one line of it, with type, bounds and meaning:

    reg: Literal["none", "mhe"] = "none",
    lr: Annotated[float, "> 0", "< 1e6", "learning rate per 256 images"] | None = None,
    k: Annotated[tuple[Annotated[int, ">= 1"], ...], "numbers of neighbours"] = (10, 20),

Fire calls the stage. Alone it would reject a misspelt flag after that, and guess types; so each flag is checked before
Fire sees it, and the texts that Fire hands over become values by the annotations.
"""

import contextlib
import difflib
import inspect
import math
import multiprocessing
import operator
import os
import re
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Mapping
from types import NoneType
from typing import Annotated, Any, Literal, get_args, get_origin

import fire

from lib.errors import InputError, Stopped
from lib.log import is_main

FLAG = re.compile(r"-(?![\d.])")  # how a word begins that is a flag, and no negative number
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
IN_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}
LAUNCHER = "of accelerate launch, before the name of the script"
ELSEWHERE = {  # what words of other projects mean, which are written without underscores
    "outputdir": "--out",
    "outdir": "--out",
    "numworkers": "--workers",
    "lambda": "--weight",
    "pretrained": "--init",
    "arch": "--model",
    "learningrate": "--lr",
    "device": f"--gpu_ids 0 {LAUNCHER}",
    "gpus": f"--num_processes 2 {LAUNCHER}",
    "fp16": f"--mixed_precision fp16 {LAUNCHER}",
    "bf16": f"--mixed_precision bf16 {LAUNCHER}",
    "amp": f"--mixed_precision bf16 {LAUNCHER}",
}
DEAD_WORKER = "as where memory, or /dev/shm, is short: give more, or take a smaller --workers (0 = none)"


def run(stage: Callable, groups: Mapping[str, str] | None = None) -> None:
    """Call a stage with the flags of the command line, and end the program as a shell expects.

    groups: titles in --help, by the first flag of each group. InputError ends the program with one line and exit code
    2, a signal with one line and 128 + its number.
    """
    open_streams()
    try:
        if "-h" in sys.argv or "--help" in sys.argv:
            print(help_text(stage, groups or {}))
        else:
            by_fire(lambda values: stage(*values.args, **values.kwargs), sys.argv[1:], inspect.signature(stage))
        sys.stdout.flush()
    except InputError as e:
        fail(e, 2)
    except (Stopped, KeyboardInterrupt) as e:
        reason, exit_code = e.args or ("interrupted", 130)
        if is_main():  # a signal reaches all of several processes
            fail(reason, exit_code)
        leave(exit_code)
    except OSError as e:
        end_without_output(e)
    except RuntimeError as e:
        if "DataLoader worker" in str(e):
            fail(f"a process that reads pictures has died, {DEAD_WORKER}", 1, wait=True)
        if "gloo" not in str(e):
            raise
        fail("another process has ended", 1, wait=True)
    leave(0)


def read(words: list[str], flags: Mapping[str, inspect.Parameter]) -> dict[str, Any]:
    """Return the values that a command line gives to flags, by name; those that are not given are left out.

    InputError for a flag that is unknown, given twice or not of its type, and for a place that is empty.
    """
    return by_fire(lambda values: values.arguments, words, inspect.Signature([*flags.values()]))


def defaults(stage: Callable) -> dict[str, Any]:
    """Return the default of each flag of a stage that has one."""
    flags = inspect.signature(stage).parameters
    return {name: flag.default for name, flag in flags.items() if flag.default is not flag.empty}


# ---- From words to values --------------------------------------------------------------------------------------------
def by_fire(function: Callable, words: list[str], signature: inspect.Signature) -> Any:
    """Have Fire call a function with the values that words give to the flags of a signature; return what it returns."""
    command = fire.decorators.SetParseFn(str)(lambda *places, **texts: function(with_values(signature, places, texts)))
    return fire.Fire(command, spelled_out(words, signature.parameters), serialize=lambda _: None)  # it prints nothing


def spelled_out(words: list[str], flags: Mapping[str, inspect.Parameter]) -> list[str]:
    """Return words with each flag as --name=text, which leaves Fire nothing to guess. InputError as from `read`."""
    words, spelled, given = [*words], [], set()
    names = [name for name, flag in flags.items() if flag.kind is not flag.VAR_POSITIONAL]
    switches = [name for name in names if described(flags[name].annotation)[0] == IN_WORDS[bool]]
    while words:
        word = words.pop(0)
        if not FLAG.match(word):
            spelled.append(word)
            continue
        typed, equals, text = word.partition("=")
        name = typed.lstrip("-").replace("-", "_")
        negated = re.sub("^no_?", "", name)
        if name not in names and negated in switches and not equals:
            name, text = negated, "False"
        elif name not in names:
            raise InputError(f"{typed}: no such flag; {hint(name, names)}")
        elif name in switches and not equals:
            text = words.pop(0) if words and words[0].lower() in ("true", "false", "none") else "True"
        elif not equals and words and not FLAG.match(words[0]):
            text = words.pop(0)
        if name in given:
            raise InputError(f"--{name} {text}: given twice")
        given.add(name)
        spelled.append(f"--{name}={text}")
    return spelled


def hint(name: str, flags: list[str]) -> str:
    """Return what may have been meant by the name of a flag that is not there, or which flags are."""
    meanings = {flag.replace("_", ""): f"--{flag}" for flag in flags}
    meanings |= {word: text for word, text in ELSEWHERE.items() if text.endswith(LAUNCHER) or text[2:] in flags}
    for alike in difflib.get_close_matches(name.replace("_", "").lower(), meanings, 1, cutoff=0.8):
        return f"did you mean {meanings[alike]}?"
    return f"known: {', '.join('--' + flag for flag in flags)}"


def with_values(signature: inspect.Signature, places: tuple, texts: dict[str, str]) -> inspect.BoundArguments:
    """Return the values of texts given by place and by name, as a stage is called with. InputError as from `read`."""
    try:
        bound = signature.bind(*places, **texts)
    except TypeError as e:  # a place without a text, or a text without a place
        _, missing, *_ = f"{e}''".split("'")
        fault = f"{places[-1]}: a stray word" if places else f"{missing.upper()} is missing"
        raise InputError(f"{fault}; flags are given as --name value, see --help") from e
    for name, given in bound.arguments.items():
        flag = signature.parameters[name]
        try:
            bound.arguments[name] = parse(given, flag.annotation)
        except ValueError:
            expected, _ = described(flag.annotation)
            for choice in difflib.get_close_matches(given, expected.split(", "), 1):
                expected += f" (did you mean {choice}?)"
            typed = f"--{name}" if flag.kind is flag.KEYWORD_ONLY else name.upper()
            raise InputError(f"{typed} {given}".rstrip() + f": expected {expected}") from None
    return bound


def parse(text: str | tuple[str, ...], annotation: Any) -> Any:
    """Return the value of a flag from its text, or of all places from theirs. ValueError if one is not allowed."""
    if isinstance(text, tuple):
        return tuple(parse(each, annotation) for each in text)
    origin, args = get_origin(annotation), get_args(annotation)
    if NoneType in args:
        return None if text == "None" else parse(text, args[0])
    if origin is Annotated:
        value = parse(text, args[0])
        bounds = [note.split() for note in args[1:] if note.startswith((">", "<"))]
        valid = all(COMPARISONS[comparison](value, float(limit)) for comparison, limit in bounds)
    elif origin is tuple:
        parts = text.strip("()[], ").split(",")
        value = tuple(parse(part.strip(" '\""), args[0]) for part in parts)
        valid = len(set(value)) == len(value)
    elif origin is Literal:
        value, valid = text, text in args
    elif annotation is bool:
        value, valid = text.lower() == "true", text.lower() in ("true", "false")
    elif annotation is str:
        value, valid = os.path.expanduser(text), text != ""  # a shell leaves the ~ of --out=~/runs
    else:
        value = annotation(text)
        valid = annotation is int or math.isfinite(value)
    if not valid:
        raise ValueError(text)
    return value


# ---- What a signature says -------------------------------------------------------------------------------------------
def described(annotation: Any) -> tuple[str, str]:
    """Return the values that a flag takes, in words, and its meaning."""
    origin, args = get_origin(annotation), get_args(annotation)
    if NoneType in args:
        return described(args[0])
    if origin is Annotated:
        values, _ = described(args[0])
        bounds = [note for note in args[1:] if note.startswith((">", "<"))]
        meaning = " ".join(note for note in args[1:] if note not in bounds)
        return f"{values} {' and '.join(bounds)}".rstrip(), meaning
    if origin is tuple:
        values, _ = described(args[0])
        return f"values separated by commas, each once: {values}", ""
    if origin is Literal:
        return ", ".join(args), ""
    return IN_WORDS[annotation], ""


def help_text(stage: Callable, groups: Mapping[str, str]) -> str:
    """Return what --help prints: the purpose of a stage, its flags in groups, and the first example of its file."""
    purpose, *_ = inspect.getdoc(stage).split("\n\n")
    paragraphs = [textwrap.fill(f"{os.path.basename(sys.argv[0])}: {purpose}", 80)]
    flags = inspect.signature(stage).parameters
    column = 6 + max(map(len, flags), default=0)
    lines = textwrap.TextWrapper(80, subsequent_indent=" " * column, break_on_hyphens=False)
    for name, flag in flags.items():
        if name in groups or len(paragraphs) == 1:
            paragraphs.append(groups.get(name, "flags"))
        values, meaning = described(flag.annotation)
        default = ",".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
        text = f"{values}: {meaning}".removesuffix(": ")
        text += "" if default is flag.empty else f" [{default}]"
        typed = f"--{name}" if flag.kind is flag.KEYWORD_ONLY else name.upper()
        lines.initial_indent = f"  {typed}".ljust(column)
        paragraphs[-1] += "\n" + lines.fill(text)
    example = re.search(r"^    ([^#\n]+)", inspect.getmodule(stage).__doc__ or "", re.MULTILINE)
    if example:
        paragraphs.append(f"example\n  {example[1]}")
    return "\n\n".join(paragraphs)


# ---- Streams and exit codes ------------------------------------------------------------------------------------------
def open_streams() -> None:
    """Open the null device for a closed stream, whose number a checkpoint would take; escape letters a stream lacks."""
    for name in ("stdin", "stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")  # noqa: SIM115  # takes the lowest free number
        setattr(sys, name, stream)
        if hasattr(stream, "reconfigure"):  # notebooks have other streams
            stream.reconfigure(errors="backslashreplace")


def end_without_output(e: OSError) -> None:
    """End the program if standard output is what failed: quietly if its reader has left, as `head` does."""
    try:
        print(flush=True)  # fails again if standard output was at fault
    except OSError as lost:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # the interpreter flushes once more
        if isinstance(lost, BrokenPipeError):
            leave(1)
        fail(f"standard output: cannot be written ({lost.strerror})", 2)
    raise e


def fail(reason: object, exit_code: int, wait: bool = False) -> None:
    """End the program with one line on standard error.

    Of several processes the first speaks: the others wait, and the launcher ends them before they repeat its line. With
    `wait` the first waits, too, so that the process that failed can speak.
    """
    if wait or not is_main():
        time.sleep(2)
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(reason).split())}", file=sys.stderr)
    leave(exit_code)


def leave(exit_code: int) -> None:
    """End the program, unless it may simply return: alone and without a fault.

    Workers are killed: they outlive SIGTERM by half a minute. One of several processes ends at once, without the
    interpreter's clean-up, in which gloo's threads abort some.
    """
    if exit_code:
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error at the end of a worker
        for worker in multiprocessing.active_children():
            worker.kill()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if exit_code == 0:
            from lib import processes  # here, because it imports torch, which a wrong flag need not wait for

            processes.end()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)
    if exit_code:
        sys.exit(exit_code)
