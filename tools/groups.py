"""Runs that differ in their seed alone, under one name: what a line of a figure and a row of a table stand for."""

import statistics

import models
from harness.settings import name_of_weights
from lib.errors import InputError
from lib.log import PLACES, other_data
from tools.logs import RunLog

NOT_COMPARED = ("seed", "eval_every", *PLACES)  # settings that make no difference to what is compared

Groups = dict[str, list[RunLog]]


def groups(runs: list[RunLog], apart: tuple[str, ...] = ()) -> Groups:
    """Group runs that differ in their seed alone, named by the method and by what tells it from other groups.

    The settings named in `apart` may differ, too. InputError for two runs that agree in their seed as well.
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
        refuse_twins(group, apart)
        by_method.setdefault(method_name(group[0].settings), []).append(group)
    named = {}
    for method, same_method in by_method.items():
        settings = [with_named_weights(group[0].settings) for group in same_method]
        differing = [name for name in settings[0] if name not in ignored and differs(settings, name)]
        if "reg_on" in differing and settings[0]["reg"] not in ("mhe", "amhe"):  # it says what is logged, no more
            differing.remove("reg_on")
        if "init_digest" in differing:
            name_weights(differing, settings)
        if any(other_data(group[0].rows[0], same_method[0][0].rows[0]) for group in same_method):
            differing.insert(0, "dataset")
        for group, values in zip(same_method, settings):
            details = [f"{name} {as_text(values.get(name))}" for name in differing]
            label = ", ".join([method, *details])
            if label in named:  # another precision, or other data in the same place
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


def refuse_twins(group: list[RunLog], apart: tuple[str, ...]) -> None:
    """Raise InputError for two runs of a group with the same seed."""
    by_seed = {}
    for run in group:
        seed = tuple(run.settings[name] for name in ("seed", *apart))
        if seed in by_seed:
            raise InputError(f"{by_seed[seed].folder} and {run.folder} have the same settings and seed; name one")
        by_seed[seed] = run


def with_named_weights(settings: dict) -> dict:
    """Return settings with the name of the weights that a run began from in place of their path."""
    init = settings.get("init")
    return settings | {"init": name_of_weights(init)} if init else settings


def name_weights(differing: list[str], settings: list[dict]) -> None:
    """Put the name of the weights before their digest; drop the digest if no two groups have one name for several."""
    place = differing.index("init_digest")
    differing.insert(place, "init")
    weights = {(values.get("init"), values["init_digest"]) for values in settings}
    names = {name for name, _ in weights}
    if len(names) == len(weights):
        differing.remove("init_digest")


def differs(settings: list[dict], name: str) -> bool:
    """Whether a setting has several values."""
    return len({as_text(values.get(name)) for values in settings}) > 1


def as_text(value) -> str:
    """Write a setting's value as it appears in a name: networks joined by a plus."""
    is_networks = isinstance(value, list) and value and isinstance(value[0], str)
    return "+".join(value) if is_networks else str(value)


def method_name(settings: dict) -> str:
    """Name the method and its regularizer: BYOL-aMHE, s = 2."""
    s = f"{settings['s']:g}"
    suffixes = {"none": "", "uniform": " + uniformity", "mhe": f"-MHE, s = {s}", "amhe": f"-aMHE, s = {s}"}
    return models.METHODS[settings["method"]].title + suffixes[settings["reg"]]


def mean_and_std(values: list[float]) -> tuple[float, float]:
    """Compute the mean and the sample standard deviation; that of one value is 0."""
    std = statistics.stdev(values) if len(values) > 1 else 0.0
    return statistics.fmean(values), std
