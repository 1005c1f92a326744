"""Two processes compute what one does."""

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from conftest import ROOT, VIT, assert_same_run, call, killed_after, random, rows_of, tiny, words_of
from tqdm import tqdm

import data
import models
import pretrain as page
from harness import checkpoint
from harness.measure import refuse_faults
from harness.settings import RIVAL_WEIGHTS
from knn_eval import knn_eval
from lib import cli, nearest, pictures, processes
from lib.errors import InputError
from lib.files import CKPT, ENCODER, LOG
from linear_eval import linear_eval
from pretrain import pretrain

pytestmark = pytest.mark.xdist_group("processes")  # all by one worker: the fixture `two` takes long
IN_FLOAT64 = tiny(lr=0.1, eval_every=0, epochs=1)  # 3 steps; a judge would embed float32 views
IN_FLOAT32 = tiny(lr=0.1, eval_every=2, epochs=2, norm="none")  # 6 steps
METHODS = (
    *("--reg amhe", "--predictor none --reg uniform --weight 1", "--method simclr"),
    *("--method simsiam", "--method moco --queue 20", "--method barlow"),
    *("--reg ortho", "--method simsiam --reg koleo", "--method barlow --reg sigreg"),
)
IN_A_VIT = words_of(VIT | {"lr": 0.01, "reg": "amhe", "reg_on": "encoder", "epochs": 1, "eval_every": 0})
NORMED = tiny(epochs=3, lr=8, eval_every=3, save_every="2steps")  # 9 steps
SEARCHES = (  # rows of a bank, rows in a part of it, queries, k
    (41, 7, 30, 5),  # 21 and 20 rows
    (41, 100, 5, 30),  # k is beyond the rows of a process
    (1, 1, 3, 1),  # the second process has none
    (5, 2, 700, 9),  # k is beyond all rows
)


