"""A run that is stopped, killed, or cannot write goes on and ends in the bits of one that never stopped."""

import contextlib
import json
import math
import os
import resource
import runpy
import shutil
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor, wait
from dataclasses import replace

import pytest
import torch
from conftest import ROOT, files_of, rows_of

import models
from harness import checkpoint
from knn_eval import knn_eval
from lib import files
from lib.files import claim
from lib.log import commit_of, emit, other_data, rewind
from linear_eval import linear_eval
from pretrain import Lars, pretrain
from tools.logs import read_log

FLAGS = "--recipe cifar10-300 --model test_resnet --stem imagenet --hidden_dim 16 --out_dim 8 --lr 8 --reg mhe".split()
FLAGS += "--batch_size 16 --epochs 3 --eval_every 2 --save_every 2steps".split()
STRAYS = (".ckpt.safetensors.1234", "encoder/.model.safetensors.1234", "encoder/.config.json.1234")


def timeless_rows(run):
    """The log without what depends on the clock, and on how the command was typed."""
    return [{k: x for k, x in row.items() if k not in ("images_per_s", "command")} for row in rows_of(run)]


def assert_same_run(run, whole):
    assert timeless_rows(run) == timeless_rows(whole)
    for file in ("ckpt.safetensors", "encoder/model.safetensors"):
        (ours, told), (theirs, meant) = checkpoint.load_file(run / file), checkpoint.load_file(whole / file)
        assert ours.keys() == theirs.keys() and all(torch.equal(x, theirs[name]) for name, x in ours.items())
        assert {**told, "command": None} == {**meant, "command": None}
    assert files_of(run).keys() == files_of(whole).keys()
    assert (run / "encoder" / "config.json").read_bytes() == (whole / "encoder" / "config.json").read_bytes()


@pytest.fixture(scope="module")
def whole(folder, tmp_path_factory):
    """A run of three epochs of three steps that nothing stopped."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", ["pretrain.py"])
        pretrain(
            dataset=str(folder), recipe="cifar10-300", model="test_resnet", stem="imagenet", hidden_dim=16, out_dim=8,
            lr=8.0, reg="mhe", batch_size=16, epochs=3, eval_every=2, save_every="2steps", out=str(out),
        )  # fmt: skip
    return out


@pytest.fixture(autouse=True)
def saves(monkeypatch):
    """The states that are handed to the thread that writes, as futures."""
    futures, submit = [], ThreadPoolExecutor.submit

    def noting(pool, *work):
        futures.append(submit(pool, *work))
        return futures[-1]

    monkeypatch.setattr(ThreadPoolExecutor, "submit", noting)
    return futures


def acting_step(saves, steps, at, act):
    """Return a Lars.step that counts into `steps` and calls act() after step `at`, once the save before it is whole."""
    step = Lars.step

    def stepping(optimizer, closure=None):
        step(optimizer, closure)
        if len(steps) == at - 1:
            wait(saves)
        steps.append(1)
        if len(steps) == at:
            act()

    return stepping


def last_save(step):
    """The last step before this one that a checkpoint was written at: two after the last, and each epoch's third."""
    return max(k for k in (0, 2, 3, 5, 6, 8) if k < step)


class Killed(BaseException):
    """Ends the stage where it stands, as SIGKILL does."""


@contextlib.contextmanager
def killed_after(at, monkeypatch):
    """Kill the run in the block after `at` steps."""
    step, steps = Lars.step, []

    def killing(optimizer, closure=None):
        step(optimizer, closure)
        steps.append(1)
        if len(steps) == at:
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(Lars, "step", killing)
        yield


@pytest.mark.parametrize(
    "how, at",
    [("SIGTERM", 1), ("SIGTERM", 3), ("SIGINT", 4), *(("SIGKILL", at) for at in (1, 3, 5, 9))],
)
def test_a_stopped_run_goes_on_to_the_same_bits(command, folder, whole, tmp_path, monkeypatch, how, at):
    """After step `at` of 9: a signal, which is kept to the step's end, or the loss of all since the last save."""
    step, steps = Lars.step, []

    def stopping(optimizer, closure=None):
        step(optimizer, closure)
        steps.append(1)
        if len(steps) == at:
            if how == "SIGKILL":
                raise Killed
            os.kill(os.getpid(), signal.Signals[how])

    with monkeypatch.context() as patch:
        patch.setattr(Lars, "step", stopping)
        if how == "SIGKILL":
            with pytest.raises(Killed):
                command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
            with open("run/metrics.jsonl", "a") as log:
                log.write('{"stage": "pretr')
        else:
            code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
            assert code == {"SIGTERM": 143, "SIGINT": 130}[how] and len(steps) == at
            assert err.splitlines()[-1] == (
                f"pretrain.py: {how} after step {at} of 9; run/ckpt.safetensors holds it, and the same command goes on"
            )
    code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    since = at if how != "SIGKILL" else last_save(at)
    assert code == 0 and (f"run: goes on after step {since}" in err) == (since > 0)
    assert_same_run(tmp_path / "run", whole)


