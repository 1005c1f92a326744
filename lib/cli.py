"""The door of every stage: flags in, exit codes out.

A stage is a function whose signature is its command line. A flag is one line of it, with type, bounds and meaning:

    reg: Literal["none", "mhe"] = "none",
    lr: Annotated[float, "> 0", "< 1e6", "learning rate per 256 images"] | None = None,
    k: Annotated[tuple[Annotated[int, ">= 1"], ...], "numbers of neighbours"] = (10, 20),

`run(stage)` checks the command line against the signature before Fire calls the stage: Fire alone would run the
function first and reject a misspelt flag afterwards. Fire prints --help, which is made from the same lines.
"""

import contextlib
import difflib
import functools
import inspect
import math
import multiprocessing
import operator
import os
import re
import signal
import sys
import time
import types
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import fire

from lib import streams
from lib.errors import InputError, Stopped
from lib.log import is_main

Flags = Mapping[str, inspect.Parameter]  # the parameters of a stage, by name

AFTER_A_SWITCH = ("true", "false", "none")  # words that are the value of the switch before them
COMPARISONS = {">=": operator.ge, ">": operator.gt, "<=": operator.le, "<": operator.lt}
LAUNCHER = "accelerate launch"

# What people mean: a meaning, then the words of other projects for it, without underscores. A meaning counts where a
# stage has each flag that it names; one that begins with LAUNCHER counts where a stage has a network.
MEANT = {
    "--out": "output outputdir outputpath outputfolder outdir savedir savepath savefolder logdir workdir rundir expdir "
    "experimentdir defaultrootdir checkpointdir ckptdir checkpointpath name runname expname exp experimentname",
    "--ckpt": "checkpoint checkpointpath ckptpath ckptfile weights pretrained pretrainedweights modelpath load resume",
    "--init": "pretrained pretrainedweights pretrainedpath initweights initialweights initfrom initcheckpoint finetune",
    "--out, whose run goes on": "checkpoint ckpt ckptpath load loadfrom resumefrom resumefromcheckpoint",
    "--weight": "weights lambda lambd lam regweight energyweight uniformityweight mheweight",
    "--dataset or --data_dir": "data datapath dataroot root rootdir traindir imagedir imagepath imagenetpath inputdir",
    "--dataset": "data datasetname ds traindata",
    "--model": "arch a architecture backbone network modelname modelarch encodertype basemodel",
    "--method": "algorithm algo ssl sslmethod objective loss",
    "--reg": "regularizer regulariser regularization regularisation regtype energy mhe amhe uniform uniformity",
    "--reg_on": "reglayers layers reglayer",
    "--s": "power exponent spower rieszs",
    "--epochs": "epoch nepochs ne numepochs maxepochs maxepoch nbepochs totalepochs trainepochs numtrainepochs "
    "pretrainepochs iterations iters steps step maxsteps numsteps maxiter",
    "--batch_size": "b bs batch batchsz perdevicetrainbatchsize trainbatchsize globalbatchsize perdevicebatchsize "
    "batchsizepergpu minibatchsize",
    "--accumulate": "accum accumiter accumsteps gradaccum gradaccumsteps gradientaccumulation "
    "gradientaccumulationsteps accumulategradbatches accumulationsteps updatefreq",
    "--optimizer": "opt optim optimiser lars sgd adam adamw",
    "--lr": "learningrate baselr blr baselearningrate initlr maxlr peaklr lrbase lrs",
    "--weight_decay": "wd decay l2 weightdecayend",
    "--warmup": "warmupepochs warmepochs nwarmup warmupsteps lrwarmup",
    "--tau": "mocom ema emadecay emamomentum momentumema momentumteacher momentumtarget taubase basetau taustart "
    "basemomentum targetdecay basetargetema targetema movingaveragedecay momentumencoder",
    "--temperature": "t temp softmaxt ncet simclrt knnt",
    "--hidden_dim": "mlpdim projhiddendim hiddensize predhiddendim hiddenmlp headhidden headhiddendim mlphiddendim",
    "--out_dim": "dim projdim projoutdim projectiondim projectionsize projectordim featuredim featdim embeddim zdim "
    "projoutputdim",
    "--jitter": "colorjitter colourjitter cj cjstrength jitterstrength colorjitterstrength strength brightness "
    "contrast saturation hue",
    "--grey": "gray grayscale greyscale grayp greyp grayprob randomgrayscale prandomgray",
    "--blur_p": "blur gaussianblur blurprob pblur",
    "--eval_crop": "crop croppct evalcroppct",
    "--holdout": "val validation valsplit usevalidation validationsplit",
    "--seed": "randomseed manualseed seeds rngseed",
    "--save_every": "savefreq savesteps saveinterval saveeverynsteps saveckptfreq checkpointevery checkpointfreq",
    "--eval_every": "evalfreq evalsteps evalinterval valinterval knnevery knnfreq checkvaleverynepoch",
    "--tracker": "logger logwith reportto wandb usewandb tensorboard trackio usetensorboard tb",
    "--k": "nbknn neighbors neighbours knn knnk nneighbors numneighbors",
    "--net": "checkpointkey ckptkey teacher target useteacher",
    "--cached": "precompute cachefeatures precomputedfeatures",
    "momentum is 0.9, of each --optimizer": "momentum sgdmomentum beta1",
    "the rate falls along a half cosine after --warmup": "scheduler sched lrscheduler lrschedule schedule cosine cos "
    "minlr finallr lrdecay",
    "the --dataset decides the size of the views": "imagesize imgsize imsize cropsize inputsize resolution size res",
    "the --dataset says which classes there are": "numclasses nclasses nbclasses",
    "--workers": "j numworkers nworkers worker dataloadernumworkers loaderworkers nproc",
    "flags alone are settings, there is no configuration file": "config cfg configfile configpath configname conf",
    "each process needs whole weights, so there is no FSDP or DeepSpeed": "fsdp usefsdp deepspeed usedeepspeed "
    "deepspeedconfig usemegatronlm zero zerostage",
    f"{LAUNCHER} --mixed_precision fp16": "fp16 half float16 usefp16",
    f"{LAUNCHER} --mixed_precision bf16": "amp useamp bf16 bfloat16 usebf16 autocast precision mixedprecision dtype",
    f"{LAUNCHER} --cpu": "cpu usecpu nocuda nogpu forcecpu",
    f"{LAUNCHER} --gpu_ids 0": "device deviceid deviceids gpu gpuid gpuids cuda cudadevice cudavisibledevices "
    "visibledevices usecuda usegpu accelerator",
    f"{LAUNCHER} --num_processes 2": "gpus ngpus ngpu numgpus numgpu devices ndevices numdevices numprocesses nprocs "
    "nprocpernode nprocesses worldsize multigpu ddp distributed strategy multiprocessingdistributed",
    f"{LAUNCHER} --num_machines 2 --machine_rank 0": "nummachines machinerank nodes numnodes nnodes noderank rank "
    "localrank",
    f"{LAUNCHER} --main_process_ip HOST --main_process_port 29500": "disturl distbackend mainprocessip "
    "mainprocessport masteraddr masterport port initmethod rdzvendpoint",
    f"{LAUNCHER} --dynamo_backend inductor": "compile torchcompile usecompile dynamo dynamobackend compilemodel",
    f"{LAUNCHER} --num_cpu_threads_per_process 2": "threads numthreads nthreads numcputhreadsperprocess",
}
ALIKE = 0.75  # difflib's ratio from which a flag is suggested: one wrong letter of four
MUCH_ALIKE = 0.85  # the same for names of other projects, which are many
DEAD_WORKER = (
    "as they do where memory, or shared memory (/dev/shm), is short: take a smaller --workers (0 = none), "
    "or give more (docker run --shm-size 8g)"
)
IN_WORDS = {int: "a whole number", float: "a number", bool: "True or False", str: "a text"}


