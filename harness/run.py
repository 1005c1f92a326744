"""A run's folder: its log, its checkpoint, and how a run that was stopped goes on.

    ckpt.safetensors      the whole state: networks, momentum, random numbers, sums of the epoch in progress
    encoder.safetensors   the encoder alone, as the last whole epoch left it
    metrics.jsonl         the rows that were printed

A state is the tensors and the description of ckpt.safetensors. Tensors without a slash in their name are the network's.
Order and views are functions of (seed, epoch, step), so that a run that goes on ends in the bits of one that never
stopped.
"""

import contextlib
import fcntl
import json
import math
import os
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TextIO

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

import models
from harness import cli

FILES = LOG, CKPT, ENCODER = "metrics.jsonl", "ckpt.safetensors", "encoder.safetensors"
PLACES = ("data_dir",)  # settings that a run may go on without: where the data lie, not what they are


class RunError(ValueError):
    """A folder that a run cannot be written to, read from, or continued in."""


@dataclass(frozen=True)
class Run:
    """A run folder: what it was trained with, and the rows of its log."""

    folder: Path
    settings: dict
    rows: list[dict]

    def series(self, key: str, of: str | None = None) -> dict[int, float]:
        """The finite values of a column of pretraining by step; `of` names the kind of row."""
        rows = [r for r in self.rows if r["stage"] == "pretrain" and r.get("of") == of and "step" in r and key in r]
        return {r["step"]: r[key] for r in rows if math.isfinite(r[key])}

    def score(self, stage: str) -> float | None:
        """The last top-1 accuracy (%) by the protocol of knn_eval, at k = 20, or linear_eval; by no variant of it.

        Where knn_eval has not been run, the online k-NN of the last epoch is the same number.
        """
        s = self.settings
        final = {"stage": stage, "split": "test", "net": "online", "dataset": s["dataset"], "eval_crop": s["eval_crop"]}
        final |= {"of": "trained", "k": 20, "temperature": 0.07} if stage == "knn_eval" else {"features": "augmented"}
        online = {"stage": "pretrain", "of": "online", "split": "test", "k": 20, "epoch": s["epochs"]}
        for wanted in (final, online) if stage == "knn_eval" else (final,):
            rows = [
                r for r in self.rows if r.get("trained_epochs", s["epochs"]) == s["epochs"]
            ]  # not of a run under way
            if rows := [r for r in rows if all(r.get(k) == x for k, x in wanted.items())]:
                return rows[-1]["top1"]
        return None


def read(folder: Path) -> Run:
    """A run folder. RunError for one without a log of pretrain.py; a last line that is cut short does not count."""
    rows = read_rows(folder)
    if not rows or not {"dataset", "method", "reg", "accumulate"} <= rows[0].get("settings", {}).keys():
        raise RunError(f"{folder / LOG}: has no first row with a run's settings")
    return Run(folder, rows[0]["settings"], rows)


def read_rows(folder: Path) -> list[dict]:
    """The rows of a log. RunError for one that cannot be read, or that holds others than the stages'."""
    try:
        lines = (folder / LOG).read_bytes().split(b"\n")
    except OSError as e:
        raise RunError(f"{folder}: no run, its {LOG} cannot be read ({e.strerror})") from e
    rows = []
    for n, line in enumerate(lines[:-1], 1):  # what follows the last line's end is not yet whole
        try:
            rows.append(json.loads(line))
            _ = rows[-1]["stage"]
        except (ValueError, KeyError, TypeError) as e:
            raise RunError(f"{folder / LOG}: line {n} is not one that a stage writes") from e
    return rows