def one_of_two(rank, ports, folder, place):
    """What each of two processes does, one thing after the other."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    world |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": ports[0], "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(x) for name, x in world.items()})
    os.chdir(place)
    mp.set_start_method("fork", force=True)  # of the workers that read pictures, as in what a launcher starts
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(f"told{rank}", "w")  # noqa: SIM115
    torch._C._get_accelerator = lambda: torch.device("cuda")  # as on a machine with a GPU, which they do not use
    built, embedded, loads = noted(page, "build"), noted(models, "embed"), noted(data, "load")
    seen = {}
    with float64():
        for i, method in enumerate(METHODS):
            call(pretrain, "--dataset", folder, *method.split(), *IN_FLOAT64, "--out", f"two{i}")
            training = built[-1].result
            seen[f"buffers{i}"] = dict(training.network.named_buffers())
        call(pretrain, "--dataset", folder, *IN_A_VIT, "--out", "vit")
    seen["ddp"] = [training.parallel.gradient_as_bucket_view, training.parallel.will_sync_module_buffers()]
    call(pretrain, "--dataset", folder, *IN_FLOAT32, "--out", "judged")
    embedded.clear()
    call(knn_eval, "judged/ckpt.safetensors", "--k", 5)
    seen["embedded"] = [len(each.result) for each in embedded]
    seen["nearest"] = [nearest_of_random_rows(*sizes) for sizes in SEARCHES]
    call(linear_eval, "judged/ckpt.safetensors", "--epochs", 3, "--batch_size", 19)
    seen["loads"] = [[each.begun, each.ended] for each in loads]

    call(pretrain, "--dataset", folder, *NORMED, "--out", "whole")
    with killed_after(6):
        call(pretrain, "--dataset", folder, *NORMED, "--out", "resumed")
    dist.barrier()
    if rank == 0:
        shutil.copytree("resumed", "alone")
    dist.barrier()
    call(pretrain, "--dataset", folder, *NORMED, "--out", "resumed")

    network = torch.nn.Linear(1, 1)
    network.weight.data += torch.nan if rank else 0
    seen["faulty"] = refusal(refuse_faults, {}, network, Path("run"), processes.start())
    seen["differing"] = refusal(processes.agree, steps=3, step=rank)
    dist.barrier()
    if not torch.cuda.is_available():  # otherwise what Accelerate does may succeed
        with pytest.raises(RuntimeError):
            dist.barrier(device_ids=[rank])
    torch.save(seen, f"seen{rank}")
    sys.stderr.flush()
    be_impatient(rank, ports[1])
    os._exit(0)


def refusal(f, *args, **kwargs):
    """What a function says as it refuses."""
    with pytest.raises(InputError) as refused:
        f(*args, **kwargs)
    return str(refused.value)


@contextlib.contextmanager
def float64():
    """Train in float64: BatchNorm makes rounding grow, in float32 past what would show a small fault."""
    prepare, forward = Accelerator.prepare, models.Method.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Accelerator, "prepare", lambda self, network, *rest: prepare(self, network.double(), *rest))
        patch.setattr(models.Method, "forward", lambda self, v1, v2: forward(self, v1.double(), v2.double()))
        yield


def noted(owner, name):
    """A list of all calls of a function from now on: when each begins and ends, and what it returns."""
    function, calls = getattr(owner, name), []

    def noting(*args, **flags):
        begun = time.monotonic()
        result = function(*args, **flags)
        calls.append(SimpleNamespace(begun=begun, ended=time.monotonic(), result=result))
        return result

    setattr(owner, name, noting)
    return calls


def nearest_of_random_rows(n, rows_in_part, m, k):
    """The k rows of a bank of n that are nearest to m queries; of several processes each has a part of the bank."""
    bank, queries = random(n, 6, dtype=torch.float64), random(m, 6, dtype=torch.float64, seed=1)
    mine = processes.own_part(data.Split(bank, torch.zeros(n)))
    return nearest.nearest(queries, mine.images.split(rows_in_part), n, k)


def be_impatient(rank, port):
    """Wait longer than a collective may for what the first process does alone, then too long for the other one."""
    dist.destroy_process_group()
    AcceleratorState._reset_state(True)
    os.environ["MASTER_PORT"] = str(port)
    processes.COLLECTIVE, processes.PATIENCE = timedelta(seconds=3), timedelta(seconds=60)
    accelerator = processes.start()
    dist.barrier()
    with processes.first_alone(accelerator):
        time.sleep(4)  # the others as well, of whose work the first must not grow tired
        if rank == 0:
            Path("downloaded").touch()
        Path(f"found {rank} {Path('downloaded').exists()}").touch()
    dist.barrier()
    started = time.monotonic()
    if rank == 0:
        time.sleep(5)  # until the other one has ended
        with contextlib.suppress(RuntimeError), processes.first_alone(accelerator):
            Path("came in").touch()
        Path(f"missed {time.monotonic() - started < 20}").touch()
    else:
        with contextlib.suppress(RuntimeError):
            dist.barrier()
        Path(f"given up {time.monotonic() - started < 4.9}").touch()


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """The folder in which two processes have done all of that."""
    place = tmp_path_factory.mktemp("two")
    with socket.socket() as one, socket.socket() as other:
        for free in (one, other):
            free.bind(("127.0.0.1", 0))
        ports = [free.getsockname()[1] for free in (one, other)]
    mp.spawn(one_of_two, (ports, folder, place), nprocs=2)
    return place


@pytest.fixture(scope="module")
def seen(two):
    """What each of the two has seen."""
    return [torch.load(two / f"seen{rank}", weights_only=True) for rank in (0, 1)]


def assert_equal_runs(mine, theirs, tolerance):
    """Their rows of epochs, and their networks."""
    rows = [[row for row in rows_of(run) if "loss" in row and row["stage"] == "pretrain"] for run in (mine, theirs)]
    assert len(rows[0]) == len(rows[1]) > 0
    names = {"loss", *models.METHODS, "uniformity", "alignment", "std", "energy", *RIVAL_WEIGHTS}
    for row, expected in zip(*rows):
        for name in names & expected.keys():
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    (ours, _), (one, _) = (checkpoint.load_file(run / "ckpt.safetensors") for run in (mine, theirs))
    networks = {name: x for name, x in one.items() if "/" not in name}
    for name, x in networks.items():
        torch.testing.assert_close(ours[name], x, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("i", range(len(METHODS)), ids=METHODS)
def test_every_method_takes_the_steps_of_one_process(two, seen, command, folder, tmp_path, i):
    """With BatchNorm, whose statistics are those of the whole batch. Both have the same buffers, as MoCo's queue."""
    with float64():
        flags = ["--dataset", folder, *METHODS[i].split(), *IN_FLOAT64]
        assert command(pretrain, *flags, "--out", "one")[0] == 0
    assert_equal_runs(two / f"two{i}", tmp_path / "one", 1e-10)
    mine, theirs = (of_rank[f"buffers{i}"] for of_rank in seen)
    assert mine and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert ("queue" in mine) == METHODS[i].startswith("--method moco")


