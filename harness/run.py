"""A run's folder, and how a run that was stopped goes on.

    ckpt.safetensors      the whole state, see `state`, and a description of the run
    encoder/              the encoder alone, as the last save at an epoch's end left it and as timm reads it
    metrics.jsonl         the log, a JSON object a row

The order of the images and their views are functions of (seed, epoch, step), so that a run that goes on ends in the
bits of a run that never stopped. Of several processes, which all make the same calls, the first prints and writes.
"""

import contextlib
import os
import shlex
import signal
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, wait
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from harness import checkpoint, measure, settings, state
from harness.settings import Settings
from lib import files, processes
from lib.errors import InputError, Stopped
from lib.files import CKPT, LOG, WEIGHTS
from lib.log import PLACES, contents, emit, progress, provenance, read_rows, rewind, same_place

SECONDS_BETWEEN_LOOKS = 5  # of several processes, for a signal or a save that is due: each look makes all of them wait


class Run:
    """A run from the claim of its folder to its end: position, sums of the epoch in progress, log, signals, files."""

    def __init__(self, folder: Path, training, steps: int, save_every: str):
        """Claim a folder, and bring a `pretrain.Training` to its state. InputError if another run is, or was, in it."""
        self.folder, self.training, self.steps, self.save_every = folder, training, steps, save_every
        self.cfg, self.accelerator = training.cfg, training.accelerator
        self.steps_per_epoch = steps // self.cfg.epochs
        with processes.first_alone(self.accelerator):
            self.lock = files.claim(folder) if self.accelerator.is_main_process else None
            tensors, stored = stored_state(folder)
        images, view = training.images, training.images.view(self.cfg.eval_crop)
        self.description = {"settings": {**vars(self.cfg)}, "view": view, "data": contents(images, self.cfg.holdout)}
        self.description |= {"images": len(images.pretraining.labels), "steps": steps, **provenance()}
        self.step, self.whole_epochs, self.epoch, self.sums = 0, 0, 0, {}
        if stored:
            settings.refuse_other_run(folder, self.description, stored)
            self.step, self.whole_epochs = stored["step"], stored["epoch"]
            self.sums = state.restore(tensors, training.network, training.optimizer, self.accelerator)
            if self.accelerator.scaler and stored["scaler"]:
                self.accelerator.scaler.load_state_dict(stored["scaler"])
        if processes.are_several():
            facts = {name: self.description[name] for name in ("settings", "view", "steps")}
            processes.agree(**facts, step=self.step, save_every=save_every)
        self.numbers = {}  # of the latest micro-batch, or of the first that was not finite
        self.log_file, self.signals, self.warned = folder / LOG if self.lock else None, [], set()
        self.latest = {}  # the last row of each kind, by its "of"
        self._writer = ThreadPoolExecutor(1)  # hashes and writes: on a fast GPU that takes as long as many steps
        self._saving = None  # the last piece of its work, a Future

    # ---- Before the first step ---------------------------------------------------------------------------------------
    def announce(self, lines: list[str]) -> None:
        """Begin the log, or go on with it, and print what the run is about to do, unless it is finished."""
        if self.log_file is None:
            return
        hardware = processes.hardware(self.accelerator)
        rows = rewind(self.folder, self.whole_epochs if self.step else -1) if self.log_file.exists() else []
        if rows:
            goes_on = "goes on after" if self.whole_epochs < self.cfg.epochs else "is finished,"
            print(f"{self.folder}: {goes_on} step {self.step}", file=sys.stderr)
            print_changes(rows[0], self.description, hardware)
            self.warned = {row["about"] for row in rows if row.get("of") == "warning"}
            self.latest = {row["of"]: row for row in rows if row["stage"] == "pretrain" and "of" in row}
        else:
            emit({"stage": "pretrain", **self.description, **hardware}, self.log_file, f"run folder {self.folder}")
        if self.whole_epochs < self.cfg.epochs:
            self.accelerator.init_trackers("pretrain", {name: str(x) for name, x in vars(self.cfg).items()})
            print(*lines, sep="\n  ", file=sys.stderr)

    def __enter__(self) -> "Run":
        """Show progress, and keep a first SIGTERM or SIGINT for the step to be finished; a second one ends it."""
        is_silent = self.whole_epochs == self.cfg.epochs
        self._bar = progress(self.steps, self.step, is_silent)
        is_new = not all((self.folder / name).exists() for name in (CKPT, WEIGHTS))
        self._schedule = state.Schedule(self.save_every, self.step, is_new)
        self._looked_at, self._look_step, self._next_look = time.monotonic(), self.step, self.step + 1
        self._handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._keep_signal)
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        """Wait for the file that is being written."""
        try:
            self._end_save()
        except (InputError, OSError):
            if error is None:  # otherwise the error that ends the run is the one to tell
                raise
        finally:
            self._keep_signal()
            self._bar.close()

    def _keep_signal(self, number: int | None = None, _frame=None) -> None:
        """Note a signal, and put the handlers back that were there before."""
        if number:
            self.signals.append(signal.Signals(number))
        if number and self.log_file:  # a launcher leaves at once, and gives the prompt back
            told = f"\n{self.signals[0].name}: saves and stops; a second one loses the work since the last save\n"
            with contextlib.suppress(OSError):
                os.write(2, told.encode())  # `print` may be what the signal has interrupted
        for handled, handler in self._handlers.items():
            signal.signal(handled, handler)

    # ---- While it trains ---------------------------------------------------------------------------------------------
    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, from 1."""
        for epoch in range(self.whole_epochs + 1, self.cfg.epochs + 1):
            self.epoch = epoch
            self._bar.set_description(f"epoch {epoch}/{self.cfg.epochs}", refresh=False)
            self._began, self._first_step = time.perf_counter(), self.step
            self._schedule.epoch_began = self._schedule.now(self.step)
            yield epoch

    def rest_of_epoch(self, micro_batches: Iterator) -> Iterator:
        """Yield those micro-batches, of an iterator over the rest of the run, that are left in the epoch."""
        steps_left = self.epoch * self.steps_per_epoch - self.step
        yield from islice(micro_batches, steps_left * self.cfg.accumulate)

    def after(self, terms: dict[str, Tensor]) -> None:
        """Add the terms of a micro-batch to the sums; after a step, count it, and save or stop if that is due."""
        step = torch.full((), self.step, device=self.accelerator.device)
        self.numbers = measure.first_fault(self.numbers, {"step": step, **terms})
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term / self.cfg.accumulate
        if not self.accelerator.sync_gradients:
            return
        self.step += 1
        self._bar.update()
        if self._saving and self._saving.done():
            self._end_save()  # raises what it has raised
        caught, is_due = self._look()
        at_epoch_end = self.step == self.epoch * self.steps_per_epoch
        if caught or (is_due and not at_epoch_end):
            self._save()
        if caught:
            self._stop(caught)

    @property
    def images_per_s(self) -> float:
        """Return how many images a second the epoch took, over all processes, since it began or the run went on."""
        images = (self.step - self._first_step) * self.cfg.batch_size
        return round(images / (time.perf_counter() - self._began), 1)

    def means(self) -> dict[str, float]:
        """Return the terms' means over steps and processes. InputError if one is not finite."""
        # Before judging, whose loaders fork: a child must not inherit locks that the thread holds. And before the row
        # of a second epoch: `stored_state` takes it for a proof that there was a checkpoint.
        self._end_save()
        row = {}
        for name, total in self.sums.items():
            row[name] = self.accelerator.reduce(total, "mean").item() / self.steps_per_epoch
        measure.refuse_faults(self.numbers, self.training.network, self.folder, self.accelerator)
        return row

    def log(self, shown: str | None = None, **columns) -> None:
        """Log a row, print it, or on a terminal what is shown, and give it to the tracker; warn of a dead network."""
        row = {"stage": "pretrain", "epoch": self.epoch, "step": self.step, **columns}
        if row.get("std", 1) * self.cfg.out_dim**0.5 < measure.DEAD:  # as a share of a full sphere's
            row["dead"] = True
        if "of" in row:
            self.latest[row["of"]] = row
        if shown is None:
            shown = pretraining_line(row, self.cfg)
        emit(row, self.log_file, shown)
        prefix = f"{row['of']}/" if "of" in row else ""
        numbers = {prefix + name: x for name, x in row.items() if isinstance(x, float)}
        self.accelerator.log(numbers, step=self.step)
        if row.get("dead"):
            self._warn("dead", measure.DEAD_NETWORK)

    def log_scores(self, of: str, scores_by_k: dict[int, dict[str, float]]) -> None:
        """Log the accuracy of a k-NN vote, for each k."""
        split = "holdout" if self.cfg.holdout else "test"
        for k, scores in scores_by_k.items():
            shown = vote_line(of, scores["top1"], self.floors)
            self.log(shown, of=of, split=split, k=k, **scores)

    @property
    def floors(self) -> dict[str, float]:
        """Return the accuracies of the votes before the first step, where there were any."""
        return {of: self.latest[of]["top1"] for of in ("untrained", "init", "pixels") if of in self.latest}

    def _warn(self, about: str, text: str) -> None:
        """Warn of a thing once in a run, and log it."""
        if self.log_file is None or about in self.warned:
            return
        self.warned.add(about)
        self.log("", of="warning", about=about, text=text)
        processes.say(f"WARNING: {text}")

    def wants_floors(self) -> bool:
        """Whether the network and the pixels are judged now: before the first step, on a small bank."""
        return self.step == 0 and self.cfg.eval_every > 0 and measure.floors_are_cheap(self.training.images)

    def judges_now(self) -> bool:
        """Whether the encoder is judged after this epoch: each `eval_every` epochs, and after the last."""
        eval_every = self.cfg.eval_every
        return eval_every > 0 and (self.epoch % eval_every == 0 or self.epoch == self.cfg.epochs)

    def end_epoch(self) -> None:
        """Save the state between two epochs if that is due, and stop if a signal came; warn of poor features."""
        if self.log_file and self.judges_now() and 3 * self.step >= self.steps:  # before, they may be poor
            top1, rank = self.latest["online"]["top1"], self.latest["representations"]["rank"]
            fault = measure.poor_features(top1, self.floors, rank)
            if fault and "dead" not in self.warned:
                self._warn("features", fault)
        self.sums = {}
        self.whole_epochs = self.epoch
        caught, is_due = self._look(at_epoch_end=True)
        is_last = self.step == self.steps
        if caught or is_due or is_last:
            self._save()
        if caught and not is_last:
            self._stop(caught)

    def _save(self) -> None:
        """Copy the state, to be written while the training goes on. InputError if it is not finite or cannot be."""
        self._end_save()  # before the copy: there is never more than one
        network, optimizer = self.training.network, self.training.optimizer
        measure.refuse_faults(self.numbers, network, self.folder, self.accelerator)
        tensors = state.captured(network, optimizer, self.sums, self.accelerator)
        self._schedule.saved_at, self._schedule.is_new = self._schedule.now(self.step), False
        if self.log_file is None:
            return
        scaler = self.accelerator.scaler and self.accelerator.scaler.state_dict()
        description = {**self.description, "epoch": self.whole_epochs, "step": self.step, "scaler": scaler}
        at_epoch_end = self.step == self.whole_epochs * self.steps_per_epoch
        self._saving = self._writer.submit(self._write, tensors, description, at_epoch_end)

    def _write(self, tensors: dict[str, Tensor], description: dict, at_epoch_end: bool) -> None:
        """Write the files of a save, the encoder's first."""
        if at_epoch_end:
            encoder = {name.removeprefix("encoder."): x for name, x in tensors.items() if name.startswith("encoder.")}
            of_encoder = {name: x for name, x in description.items() if name != "scaler"}
            in_files = not isinstance(self.training.images.test.images, Tensor)
            config = checkpoint.timm_config(description["settings"], description["view"], in_files)
            checkpoint.save_encoder(self.folder, encoder, of_encoder, config)
        checkpoint.save(self.folder / CKPT, tensors, {**description, "holds": "checkpoint"})

    def _end_save(self) -> None:
        """Return when the last save is whole; raise what it has raised."""
        while self._saving and not self._saving.done():
            wait([self._saving], timeout=1)  # in turns: a signal that comes just before one begins would not end it
        if self._saving:
            self._saving.result()

    def _stop(self, caught: signal.Signals) -> None:
        """Raise Stopped, once the first process has written: the launcher ends all after the first that leaves."""
        self._end_save()
        processes.wait_for_all(self.accelerator)
        holds = f"{self.folder / CKPT} holds it, and the same command goes on"
        raise Stopped(f"{caught.name} after step {self.step} of {self.steps}; {holds}", 128 + caught)

    def _look(self, at_epoch_end: bool = False) -> tuple[signal.Signals | None, bool]:
        """Return the signal that was caught, if any, and whether a save is due; all processes return the same.

        One process looks after every step. Several look every few seconds and at an epoch's end: one signal counts for
        all, and the first process decides what is due, and how many steps later the next look is.
        """
        number = int(self.signals[0]) if self.signals else 0
        is_due = self._schedule.is_due(self.step, at_epoch_end)
        if self.accelerator.num_processes > 1:
            due_for_all = is_due and self._schedule.unit == "steps"  # which all processes count alike
            if not (at_epoch_end or due_for_all or self.step >= self._next_look):
                return None, False
            if self.accelerator.device.type == "cuda":
                torch.cuda.synchronize()  # the steps until now are to be done, not only launched
            now = time.monotonic()
            steps_a_second = (self.step - self._look_step) / max(now - self._looked_at, 1e-6)
            steps = max(1, round(SECONDS_BETWEEN_LOOKS * steps_a_second))
            mine = torch.tensor([[number, is_due, steps]], device=self.accelerator.device)
            rows = self.accelerator.gather(mine).tolist()  # one for each process
            number, is_due, steps = max(row[0] for row in rows), bool(rows[0][1]), rows[0][2]
            self._looked_at, self._look_step, self._next_look = now, self.step, self.step + steps
        return signal.Signals(number) if number else None, is_due

    def finish(self) -> None:
        """End the trackers, and name the checkpoint and the commands that judge it."""
        processes.wait_for_all(self.accelerator)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.log_file is None:
            return
        ckpt = shlex.quote(str(self.folder / CKPT))
        lines = [f"{ckpt} is complete"]
        if "online" in self.latest:
            lines.append(vote_line("online", self.latest["online"]["top1"], self.floors))
        if self.training.images.classes:
            lines += [f"python {judge}.py {ckpt}" for judge in ("knn_eval", "linear_eval")]
        print(*lines, sep="\n    ", file=sys.stderr)


