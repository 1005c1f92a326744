"""Two processes compute what one does."""

import contextlib
import inspect
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from accelerate import Accelerator
from tqdm import tqdm

import data
import models
from harness import checkpoint
from harness.measure import refuse_faults
from knn_eval import knn_eval
from lib import cli, nearest, pictures, processes
from lib.errors import InputError
from lib.files import CKPT, ENCODER, LOG
from linear_eval import linear_eval
from pretrain import pretrain
from regularizers import info_nce, uniformity

ROOT = Path(__file__).parent.parent
SMALL = "--recipe cifar10-300 --model test_resnet --stem imagenet --hidden_dim 32 --out_dim 16".split()
SMALL += "--batch_size 16".split()
IN_FLOAT64 = ["--lr", "0.1", "--eval_every", "0", "--epochs", "3"]  # 9 steps; a judge would embed float32 views
IN_FLOAT32 = ["--lr", "0.1", "--eval_every", "7", "--epochs", "7", "--norm", "none"]  # 21 steps
METHODS = (
    *("--reg none", "--reg uniform --weight 1", "--reg amhe", "--method simclr"),
    *("--method simsiam", "--method moco --queue 20", "--method barlow", "--predictor none --reg uniform"),
)
NORMED = ["--epochs", "7", "--lr", "8", "--eval_every", "7", "--save_every", "2steps"]


SEARCHES = (  # rows of a bank, rows in a part of it, queries, k
    (41, 7, 30, 5),  # 21 and 20 rows
    (41, 100, 5, 30),  # k is beyond the rows of a process
    (1, 1, 3, 1),  # the second process has none
    (5, 2, 700, 9),  # k is beyond all rows
)


class Lost(BaseException):
    """Ends a stage where it stands, as SIGKILL does."""


def call(stage, *words):
    """A stage, with the flags of a command line."""
    flags = cli.read([str(word) for word in words], inspect.signature(stage).parameters)
    stage(*[flags.pop("ckpt")] if "ckpt" in flags else (), **flags)


def nearest_of_random_rows(n, rows_in_part, m, k):
    """The k rows of a bank of n that are nearest to m queries; of several processes each has a part of the bank."""
    generator = torch.Generator().manual_seed(0)
    bank, queries = (torch.randn(rows, 6, generator=generator, dtype=torch.float64) for rows in (n, m))
    mine = processes.own_part(data.Split(bank, torch.zeros(n)))
    return nearest.nearest(queries, mine.images.split(rows_in_part), n, k)


@contextlib.contextmanager
def results_of(owner, name):
    """Collect what a function returns while it is called."""
    function, results = getattr(owner, name), []

    def kept(*args):
        results.append(function(*args))
        return results[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(owner, name, kept)
        yield results


@contextlib.contextmanager
def float64():
    """Train in float64: BatchNorm makes rounding grow, in float32 past what would show a small fault."""
    prepare, forward = Accelerator.prepare, models.Method.forward
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Accelerator, "prepare", lambda self, network, optimizer: prepare(self, network.double(), optimizer)
        )
        patch.setattr(models.Method, "forward", lambda self, v1, v2: forward(self, v1.double(), v2.double()))
        yield


