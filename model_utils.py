"""Energy models, their dynamics, and the two learning rules: Equilibrium Propagation and back-propagation through time.

The order of the file is the order of the data: activations and poolings, a connection between two layers, a model made of
connections, the learning rules, and the loops over a data set.

A model has layers s_0 = x (fixed), s_1 ... s_N and, per sample, the primitive function

    Phi = sum_n s_n . up_n(s_{n-1}) - beta * L(s_N, y),    up_n(s) = pool(conv(s)) or W s + b.

Its dynamics is s_n(t+1) = act(dPhi/ds_n): the drive from below, up_n(s_{n-1}), plus the drive from above, the adjoint of up_{n+1}
applied to s_{n+1}. Both are written out, so neither a step nor a weight update needs automatic differentiation.
"""
import copy
import functools
import math
import time
import types

import torch
import torch.nn as nn
import torch.nn.functional as F

from data_utils import TASKS, Account, RunError, Workers, progress, random_states
from energy.connections import ACTIVATIONS, _MINUS_TWO, _affine, hard_sigmoid, my_hard_sig, my_sigmoid
from energy.connections import ctrd_hard_sig  # noqa: F401 - importable from here
from energy.precision import exactly, set_precision

# ------------------------------------------------------------------------------------------------------------ activations

# activation: (another one, gain, offset), with activation(x) = another(gain * x + offset)
RESCALED = {my_sigmoid: (torch.sigmoid, 4.0, _MINUS_TWO), my_hard_sig: (hard_sigmoid, 0.5, torch.tensor(0.0))}

# --------------------------------------------------------------------------------------------------------------- poolings
# A pooling is a linear map of a map u once its route is known (the winners of a max-pooling): `pool(u)` finds the route,
# `follow(u, route)` is the linear map, `adjoint(post, route, size)` its adjoint, into a map of `size` (H, W).


class MaxPool(nn.MaxPool2d):
    routed = True  # the route depends on what is pooled

    def pool(self, u):
        return F.max_pool2d(u, self.kernel_size, self.stride, return_indices=True)

    def follow(self, u, route):
        # gathered with the channels innermost, which is how channels-last memory lies
        pixels = [t.permute(0, 2, 3, 1).flatten(1, 2) for t in (u, route)]
        return pixels[0].gather(1, pixels[1]).unflatten(1, route.shape[2:]).permute(0, 3, 1, 2)

    def adjoint(self, post, route, size):
        u = F.max_unpool2d(post, route, self.kernel_size, self.stride, output_size=size)
        return u.contiguous(memory_format=torch.channels_last)  # a copy only where post was 1x1, which has no layout


class AvgPool(nn.AvgPool2d):
    routed = False

    def pool(self, u):
        return self(u), None

    def follow(self, u, route):
        return self(u)

    def adjoint(self, post, route, size):
        u = F.interpolate(post, scale_factor=2, mode="nearest") * 0.25
        return F.pad(u, (0, size[1] - u.size(3), 0, size[0] - u.size(2)))  # an odd last row or column was in no window


class NoPool(nn.Identity):
    routed = False

    def pool(self, u):
        return u, None

    def follow(self, u, route):
        return u

    def adjoint(self, post, route, size):
        return post


POOLS = {"m": lambda: MaxPool(2, 2), "a": lambda: AvgPool(2, 2), "i": NoPool}


def make_pools(letters):
    """A pooling per convolution: `m` maximum, `a` average (both 2x2 with stride 2), `i` none."""
    unknown = sorted(set(letters) - set(POOLS))
    if unknown:
        raise ValueError(f"unknown pooling {' '.join(unknown)}: use m (max), a (average) or i (none)")
    return nn.ModuleList([POOLS[letter]() for letter in letters])


# ------------------------------------------------------------------------------------------------------------ connections
# What a model asks of a connection between s_pre and s_post, whose term in Phi is s_post . up(s_pre):
#   up(pre)                  the drive on post, and the route that `down` needs (None unless `routed`); up_from_zero(mbs): the
#                            drive of zero neurons
#   down(post, route, drive) `drive` plus the drive of post on pre: the adjoint of up, through the separate feedback weights if any
#   learn(pre, post)         d[s_post . up(s_pre)]/d(weight, bias), summed over the batch
#   learn_feedback(pre, post)   the same for the separate feedback weights, in the shape of the forward ones
#   term(pre, post), feedback_term(pre, post)   s_post . up(s_pre) of each sample, written with PyTorch's layers, for Phi


def _dot(a, b):
    """The scalar product of each sample, (mbs,)."""
    return (a.flatten(1) * b.flatten(1)).sum(1)


def _rows(weight):
    """The weights of a convolution in channels-last memory as a matrix, a row per output channel."""
    return weight.permute(0, 2, 3, 1).flatten(1)


def _pixels(u):
    """A map in channels-last memory as a matrix, a row per pixel."""
    return u.permute(0, 2, 3, 1).flatten(0, 2)


class Connection:
    """What most connections have in common. `routed`: whether `down` needs the route that `up` found; `scales`: whether there is
    `scaled(gain, offset)`, the connection whose drives are gain * up(s) + offset and gain * down(s)."""

    routed = scales = False

    def packed(self, mbs):
        """The connection, prepared for many steps with the same weights."""
        return self

    def of_samples(self, chosen):
        """The connection for some samples of the mini-batch, by their indices."""
        return self


class Dropped(Connection):
    """A connection that sees the neurons below it through a mask, m: up'(s) = up(m s), and its adjoint, m down(.). The mask is 0, or
    1 / (probability of being kept), so that both drives are on average what they are without it. mask: (mbs, *shape below)."""

    def __init__(self, connection, mask):
        self.connection, self.mask = connection, mask

    def __getattr__(self, name):  # what the mask does not touch
        if name in ("connection", "mask"):  # not there yet: while being copied
            raise AttributeError(name)
        return getattr(self.connection, name)

    @property
    def routed(self):
        return self.connection.routed

    @property
    def scales(self):
        return self.connection.scales

    def scaled(self, gain, offset):
        return Dropped(self.connection.scaled(gain, offset), self.mask)

    def packed(self, mbs):
        packed = self.connection.packed(mbs)
        return self if packed is self.connection else Dropped(packed, self.mask)

    def of_samples(self, chosen):
        return Dropped(self.connection, _rows_of(self.mask, chosen))

    def seen(self, pre):
        return self.mask.view_as(pre) * pre  # an image enters a dense layer unflattened

    def up(self, pre):
        return self.connection.up(self.seen(pre))

    def down(self, post, route, drive):
        return drive + self.seen(self.connection.down(post, route, torch.zeros_like(drive)))

    def learn(self, pre, post):
        return self.connection.learn(self.seen(pre), post)

    def learn_feedback(self, pre, post):
        return self.connection.learn_feedback(self.seen(pre), post)

    def term(self, pre, post):
        return self.connection.term(self.seen(pre), post)

    def feedback_term(self, pre, post):
        return self.connection.feedback_term(self.seen(pre), post)


class Dense(Connection):
    """up(s) = W s + b, with the layer below flattened.

    `feedback`: a Linear without bias that holds the separate backward weights, of the shape of `synapse`, or of its
    transpose if `transposed`.
    """

    scales = True

    def __init__(self, synapse, pre_shape, feedback=None, transposed=False):
        self.synapse, self.pre_shape, self.feedback, self.transposed = synapse, pre_shape, feedback, transposed
        self.post_shape = (synapse.out_features,)

    def scaled(self, gain, offset):
        twin = copy.copy(self)
        twin.synapse = types.SimpleNamespace(weight=gain * self.synapse.weight, bias=_affine(self.synapse.bias, gain, offset))
        if self.feedback is not None:
            twin.feedback = types.SimpleNamespace(weight=gain * self.feedback.weight)
        return twin

    def down_weight(self):
        """The weights of the downward drive, in the shape of the forward ones, (post, pre)."""
        if self.feedback is None:
            return self.synapse.weight
        return self.feedback.weight.t() if self.transposed else self.feedback.weight

    def up(self, pre):
        return F.linear(pre.flatten(1), self.synapse.weight, self.synapse.bias), None

    def down(self, post, route, drive):
        return torch.mm(post, self.down_weight()).view_as(drive).add_(drive)  # faster than addmm, which copies the drive first

    def up_from_zero(self, mbs):
        return self.synapse.bias.expand(mbs, -1)

    def learn(self, pre, post):
        return post.t() @ pre.flatten(1), post.sum(0)

    def term(self, pre, post):
        return _dot(self.synapse(pre.flatten(1)), post)

    def feedback_term(self, pre, post):
        return _dot(F.linear(pre.flatten(1), self.down_weight()), post)

    def learn_feedback(self, pre, post):
        return (post.t() @ pre.flatten(1),)

    def set_feedback_grad(self, grad):
        _set_grad(self.feedback.weight, grad.t() if self.transposed else grad)


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
        return (ctx.c.transposed(u, weight) if needs[0] else None, ctx.c.weight_grad(pre, u, weight) if needs[1] else None,
                u.sum((0, 2, 3)) if needs[2] else None, None)


