"""A run that is stopped, killed, or cannot write goes on and ends in the bits of one that never stopped."""

import errno
import json
import math
import os
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from conftest import ROOT, Killed, acting_after, assert_same_run, call, files_of, killed_after, rows_of, tiny

import models
from harness import checkpoint
from knn_eval import knn_eval
from lib import files
from lib.errors import InputError
from lib.files import claim
from lib.log import commit_of, emit, rewind
from linear_eval import linear_eval
from pretrain import pretrain
from tools.logs import read_log

FLAGS = {"reg": "mhe", "lr": 8, "epochs": 3, "eval_every": 2, "save_every": "2steps"}
RUN = Path("run")  # in the empty folder of each test
CKPT = RUN / "ckpt.safetensors"


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of three epochs of three steps that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    call(pretrain, *tiny(dataset=folder, out=out, **FLAGS))
    return out


@pytest.fixture
def train(command, folder):
    """Run the command of `whole`, some flags changed, in the folder `run`: exit code, rows, standard error."""
    return lambda **changes: command(pretrain, *tiny(**{"dataset": folder, "out": "run", **FLAGS, **changes}))


@pytest.fixture(autouse=True)
def saves(monkeypatch):
    """The states that are handed to the thread that writes, as futures."""
    futures, submit = [], ThreadPoolExecutor.submit

    def noting(pool, *work):
        futures.append(submit(pool, *work))
        return futures[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noting)
    return futures


def assert_goes_on(train, whole, since, **changes):
    """The same command goes on after a step, or begins anew, and ends in the same bits."""
    code, _, err = train(**changes)
    assert code == 0 and (f"run: goes on after step {since}\n" in err) == (since > 0), err
    assert_same_run(RUN, whole)


@pytest.mark.parametrize("how, at", [("SIGTERM", 3), ("SIGINT", 4), ("SIGTERM", 9)])
def test_a_run_that_a_signal_stops_goes_on_to_the_same_bits(train, whole, how, at):
    """It is kept to the end of the step: the last one of an epoch, the first, and the last of all."""
    with acting_after(at, lambda: os.kill(os.getpid(), signal.Signals[how])) as steps:
        code, _, err = train()
    assert code == 128 + signal.Signals[how] and len(steps) == at
    told = f"pretrain.py: {how} after step {at} of 9; run/ckpt.safetensors holds it, and the same command goes on"
    assert err.splitlines()[-1] == told
    assert_goes_on(train, whole, at)


@pytest.mark.parametrize("at, saved", [(1, 0), (5, 3), (9, 8)])
def test_a_run_that_is_killed_goes_on_to_the_same_bits(train, whole, at, saved):
    """It has lost all since the last save: two steps after the one before, or at the end of an epoch."""
    with killed_after(at):
        train()
    with open(RUN / "metrics.jsonl", "a") as log:
        log.write('{"stage": "pretr')
    assert_goes_on(train, whole, saved)


def test_a_run_with_a_queue_of_pictures_in_files_goes_on_to_the_same_bits(train, tmp_path, monkeypatch):
    """MoCo's queue, and the place in it, are a part of the state; the workers' loader draws a number at each start."""
    monkeypatch.setattr("lib.sources.MEMORY", 0)
    changes = {"reg": "none", "method": "moco", "queue": 40, "eval_every": 0}
    assert train(out="whole", **changes)[0] == 0
    with killed_after(5):
        train(**changes)
    assert_goes_on(train, tmp_path / "whole", 3, **changes)
    tensors, description = checkpoint.load_file(CKPT)
    assert tensors["queue"].shape == (40, 16) and tensors["oldest"] == 9 * 32 % 40
    assert description["settings"]["queue"] == 40


@pytest.mark.parametrize("file, saved", [(1, 0), (2, 2), (3, 2)])
def test_a_run_that_is_killed_while_it_writes_goes_on_to_the_same_bits(train, whole, monkeypatch, file, saved):
    """In the state of step 2, in the encoder of step 3, in the state of step 3."""
    to_bytes, calls = checkpoint.to_bytes, []

    def killing(*args):
        calls.append(1)
        if len(calls) == file:
            raise Killed
        return to_bytes(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "to_bytes", killing)
        train()
    assert_goes_on(train, whole, saved)


def test_a_state_is_that_of_its_step_whenever_it_is_written(train, whole, monkeypatch):
    """The state of step 2 is written after step 3, at which the run is killed."""
    save, third = checkpoint.save, threading.Event()

    def waiting(*args):
        third.wait(5)
        save(*args)

    with monkeypatch.context() as patch, killed_after(3, third.set):
        patch.setattr(checkpoint, "save", waiting)
        train()
    assert checkpoint.load_file(CKPT)[1]["step"] == 2
    assert_goes_on(train, whole, 2)


