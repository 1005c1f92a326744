"""A run's folder, and how a run that was stopped goes on.

    ckpt.safetensors      the whole state: networks, momentum, random numbers, sums of the epoch in progress
    encoder/              the encoder alone, as the last save at an epoch's end left it and as timm reads it
    metrics.jsonl         the rows that were printed

A state is the tensors and the description of ckpt.safetensors. Tensors without a slash in their name are the network's.
The order of the images and their views are functions of (seed, epoch, step), so that a run that goes on ends in the
bits of a run that never stopped. `Run` is the one object with state; of the method it knows only the `Training` that
`restore` is given.
"""

import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm import tqdm

import data
from harness import checkpoint, measure, saving
from harness.initial import begin_from, initial_digest, initial_encoder
from harness.settings import Settings
from lib import files, processes
from lib.errors import InputError, Stopped
from lib.files import CKPT, ENCODER, LOG, RUN_FILES, WEIGHTS
from lib.log import (
    PLACES,
    as_json,
    contents,
    emit,
    other_data,
    read_rows,
    rewind,
    same_place,
)


class Run:
    """A run from the claim of its folder to its end: position, sums of the epoch in progress, log, signals, files.

    A run makes the same calls in each of several processes; the first alone prints and writes.
    """

    def __init__(
        self, folder: Path, cfg: Settings, images: data.Dataset, steps: int, flags: dict, accelerator: Accelerator
    ):
        """Claim the folder and read what it holds. InputError if that is another run, or if the folder is in use."""
        self.folder, self.images, self.steps = folder, images, steps
        self.flags, self.accelerator = flags, accelerator
        self._initial = initial_encoder(cfg)  # before the claim: a file that does not fit leaves no folder behind
        with processes.first_alone(accelerator):
            self.lock = claim(folder) if accelerator.is_main_process else None
            self._tensors, self._stored = stored_state(folder)
        self.cfg = cfg = replace(cfg, init_digest=initial_digest(self._initial, cfg, self._stored))
        self.steps_per_epoch = steps // cfg.epochs
        self.view = images.view(cfg.eval_crop)
        self.split = "holdout" if cfg.holdout else "test"
        in_files = not isinstance(images.test.images, Tensor)
        self.timm_config = checkpoint.timm_config(asdict(cfg), self.view, in_files)
        self.description = {"settings": asdict(cfg), "view": self.view, "data": contents(images, cfg.holdout)}
        self.description |= {"images": len(images.pretraining.labels), "steps": steps, **provenance()}
        self.whole_epochs, self.step = position(self.description, self._stored, folder)
        agreed = {**asdict(cfg), "save_every": flags["save_every"], "view": self.view}
        processes.agree(accelerator, **agreed, steps=steps, step=self.step)
        self.sums, self.numbers, self.collapsed_epochs = {}, {}, 0
        self.epoch, self.has_warned = 0, False
        self.log_file, self.signals = None, []
        self._writer = saving.Writer()

    # -----------------------------------------------------------------------------------------------------------------
    # Before the first step
    # -----------------------------------------------------------------------------------------------------------------

    def restore(self, training) -> None:
        """Bring a training to the folder's state, or to the weights of --init, and the data to the device."""
        self.network, self.optimizer = training.network, training.optimizer
        if self._tensors:
            self.sums = restore_state(self._tensors, self._stored, self.network, self.optimizer, self.accelerator)
        elif self._initial:
            begin_from(self._initial, self.network)
        self._tensors = self._initial = None  # free them: the stored tensors are three times the size of the network
        device, images = self.accelerator.device, self.images
        self.train, self.test = images.train.to(device), images.test.to(device)
        shares_images = images.pretraining is images.train
        self.pretraining = self.train if shares_images else images.pretraining.to(device)
        self._stream = data.batches(
            self.pretraining,
            images.size,
            self.cfg.batch_size,
            self.cfg.seed,
            range(self.step, self.steps),
            micro_batches=self.cfg.accumulate,
            share=(self.accelerator.process_index, self.accelerator.num_processes),
        )

    def announce(self, lines: list[str]) -> None:
        """Begin the log, or go on with it, and print what the run is about to do, unless it is finished."""
        if self.lock is None:
            return
        self.log_file = start_log(self.folder, self.description, self.whole_epochs, self.step, self.accelerator)
        for row in self._rows():
            if row.get("of") == "warning":
                self.has_warned = True
            if "loss" in row:
                self.collapsed_epochs = measure.count_collapsed(self._share(row["std"]), self.collapsed_epochs)
        if self.step < self.steps:
            settings = {name: str(x) for name, x in asdict(self.cfg).items()}
            self.accelerator.init_trackers("pretrain", settings)
            print(*lines, sep="\n  ", file=sys.stderr)

    def __enter__(self) -> "Run":
        """Show progress, and keep a first SIGTERM or SIGINT for the step to be finished; a second one acts at once."""
        is_silent = self.log_file is None or self.step == self.steps
        self._bar = tqdm(total=self.steps, initial=self.step, unit="step", disable=is_silent)
        is_new = not all((self.folder / name).exists() for name in (CKPT, WEIGHTS))
        self._schedule = saving.Schedule(self.flags["save_every"], self.step, is_new)
        self._looked_at, self._look_step, self._next_look = saving.seconds(), self.step, self.step + 1
        self._handlers = {}
        for number in (signal.SIGTERM, signal.SIGINT):
            self._handlers[number] = signal.signal(number, self._keep_signal)
        return self

    def __exit__(self, error: type[BaseException] | None, *_) -> None:
        """Wait for the file that is being written, unless a second Ctrl-C asks for the end at once."""
        is_urgent = error is not None and issubclass(error, KeyboardInterrupt)
        try:
            if not is_urgent:
                self._writer.wait()
            elif self.lock:
                remove_strays(self.folder)
        except (InputError, OSError):
            if error is None:  # otherwise the error that ends the run is the one to tell
                raise
        finally:
            self._put_handlers_back()
            self._bar.close()

    def _keep_signal(self, number: int, _frame) -> None:
        self.signals.append(signal.Signals(number))
        self._put_handlers_back()

    def _put_handlers_back(self) -> None:
        for number, handler in self._handlers.items():
            signal.signal(number, handler)

    # -----------------------------------------------------------------------------------------------------------------
    # While it trains
    # -----------------------------------------------------------------------------------------------------------------

    def epochs(self) -> Iterator[int]:
        """Yield the epochs that are left, from 1."""
        for epoch in range(self.whole_epochs + 1, self.cfg.epochs + 1):
            self.epoch = epoch
            self._started = time.perf_counter()
            self._first_step = self.step
            self._schedule.begin_epoch(self.step)
            yield epoch

    def micro_batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield crops and u of the micro-batches that are left in the epoch; see `data.batches`."""
        steps_left = self.epoch * self.steps_per_epoch - self.step
        for crops, _, u in islice(self._stream, steps_left * self.cfg.accumulate):
            yield crops, u

    def after(self, terms: dict[str, Tensor], norms: dict[str, Tensor]) -> None:
        """Add the terms of a micro-batch to the sums; after a step, count it, and save or stop if that is due."""
        step = torch.full((), self.step, device=self.accelerator.device)
        self.numbers = measure.first_fault(self.numbers, {"step": step, **terms, **norms})
        for name, term in terms.items():
            self.sums[name] = self.sums.get(name, 0) + term / self.cfg.accumulate
        if not self.accelerator.sync_gradients:
            return
        self.step += 1
        self._bar.update()
        self._writer.raise_fault()
        caught, is_due = self._look()
        at_epoch_end = self.step == self.epoch * self.steps_per_epoch
        if caught or (is_due and not at_epoch_end):
            self.save()
        if caught:
            self.stop(caught)

    def means(self) -> dict[str, float]:
        """Return the terms' means over the epoch's steps and the processes, and set `images_per_s`.

        InputError if a number is not finite. A network whose projections were all the same is marked as dead.
        """
        # Before judging, whose loaders fork: a child must not inherit locks that the thread holds. And before the row
        # of a second epoch: `refuse_lost_checkpoint` takes it for a proof that there was a checkpoint.
        self._writer.wait()
        row = {}
        for name, total in self.sums.items():
            row[name] = self.accelerator.reduce(total, "mean").item() / self.steps_per_epoch
        if self._share(row["std"]) < measure.DEAD:
            row["dead"] = True
        seconds = time.perf_counter() - self._started
        images = (self.step - self._first_step) * self.cfg.batch_size
        self.images_per_s = round(images / seconds, 1)
        measure.refuse_faults(self.numbers, self.network, self.folder, self.accelerator)
        return row

    def log(self, **columns) -> None:
        """Print a row, add it to the log, and give its numbers to the tracker."""
        row = {"stage": "pretrain", "epoch": self.epoch, "step": self.step, **columns}
        emit(row, self.log_file)
        prefix = f"{row['of']}/" if "of" in row else ""
        numbers = {prefix + name: x for name, x in row.items() if isinstance(x, float)}
        self.accelerator.log(numbers, step=self.step)

    @property
    def judged_on(self) -> tuple:
        """What `knn_eval.nearest_neighbours` takes behind the encoder."""
        return self.train, self.test, self.view, self.accelerator

    def log_scores(self, of: str, scores_by_k: dict[int, dict[str, float]]) -> None:
        """Log the accuracy of a k-NN vote, for each k."""
        for k, scores in scores_by_k.items():
            self.log(of=of, split=self.split, k=k, **scores)

    def warn_of_collapse(self, std: float) -> None:
        """Warn if the projections have been nearly one point for some epochs; `std` as the log has it."""
        share = self._share(std)
        self.collapsed_epochs = measure.count_collapsed(share, self.collapsed_epochs)
        measure.warn_of_collapse(share, self.collapsed_epochs, self.cfg)

    def _share(self, std: float) -> float:
        """The projections' standard deviation as a share of a full sphere's."""
        return std * self.cfg.out_dim**0.5

    def _rows(self) -> list[dict]:
        """The rows of the run's log that are its own, not a judge's."""
        return [row for row in read_rows(self.folder) if row["stage"] == "pretrain"]

    @property
    def initial_name(self) -> str:
        """What the rows of the network before its first step are called."""
        return "init" if self.cfg.init else "untrained"

    def wants_floors(self) -> bool:
        """Whether the network and the pixels are judged now: before the first step, on a small bank."""
        is_judged = self.cfg.eval_every > 0
        return self.step == 0 and is_judged and measure.floors_are_cheap(self.train, self.test, self.images.size)

    def warn_of_poor_features(self) -> None:
        """Warn once, and log it, if a third of the run has brought features that are worse than none."""
        if self.log_file is None or self.has_warned or 3 * self.step < self.steps:
            return
        latest = {row["of"]: row for row in self._rows() if "of" in row}
        floors = {of: latest[of]["top1"] for of in (self.initial_name, "pixels") if of in latest}
        fault = measure.poor_features(latest["online"]["top1"], floors, latest["representations"]["rank"], self.cfg)
        if fault:
            self.has_warned = True
            self.log(of="warning", text=fault)
            processes.say(f"WARNING: {fault}")

    def judges_now(self) -> bool:
        """Whether the encoder is judged after this epoch: each `eval_every` epochs, and after the last."""
        eval_every = self.cfg.eval_every
        if not eval_every:
            return False
        return self.epoch % eval_every == 0 or self.epoch == self.cfg.epochs

    def end_epoch(self) -> None:
        """Save the state between two epochs if that is due, and stop if a signal came."""
        self.sums = {}
        self.whole_epochs = self.epoch
        caught, is_due = self._look(at_epoch_end=True)
        is_last = self.step == self.steps
        if caught or is_due or is_last:
            self.save()
        if caught and not is_last:
            self.stop(caught)

    def save(self) -> None:
        """Copy the state, and have the writer write it while the training goes on.

        InputError, with the last checkpoint as it was, if a number in it is not finite, or if the last save has failed.
        """
        self._writer.wait()  # before the copy: there is never more than one
        measure.refuse_faults(self.numbers, self.network, self.folder, self.accelerator)
        tensors = captured_state(self.network, self.optimizer, self.sums, self.accelerator)
        self._schedule.saved(self.step)
        if self.log_file is None:
            return
        description = {**self.description, "epoch": self.whole_epochs, "step": self.step}
        scaler = self.accelerator.scaler
        scale = scaler.state_dict() if scaler else None
        at_epoch_end = self.step == self.whole_epochs * self.steps_per_epoch
        self._writer.start(self._write, copied(tensors), description, scale, at_epoch_end)

    def _write(self, tensors: dict[str, Tensor], description: dict, scale: dict | None, at_epoch_end: bool) -> None:
        """Write the files of a save, the encoder's first. `scale` is the state of fp16's loss scale."""
        if at_epoch_end:
            encoder = {name.removeprefix("encoder."): x for name, x in tensors.items() if name.startswith("encoder.")}
            checkpoint.save_encoder(self.folder, encoder, description, self.timm_config)
        checkpoint.save(self.folder / CKPT, tensors, {**description, "scaler": scale, "holds": "checkpoint"})

    def stop(self, caught: signal.Signals) -> None:
        """Raise Stopped, once the first process has written: the launcher ends all after the first that leaves."""
        self._writer.wait()
        processes.wait_for_all(self.accelerator)
        holds = f"{self.folder / CKPT} holds it, and the same command goes on"
        raise Stopped(f"{caught.name} after step {self.step} of {self.steps}; {holds}", 128 + caught)

    def _look(self, at_epoch_end: bool = False) -> tuple[signal.Signals | None, bool]:
        """Return the signal that was caught, if any, and whether a save is due; all processes return the same.

        One process looks after every step. Several look every few seconds and at an epoch's end, because each look
        makes all of them wait: one signal counts for all, and the clock of the first decides.
        """
        number = int(self.signals[0]) if self.signals else 0
        is_due = self._schedule.is_due(self.step, at_epoch_end)
        if self.accelerator.num_processes > 1:
            due_for_all = is_due and self._schedule.unit == "steps"  # which all processes count alike
            looks_now = at_epoch_end or due_for_all or self.step >= self._next_look
            if not looks_now:
                return None, False
            number, is_due = self._agree_on(number, is_due)
        return signal.Signals(number) if number else None, is_due

    def _agree_on(self, number: int, is_due: bool) -> tuple[int, bool]:
        """Return the number of a signal that some process has caught, or 0, and whether the first has a save due.

        The first process also decides how many steps later the next look is.
        """
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()  # the steps until now are to be done, not only launched
        now = saving.seconds()
        steps = saving.steps_to_next_look(self.step - self._look_step, now - self._looked_at)
        mine = torch.tensor([[number, is_due, steps]], device=self.accelerator.device)
        rows = self.accelerator.gather(mine).tolist()  # one for each process
        _, is_due, steps = rows[0]
        self._looked_at, self._look_step, self._next_look = now, self.step, self.step + steps
        return max(row[0] for row in rows), bool(is_due)

    def finish(self) -> None:
        """End the trackers, and name the checkpoint and the commands that judge it."""
        processes.wait_for_all(self.accelerator)
        for tracker in self.accelerator.trackers:
            tracker.finish()
        if self.log_file is None:
            return
        ckpt = shlex.quote(str(self.folder / CKPT))
        judges = f"; judge it by\n    python knn_eval.py {ckpt}\n    python linear_eval.py {ckpt}"
        print(f"{ckpt} is complete{judges if self.images.classes else ''}", file=sys.stderr)


# ---------------------------------------------------------------------------------------------------------------------
# The folder
# ---------------------------------------------------------------------------------------------------------------------


def claim(folder: Path) -> TextIO:
    """Make a run folder, and keep other processes out of it until this one ends, however it ends.

    Removes what a process that was killed has left half-written. InputError if another process has the folder, or if it
    cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        claimed = open(folder / ".lock", "w")  # noqa: SIM115  # stays open as long as this process lives
        try:
            files.lock(claimed, wait=False)
        except BlockingIOError:
            raise InputError(f"--out {folder}: another process is training in it; name another folder") from None
        except OSError as e:  # there are no locks
            print(f"--out {folder}: cannot be locked ({e.strerror}); start no second run in it", file=sys.stderr)
        remove_strays(folder)
    except OSError as e:
        raise InputError(f"--out {folder}: cannot be written ({e.strerror})") from e
    if (folder / ENCODER).is_file():
        raise InputError(f"--out {folder}: holds a file called {ENCODER}, where the encoder's folder belongs; move it")
    return claimed


