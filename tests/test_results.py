"""Each number in a table of README and docs/results.md, and each of ours in docs/claims.md, follows from the logs."""

import functools
import re
import statistics

import pytest
from conftest import ROOT

from tools.logs import read_log
from tools.paper import PaperRow

PAGES = ("README.md", "docs/results.md", "docs/claims.md")
TEXT = "\n".join((ROOT / page).read_text() for page in PAGES).replace("\N{MINUS SIGN}", "-")
SETTINGS = "method reg s reg_on weight norm predictor batch_size accumulate optimizer lr tau out_dim".split()
ALL, REG, OTHERS, NOT_RATE = r"--\S+ \S+", r"--reg\S* \S+", r"--(?!reg )\S+ \S+", r"--(?!lr )\S+ \S+"
TABLES = [  # heading, folder of the logs, flags of all rows, and those of a row that its baseline lacks
    ("## Results", "cifar10", "", NOT_RATE),
    ("## BYOL, its regularizers", "photos", "", ALL),
    ("## Every regularizer", "photos-3-epochs", "", ALL),
    ("## Other methods", "photos-methods", "", REG),
    ("## Without the predictor", "photos-methods", "--predictor none", REG),
    ("### The recipe `folder`", "cifar10-5000", "", ALL),
    ("### All 50,000", "cifar10", "", ALL),
    ("### Plain BYOL", "cifar10-holdout", "", ALL),
    ("### Half the rate", "cifar10", "--lr 0.24", ALL),
    ("### Three times as long", "cifar10-60-epochs", "--lr 0.24", ALL),
    ("### The λ of the regularizers", "cifar10-5000-holdout", "", ALL),
    ("### Small micro-batches", "cifar10", "", OTHERS),
]
STUDENT = 4.303  # the mean of three differences exceeds as many standard errors by chance once in twenty times


def table_below(heading):
    """The cells of a table, a list a row: the heads, the rule below them, and the rows."""
    table = TEXT.split(f"\n{heading}")[1].split("\n\n|")[1].split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]


@functools.cache
def logs_of(place):
    return [read_log(folder) for folder in (ROOT / "results" / place).iterdir()]


def series(run, column):
    """What a log has in a column of the tables: one number, or a vote after each of several epochs."""
    of = {"untrained": "untrained", "raw pixels": "pixels"}.get(column, "online")
    if column == "linear":
        return [row["top1"] for row in run.rows if row.get("features") == "cached" and "top1" in row]
    if column.startswith("k-NN") or of != "online":
        votes = [row["top1"] for row in run.rows if row.get("of") == of and row["k"] == 20]
        return votes if column.startswith("k-NN after") else votes[-1:]
    is_of_features = column in ("rank", "g2") or column.startswith("block/")
    numbers = list(run.series(column, "representations" if is_of_features else None).values())
    if column == "images_per_s":
        return [max(numbers)]
    return [x * run.settings["out_dim"] ** 0.5 if column == "std" else x for x in numbers[-1:]]


def by_seed(place, flags, column):
    """The series of the runs in a folder of logs that have these flags."""
    recipe = logs_of(place)[0].settings["recipe"]
    settings = PaperRow(place, f"--recipe {recipe} {flags}", 0).settings()
    usual = statistics.mode(run.settings["batch_size"] for run in logs_of(place))
    settings["batch_size"] = settings["batch_size"] or usual  # by the size of the set
    runs = [run for run in logs_of(place) if all(run.settings[name] == settings[name] for name in SETTINGS)]
    numbers = {run.settings["seed"]: series(run, column) for run in runs}
    return {seed: x for seed, x in numbers.items() if x}


def assert_printed(printed, expected, of):
    for number, x in zip(printed, expected, strict=True):
        half_a_digit = 0.5001 * 10.0 ** -len(number.partition(".")[2])
        assert float(number) == pytest.approx(x, abs=half_a_digit), (of, expected)


@pytest.mark.parametrize("heading, place, common, lacking", TABLES)
def test_numbers_of_a_table_follow_from_the_logs(heading, place, common, lacking):
    heads, _, *rows = table_below(heading)
    for name, *cells in rows:
        flags = " ".join(re.findall("`(--.*)`", name))
        for head, cell in zip(heads[1:], cells):
            printed = re.findall(r"[-+]?\d+\.\d+", cell)
            if not printed:
                continue
            column = name if name in ("untrained", "raw pixels") else head.removeprefix("difference, ")
            numbers = by_seed(place, f"{common} {flags}", column)
            if head.startswith("difference"):
                baseline = by_seed(place, f"{common} {re.sub(lacking, '', flags)}", column)
                numbers = {seed: [x[-1] - baseline[seed][-1]] for seed, x in numbers.items()}
            expected = [statistics.fmean(x) for x in zip(*numbers.values())]
            if "±" in cell:
                spread = statistics.stdev(x[-1] for x in numbers.values())
                expected.append(spread / len(numbers) ** 0.5 if head.startswith("difference") else spread)
            assert_printed(printed, expected, (name, head))


@pytest.mark.parametrize("row", table_below("## Tested in small")[2:], ids=lambda row: row[0][:40])
def test_numbers_and_verdict_of_a_claim_follow_from_the_logs(row):
    claim, _, here, flags, seeds, log, verdict = row
    place, n = re.search(r"[\w-]+", log)[0], int(seeds)
    for part in here.split("; "):
        column, text = part.split(" ", 1)
        runs = [by_seed(place, words, column) for words in re.findall("`(.*?)`", flags)]
        assert min(map(len, runs)) == n
        values = [[numbers[seed][-1] for seed in range(n)] for numbers in runs]
        expected = [[statistics.fmean(x), statistics.stdev(x)] if n > 1 else x for x in values]
        for printed, numbers in zip(text.split(", "), expected, strict=True):
            assert_printed(re.findall(r"-?[\d.]+", printed), numbers, claim)
        if n == 3 and len(values) == 2:
            differences = [b - a for a, b in zip(*values)]
            is_told = abs(statistics.fmean(differences)) > STUDENT * statistics.stdev(differences) / n**0.5
            assert is_told == verdict.startswith(("confirmed", "contradicted")), differences
    assert ("one seed" in verdict) == (n == 1)
