"""A table of runs: mean and sample standard deviation over seeds, with the paper's figure beside its rows.

A dead network, whose outputs are the same for all images, is called dead: the alignment of its projections, 0, would be
the best there is.
"""

import csv
import io
from pathlib import Path

from harness.measure import DEAD, DEAD_G2
from lib.files import write_whole
from tools.groups import groups, mean_and_std
from tools.logs import RunLog
from tools.paper import is_row, paper_rows

OF_PROJECTIONS = ("uniformity", "alignment")
OF_FEATURES = ("rank", "uniformity_share")
DIGITS = {"k-NN": 1, "linear": 1, "uniformity": 2, "alignment": 2, "energy": 3}  # of the columns with numbers
DIGITS |= {"rank": 1, "uniformity_share": 2, "images_per_s": 1}
HEADS = ("run", "data set", "seeds", "k-NN (%)", "linear (%)", "uniformity", "alignment", "energy")
HEADS += ("features: rank", "features: uniformity share", "images/s", "the paper's linear (%)")


def table(runs: list[RunLog]) -> list[dict]:
    """Make a row for each group of seeds: first the paper's rows in its order, then the others by data set."""
    paper = [(row, row.settings()) for row in paper_rows()]
    ordered = []
    for label, group in groups(runs).items():
        settings = group[0].settings
        places = [i for i, (_, expected) in enumerate(paper) if is_row(settings, expected)]
        row = {"run": label, "dataset": settings["dataset"], "seeds": len(group)}
        for key in DIGITS:
            values = values_of(group, key)
            mean, std = mean_and_std(values) if values else (None, None)
            row |= {key: mean, f"{key} std": std if len(values) > 1 else None, f"{key} n": len(values)}
        row["dead"] = sum(is_dead(run) for run in group)
        row["paper"] = "; ".join(f"{paper[i][0].top1:.2f} ({paper[i][0].name})" for i in places)
        order = (min(places, default=len(paper)), row["dataset"])
        ordered.append((order, row))
    ordered.sort(key=lambda pair: pair[0])
    return [row for _, row in ordered]


def values_of(group: list[RunLog], key: str) -> list[float]:
    """Return a column's numbers of a group of seeds, without those that a run does not have, or not to the end."""
    if key in ("k-NN", "linear"):
        scores = [run.score("knn_eval" if key == "k-NN" else "linear_eval") for run in group]
        return [score for score in scores if score is not None]
    found = []
    for run in group:
        series = list(run.series(key, "representations" if key in OF_FEATURES else None).values())
        if series and is_finished(run) and not (key in OF_PROJECTIONS and is_dead(run)):
            found.append(series[-1])
    return found


def is_finished(run: RunLog) -> bool:
    """Whether the log has the row of the last epoch."""
    epochs = [row["epoch"] for row in run.rows if row["stage"] == "pretrain" and "loss" in row]
    return bool(epochs) and epochs[-1] == run.settings["epochs"]


def is_dead(run: RunLog) -> bool:
    """Whether the network of the last epoch gives all images the same projections or features."""
    std = list(run.series("std").values())
    if std and std[-1] * run.settings["out_dim"] ** 0.5 < DEAD:
        return True
    g2 = list(run.series("g2", "representations").values())
    return bool(g2) and g2[-1] > DEAD_G2


def cell(row: dict, key: str) -> str:
    """Write mean and standard deviation, and the number of seeds where it is not all of them."""
    if row[key] is None:
        return "dead" if row["dead"] and key in OF_PROJECTIONS else ""
    text = f"{row[key]:.{DIGITS[key]}f}"
    if row[f"{key} std"] is not None:
        text += f" ± {row[f'{key} std']:.{DIGITS[key]}f}"
    if row[f"{key} n"] != row["seeds"]:
        text += f" ({row[f'{key} n']})"
    return text


def table_lines(rows: list[dict]) -> list[str]:
    """Write the rows as the lines of a Markdown table."""
    lines = [f"| {' | '.join(HEADS)} |", "|" + "---|" * len(HEADS)]
    for row in rows:
        name = row["run"]
        if row["dead"]:
            part = "" if row["dead"] == row["seeds"] else f"{row['dead']} of {row['seeds']} "
            name += f" ({part}dead)"
        cells = [name, Path(row["dataset"]).name, str(row["seeds"])]
        cells += [cell(row, key) for key in DIGITS]
        lines.append(f"| {' | '.join([*cells, row['paper']])} |")
    return lines


def write_table(runs: list[RunLog], folder: Path) -> None:
    """Write table.md and table.csv; print the first, and the names of both. InputError from `files.write_whole`."""
    rows = table(runs)
    lines = table_lines(rows)
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    for name, content in (("table.md", "\n".join([*lines, ""])), ("table.csv", text.getvalue())):
        with write_whole(folder / name) as file:
            file.write(content.encode(errors="backslashreplace"))
    print(*lines, folder / "table.md", folder / "table.csv", sep="\n")