def run(stage: Callable) -> None:
    """Call a stage with the flags of the command line, and end the program as a shell expects.

    InputError ends it with one line and exit code 2, a signal with one line and 128 + its number.
    """
    with streams.guarded():
        run_guarded(stage)


def run_guarded(stage: Callable) -> None:
    """Do what `run` does, with streams that anything may be written to."""
    try:
        call(stage, sys.argv[1:])
        sys.stdout.flush()
    except InputError as e:
        fail(e, 2)
    except Stopped as e:
        stop(e.reason, e.exit_code)
    except KeyboardInterrupt:
        stop("interrupted", 130)
    except RuntimeError as e:
        if "DataLoader worker" in str(e):
            fail(f"a process that reads pictures has died, {DEAD_WORKER}", 1, wait=True)
        if "gloo" not in str(e):
            raise
        fail("another process has ended", 1, wait=True)
    except BrokenPipeError:
        leave(1)  # the reader of our rows has left, as `head` does
    leave(0)


def call(stage: Callable, words: list[str]) -> None:
    """Call a stage with the words of a command line, by Fire, which prints --help if that is among them."""
    flags = inspect.signature(stage).parameters
    asks_help = "-h" in words or "--help" in words
    values = {} if asks_help else read(words, flags)

    @functools.wraps(stage)
    def command(*_, **__):
        in_place, named = by_place(values, flags)
        stage(*in_place, **named)

    flags_in_help = [for_help(flag) for flag in flags.values()]
    command.__signature__ = inspect.Signature(flags_in_help)
    command.__doc__ = help_text(stage)
    typed = ["--help"] if asks_help else []
    for name, value in values.items():
        if not is_many(flags[name]):
            typed.append(f"--{name}={value}")
    fire.Fire(command, typed, name=program())