def test_a_vit_takes_the_steps_of_one_process(two, command, folder, tmp_path):
    """timm resamples its positions in float32."""
    with float64():
        assert command(pretrain, "--dataset", folder, *IN_A_VIT, "--out", "one")[0] == 0
    assert_equal_runs(two / "vit", tmp_path / "one", 1e-6)


def test_training_in_float32_and_evaluations_are_those_of_one_process(two, command, folder, tmp_path):
    """48 and 18 images, batches of 19: shares that do not divide, and not one image twice."""
    code, rows, _ = command(pretrain, "--dataset", folder, *IN_FLOAT32, "--out", "one")
    assert code == 0
    assert_equal_runs(two / "judged", tmp_path / "one", 1e-5)
    ours = [row for row in rows_of(two / "judged") if row["stage"] == "pretrain"]
    assert len(rows) == len(ours) == 7 and ours[0]["processes"] == 2
    assert [row["top1"] for row in ours if "top1" in row] == [row["top1"] for row in rows if "top1" in row]

    theirs = [row for row in rows_of(two / "judged") if row["stage"] != "pretrain"]
    _, knn, _ = command(knn_eval, two / "judged" / "ckpt.safetensors", "--k", 5)
    _, probe, _ = command(linear_eval, two / "judged" / "ckpt.safetensors", "--epochs", 3, "--batch_size", 19)
    assert len(theirs) == len(knn + probe) == 7
    for mine, row in zip(knn + probe, theirs):
        assert mine.pop("loss", 0) == pytest.approx(row.pop("loss", 0), rel=1e-4)
        assert mine == row


def test_each_process_embeds_half_of_bank_and_queries(seen):
    """Of 18 queries and a bank of 48; then `geometry` embeds all 18 in each process, and their 36 views.

    First for the network, then for the untrained one, then for pixels. Gradients lie in DDP's buckets, buffers stay.
    """
    assert [of_rank["embedded"] for of_rank in seen] == [[9, 24, 18, 36] * 3] * 2
    assert [of_rank["ddp"] for of_rank in seen] == [[True, False]] * 2


def test_the_nearest_of_all_processes_banks_are_those_of_one(seen):
    for sizes, mine, theirs in zip(SEARCHES, *[of_rank["nearest"] for of_rank in seen]):
        (cosines, rows), (expected_cosines, expected_rows) = mine, nearest_of_random_rows(*sizes)
        assert torch.equal(cosines, theirs[0]) and torch.equal(rows, theirs[1])
        torch.testing.assert_close(cosines, expected_cosines)
        assert torch.equal(rows, expected_rows)


def test_the_first_process_alone_downloads_and_speaks(two, seen):
    """It loads the data before the other one does, whatever the stage."""
    first, second = (of_rank["loads"] for of_rank in seen)
    assert len(first) == len(second) == len(METHODS) + 4
    assert all(ended <= begun for (_, ended), (begun, _) in zip(first, second))
    told, silent = (re.sub(r".*\r", "", (two / f"told{rank}").read_text()) for rank in (0, 1))
    assert "loss = byol + 10 energy" in told
    assert silent == ""


def test_a_run_of_two_processes_goes_on_to_the_same_bits_and_with_one(two, command, folder):
    assert_same_run(two / "resumed", two / "whole")
    code, rows, err = command(pretrain, "--dataset", folder, *NORMED, "--out", two / "alone")
    assert code == 0 and "goes on after step 5" in err and "processes: 1 (it was 2)" in err
    assert [row["epoch"] for row in rows if "loss" in row] == [2, 3]


def test_processes_that_differ_or_diverge_are_refused(seen):
    differ = "process 1 has step 1 (process 0: 0); give all processes the same flags and files"
    assert [of_rank["differing"] for of_rank in seen] == [differ] * 2
    assert seen[0]["faulty"] == seen[1]["faulty"] and "not finite: weights nan" in seen[0]["faulty"]


def test_a_download_may_take_longer_than_a_collective(two):
    marks = {path.name for path in two.iterdir() if " " in path.name}
    assert marks == {"found 0 True", "found 1 True", "given up True", "missed True"}


