"""The rows of the paper's tables: paper_tables.csv is the one copy of its numbers, this file reads it."""

import csv
import shlex
from dataclasses import dataclass
from pathlib import Path

from data import FACTS
from harness.settings import resolve_recipe
from lib import cli
from lib.log import as_json
from pretrain import RECIPES, pretrain

TABLES = Path(__file__).parent / "paper_tables.csv"
# settings that make no difference to what a row of the paper says
NOT_COMPARED = ("seed", "data_dir", "eval_every", "eval_crop", "skip_broken")


@dataclass(frozen=True)
class PaperRow:
    """A row of a table of the paper."""

    name: str  # table and row: "5, g and q"
    flags: str  # of pretrain.py, that make it
    top1: float  # of the linear evaluation, in percent

    def settings(self) -> dict:
        """Return the settings that the flags come to, as a log has them."""
        flags = pretrain.__kwdefaults__ | cli.values_of(shlex.split(self.flags), pretrain)
        values = resolve_recipe(flags, RECIPES, world=1)
        facts = FACTS[values["dataset"]]
        values["stem"] = flags["stem"] or facts["stem"]
        values["blur_p"] = facts.get("blur_p", (0.0, 0.0))
        return as_json({name: value for name, value in values.items() if name not in NOT_COMPARED})


def paper_rows() -> list[PaperRow]:
    """Return the rows of the paper's tables, in their order."""
    rows = []
    with open(TABLES, newline="") as file:
        for line in csv.DictReader(file):
            name = f"{line['table']}, {line['row']}"
            rows.append(PaperRow(name, line["flags"], float(line["top1"])))
    return rows


def is_row(settings: dict, row: dict) -> bool:
    """Whether the settings of a run are those of a row of the paper."""
    return all(settings.get(name) == value for name, value in row.items())