def one_of_two(rank, port, folder, place):
    """What each of two processes does, one thing after the other, in runs of its own names."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}
    world |= {"OMP_NUM_THREADS": 1, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(x) for name, x in world.items()})
    os.chdir(place)
    sys.argv, sys.stdout, sys.stderr = ["pretrain.py"], open(os.devnull, "w"), open(f"told{rank}", "w")  # noqa: SIM115
    torch.set_num_threads(1)
    torch._C._get_accelerator = lambda: torch.device("cuda")  # as on a machine with a GPU, which they do not use
    load, loads = data.load, []

    def timed(*args, **flags):
        loads.append([time.monotonic()])
        images = load(*args, **flags)
        loads[-1].append(time.monotonic())
        return images

    data.load = timed
    built = keep_what_is_built()
    with float64():
        for i, method in enumerate(METHODS):
            call(pretrain, "--dataset", folder, *method.split(), *SMALL, *IN_FLOAT64, "--out", f"two{i}")
            torch.save(dict(built[-1].network.named_buffers()), f"buffers{i}-{rank}")
    parallel = built[-1].parallel
    Path(f"ddp{rank}").write_text(json.dumps([parallel.gradient_as_bucket_view, parallel.will_sync_module_buffers()]))
    call(pretrain, "--dataset", folder, *SMALL, *IN_FLOAT32, "--out", "judged")
    with results_of(models, "embed") as embedded:
        call(knn_eval, "judged/ckpt.safetensors", "--k", 5)
    Path(f"embedded{rank}").write_text(json.dumps([len(features) for features in embedded]))
    torch.save([nearest_of_random_rows(*sizes) for sizes in SEARCHES], f"near{rank}")
    call(linear_eval, "judged/ckpt.safetensors", "--epochs", 3, "--batch_size", 19)
    Path(f"loads{rank}").write_text(json.dumps(loads))

    call(pretrain, "--dataset", folder, *SMALL, *NORMED, "--out", "whole")
    update, steps = models.BYOL.update_target, []

    def losing(network, tau):
        update(network, tau)
        steps.append(tau)
        if len(steps) == 12:
            raise Lost

    for out in ("resumed", "alone"):
        models.BYOL.update_target, steps[:] = losing, []
        try:
            call(pretrain, "--dataset", folder, *SMALL, *NORMED, "--out", out)
        except Lost:
            models.BYOL.update_target = update
    call(pretrain, "--dataset", folder, *SMALL, *NORMED, "--out", "resumed")

    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for name, term in TERMS.items():
        mine = x.chunk(2)[rank].clone().requires_grad_()
        value = term(processes.gather(mine))
        value.backward()
        torch.save({"value": value.detach(), "grad": mine.grad}, f"{name}{rank}")
    for name, x in VIEWS.items():
        torch.save(normalised(x.chunk(2, 1)[rank], name != "plain"), f"norm {name}{rank}")
    network = torch.nn.Linear(1, 1)
    network.weight.data += torch.nan if rank else 0
    try:
        refuse_faults({}, network, Path("run"), processes.start())
    except InputError as e:
        Path(f"faulty{rank}").write_text(str(e))
    try:
        processes.agree(processes.start(), steps=3, step=rank)
    except InputError as e:
        Path(f"refused{rank}").write_text(str(e))
    dist.barrier()
    if not torch.cuda.is_available():  # otherwise what Accelerate does may succeed
        try:
            dist.barrier(device_ids=[rank])
        except RuntimeError as e:
            Path(f"no-gpu{rank}").write_text(str(e))
    sys.stderr.flush()
    os._exit(0)


def keep_what_is_built():
    """A list to which every run of this process adds its `Training`."""
    stage = sys.modules["pretrain"]
    build, built = stage.build, []

    def keeping(*args):
        built.append(build(*args))
        return built[-1]

    stage.build = keeping
    return built


TERMS = {"uniformity": uniformity, "info_nce": lambda z: info_nce(*z.chunk(2))}


VIEWS = {  # (2, b, c, ...), of unlike means and spreads
    "affine": torch.linspace(-1, 2, 2 * 6 * 5, dtype=torch.float64).exp().view(2, 6, 5),
    "plain": torch.linspace(-1, 2, 2 * 6 * 5, dtype=torch.float64).exp().view(2, 6, 5),
    "one image a process": torch.linspace(-1, 2, 2 * 2 * 5, dtype=torch.float64).exp().view(2, 2, 5),
    "maps": torch.linspace(-1, 2, 2 * 4 * 5 * 6, dtype=torch.float64).exp().view(2, 4, 5, 3, 2),
}


def normalised(views, affine):
    """What ViewNorm makes of two views, (2, b, 5, ...): outputs, gradients, running statistics."""
    norm = models.ViewNorm(5, affine=affine).double()
    if affine:
        norm.weight.data, norm.bias.data = torch.linspace(-1, 2, 10, dtype=torch.float64).chunk(2)
    x = views.clone().requires_grad_()
    batch = x.flatten(0, 1)
    if batch.ndim == 4:
        batch = batch.contiguous(memory_format=torch.channels_last)
    y = norm(batch).unflatten(0, (2, -1))
    (views.cos() * y).sum().backward()
    of_images = {"y": y.detach(), "x": x.grad}
    return of_images, [p.grad for p in norm.parameters()], [norm.running_mean, norm.running_var]


@pytest.fixture(scope="module")
def two(folder, tmp_path_factory):
    """The folder in which two processes have done all of that."""
    place = tmp_path_factory.mktemp("two")
    mp.spawn(one_of_two, (free_port(), folder, place), nprocs=2)
    return place


def free_port():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def one_that_waits(rank, port, place):
    """Wait longer than a collective may for what the first process does alone, then too long for the other one."""
    world = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "OMP_NUM_THREADS": 1}
    world |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
    os.environ.update({name: str(x) for name, x in world.items()})
    processes.COLLECTIVE, processes.PATIENCE = timedelta(seconds=4), timedelta(seconds=30)
    accelerator = processes.start()
    dist.barrier()
    with processes.first_alone(accelerator):
        time.sleep(6)  # the others as well, of whose work the first must not grow tired
        if rank == 0:
            Path(place, "downloaded").touch()
        else:
            Path(place, f"seen {Path(place, 'downloaded').exists()}").touch()
    dist.barrier()
    if rank == 0:
        time.sleep(8)  # until the other one has ended
        started = time.monotonic()
        try:
            with processes.first_alone(accelerator):
                pass
        except RuntimeError as e:
            Path(place, f"missed {'gloo' in str(e) and time.monotonic() - started < 2}").touch()
        os._exit(0)
    started = time.monotonic()
    try:
        dist.barrier()
    except RuntimeError:
        Path(place, f"given up {time.monotonic() - started < 7}").touch()
    os._exit(0)


def test_fp32_is_fp32(monkeypatch):
    """Accelerate sets TF32 with --dynamo_backend."""
    make = processes.Accelerator

    def with_tf32(*args, **kwargs):
        torch.backends.cuda.matmul.allow_tf32 = True
        return make(*args, **kwargs)

    monkeypatch.setattr(processes, "Accelerator", with_tf32)
    processes.start()
    assert not torch.backends.cuda.matmul.allow_tf32 and torch.get_float32_matmul_precision() == "highest"


def test_a_download_may_take_longer_than_a_collective(tmp_path):
    mp.spawn(one_that_waits, (free_port(), tmp_path), nprocs=2)
    assert {path.name for path in tmp_path.iterdir()} == {"downloaded", "seen True", "given up True", "missed True"}


def rows_of(run):
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_equal_runs(mine, theirs, tolerance):
    """Their rows of epochs, and their networks."""
    rows = [[row for row in rows_of(run) if "loss" in row and row["stage"] == "pretrain"] for run in (mine, theirs)]
    assert len(rows[0]) == len(rows[1]) > 0
    for row, expected in zip(*rows):
        for name in {"loss", *models.METHODS, "uniformity", "alignment", "std", "energy"} & expected.keys():
            assert row[name] == pytest.approx(expected[name], rel=tolerance, abs=tolerance), name
    (ours, _), (one, _) = (checkpoint.load(run / "ckpt.safetensors") for run in (mine, theirs))
    networks = {name: x for name, x in one.items() if "/" not in name}
    for name, x in networks.items():
        torch.testing.assert_close(ours[name], x, rtol=10 * tolerance, atol=10 * tolerance)


@pytest.mark.parametrize("i", range(len(METHODS)), ids=METHODS)
def test_every_method_takes_the_steps_of_one_process(two, command, folder, tmp_path, i):
    """With BatchNorm, whose statistics are those of the whole batch. Both have the same buffers, as MoCo's queue."""
    with float64():
        flags = ["--dataset", folder, *METHODS[i].split(), *SMALL, *IN_FLOAT64]
        assert command(pretrain, *flags, "--out", "one")[0] == 0
    assert_equal_runs(two / f"two{i}", tmp_path / "one", 1e-10)
    mine, theirs = (torch.load(two / f"buffers{i}-{rank}", weights_only=True) for rank in (0, 1))
    assert mine and all(torch.equal(x, theirs[name]) for name, x in mine.items())
    assert ("queue" in mine) == METHODS[i].startswith("--method moco")