# ---- What people at a terminal read in place of rows ----------------------------------------------------------------
def pretraining_line(row: dict, cfg: Settings) -> str:
    """Say what an epoch's row, or one of the representations, holds that a person wants to know."""
    if "of" in row:
        return f"{row['of']}: rank {row['rank']:.1f}  uniformity {row['uniformity']:.2f}"
    names = dict.fromkeys(["loss", cfg.method, cfg.term, "energy", "uniformity", "lr"])
    numbers = [f"{name} {row[name]:.4g}" for name in names if name in row]
    return "  ".join([f"epoch {row['epoch']}/{cfg.epochs}", *numbers, f"{row['images_per_s']:.0f} images/s"])


def vote_line(of: str, top1: float, floors: dict[str, float]) -> str:
    """Say the accuracy (%) of a k-NN vote, with its floors, if any, in brackets."""
    if of != "online":
        return f"{of}: k-NN {top1:.1f} %"
    beside = ", ".join(f"{name} {floor:.1f}" for name, floor in floors.items())
    return f"k-NN {top1:.1f} %" + (f"  ({beside})" if beside else "")


# ---- The folder ------------------------------------------------------------------------------------------------------
def stored_state(folder: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Read the state in a folder, and its description, None without one. InputError if it is damaged, or was lost."""
    ckpt = folder / CKPT
    if ckpt.exists():
        tensors, description = checkpoint.load_file(ckpt)
        if description["holds"] != "checkpoint":
            raise InputError(f"{ckpt}: holds {description['holds']}, not the state of a run; name another --out")
        return tensors, description
    rows = read_rows(folder) if (folder / LOG).exists() else []
    is_cut = "settings" not in rows[0] if rows else (folder / WEIGHTS).exists()
    if is_cut or any(row["stage"] != "pretrain" or row.get("epoch", 0) > 1 for row in rows):
        raise InputError(f"--out {folder}: holds a run whose {CKPT} is gone; name another folder, or remove this one")
    return {}, None


def print_changes(first_row: dict, description: dict, hardware: dict) -> None:
    """Print what may differ from the first row of a run's log and does: hardware, versions, places of the data."""
    now = {**hardware, "versions": description["versions"], "git": description["git"]}
    for name, value in now.items():
        if value != first_row.get(name):
            print(f"{name}: {value} (it was {first_row.get(name)})", file=sys.stderr)
    for name in PLACES:
        place, before = description["settings"][name], first_row["settings"][name]
        if place != before and not same_place(place, before):
            print(f"{name}: {place} (it was {before}); it holds the same", file=sys.stderr)
