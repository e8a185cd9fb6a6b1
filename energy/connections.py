"""The connection between two layers: how it drives up, how it drives down, and how it learns.

The term of a connection in Phi is s_post . up(s_pre), with up(s) = pool(conv(s)) or W s + b. Everything else follows
from it: the drive on s_post is up(s_pre), the drive on s_pre is the adjoint of up, applied to s_post, and a weight
learns from d[s_post . up(s_pre)]/dW.
"""
import dataclasses
import types

import torch
import torch.nn as nn
import torch.nn.functional as F

from energy.activations import affine
from energy.poolings import NoPool


def _dot(a, b):
    """The scalar product of each sample, (mbs,)."""
    return (a.flatten(1) * b.flatten(1)).sum(1)


def take_samples(tensor, chosen):
    """Some samples of a tensor (of None: None) by their indices, in its memory layout."""
    if tensor is None or tensor.dim() != 4:
        return None if tensor is None else tensor[chosen]
    return tensor.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)


@dataclasses.dataclass(frozen=True, eq=False)
class Connection:
    """What joins a layer s_pre, (mbs, *pre_shape), to the layer s_post above it, (mbs, *post_shape).

    synapse   the module with the weight and bias, looked up at every use, so that `torch.func.functional_call` has its
              effect
    feedback  the module with separate backward weights (vector-field models), or None: the way down takes those of the
              way up
    mask      dropout: None, or (mbs, *pre_shape), what s_pre is multiplied by on the way up, and the drive on it on the
              way down. It is 0 or 1 / (probability of being kept), so that both drives are on average what they are
              without it
    routed    whether the way down depends on what went up, by the winners of a max-pooling

    Subclasses say what up, down and learning are without a mask: `_up`, `_down`, `_learn`.
    """

    synapse: nn.Module
    pre_shape: tuple
    feedback: nn.Module | None = None
    mask: torch.Tensor | None = None

    routed = False

    def seen(self, pre):
        """What the connection sees of the layer below: s_pre through the mask."""
        return pre if self.mask is None else self.mask.view_as(pre) * pre  # an image enters a dense layer unflattened

    def up(self, pre):
        """(drive on s_post, route that `down` needs: None unless `routed`) of s_pre."""
        return self._up(self.seen(pre))

    def route(self, pre):
        """The route alone, (None unless `routed`); no gradient goes through it."""
        if not self.routed:
            return None
        with torch.no_grad():
            return self.up(pre)[1]

    def down(self, post, route, drive):
        """`drive` plus the drive of s_post on s_pre."""
        own = self._down(post, route).view_as(drive)
        if self.mask is not None:
            own = self.seen(own)
        return own + drive if torch.is_grad_enabled() else own.add_(drive)

    def learn(self, pre, post):
        """[d/d weight, d/d bias] of s_post . up(s_pre), summed over the batch."""
        return self._learn(self.seen(pre), post, self.synapse)

    def learn_feedback(self, pre, post):
        """[d/d weight] for the separate backward weight, in the shape of the forward one."""
        return self._learn(self.seen(pre), post, self.feedback)

    def down_weight(self):
        """The weight of the way down, in the shape of the forward one."""
        return (self.synapse if self.feedback is None else self.feedback).weight

    def set_feedback_grad(self, grad):
        """Puts `learn_feedback`'s form into the backward weight's .grad."""
        set_grad(self.feedback.weight, grad)

    def term(self, pre, post, weight, bias=None):
        """s_post . up(s_pre) of each sample, (mbs,), with the weights given: for Phi. Differentiable."""
        raise NotImplementedError

    def terms(self, pre, post):
        """[term of the forward weights, and where there are separate backward weights theirs]."""
        pre = self.seen(pre)
        terms = [self.term(pre, post, self.synapse.weight, self.synapse.bias)]
        return terms if self.feedback is None else [*terms, self.term(pre, post, self.down_weight())]

    def scaled(self, gain, offset):
        """The connection whose drives are gain * up(s) + offset and gain * down(s); gain: above 0; offset: a tensor
        without dimensions."""
        def times(layer, **bias):
            return layer and types.SimpleNamespace(weight=gain * layer.weight, **bias)
        return dataclasses.replace(self, synapse=times(self.synapse, bias=affine(self.synapse.bias, gain, offset)),
                                   feedback=times(self.feedback))

    def take(self, chosen):
        """The connection for some samples of the mini-batch, by their indices."""
        return self if self.mask is None else dataclasses.replace(self, mask=take_samples(self.mask, chosen))