def test_a_run_with_a_queue_goes_on_to_the_same_bits(command, folder, tmp_path, monkeypatch):
    """MoCo's queue, and the place in it, are a part of the state."""
    flags = [x for x in FLAGS if x not in ("--reg", "mhe")] + "--method moco --queue 40".split()
    assert command(pretrain, "--dataset", folder, *flags, "--out", "whole")[0] == 0
    with killed_after(5, monkeypatch):
        command(pretrain, "--dataset", folder, *flags, "--out", "run")
    assert command(pretrain, "--dataset", folder, *flags, "--out", "run")[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    tensors, description = checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")
    assert tensors["queue"].shape == (40, 8) and tensors["oldest"] == 9 * 32 % 40
    assert description["settings"]["queue"] == 40


@pytest.mark.parametrize("file, step", [(1, 0), (2, 2), (3, 2)])
def test_a_run_that_is_killed_while_it_writes_goes_on_to_the_same_bits(
    command, folder, whole, tmp_path, monkeypatch, file, step
):
    """In the state of step 2, in the encoder of step 3, in the state of step 3."""
    to_bytes, calls = checkpoint.to_bytes, []

    def killing(*args):
        calls.append(1)
        if len(calls) == file:
            raise Killed
        return to_bytes(*args)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "to_bytes", killing)
        command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    assert code == 0 and (f"run: goes on after step {step}" in err) == (step > 0)
    assert_same_run(tmp_path / "run", whole)


def test_a_state_is_that_of_its_step_whenever_it_is_written(command, folder, whole, tmp_path, monkeypatch):
    """The state of step 2 is written after step 3, at which the run is killed."""
    save, step, steps, third = checkpoint.save, Lars.step, [], threading.Event()

    def waiting(*args):
        third.wait(5)
        save(*args)

    def killing(optimizer, closure=None):
        step(optimizer, closure)
        steps.append(1)
        if len(steps) == 3:
            third.set()
            raise Killed

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(checkpoint, "save", waiting)
        patch.setattr(Lars, "step", killing)
        command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    assert checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")[1]["step"] == 2
    assert command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")[0] == 0
    assert_same_run(tmp_path / "run", whole)


def test_a_checkpoint_may_be_older_than_the_log(command, folder, whole, tmp_path, monkeypatch):
    """By default a run of seconds saves after its first epoch and at its end; a judge's row outlives the rewind."""
    flags = [*FLAGS, "--out", "run"]
    flags[flags.index("--save_every") + 1] = "10min"
    with killed_after(8, monkeypatch):
        command(pretrain, "--dataset", folder, *flags)
    run = tmp_path / "run"
    assert checkpoint.load_file(run / "ckpt.safetensors")[1]["step"] == 3
    assert [row["epoch"] for row in timeless_rows(run) if "loss" in row] == [1, 2]
    assert sorted(read_log(run).series("loss")) == [3, 6]
    assert command(knn_eval, "run/ckpt.safetensors", "--k", 20, "--nofloors")[0] == 0
    knn = timeless_rows(run)[-1]
    assert knn["stage"] == "knn_eval" and knn["trained_epochs"] == 1
    assert read_log(run).score("knn_eval") is None
    code, _, err = command(pretrain, "--dataset", folder, *flags)
    assert code == 0 and "run: goes on after step 3" in err
    rows = timeless_rows(run)
    rows.remove(knn)
    (run / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert_same_run(run, whole)


def test_sigkill_to_the_process_itself(folder, whole, tmp_path):
    """Killed and started again until it is through; no lock, no temporary file, no half line stands in the way."""
    run = tmp_path / "run"
    command = [sys.executable, ROOT / "pretrain.py", "--dataset", folder, *FLAGS, "--out", run]
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    for epoch in (2, None):
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment)
        for line in process.stdout:
            if epoch and f'"epoch": {epoch}' in line:
                process.kill()
                break
        process.communicate()
        for stray in STRAYS:
            (run / stray).touch()
    for stray in STRAYS:
        (run / stray).unlink()
    assert process.returncode == 0
    assert_same_run(run, whole)