def test_an_error_of_the_thread_ends_the_run_at_the_next_step(train, saves, monkeypatch):
    """The save of step 2 of an epoch of 12 fails while step 3 is computed."""

    def full(*_):
        raise InputError("no space")

    monkeypatch.setattr(checkpoint, "save", full)
    with acting_after(3, lambda: wait(saves)) as steps:
        code, _, err = train(batch_size=4, eval_every=0)
    assert code == 2 and err.endswith("pretrain.py: no space\n") and len(steps) == 3


def test_a_checkpoint_may_be_older_than_the_log(train, command, whole):
    """By default a run of seconds saves after its first epoch and at its end; a judge's row outlives the rewind."""
    with killed_after(8):
        train(save_every="10min")
    assert checkpoint.load_file(CKPT)[1]["step"] == 3
    assert [row["epoch"] for row in rows_of(RUN) if "loss" in row] == [1, 2]
    assert command(knn_eval, CKPT, "--k", 20, "--nofloors")[0] == 0
    knn = rows_of(RUN)[-1]
    assert knn["stage"] == "knn_eval" and knn["trained_epochs"] == 1 and read_log(RUN).score("knn_eval") is None
    code, _, err = train(save_every="10min")
    assert code == 0 and "run: goes on after step 3" in err
    rows = rows_of(RUN)
    rows.remove(knn)
    (RUN / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(RUN, whole)


def begun(folder, run, **changes):
    """A process that trains, once it has printed the row of its second epoch."""
    command = [sys.executable, ROOT / "pretrain.py", *tiny(**{"dataset": folder, "out": run, **FLAGS, **changes})]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if '"epoch": 2' in line:
            return process
    raise AssertionError(process.communicate()[1])


def test_sigkill_to_the_process_itself(train, folder, whole, tmp_path):
    """No lock, no temporary file and no half line stands in the way of the same command."""
    process = begun(folder, tmp_path / "run")
    process.kill()
    process.communicate()
    for stray in (".ckpt.safetensors.1234", "encoder/.model.safetensors.1234", "encoder/.config.json.1234"):
        (RUN / stray).touch()
    assert train()[0] == 0
    assert_same_run(RUN, whole)


def test_sigterm_to_the_process_itself(folder, tmp_path):
    process = begun(folder, tmp_path / "run", epochs=1000, eval_every=0)
    process.terminate()
    _, err = process.communicate(timeout=180)
    assert process.returncode == 143 and "Traceback" not in err
    assert "\nSIGTERM: saves and stops; a second one loses the work since the last save\n" in err
    assert err.splitlines()[-1].startswith("pretrain.py: SIGTERM after step ")


def test_a_finished_run_says_so_and_what_has_changed(train, whole, monkeypatch):
    """Threads and processor change the order of sums, and where one rounds, and so the last bits."""
    before = files_of(whole)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    code, rows, err = train(out=whole)
    assert code == 0 and rows == [] and f"{whole}: is finished, step 9" in err
    assert "threads: 3 (it was 1)" in err and "processor: ABACUS (it was " in err
    assert files_of(whole) == before


@pytest.mark.parametrize(
    "changes, told",
    [
        ({"epochs": 4}, "--epochs 4 (it was 3)"),
        ({"reg": "amhe", "s": 1}, "--reg amhe (it was mhe), --s 1.0 (it was 2.0)"),
        ({"resume": "never"}, "already holds a run; name another folder, or take --resume auto"),
    ],
)
def test_other_settings_are_named_and_refused(train, whole, changes, told):
    before = files_of(whole)
    code, rows, err = train(out=whole, **changes)
    assert code == 2 and rows == [] and told in err and err.count("pretrain.py: ") == 1
    assert files_of(whole) == before


def test_a_folder_may_move_but_not_change(train, command, folder, tmp_path):
    """The path is a place and is told; classes, counts, size, mean and std are compared."""
    pictures = shutil.copytree(folder, tmp_path / "pictures")
    with killed_after(5):
        train()
    code, rows, err = train(dataset=pictures)
    assert code == 0 and rows and err.count(f"dataset: {pictures} (it was {folder}); it holds the same\n") == 1
    assert rows_of(RUN)[0]["data"] == {"classes": ["astronaut", "brick", "chelsea"], "train": 48, "test": 18}
    for judge, flags in (
        (knn_eval, ["--k", 20, "--nofloors"]),
        (knn_eval, ["--k", 20, "--nofloors", "--dataset", pictures]),
        (linear_eval, ["--epochs", 1, "--dataset", pictures]),
    ):
        code, judged, err = command(judge, CKPT, *flags)
        assert code == 0 and judged[-1]["own_data"] and rows_of(RUN)[-1] == judged[-1], err

    for i in range(4):
        (pictures / "test" / "brick" / f"{i:02}.png").unlink()
    code, rows, err = train(dataset=pictures)
    assert code == 2 and rows == [] and "a run on other images, test 14 (it was 18); name another folder" in err
    code, knn, _ = command(knn_eval, CKPT, "--k", 20, "--nofloors", "--dataset", pictures)
    assert code == 0 and knn[0]["own_data"] is False
    for part in ("train", "test"):
        (pictures / part / "brick").rename(pictures / part / "wall")
    code, rows, err = train(dataset=pictures)
    assert code == 2 and rows == [] and "class wall is new, class brick is gone" in err


def test_a_folder_in_use_is_refused(train, whole):
    holds = "import pathlib, sys; from lib.files import claim; "
    holds += "lock = claim(pathlib.Path(sys.argv[1])); print('held'); input()"
    command, pipe = [sys.executable, "-c", holds, whole], subprocess.PIPE
    with subprocess.Popen(command, cwd=ROOT, stdin=pipe, stdout=pipe, text=True) as other:
        assert other.stdout.readline() == "held\n"
        code, rows, err = train(out=whole)
        other.communicate("\n")
    assert code == 2 and rows == [] and "another process is training in it" in err and err.count("pretrain.py: ") == 1


def test_a_judge_beside_a_run_loses_no_row_and_breaks_none(tmp_path):
    """One process adds 300 rows while another adds 60, and puts its log in place anew after each, as on resuming."""
    log = tmp_path / "metrics.jsonl"
    judge = "import pathlib, sys; from lib.log import emit; "
    judge += "[emit({'stage': 'knn_eval', 'n': n, 'x': 'x' * 9999}, pathlib.Path(sys.argv[1])) for n in range(300)]"
    with subprocess.Popen([sys.executable, "-c", judge, log], cwd=ROOT, stdout=subprocess.DEVNULL) as other:
        for n in range(60):
            emit({"stage": "linear_eval", "n": n}, log)
            rewind(tmp_path, 0)
            time.sleep(0.01)
    assert other.returncode == 0
    rows = rows_of(tmp_path)
    assert [row["n"] for row in rows if row["stage"] == "knn_eval"] == list(range(300))
    assert [row["n"] for row in rows if row["stage"] == "linear_eval"] == list(range(60))


def test_a_broken_line_is_named_and_does_not_forbid_to_go_on(train, whole):
    shutil.copytree(whole, "run")
    log = RUN / "metrics.jsonl"
    rows = log.read_bytes().splitlines(keepends=True)
    broken = [rows[2][:9] + rows[3], b'{"top1": 1}\n', b"0.5\n", b"\0\0\xff\n", b"\n"]
    log.write_bytes(b"".join(rows[:2] + broken + rows[2:]))
    assert read_log(RUN) == replace(read_log(whole), folder=RUN)
    code, lines, err = train()
    told = [f"run/metrics.jsonl: line {n} is broken, and left out" for n in range(3, 7)]  # an empty one is not told
    assert code == 0 and lines == [] and [line for line in err.splitlines() if "broken" in line][-4:] == told
    assert_same_run(RUN, whole)


def test_a_system_without_locks_is_told_and_trains(tmp_path, monkeypatch, capsys):
    """As some network file systems are."""
    monkeypatch.setattr(files.fcntl, "lockf", Mock(side_effect=OSError(errno.ENOLCK, "No locks available")))
    claim(tmp_path).close()
    told = f"--out {tmp_path}: cannot be locked (No locks available); start no second run in it\n"
    assert capsys.readouterr().err == told
    for n in range(2):
        emit({"stage": "knn_eval", "n": n}, tmp_path / "metrics.jsonl")
    assert [row["n"] for row in rewind(tmp_path, 0)] == [row["n"] for row in rows_of(tmp_path)] == [0, 1]


def test_a_run_that_was_killed_does_not_hold_its_folder_by_its_workers(tmp_path):
    """Workers that read pictures are forked, and notice some seconds later that their parent is gone."""
    held = "import os, pathlib, signal, sys, time; from lib.files import claim; "
    held += "lock = claim(pathlib.Path(sys.argv[1])); pid = os.fork()"
    fate = "time.sleep(60) if not pid else (print(pid, flush=True), os.kill(os.getpid(), signal.SIGKILL))"
    command = [sys.executable, "-c", f"{held}; {fate}", tmp_path / "run"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as killed:
        worker = int(killed.stdout.readline())
        killed.wait()
    try:
        claim(tmp_path / "run").close()
    finally:
        os.kill(worker, signal.SIGKILL)


def test_what_is_in_the_way_in_a_folder_is_named_and_not_written_over(train, whole):
    """A file where a folder belongs; a run whose checkpoint is gone, is none, or is cut."""
    RUN.mkdir()
    (RUN / "encoder").touch()
    told = ["--out run: holds a file called encoder, where the encoder's folder belongs; move it"]
    refusals = [train()]
    (RUN / "encoder").unlink()
    (RUN / "encoder").mkdir()
    for name in ("metrics.jsonl", "encoder/model.safetensors"):
        (RUN / name).write_bytes((whole / name).read_bytes())
    told += ["holds a run whose ckpt.safetensors is gone"]
    refusals += [train()]
    tensors, description = checkpoint.load_file(whole / "ckpt.safetensors")
    checkpoint.save(CKPT, tensors, {**description, "holds": "features"})
    told += ["holds features, not the state"]
    refusals += [train()]
    CKPT.write_bytes((whole / "ckpt.safetensors").read_bytes()[:-1])
    told += ["ckpt.safetensors: cannot be read as a safetensors file"]
    refusals += [train()]
    for (code, rows, err), fault in zip(refusals, told, strict=True):
        assert code == 2 and rows == [] and fault in err.splitlines()[-1] and err.count("pretrain.py: ") == 1, err
    assert CKPT.read_bytes() == (whole / "ckpt.safetensors").read_bytes()[:-1]


def test_a_full_disk_keeps_the_last_checkpoint(train, whole, saves):
    """No file may grow beyond a limit, as on a disk that is full, from step 4 on."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        wait(saves)
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))

    with acting_after(4, fill) as steps:
        try:
            code, _, err = train()
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fault = "safetensors: cannot be written (File too large); its old content is unchanged"
    assert code == 2 and fault in err.splitlines()[-1] and err.count("pretrain.py: ") == 1
    assert len(steps) <= 6  # the save of step 5 has failed, which the end of the epoch waits for
    assert checkpoint.load_file(CKPT)[1]["step"] == 3
    assert files_of(RUN).keys() == files_of(whole).keys()
    assert_goes_on(train, whole, 3)


def test_a_second_ctrl_c_ends_the_run_once_the_file_is_whole(train, whole, monkeypatch, saves):
    """The second comes while the state of step 4 is written; a shell may have started this with SIGINT ignored."""
    fsync, before = os.fsync, signal.signal(signal.SIGINT, signal.default_int_handler)

    left = []

    def interrupt():
        wait(saves)
        left.append("the second")
        os.kill(os.getpid(), signal.SIGINT)

    def slow(descriptor):
        if left and threading.current_thread() is not threading.main_thread():
            left.clear()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        fsync(descriptor)

    with monkeypatch.context() as patch, acting_after(4, interrupt):
        patch.setattr(os, "fsync", slow)
        code, _, err = train()
    signal.signal(signal.SIGINT, before)
    assert code == 130 and err.splitlines()[-1] == "pretrain.py: interrupted"
    assert files_of(RUN).keys() == files_of(whole).keys()
    assert_goes_on(train, whole, 4)


def test_the_first_step_that_is_not_finite_is_named(train, folder, monkeypatch):
    """Before its first checkpoint a run leaves the folder to others; after it, the last one stays."""
    calls, alignment = [], models.alignment

    def spoil(x, y):
        calls.append(1)
        return alignment(x, y) * (math.inf if len(calls) in (9, 11) else 1)  # twice a step

    with monkeypatch.context() as patch:
        patch.setattr("models.alignment", lambda x, y: (x - y).sum() * math.nan)
        code, _, err = train()
    assert code == 2 and err.splitlines()[-1].startswith("pretrain.py: step 1: not finite: loss nan, byol nan, ")
    assert sorted(p.name for p in RUN.iterdir()) == [".lock", ".log.lock", "metrics.jsonl"]
    with monkeypatch.context() as patch:
        patch.setattr("models.alignment", spoil)
        code, _, err = train(seed=1)
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("pretrain.py: step 5: not finite: loss inf, byol inf, "), last
    assert "run/ckpt.safetensors is unchanged" in last and checkpoint.load_file(CKPT)[1]["step"] == 3
    code, _, err = train(dataset=f"{folder}/", seed=1)  # the folder's other spelling is the same folder
    assert code == 0 and "run: goes on after step 3" in err


def test_the_commit_is_that_of_this_project_alone(tmp_path, monkeypatch):
    """Not that of a repository around it, nor that which git names to all that its hooks start."""
    project = tmp_path / "around" / "project"
    project.mkdir(parents=True)
    assert commit_of(project) is None
    commit = "git init -q && git -c user.name=a -c user.email=a@b commit -q --allow-empty -m a && git describe --always"
    for place in (project.parent, project):
        done = subprocess.run(commit, shell=True, cwd=place, capture_output=True, text=True, check=True)
        assert commit_of(project) == (None if place != project else done.stdout.strip())
    monkeypatch.setenv("GIT_DIR", str(project / ".git"))
    assert commit_of(tmp_path) is None and commit_of(project)