def remove_strays(folder: Path) -> None:
    """Remove the hidden files in which files of a run are being written, or were when their process was killed."""
    for path in (folder / name for name in RUN_FILES):
        for stray in path.parent.glob(f".{path.name}.*"):
            stray.unlink(missing_ok=True)


def stored_state(folder: Path) -> tuple[dict[str, Tensor], dict | None]:
    """Read the state that a folder holds: no tensors before the first was saved, and no description without a run.

    InputError if the checkpoint is damaged, if there is none where there was one, or if it is not a state.
    """
    ckpt = folder / CKPT
    if not ckpt.exists():
        refuse_lost_checkpoint(folder)
        return {}, None
    try:
        tensors, description = checkpoint.load(ckpt)
    except InputError as e:
        raise InputError(f"{e}; name another --out, or remove it") from e
    if not {"settings", "epoch", "step"} <= description.keys() or "rng/cpu" not in tensors:
        raise InputError(f"{ckpt}: holds a network without the momentum that a run needs; name another --out")
    return tensors, description


def refuse_lost_checkpoint(folder: Path) -> None:
    """Raise InputError if other files of a folder without a checkpoint show that there was one."""
    rows = read_rows(folder) if (folder / LOG).exists() else []
    if rows:
        is_lost = any(row["stage"] != "pretrain" or row.get("epoch", 0) > 1 for row in rows)
    else:
        is_lost = any((folder / name).exists() for name in (WEIGHTS,))
    if is_lost:
        raise InputError(f"--out {folder}: holds a run whose {CKPT} is gone; name another folder, or remove this one")