class _ConvDown(torch.autograd.Function):
    """The adjoint of pool(conv(.)) for a given route, applied to `post`. Keeps `post` and the route, not the map between."""

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
            grad_post = c.pool.follow(F.conv2d(grad, weight, **c.geometry), route)
        if ctx.needs_input_grad[1]:
            grad_weight = c.weight_grad(grad, c.pool.adjoint(post, route, c.size), weight)
        return grad_post, grad_weight, None, None


PACKING = torch.ops.mkldnn  # what torch.compile packs weights with; without it they stay as they are
PACKS = torch.backends.mkldnn.is_available() and hasattr(PACKING, "_reorder_convolution_transpose_weight")


class Conv(Connection):
    """up(s) = pool(conv(s)). `feedback`: a Conv2d without bias with the separate backward weights; the winners of a
    max-pooling on the way down are then those of its own convolution."""

    def __init__(self, synapse, pool, pre_shape, feedback=None):
        self.synapse, self.pool, self.pre_shape, self.feedback, self.routed = synapse, pool, pre_shape, feedback, pool.routed
        kernel, stride, padding = synapse.kernel_size[0], synapse.stride[0], synapse.padding[0]
        size = pre_shape[1] + 2 * padding - kernel
        self.size = (size // stride + 1,) * 2  # of the map before pooling
        self.geometry, self.packs = {"stride": stride, "padding": padding}, {}
        self.strides, self.paddings = [stride] * 2, [padding] * 2  # as PyTorch's inner functions want them
        self.output_padding = size % stride  # rows that the last window does not reach
        pooled = self.size[0] if isinstance(pool, NoPool) else self.size[0] // 2
        if size < 0 or pooled < 1:
            raise ValueError(f"a {kernel}x{kernel} convolution with stride {stride} and padding {padding}"
                             f"{'' if isinstance(pool, NoPool) else ' and 2x2 pooling'} leaves nothing of a "
                             f"{pre_shape[1]}x{pre_shape[1]} map")
        self.post_shape = (synapse.out_channels, pooled, pooled)

    # Three ways through the convolution, all in channels-last memory. Where the map is small beside the weights, a matrix product
    # over its windows is several times faster on a CPU than a convolution, which first lays all the weights out anew.

    def _as_product(self, mbs, weight):
        return (weight.device.type == "cpu" and 0 < 2 * mbs * self.size[0] ** 2 <= weight.size(0)
                and weight.is_contiguous(memory_format=torch.channels_last))

    def _windows(self, pre):
        """What each output pixel sees, (mbs * H * W, kernel * kernel * C)."""
        kernel, stride, padding = self.synapse.kernel_size[0], self.geometry["stride"], self.geometry["padding"]
        pre = F.pad(pre, (padding,) * 4) if padding else pre
        return pre.unfold(2, kernel, stride).unfold(3, kernel, stride).permute(0, 2, 3, 4, 5, 1).flatten(3).flatten(0, 2)

    def packed(self, mbs):
        """This connection with large weights laid out as the CPU's convolutions (of oneDNN) want them, for as long as they do not change:
        otherwise each call lays them out anew, which takes a tenth of a step at a mini-batch of 8."""
        weights = [layer.weight for layer in (self.synapse, self.feedback) if layer is not None]
        pre, u = ((mbs, *shape) for shape in (self.pre_shape, (self.post_shape[0], *self.size)))
        packs = {w.data_ptr(): (
            PACKING._reorder_convolution_weight(w.detach(), self.paddings, self.strides, [1, 1], 1, pre),
            PACKING._reorder_convolution_transpose_weight(w.detach(), self.paddings, [self.output_padding] * 2, self.strides, [1, 1], 1, u))
            for w in weights if w.numel() > 2 ** 16 and not self._as_product(mbs, w)}
        if not packs:
            return self
        twin = copy.copy(self)
        twin.packs = packs
        return twin

    def convolve(self, pre, weight, bias):
        """conv(pre), computed in the layout of the weights."""
        if self.packs and weight.data_ptr() in self.packs:
            return PACKING._convolution_pointwise(pre, self.packs[weight.data_ptr()][0], bias, self.paddings, self.strides, [1, 1], 1, "none", [], "")
        if self._as_product(pre.size(0), weight):
            out = F.linear(self._windows(pre), _rows(weight), bias)
            return out.view(pre.size(0), *self.size, -1).permute(0, 3, 1, 2)
        if weight.is_contiguous(memory_format=torch.channels_last):
            return F.conv2d(pre, weight, bias, **self.geometry)
        return F.conv2d(pre.contiguous(), weight, bias, **self.geometry).contiguous(memory_format=torch.channels_last)

    def transposed(self, u, weight):
        """The adjoint of the convolution, applied to the map u."""
        if self.packs and weight.data_ptr() in self.packs:
            return PACKING._convolution_transpose_pointwise(u, self.packs[weight.data_ptr()][1], None, self.paddings, [self.output_padding] * 2,
                                                            self.strides, [1, 1], 1, "none", [], "")
        if not self._as_product(u.size(0), weight):
            return F.conv_transpose2d(u, weight, output_padding=self.output_padding, **self.geometry)
        kernel, stride, padding = self.synapse.kernel_size[0], self.geometry["stride"], self.geometry["padding"]
        windows = (_pixels(u) @ _rows(weight)).view(u.size(0), *self.size, kernel, kernel, -1)
        side = self.pre_shape[1] + 2 * padding
        pre = u.new_zeros(u.size(0), side, side, weight.size(1))
        reach = [slice(i, i + stride * (self.size[0] - 1) + 1, stride) for i in range(kernel)]
        for i, rows in enumerate(reach):
            for j, columns in enumerate(reach):
                pre[:, rows, columns] += windows[:, :, :, i, j]
        return pre[:, padding:side - padding, padding:side - padding].permute(0, 3, 1, 2)

    def weight_grad(self, pre, u, weight):
        """d[u . conv(pre)]/d(weight). As torch.nn.grad.conv2d_weight, but told the weight, so that the result has its layout."""
        if self._as_product(pre.size(0), weight):
            grad = _pixels(u).t() @ self._windows(pre)
            return grad.view(weight.size(0), *weight.shape[2:], weight.size(1)).permute(0, 3, 1, 2)
        return torch.ops.aten.convolution_backward(u, pre, weight, None, self.strides, self.paddings, [1, 1], False, [0, 0], 1, [False, True, False])[1]

    def _pooled(self, pre, synapse):
        return _ConvUp.apply(pre, synapse.weight, synapse.bias, self)

    def up(self, pre):
        post, route = self._pooled(pre, self.synapse)
        if self.feedback is not None and self.routed:
            with torch.no_grad():
                route = self._pooled(pre, self.feedback)[1]
        return post, route

    def down_weight(self):
        return (self.feedback or self.synapse).weight

    def down(self, post, route, drive):
        u = _ConvDown.apply(post, self.down_weight(), route, self)
        return u + drive if torch.is_grad_enabled() else u.add_(drive)

    def up_from_zero(self, mbs):
        return self.synapse.bias.view(1, -1, 1, 1).expand(mbs, *self.post_shape)

    def _learn(self, pre, post, synapse):
        route = self._pooled(pre, synapse)[1] if self.routed else None
        u = self.pool.adjoint(post, route, self.size)
        return self.weight_grad(pre, u, synapse.weight), u.sum((0, 2, 3))

    def learn(self, pre, post):
        return self._learn(pre, post, self.synapse)

    def term(self, pre, post):
        return _dot(self.pool(self.synapse(pre)), post)

    def feedback_term(self, pre, post):
        return _dot(self.pool(self.feedback(pre)), post)

    def learn_feedback(self, pre, post):
        return self._learn(pre, post, self.feedback)[:1]

    def set_feedback_grad(self, grad):
        _set_grad(self.feedback.weight, grad)


def _set_grad(p, grad):
    if p is not None:  # optimizers are faster where both have one layout
        p.grad = grad if grad.stride() == p.stride() else torch.empty_like(p).copy_(grad)


# ----------------------------------------------------------------------------------------------------------------- models


def relative_change(before, after):
    """How far each image moved: the largest over the layers of ||after - before|| / ||after||, (mbs,). before, after: neurons."""
    return torch.stack([(b - a).flatten(1).norm(dim=1) / b.flatten(1).norm(dim=1).clamp(min=1e-12) for a, b in zip(before, after)]).amax(0)


def _rows_of(tensor, chosen):
    """Some samples of a tensor (of None: None), in its layout."""
    if tensor is None or tensor.dim() != 4:
        return None if tensor is None else tensor[chosen]
    return tensor.permute(0, 2, 3, 1)[chosen].permute(0, 3, 1, 2)


@functools.cache
def _compiled(function):
    return torch.compile(function)


PAIRED = 2 ** 20  # neurons in a mini-batch up to which two phases, or two trajectories, are faster as one of twice the size


class _Pull:
    """A constant slope to nudge against, where a label's one-hot vector would be the target."""

    def __init__(self, slope):
        self.slope = slope


class EnergyModel(nn.Module):
    """A chain of connections with one dynamics and one local update; the four public classes below only assemble it.

    synapses      ModuleList of every forward Conv2d and Linear, the read-out last where `softmax`
    B_syn         ModuleList of the separate backward weights (vector-field models; empty otherwise)
    connections   one per layer of neurons s_1 ... s_N
    output        the connection that reads out s_N, where `softmax`: its other end is no neuron
    softmax       whether the output is read out of s_N by a linear layer, with the cross-entropy acting on its logits
    same_update   vector-field models: whether both weights of a connection take the mean of their two gradients
    schedule      `sync`: all layers step at once; `async`: odd and even ones in turn, each seeing the other's new state. A fixed
                  point of one that keeps its max-pooling winners is one of the other, but from zero they can reach different ones
    compiled      whether steps without a graph go through torch.compile
    """

    def __init__(self, synapses, B_syn, connections, activation, softmax=False, same_update=False, pools=(), schedule="sync"):
        super().__init__()
        self.synapses, self.B_syn = nn.ModuleList(synapses), nn.ModuleList(B_syn)
        self.pools = nn.ModuleList(pools)
        self.connections, self.activation = connections, activation
        self.output = Dense(self.synapses[-1], connections[-1].post_shape) if softmax else None
        self.softmax, self.same_update, self.schedule, self.compiled = softmax, same_update, schedule, False
        self.nc = self.synapses[-1].out_features
        # Convolutions and poolings run faster in this layout, on CPU and GPU alike; it changes no value.
        self.to(memory_format=torch.channels_last)

    # ---- the state

    def init_neurons(self, mbs, device):
        """Zero neurons: a list of N tensors (mbs, *shape of the layer)."""
        zeros = [torch.zeros(mbs, *c.post_shape, device=device, dtype=self.synapses[0].weight.dtype) for c in self.connections]
        return [z.contiguous(memory_format=torch.channels_last) if z.dim() == 4 else z for z in zeros]

    def readout(self, neurons):
        """(mbs, classes): the logits where `softmax`, the output neurons otherwise."""
        return self.output.up(neurons[-1])[0] if self.softmax else neurons[-1]

    # ---- the loss that nudges

    def loss(self, neurons, y, criterion):
        """L of each sample, (mbs,): 0.5 * ||s_N - onehot(y)||^2 for MSELoss, the cross-entropy of the read-out otherwise.
        `criterion` is either loss of PyTorch with reduction='none'; `y` holds class indices (mbs,)."""
        out = self.readout(neurons)
        if isinstance(criterion, nn.MSELoss):
            return 0.5 * criterion(out, F.one_hot(y, self.nc).to(out.dtype)).sum(1)
        return criterion(out, y)

    def _target(self, y, beta):
        """onehot(y), (mbs, classes), for the slope of the loss; None where nothing nudges."""
        if not torch.is_tensor(beta) and beta == 0:
            return None
        if y is None:
            raise ValueError("labels are needed to nudge: y is None but beta is not 0")
        return F.one_hot(y, self.nc).to(self.synapses[-1].weight.dtype)

    def _loss_slope(self, neurons, target, criterion):
        """dL/d(read-out), (mbs, classes)."""
        out = self.readout(neurons)
        return (out if isinstance(criterion, nn.MSELoss) else out.softmax(1)) - target

    # ---- the dynamics

    def Phi(self, x, y, neurons, beta, criterion):
        """The primitive function of each sample, (mbs,); for vector-field models a list of one (mbs,) per layer, whose
        entry n holds the terms that drive s_n. Differentiable; for reading and testing, no step or update needs it."""
        layers = [x.to(self.synapses[0].weight.dtype), *neurons]
        phis = [c.term(pre, post) for c, pre, post in zip(self.connections, layers, neurons)]
        for n, c in enumerate(self.connections):
            if c.feedback is not None:
                phis[n - 1] = phis[n - 1] + c.feedback_term(layers[n], neurons[n])
        if beta != 0:
            phis[-1] = phis[-1] - beta * self.loss(neurons, y, criterion)
        return phis if len(self.B_syn) else sum(phis)

    def input_drive(self, x):
        """up_1(x), which does not change in time: computed once, it serves every step of every phase on `x`."""
        return self.connections[0].up(x.to(self.synapses[0].weight.dtype))[0]

    def step(self, drive_x, neurons, target, beta, criterion, lowest=0):
        """One synchronous step, s_n <- act(dPhi/ds_n) for all n at once; entries of `neurons` below `lowest` stay as they are.
        With the cross-entropy and no read-out layer the output neurons are the logits: they take dPhi/ds_N as it is."""
        drives = list(neurons)
        if lowest == 0:
            drives[0] = drive_x
        for n in range(max(lowest, 1), len(drives)):  # connection n joins entries n - 1 and n
            c = self.connections[n]
            drives[n], route = c.up(neurons[n - 1])
            if n > lowest:
                drives[n - 1] = c.down(neurons[n], route, drives[n - 1])
        if target is not None:
            drives[-1] = self._nudged(drives[-1], neurons, target, beta, criterion)
        return drives[:lowest] + [self._activate(n, drives[n], criterion) for n in range(lowest, len(drives))]

    def first_step(self, drive_x, target, beta, criterion):
        """The synchronous step from zero neurons, where the drive from below is the bias and there is none from above."""
        drives = [drive_x, *(c.up_from_zero(drive_x.size(0)) for c in self.connections[1:])]
        if target is not None:
            drives[-1] = self._nudged(drives[-1], self.init_neurons(drive_x.size(0), drive_x.device), target, beta, criterion)
        return [self._activate(n, drive, criterion) for n, drive in enumerate(drives)]

    def sweep(self, drive_x, neurons, routes, target, beta, criterion):
        """One asynchronous step: s_1, s_3, ... from their neighbours, then s_2, s_4, ... from the new ones. routes: see `turn`."""
        for first in (0, 1):
            neurons = self.turn(first, drive_x, neurons, routes, target, beta, criterion)
        return neurons

    def turn(self, first, drive_x, neurons, routes, target, beta, criterion, lowest=0):
        """Every second layer, from entry `first` (0 or 1) on, from its neighbours; entries of `neurons` below `lowest` stay as they are.

        routes: each connection's, for the present state of the layer below it, or None; brought up to date in place. A layer
        does not change between its connection's upward drive and the next downward one, so that no route is looked for twice."""
        neurons = list(neurons)
        for n in range(first, len(neurons), 2):
            if n < lowest:
                continue
            drive = drive_x
            if n > 0:
                drive, routes[n] = self.connections[n].up(neurons[n - 1])
            if n + 1 < len(neurons):
                above = self.connections[n + 1]
                if above.routed and routes[n + 1] is None:
                    with torch.no_grad():
                        routes[n + 1] = above.up(neurons[n])[1]
                drive = above.down(neurons[n + 1], routes[n + 1], drive)
            elif target is not None:
                drive = self._nudged(drive, neurons, target, beta, criterion)
            neurons[n] = self._activate(n, drive, criterion)
        return neurons

    def _nudged(self, drive, neurons, target, beta, criterion):
        slope = target.slope if isinstance(target, _Pull) else self._loss_slope(neurons, target, criterion)
        if self.softmax:
            return self.output.down(-beta * slope, None, drive)
        return drive - beta * slope if torch.is_tensor(beta) else torch.add(drive, slope, alpha=-beta)

    def _activate(self, n, drive, criterion):
        return drive if n == len(self.connections) - 1 and self._linear_output(criterion) else self.activation(drive)

    def _linear_output(self, criterion):
        return not self.softmax and not isinstance(criterion, nn.MSELoss)

    def advance(self, drive_x, neurons, routes, target, beta, criterion, lowest=0):
        """One step of the model's schedule from `neurons` (zero if None). routes: see `sweep`; lowest: see `step`."""
        if neurons is None and self.schedule == "sync":
            return self.first_step(drive_x, target, beta, criterion)
        if neurons is None:
            neurons = self.init_neurons(drive_x.size(0), drive_x.device)
        if self.schedule == "sync":
            return self._ready("step", lowest)(drive_x, neurons, target, beta, criterion, lowest)
        return self._ready("sweep")(drive_x, neurons, routes, target, beta, criterion)

    def _ready(self, method, lowest=0):
        """A method of the dynamics, through torch.compile where that was asked for and no graph is recorded."""
        if not self.compiled or torch.is_grad_enabled() or lowest:
            return getattr(self, method)
        return functools.partial(_compiled(getattr(EnergyModel, method)), self)

    def packed(self, drive_x, T):
        """The model for T steps in which no weight changes: see `Conv.packed`."""
        if T < 8 or torch.is_grad_enabled() or not PACKS or drive_x.device.type != "cpu" or drive_x.dtype != torch.float32:
            return self
        connections = [self.connections[0], *(c.packed(len(drive_x)) for c in self.connections[1:])]  # no step uses the first
        if all(a is b for a, b in zip(connections, self.connections)):
            return self
        model = copy.copy(self)
        model.connections = connections
        return model

    def rescaled(self, drive_x, T, beta, criterion):
        """(model, drive_x, beta) whose T steps are those of this model, to rounding, but with the affine part of the activation (see
        RESCALED) in the weights and not in a pass over the neurons; all as they are where that cannot be had, or does not pay."""
        upper = self.connections[1:]  # of the first only the drive is left
        if (T < 2 or self.activation not in RESCALED or self._linear_output(criterion) or self.compiled or drive_x.dtype == torch.bfloat16
                or not all(c.scales for c in upper)
                or T * len(drive_x) * self._neurons() < 2 * sum(c.synapse.weight.numel() for c in upper)):
            return self, drive_x, beta
        model = copy.copy(self)
        model.activation, gain, offset = RESCALED[self.activation]
        model.connections = [self.connections[0], *(c.scaled(gain, offset) for c in upper)]
        return model, _affine(drive_x, gain, offset), gain * beta

    def dropped(self, masks):
        """The model, on the same parameters, with its connections seeing the layers below through masks (see `Dropped`). masks: for
        each connection, and for the read-out where `softmax`, (mbs, *shape below), or None."""
        model = copy.copy(self)
        *model.connections, model.output = (c if m is None else Dropped(c, m) for c, m in zip([*self.connections, self.output], [*masks, None]))
        return model

    def doubled(self):
        """The model for a mini-batch that holds every sample twice, the whole batch behind itself."""
        masks = [c.mask for c in (*self.connections, self.output) if isinstance(c, Dropped)]
        return self.of_samples(torch.arange(2 * len(masks[0]), device=masks[0].device) % len(masks[0])) if masks else self

    def of_samples(self, chosen):
        """The model for some samples of the mini-batch that its masks are of, if it has any; chosen: their indices."""
        if not any(isinstance(c, Dropped) for c in (*self.connections, self.output)):
            return self
        model = copy.copy(self)
        *model.connections, model.output = (c and c.of_samples(chosen) for c in (*self.connections, self.output))
        return model

    def relax(self, drive_x, y, neurons, T, beta, criterion, output_in=None, slope=None):
        """T steps from `neurons` (zero if None), given the input's drive. Leaves its arguments as they are. `output_in`: only s_N
        is wanted, and only that many steps after these (0: at their end), so that synchronous steps leave out what does not reach
        it; layers left out are returned as of an earlier step. beta: a number, or one per sample, (mbs, 1). `slope`: what to nudge
        against in place of dL/d(read-out), (mbs, classes), constant in time."""
        target, depth = self._target(y, beta) if slope is None else _Pull(slope), len(self.connections)
        if T == 0 and neurons is None:
            neurons = self.init_neurons(drive_x.size(0), drive_x.device)
        model, drive_x, beta = self.rescaled(drive_x, T, beta, criterion)
        if target is None and self.two_trajectories and (output_in is not None or T >= 8 and self.pairs(len(drive_x))):
            return model._interleaved(drive_x, neurons, T, criterion, output_in)
        routes, model = [None] * depth, model.packed(drive_x, T)
        for left in reversed(range(T)):
            lowest = 0 if output_in is None or neurons is None else max(0, depth - 1 - output_in - left)
            neurons = model.advance(drive_x, neurons, routes, target, beta, criterion, lowest)
        return list(neurons)

    @property
    def two_trajectories(self):
        """Whether free synchronous steps run along two trajectories that never meet: the odd layers at odd times with the even ones at
        even times, and the others. They do where a layer's next state depends on its neighbours alone; the winners of a max-pooling between
        two layers are those of the lower one itself."""
        return self.schedule == "sync" and not any(c.routed for c in self.connections[1:])

    def pairs(self, mbs):
        """Whether two mini-batches of mbs samples are faster as one of twice the size."""
        return mbs * self._neurons() <= PAIRED

    def _neurons(self):
        """How many a sample has."""
        return sum(math.prod(c.post_shape) for c in self.connections)

    def _interleaved(self, drive_x, neurons, T, criterion, output_in):
        """`relax` along `two_trajectories`, a turn of every second layer being a step of one of them. Where only the output is wanted, the
        other is left out: half of the work. Otherwise every turn serves both, of which one is a step ahead: half of the calls."""
        depth, rest = len(self.connections), ([None] * len(self.connections), None, 0.0, criterion)
        steps = T
        if neurons is None and T > 0:
            neurons, T = self.first_step(drive_x, None, 0.0, criterion), T - 1
        if output_in is not None:
            model = self.packed(drive_x, steps)
            for to_go in range(output_in + T - 1, output_in - 1, -1):  # steps from the end of this one until the output is read
                highest, lowest = depth - 1 - to_go % 2, max(0, depth - 1 - to_go)
                neurons = model._ready("turn", lowest)(highest % 2, drive_x, neurons, *rest, lowest)
            return list(neurons)
        ahead = self.turn(1, drive_x, neurons, *rest)
        twice, both = torch.cat([drive_x, drive_x]), [torch.cat(pair) for pair in zip(ahead, neurons)]
        double = self.doubled().packed(twice, T)
        for t in range(T - 1):
            both = double._ready("turn")(t % 2, twice, both, *rest)
        ahead, behind = zip(*(s.chunk(2) for s in both))
        behind = self.turn((T - 1) % 2, drive_x, behind, *rest)
        return [(ahead if n % 2 == T % 2 else behind)[n] for n in range(depth)]

    @torch.no_grad()
    def settle(self, drive_x, y, T, beta, criterion, tol, every=5):
        """As `relax` from zero neurons, but an image stops once it has settled: once `every` steps have together changed no layer of
        it by `tol` of that layer's norm (a single step is no measure: near a saddle an image can creep, and leave it later). Images
        that have settled leave the batch.

        Returns (neurons, steps, settled): a list of N tensors as `relax` does; how many steps each image took, (mbs,); and whether
        it had settled then, (mbs,) bool."""
        mbs, device = drive_x.size(0), drive_x.device
        target, state, routes = self._target(y, beta), None, [None] * len(self.connections)
        result, before = self.init_neurons(mbs, device), self.init_neurons(mbs, device)
        steps, settled = torch.full((mbs,), T, device=device), torch.zeros(mbs, dtype=torch.bool, device=device)
        model, drive_x, beta = self.rescaled(drive_x, T, beta, criterion)
        active, model = torch.arange(mbs, device=device), model.packed(drive_x, T)
        for done in range(1, T + 1):
            state = model.advance(drive_x, state, routes, target, beta, criterion)
            if done % every and done < T:
                continue
            still = relative_change(before, state) < tol
            stop = still if done < T else torch.ones_like(still)
            if done % every:  # the last look came early
                still[:] = False
            steps[active[still]], settled[active[still]] = done, True
            for whole, part in zip(result, state):
                whole[active[stop]] = part[stop]
            if stop.any():
                go_on = (~stop).nonzero().flatten()
                drive_x, target, active = (_rows_of(t, go_on) for t in (drive_x, target, active))
                state, routes = ([_rows_of(t, go_on) for t in tensors] for tensors in (state, routes))
                model = model.of_samples(go_on)
            before = state
            if not len(active):
                break
        return result, steps, settled

    def forward(self, x, y=None, neurons=None, T=1, beta=0.0, criterion=nn.MSELoss(reduction="none"), check_thm=False,
                output_in=None):
        """The neurons after T steps from `neurons` (from zero if None): a list of N tensors. `output_in`: see `relax`.

        x: (mbs, ...); y: class indices (mbs,), may be None at beta 0. `check_thm` keeps the graph through the T steps (for
        BPTT, attacks and gducheck); without it nothing is recorded, whatever the caller's grad mode is.
        """
        with torch.set_grad_enabled(check_thm):
            return self.relax(self.input_drive(x), y, neurons, T, beta, criterion, output_in)

    # ---- the local update

    @torch.no_grad()
    def compute_syn_grads(self, x, y, neurons_1, neurons_2, betas, criterion, check_thm=False, neurons_3=None):
        """The EP update, into p.grad of every parameter (what was there is replaced):

            p.grad = [dPhi(s_2, beta_2)/dp - dPhi(s_1, beta_1)/dp] / (beta_1 - beta_2),   Phi averaged over the batch,

        the estimate of dL/dp. One-sided: neurons (free, nudged), betas (0, beta). Symmetric: (nudged at +beta, nudged at
        -beta), betas (beta, -beta); vector-field models without `same_update` also need the free state then: (free, +beta,
        -beta) as neurons 1, 2 and 3. There layer n's term pairs s_n, nudged, with the free state of its neighbours.
        `check_thm`: the two states are successive ones of a nudged phase, so that both Phi are taken at beta_2, and the update
        is that step's share of the whole (gducheck). x is converted to the precision of the model. Raises ValueError if
        it holds no image.
        """
        x, (beta_1, beta_2) = converted(self, x), betas
        scale = 1.0 / ((beta_1 - beta_2) * x.size(0))
        if check_thm:
            beta_1 = beta_2
        free = [x, *neurons_1]
        one, two = (neurons_2, neurons_3) if neurons_3 is not None else (neurons_1, neurons_2)
        one, two = [x, *one], [x, *two]
        paired = not len(self.B_syn) or self.same_update  # both ends of a connection in the same state

        def contrast(learn, learn_both, below_one, above_one, below_two, above_two):
            # of d[s_above . up(s_below)]/dp, linear in s_above, which is the smaller thing to scale
            if below_one is below_two:
                return learn(below_one, (above_two - above_one) * scale)
            return learn_both(torch.cat([below_one, below_two]), torch.cat([above_one * -scale, above_two * scale]))

        for n, (c, both) in enumerate(zip(self.connections, self.doubled().connections)):
            below = (one[n], two[n]) if paired else (free[n], free[n])
            weight, bias = contrast(c.learn, both.learn, below[0], one[n + 1], below[1], two[n + 1])
            if c.feedback is not None:
                above = (one[n + 1], two[n + 1]) if paired else (free[n + 1], free[n + 1])
                feedback, = contrast(c.learn_feedback, both.learn_feedback, one[n], above[0], two[n], above[1])
                if self.same_update:
                    weight = (weight + feedback) / 2
                    feedback = weight.clone()
                c.set_feedback_grad(feedback)
            _set_grad(c.synapse.weight, weight)
            _set_grad(c.synapse.bias, bias)

        if self.softmax:
            grads = []
            for state, beta in ((one, beta_1), (two, -beta_2)):
                if beta != 0:  # L is a term of Phi only where it nudges
                    slope = self._loss_slope(state[1:], self._target(y, beta), criterion)
                    grads.append(self.output.learn(state[-1], beta * scale * slope))
            for p, grad in zip((self.output.synapse.weight, self.output.synapse.bias), zip(*grads)):
                _set_grad(p, sum(grad))

    # ---- reading

    @torch.no_grad()
    def angles(self):
        """Degrees between the forward and the backward weights of each connection that has both."""
        result = []
        for c in self.connections:
            if c.feedback is not None:
                cosine = F.cosine_similarity(c.synapse.weight.flatten(), c.down_weight().flatten(), dim=0)
                result.append(torch.rad2deg(torch.acos(cosine.clamp(-1, 1))).item())
        return result


def _dense_chain(archi, feedback):
    if len(archi) < 2:
        raise ValueError("an MLP needs at least an input and an output size")
    synapses = [nn.Linear(a, b) for a, b in zip(archi, archi[1:])]
    B_syn = [nn.Linear(b, a, bias=False) for a, b in zip(archi[1:], archi[2:])] if feedback else []
    return synapses, B_syn


class P_MLP(EnergyModel):
    """Dense layers with tied weights. archi: sizes of all layers, the input's first."""

    def __init__(self, archi, activation, softmax=False, schedule="sync"):
        synapses, _ = _dense_chain(archi, False)
        connections = [Dense(s, (a,)) for s, a in zip(synapses, archi)]
        super().__init__(synapses, [], connections[:-1] if softmax else connections, activation, softmax, schedule=schedule)


class VF_MLP(EnergyModel):
    """Dense layers with separate backward weights `B_syn`, of shape (pre, post)."""

    def __init__(self, archi, activation, softmax=False, same_update=False, schedule="sync"):
        synapses, B_syn = _dense_chain(archi, True)
        if softmax:
            B_syn.pop()
        feedback = [None, *B_syn, None]
        connections = [Dense(s, (a,), b, transposed=True) for s, a, b in zip(synapses, archi, feedback)]
        super().__init__(synapses, B_syn, connections[:-1] if softmax else connections, activation, softmax, same_update, schedule=schedule)


class _CNN(EnergyModel):
    def __init__(self, in_size, channels, kernels, strides, fc, pools, paddings, activation, softmax, separate, same_update=False,
                 schedule="sync"):
        if not len(channels) - 1 == len(kernels) == len(strides) == len(pools) == len(paddings) > 0 or not fc:
            raise ValueError("kernels, strides, pools and paddings need one entry per convolution, channels one more, fc at least one")
        synapses, B_syn, connections, shape = [], [], [], (channels[0], in_size, in_size)
        for i, out in enumerate(channels[1:]):
            geometry = (channels[i], out, kernels[i], strides[i], paddings[i])
            synapses.append(nn.Conv2d(*geometry))
            if separate and i > 0:
                B_syn.append(nn.Conv2d(*geometry, bias=False))
            try:
                connections.append(Conv(synapses[-1], pools[i], shape, B_syn[-1] if separate and i > 0 else None))
            except ValueError as e:
                raise ValueError(f"layer {i + 1}: {e}") from None
            shape = connections[-1].post_shape
        for i, out in enumerate(fc):
            size = shape[0] * shape[1] * shape[2] if len(shape) == 3 else shape[0]
            synapses.append(nn.Linear(size, out))
            if softmax and i == len(fc) - 1:
                break
            if separate:
                B_syn.append(nn.Linear(size, out, bias=False))
            connections.append(Dense(synapses[-1], shape, B_syn[-1] if separate else None))
            shape = connections[-1].post_shape
        super().__init__(synapses, B_syn, connections, activation, softmax, same_update, pools, schedule)


class P_CNN(_CNN):
    """Convolutions, each followed by a pooling, then dense layers, with tied weights.

    in_size: height and width of the (square) images; channels: of all maps, the input's first; fc: sizes of the dense layers,
    the last one the number of classes; pools: see `make_pools`. Raises ValueError, naming the layer, where nothing is left of a map.
    """

    def __init__(self, in_size, channels, kernels, strides, fc, pools, paddings, activation, softmax=False, schedule="sync"):
        super().__init__(in_size, channels, kernels, strides, fc, pools, paddings, activation, softmax, separate=False, schedule=schedule)


class VF_CNN(_CNN):
    """As P_CNN, with separate backward weights `B_syn` for every connection but the first (and the read-out)."""

    def __init__(self, in_size, channels, kernels, strides, fc, pools, paddings, activation, softmax=False, same_update=False,
                 schedule="sync"):
        super().__init__(in_size, channels, kernels, strides, fc, pools, paddings, activation, softmax, separate=True,
                         same_update=same_update, schedule=schedule)


# ---------------------------------------------------------------------------------------------------- models from arguments


def make_model(args):
    """The model that the command line's arguments describe, with initial weights scaled by args.scale."""
    task, act, options = TASKS[args.task], ACTIVATIONS[args.act], {"softmax": args.softmax, "schedule": args.schedule}
    if args.model.startswith("VF"):
        options["same_update"] = args.same_update
    if args.model in ("MLP", "VFMLP"):
        model = {"MLP": P_MLP, "VFMLP": VF_MLP}[args.model](args.archi, act, **options)
    else:
        geometry = (task.size, [task.channels, *args.channels], args.kernels, args.strides, args.fc, make_pools(args.pools), args.paddings)
        model = {"CNN": P_CNN, "VFCNN": VF_CNN}[args.model](*geometry, act, **options)
    if args.scale is not None:
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(args.scale)
    return model


def make_criterion(loss):
    """PyTorch's loss of that name (`mse` or `cel`), one value per sample and entry."""
    return {"mse": nn.MSELoss, "cel": nn.CrossEntropyLoss}[loss](reduction="none")


def make_optimizer(model, args):
    """The optimizer, with a parameter group per layer (backward weights take the rates of their forward twin), and the
    scheduler, or None. args: optim, lrs, wds, mmt, lr_decay."""
    layers = len(model.synapses)
    lrs = args.lrs or [0.01 if args.optim == "sgd" else 5e-4] * layers
    wds = args.wds or [0.0] * layers
    modules = [*zip(model.synapses, lrs, wds), *zip(model.B_syn, lrs[1:], wds[1:])]
    groups = [{"params": list(m.parameters()), "lr": lr, "weight_decay": wd} for m, lr, wd in modules]
    if args.optim == "sgd":
        optimizer = torch.optim.SGD(groups, lr=lrs[0], momentum=args.mmt, fused=True)
    else:
        optimizer = torch.optim.Adam(groups, lr=lrs[0], fused=True)
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 100, eta_min=1e-5) if args.lr_decay else None
    return optimizer, scheduler


