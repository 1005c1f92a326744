"""Two processes compute what one does."""

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from pretrain import gather
from regularizers import uniformity


def share(rank, rendezvous, x, gradients):
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=2)
    mine = x.chunk(2)[rank].clone().requires_grad_()
    value = uniformity(gather(mine))
    value.backward()
    gradients[rank, :-1], gradients[rank, -1] = mine.grad, value.detach()
    dist.destroy_process_group()


def test_uniformity_over_processes_is_that_of_the_whole_batch(tmp_path):
    """The mean over processes that DDP takes of parameters' gradients is the gradient of the large batch."""
    x = torch.randn(12, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    gradients = torch.zeros(2, 7, 5, dtype=torch.float64).share_memory_()
    mp.spawn(share, (tmp_path / "rendezvous", x, gradients), nprocs=2)
    whole = x.clone().requires_grad_()
    value = uniformity(whole)
    value.backward()
    torch.testing.assert_close(gradients[:, :-1].flatten(0, 1) / 2, whole.grad)
    torch.testing.assert_close(gradients[:, -1], value.detach().expand(2, 5))