def position(description: dict, stored: dict | None, folder: Path) -> tuple[int, int]:
    """Return the epochs and steps that the run of a folder has behind it. InputError if that run is another."""
    if stored is None:
        return 0, 0
    new_data = other_data(description, stored)
    faults = differences(description["settings"], stored["settings"])
    if faults and not new_data:
        advice = "take what it was, or name another folder"
        raise InputError(f"--out {folder}: holds a run with other settings, {', '.join(faults)}; {advice}")
    for name in ("images", "steps"):
        now, before = description[name], stored.get(name, description[name])
        if now != before:
            new_data.append(f"{name} {now} (it was {before})")
    if new_data:
        raise InputError(f"--out {folder}: holds a run on other images, {', '.join(new_data)}; name another folder")
    return stored["epoch"], stored["step"]


def differences(settings: dict, stored: dict) -> list[str]:
    """Name each setting that is not what it was in the run, as a flag, but for the places of the data."""
    settings, stored = as_json(settings), stored
    faults = []
    for name in sorted(settings.keys() | stored.keys()):
        if name in PLACES or settings.get(name) == stored.get(name):
            continue
        if name == "init_digest":
            faults.append(f"--init {with_digest(settings)} (it was {with_digest(stored)})")
        else:
            faults.append(f"--{name} {settings.get(name)} (it was {stored.get(name)})")
    return faults