# --------------------------------------------------------------------------------------------------------- learning rules


def converted(model, x):
    """The mini-batch x in the precision of the model. Raises ValueError if it holds no image."""
    if len(x) == 0:
        raise ValueError("the mini-batch is empty: there is no gradient to compute")
    return x.to(model.synapses[0].weight.dtype)


# Of all learning rules: `tol`: let the free phase end early (see `EnergyModel.settle`), 0: never. `account`: where the time goes and how
# many steps were used. `twin`: a copy of the model in lower precision (see `lowered`) that the time steps are left to.


def free_phase(model, x, y, T, beta, criterion, tol=0.0, account=None, output_in=None):
    """(drive of the input, neurons after at most T steps from zero). output_in: see `EnergyModel.relax`."""
    with torch.no_grad(), (account or Account()).time("free"):
        drive = model.input_drive(x)
        if not tol:
            return drive, model.relax(drive, y, None, T, beta, criterion, output_in)
        neurons, steps, settled = model.settle(drive, y, T, beta, criterion, tol)
        if account:
            account.settling(steps, settled)
        return drive, neurons


def nudged_phases(model, drive, y, free, T2, beta, criterion):
    """The neurons after T2 steps from `free` nudged by beta, and by -beta."""
    if not model.pairs(len(drive)):
        return [model.relax(drive, y, free, T2, b, criterion) for b in (beta, -beta)]
    signs = torch.tensor([beta, -beta], device=drive.device, dtype=drive.dtype).repeat_interleave(len(drive)).view(-1, 1)
    both = model.doubled().relax(torch.cat([drive, drive]), torch.cat([y, y]), [torch.cat([s, s]) for s in free], T2, signs, criterion)
    return zip(*(s.chunk(2) for s in both))


