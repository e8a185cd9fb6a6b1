"""Count the PyTorch operations of a call without the device that would run it: their number, the
bytes that they read and write, their floating-point operations, copies and waits for the device.

    with on_pretended_gpu() as device, Counting() as counted:
        model(torch.rand(128, 784, device=device), T=20)
    print(len(counted.operations), counted.bytes)

`on_pretended_gpu` creates fake tensors, without values, on a CUDA device that need not exist.
Shapes, layouts and devices are those of the real device, and code that mixes devices or dtypes
fails as it would there. `moved` moves a model to it. A backward pass needs a real device; on the
`meta` device, whose layouts are those of no backend, it can be counted."""

import contextlib
import math
from typing import NamedTuple

import torch
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
COPIES = {aten.clone.default, aten.copy_.default, aten._to_copy.default, aten.contiguous.default}
# operations that return a value, or a shape that depends on values, to the host
READS = {
    aten._local_scalar_dense.default,
    aten.nonzero.default,
    aten.masked_select.default,
    aten._unique2.default,
    aten.equal.default,
}


class Operation(NamedTuple):
    """One PyTorch operation.

    name: of the operation; bytes: of its inputs and outputs, each counted once; flops: of a product
    or convolution, otherwise 0; copies: whether it only copies; waits: whether the host waits for
    the device; relaid: whether an input is channels_last and an output is not."""

    name: str
    bytes: int
    flops: int
    copies: bool
    waits: bool
    relaid: bool


@contextlib.contextmanager
def on_pretended_gpu(index=1):
    """Yield a fake CUDA device; within the block new tensors on it have no values, see above.

    index: of the device. It is not the current device, so that code that forgets to name the device
    fails."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        yield torch.device("cuda", index)


def moved(model, device):
    """The model, with new parameters and buffers of the same shapes and layouts on the device
    (uninitialised; without values on a fake device)."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        for name, p in module._parameters.items():
            if p is not None:
                like = torch.empty_strided(p.size(), p.stride(), dtype=p.dtype, device=device)
                module._parameters[name] = torch.nn.Parameter(like)
    return model


class Counting(TorchDispatchMode):
    """Record every operation within the block in `operations`, except views.

    read: the value that the host gets when it reads a tensor without values."""

    def __init__(self, read=1):
        super().__init__()
        self.operations, self.read = [], read

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and hasattr(args[0], "fake_mode"):
            self.operations.append(
                Operation("_local_scalar_dense", 0, 0, False, args[0].device.type != "cpu", False)
            )
            return type(self.read)(self.read)
        out = func(*args, **kwargs)
        if not _is_view(func):
            self.operations.append(_operation(func, args, kwargs, out))
        return out

    @property
    def bytes(self):
        """Bytes read and written by all operations."""
        return sum(operation.bytes for operation in self.operations)

    @property
    def flops(self):
        """Floating-point operations of all products and convolutions."""
        return sum(operation.flops for operation in self.operations)

    def names(self, which):
        """The names of the operations for which `which(operation)` is true."""
        return [operation.name for operation in self.operations if which(operation)]


def _is_view(func):
    """Whether an operation only returns a view of memory or metadata."""
    returns = func._schema.returns
    if not returns or func.namespace == "prim":
        return not func._schema.is_mutable
    aliases = [r.alias_info for r in returns]
    return all(a is not None and not a.is_write for a in aliases) or func in {
        aten._unsafe_view.default,
        aten.detach.default,
        aten.lift_fresh.default,
        aten.empty.memory_format,
        aten.empty_strided.default,
        aten.new_empty.default,
        aten.new_empty_strided.default,
        aten.empty_like.default,
    }


def _operation(func, args, kwargs, out):
    inputs = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    outputs = [t for t in tree_leaves(out) if isinstance(t, torch.Tensor)]
    devices = {t.device.type for t in (*inputs, *outputs)}
    crosses = (
        func in COPIES
        and len(devices) > 1
        and not (
            kwargs.get("non_blocking") or func is aten.copy_.default and len(args) > 2 and args[2]
        )
    )
    by_mask = any(
        isinstance(t, torch.Tensor) and t.dtype == torch.bool for t in _indices(func, args)
    )
    waits = crosses or (func in READS or by_mask) and devices != {"cpu"}
    flops = 0
    if func.overloadpacket in flop_registry:
        flops = int(flop_registry[func.overloadpacket](*args, **kwargs, out_val=out))
    relaid = any(map(_channels_last, inputs)) and any(
        t.dim() == 4 and not _channels_last(t, True) for t in outputs
    )
    return Operation(
        str(func.overloadpacket).removeprefix("aten."),
        sum(map(_footprint, (*inputs, *outputs))),
        flops,
        func in COPIES,
        waits,
        relaid,
    )


def _indices(func, args):
    packet = func.overloadpacket
    return (
        args[1]
        if packet in (aten.index, aten.index_put, aten.index_put_, aten._index_put_impl_)
        else ()
    )


def _channels_last(t, or_both=False):
    """Whether a 4-D tensor is channels_last, and not contiguous as well (or_both: or also
    contiguous)."""
    return (
        t.dim() == 4
        and t.is_contiguous(memory_format=torch.channels_last)
        and (or_both or not t.is_contiguous())
    )


def _footprint(t):
    """Bytes of memory that a tensor occupies; entries repeated by strides of 0 count once."""
    return t.element_size() * math.prod(size for size, stride in zip(t.shape, t.stride()) if stride)
