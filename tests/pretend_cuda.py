"""Run code on tensors that say they are on a CUDA device, on a machine that has none.

    with PretendCuda() as seen:
        x = torch.rand(8, 3, device="cuda:0")  # computed on the CPU; x.device is cuda:0
        loss = (x @ x.T).sum()
        loss.item()
    seen.waits      # where the host would have waited for the device: {"_local_scalar_dense at test.py:4": 1}
    seen.launches   # the operations that would have been launched, views aside: {"rand": 1, "mm": 1, "sum": 1}

An operation on tensors of both devices raises RuntimeError, as on CUDA, and so does the backward of BatchNorm without
the statistics that CUDA's wants. The values are those of the CPU; times mean nothing. Not seen here: CUDA's own
kernels, memory, streams, NCCL, and the casts of autocast. An operation of the "foreach" family counts as one launch;
CUDA makes a few of it.
"""

import collections
import traceback

import pytest
import torch
from torch.optim import optimizer
from torch.utils import _foreach_utils
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map

CUDA = torch.device("cuda", 0)
aten = torch.ops.aten
FREE = (aten.detach, aten.alias, aten._unsafe_view, aten.empty, aten.empty_like, aten.new_empty)  # no kernel
READS = (  # the host reads a number, or the size of a result depends on one
    *(aten._local_scalar_dense, aten.is_nonzero, aten.equal, aten.nonzero, aten.masked_select),
    *(aten.unique_dim, aten._unique2, aten.bincount),
)
INDEXING = (aten.index, aten.index_put_, aten._index_put_impl_)
TAKE_BOTH = (*INDEXING, aten.index_put, aten._to_copy, aten.copy_, aten.set_, aten.lift_fresh)  # devices, as on CUDA


class OnCuda(torch.Tensor):
    """A tensor whose numbers lie in `inner`, on the CPU. To torch's C++ code it is on the CPU, too."""

    @staticmethod
    def __new__(cls, inner):
        layout = {"strides": inner.stride(), "storage_offset": inner.storage_offset(), "layout": inner.layout}
        return torch.Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device, **layout)

    def __init__(self, inner):
        self.inner = inner

    device = property(lambda self: CUDA)
    is_cuda = property(lambda self: True)
    is_cpu = property(lambda self: False)

    def to(self, *args, copy=False, **kwargs):  # what crosses over is copied in any case
        if args and isinstance(args[0], torch.Tensor):
            args = (args[0].device, args[0].dtype, *args[1:])
        device, dtype, non_blocking, layout = torch._C._nn._parse_to(*args, **kwargs)
        x = self if dtype is None else super().to(dtype=dtype)
        x = x if layout is None else torch.Tensor.contiguous(x, memory_format=layout)
        return x.cpu(non_blocking) if device is not None and device.type == "cpu" else x

    def cpu(self, non_blocking=False):
        if not non_blocking:
            PretendCuda.active.note_wait("copy to the CPU")
        return _ToCpu.apply(self)

    def tolist(self):
        return self.cpu().tolist()

    def __repr__(self):
        return f"OnCuda({self.inner})"

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: a tensor of PretendCuda, used outside of its block")


class _ToCpu(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.inner.clone()

    @staticmethod
    def backward(ctx, grad):
        return OnCuda(grad)


class PretendCuda(TorchDispatchMode):
    """The mode in which tensors can be on cuda:0; it counts waits and launches."""

    active = None

    def __init__(self):
        super().__init__()
        self.waits = collections.Counter()
        self.launches = collections.Counter()

    def note_wait(self, why):
        self.waits[f"{why} at {line_of_code()}"] += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_flatten((args, kwargs))[0] if isinstance(x, torch.Tensor)]
        on_cuda = [x for x in tensors if isinstance(x, OnCuda)]
        wanted = kwargs.get("device")
        if wanted is None and not on_cuda:
            return func(*args, **kwargs)
        makes_cuda = wanted is None or torch.device(wanted).type == "cuda"
        self._refuse_both_devices(func, tensors, on_cuda)
        if on_cuda and func.overloadpacket is aten.native_batch_norm_backward and None in args[5:7]:
            raise RuntimeError("save_mean should always be defined")  # as CUDA says; the CPU takes None
        self._count_waits(func.overloadpacket, tensors, on_cuda, makes_cuda, args, kwargs)
        if not func.is_view and func.overloadpacket not in FREE:
            self.launches[func.overloadpacket.__name__] += 1
        if wanted is not None:
            kwargs["device"] = torch.device("cpu")
        inner_args, inner_kwargs = tree_map(lambda x: x.inner if isinstance(x, OnCuda) else x, (args, kwargs))
        out = func(*inner_args, **inner_kwargs)
        if not makes_cuda:
            return out
        wrapped = tree_map(lambda x: OnCuda(x) if isinstance(x, torch.Tensor) else x, out)
        if on_cuda and wanted is None:
            return return_and_correct_aliasing(func, args, kwargs, wrapped)
        return wrapped

    def _refuse_both_devices(self, func, tensors, on_cuda):
        on_cpu = [x for x in tensors if not isinstance(x, OnCuda) and x.ndim > 0]
        if on_cuda and on_cpu and func.overloadpacket not in TAKE_BOTH:
            raise RuntimeError(f"{func} at {line_of_code()}: tensors on cuda:0 and on the cpu")

    def _count_waits(self, operation, tensors, on_cuda, makes_cuda, args, kwargs):
        if on_cuda and operation in READS:
            self.note_wait(operation.__name__)
        is_blocking = not kwargs.get("non_blocking")
        if operation is aten._to_copy and makes_cuda and not on_cuda and is_blocking and tensors[0].ndim > 0:
            self.note_wait("copy to CUDA")
        if operation is aten.copy_ and on_cuda and len(on_cuda) < len(tensors) and is_blocking and not args[2:]:
            self.note_wait("copy between devices")
        if operation in INDEXING and on_cuda:
            for index in tree_flatten(args[1])[0]:
                is_mask = isinstance(index, torch.Tensor) and index.dtype == torch.bool
                is_on_cpu = isinstance(index, torch.Tensor) and not isinstance(index, OnCuda)
                if is_mask or is_on_cpu:
                    self.note_wait("index that is a mask" if is_mask else "index on the CPU")

    def __enter__(self):
        PretendCuda.active = self
        self._patch = pytest.MonkeyPatch()
        self._patch.setattr(torch.cuda, "_lazy_init", lambda: None)  # there is no driver to wake
        for module in (optimizer, _foreach_utils):  # as on CUDA, many tensors in one call
            self._patch.setattr(module, "_foreach_supported_types", [*module._foreach_supported_types, OnCuda])
        self._overwrites = torch.__future__.get_overwrite_module_params_on_conversion()
        torch.__future__.set_overwrite_module_params_on_conversion(True)  # module.to("cuda:0") makes new parameters
        return super().__enter__()

    def __exit__(self, *error):
        PretendCuda.active = None
        self._patch.undo()
        torch.__future__.set_overwrite_module_params_on_conversion(self._overwrites)
        return super().__exit__(*error)


def line_of_code():
    """Return the line of the code under test that an operation came from."""
    for frame in reversed(traceback.extract_stack()):
        is_ours = "/site-packages/" not in frame.filename and "/lib/python" not in frame.filename
        if is_ours and frame.filename != __file__:
            return f"{frame.filename.rsplit('/', 1)[-1]}:{frame.lineno}"
    return "?"