def test_twenty_steps_in_float32_are_those_of_one_process(two, command, folder, tmp_path):
    code, rows, _ = command(pretrain, "--dataset", folder, *SMALL, *IN_FLOAT32, "--out", "one")
    assert code == 0
    assert_equal_runs(two / "judged", tmp_path / "one", 1e-5)
    ours = [row for row in rows_of(two / "judged") if row["stage"] == "pretrain"]
    assert len(rows) == len(ours) == 12 and ours[0]["processes"] == 2
    assert [row["top1"] for row in ours if "top1" in row] == [row["top1"] for row in rows if "top1" in row]


def test_evaluations_are_those_of_one_process(two, command, folder):
    """48 and 18 images, batches of 19: shares that do not divide, and not one image twice."""
    theirs = [row for row in rows_of(two / "judged") if row["stage"] != "pretrain"]
    _, knn, _ = command(knn_eval, two / "judged" / "ckpt.safetensors", "--k", 5)
    _, probe, _ = command(linear_eval, two / "judged" / "ckpt.safetensors", "--epochs", 3, "--batch_size", 19)
    assert len(theirs) == len(knn + probe) == 7
    for mine, row in zip(knn + probe, theirs):
        assert mine.pop("loss", 0) == pytest.approx(row.pop("loss", 0), rel=1e-4)
        assert mine == row


