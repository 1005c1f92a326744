"""Each number in a table of README and docs/results.md follows from the logs in results/, to its last digit."""

import re
import statistics

import pytest
from conftest import ROOT

from tools.logs import read_log
from tools.paper import PaperRow

TEXT = "\n".join((ROOT / page).read_text() for page in ("README.md", "docs/results.md")).replace("\N{MINUS SIGN}", "-")
SETTINGS = "method reg s reg_on weight norm predictor accumulate optimizer lr tau out_dim".split()  # rows differ
ALL, REG, OTHERS = r"--\S+ \S+", r"--reg\S* \S+", r"--(?!reg )\S+ \S+"
TABLES = [  # heading, folder of the logs, flags of all rows, and those of a row that its baseline lacks
    ("## Results", "cifar10", "--recipe folder", ALL),
    ("## BYOL, its regularizers", "photos", "", ALL),
    ("## Every regularizer", "photos-3-epochs", "", ALL),
    ("## Other methods", "photos-methods", "", REG),
    ("## Without the predictor", "photos-methods", "--predictor none", REG),
    ("### The recipe `folder`", "cifar10-5000", "--recipe folder", ALL),
    ("### All 50,000", "cifar10", "--recipe folder", ALL),
    ("### Plain BYOL", "cifar10-holdout", "--recipe folder", ALL),
    ("### Small micro-batches", "cifar10", "--recipe folder", OTHERS),
]


def series(run, column):
    """What a log has in a column of the tables: one number, or a vote after each of several epochs."""
    of = {"untrained": "untrained", "raw pixels": "pixels"}.get(column, "online")
    if column == "linear":
        return [row["top1"] for row in run.rows if row.get("features") == "cached" and "top1" in row]
    if column.startswith("k-NN") or of != "online":
        votes = [row["top1"] for row in run.rows if row.get("of") == of and row["k"] == 20]
        return votes if column.startswith("k-NN after") else votes[-1:]
    numbers = list(run.series(column, "representations" if column == "rank" else None).values())[-1:]
    return [x * run.settings["out_dim"] ** 0.5 if column == "std" else x for x in numbers]


@pytest.mark.parametrize("heading, place, common, lacking", TABLES)
def test_numbers_of_a_table_follow_from_the_logs(heading, place, common, lacking):
    logs = [read_log(folder) for folder in (ROOT / "results" / place).iterdir()]

    def by_seed(flags, column):
        settings = PaperRow(heading, f"{common} {flags}", 0, "").settings()
        runs = [run for run in logs if all(run.settings[name] == settings[name] for name in SETTINGS)]
        return {run.settings["seed"]: series(run, column) for run in runs}

    table = TEXT.split(f"\n{heading}")[1].split("\n\n|")[1].split("\n\n")[0]
    heads, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in table.splitlines()]
    for name, *cells in rows:
        flags = " ".join(re.findall("`(--.*)`", name))
        for head, cell in zip(heads[1:], cells):
            printed = re.findall(r"[-+]?\d+\.\d+", cell)
            if not printed:
                continue
            column = name if name in ("untrained", "raw pixels") else head.removeprefix("difference, ")
            numbers = by_seed(flags, column)
            if head.startswith("difference"):
                baseline = by_seed(re.sub(lacking, "", flags), column)
                numbers = {seed: [x[-1] - baseline[seed][-1]] for seed, x in numbers.items()}
            expected = [statistics.fmean(x) for x in zip(*filter(None, numbers.values()))]
            if "±" in cell:
                spread = statistics.stdev(x[-1] for x in numbers.values())
                expected.append(spread / len(numbers) ** 0.5 if head.startswith("difference") else spread)
            for number, x in zip(printed, expected, strict=True):
                half_a_digit = 0.5001 * 10.0 ** -len(number.partition(".")[2])
                assert float(number) == pytest.approx(x, abs=half_a_digit), (name, head, expected)
