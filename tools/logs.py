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
EARLIER = {"optimizer": "lars", "tau_end": 1.0, "jitter": 1.0, "grey": 0.2, "predictor": "mlp", "queue": 0}
EARLIER |= {"init": None, "init_digest": None, "prefix": None}  # settings that the oldest logs do not name


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

    def score(self, stage: str, of: str = "trained", features: str = "augmented") -> float | None:
        """Return the last top-1 (%) by the protocol of linear_eval or of knn_eval, k = 20; `of` may be a floor."""
        row = self.score_row(stage, of, features)
        return row["top1"] if row else None

    def score_row(self, stage: str, of: str = "trained", features: str = "augmented") -> dict | None:
        """Return the row with that accuracy; None without one. Variants such as --labels do not count.

        features: those that the linear classifier learned from, "augmented" or, by --cached, "cached".
        Where knn_eval has not been run, the online k-NN of the last epoch is the same number, and so are its floors.
        """
        judged = {"stage": stage, "split": "test", "net": "online", "labels": None}
        judged["eval_crop"] = self.settings["eval_crop"]
        if stage == "knn_eval":
            online = {"stage": "pretrain", "of": of, "split": "test", "k": 20}
            if of == "trained":
                online |= {"of": "online", "epoch": self.settings["epochs"]}
            protocols = [judged | {"of": of, "k": 20, "temperature": 0.07}, online]
        else:
            protocols = [judged | {"features": features, "epochs": 80, "weight_decay": 0.0}]  # its defaults
        for protocol in protocols:
            for row in reversed(self.rows):
                if self._counts(row) and all(row.get(key) == value for key, value in protocol.items()):
                    return row
        return None

    def _counts(self, row: dict) -> bool:
        """Whether a row is of the finished training, on its data, in fp32, of the default batch and rate or a sweep."""
        # rows of old versions, all in fp32, do not say so
        epochs, place = self.settings["epochs"], self.settings["dataset"]
        is_finished = row.get("trained_epochs", epochs) == epochs
        of_usual_rate = row.get("swept") or row.get("lr", 0.2) == 0.2
        of_usual_batch = row.get("batch_size", 100) == 100 or row["train"] < 100
        in_fp32 = row.get("precision", "no") == "no"
        on_own_data = row.get("own_data", same_place(row.get("dataset", place), place))
        return is_finished and in_fp32 and on_own_data and of_usual_rate and of_usual_batch


def read_log(folder: Path) -> RunLog:
    """Return the log of a run folder. InputError for one whose first row is not that of pretrain.py."""
    rows = read_rows(folder)
    settings = rows[0].get("settings", {}) if rows else {}
    if not settings.keys() >= SETTINGS:
        raise InputError(f"{folder / LOG}: its first row does not hold the settings of a run")
    return RunLog(folder, settings | EARLIER | settings, rows)  # in the order of the log