def with_digest(settings: dict) -> str:
    """Name the weights that a run begins from: two files may have the same name."""
    return f"{settings['init']} [{settings['init_digest']}]" if settings["init"] else "None"


def provenance() -> dict:
    """Name the command, the versions and the commit that make a run."""
    packages = ("torch", "torchvision", "timm", "accelerate", "safetensors")
    versions = {name: version(name) for name in packages}
    return {"command": shlex.join(sys.argv), "versions": versions, "git": commit_of(Path(__file__).parent.parent)}


def commit_of(folder: Path) -> str | None:
    """Return the commit of the repository whose top level is this folder; None if it has none of its own."""

    # git's hooks name their repository in variables, which would be taken in place of the folder
    environment = {name: value for name, value in os.environ.items() if name not in ("GIT_DIR", "GIT_WORK_TREE")}

    def git(*words: str) -> str:
        options = {"cwd": folder, "env": environment, "stderr": subprocess.DEVNULL}
        return subprocess.check_output(["git", *words], text=True, **options).strip()

    try:
        if not folder.samefile(git("rev-parse", "--show-toplevel")):
            return None  # a copy without history, inside a repository of something else
        return git("describe", "--always", "--dirty")
    except (OSError, subprocess.CalledProcessError):  # git is missing, or there is no repository
        return None


