"""What is different where several processes run one program: `accelerate launch` starts them, Accelerate joins them.

Each has its share of a batch, or of a set that is embedded; the numbers are those that one process would come to.
"""

import contextlib
import json
import os
import sys
import warnings
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, InitProcessGroupKwargs
from accelerate.utils import GradientAccumulationPlugin, gather_object
from torch import Tensor
from tqdm import tqdm

from lib.errors import InputError
from lib.log import is_main

PATIENCE = timedelta(hours=3)  # with the first process, which downloads a set, or looks through its pictures, alone
COLLECTIVE = timedelta(minutes=30)  # for all else that processes do together: a longer wait is for one that hangs

# What a launcher may divide a network or its optimizer by. Checkpoints, energies of whole layers and LARS's norms need
# them whole in each process.
DIVISIONS = ("use_fsdp", "use_deepspeed", "use_megatron_lm", "use_parallelism_config")


def start(accumulate: int | None = None, tracker: str = "none", folder: Path | None = None) -> Accelerator:
    """Return an Accelerator for processes that see each other and share a CPU's cores.

    accumulate: micro-batches of a step, where there are steps. tracker: what gets the log's numbers, and may write to
    the folder. InputError if the launcher's processes do not see each other (each would write), if it divides a network
    among them, or if the device lacks its precision.
    """
    for flag in DIVISIONS:
        name = f"ACCELERATE_{flag.upper()}"
        if os.environ.get(name, "").lower() not in ("", "0", "false"):
            why = f"--{flag} divides the network or its optimizer, which each process needs whole here"
            raise InputError(f"accelerate launch: {why}; take plain data parallelism (--multi_gpu), and unset {name}")
    # All processes compute the same buffers, see `norms`, and gradients lie in DDP's buckets, not beside them.
    # Accelerate does not have the name that new versions of torch want.
    warnings.filterwarnings("ignore", "`broadcast_buffers` is deprecated", FutureWarning)
    ddp = DistributedDataParallelKwargs(broadcast_buffers=False, gradient_as_bucket_view=True)
    handlers = [InitProcessGroupKwargs(timeout=COLLECTIVE), ddp]
    micro_batches = GradientAccumulationPlugin(num_steps=accumulate or 1)  # a number would give way to the launcher's
    options = {"log_with": None if tracker == "none" else tracker, "project_dir": folder}
    try:
        accelerator = Accelerator(kwargs_handlers=handlers, gradient_accumulation_plugin=micro_batches, **options)
    except (ValueError, ImportError) as e:  # a precision that the device, or what is installed, does not have
        raise InputError(f"accelerate launch: {e}") from e
    torch.set_float32_matmul_precision("highest")  # fp32 in linear layers; with --dynamo_backend Accelerate sets TF32
    _refuse_launch(accelerator)
    # The launcher gives each process on a CPU one thread, unless it is told not to: nearly all cores would idle.
    is_launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if is_launched and accelerator.device.type == "cpu":
        torch.set_num_threads(cores())
    return accelerator


def _refuse_launch(accelerator: Accelerator) -> None:
    """Raise InputError for a precision not trained in here, and for processes that Accelerate does not join."""
    precision, device = accelerator.mixed_precision, accelerator.device.type
    known = ("no", "bf16") if device == "cpu" else ("no", "bf16", "fp16")  # on a CPU Accelerate takes fp16 for fp32
    if precision not in known:
        raise InputError(f"accelerate launch: --mixed_precision {precision}: on {device} take {' or '.join(known)}")
    for name, number in (("WORLD_SIZE", accelerator.num_processes), ("RANK", accelerator.process_index)):
        if os.environ.get(name, str(number)) != str(number):
            several = "start several by a launcher, on a machine without a GPU with ACCELERATE_USE_CPU=true"
            raise InputError(f"{name} is {os.environ[name]}, but Accelerate sees {number}; {several}")


