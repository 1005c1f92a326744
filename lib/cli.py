"""The door of every stage: flags in, exit codes out.

A stage is a function whose signature is its command line. A flag is one line of it, with type, bounds and meaning:

    reg: Literal["none", "mhe"] = "none",
    lr: Annotated[float, "> 0", "< 1e6", "learning rate per 256 images"] | None = None,
    k: Annotated[tuple[Annotated[int, ">= 1"], ...], "numbers of neighbours"] = (10, 20),

and `**shared: shared_flags` are those of another function. Fire parses the words. Alone it would guess types, and
reject a misspelt flag after the stage has run; so flags are checked before, and texts are read by the annotations.
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

from lib import log, processes
from lib.errors import InputError, Stopped

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
Flags = Mapping[str, inspect.Parameter]  # by name


def run(stage: Callable, groups: Mapping[str, str] | None = None) -> None:
    """Call a stage with the flags of the command line, and end the program as a shell expects.

    groups: titles in --help, by the first flag of each group. InputError ends the program with one line and exit code
    2, a signal with one line and 128 + its number.
    """
    for name in ("stdin", "stdout", "stderr"):
        if getattr(sys, name) is None:  # closed; the null device takes its number, or a checkpoint would
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
    if hasattr(sys.stdout, "reconfigure"):  # notebooks have other streams
        sys.stdout.reconfigure(errors="backslashreplace")  # of letters that it lacks
    try:
        if "-h" in sys.argv or "--help" in sys.argv:
            print(help_text(stage, groups or {}))
        else:
            values = bound_values(sys.argv[1:], flags_of(stage))
            log.rows_wanted = values.arguments.get("json", False)
            stage(*values.args, **values.kwargs)
        sys.stdout.flush()
    except InputError as e:
        fail(e, 2)
    except (Stopped, KeyboardInterrupt) as e:
        reason, exit_code = e.args or ("interrupted", 130)
        if log.is_main():  # a signal reaches all of several processes
            fail(reason, exit_code)
        leave(exit_code)
    except OSError as e:
        end_without_output(e)
    except RuntimeError as e:
        if "DataLoader worker" in str(e):
            advice = "where memory, or /dev/shm, is short: give more, or take a smaller --workers (0 = none)"
            fail(f"a process that reads pictures has died, as {advice}", 1, wait=True)
        if "gloo" not in str(e):
            raise
        fail("another process has ended", 1, wait=True)
    leave(0)


def values_of(words: list[str], stage: Callable) -> dict[str, Any]:
    """Return the values that words give to flags of a stage, by name, no defaults; InputError as `bound_values`."""
    return bound_values(words, flags_of(stage)).arguments


def flags_of(stage: Callable) -> Flags:
    """Return the flags of a stage, and those of the function that annotates its **shared."""
    flags = dict(inspect.signature(stage).parameters)
    if "shared" in flags:
        flags |= inspect.signature(flags.pop("shared").annotation).parameters
    return flags


# ---- From words to values --------------------------------------------------------------------------------------------
def bound_values(words: list[str], flags: Flags) -> inspect.BoundArguments:
    """Return the values that words give to flags, as a stage takes them.

    InputError for a flag that is unknown, given twice or not of its type, and for a place that is empty.
    """
    given = fire.decorators.SetParseFn(str)(lambda *places, **texts: (places, texts))
    places, texts = fire.Fire(given, spelled_out(words, flags), serialize=lambda _: None)  # it prints nothing
    try:
        bound = inspect.Signature([*flags.values()]).bind(*places, **texts)
    except TypeError as e:  # a place without a text, or a text without a place
        _, missing, *_ = f"{e}''".split("'")
        fault = f"{places[-1]}: a stray word" if places else f"{missing.upper()} is missing"
        raise InputError(f"{fault}; flags are given as --name value, see --help") from e
    for name, text in bound.arguments.items():
        try:
            bound.arguments[name] = parse(text, flags[name].annotation)
        except ValueError:
            expected, _ = in_words(flags[name].annotation)
            for choice in difflib.get_close_matches(text, expected.split(", "), 1):
                expected += f" (did you mean {choice}?)"
            typed = f"--{name}" if name in texts else name.upper()
            raise InputError(f"{typed} {text}".rstrip() + f": expected {expected}") from None
    return bound


def spelled_out(words: list[str], flags: Flags) -> list[str]:
    """Return words with each flag as --name=text, which leaves Fire nothing to guess."""
    names = [name for name, flag in flags.items() if flag.kind is not flag.VAR_POSITIONAL]
    words, places, texts = [*words], [], {}
    while words:
        word = words.pop(0)
        if not FLAG.match(word):
            places.append(word)
            continue
        typed, equals, text = word.partition("=")
        name = typed.lstrip("-").replace("-", "_")
        if name not in names:
            name, text = re.sub("^no_?", "", name), "False"
            if equals or name not in names or not is_switch(flags[name].annotation):
                raise InputError(f"{typed}: no such flag; {hint(typed, names)}")
        elif not equals and is_switch(flags[name].annotation):
            text = words.pop(0) if words and words[0].lower() in ("true", "false", "none") else "True"
        elif not equals and words and not FLAG.match(words[0]):
            text = words.pop(0)
        if name in texts:
            raise InputError(f"--{name} {text}: given twice")
        texts[name] = text
    return [*places, *[f"--{name}={text}" for name, text in texts.items()]]


def is_switch(annotation: Any) -> bool:
    """Whether a flag needs no text, because it is True or False."""
    return annotation is bool or any(map(is_switch, get_args(annotation)))


def hint(typed: str, flags: list[str]) -> str:
    """Return what may have been meant by a flag that is not there, or which flags are."""
    meanings = {flag.replace("_", ""): f"--{flag}" for flag in flags}
    meanings |= {word: text for word, text in ELSEWHERE.items() if text.endswith(LAUNCHER) or text[2:] in flags}
    for alike in difflib.get_close_matches(re.sub("[-_]", "", typed).lower(), meanings, 1, cutoff=0.8):
        return f"did you mean {meanings[alike]}?"
    return f"known: {', '.join('--' + flag for flag in flags)}"


def parse(text: str | tuple[str, ...], annotation: Any) -> Any:
    """Return the value of a flag from its text, or of all places from theirs. ValueError if one is not allowed."""
    if isinstance(text, tuple):
        return tuple(parse(each, annotation) for each in text)
    origin, args = get_origin(annotation), get_args(annotation)
    if NoneType in args:
        return None if text.lower() == "none" else parse(text, args[0])
    if origin is Annotated:
        value = parse(text, args[0])
        bounds = [note.split() for note in args[1:] if note.startswith((">", "<"))]
        valid = all(COMPARISONS[comparison](value, float(limit)) for comparison, limit in bounds)
    elif origin is Literal:
        value, valid = text, text in args
    elif annotation is str:
        value, valid = os.path.expanduser(text), text != ""  # a shell leaves the ~ of --out=~/runs
    elif annotation in (int, float):
        value = annotation(text)
        valid = -math.inf < value < math.inf
    elif annotation is bool:
        value, valid = text.lower() == "true", text.lower() in ("true", "false")
    else:
        parts = text.strip("()[], ").split(",")
        value = tuple(parse(part.strip(" '\""), args[0]) for part in parts)
        valid = len(set(value)) == len(value)
    if not valid:
        raise ValueError(text)
    return value


# ---- What a signature says -------------------------------------------------------------------------------------------
def in_words(annotation: Any) -> tuple[str, str]:
    """Return the values that a flag takes, in words, and its meaning."""
    origin, args = get_origin(annotation), get_args(annotation)
    if NoneType in args:
        return in_words(args[0])
    if origin is Annotated:
        values, _ = in_words(args[0])
        bounds = [note for note in args[1:] if note.startswith((">", "<"))]
        meaning = " ".join(note for note in args[1:] if note not in bounds)
        return f"{values} {' and '.join(bounds)}".rstrip(), meaning
    if origin is tuple:
        return f"values separated by commas, each once: {in_words(args[0])[0]}", ""
    if origin is Literal:
        return ", ".join(args), ""
    return IN_WORDS[annotation], ""


def help_text(stage: Callable, groups: Mapping[str, str]) -> str:
    """Return what --help prints: the purpose of a stage, its flags in groups, and the first example of its file."""
    purpose, *_ = inspect.getdoc(stage).split("\n\n")
    paragraphs = [textwrap.fill(f"{os.path.basename(sys.argv[0])}: {purpose}", 80)]
    flags = flags_of(stage)
    column = 6 + max(map(len, flags), default=0)
    lines = textwrap.TextWrapper(80, subsequent_indent=" " * column, break_on_hyphens=False)
    for name, flag in flags.items():
        if name in groups or len(paragraphs) == 1:
            paragraphs.append(groups.get(name, "flags"))
        default = ",".join(map(str, flag.default)) if isinstance(flag.default, tuple) else flag.default
        text = ": ".join(in_words(flag.annotation)).removesuffix(": ")
        text += "" if default is flag.empty else f" [{default}]"
        typed = f"--{name}" if flag.kind is flag.KEYWORD_ONLY else name.upper()
        lines.initial_indent = f"  {typed}".ljust(column)
        paragraphs[-1] += "\n" + lines.fill(text)
    example = re.search(r"^    ([^#\n]+)", inspect.getmodule(stage).__doc__ or "", re.MULTILINE)
    if example:
        paragraphs.append(f"example\n  {example[1].rstrip()}")
    return "\n\n".join(paragraphs)


# ---- Streams and exit codes ------------------------------------------------------------------------------------------
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

    Of several processes the first speaks: the others wait, and the launcher ends them before they repeat it. With
    `wait` the first waits, too, so that the process that failed can speak.
    """
    if wait or not log.is_main():
        time.sleep(2)
    print(f"{os.path.basename(sys.argv[0])}: {' '.join(str(reason).split())}", file=sys.stderr)
    leave(exit_code)


def leave(exit_code: int) -> None:
    """End the program; a single process without a fault just returns.

    Workers are killed: they outlive SIGTERM by half a minute. One of several processes ends at once, without the
    interpreter's clean-up, in which gloo's threads abort some.
    """
    if exit_code:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error at the end of a worker
        for worker in multiprocessing.active_children():
            worker.kill()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if exit_code == 0:
            processes.end()
        with contextlib.suppress(OSError):
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(exit_code)
    if exit_code:
        sys.exit(exit_code)