def start_log(folder: Path, description: dict, whole_epochs: int, step: int, accelerator: Accelerator) -> Path:
    """Begin the log of a run with its first row, or rewind it to where the run goes on; prints what changed since."""
    hardware = {  # not a part of a checkpoint's description
        "device": accelerator.device.type,
        "precision": accelerator.mixed_precision,
        "processes": accelerator.num_processes,
        "threads": torch.get_num_threads(),
        "processor": processes.processor(accelerator),
    }
    log = folder / LOG
    rows = rewind(folder, whole_epochs if step else -1)
    if not rows:
        emit({"stage": "pretrain", **description, **hardware}, log)
        return log
    goes_on = "goes on after" if whole_epochs < description["settings"]["epochs"] else "is finished,"
    print(f"{folder}: {goes_on} step {step}", file=sys.stderr)
    may_change = {**hardware, "versions": description["versions"], "git": description["git"]}
    for name, value in may_change.items():
        first_value = rows[0].get(name, value)  # runs of earlier versions do not name the threads
        if value != first_value:
            print(f"{name}: {value} (it was {first_value})", file=sys.stderr)
    for name in PLACES:
        place = description["settings"][name]
        first_place = rows[0].get("settings", {}).get(name, place)
        if place != first_place and not same_place(place, first_place):
            print(f"{name}: {place} (it was {first_place}); it holds the same", file=sys.stderr)
    return log


