"""The leaderboard of results/: the tables of its README.md, and leaderboard.csv, from the logs alone.

    python -m tools.leaderboard

An entry is a setting that a clean commit trained to the end with the seeds 0, 1 and 2 at least, and that was judged on
the test set. Other logs are left out, and those of `photos`. What stands in README.md above the first table is written
by hand, and stays.
"""

import statistics
from pathlib import Path

from lib import cli
from lib.errors import InputError
from lib.files import LOG
from lib.log import other_data
from tools.groups import by_data, groups
from tools.logs import RunLog, read_log
from tools.table import cell, summary, values_of, write_csv, write_text

RESULTS = Path(__file__).parent.parent / "results"
FLOORS = {"untrained": "untrained", "pixels": "raw pixels"}
SEEDS = {0, 1, 2}
NOISY = "photos"  # 500 test patches: most differences are within their noise, docs/results.md
COLUMNS = ("method", "network", "epochs", "k-NN", "linear", "seeds", "machine", "minutes", "commit", "logs")


def leaderboard():
    """Write the tables of results/README.md and results/leaderboard.csv anew, and print their names."""
    rows = board(RESULTS)
    if not rows:
        raise InputError(f"{RESULTS}: holds no setting with the seeds 0, 1 and 2")
    page, table = RESULTS / "README.md", RESULTS / "leaderboard.csv"
    lines = page.read_text().partition("\n## ")[0].rstrip().splitlines()
    for data in dict.fromkeys(row["data"] for row in rows):
        lines += ["", f"## {data}", "", f"| {' | '.join(COLUMNS)} |", "|" + "---|" * len(COLUMNS)]
        lines += [f"| {' | '.join(row[key] for key in COLUMNS)} |" for row in rows if row["data"] == data]
    write_text(page, "\n".join([*lines, ""]))
    write_csv(table, rows)
    print(page, table, sep="\n")


def board(results: Path) -> list[dict[str, str]]:
    """Make the rows of all data sets, the largest first; of one by k-NN, its floors among them.

    InputError for two entries that name their data alike, but whose data differ.
    """
    entries_by_data = {}
    for folder in sorted(results.iterdir()):
        runs = [read_log(log.parent) for log in sorted(folder.rglob(LOG))]
        for of_data in by_data([run for run in runs if counts(run)]).values():
            of_entries = []
            for group in groups(of_data).values():
                if {run.settings["seed"] for run in group} >= SEEDS:
                    of_entries += group
            for method, entry in groups(of_entries).items():  # named by what tells entries apart
                data = Path(entry[0].settings["dataset"]).name
                entries_by_data.setdefault(data, []).append((method, entry))
    rows = []
    for data, entries in sorted(entries_by_data.items(), key=lambda item: -images_per_epoch(item[1][0][1][0])):
        runs = [run for _, entry in entries for run in entry]
        for run in runs:
            if faults := other_data(run.rows[0], runs[0].rows[0]):
                raise InputError(f"{run.folder}: its data are not those of {runs[0].folder}: {', '.join(faults)}")
        of_this = [*floors(runs), *(row_of(method, entry) for method, entry in entries)]
        rows += [{"data": data, **row} for row in sorted(of_this, key=lambda row: -float(row["k-NN"].split()[0]))]
    return rows


def counts(run: RunLog) -> bool:
    """Whether a run is finished, and judged on a test set that tells runs apart, and its commit holds all its code."""
    commit = run.rows[0].get("git") or "-dirty"
    is_judged = run.score("knn_eval") is not None and run.settings["dataset"] != NOISY
    return is_judged and not commit.endswith("-dirty")


def row_of(method: str, entry: list[RunLog]) -> dict[str, str]:
    """Make the row of an entry, which is named by the settings in which the entries of its folder differ."""
    firsts = [run.rows[0] for run in entry]
    return {
        "method": method,
        "network": network(entry[0].settings),
        "epochs": str(entry[0].settings["epochs"]),
        "k-NN": mean_in_words(values_of(entry, "k-NN"), len(entry)),
        "linear": mean_in_words(values_of(entry, "cached"), len(entry)),
        "seeds": ", ".join(str(seed) for seed in sorted(run.settings["seed"] for run in entry)),
        "machine": " or ".join(sorted({machine(first) for first in firsts})),
        "minutes": f"{statistics.median(minutes(run) for run in entry):.1f}",
        "commit": ", ".join(sorted({first["git"] for first in firsts})),
        "logs": entry[0].folder.parent.name,
    }


def floors(runs: list[RunLog]) -> list[dict[str, str]]:
    """Make a row of raw pixels, and one of each network before its first step, by what the runs' logs have of them."""
    votes = {}
    for run in runs:
        for of, name in FLOORS.items():
            top1 = run.score("knn_eval", of)
            is_network = of == "untrained"
            key = (name, network(run.settings) if is_network else "")
            if top1 is not None:
                votes.setdefault(key, {})[run.settings["seed"] if is_network else ""] = top1
    rows = []
    for (method, of_network), by_seed in votes.items():
        row = dict.fromkeys(COLUMNS, "")
        row |= {"method": method, "network": of_network, "k-NN": mean_in_words([*by_seed.values()], len(by_seed))}
        row["seeds"] = ", ".join(str(seed) for seed in sorted(by_seed))
        rows.append(row)
    return rows


def mean_in_words(values: list[float], seeds: int) -> str:
    """Write the mean and its spread as the tables of `tools.figures table` do."""
    return cell({"seeds": seeds, **summary("top1", values)}, "top1")


def network(settings: dict) -> str:
    """Name the encoder."""
    name = f"{settings['model']}, stem {settings['stem']}"
    return name if settings["norm"] == "bn" else f"{name}, norm {settings['norm']}"


def machine(first: dict) -> str:
    """Name what the first row of a log says of the machine."""
    n = first.get("threads")
    threads = {None: "", 1: "1 thread"}.get(n, f"{n} threads")
    facts = [first.get("processor", first["device"]), threads]
    precision = first.get("precision", "no")
    facts.append("" if precision == "no" else precision)
    return ", ".join(filter(None, facts))


def images_per_epoch(run: RunLog) -> float:
    """Return on how many images an epoch trains."""
    return max(run.series("loss")) * run.settings["batch_size"] / run.settings["epochs"]


def minutes(run: RunLog) -> float:
    """Return how long the training took, without votes."""
    return sum(images_per_epoch(run) / speed / 60 for speed in run.series("images_per_s").values() if speed)


if __name__ == "__main__":
    cli.run(leaderboard)