def claim(folder: Path) -> TextIO:
    """Keep other processes out of a run folder, which is made if need be, until this one ends, however it ends.

    What a process that was killed has left half-written is removed. RunError if another process has the folder, or if
    it cannot be written to.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = open(folder / ".lock", "w")  # noqa: SIM115  # open as long as this process lives
        try:
            fcntl.lockf(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)  # flock's would be its workers', too
        except BlockingIOError:
            raise RunError(f"--out {folder}: another process is training in it; name another folder") from None
        except OSError as e:  # some network file systems have no locks
            print(f"--out {folder}: cannot be locked ({e.strerror}); start no second run in it", file=sys.stderr)
        for name in FILES:
            for stray in folder.glob(f".{name}.*"):
                stray.unlink()
    except OSError as e:
        raise RunError(f"--out {folder}: cannot be written ({e.strerror})") from e
    return lock


def saved(folder: Path) -> tuple[dict[str, Tensor], dict | None]:
    """The state that a folder holds: tensors, none before the first was saved, and description, None without a run.

    RunError if the checkpoint is damaged, if there is none where there was one, or if it is no state.
    """
    ckpt = folder / CKPT
    if ckpt.exists():
        try:
            tensors, description = models.load(ckpt)
        except models.ModelError as e:
            raise RunError(f"{e}; name another --out, or remove it") from e
        if not {"settings", "epoch", "step"} <= description.keys() or "rng/cpu" not in tensors:
            raise RunError(f"{ckpt}: a network alone, without the momentum that a run goes on with; name another --out")
        return tensors, description
    rows = read_rows(folder) if (folder / LOG).exists() else []
    if rows:
        read(folder)
    gone = (folder / ENCODER).exists() if not rows else any(r["stage"] != "pretrain" for r in rows)
    if gone or any(row.get("epoch", 0) > 1 for row in rows):
        raise RunError(f"--out {folder}: holds a run whose {CKPT} is gone; name another folder, or remove this one")
    return {}, None  # whatever it was, it has to begin again


def differences(settings: dict, then: dict) -> list[str]:
    """Each setting that is not what it was in the run, as it would be given."""
    now, then = json.loads(json.dumps(settings)), dict(then)
    for each in (now, then):
        if os.path.isdir(each.get("dataset", "")):
            each["dataset"] = os.path.realpath(each["dataset"])
    told = [name for name in sorted(now.keys() | then) if name not in PLACES and now.get(name) != then.get(name)]
    return [f"--{name} {now.get(name)} (it was {then.get(name)})" for name in told]


def provenance() -> dict:
    """The command, the versions and the commit that make a run."""
    versions = {name: version(name) for name in ("torch", "torchvision", "timm", "accelerate", "safetensors")}
    try:
        describe, here = ["git", "describe", "--always", "--dirty"], Path(__file__).parent
        git = subprocess.check_output(describe, cwd=here, stderr=subprocess.DEVNULL, text=True).strip()
    except (OSError, subprocess.CalledProcessError):  # no git, or not a repository
        git = None
    return {"command": shlex.join(sys.argv), "versions": versions, "git": git}


def start_log(folder: Path, description: dict, done: int, step: int, accelerator: Accelerator) -> Path:
    """The log of a run, with its first row, or up to where the run goes on from; what has changed since is told."""
    hardware = {"device": accelerator.device.type, "precision": accelerator.mixed_precision}
    hardware |= {"processes": accelerator.num_processes}  # no part of a checkpoint's description
    log = folder / LOG
    rows = rewind(folder, done if step else -1)
    if not rows:
        cli.emit({"stage": "pretrain", **description, **hardware}, log)
        return log
    goes_on = "goes on after" if done < description["settings"]["epochs"] else "is finished,"
    print(f"{folder}: {goes_on} step {step}", file=sys.stderr)
    for name, now in {**hardware, "versions": description["versions"], "git": description["git"]}.items():
        if rows[0].get(name) != now:
            print(f"{name}: {now} (it was {rows[0].get(name)})", file=sys.stderr)
    return log


def rewind(folder: Path, epoch: int) -> list[dict]:
    """Drop what a log says of epochs after `epoch`, which will be said again, and a line that was cut short.

    The first row counts as epoch 0.
    """
    rows = read_rows(folder) if (folder / LOG).exists() else []
    rows = [row for row in rows if row["stage"] != "pretrain" or row.get("epoch", 0) <= epoch]
    with models.whole(folder / LOG) as file:
        file.write("".join(json.dumps(row) + "\n" for row in rows).encode())
    return rows


def save(folder: Path, state: dict[str, Tensor], description: dict, scaler: torch.amp.GradScaler | None) -> None:
    """Write encoder.safetensors, at an epoch's end, and ckpt.safetensors; each is whole or as it was."""
    if description["step"] * description["settings"]["epochs"] == description["epoch"] * description["steps"]:
        encoder = {name.removeprefix("encoder."): x for name, x in state.items() if name.startswith("encoder.")}
        models.save(folder / ENCODER, encoder, {**description, "holds": "encoder"})
    description = {**description, "holds": "checkpoint", "scaler": scaler.state_dict() if scaler else None}
    models.save(folder / CKPT, state, description)