@torch.no_grad()
def ep_gradients(model, x, y, T1, T2, betas, criterion, thirdphase=False, tol=0.0, account=None, twin=None):
    """Equilibrium Propagation on one mini-batch: fills p.grad and returns the free neurons.

    A free phase of T1 steps at betas[0] from zero neurons; from there a nudged phase of T2 steps at betas[1], and with
    `thirdphase` a second one at -betas[1], whose contrast has no error of first order in beta.
    """
    x, account, (beta_1, beta_2), moving = converted(model, x), account or Account(), betas, twin or model
    drive, free = free_phase(moving, x, y, T1, beta_1, criterion, tol, account)
    with account.time("nudged"):
        if thirdphase:
            states = [free, *nudged_phases(moving, drive, y, free, T2, beta_2, criterion)]
        else:
            states = [free, moving.relax(drive, y, free, T2, beta_2, criterion)]
    with account.time("update"), exactly():
        free, nudged, *opposite = ([s.to(x.dtype) for s in state] for state in states)
        if thirdphase:
            model.compute_syn_grads(x, y, free, nudged, (beta_2, -beta_2), criterion, neurons_3=opposite[0])
        else:
            model.compute_syn_grads(x, y, free, nudged, betas, criterion)
    return free


def bptt_gradients(model, x, y, T1, T2, criterion, tol=0.0, account=None, twin=None):
    """Back-propagation through the last T2 of T1 free steps on one mini-batch: fills p.grad and returns the neurons, of
    which the output is as of T1 steps (the layers below it as of a few steps earlier, see `relax`)."""
    x, account, moving = converted(model, x), account or Account(), twin or model
    neurons = free_phase(moving, x, None, T1 - T2, 0.0, criterion, tol, account, output_in=T2)[1] if T1 > T2 else None
    with account.time("BPTT"):
        neurons = moving.relax(moving.input_drive(x), None, neurons, T2, 0.0, criterion, output_in=0)
        moving.zero_grad()
        moving.loss(neurons, y, criterion).mean().backward()
        for p, q in zip(model.parameters(), moving.parameters()):
            if q.grad is None:  # T2 steps do not reach it; momentum and weight decay do
                q.grad = torch.zeros_like(q)
            if p is not q:
                p.grad = q.grad.to(p.dtype)
    return [n.detach().to(x.dtype) for n in neurons]