def by_place(values: dict[str, Any], flags: Flags) -> tuple[list, dict[str, Any]]:
    """Split the values of a stage into those that Python passes by their place and those it passes by name."""
    named = dict(values)
    in_place = []
    for name, flag in flags.items():
        if is_many(flag):
            in_place.extend(named.pop(name))
        elif flag.kind is flag.POSITIONAL_OR_KEYWORD:
            in_place.append(named.pop(name))
    return in_place, named


def for_help(flag: inspect.Parameter) -> inspect.Parameter:
    """Return a flag as Fire is to print it: without its type, which Fire cuts short and `help_text` gives in full."""
    default = NoneInHelp() if flag.default is None else flag.default
    return flag.replace(annotation=flag.empty, default=default)


class NoneInHelp:
    """The default None in --help. Fire prints a type, "Optional[]", beside each default that it sees as "None"."""

    def __repr__(self) -> str:
        return "None "  # the space makes the difference


def help_text(stage: Callable) -> str:
    """Return the docstring that Fire explains a stage by: its first paragraph, then each flag's type and meaning."""
    purpose = (inspect.getdoc(stage) or "").partition("\n\n")[0]
    lines = [" ".join(purpose.split()), "", "Args:"]
    for name, flag in inspect.signature(stage).parameters.items():
        lines.append(f"    {name}: [{in_words(flag.annotation)}] {meaning(flag.annotation)}".rstrip())
    return "\n".join(lines)


def program() -> str:
    """Return the name of the program, as messages begin with it."""
    return Path(sys.argv[0]).name


def stop(reason: str, exit_code: int) -> None:
    """End the program after a signal, which all of several processes get: the first says why."""
    if is_main():
        fail(reason, exit_code)
    else:
        leave(exit_code)


def fail(reason: object, exit_code: int, wait: bool = False) -> None:
    """End the program with one line on standard error.

    Of several processes the first speaks for all. The others wait, and the launcher ends them once the first has ended,
    before they repeat its line. With `wait` the first waits, too, so that the process that failed can speak.
    """
    if wait or not is_main():
        time.sleep(2)
    line = " ".join(str(reason).split())
    print(f"{program()}: {line}", file=sys.stderr)
    leave(exit_code)


def leave(exit_code: int) -> None:
    """End the program, unless it may simply return: alone and without a fault.

    One of several processes ends at once, without the interpreter's clean-up, in which gloo's threads abort some.
    """
    if exit_code:
        end_workers()
    if os.environ.get("WORLD_SIZE", "1") != "1":
        if exit_code == 0:
            from lib import processes  # here, because it imports torch, which a wrong flag need not wait for

            processes.end()
        with contextlib.suppress(InputError, BrokenPipeError):
            sys.stdout.flush()
        sys.stderr.flush()
        os._exit(exit_code)
    if exit_code:
        sys.exit(exit_code)