def test_what_is_said_beside_a_bar_has_a_line_of_its_own(capsys):
    with tqdm(total=2, file=sys.stderr) as bar:
        bar.update()
        processes.say("WARNING: this")
    assert "\rWARNING: this\n" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there, Accelerate's wait may succeed")
def test_processes_on_cpus_wait_without_a_gpu(two):
    """Accelerate's own wait asks for one each, on a machine that has a GPU, as this one says it has."""
    for rank in range(2):
        assert (two / f"no-gpu{rank}").read_text()  # why it fails


def test_gradients_lie_in_buckets_and_buffers_are_not_sent(two):
    assert [json.loads((two / f"ddp{rank}").read_text()) for rank in (0, 1)] == [[True, False]] * 2


def test_each_process_embeds_half_of_bank_and_queries(two):
    """Of 18 queries and a bank of 48; then `geometry` embeds all 18 in each process, and their 36 views.

    First for the network, then for the untrained one, then for pixels.
    """
    for rank in (0, 1):
        assert json.loads((two / f"embedded{rank}").read_text()) == [9, 24, 18, 36] * 3


@pytest.mark.parametrize("search", range(len(SEARCHES)))
def test_the_nearest_of_all_processes_banks_are_those_of_one(two, search):
    (cosines, rows), theirs = (torch.load(two / f"near{rank}")[search] for rank in (0, 1))
    assert torch.equal(cosines, theirs[0]) and torch.equal(rows, theirs[1])
    expected_cosines, expected_rows = nearest_of_random_rows(*SEARCHES[search])
    torch.testing.assert_close(cosines, expected_cosines)
    assert torch.equal(rows, expected_rows)


def test_data_are_loaded_by_the_first_process_first(two):
    """It alone downloads them, whatever the stage."""
    first, second = (json.loads((two / f"loads{rank}").read_text()) for rank in (0, 1))
    assert len(first) == len(second) == len(METHODS) + 3
    assert all(ended <= begun for (_, ended), (begun, _) in zip(first, second))