@torch.no_grad()
def cep_updates(model, optimizer, x, y, T1, T2, betas, criterion, thirdphase=False, tol=0.0, account=None, average=lambda: None):
    """Continual Equilibrium Propagation on one mini-batch (Ernoult et al., 2020): in the nudged phase every step changes the weights
    at once, by its own share of the EP update, lr * [dPhi(s(t+1))/dp - dPhi(s(t))/dp] / (beta_2 - beta_1). With `thirdphase` a phase at
    beta_2 and one at -beta_2, each from the free neurons and each with half of the rate. As the rates go to zero the sum of the changes
    tends to that of EP. Returns the free neurons.

    Leaves p.grad at zero: a step of the optimizer (sgd without momentum) that follows decays the weights and does nothing else.
    average: called whenever p.grad is filled and before it is used.
    """
    x, account, (beta_1, beta_2) = converted(model, x), account or Account(), betas
    free = free_phase(model, x, y, T1, beta_1, criterion, tol, account)[1]
    phases = (beta_2, -beta_2) if thirdphase else (beta_2,)
    for beta in phases:
        state = free
        for t in range(T2):
            with account.time("nudged"):
                before, state = state, model.relax(model.input_drive(x), y, state, 1, beta, criterion)
            with account.time("update"):
                model.compute_syn_grads(x, y, free, before, (beta_1, beta), criterion, check_thm=t > 0, neurons_3=state)
                average()
                for group in optimizer.param_groups:
                    for p in group["params"]:
                        p.sub_(p.grad, alpha=group["lr"] / len(phases))
    for p in model.parameters():
        p.grad.zero_()
    return free