def end_workers() -> None:
    """End the processes that read pictures at once: they outlive SIGTERM by half a minute, and would be waited for."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch raises an error at the end of a worker
    for worker in multiprocessing.active_children():
        worker.kill()


# ---- From words to values --------------------------------------------------------------------------------------------


def read(words: list[str], flags: Flags) -> dict[str, Any]:
    """Return the values that a command line gives to flags, by name; those that are not given are left out.

    InputError for a flag that is unknown, given twice or not of its type, and for a place that is empty.
    """
    words = list(words)
    places = [name for name, flag in flags.items() if flag.kind is flag.POSITIONAL_OR_KEYWORD]
    many = next((name for name, flag in flags.items() if is_many(flag)), None)
    values = {many: ()} if many else {}
    while words:
        word = words.pop(0)
        if is_flag(word):
            name, typed, text = take_flag(word, words, flags)
        elif places:
            name, typed, text = places[0], places[0].upper(), word
        elif many:
            values[many] += (os.path.expanduser(word),)
            continue
        else:
            raise InputError(f"{word}: a stray word; flags are given as --name value, see --help")
        if name in values:
            raise InputError(f"{typed} {text}: given twice")
        try:
            values[name] = parse(text, flags[name].annotation)
        except ValueError as e:
            raise InputError(f"{typed} {text}".rstrip() + f": expected {e}") from e
        if name in places:
            places.remove(name)
    if places:
        raise InputError(f"{places[0].upper()} is missing, see --help")
    return values


def take_flag(word: str, words: list[str], flags: Flags) -> tuple[str, str, str]:
    """Return the name of a flag, the way it was typed, and its text, which may be the next of `words` and is taken."""
    typed, equals, text = word.partition("=")
    name, negated = find(typed, flags)
    value = words[0] if words and words[0].lower() in AFTER_A_SWITCH else ""
    if negated and (equals or value):
        raise InputError(f"{word} {value}".rstrip() + f": --no{name} takes no value")
    if equals:
        return name, typed, text
    switch = is_switch(flags[name])
    value_follows = bool(words) and not is_flag(words[0])
    if switch and value_follows:
        value_follows = words[0].lower() in AFTER_A_SWITCH
    if value_follows:
        text = words.pop(0)
    elif switch:
        text = str(not negated)
    return name, typed, text


def is_flag(word: str) -> bool:
    """Whether a word of the command line begins with a hyphen and is not a negative number."""
    return word.startswith("-") and not word[1:2].isdigit() and word[1:2] != "."


def find(typed: str, flags: Flags) -> tuple[str, bool]:
    """Return the flag that was typed, and whether --no stood before its name. InputError if there is none.

    An initial will do if no other flag has it, here or in other projects.
    """
    name = typed.lstrip("-").replace("-", "_")
    if name in flags:
        return name, False
    switch = name.removeprefix("no").lstrip("_")
    if name.startswith("no") and switch in flags and is_switch(flags[switch]):
        return switch, True
    if len(name) == 1:
        same_initial = {flag for flag in flags if flag.startswith(name)}
        elsewhere = {meaning.lstrip("-") for meaning, words in MEANT.items() if name in words.split()}
        candidates = same_initial | (elsewhere & flags.keys())  # -j is --workers in other projects, not --jitter
        if same_initial and len(candidates) == 1:
            return candidates.pop(), False
    raise InputError(f"{typed}: no such flag; {hint(name, flags)}")


def hint(name: str, flags: Flags) -> str:
    """Return what may have been meant by the name of a flag that is not there, or which flags are."""
    name = name.lower()
    word = name.replace("_", "")
    meanings = [meaning for meaning, words in MEANT.items() if word in words.split()]
    for meaning in meanings:
        if meaning.startswith(LAUNCHER) and "model" in flags:
            return f"the launcher decides, before the name of the script: {meaning} {program()}"
        if set(re.findall(r"--(\w+)", meaning)) <= flags.keys():
            return f"did you mean {meaning}?" if meaning.startswith("--") else meaning
    if not meanings:
        elsewhere = {}  # a flag of ours by its name in other projects
        for meaning, words in MEANT.items():
            if meaning.lstrip("-") in flags:
                elsewhere |= dict.fromkeys(words.split(), meaning)
        for alike in difflib.get_close_matches(name, flags, 1, cutoff=ALIKE):
            return f"did you mean --{alike}?"
        for alike in difflib.get_close_matches(word, elsewhere, 1, cutoff=MUCH_ALIKE):
            return f"did you mean {elsewhere[alike]}?"
    return f"known: {', '.join('--' + flag for flag in flags)}"


def parse(text: str, annotation: Any) -> Any:
    """Return the value of a flag from its text. A ValueError's message is what the annotation expects, in words."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin in (Union, types.UnionType):  # X | None
        return None if text == "None" else parse(text, args[0])
    if origin is Annotated:
        return parse_bounded(text, annotation)
    if origin is tuple:
        return parse_tuple(text, annotation)
    if origin is Literal:
        return parse_choice(text, args)
    return parse_plain(text, annotation)