def capture(network: nn.Module, optimizer: Optimizer, sums: dict[str, Tensor], accelerator: Accelerator) -> dict:
    """The tensors of a state. Called by all processes: random numbers and sums are those of each, (processes, ...)."""
    own = {"rng/cpu": torch.get_rng_state(), **{f"sums/{name}": x for name, x in sums.items()}}
    if accelerator.device.type == "cuda":
        own["rng/cuda"] = torch.cuda.get_rng_state(accelerator.device)
    each = {name: accelerator.gather(x[None].to(accelerator.device)) for name, x in own.items()}
    momentum = {name: optimizer.state[p].get("momentum_buffer") for name, p in network.named_parameters()}
    return network.state_dict() | each | {f"momentum/{name}": m for name, m in momentum.items() if m is not None}


def restore(
    tensors: dict[str, Tensor], was: dict, network: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Bring network, momentum, random numbers and fp16's loss scale to a state; the sums of the epoch in progress.

    Where the number of processes has changed, each takes the mean of the sums, and keeps random numbers of its own.
    """
    network.load_state_dict({name: x for name, x in tensors.items() if "/" not in name})
    for name, p in network.named_parameters():
        if (m := tensors.get(f"momentum/{name}")) is not None:
            optimizer.state[p]["momentum_buffer"] = torch.empty_like(p).copy_(m)
    if accelerator.scaler and was["scaler"]:
        accelerator.scaler.load_state_dict(was["scaler"])
    rank, same = accelerator.process_index, len(tensors["rng/cpu"]) == accelerator.num_processes
    if same:
        torch.set_rng_state(tensors["rng/cpu"][rank].clone())  # torch crashes on a row within a tensor
    if same and accelerator.device.type == "cuda" and "rng/cuda" in tensors:
        torch.cuda.set_rng_state(tensors["rng/cuda"][rank].clone(), accelerator.device)
    sums = {name.removeprefix("sums/"): x for name, x in tensors.items() if name.startswith("sums/")}
    return {name: (x[rank] if same else x.mean(0)).to(accelerator.device) for name, x in sums.items()}


@contextlib.contextmanager
def signals() -> Iterator[list[signal.Signals]]:
    """A list that the first SIGTERM or SIGINT is put into, for the step to be finished; a second one acts at once."""
    caught, before = [], {}

    def catch(number: int, _) -> None:
        caught.append(signal.Signals(number))
        put_back()

    def put_back() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    before.update({number: signal.signal(number, catch) for number in (signal.SIGTERM, signal.SIGINT)})
    try:
        yield caught
    finally:
        put_back()


def told_to_stop(caught: list[signal.Signals], step: int, accelerator: Accelerator) -> signal.Signals | None:
    """The signal that this or another process has caught. Several processes ask each other at every tenth step."""
    if accelerator.num_processes > 1:
        if step % 10:
            return None
        if caught:
            accelerator.set_trigger()
        return (caught or [signal.SIGTERM])[0] if accelerator.check_trigger() else None
    return caught[0] if caught else None