def test_a_finished_run_says_so(command, folder, whole):
    before = files_of(whole)
    code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", whole)
    assert code == 0 and rows == [] and f"{whole}: is finished, step 9" in err
    assert files_of(whole) == before


@pytest.mark.parametrize(
    "flags, told",
    [
        ("--epochs 4", "--epochs 4 (it was 3)"),
        ("--lr 7", "--lr 7.0 (it was 8.0)"),
        ("--reg amhe --s 1", "--reg amhe (it was mhe), --s 1.0 (it was 2.0)"),
        ("--seed 1", "--seed 1 (it was 0)"),
        ("--resume never", "already holds a run; name another folder, or take --resume auto"),
    ],
)
def test_other_settings_are_named_and_refused(command, folder, whole, flags, told):
    given = flags.split()
    kept = [x for pair in zip(FLAGS[::2], FLAGS[1::2]) if pair[0] not in given for x in pair]
    before = files_of(whole)
    code, rows, err = command(pretrain, "--dataset", folder, *kept, *given, "--out", whole)
    assert code == 2 and rows == [] and told in err and err.count("pretrain.py: ") == 1
    assert files_of(whole) == before


def test_other_images_under_the_same_name_are_refused(command, picture_folder):
    assert command(pretrain, "--dataset", picture_folder, *FLAGS, "--out", "run")[0] == 0
    for label in ("astronaut", "brick", "chelsea"):
        for i in range(8):
            (picture_folder / "train" / label / f"{i:02}.png").unlink()
    code, rows, err = command(pretrain, "--dataset", picture_folder, *FLAGS, "--out", "run")
    assert code == 2 and rows == [] and "holds a run on other images" in err and "steps 3 (it was 9)" in err


def test_a_folder_may_move_but_not_change(command, shell, folder, picture_folder, tmp_path, monkeypatch):
    """The path is a place and is told; classes, counts, size, mean and std are compared."""
    with killed_after(5, monkeypatch):
        command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    code, rows, err = command(pretrain, "--dataset", picture_folder, *FLAGS, "--out", "run")
    assert code == 0 and rows and err.count(f"dataset: {picture_folder} (it was {folder}); it holds the same\n") == 1
    assert read_log(tmp_path / "run").rows[0]["data"] == {
        "classes": ["astronaut", "brick", "chelsea"], "train": 48, "test": 18
    }  # fmt: skip
    ckpt = "run/ckpt.safetensors"
    for place in ([], ["--dataset", folder], ["--dataset", picture_folder]):
        code, knn, err = command(knn_eval, ckpt, "--k", 20, *place)
        assert code == 0 and knn[0]["own_data"], err
        assert rows_of(tmp_path / "run")[-1] == knn[-1]
    _, linear, _ = command(linear_eval, ckpt, "--dataset", folder)
    log = read_log(tmp_path / "run")
    assert log.score("knn_eval") == knn[0]["top1"] and log.score("linear_eval") == linear[-1]["top1"]

    for i in range(4):
        (picture_folder / "test" / "brick" / f"{i:02}.png").unlink()
    code, rows, err = command(pretrain, "--dataset", picture_folder, *FLAGS, "--out", "run")
    assert code == 2 and rows == [] and "a run on other images, test 14 (it was 18); name another folder" in err
    code, knn, _ = command(knn_eval, ckpt, "--k", 20, "--dataset", picture_folder)
    assert code == 0 and knn[0]["own_data"] is False
    for part in ("train", "test"):
        (picture_folder / part / "brick").rename(picture_folder / part / "wall")
    code, rows, err = command(pretrain, "--dataset", picture_folder, *FLAGS, "--out", "run")
    assert code == 2 and rows == [] and "class wall is new, class brick is gone" in err


def test_a_streamed_run_that_was_killed_ends_in_the_same_random_numbers(command, folder, tmp_path, monkeypatch):
    """The workers' loader draws a number at each start of a run."""
    monkeypatch.setattr("lib.sources.MEMORY", 0)
    assert command(pretrain, "--dataset", folder, *FLAGS, "--out", "through")[0] == 0
    with killed_after(5, monkeypatch):
        command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    assert command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")[0] == 0
    assert_same_run(tmp_path / "run", tmp_path / "through")


