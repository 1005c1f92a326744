"""What is different where several processes run one program: `accelerate launch` starts them, Accelerate joins them.

Each has its share of a batch, or of a set that is embedded; the numbers are those that one process would come to.
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta

import torch
import torch.distributed as dist
from accelerate import Accelerator, InitProcessGroupKwargs
from accelerate.utils import gather_object
from torch import Tensor, nn

PATIENCE = timedelta(hours=3)  # for the first process, which downloads a set, or looks through its pictures, alone


class LaunchError(ValueError):
    """Processes that do not make one program."""


def start(**how) -> Accelerator:
    """An Accelerator, of which `how` are arguments, for processes that see each other and share the cores of a CPU.

    LaunchError for a launcher whose processes do not, each would take itself for the one that writes, and for a
    precision that there is not.
    """
    try:
        accelerator = Accelerator(kwargs_handlers=[InitProcessGroupKwargs(timeout=PATIENCE)], **how)
    except (ValueError, ImportError) as e:  # a precision that the device, or what is installed, does not have
        raise LaunchError(f"accelerate launch: {e}") from e
    if accelerator.mixed_precision not in ("no", "bf16", "fp16"):
        raise LaunchError(f"accelerate launch: --mixed_precision {accelerator.mixed_precision}: take no, bf16 or fp16")
    if accelerator.mixed_precision == "fp16" and accelerator.device.type == "cpu":  # Accelerate would take fp32
        raise LaunchError("accelerate launch: --mixed_precision fp16 wants a GPU; on a CPU take bf16 or no")
    for name, seen in {"WORLD_SIZE": accelerator.num_processes, "RANK": accelerator.process_index}.items():
        if (said := os.environ.get(name, str(seen))) != str(seen):
            raise LaunchError(
                f"{name} is {said}, but Accelerate sees {seen} (of {accelerator.num_processes} process); start several "
                "by a launcher, on a machine without a GPU with ACCELERATE_USE_CPU=true"
            )
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ and os.environ.get("OMP_NUM_THREADS") == "1"
    if accelerator.device.type == "cpu" and launched:  # the launcher gives each one thread unless told not to
        torch.set_num_threads(cores())
    return accelerator


def is_main() -> bool:
    """Whether this is the one process, or the first of several, which alone prints and writes."""
    return os.environ.get("RANK", "0") == "0"


def say(text: str) -> None:
    """Tell it on standard error, once."""
    if is_main():
        print(text, file=sys.stderr)


def end() -> None:
    """Have GPUs send what other processes still wait for. gloo sends at once, and some processes abort at its end."""
    if dist.is_initialized() and dist.get_backend() == "nccl":
        dist.destroy_process_group()


def cores() -> int:
    """This process's share of the processor cores of its machine."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, own // int(os.environ.get("LOCAL_WORLD_SIZE", 1)))


def agree(accelerator: Accelerator, **facts) -> None:
    """LaunchError unless these are the same to all processes, as they are on machines that share their files."""
    told = gather_object([json.dumps(facts)]) if accelerator.num_processes > 1 else []
    first, *others = map(json.loads, told or ["{}"])
    for rank, own in enumerate(others, 1):
        if odd := [f"{name} {own[name]} (process 0: {x})" for name, x in first.items() if own[name] != x]:
            raise LaunchError(f"process {rank} has {', '.join(odd)}; give all the same flags and the same files")


def same_buffers(network: nn.Module, accelerator: Accelerator) -> None:
    """Give all processes the first one's buffers, which a checkpoint holds: on a CPU BatchNorm's are of each alone."""
    if accelerator.num_processes > 1:
        for buffer in network.buffers():
            dist.broadcast(buffer, 0)


def in_shares(embed: Callable, split, accelerator: Accelerator) -> Tensor:
    """`embed` of a data.Split, features (n, d), of which each process makes its share and gets all."""
    n, world = len(split.labels), accelerator.num_processes
    if world == 1:
        return embed(split)
    mine = share(n, accelerator.process_index, world).to(split.labels.device)
    return accelerator.gather(embed(split.rows(mine)))[:n]


def share(n: int, rank: int, world: int) -> Tensor:
    """Which of n rows are a process's. All have equally many, one after the other; those beyond n are the first again.

    So the first n rows of what is gathered are the whole.
    """
    each = -(-n // world)
    return torch.arange(rank * each, (rank + 1) * each) % n


def gather(x: Tensor) -> Tensor:
    """The rows of all processes, with gradient: Eq. 1 and Eq. 2 speak of the whole batch."""
    return _Gather.apply(x) if dist.is_initialized() and dist.get_world_size() > 1 else x


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