@contextlib.contextmanager
def first_alone(accelerator: Accelerator) -> Iterator[None]:
    """Let the first process do what is in the block, for as long as PATIENCE lasts, before the others do it.

    All come together, so that one that has ended is missed after COLLECTIVE, not after PATIENCE. All leave together: in
    what follows, the one that was done first would wait for the others with less patience.
    """
    if accelerator.num_processes == 1:
        yield
        return
    wait_for_all(accelerator)
    group = dist.new_group(backend="gloo", timeout=PATIENCE)  # of its own: the timeout of a group is one for all
    if not is_main():
        dist.barrier(group)
    yield
    if is_main():
        dist.barrier(group)
    dist.barrier(group)


def wait_for_all(accelerator: Accelerator) -> None:
    """Wait until all are here. Accelerate's own wait wants a GPU for each process, also where they use the CPU."""
    if are_several():
        on_gpu = accelerator.device.type == "cuda"
        dist.barrier(device_ids=[accelerator.device.index] if on_gpu else None)


def say(text: str) -> None:
    """Print a text on standard error, once for all processes, on a line of its own if a bar is shown."""
    if is_main():
        tqdm.write(text, file=sys.stderr)


def end() -> None:
    """Have GPUs send what other processes still wait for, before this one ends; after gloo's clean-up some abort."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def cores() -> int:
    """Return this process's share of the processor cores of its machine."""
    is_told = hasattr(os, "sched_getaffinity")  # not on macOS
    available = len(os.sched_getaffinity(0)) if is_told else os.cpu_count() or 1
    return max(1, available // processes_here())


def hardware(accelerator: Accelerator) -> dict:
    """Describe what computes, as the first row of a log does.

    processor is the GPU, or the vector instructions of a CPU: another one rounds in other places.
    """
    device, precision = accelerator.device.type, accelerator.mixed_precision
    processor = torch.cuda.get_device_name() if device == "cuda" else torch.backends.cpu.get_cpu_capability()
    row = {"device": device, "precision": precision, "processes": accelerator.num_processes}
    return {**row, "threads": torch.get_num_threads(), "processor": processor}


def processes_here() -> int:
    """Return how many processes of this program run on its machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def agree(**facts) -> None:
    """Raise InputError unless these facts are the same in all of several processes, as where they share their files."""
    gathered = gather_object([json.dumps(facts)])
    first, *others = map(json.loads, gathered)
    for rank, theirs in enumerate(others, 1):
        for name, value in first.items():
            if theirs[name] != value:
                differs = f"process {rank} has {name} {theirs[name]} (process 0: {value})"
                raise InputError(f"{differs}; give all processes the same flags and files")


def own_share(split):
    """Return this process's `share` of a Split of n images; the first n rows of what is gathered are the whole."""
    if not are_several():
        return split
    rows = torch.arange(len(split.labels), device=split.labels.device)
    return split.rows(my_rows(rows))


def own_part(split):
    """Return this process's part of a Split. Unlike shares, parts have no image in common, so the last may be empty."""
    if not are_several():
        return split
    rows = torch.arange(len(split.labels), device=split.labels.device)
    parts = rows.tensor_split(dist.get_world_size())
    return split.rows(parts[dist.get_rank()])


def share(n: int, rank: int, world: int) -> Tensor:
    """Return which of n rows are those of process `rank` of `world`: equally many for each, one after the other.

    Those beyond n are the first again, so the first n rows of what is gathered are the whole.
    """
    per_process = -(-n // world)  # rounded up
    first = rank * per_process
    return torch.arange(first, first + per_process) % n


def my_rows(x: Tensor) -> Tensor:
    """Return this process's `share` of the n rows of x; `gather(y)[:n]` is the whole of what is made of them, y."""
    if are_several():
        rows = share(len(x), dist.get_rank(), dist.get_world_size())
        return x[rows.to(x.device)]
    return x


def gather(x: Tensor) -> Tensor:
    """Return the rows of all processes, with gradient: Eq. 1 and Eq. 2 speak of the whole batch."""
    if are_several():
        return _Gather.apply(x)
    return x


def are_several() -> bool:
    """Say whether more than one process runs this program."""
    return dist.is_initialized() and dist.get_world_size() > 1


class _Gather(torch.autograd.Function):
    """all_gather of rows. Its backward sums over processes, so that DDP's mean is the gradient of one large batch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        grad = grad.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(grad)
        return grad.chunk(dist.get_world_size())[dist.get_rank()]