def draw_masks(model, keep, mbs, rows=slice(None)):
    """Masks for `EnergyModel.dropped`, drawn anew for each of mbs samples: 0 with probability 1 - keep, else 1 / keep. Drawn on the CPU,
    for the whole mini-batch, so that they are the same on every device and for any number of workers, which keep their own `rows`.
    keep: a number in (0, 1] for each connection, the read-out being the last."""
    weight, connections = model.synapses[0].weight, [*model.connections, *([model.output] if model.softmax else [])]
    masks = [None if p == 1 else ((torch.rand(mbs, *c.pre_shape)[rows] < p) / p).to(weight.device, weight.dtype) for c, p in zip(connections, keep)]
    return [m.contiguous(memory_format=torch.channels_last) if m is not None and m.dim() == 4 else m for m in masks]


def lowered(model, dtype):
    """A copy of the model in another precision, for the time steps; `refresh` gives it the model's present weights."""
    return copy.deepcopy(model).to(dtype)


@torch.no_grad()
def refresh(twin, model):
    torch._foreach_copy_(list(twin.parameters()), list(model.parameters()))


# ------------------------------------------------------------------------------------------------ EP against BPTT (gducheck)


def bptt_contributions(model, x, y, T1, T2, beta, criterion):
    """What each of the last T2 of T1 free steps contributes to the gradient of the loss, by one backward pass.

    Every step gets parameters of its own, that share the model's memory, so that one pass keeps their gradients apart.
    Returns a dict: each parameter's name -> (T2, *shape), the gradient of the mean loss through the k-th step from the end;
    `neurons_i` -> (T2, mbs, *shape of the layer), minus the gradient of each sample's loss with respect to that layer k steps
    before the end. Time T2 forward and backward steps; memory the graph of T2 steps and the result, T2 times parameters and neurons.
    """
    neurons = model(x, y, None, T1 - T2, beta, criterion)
    steps, states = [], []
    for _ in range(T2):
        steps.append({name: p.detach().requires_grad_() for name, p in model.named_parameters()})
        neurons = torch.func.functional_call(model, steps[-1], (x, y, neurons, 1, beta, criterion, True))
        states.append(neurons)
    with torch.enable_grad():  # the read-out is part of the loss and counts as the last step's
        loss = torch.func.functional_call(_Loss(model), {f"model.{name}": p for name, p in steps[-1].items()}, (neurons, y, criterion))
    wanted = [*(p for step in steps for p in step.values()), *(s for state in states for s in state)]
    grads = torch.autograd.grad(loss, wanted, allow_unused=True)
    names = [name for step in steps for name in step] + [f"neurons_{i}" for i in range(len(neurons))] * T2
    result, filled = {}, dict.fromkeys(names, T2)
    for name, like, grad in zip(names, wanted, grads):
        if name not in result:
            result[name] = like.new_empty(T2, *like.shape, requires_grad=False)
        filled[name] -= 1  # from the last step back
        entry = result[name][filled[name]]
        if grad is None:
            entry.zero_()
        elif name.startswith("neurons_"):
            torch.mul(grad, -x.size(0), out=entry)
        else:
            entry.copy_(grad)
    return result


class _Loss(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, neurons, y, criterion):
        return self.model.loss(neurons, y, criterion).mean()