@dataclasses.dataclass(frozen=True, eq=False)
class Dense(Connection):
    """up(s) = W s + b, with the layer below flattened. transposed: whether the backward weight has the shape (pre,
    post)."""

    transposed: bool = False

    @property
    def post_shape(self):
        return (self.synapse.weight.size(0),)

    def down_weight(self):
        return self.feedback.weight.t() if self.transposed and self.feedback is not None else super().down_weight()

    def _up(self, pre):
        return F.linear(pre.flatten(1), self.synapse.weight, self.synapse.bias), None

    def _down(self, post, route):
        return torch.mm(post, self.down_weight())

    def bias_drive(self, mbs):
        """The drive of zero neurons on s_post, (mbs, post)."""
        return self.synapse.bias.expand(mbs, -1)

    def _learn(self, pre, post, synapse):
        return [post.t() @ pre.flatten(1), *([] if synapse.bias is None else [post.sum(0)])]

    def set_feedback_grad(self, grad):
        set_grad(self.feedback.weight, grad.t() if self.transposed else grad)

    def term(self, pre, post, weight, bias=None):
        return _dot(F.linear(pre.flatten(1), weight, bias), post)


class _ConvUp(torch.autograd.Function):
    """pool(conv(pre)) and its route. Keeps `pre` and the route for the backward pass, not the map between them."""

    @staticmethod
    def forward(ctx, pre, weight, bias, c):
        post, route = c.pool.pool(c.convolve(pre, weight, bias))
        ctx.c = c
        ctx.save_for_backward(pre, weight, route)
        if route is not None:
            ctx.mark_non_differentiable(route)
        return post, route

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        pre, weight, route = ctx.saved_tensors
        u = ctx.c.pool.adjoint(grad, route, ctx.c.size)
        needs = ctx.needs_input_grad
        return (ctx.c.transposed(u, weight) if needs[0] else None,
                ctx.c.weight_grad(pre, u, weight) if needs[1] else None, u.sum((0, 2, 3)) if needs[2] else None, None)