def test_a_run_of_two_processes_goes_on_to_the_same_bits(two):
    (ours, told), (theirs, meant) = (checkpoint.load(two / run / "ckpt.safetensors") for run in ("resumed", "whole"))
    assert told == meant and all(torch.equal(x, theirs[name]) for name, x in ours.items())
    timeless = [[{**row, "images_per_s": 0} for row in rows_of(two / run)] for run in ("resumed", "whole")]
    assert timeless[0] == timeless[1]


def test_a_run_of_two_processes_goes_on_with_one(two, command, folder):
    code, rows, err = command(pretrain, "--dataset", folder, *SMALL, *NORMED, "--out", two / "alone")
    assert code == 0 and "goes on after step 11" in err and "processes: 1 (it was 2)" in err
    assert [row["epoch"] for row in rows if "loss" in row] == [4, 5, 6, 7]
    assert rows_of(two / "alone")[-2]["of"] == "online"


def test_only_the_first_process_speaks(two):
    told, silent = (re.sub(r".*\r", "", (two / f"told{rank}").read_text()) for rank in (0, 1))
    assert "2 processes: 8 images of each step a process; statistics of BatchNorm: of all processes" in told
    assert silent == ""


@pytest.mark.parametrize("name", TERMS)
def test_terms_over_processes_are_those_of_the_whole_batch(two, name):
    """The mean over processes that DDP takes of parameters' gradients is the gradient of the large batch."""
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    value = TERMS[name](x)
    value.backward()
    halves = [torch.load(two / f"{name}{rank}", weights_only=True) for rank in (0, 1)]
    torch.testing.assert_close(torch.cat([half["grad"] for half in halves]) / 2, x.grad, rtol=1e-6, atol=1e-12)
    assert all(half["value"].item() == pytest.approx(value.item(), rel=1e-12) for half in halves)


@pytest.mark.parametrize("name", VIEWS)
def test_norms_of_two_processes_are_those_of_the_whole_batch(two, name):
    images, gradients, statistics = normalised(VIEWS[name], name != "plain")
    parts = [torch.load(two / f"norm {name}{rank}", weights_only=True) for rank in (0, 1)]
    for key, whole in images.items():
        torch.testing.assert_close(torch.cat([part[0][key] for part in parts], 1), whole, rtol=1e-10, atol=1e-10)
    assert len(gradients) == (0 if name == "plain" else 2)
    for whole, *mine in zip(gradients, *[part[1] for part in parts]):
        torch.testing.assert_close(sum(mine), whole, rtol=1e-10, atol=1e-10)
    for whole, first, second in zip(statistics, *[part[2] for part in parts]):
        torch.testing.assert_close(first, whole, rtol=1e-10, atol=1e-10)
        assert torch.equal(first, second)


def test_processes_that_differ_are_refused(two):
    for rank in (0, 1):
        told = (two / f"refused{rank}").read_text()
        assert told == "process 1 has step 1 (process 0: 0); give all processes the same flags and files"


def test_weights_that_are_not_finite_in_one_process_end_all(two):
    told = {(two / f"faulty{rank}").read_text() for rank in (0, 1)}
    assert len(told) == 1 and "not finite: weights nan" in told.pop()


