"""Runs that differ in their seed alone, under one name: what a line of a figure and a row of a table stand for."""

import statistics

import models
from harness.settings import ON_NEURONS, TERMS, name_of_weights
from lib.errors import InputError
from lib.log import PLACES, other_data
from tools.logs import RunLog

NOT_COMPARED = ("seed", "eval_every", *PLACES)  # settings that make no difference to what is compared

Groups = dict[str, list[RunLog]]


def groups(runs: list[RunLog], apart: tuple[str, ...] = ()) -> Groups:
    """Group runs that differ in their seed and in `apart` alone, named by the method and by what tells groups apart.

    InputError for two runs that agree in all of it.
    """
    ignored = (*NOT_COMPARED, *apart)
    alike = []
    for run in runs:
        fitting = [group for group in alike if is_alike(run, group[0], ignored)]
        if fitting:
            fitting[0].append(run)
        else:
            alike.append([run])
    by_method = {}
    for group in alike:
        by_seed = {}
        for run in group:
            seed = tuple(run.settings[name] for name in ("seed", *apart))
            twin = by_seed.setdefault(seed, run)
            if twin is not run:
                raise InputError(f"{twin.folder} and {run.folder} have the same settings and seed; name one")
        by_method.setdefault(method_name(group[0].settings), []).append(group)
    named = {}
    for method, same_method in by_method.items():
        differing = differences([group[0] for group in same_method], ignored)
        for group in same_method:
            details = [f"{name} {setting_text(group[0].settings, name)}" for name in differing]
            label = ", ".join([method, *details])
            if label in named:  # another precision, weights of one name, or other data in the same place
                label += f", as {group[0].folder}"
            named[label] = group
    return named


def is_alike(run: RunLog, other: RunLog, ignored: tuple[str, ...]) -> bool:
    """Whether two runs have the same data, wherever these lie, the same precision, and the same settings."""
    for name in run.settings.keys() | other.settings.keys():
        if name not in ignored and run.settings.get(name) != other.settings.get(name):
            return False
    same_precision = run.rows[0].get("precision") == other.rows[0].get("precision")
    return same_precision and not other_data(run.rows[0], other.rows[0])


def differences(runs: list[RunLog], ignored: tuple[str, ...]) -> list[str]:
    """Name the settings in which runs of one method differ."""
    first = runs[0]
    names = ["dataset"] if any(other_data(run.rows[0], first.rows[0]) for run in runs) else []
    for name in first.settings:
        values = {setting_text(run.settings, name) for run in runs}
        if name in ignored or len(values) == 1:
            continue
        if name == "reg_on" and TERMS.get(first.settings["reg"]) not in ON_NEURONS:  # it says what is logged, no more
            continue
        names.append("init" if name == "init_digest" else name)
    return names


def setting_text(settings: dict, name: str) -> str:
    """Write a setting's value as it appears in a name: networks joined by a plus, weights without their path."""
    value = settings.get(name)
    if name == "init" and value:
        return name_of_weights(value)
    return "+".join(map(str, value)) if isinstance(value, list) else str(value)


def method_name(settings: dict) -> str:
    """Name the method and its regularizer: BYOL-aMHE, s = 2."""
    s, reg = f"{settings['s']:g}", settings["reg"]
    suffixes = {"none": "", "uniform": " + uniformity", "mhe": f"-MHE, s = {s}", "amhe": f"-aMHE, s = {s}"}
    return models.METHODS[settings["method"]].title + suffixes.get(reg, f" + {reg}")


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Compute the mean and the sample standard deviation; that of one value is 0."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), std