class _ConvDown(torch.autograd.Function):
    """The adjoint of pool(conv(.)) for a given route, applied to `post`. Keeps `post` and the route, not the map
    between."""

    @staticmethod
    def forward(ctx, post, weight, route, c):
        ctx.c = c
        ctx.save_for_backward(post, weight, route)
        return c.transposed(c.pool.adjoint(post, route, c.size), weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        post, weight, route = ctx.saved_tensors
        c, grad_post, grad_weight = ctx.c, None, None
        if ctx.needs_input_grad[0]:
            grad_post = c.pool.follow(c.convolve(grad, weight, None), route)
        if ctx.needs_input_grad[1]:
            grad_weight = c.weight_grad(grad, c.pool.adjoint(post, route, c.size), weight)
        return grad_post, grad_weight, None, None


@dataclasses.dataclass(frozen=True, eq=False)
class Convolution(Connection):
    """up(s) = pool(conv(s)), in channels-last memory. With separate backward weights the winners of a max-pooling on
    the way down are those of the backward weights' own convolution. Raises ValueError where nothing is left of a map.

    size: (H, W) before pooling; unreached: rows and columns that the last window leaves out."""

    pool: nn.Module | None = None
    stride: int = 1
    padding: int = 0

    def __post_init__(self):
        kernel, side = self.synapse.weight.size(2), self.pre_shape[1]
        room = side + 2 * self.padding - kernel  # how far the first window can be moved
        size = room // self.stride + 1
        pooled = size if isinstance(self.pool, NoPool) else size // 2
        if room < 0 or pooled < 1:
            pooling = "" if isinstance(self.pool, NoPool) else " and 2x2 pooling"
            raise ValueError(f"a {kernel}x{kernel} convolution with stride {self.stride} and padding "
                             f"{self.padding}{pooling} "
                             f"leaves nothing of a {side}x{side} map")
        derived = {"kernel": kernel, "size": (size, size), "post_shape": (self.synapse.weight.size(0), pooled, pooled),
                   "unreached": room % self.stride, "routed": self.pool.routed}
        for name, value in derived.items():
            object.__setattr__(self, name, value)  # the dataclass is frozen for all others

    def windowed(self):
        """The same connection as a product over windows."""
        return WindowConvolution(*(getattr(self, field.name) for field in dataclasses.fields(self)))

    def convolve(self, pre, weight, bias):
        """conv(pre), computed in the layout of the weights."""
        if weight.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(pre, weight, bias, self.stride, self.padding)
        out = F.conv2d(pre.contiguous(), weight, bias, self.stride, self.padding)
        return out.contiguous(memory_format=torch.channels_last)

    def transposed(self, u, weight):
        """The adjoint of the convolution, applied to the map u. Rows that the last window did not reach are zero."""
        return F.conv_transpose2d(u, weight, None, self.stride, self.padding, self.unreached)

    def weight_grad(self, pre, u, weight):
        """d[u . conv(pre)]/d(weight). As torch.nn.grad.conv2d_weight, but told the weight, so that the result has its
        layout."""
        geometry = [self.stride] * 2, [self.padding] * 2, [1, 1], False, [0, 0], 1
        return torch.ops.aten.convolution_backward(u, pre, weight, None, *geometry, [False, True, False])[1]

    def _up(self, pre):
        post, route = _ConvUp.apply(pre, self.synapse.weight, self.synapse.bias, self)
        if self.feedback is not None and self.routed:
            with torch.no_grad():
                route = _ConvUp.apply(pre, self.feedback.weight, None, self)[1]
        return post, route

    def _down(self, post, route):
        return _ConvDown.apply(post, self.down_weight(), route, self)

    def bias_drive(self, mbs):
        """The drive of zero neurons on s_post, (mbs, *post_shape)."""
        drive = self.synapse.bias.view(1, -1, 1, 1).expand(mbs, *self.post_shape)
        return drive.contiguous(memory_format=torch.channels_last)  # for what follows takes the layout of what comes

    def _learn(self, pre, post, synapse):
        route = _ConvUp.apply(pre, synapse.weight, synapse.bias, self)[1] if self.routed else None
        u = self.pool.adjoint(post, route, self.size)
        return [self.weight_grad(pre, u, synapse.weight), *([] if synapse.bias is None else [u.sum((0, 2, 3))])]

    def term(self, pre, post, weight, bias=None):
        return _dot(self.pool(self.convolve(pre, weight, bias)), post)


class WindowConvolution(Convolution):
    """A convolution as a matrix product over its windows: several times faster on a CPU where the map is small beside
    the weights, which a convolution first lays out anew; and the only safe way for a 1x1 kernel with a stride, see
    `convolution`."""

    def _windows(self, pre):
        """What each output pixel sees, (mbs * H * W, kernel * kernel * C)."""
        pre = F.pad(pre, (self.padding,) * 4) if self.padding else pre
        windows = pre.unfold(2, self.kernel, self.stride).unfold(3, self.kernel, self.stride)
        return windows.permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)

    def convolve(self, pre, weight, bias):
        out = F.linear(self._windows(pre), _rows(weight), bias)
        return out.view(pre.size(0), *self.size, weight.size(0)).permute(0, 3, 1, 2)

    def transposed(self, u, weight):
        windows = (_pixels(u) @ _rows(weight)).view(u.size(0), *self.size, self.kernel, self.kernel, weight.size(1))
        side = self.pre_shape[1] + 2 * self.padding
        pre = u.new_zeros(u.size(0), side, side, weight.size(1))
        reach = [slice(i, i + self.stride * (self.size[0] - 1) + 1, self.stride) for i in range(self.kernel)]
        for i, rows in enumerate(reach):
            for j, columns in enumerate(reach):
                pre[:, rows, columns] += windows[:, :, :, i, j]
        return pre[:, self.padding:side - self.padding, self.padding:side - self.padding].permute(0, 3, 1, 2)

    def weight_grad(self, pre, u, weight):
        grad = _pixels(u).t() @ self._windows(pre)
        return grad.view(weight.size(0), *weight.shape[2:], weight.size(1)).permute(0, 3, 1, 2)


def _rows(weight):
    """The weights of a convolution as a matrix, a row per output channel, in the order of `_windows`."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pixels(u):
    """A map as a matrix, a row per pixel."""
    return u.permute(0, 2, 3, 1).flatten(0, 2)


def convolution(synapse, pool, pre_shape, feedback=None):
    """The connection through the nn.Conv2d `synapse` and the pooling `pool`. Raises ValueError where nothing is left of
    a map."""
    # torch 2.14 writes out of bounds in the weight gradient of a channels-last 1x1 convolution with a stride on a CPU
    kind = WindowConvolution if synapse.kernel_size[0] == 1 and synapse.stride[0] > 1 else Convolution
    made = kind(synapse, pre_shape, feedback, pool=pool, stride=synapse.stride[0], padding=synapse.padding[0])
    if pool.routed:
        pool.prepare(made.size)
    return made


def set_grad(p, grad):
    """Makes `grad` the p.grad of a parameter (of None: nothing), in its layout: optimizers are faster where both have
    one."""
    if p is not None:
        p.grad = grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)
