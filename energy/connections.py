"""The connection between two layers: how it drives up, how it drives down, and how it learns.

The term of a connection in Phi is s_post . up(s_pre), with up(s) = pool(conv(s)) or W s + b. It
determines everything else: the drive on s_post is up(s_pre), the drive on s_pre is the adjoint of
up applied to s_post, and a weight learns from d[s_post . up(s_pre)]/dW.
"""

import dataclasses
import types
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

from energy.activations import Activation, affine
from energy.poolings import NoPool, Pooling

if TYPE_CHECKING:
    from typing_extensions import Self

Shape = tuple[int, ...]
Slopes = Callable[[Activation], Activation]


class Synapse(Protocol):
    """What holds a weight and a bias: an nn.Linear or nn.Conv2d."""

    @property
    def weight(self) -> Tensor: ...

    @property
    def bias(self) -> Tensor | None: ...


def _dot(a: Tensor, b: Tensor) -> Tensor:
    """The scalar product of each sample, (mbs,)."""
    return (a.flatten(1) * b.flatten(1)).sum(1)


def take_samples(tensor: Tensor, chosen: Tensor) -> Tensor:
    """Some samples of a tensor by their indices, in its memory layout."""
    if tensor.dim() != 4:
        return tensor[chosen]
    return tensor.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Connection:
    """The connection from a layer s_pre, (mbs, *pre_shape), to s_post above, (mbs, *post_shape).

    synapse   the module with the weight and bias, looked up at every use, so that
              `torch.func.functional_call` has its effect
    feedback  the module with untied feedback weights (vector-field models), or None: the
              top-down drive uses the forward weights
    mask      dropout mask: None, or (mbs, *pre_shape). It multiplies s_pre in the bottom-up drive,
              and the top-down drive on s_pre. Entries are 0 or 1 / (probability of keeping a
              neuron), so that both drives keep their mean
    routed    whether the top-down drive depends on s_pre, through the winners of a max-pooling

    Subclasses define up, down and learning without a mask: `_up`, `_down`, `_learn`.
    """

    synapse: Any  # a Synapse; nn.Module for functional_call
    pre_shape: Shape
    feedback: Any = None
    mask: Tensor | None = None

    routed = False

    @property
    def post_shape(self) -> Shape:
        """Shape of one sample of s_post."""
        raise NotImplementedError

    def dropped(self, pre: Tensor) -> Tensor:
        """s_pre, or a drive on it, after dropout: (mbs, *pre_shape)."""
        # an image enters a dense layer unflattened
        return pre if self.mask is None else self.mask.view_as(pre) * pre

    def up(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        """(bottom-up drive on s_post, route that `down` needs: None unless `routed`) of s_pre."""
        return self._up(self.dropped(pre))

    def route(self, pre: Tensor) -> Tensor | None:
        """The route alone (None unless `routed`); no gradient goes through it."""
        if not self.routed:
            return None
        with torch.no_grad():
            return self.up(pre)[1]

    def down(self, post: Tensor, route: Tensor | None, drive: Tensor) -> Tensor:
        """`drive` plus the top-down drive of s_post on s_pre, (mbs, *pre_shape)."""
        own = self._down(post, route).view_as(drive)  # (mbs, *pre_shape)
        if self.mask is not None:
            own = self.dropped(own)
        return own + drive if torch.is_grad_enabled() else own.add_(drive)

    def learn(self, pre: Tensor, post: Tensor) -> list[Tensor]:
        """[d/d weight, d/d bias] of s_post . up(s_pre), summed over the batch."""
        return self._learn(self.dropped(pre), post, self.synapse)

    def learn_feedback(self, pre: Tensor, post: Tensor) -> list[Tensor]:
        """[d/d weight] for the untied feedback weight, in the shape of the forward one."""
        return self._learn(self.dropped(pre), post, self.feedback)

    def with_slopes(self, slopes: Slopes) -> "Connection":
        """The connection with other backward slopes of the activations within it. slopes: takes an
        activation and gives one of the same values."""
        return self

    def down_weight(self) -> Tensor:
        """The weight of the top-down drive, in the shape of the forward one."""
        return (self.synapse if self.feedback is None else self.feedback).weight

    def set_feedback_grad(self, grad: Tensor) -> None:
        """Write a gradient, shaped as `learn_feedback` returns it, to the feedback weight's
        .grad."""
        set_grad(self.feedback.weight, grad)

    def term(self, pre: Tensor, post: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """s_post . up(s_pre) of each sample, (mbs,), with the given weights: for Phi.
        Differentiable."""
        raise NotImplementedError

    def terms(self, pre: Tensor, post: Tensor) -> list[Tensor]:
        """[term of the forward weights, then that of untied feedback weights if there are any]."""
        pre = self.dropped(pre)
        terms = [self.term(pre, post, self.synapse.weight, self.synapse.bias)]
        if self.feedback is not None:
            terms.append(self.term(pre, post, self.down_weight()))
        return terms

    def scaled(self, gain: float, offset: Tensor) -> "Self":
        """The connection whose drives are gain * up(s) + offset and gain * down(s). gain: above 0;
        offset: a scalar tensor."""
        bias = affine(self.synapse.bias, gain, offset)
        synapse = types.SimpleNamespace(weight=gain * self.synapse.weight, bias=bias)
        feedback = self.feedback and types.SimpleNamespace(weight=gain * self.feedback.weight)
        return dataclasses.replace(self, synapse=synapse, feedback=feedback)

    def take(self, chosen: Tensor) -> "Self":
        """The connection for some samples of the mini-batch, by their indices."""
        if self.mask is None:
            return self
        return dataclasses.replace(self, mask=take_samples(self.mask, chosen))

    def bias_drive(self, mbs: int) -> Tensor:
        """The drive of zero neurons on s_post, (mbs, *post_shape)."""
        raise NotImplementedError

    def _up(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        raise NotImplementedError

    def _down(self, post: Tensor, route: Tensor | None) -> Tensor:
        raise NotImplementedError

    def _learn(self, pre: Tensor, post: Tensor, synapse: Synapse) -> list[Tensor]:
        raise NotImplementedError


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Connection):
    """up(s) = W s + b, with the layer below flattened. transposed: whether the feedback weight has
    the shape (pre, post)."""

    transposed: bool = False

    @property
    def post_shape(self) -> Shape:
        return (self.synapse.weight.size(0),)

    def down_weight(self) -> Tensor:
        if self.transposed and self.feedback is not None:
            return self.feedback.weight.t()
        return super().down_weight()

    def _up(self, pre: Tensor) -> tuple[Tensor, None]:
        return F.linear(pre.flatten(1), self.synapse.weight, self.synapse.bias), None  # (mbs, post)

    def _down(self, post: Tensor, route: Tensor | None) -> Tensor:
        return torch.mm(post, self.down_weight())  # (mbs, pre)

    def bias_drive(self, mbs: int) -> Tensor:
        """The drive of zero neurons on s_post, (mbs, post)."""
        return self.synapse.bias.expand(mbs, -1)

    def _learn(self, pre: Tensor, post: Tensor, synapse: Synapse) -> list[Tensor]:
        weight = post.t() @ pre.flatten(1)  # (post, pre)
        return [weight] if synapse.bias is None else [weight, post.sum(0)]

    def set_feedback_grad(self, grad: Tensor) -> None:
        set_grad(self.feedback.weight, grad.t() if self.transposed else grad)

    def term(self, pre: Tensor, post: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _dot(F.linear(pre.flatten(1), weight, bias), post)


class _ConvUp(torch.autograd.Function):
    """pool(conv(pre)) and its route. Saves `pre` and the route for the backward pass, not the map
    between them."""

    @staticmethod
    def forward(
        ctx: Any, pre: Tensor, weight: Tensor, bias: Tensor | None, c: "Convolution"
    ) -> tuple[Tensor, Tensor | None]:
        post, route = c.pool.pool(c.convolve(pre, weight, bias))
        ctx.c = c
        ctx.save_for_backward(pre, weight, route)
        if route is not None:
            ctx.mark_non_differentiable(route)
        return post, route

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor | None, ...]:
        pre, weight, route = ctx.saved_tensors
        needs_pre, needs_weight, needs_bias, _ = ctx.needs_input_grad
        u = ctx.c.pool.adjoint(grad, route, ctx.c.size)  # (mbs, C, H, W)
        return (
            ctx.c.transposed(u, weight) if needs_pre else None,
            ctx.c.weight_grad(pre, u, weight) if needs_weight else None,
            u.sum((0, 2, 3)) if needs_bias else None,
            None,
        )


class _ConvDown(torch.autograd.Function):
    """The adjoint of pool(conv(.)) for a given route, applied to `post`. Saves `post` and the
    route, not the map between them."""

    @staticmethod
    def forward(
        ctx: Any, post: Tensor, weight: Tensor, route: Tensor | None, c: "Convolution"
    ) -> Tensor:
        ctx.c = c
        ctx.save_for_backward(post, weight, route)
        return c.transposed(c.pool.adjoint(post, route, c.size), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        post, weight, route = ctx.saved_tensors
        c = ctx.c
        grad_post = None
        grad_weight = None
        if ctx.needs_input_grad[0]:
            grad_post = c.pool.follow(c.convolve(grad, weight, None), route)  # (mbs, C, h, w)
        if ctx.needs_input_grad[1]:
            grad_weight = c.weight_grad(grad, c.pool.adjoint(post, route, c.size), weight)
        return grad_post, grad_weight, None, None


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution(Connection):
    """up(s) = pool(conv(s)), in channels-last memory.

    With untied feedback weights, the top-down drive follows the max-pooling winners of the feedback
    weights' convolution. Raises ValueError if the map is smaller than the window.

    kernel      side of the window
    size        (H, W) before pooling
    pooled      H and W after it
    unreached   rows and columns that the last window leaves out
    """

    pool: Pooling = dataclasses.field(default_factory=NoPool)
    stride: int = 1
    padding: int = 0
    kernel: int = dataclasses.field(init=False)
    size: tuple[int, int] = dataclasses.field(init=False)
    pooled: int = dataclasses.field(init=False)
    unreached: int = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        kernel = self.synapse.weight.size(2)
        side = self.pre_shape[1]
        slack = side + 2 * self.padding - kernel  # how far the first window can move
        size = slack // self.stride + 1
        pools = not isinstance(self.pool, NoPool)
        pooled = size // 2 if pools else size
        if slack < 0 or pooled < 1:
            raise ValueError(
                f"a {kernel}x{kernel} convolution with stride {self.stride} and "
                f"padding {self.padding}{' and 2x2 pooling' if pools else ''} "
                f"leaves nothing of a {side}x{side} map"
            )
        derived = {
            "kernel": kernel,
            "size": (size, size),
            "pooled": pooled,
            "unreached": slack % self.stride,
            "routed": self.pool.routed,
        }
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen

    @property
    def post_shape(self) -> Shape:
        return (self.synapse.weight.size(0), self.pooled, self.pooled)

    def windowed(self) -> "WindowConvolution":
        """The same connection as a product over windows."""
        given = [field.name for field in dataclasses.fields(self) if field.init]
        return WindowConvolution(**{name: getattr(self, name) for name in given})

    def convolve(self, pre: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """conv(pre), (mbs, C, H, W), computed in the layout of the weights."""
        if weight.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(pre, weight, bias, self.stride, self.padding)
        out = F.conv2d(pre.contiguous(), weight, bias, self.stride, self.padding)
        return out.contiguous(memory_format=torch.channels_last)

    def transposed(self, u: Tensor, weight: Tensor) -> Tensor:
        """The adjoint of the convolution, applied to the map u: (mbs, *pre_shape). Rows that the
        last window did not reach are zero."""
        return F.conv_transpose2d(u, weight, None, self.stride, self.padding, self.unreached)

    def weight_grad(self, pre: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        """d[u . conv(pre)]/d(weight). As torch.nn.grad.conv2d_weight, but given the weight, so that
        the result has its layout."""
        geometry = [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1
        only_weight = [False, True, False]
        return torch.ops.aten.convolution_backward(u, pre, weight, None, *geometry, only_weight)[1]

    def _up(self, pre: Tensor) -> tuple[Tensor, Tensor | None]:
        post, route = _ConvUp.apply(pre, self.synapse.weight, self.synapse.bias, self)
        if self.feedback is not None and self.routed:
            with torch.no_grad():
                route = _ConvUp.apply(pre, self.feedback.weight, None, self)[1]
        return post, route

    def _down(self, post: Tensor, route: Tensor | None) -> Tensor:
        return _ConvDown.apply(post, self.down_weight(), route, self)

    def bias_drive(self, mbs: int) -> Tensor:
        """The drive of zero neurons on s_post, (mbs, *post_shape)."""
        drive = self.synapse.bias.view(1, -1, 1, 1).expand(mbs, *self.post_shape)
        # later operations keep this layout
        return drive.contiguous(memory_format=torch.channels_last)

    def _learn(self, pre: Tensor, post: Tensor, synapse: Synapse) -> list[Tensor]:
        route = _ConvUp.apply(pre, synapse.weight, synapse.bias, self)[1] if self.routed else None
        u = self.pool.adjoint(post, route, self.size)  # (mbs, C, H, W)
        weight = self.weight_grad(pre, u, synapse.weight)
        return [weight] if synapse.bias is None else [weight, u.sum((0, 2, 3))]

    def term(self, pre: Tensor, post: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        return _dot(self.pool(self.convolve(pre, weight, bias)), post)


class WindowConvolution(Convolution):
    """A convolution as a matrix product over its windows.

    Several times faster on a CPU for maps that are small compared with the weights, because a
    convolution first copies the weights into another layout. Also used for a 1x1 kernel with a
    stride, see `convolution`."""

    def _windows(self, pre: Tensor) -> Tensor:
        """The window of each output pixel, (mbs * H * W, kernel * kernel * C)."""
        pre = F.pad(pre, (self.padding,) * 4) if self.padding else pre
        windows = pre.unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        return windows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)

    def convolve(self, pre: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        out = F.linear(self._windows(pre), _rows(weight), bias)  # (mbs * H * W, C)
        return out.view(pre.size(0), *self.size, weight.size(0)).permute(0, 3, 1, 2)

    def transposed(self, u: Tensor, weight: Tensor) -> Tensor:
        windows = (_pixels(u) @ _rows(weight)).view(
            u.size(0), *self.size, self.kernel, self.kernel, weight.size(1)
        )  # (mbs, H, W, kernel, kernel, C)
        side = self.pre_shape[1] + 2 * self.padding
        pre = u.new_zeros(u.size(0), side, side, weight.size(1))
        last = self.stride * (self.size[0] - 1) + 1
        reach = [slice(i, i + last, self.stride) for i in range(self.kernel)]
        for i, rows in enumerate(reach):
            for j, columns in enumerate(reach):
                pre[:, rows, columns] += windows[:, :, :, i, j]  # (mbs, H, W, C)
        inner = slice(self.padding, side - self.padding)
        return pre[:, inner, inner].permute(0, 3, 1, 2)

    def weight_grad(self, pre: Tensor, u: Tensor, weight: Tensor) -> Tensor:
        grad = _pixels(u).t() @ self._windows(pre)  # (C_post, kernel * kernel * C)
        return grad.view(weight.size(0), *weight.shape[2:], weight.size(1)).permute(0, 3, 1, 2)


def _rows(weight: Tensor) -> Tensor:
    """The weights of a convolution as a matrix, a row per output channel, in the order of
    `_windows`."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pixels(u: Tensor) -> Tensor:
    """A map as a matrix, a row per pixel, (mbs * H * W, C)."""
    return u.permute(0, 2, 3, 1).flatten(0, 2)


def convolution(
    synapse: nn.Conv2d, pool: Pooling, pre_shape: Shape, feedback: nn.Conv2d | None = None
) -> Convolution:
    """The connection through a convolution and a pooling. Raises ValueError if the map is smaller
    than the window."""
    stride = synapse.stride[0]
    padding = int(synapse.padding[0])
    # torch 2.14 writes out of bounds in the weight gradient of a channels-last 1x1 convolution with
    # a stride on a CPU
    kind = WindowConvolution if synapse.kernel_size[0] == 1 and stride > 1 else Convolution
    made = kind(synapse, pre_shape, feedback, pool=pool, stride=stride, padding=padding)
    pool.prepare(made.size)
    return made


def set_grad(p: Tensor | None, grad: Tensor) -> None:
    """Make `grad` the p.grad of a parameter, if there is one, in the parameter's memory layout:
    optimizers are faster if both agree."""
    if p is not None:
        p.grad = grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
