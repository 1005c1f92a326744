"""BatchNorm of a batch of two views, of which each has statistics of its own: over all processes, if there are several.

Several processes talk once in each direction. torch's own SyncBatchNorm takes one view at a time, waits for the device
three times a layer, and needs a GPU. To copy this file, torch is all you need.
"""

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import batch_norm
from torch.nn.modules.batchnorm import _BatchNorm

_backward = torch.ops.aten.native_batch_norm_backward.default


def normalise_views(x: Tensor, norm: _BatchNorm) -> Tensor:
    """Normalise the halves of x (2b, c, ...) by the statistics of each, and update the running ones of a BatchNorm.

    The running statistics see one view after the other; num_batches_tracked stays. Statistics are in fp32 or better.
    ValueError if a view has a single value a channel.
    """
    world = dist.get_world_size() if dist.is_initialized() else 1
    count = world * x.numel() // x.shape[1] // 2
    if count == 1:
        raise ValueError(f"BatchNorm needs more than one value a channel and view, got {tuple(x.shape)} of two views")
    arguments = (norm.weight, norm.bias, norm.running_mean, norm.running_var, norm.momentum, norm.eps)
    if world > 1:
        return _AllProcesses.apply(x, *arguments, count)
    if torch.compiler.is_compiling():  # Inductor refuses out= into a part of a tensor
        weight, bias, mean, var, momentum, eps = arguments
        return torch.cat([batch_norm(view, mean, var, weight, bias, True, momentum, eps) for view in x.chunk(2)])
    return _OneProcess.apply(x, *arguments)


def count_batches(network: nn.Module) -> None:
    """Count a batch of each view in the num_batches_tracked of all BatchNorms, at once: nothing here reads it."""
    counters = [module.num_batches_tracked for module in network.modules() if isinstance(module, _BatchNorm)]
    if counters:
        torch._foreach_add_(counters, 2)


class _OneProcess(torch.autograd.Function):
    """torch's native_batch_norm of each view, on CUDA in place of cuDNN's, written into one tensor.

    A GPU waits for the processor to launch the operations of some forty of these layers: so there are no loops over the
    views, no sums that begin with a zero, and no name that is looked up in each call.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum: float, eps: float) -> Tensor:
        y = torch.empty_like(x)
        mean1, inverse_std1, mean2, inverse_std2 = running_mean.new_empty(4, len(running_mean)).unbind()
        (x1, x2), (y1, y2) = x.chunk(2), y.chunk(2)
        norm = weight, bias, running_mean, running_var, True, momentum, eps
        torch.native_batch_norm(x1, *norm, out=(y1, mean1, inverse_std1))
        torch.native_batch_norm(x2, *norm, out=(y2, mean2, inverse_std2))
        ctx.save_for_backward(x, weight, mean1, inverse_std1, mean2, inverse_std2)
        ctx.eps = eps
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean1, inverse_std1, mean2, inverse_std2 = ctx.saved_tensors
        (x1, x2), (grad1, grad2) = x.chunk(2), grad.chunk(2)
        needs = ctx.needs_input_grad[:3]
        of_x1, of_weight1, of_bias1 = _backward(
            grad1, x1, weight, None, None, mean1, inverse_std1, True, ctx.eps, needs
        )
        of_x2, of_weight2, of_bias2 = _backward(
            grad2, x2, weight, None, None, mean2, inverse_std2, True, ctx.eps, needs
        )
        grad_x = torch.cat([of_x1, of_x2]) if needs[0] else None
        grad_weight = of_weight1 + of_weight2 if needs[1] else None
        grad_bias = of_bias1 + of_bias2 if needs[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None


class _AllProcesses(torch.autograd.Function):
    """BatchNorm of each view by the mean and variance of all processes, which have equally many images.

    Sums over processes are in float64: a variance is the mean of squares less the squared mean. Gradients of weight and
    bias are of this process's images; DDP takes their mean. count: values of a view a channel, in all processes.
    """

    @staticmethod
    def forward(ctx, x, weight, bias, running_mean, running_var, momentum: float, eps: float, count: int) -> Tensor:
        world = dist.get_world_size()
        unused = torch.zeros_like(running_mean), torch.zeros_like(running_var)  # their dtype is that of the results
        of_views = [torch.batch_norm_update_stats(view, *unused, momentum) for view in x.chunk(2)]
        mean, var = (torch.stack(rows).double() for rows in zip(*of_views))  # (2, c)
        moments = torch.stack([mean, var + mean.square()])
        dist.all_reduce(moments)
        mean, mean_square = moments / world
        var = (mean_square - mean.square()).clamp(min=0)
        mean, var = mean.to(running_mean.dtype), var.to(running_var.dtype)

        y = torch.empty_like(x)
        nothing = mean.new_empty(0), var.new_empty(0)  # what it would return of a view in training
        for view, out, view_mean, view_var in zip(x.chunk(2), y.chunk(2), mean, var):
            running_mean.lerp_(view_mean, momentum)
            running_var.lerp_(view_var * (count / (count - 1)), momentum)
            norm = weight, bias, view_mean, view_var, False, 0.0, eps
            torch.native_batch_norm(view, *norm, out=(out, *nothing))
        ctx.save_for_backward(x, weight, mean, var)
        ctx.eps, ctx.count = eps, count
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, var = ctx.saved_tensors
        scale = torch.ones_like(mean[0]) if weight is None else weight
        inverse_std = (var + ctx.eps).rsqrt()
        of_views = []
        for view, grad_view, *statistics in zip(x.chunk(2), grad.chunk(2), mean, var, mean, inverse_std):
            # The CPU takes mean and var, CUDA mean and inverse_std.
            of_views.append(_backward(grad_view, view, scale, *statistics, False, ctx.eps, [True, True, True]))
        of_x, of_weight, of_bias = zip(*of_views)  # as if the statistics did not depend on x
        sums = torch.stack([*of_weight, *of_bias]).double()  # (4, c)
        dist.all_reduce(sums)
        mean_of_weight, mean_of_bias = (sums / ctx.count).to(mean.dtype).chunk(2)  # (2, c) each

        # What the statistics add: -scale / std (mean_of_bias + (x - mean) / std mean_of_weight), linear in x.
        slope = -scale * inverse_std.square() * mean_of_weight
        offset = -scale * inverse_std * mean_of_bias - slope * mean
        grad_x = torch.empty_like(x)
        of_channels = (-1, *[1] * (x.ndim - 2))  # the shape in which they meet the channels of x
        for view, out, direct, a, b in zip(x.chunk(2), grad_x.chunk(2), of_x, slope, offset):
            of_statistics = torch.addcmul(b.view(of_channels), view, a.view(of_channels))
            torch.add(direct, of_statistics, out=out)
        wanted = ctx.needs_input_grad
        grad_weight = sum(of_weight) if wanted[1] else None
        grad_bias = sum(of_bias) if wanted[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None