def parse_bounded(text: str, annotation: Any) -> Any:
    """Return a value that lies within the bounds of an Annotated type, if that has any."""
    inner = get_args(annotation)[0]
    if not bounds(annotation):
        return parse(text, inner)
    try:
        value = parse(text, inner)
    except ValueError:
        raise ValueError(in_words(annotation)) from None
    for bound in bounds(annotation):
        comparison, limit = bound.split()
        if not COMPARISONS[comparison](value, float(limit)):
            raise ValueError(in_words(annotation))
    return value


def parse_tuple(text: str, annotation: Any) -> tuple:
    """Return values that are separated by commas, each of which may be given once; brackets and quotes are ignored."""
    inner = get_args(annotation)[0]
    parts = text.strip("()[], ").split(",")
    try:
        values = tuple(parse(part.strip(" '\""), inner) for part in parts)
    except ValueError:
        raise ValueError(in_words(annotation)) from None
    if len(set(values)) < len(values):
        raise ValueError(in_words(annotation))
    return values


def parse_choice(text: str, choices: tuple[str, ...]) -> str:
    """Return one of a Literal's choices."""
    if text in choices:
        return text
    suggestions = difflib.get_close_matches(text, choices, 1)
    hint = f" (did you mean {suggestions[0]}?)" if suggestions else ""
    raise ValueError(", ".join(choices) + hint)


def parse_plain(text: str, kind: type) -> Any:
    """Return an int, a finite float, a bool, or a text that is not empty, with ~ as the home folder.

    A shell leaves the ~ of --out=~/runs as it is.
    """
    valid = text != ""
    if kind is bool:
        value = text.lower() == "true"
        valid = text.lower() in ("true", "false")
    else:
        try:
            value = kind(text)
        except ValueError:
            raise ValueError(in_words(kind)) from None
    if kind is str:
        value = os.path.expanduser(text)
    if kind is float:
        valid = math.isfinite(value)
    if not valid:
        raise ValueError(in_words(kind))
    return value


# ---- What a signature says -------------------------------------------------------------------------------------------


def defaults(stage: Callable) -> dict[str, Any]:
    """Return the default of each flag of a stage that has one."""
    flags = inspect.signature(stage).parameters
    return {name: flag.default for name, flag in flags.items() if flag.default is not flag.empty}


def is_many(flag: inspect.Parameter) -> bool:
    """Whether a flag is any number of texts, given by place."""
    return flag.kind is flag.VAR_POSITIONAL


def is_switch(flag: inspect.Parameter) -> bool:
    """Whether a flag is on or off, so that its name alone, or --no and its name, will do."""
    annotation = without_none(flag.annotation)
    return annotation is bool or bool in get_args(annotation)


def without_none(annotation: Any) -> Any:
    """Return X for X | None, and any other type as it is."""
    if get_origin(annotation) in (Union, types.UnionType):
        return get_args(annotation)[0]
    return annotation


def bounds(annotation: Any) -> list[str]:
    """Return the bounds of an Annotated type: its texts that begin with a comparison."""
    return [text for text in get_args(annotation)[1:] if text.startswith((">", "<"))]


def meaning(annotation: Any) -> str:
    """Return the meaning of a flag: the text of its Annotated type that is not a bound, or nothing."""
    annotation = without_none(annotation)
    if get_origin(annotation) is Annotated:
        for text in get_args(annotation)[1:]:
            if text not in bounds(annotation):
                return text
    return ""


def in_words(annotation: Any) -> str:
    """Return the values that a flag takes, in words."""
    annotation = without_none(annotation)
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        limits = " and ".join(bounds(annotation))
        return f"{in_words(args[0])} {limits}".rstrip()
    if origin is tuple:
        return f"values separated by commas, each once: {in_words(args[0])}"
    if origin is Literal:
        return ", ".join(args)
    return IN_WORDS[annotation]
