"""The state of a run: how it is copied and restored, and when it is saved.

A state is a dict of tensors. Names without a slash are the network's; `sums/...`, of the epoch in progress, and the
optimizer's are the run's: `momentum/...` of LARS and SGD; `step/...`, `exp_avg/...`, `exp_avg_sq/...` of AdamW. Random
numbers have no state: what a step draws is a function of the seed and the step.
"""

import re
import time

import torch
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim import Optimizer

from lib.errors import InputError


def captured(network: nn.Module, optimizer: Optimizer, sums: dict[str, Tensor], accelerator: Accelerator) -> dict:
    """Copy a state to the memory of the CPU, where no step changes it: {name: tensor}.

    All processes call this; each has its own sums, in the state (processes,).
    """
    tensors = dict(network.state_dict())
    for name, total in sums.items():
        tensors[f"sums/{name}"] = accelerator.gather(total[None])
    for name, parameter in network.named_parameters():
        for key, x in optimizer.state[parameter].items():
            tensors[f"{key.removesuffix('_buffer')}/{name}"] = x
    return {name: x.detach().to("cpu", copy=True, memory_format=torch.contiguous_format) for name, x in tensors.items()}


def restore(
    tensors: dict[str, Tensor], network: nn.Module, optimizer: Optimizer, accelerator: Accelerator
) -> dict[str, Tensor]:
    """Bring network and optimizer to a state; return the sums of its epoch, their mean if processes came or went."""
    network.load_state_dict({name: x for name, x in tensors.items() if "/" not in name})
    parameters, sums = dict(network.named_parameters()), {}
    for name, x in tensors.items():
        kind, _, of = name.partition("/")
        if kind == "sums":
            has_mine = len(x) == accelerator.num_processes
            total = x[accelerator.process_index] if has_mine else x.mean(0)
            sums[of] = total.to(accelerator.device)
        elif of in parameters:
            key = "momentum_buffer" if kind == "momentum" else kind
            like = parameters[of] if x.ndim else x  # AdamW's step stays on the CPU
            optimizer.state[parameters[of]][key] = torch.empty_like(like).copy_(x)
    return sums


class Schedule:
    """When a run saves: once the interval has passed, or at an epoch's end if it would pass before the next one's.

    So a save is within an epoch only if the epoch is longer than the interval. A new run saves at the end of its first
    epoch in any case, so that a full disk shows early.
    """

    def __init__(self, text: str, step: int, is_new: bool):
        """Begin to count at a step; a run is new if its folder lacks a file. InputError for a --save_every like 500."""
        match = re.fullmatch(r"([1-9][0-9]{0,8})(min|steps)", text)
        if not match:
            raise InputError(f"--save_every {text[:40]}: expected a whole number with its unit, as 10min or 500steps")
        self.unit = match[2]
        self.length = int(match[1]) * (60 if self.unit == "min" else 1)  # seconds or steps
        self.is_new = is_new
        self.saved_at = self.epoch_began = self.now(step)

    def now(self, step: int) -> float:
        """Return the present, in steps or seconds."""
        return step if self.unit == "steps" else time.monotonic()

    def is_due(self, step: int, at_epoch_end: bool = False) -> bool:
        """Whether to save after this step; the next epoch is taken to last as long as this one."""
        now = self.now(step)
        until = now + (now - self.epoch_began if at_epoch_end else 0)
        return until - self.saved_at >= self.length or (at_epoch_end and self.is_new)