def ep_contributions(model, x, y, T1, T2, betas, criterion):
    """The EP update between successive steps of the nudged phase, in the form of `bptt_contributions`: entry k is that of the
    k-th nudged step, which the theorem holds against the k-th free step from the end. p.grad is left as it is.

    For the neurons it is (s(k+1) - s(k)) / (beta_2 - beta_1), which tends to minus the gradient times the activation's slope.
    """
    kept = [p.grad for p in model.parameters()]
    state = model(x, y, None, T1, betas[0], criterion)
    result = {name: [] for name in [*dict(model.named_parameters()), *(f"neurons_{i}" for i in range(len(state)))]}
    for _ in range(T2):
        before, state = state, model(x, y, state, 1, betas[1], criterion)
        model.compute_syn_grads(x, y, before, state, betas, criterion, check_thm=True)
        for name, p in model.named_parameters():
            result[name].append(p.grad.clone())
        for i, (a, b) in enumerate(zip(before, state)):
            result[f"neurons_{i}"].append((b - a) / (betas[1] - betas[0]))
    for p, grad in zip(model.parameters(), kept):
        p.grad = grad
    return {name: torch.stack(values) for name, values in result.items()}


def check_gdu(model, x, y, T1, T2, betas, criterion, alg="EP"):
    """EP's updates step by step, and what BPTT says they should be (Ernoult et al., 2019).

    Returns (BPTT, EP), dicts over parameter names and `neurons_i`, time first: see `bptt_contributions` for shapes, time and
    memory, and `ep_contributions`. The model and its p.grad are left as they are. `alg`: EP is all there is to compare.
    """
    if alg != "EP":
        raise ValueError(f"gducheck compares EP with BPTT, not {alg}")
    if T2 > T1:
        raise ValueError(f"BPTT goes back through at most T1 = {T1} steps, got T2 = {T2}")
    x = converted(model, x)
    return bptt_contributions(model, x, y, T1, T2, betas[0], criterion), ep_contributions(model, x, y, T1, T2, betas, criterion)


def cosine(a, b):
    """The cosine similarity of two tensors of any one shape."""
    return F.cosine_similarity(a.flatten().double(), b.flatten().double(), dim=0, eps=1e-30).item()


def compare_gdu(BPTT, EP, estimate):
    """How far an EP estimate is from BPTT: a list of dicts, one per parameter and layer, with

    rmse        root mean square over time of their difference, divided by the larger of their own, mean over the entries
    sign_error  share of entries and times where their signs differ
    cosine, distance    between the sums over time: cosine similarity, and ||EP - BPTT|| / ||BPTT||; nan where T2 steps of
                        BPTT do not reach the parameter or layer
    """
    rows = []
    for name, bptt in BPTT.items():
        ep, bptt = EP[name].double(), bptt.double()
        rms = lambda v: v.pow(2).mean(0).sqrt()  # noqa: E731
        larger = torch.maximum(rms(ep), rms(bptt))
        total_ep, total_bptt = ep.sum(0).flatten(), bptt.sum(0).flatten()
        rows.append({"name": name, "estimate": estimate,
                     "rmse": (rms(ep - bptt) / (larger + 1e-30)).mean().item(),
                     "sign_error": (ep * bptt < 0).double().mean().item(),
                     "cosine": cosine(total_ep, total_bptt) if total_bptt.any() else float("nan"),
                     "distance": ((total_ep - total_bptt).norm() / total_bptt.norm()).item() if total_bptt.any() else float("nan")})
    return rows


def gdu_report(model, x, y, args, criterion):
    """Both sides of gducheck for the arguments T1, T2, betas and thirdphase. Returns (rows of `compare_gdu`, BPTT, [EP at
    beta_2, and with thirdphase EP at -beta_2])."""
    beta_1, beta_2 = args.betas
    BPTT, EP = check_gdu(model, x, y, args.T1, args.T2, (beta_1, beta_2), criterion)
    runs, rows = [EP], compare_gdu(BPTT, EP, "one-sided")
    if args.thirdphase:
        runs.append(ep_contributions(model, x, y, args.T1, args.T2, (beta_1, -beta_2), criterion))
        rows += compare_gdu(BPTT, {name: (EP[name] + runs[1][name]) / 2 for name in EP}, "symmetric")
    return rows, BPTT, runs


# ------------------------------------------------------------------------------------------------------ loops over the data


def check_finite(model, neurons, epoch, batch):
    """Raises RunError, naming epoch, batch and layer, if a neuron or a weight is not finite any more."""
    if torch.nn.utils.get_total_norm([*model.parameters(), *neurons]).isfinite():
        return
    tensors = [*model.named_parameters(), *((f"neurons of layer {n}", s) for n, s in enumerate(neurons, 1))]
    broken = [name for name, tensor in tensors if not tensor.isfinite().all()]
    if broken:
        raise RunError(f"training diverged in epoch {epoch}, batch {batch}: no longer finite are {', '.join(broken)}; "
                       "smaller --lrs usually help, or a smaller --scale or beta")


@torch.no_grad()
def correct(model, neurons, y):
    """How many of the mini-batch are classified as `y`, a tensor without dimensions."""
    return (model.readout(neurons).argmax(1) == y).sum()


@torch.no_grad()
def predicting_neurons(model, x, T, criterion, tol=0.0, account=None):
    """The neurons whose read-out is the prediction after T free steps; with `tol` after at most T, see `EnergyModel.settle`."""
    if tol:
        return free_phase(model, x, None, T, 0.0, criterion, tol, account)[1]
    return model(x, None, None, T, criterion=criterion, output_in=0)


@torch.no_grad()
def evaluate(model, batches, T1, criterion, description="evaluating", tol=0.0, account=None, workers=Workers()):
    """The share of images that are classified correctly after T1 free steps (with `tol`: at most, see `EnergyModel.settle`).
    `workers` take whole mini-batches in turn, so that each rounds as it does for one. Of no image: nan."""
    hits = 0
    for x, y in workers.deal(progress(batches, description)):
        hits += correct(model, predicting_neurons(model, x, T1, criterion, tol, account), y)
    hits = int(workers.sum(hits))
    return hits / batches.samples if batches.samples else math.nan


def log_theorem(model, x, y, args, criterion, epoch, batch, run):
    """gducheck on a few images while training: a line in the log, and rows of gducheck.csv. Changes nothing that training uses."""
    with exactly():
        rows = gdu_report(model, x, y, args, criterion)[0]
    best = [row for row in rows if row["estimate"] == rows[-1]["estimate"] and not row["name"].startswith("neurons_")]
    worst = min(best, key=lambda row: row["cosine"] if row["cosine"] == row["cosine"] else 2)  # nan: not reached
    progress.write(f"epoch {epoch}, batch {batch}: EP ({worst['estimate']}) against BPTT: cosine at least {worst['cosine']:.3f} "
                   f"({worst['name']}), RMSE on average {sum(row['rmse'] for row in best) / len(best):.3f}")
    if run:
        run.append_csv("gducheck.csv", [{"epoch": epoch, "batch": batch, **row} for row in rows])


def gradients(model, x, y, args, criterion, account=None, twin=None, optimizer=None, workers=Workers()):
    """Fills p.grad from one mini-batch by the learning rule in args (alg, T1, T2, betas, random_sign, thirdphase, dropouts, tol); CEP,
    which needs the optimizer, changes the weights as well. Of several workers each takes a share, and p.grad becomes the mean.

    Returns the neurons of the free phase, how many samples they classify correctly (a tensor without dimensions), both of this worker's
    share, and how many samples that is."""
    n, rows, mine = len(y), *workers.rows(len(y))
    x, y, whole, account = x[rows], y[rows], model, account if mine else None
    if args.dropouts:
        masks = draw_masks(model, args.dropouts, n, rows)
        model = model.dropped(masks)
        twin = twin and twin.dropped([m if m is None else m.to(twin.synapses[0].weight.dtype) for m in masks])
    beta_1, beta_2 = args.betas
    if args.random_sign and torch.rand(()) < 0.5:
        beta_2 = -beta_2
    rule = (args.T1, args.T2, (beta_1, beta_2), criterion, args.thirdphase, args.tol, account)
    if args.alg == "CEP":
        neurons = cep_updates(model, optimizer, x, y, *rule, average=lambda: workers.average_gradients(whole, mine, n))
    elif args.alg == "EP":
        neurons = ep_gradients(model, x, y, *rule, twin)
    else:
        neurons = bptt_gradients(model, x, y, args.T1, args.T2, criterion, args.tol, account, twin)
    if args.alg != "CEP":
        with (account or Account()).time("update"):
            workers.average_gradients(whole, mine, n)
    return neurons, correct(model, neurons, y), mine


