"""Logs of runs as columns and scores, for tables and figures.

run = read_log(Path("runs/photos-amhe"))
run.series("loss")          # {step: value}
run.score("knn_eval")       # the last top-1 accuracy in percent
"""

import math
from dataclasses import dataclass
from pathlib import Path

from lib.errors import InputError
from lib.files import LOG
from lib.log import read_rows, same_place

SETTINGS = {"dataset", "method", "reg", "accumulate"}  # some that the first row of every run has
EARLIER = {  # settings that the oldest logs do not name, with their values
    "optimizer": "lars",
    "tau_end": 1.0,
    "jitter": 1.0,
    "grey": 0.2,
    "predictor": "mlp",
    "queue": 0,
    "init": None,
    "init_digest": None,
    "prefix": None,
}


@dataclass(frozen=True)
class RunLog:
    """The log of a run: its folder, the settings it was trained with, and its rows."""

    folder: Path
    settings: dict
    rows: list[dict]

    def series(self, key: str, of: str | None = None) -> dict[int, float]:
        """Return the finite values of a column of pretraining, by step; `of` names the kind of row."""
        values = {}
        for row in self.rows:
            of_this_kind = row["stage"] == "pretrain" and row.get("of") == of
            if of_this_kind and "step" in row and key in row and math.isfinite(row[key]):
                values[row["step"]] = row[key]
        return values

    def score(self, stage: str) -> float | None:
        """Return the last top-1 accuracy (%) by the protocol of knn_eval, at k = 20, or of linear_eval, if any."""
        row = self.score_row(stage)
        return row["top1"] if row else None

    def score_row(self, stage: str) -> dict | None:
        """Return the row with that accuracy; None without one.

        Variants of the protocol do not count, such as --labels, nor do rows of a run that was still under way. Where
        knn_eval has not been run, the online k-NN of the last epoch is the same number.
        """
        settings = self.settings
        wanted = {"stage": stage, "split": "test", "net": "online", "labels": None}
        wanted["eval_crop"] = settings["eval_crop"]
        if stage == "knn_eval":
            wanted |= {"of": "trained", "k": 20, "temperature": 0.07}
        else:
            wanted |= {"features": "augmented", "epochs": 80, "weight_decay": 0.0}  # linear_eval's defaults
        row = self._last_row(wanted)
        if row is None and stage == "knn_eval":
            online = {"stage": "pretrain", "of": "online", "split": "test", "k": 20}
            online["epoch"] = settings["epochs"]
            row = self._last_row(online)
        return row

    def _last_row(self, wanted: dict) -> dict | None:
        """Return the last row of a finished training that has all the wanted values."""
        epochs, own_place = self.settings["epochs"], self.settings["dataset"]
        for row in reversed(self.rows):
            is_finished = row.get("trained_epochs", epochs) == epochs
            is_other_rate = row["stage"] == "linear_eval" and not row.get("swept") and row.get("lr", 0.2) != 0.2
            in_fp32 = row.get("precision", "no") == "no"  # rows of old versions, all in fp32, do not say
            on_own_data = row.get("own_data", same_place(row.get("dataset", own_place), own_place))
            fits = is_finished and in_fp32 and on_own_data and not is_other_rate
            if fits and all(row.get(key) == value for key, value in wanted.items()):
                return row
        return None


def read_log(folder: Path) -> RunLog:
    """Return the log of a run folder. InputError for one whose first row is not that of pretrain.py."""
    rows = read_rows(folder)
    settings = rows[0].get("settings", {}) if rows else {}
    if not settings.keys() >= SETTINGS:
        raise InputError(f"{folder / LOG}: its first row does not hold the settings of a run")
    return RunLog(folder, EARLIER | settings, rows)