@pytest.fixture
def forgetful():
    """Accelerate keeps the precision of the first Accelerator of a process."""
    processes.start()  # an Accelerator that is told to use the CPU would later want more variables
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.mark.parametrize(
    "stage, name, value, line",
    [
        (pretrain, "WORLD_SIZE", "2", "WORLD_SIZE is 2, but Accelerate sees 1; start several by a launcher"),
        (knn_eval, "WORLD_SIZE", "two", "WORLD_SIZE is two, but Accelerate sees 1;"),
        (linear_eval, "RANK", "1", "RANK is 1, but Accelerate sees 0;"),
        (pretrain, "ACCELERATE_MIXED_PRECISION", "fp16", "--mixed_precision fp16: on cpu take no or bf16"),
        (linear_eval, "ACCELERATE_USE_FSDP", "true", "--use_fsdp divides the network"),
        (pretrain, "ACCELERATE_USE_PARALLELISM_CONFIG", "True", "unset ACCELERATE_USE_PARALLELISM_CONFIG"),
    ],
)
def test_a_launch_that_cannot_be_is_refused(
    command, folder, trained, forgetful, monkeypatch, tmp_path, stage, name, value, line
):
    """torchrun on a machine without a GPU, variables that a launcher has left behind, and what divides a network."""
    monkeypatch.setenv(name, value)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(cli, "leave", sys.exit)
    what = ["--dataset", folder, *tiny(out="run")] if stage is pretrain else [trained / "ckpt.safetensors"]
    code, rows, err = command(stage, *what)
    assert code == 2 and rows == [] and err.count("\n") == 1 and line in err, err
    assert not any(tmp_path.iterdir())


def test_the_launchers_micro_batches_do_not_replace_those_of_the_flag(command, folder, monkeypatch):
    """Accelerate takes its variable before its argument: a run of 6 steps would take 2."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    flags = ["--dataset", folder, *tiny(epochs=2, accumulate=2, eval_every=0)]
    code, rows, err = command(pretrain, *flags)
    assert code == 0 and [row["step"] for row in rows if "loss" in row] == [3, 6], err


def test_fp32_is_fp32(monkeypatch):
    """Accelerate sets TF32 with --dynamo_backend."""
    make = processes.Accelerator

    def with_tf32(*args, **kwargs):
        torch.backends.cuda.matmul.allow_tf32 = True
        return make(*args, **kwargs)

    monkeypatch.setattr(processes, "Accelerator", with_tf32)
    processes.start()
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_shares_make_up_the_whole():
    for n in range(1, 9):
        for world in range(1, 6):
            shares = [processes.share(n, rank, world) for rank in range(world)]
            rows = torch.cat(shares).tolist()
            assert len({len(x) for x in shares}) == 1 and len(rows) >= n and rows == [i % n for i in range(len(rows))]


def test_what_is_said_beside_a_bar_has_a_line_of_its_own(capsys):
    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        processes.say("WARNING: this")
    assert "\rWARNING: this\n" in capsys.readouterr().err


def test_two_processes_are_launched_and_leave_cleanly(folder, tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", str(ROOT / "pretrain.py")]
    flags = ["--dataset", str(folder), *tiny(epochs=1, out="run")]
    done = subprocess.run([*launch, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows_of(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", ".log.lock", CKPT, ENCODER, LOG}
    assert checkpoint.load_file(tmp_path / "run" / "ckpt.safetensors")[1]["epoch"] == 1


def made_unless_fatal(key):
    """What a worker makes, which is killed at the fourth."""
    if key == 3:
        os.kill(os.getpid(), signal.SIGKILL)
    return torch.ones(3)


def outlive():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)


def test_a_worker_that_dies_keeps_nobody_waiting(shell):
    """Workers outlive a SIGTERM by half a minute, for which the interpreter waited at its end."""

    def stage():
        for _ in pictures.loader(made_unless_fatal, [[i] for i in range(9)], n_workers=2):
            slow.append(mp.get_context("fork").Process(target=outlive, daemon=True))
            slow[-1].start()

    slow = []
    code, lines, err = shell(stage)
    assert code == 1 and lines == [] and err.count("\n") == 1 and "has died" in err, err
    slow[0].join(5)
    assert slow[0].exitcode == -signal.SIGKILL