def train_epoch(model, optimizer, batches, args, criterion, epoch, run=None, account=None, twin=None, workers=Workers()):
    """One pass over the data. Returns the accuracy (a share) of the free phases on the way, and the last batch's neurons, of several
    `workers` those of this one's share."""
    account, hits, seen = account or Account(), 0, 0
    bar = progress(account.watch(batches, "data"), f"epoch {epoch}", len(batches))
    every = -(-len(batches) // 10)
    for batch, (x, y) in enumerate(bar, 1):
        if workers.rank == 0 and args.check_thm and args.alg == "EP" and (batch - 1) % every == 0:
            log_theorem(model, x[:5], y[:5], args, criterion, epoch, batch, run)
        neurons, right, mine = gradients(model, x, y, args, criterion, account, twin, optimizer, workers)
        with torch.no_grad(), account.time("update"):
            hits, seen = hits + right * min(mine, 1), seen + mine
            optimizer.step()
            if twin:
                refresh(twin, model)
            check_finite(model, neurons, epoch, batch)
        bar.set_postfix_str(f"train {100 * int(hits) / max(seen, 1):.2f} %", refresh=False)
    return int(workers.sum(hits)) / batches.samples, neurons


def snapshot(model, args, history, optimizer=None, scheduler=None, generator=None):
    """What is written down of a run after len(history) epochs; with the optimizer and what follows, all that resuming needs."""
    state = {"model_state_dict": model.state_dict(), "config": vars(args), "epoch": len(history), "history": history,
             "train_acc": [row["train_acc"] for row in history], "test_acc": [row["test_acc"] for row in history],
             "best": best_of(history)}
    if optimizer is not None:
        state.update(opt=optimizer.state_dict(), scheduler=scheduler and scheduler.state_dict(), random_states=random_states(generator))
    return state


def best_of(history):
    return max((row["test_acc"] for row in history), default=-1.0)


def train(model, optimizer, train_batches, test_batches, args, scheduler=None, run=None, history=None, workers=Workers()):
    """Trains for args.epochs epochs after those in `history`, to which it appends: a list of dicts, a row of metrics.csv each.

    args: alg, T1, T2, betas, random_sign, thirdphase, dropouts, tol, precision, loss, epochs, and what else is to be written down. run: the
    `data_utils.Run` to write to after every epoch, or None. workers: those that share every mini-batch; the updates are those of one.
    Raises RunError when neurons or weights stop being finite.
    """
    criterion, whole = make_criterion(args.loss), Account()
    device = next(model.parameters()).device
    twin = lowered(model, torch.bfloat16) if args.precision == "bf16" else None
    if args.precision != "fp32":
        report_precision(model, train_batches, args, criterion, twin, workers)
    history = [] if history is None else history
    last = len(history) + args.epochs
    for epoch in range(len(history) + 1, last + 1):
        start, account = time.perf_counter(), Account(device)
        train_acc, neurons = train_epoch(model, optimizer, train_batches, args, criterion, epoch, run, account, twin, workers)
        if scheduler is not None and scheduler.last_epoch < scheduler.T_max:  # it would rise again behind its minimum
            scheduler.step()
        spent = time.perf_counter() - start
        with account.time("evaluation"):
            test_acc = evaluate(twin or model, test_batches, args.T1, criterion, tol=args.tol, workers=workers)
        account.pool(workers)
        row = {"epoch": epoch, "train_acc": round(100 * train_acc, 4), "test_acc": round(100 * test_acc, 4),
               "seconds": round(time.perf_counter() - start, 2), **account.used()}
        angles = model.angles()
        row.update((f"angle_{n}", round(angle, 3)) for n, angle in enumerate(angles, 2))
        improved = row["test_acc"] > best_of(history)
        if run:
            finish_epoch(run, snapshot(model, args, [*history, row]), neurons, improved, epoch == last,
                         snapshot(model, args, [*history, row], optimizer, scheduler, train_batches.generator))
        history.append(row)
        whole.add(account)
        print(f"epoch {epoch}/{last}: train {row['train_acc']:.2f} %, test {row['test_acc']:.2f} %, {row['seconds']:.1f} s, "
              f"{train_batches.samples / spent:.0f} images/s" + (f", {account.settled()}" if account.images else "")
              + (", angles " + " ".join(f"{a:.1f}" for a in angles) if angles else ""), flush=True)
    print(f"time: {whole.shares()}", flush=True)


def report_precision(model, batches, args, criterion, twin, workers=Workers()):
    """Prints how far the gradients of a mini-batch in args.precision are from those in fp32. Leaves random numbers as they are."""
    images, labels = (t[:batches.mbs] for t in (batches.images, batches.labels))
    x, found = batches.normalise(images.float() / 255), []
    state = torch.get_rng_state()
    for name, in_it in (("fp32", None), (args.precision, twin)):
        set_precision(name)
        torch.set_rng_state(state)
        gradients(model, x, labels, args, criterion, twin=in_it, workers=workers)
        found.append({name: p.grad.clone() for name, p in model.named_parameters()})
    torch.set_rng_state(state)
    cosines = {name: cosine(a, found[1][name]) for name, a in found[0].items()}
    worst = min(cosines, key=cosines.get)
    print(f"{args.precision} against fp32 at beta {args.betas[1]:g}: gradient cosine at least {cosines[worst]:.4f} ({worst})", flush=True)


def finish_epoch(run, state, neurons, improved, final, checkpoint):
    """Writes an epoch to the run folder. The checkpoint comes last: before it, resuming repeats the epoch and writes all again."""
    run.write_csv("metrics.csv", state["history"])
    run.plot_accuracy(state["history"])
    run.plot_activity(neurons)
    if improved:
        run.save("model.pt", state)
    if final:
        run.save("final_model.pt", state)
        run.save("final_checkpoint.tar", checkpoint)
    run.save("checkpoint.tar", checkpoint)


SETTLED = 1e-4  # an image has settled once no layer moves by more than this share of its norm in a step


@torch.no_grad()
def characteristic(model, batches, T1, criterion, eps=SETTLED, description="characteristic"):
    """After t = 1 ... T1 free steps from zero: the share of images classified correctly, as `evaluate` says it for that t, and
    the share that has settled by then, having moved by less than `eps` in some step (see `relative_change`). Two lists of T1."""
    hits, settled = torch.zeros(2, T1, dtype=torch.int64, device=batches.labels.device)
    for x, y in progress(batches, description):
        drive, neurons = model.input_drive(x), model.init_neurons(len(y), x.device)
        still = torch.zeros(len(y), dtype=torch.bool, device=x.device)
        stepping, drive, _ = model.rescaled(drive, T1, 0.0, criterion)
        stepping = stepping.packed(drive, T1)  # rounds as `evaluate` does
        for t in range(T1):
            before, neurons = neurons, stepping.relax(drive, None, neurons if t else None, 1, 0.0, criterion)
            still |= relative_change(before, neurons) < eps
            hits[t] += correct(model, neurons, y)
            settled[t] += still.sum()
    return [[int(count) / batches.samples for count in counts] for counts in (hits, settled)]


# ----------------------------------------------------------------------------------------------------------------- attacks


def attack(model, images, labels, args, eps, task, description, workers=Workers()):
    """Attacks every image (uint8 (n, C, H, W) and labels, tensors) at one eps, with each of args.attack_grad.

    Returns {grad: result, ..., "worst": result}, `worst` taking for each image the strongest of all; a result holds `correct` (n,)
    bool, `x_adv`, `prediction`, and the shares `masked` (gradient exactly zero or not finite at some iteration) and `unmoved`
    (perturbation zero), and `mean_norm`. Memory is that of one mini-batch. `worst` is left out where there is one gradient.
    `workers` take whole mini-batches in turn, and all get the results. What an attack draws follows from args.seed and
    the place of the mini-batch: it is the same for every eps and gradient, any number of workers, and wherever a sweep
    goes on.
    """
    import numpy as np

    from ART_Timesteps_Addition import attacks
    results, n, criterion = {}, len(images), make_criterion(args.loss)
    x, y = (images.float() / 255).numpy(), labels.numpy()
    steps = args.predict_step or args.T1
    predict = functools.partial(predicting_neurons, model, T=steps, criterion=criterion, tol=args.tol)
    for grad in args.attack_grad:
        classifier = attacks.make_classifier(model, criterion, args, eps, grad, task, predict)
        parts = [attacks.attack_batch(classifier, x[i:i + args.mbs], y[i:i + args.mbs], args, eps, (args.seed, i))
                 for i in workers.deal(progress(range(0, max(n, 1), args.mbs), f"{description}, {grad}"))]
        parts = workers.collect(parts)
        x_adv, prediction = (np.concatenate([part[key] for part in parts]) for key in ("x_adv", "prediction"))
        masked = sum(part["masked"] for part in parts) / max(n, 1)
        results[grad] = {"x_adv": x_adv, "prediction": prediction, "masked": masked}
    if len(results) > 1:
        results["worst"] = attacks.worst_of(list(results.values()), y)
    for result in results.values():
        moved = attacks.norms(result["x_adv"] - x, args.attack_norm)
        result.update(correct=result["prediction"] == y, unmoved=int((moved == 0).sum()) / max(n, 1),
                      mean_norm=float(moved.mean()) if n else 0.0)
    return results


@torch.no_grad()
def predictions(model, batches, T1, criterion, tol=0.0, workers=Workers()):
    """The predicted class of every image, (n,), on the CPU; `workers` take whole mini-batches in turn, and all get all."""
    own = [model.readout(predicting_neurons(model, x, T1, criterion, tol)).argmax(1).cpu() for x, _ in workers.deal(batches)]
    return torch.cat(workers.collect(own))
