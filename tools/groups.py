"""Runs that differ in their seed alone, under one name: what a line of a figure and a row of a table stand for."""

import statistics
import textwrap
from pathlib import Path

import models
from harness.settings import TERMS, idle_flags, name_of_weights
from lib.errors import InputError
from lib.log import PLACES, other_data
from tools.logs import RunLog

NOT_COMPARED = ("seed", "eval_every", "recipe", "skip_broken", *PLACES)  # the recipe's numbers and the data are
NAMED = ("method", "reg", "s")  # by method_name
OF_A_TERM = ("weight", "reg_on")  # λ and the layers are compared among runs with the same term
NO_EFFECT = "no effect"  # in place of the value of a setting that does not act on a run

Groups = dict[str, list[RunLog]]


def by_data(runs: list[RunLog]) -> Groups:
    """Group runs that were trained and judged on the same data, wherever these lie; named by the data set."""
    named = {}
    for run in runs:
        fitting = [group for group in named.values() if not other_data(run.rows[0], group[0].rows[0])]
        name = Path(run.settings["dataset"]).resolve().name
        if fitting:
            fitting[0].append(run)
        else:
            named[f"{name}, as in {run.folder}" if name in named else name] = [run]
    return named


def groups(runs: list[RunLog], apart: tuple[str, ...] = ()) -> Groups:
    """Group runs that differ in their seed and in `apart` alone, named by the method and by every setting that differs.

    The runs are of the same data. InputError for two that agree in all of it.
    """
    names = dict.fromkeys(name for run in runs for name in (*run.settings, "precision"))
    names = [name for name in names if name not in (*NOT_COMPARED, *apart)]
    alike = {}
    for run in runs:
        by_seed = alike.setdefault(tuple(value_of(run, name) for name in names), {})
        twin = by_seed.setdefault(tuple(run.settings[name] for name in ("seed", *apart)), run)
        if twin is not run:
            raise InputError(f"{twin.folder} and {run.folder} have the same settings and seed; name one")
    found = [[*by_seed.values()] for by_seed in alike.values()]
    firsts = [group[0] for group in found]
    named = {}
    for first, group in zip(firsts, found):
        details = [detail(first, name) for name in names if differs(name, first, firsts)]
        label = ", ".join([method_name(first.settings), *details])
        if label in named:  # weights of one name
            label += f", as {first.folder}"
        named[label] = group
    return named


def value_of(run: RunLog, name: str):
    """Return the value of a setting, or the precision; NO_EFFECT where it does not act on the run."""
    settings = run.settings | {"precision": run.rows[0].get("precision", "no")}
    value = NO_EFFECT if name in idle_flags(settings) else settings.get(name)
    return tuple(value) if isinstance(value, list) else value


def differs(name: str, run: RunLog, runs: list[RunLog]) -> bool:
    """Whether a setting that acts on a run, and is not in its method's name, tells it from other runs."""
    if name in NAMED or value_of(run, name) == NO_EFFECT:
        return False
    term = TERMS.get(run.settings["reg"])
    compared = [other for other in runs if name not in OF_A_TERM or TERMS.get(other.settings["reg"]) == term]
    return len({value_of(other, name) for other in compared} - {NO_EFFECT}) > 1


def detail(run: RunLog, name: str) -> str:
    """Write a setting in a label: networks joined by a plus, weights by their name without their path."""
    value = value_of(run, name)
    if name == "init_digest":
        return f"init {name_of_weights(run.settings['init']) if value else None}"
    if name == "precision":
        return "fp32" if value == "no" else value
    return f"{name} {'+'.join(map(str, value)) if isinstance(value, tuple) else value}"


def wrapped(label: str, width: int) -> list[str]:
    """Break a label into lines, between settings where that will do."""
    unbroken = label.replace(" ", "\xa0").replace(",\xa0", ", ")  # textwrap breaks at no such space
    return [line.replace("\xa0", " ") for line in textwrap.wrap(unbroken, width, break_on_hyphens=False)]


def method_name(settings: dict) -> str:
    """Name the method and its regularizer: BYOL-aMHE, s = 2."""
    s, reg = f"{settings['s']:g}", settings["reg"]
    suffixes = {"none": "", "uniform": " + uniformity", "mhe": f"-MHE, s = {s}", "amhe": f"-aMHE, s = {s}"}
    return models.METHODS[settings["method"]].title + suffixes.get(reg, f" + {reg}")


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Compute the mean and the sample standard deviation; that of one value is 0."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), std