# ---------------------------------------------------------------------------------------------------------------------
# The state
# ---------------------------------------------------------------------------------------------------------------------


def captured_state(
    network: nn.Module, optimizer: Optimizer, sums: dict[str, Tensor], accelerator: Accelerator
) -> dict[str, Tensor]:
    """Collect the tensors of a state. All processes call this: random numbers and sums are those of each of them."""
    mine = {"rng/cpu": torch.get_rng_state()}
    for name, total in sums.items():
        mine[f"sums/{name}"] = total
    if accelerator.device.type == "cuda":
        mine["rng/cuda"] = torch.cuda.get_rng_state(accelerator.device)
    tensors = network.state_dict()
    for name, x in mine.items():
        tensors[name] = accelerator.gather(x[None].to(accelerator.device))  # (processes, ...)
    for name, parameter in network.named_parameters():
        momentum = optimizer.state[parameter].get("momentum_buffer")
        if momentum is not None:
            tensors[f"momentum/{name}"] = momentum
    return tensors


def copied(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Copy tensors into the memory of the CPU, where no step changes them."""
    copies = {}
    for name, x in tensors.items():
        copies[name] = x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)
    return copies


def restore_state(
    tensors: dict[str, Tensor], stored: dict, network: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Bring network, momentum, random numbers and fp16's loss scale to a state; return the sums of its epoch.

    Where the number of processes has changed, each takes the mean of the sums, and keeps its own random numbers.
    """
    network.load_state_dict({name: x for name, x in tensors.items() if "/" not in name})
    for name, parameter in network.named_parameters():
        momentum = tensors.get(f"momentum/{name}")
        if momentum is not None:
            optimizer.state[parameter]["momentum_buffer"] = torch.empty_like(parameter).copy_(momentum)
    if accelerator.scaler and stored["scaler"]:
        accelerator.scaler.load_state_dict(stored["scaler"])
    rank = accelerator.process_index
    same_world = len(tensors["rng/cpu"]) == accelerator.num_processes
    if same_world:
        torch.set_rng_state(tensors["rng/cpu"][rank].clone())  # clone: torch crashes on a row within a tensor
    if same_world and accelerator.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"][rank].clone(), accelerator.device)
    sums = {}
    for name, x in tensors.items():
        if name.startswith("sums/"):
            total = x[rank] if same_world else x.mean(0)
            sums[name.removeprefix("sums/")] = total.to(accelerator.device)
    return sums