def test_mean_and_std_may_differ_by_rounding(whole):
    first = rows_of(whole)[0]
    for shift, faults in ((1e-15, 0), (1e-4, 1)):
        mean = [x + shift for x in first["view"]["mean"]]
        assert len(other_data({**first, "view": {**first["view"], "mean": mean}}, first)) == faults


@pytest.fixture
def picture_folder(folder, tmp_path):
    """A copy to change."""
    shutil.copytree(folder, tmp_path / "pictures")
    return tmp_path / "pictures"


def test_a_folder_in_use_is_refused(command, folder, whole):
    holds = "import pathlib, sys; from lib.files import claim; "
    holds += "lock = claim(pathlib.Path(sys.argv[1])); print('held'); input()"
    with subprocess.Popen(
        [sys.executable, "-c", holds, whole], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as other:
        assert other.stdout.readline() == "held\n"
        code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", whole)
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
    rows = [json.loads(line) for line in log.read_text().splitlines()]
    assert [row["n"] for row in rows if row["stage"] == "knn_eval"] == list(range(300))
    assert [row["n"] for row in rows if row["stage"] == "linear_eval"] == list(range(60))


def test_a_broken_line_is_named_and_does_not_forbid_to_go_on(command, folder, whole, tmp_path):
    shutil.copytree(whole, tmp_path / "run")
    log = tmp_path / "run" / "metrics.jsonl"
    rows = log.read_bytes().splitlines(keepends=True)
    broken = [rows[2][:9] + rows[3], b'{"top1": 1}\n', b"0.5\n", b"\0\0\xff\n", b"\n"]
    log.write_bytes(b"".join(rows[:2] + broken + rows[2:]))
    assert read_log(tmp_path / "run") == replace(read_log(whole), folder=tmp_path / "run")
    code, lines, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    told = [f"run/metrics.jsonl: line {n} is broken, and left out" for n in range(3, 8)]
    assert code == 0 and lines == [] and [line for line in err.splitlines() if "broken" in line][-5:] == told
    assert_same_run(tmp_path / "run", whole)


def test_a_system_without_locks_is_told_and_trains(tmp_path, monkeypatch, capsys):
    """As Windows is: it has no fcntl, and puts no file in place of one that is open."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    for name in ("files", "log"):
        runpy.run_path(str(ROOT / "lib" / f"{name}.py"))
    monkeypatch.setattr(files, "fcntl", None)
    claim(tmp_path).close()
    told = f"--out {tmp_path}: cannot be locked (no locks on this system); start no second run in it\n"
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


def test_a_file_where_the_encoders_folder_belongs_is_named_before_the_first_step(command, folder, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "encoder").touch()
    code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    assert code == 2 and rows == []
    told = "--out run: holds a file called encoder, where the encoder's folder belongs; move it"
    assert err.splitlines()[-1] == f"pretrain.py: {told}"


def test_a_checkpoint_that_is_gone_or_is_no_state_is_not_written_over(command, folder, whole, tmp_path):
    (tmp_path / "encoder").mkdir()
    for name in ("metrics.jsonl", "encoder/model.safetensors"):
        (tmp_path / name).write_bytes((whole / name).read_bytes())
    code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", tmp_path)
    assert code == 2 and rows == [] and "holds a run whose ckpt.safetensors is gone" in err
    tensors, description = checkpoint.load_file(whole / "ckpt.safetensors")
    for changed, fault in (
        ({"holds": "features"}, "holds features, not the state"),
        ({"format": 0}, "of format 0, not 1"),
    ):
        checkpoint.save(tmp_path / "ckpt.safetensors", tensors, {**description, **changed})
        code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", tmp_path)
        assert code == 2 and rows == [] and fault in err and err.count("pretrain.py: ") == 1
    (tmp_path / "ckpt.safetensors").write_bytes((whole / "ckpt.safetensors").read_bytes()[:-1])
    code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", tmp_path)
    assert code == 2 and rows == [] and "ckpt.safetensors: cannot be read as a safetensors file" in err


def test_a_full_disk_keeps_the_last_checkpoint(command, folder, whole, tmp_path, saves):
    """No file may grow beyond a limit, as on a disk that is full, from step 4 on."""
    steps, limits = [], resource.getrlimit(resource.RLIMIT_FSIZE)

    def fill():
        resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, limits[1]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Lars, "step", acting_step(saves, steps, 4, fill))
        try:
            code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    fault = "safetensors: cannot be written (File too large); its old content is unchanged"
    assert code == 2 and fault in err.splitlines()[-1] and err.count("pretrain.py: ") == 1
    assert len(steps) <= 6  # the save of step 5 has failed, which the end of the epoch waits for
    assert checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")[1]["step"] == 3
    assert files_of(tmp_path / "run").keys() == files_of(whole).keys()
    assert command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")[0] == 0
    assert_same_run(tmp_path / "run", whole)


def test_sigterm_to_the_process_itself(folder, tmp_path):
    flags = [*FLAGS, "--out", tmp_path / "run"]
    flags[flags.index("--epochs") + 1] = "1000"
    command = [sys.executable, ROOT / "pretrain.py", "--dataset", folder, *flags]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    for line in process.stdout:
        if '"epoch": 2' in line:
            process.terminate()
            break
    _, err = process.communicate(timeout=180)
    assert process.returncode == 143 and "Traceback" not in err
    assert err.splitlines()[-1].startswith("pretrain.py: SIGTERM after step ")


def test_a_run_that_failed_before_its_first_checkpoint_leaves_its_folder_to_others(command, folder, tmp_path):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pretrain.alignment", lambda x, y: (x - y).sum() * math.nan)
        assert command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")[0] == 2
    code, rows, _ = command(pretrain, "--dataset", f"{folder}/", *FLAGS, "--seed", 1, "--out", "run")
    assert code == 0 and [json.loads(x) for x in open("run/metrics.jsonl")] == rows  # noqa: SIM115
    code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--seed", 1, "--out", "run")
    assert code == 0 and rows == [] and "run: is finished" in err  # the folder's other spelling is the same folder


def test_another_number_of_threads_and_another_processor_are_told(command, folder, whole, monkeypatch):
    """They change the order of sums, and where one rounds, and so the last bits."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "ABACUS")
    code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", whole)
    assert code == 0 and "threads: 3 (it was 1)" in err and "processor: ABACUS (it was " in err


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


def test_a_second_ctrl_c_ends_the_run_once_the_file_is_whole(command, folder, whole, tmp_path, monkeypatch, saves):
    """The second comes while the state of step 4 is written; a shell may have started this with SIGINT ignored."""
    steps, fsync = [], os.fsync
    before = signal.signal(signal.SIGINT, signal.default_int_handler)

    def slow(descriptor):
        if len(steps) == 4 and threading.current_thread() is not threading.main_thread():
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(0.2)
        fsync(descriptor)

    with monkeypatch.context() as patch:
        patch.setattr(Lars, "step", acting_step(saves, steps, 4, lambda: os.kill(os.getpid(), signal.SIGINT)))
        patch.setattr(os, "fsync", slow)
        code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    signal.signal(signal.SIGINT, before)
    assert code == 130 and err.splitlines()[-1] == "pretrain.py: interrupted"
    assert files_of(tmp_path / "run").keys() == files_of(whole).keys()
    assert checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")[1]["step"] == 4
    assert command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")[0] == 0
    assert_same_run(tmp_path / "run", whole)


def test_the_first_step_that_is_not_finite_is_named(command, folder, tmp_path, monkeypatch):
    """The loss of step 5 is infinite, and the checkpoint of step 3 stays."""
    calls, alignment = [], models.alignment

    def spoil(x, y):
        calls.append(1)
        return alignment(x, y) * (math.inf if len(calls) in (9, 11) else 1)

    monkeypatch.setattr("models.alignment", spoil)
    code, _, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    last = err.splitlines()[-1]
    assert code == 2 and last.startswith("pretrain.py: step 5: not finite: loss inf, byol inf, "), last
    assert "run/ckpt.safetensors is unchanged" in last
    assert checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")[1]["step"] == 3


def test_a_dead_network_is_called_dead_once(command, folder, monkeypatch):
    """In the log from the first epoch on, by its projections and by its encoder's features; on stderr once."""
    embed = models.embed
    monkeypatch.setattr("models.embed", lambda encoder, views: embed(encoder, views) * 0)
    monkeypatch.setattr("pretrain.unit", lambda x: x * 0)
    code, rows, err = command(pretrain, "--dataset", folder, *FLAGS, "--out", "run")
    epochs = [row for row in rows if "loss" in row]
    judged = [row for row in rows if row.get("of") == "representations"]
    assert code == 0 and len(epochs) == 3 and len(judged) == 2
    assert all(row["dead"] is True for row in epochs + judged) and [row["g2"] for row in judged] == [1, 1]
    assert err.count("WARNING: dead network") == 1 and sum(row.get("about") == "dead" for row in rows) == 1
