"""A table of runs for each data set: mean and sample standard deviation over seeds, with the floors of the k-NN.

A dead network, whose outputs are the same for all images, is called dead: the alignment of its projections, 0, would be
the best there is.
"""

import csv
import io
import itertools
from pathlib import Path

from lib.files import write_whole
from tools.groups import by_data, groups, mean_and_std, wrapped
from tools.logs import RunLog
from tools.paper import is_row, paper_rows

OF_PROJECTIONS = ("uniformity", "alignment")
OF_FEATURES = ("rank", "uniformity_share")
FLOORS = {"untrained": "untrained", "init": "init", "pixels": "raw pixels"}  # and what tables and figures call them
HEADS = {"k-NN": "k-NN (%)", "linear": "linear (%)", "cached": "cached (%)"} | FLOORS  # the numbers that are printed
COLUMNS = (*HEADS, *OF_PROJECTIONS, "energy", *OF_FEATURES, "images_per_s")  # those of table.csv
WIDTH = 100  # of a printed line, where the numbers leave 20 for the name


def table(runs: list[RunLog]) -> list[dict]:
    """Make a row for each group of seeds, by data set: first the paper's rows in its order, then the others."""
    paper = [(row, row.settings()) for row in paper_rows()]
    ordered = []
    for dataset, same_data in sorted(by_data(runs).items()):
        for label, group in groups(same_data).items():
            settings = group[0].settings
            places = [i for i, (_, expected) in enumerate(paper) if is_row(settings, expected)]
            row = {"run": label, "dataset": dataset, "seeds": len(group)}
            for key in COLUMNS:
                row |= summary(key, values_of(group, key))
            row["dead"] = sum(is_dead(run) for run in group)
            row["paper"] = "/".join(dict.fromkeys(f"{paper[i][0].top1:.2f}" for i in places))
            row["paper's rows"] = "; ".join(paper[i][0].name for i in places)
            order = (dataset, min(places, default=len(paper)))
            ordered.append((order, row))
    ordered.sort(key=lambda pair: pair[0])
    return [row for _, row in ordered]


def values_of(group: list[RunLog], key: str) -> list[float]:
    """Return a column's numbers of a group of seeds, without those that a run does not have, or not to the end."""
    if key in HEADS:
        stage = "linear_eval" if key in ("linear", "cached") else "knn_eval"
        of = key if key in FLOORS else "trained"
        features = "cached" if key == "cached" else "augmented"
        scores = [run.score(stage, of, features) for run in group]
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
    last = {row.get("of"): row for row in run.rows if row["stage"] == "pretrain"}  # of each kind
    return any(last.get(of, {}).get("dead", False) for of in (None, "representations"))


def summary(key: str, values: list[float]) -> dict:
    """Return a column's mean, its sample standard deviation, of two numbers or more, and how many there are."""
    mean, std = mean_and_std(values) if values else (None, None)
    return {key: mean, f"{key} std": std if len(values) > 1 else None, f"{key} n": len(values)}


def cell(row: dict, key: str) -> str:
    """Write mean and standard deviation, and the number of seeds where it is not all of them."""
    if row[key] is None:
        return ""
    text = f"{row[key]:.1f}"
    if row[f"{key} std"] is not None:
        text += f" ± {row[f'{key} std']:.1f}"
    if row[f"{key} n"] != row["seeds"]:
        text += f" ({row[f'{key} n']})"
    return text


def table_lines(rows: list[dict]) -> list[str]:
    """Write a Markdown table for each data set, without empty columns; a long name goes on in the lines below."""
    lines = []
    for dataset, same_data in itertools.groupby(rows, key=lambda row: row["dataset"]):
        table = [["run", "seeds", *HEADS.values(), "paper's linear"]]
        for row in same_data:
            part = "" if row["dead"] == row["seeds"] else f"{row['dead']} of {row['seeds']} "
            name = row["run"] + (f" ({part}dead)" if row["dead"] else "")
            table.append([name, str(row["seeds"]), *(cell(row, key) for key in HEADS), row["paper"]])
        columns = [column for column in zip(*table) if any(column[1:])]
        widths = [max(map(len, column)) for column in columns]
        widths[0] = min(widths[0], max(20, WIDTH - sum(widths[1:]) - len(" | ") * len(widths) - 1))
        lines += ["", f"### {dataset}", ""]
        for i, (name, *cells) in enumerate(zip(*columns)):
            for part in wrapped(name, widths[0]):
                padded = (text.ljust(width) for text, width in zip([part, *cells], widths))
                lines.append(f"| {' | '.join(padded)} |")
                cells = [""] * len(cells)
            if i == 0:
                lines.append(f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return lines[1:]


def write_table(runs: list[RunLog], folder: Path) -> None:
    """Write table.md and table.csv; print the first, and the names of both. InputError from `files.write_whole`."""
    rows = table(runs)
    lines = table_lines(rows)
    write_text(folder / "table.md", "\n".join([*lines, ""]))
    write_csv(folder / "table.csv", rows)
    print(*lines, folder / "table.md", folder / "table.csv", sep="\n")


def write_csv(path: Path, rows: list[dict]) -> None:
    """Write the names of the columns, and below them the rows, which all have these."""
    text = io.StringIO()
    writer = csv.DictWriter(text, rows[0].keys(), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    write_text(path, text.getvalue())


def write_text(path: Path, text: str) -> None:
    """Write a text in UTF-8; letters that it has no bytes for, as names of folders may have, are escaped."""
    with write_whole(path) as file:
        file.write(text.encode(errors="backslashreplace"))