@pytest.mark.parametrize("stage", [pretrain, knn_eval, linear_eval])
@pytest.mark.parametrize(
    "name, said, line",
    [("WORLD_SIZE", "2", "sees 1 (of 1"), ("WORLD_SIZE", "two", "sees 1 (of 1"), ("RANK", "1", "sees 0 (of 1")],
)
def test_processes_that_do_not_see_each_other_are_refused(
    command, folder, monkeypatch, two, tmp_path, stage, name, said, line
):
    """torchrun on a machine without a GPU; variables that a launcher has left behind."""
    processes.start()  # before: an Accelerator that is told to use the CPU would want more variables
    monkeypatch.setenv(name, said)
    monkeypatch.setattr(time, "sleep", lambda _: None)
    monkeypatch.setattr(cli, "leave", sys.exit)
    what = ["--dataset", folder, *SMALL] if stage is pretrain else [two / "judged" / "ckpt.safetensors"]
    code, rows, err = command(stage, *what)
    assert code == 2 and rows == [] and f"{name} is {said}, but Accelerate {line} process)" in err
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    "precision, line", [("fp16", "fp16 wants a GPU; on a CPU take bf16 or no"), ("bf61", "bf61: take no, bf16 or fp16")]
)
def test_a_precision_that_there_is_not_is_refused(folder, tmp_path, precision, line):
    """In a process of its own: Accelerate keeps the precision of the first."""
    environment = {**os.environ, "ACCELERATE_MIXED_PRECISION": precision, "ACCELERATE_USE_CPU": "true"}
    command = [sys.executable, str(ROOT / "pretrain.py"), "--dataset", str(folder), *SMALL, "--out", "run"]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and done.stderr.count("\n") == 1, done.stderr
    assert f"--mixed_precision {line}" in done.stderr
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("stage", [pretrain, knn_eval, linear_eval])
@pytest.mark.parametrize("name", ["FSDP", "DEEPSPEED", "MEGATRON_LM", "PARALLELISM_CONFIG"])
def test_a_launcher_that_divides_the_network_is_refused(command, monkeypatch, tmp_path, stage, name):
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    code, rows, err = command(stage, *(["--dataset", "nowhere"] if stage is pretrain else ["ckpt.safetensors"]))
    assert code == 2 and rows == [] and err.count("\n") == 1, err
    assert f"(--use_{name.lower()})" in err and f"unset ACCELERATE_USE_{name}" in err
    assert not any(tmp_path.iterdir())


def test_the_launchers_micro_batches_do_not_replace_those_of_the_flag(command, folder, monkeypatch):
    """Accelerate takes its variable before its argument: a run of 6 steps would take 2."""
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "3")
    code, rows, err = command(
        pretrain, "--dataset", folder, *SMALL, "--epochs", 2, "--accumulate", 2, "--eval_every", 0
    )
    assert code == 0 and [row["step"] for row in rows if "loss" in row] == [3, 6], err
    assert "gradient_accumulation_steps 3 has no effect; --accumulate 2 of this command is in force" in err


def test_shares_make_up_the_whole():
    for n in range(1, 9):
        for world in range(1, 6):
            shares = [processes.share(n, rank, world) for rank in range(world)]
            assert len({len(x) for x in shares}) == 1 and torch.cat(shares)[:n].tolist() == list(range(n))


def test_two_processes_are_launched_and_leave_cleanly(folder, tmp_path):
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    environment |= {"ACCELERATE_USE_CPU": "true"}
    launch = ["accelerate", "launch", "--multi_gpu", "--num_processes", "2", str(ROOT / "pretrain.py")]
    flags = ["--dataset", str(folder), *SMALL, "--epochs", "1", "--out", "run"]
    done = subprocess.run([*launch, *flags], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert [json.loads(line) for line in done.stdout.splitlines()] == rows_of(tmp_path / "run")
    assert {p.name for p in (tmp_path / "run").iterdir()} == {".lock", CKPT, ENCODER, LOG}
    assert checkpoint.load(tmp_path / "run" / "ckpt.safetensors")[1]["epoch"] == 1


class Fatal:
    """A worker that reads this is killed at the fourth picture; the others take their time to end."""

    def __call__(self, key):
        if key == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        return torch.ones(3)


def test_a_worker_that_dies_keeps_nobody_waiting(shell, monkeypatch):
    """Workers outlive a SIGTERM by half a minute, for which the interpreter waited at its end."""

    def stage():
        for _ in pictures.loader(Fatal(), ([i] for i in range(9)), 2):
            slow.append(mp.get_context("fork").Process(target=outlive, daemon=True))
            slow[-1].start()

    slow = []
    code, lines, err = shell(stage)
    assert code == 1 and lines == [] and err.count("\n") == 1 and "has died" in err, err
    assert slow and not mp.active_children()


def outlive():
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(60)
