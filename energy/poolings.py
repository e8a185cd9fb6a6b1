"""Poolings of 2x2 windows with stride 2, as linear maps.

Once its route is known (the winners of a max-pooling, None elsewhere), a pooling is a linear map
of a feature map u, (mbs, C, H, W):

    pool(u)                      the pooled map, (mbs, C, h, w), and the route
    follow(u, route)             the linear map
    adjoint(post, route, size)   its adjoint, into a map of `size` (H, W)

Feature maps are channels-last in memory.
"""

from collections.abc import Callable
from typing import Any, Protocol

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]


class Pooling(Protocol):
    """What the module above describes. routed: whether the route depends on what is pooled."""

    routed: bool

    def __call__(self, u: Tensor) -> Tensor: ...

    def pool(self, u: Tensor) -> tuple[Tensor, Tensor | None]: ...

    def follow(self, u: Tensor, route: Any) -> Tensor: ...

    def adjoint(self, post: Tensor, route: Any, size: Size) -> Tensor: ...

    def prepare(self, size: Size) -> None: ...


class MaxPool(nn.MaxPool2d):
    """The largest entry of each 2x2 window, of equal ones the first. The route is one of

    - the index of each winner in its map, (mbs, C, h, w) int64, which PyTorch's poolings follow
      fastest on a CPU;
    - a mask of the winners, (mbs, h, 2, w, 2, C) bool, in the layout of the map: on a GPU, where
      `max_unpool2d` copies its arguments and loses the layout, and indices take twice the memory.

    masks: whether the route is a mask; None: where the map is on a CUDA device.
    """

    routed = True
    places: Tensor | None  # index in the map of each entry of each window, (1, h, 2, w, 2, 1)
    zero: Tensor | None

    def __init__(self, masks: bool | None = None) -> None:
        super().__init__(2, 2)
        self.masks = masks
        for name in ("places", "zero"):  # allocated once, not at every step
            self.register_buffer(name, None, persistent=False)

    def prepare(self, size: Size) -> None:
        """Allocate what maps of `size` (H, W) need."""
        self.places = self._places(size, None)
        self.zero = torch.zeros(())

    @staticmethod
    def _places(size: Size, device: torch.device | None) -> Tensor:
        return _windows(torch.arange(size[0] * size[1], device=device).view(1, *size, 1))

    def pool(self, u: Tensor) -> tuple[Tensor, Tensor]:
        post, index = F.max_pool2d(u, 2, 2, return_indices=True)  # (mbs, C, h, w)
        if not (u.is_cuda if self.masks is None else self.masks):
            return post, index
        places = self.places
        if places is None or places.shape[1:4:2] != post.shape[2:]:
            places = self._places((u.size(2), u.size(3)), u.device)
        # From PyTorch's indices, which are freed immediately. Comparing the entries with `post`
        # would mark all of several equal entries; keeping the first takes three more operations
        # and more memory traffic than the indices.
        return post, _spread(index) == places  # (mbs, h, 2, w, 2, C)

    def follow(self, u: Tensor, route: Any) -> Tensor:
        if route.dtype == torch.bool:
            pixels = _windows(u.permute(0, 2, 3, 1))  # (mbs, h, 2, w, 2, C)
            return torch.where(route, pixels, self._zero(u)).sum((2, 4)).permute(0, 3, 1, 2)
        # gathered with the channels innermost, as channels-last memory lies
        pixels = u.permute(0, 2, 3, 1).flatten(1, 2)  # (mbs, H * W, C)
        index = route.permute(0, 2, 3, 1).flatten(1, 2)  # (mbs, h * w, C)
        return pixels.gather(1, index).unflatten(1, route.shape[2:]).permute(0, 3, 1, 2)

    def adjoint(self, post: Tensor, route: Any, size: Size) -> Tensor:
        if route.dtype == torch.bool:
            spread = torch.where(route, _spread(post), self._zero(post))  # (mbs, h, 2, w, 2, C)
            return padded(spread.flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2), size)
        if torch.are_deterministic_algorithms_enabled():
            return self._scattered(post, route, size)
        u = F.max_unpool2d(post, route, [2, 2], [2, 2], output_size=list(size))  # (mbs, C, H, W)
        # a copy only where post was 1x1, which has no layout
        return u.contiguous(memory_format=torch.channels_last)

    @staticmethod
    def _scattered(post: Tensor, route: Any, size: Size) -> Tensor:
        """The same for deterministic algorithms: torch does not know that windows of stride 2
        share no pixel, and refuses `max_unpool2d`."""
        pixels = post.new_zeros(post.size(0), size[0] * size[1], post.size(1))  # (mbs, H * W, C)
        sample = torch.arange(post.size(0), device=post.device).view(-1, 1, 1)
        channel = torch.arange(post.size(1), device=post.device)
        index = route.permute(0, 2, 3, 1).flatten(1, 2)  # (mbs, h * w, C)
        pixels[sample, index, channel] = post.permute(0, 2, 3, 1).flatten(1, 2)
        return pixels.unflatten(1, size).permute(0, 3, 1, 2)

    def _zero(self, like: Tensor) -> Tensor:
        return like.new_zeros(()) if self.zero is None else self.zero


def _windows(pixels: Tensor) -> Tensor:
    """The 2x2 windows of a map (mbs, H, W, C), (mbs, h, 2, w, 2, C): a view, without an odd last
    row or column."""
    h, w = pixels.size(1) // 2, pixels.size(2) // 2
    return pixels[:, : 2 * h, : 2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2))


def _spread(post: Tensor) -> Tensor:
    """A pooled map repeated over its windows, (mbs, h, 1, w, 1, C): a view."""
    return post.permute(0, 2, 3, 1).unsqueeze(3).unsqueeze(2)


def padded(u: Tensor, size: Size) -> Tensor:
    """The map with zeros behind its last row and column, up to `size`: an odd one was in no
    window."""
    rows, columns = size[0] - u.size(2), size[1] - u.size(3)
    return F.pad(u, (0, columns, 0, rows)) if rows or columns else u


class Fixed:
    """Base of a pooling whose linear map does not depend on what it pools: an nn.Module with
    `forward` and `adjoint`."""

    routed = False

    def prepare(self, size: Size) -> None:
        """Nothing to allocate."""

    def pool(self: Any, u: Tensor) -> tuple[Tensor, None]:
        """(the pooled map, no route)."""
        return self(u), None

    def follow(self: Any, u: Tensor, route: None) -> Tensor:
        """The linear map, which is the pooling itself."""
        return self(u)


class AvgPool(Fixed, nn.AvgPool2d):
    """The mean of each 2x2 window."""

    def __init__(self) -> None:
        super().__init__(2, 2)

    def adjoint(self, post: Tensor, route: Any, size: Size) -> Tensor:
        u = F.interpolate(post, scale_factor=2, mode="nearest") * 0.25
        return padded(u, size)


class NoPool(Fixed, nn.Identity):
    """The map as it is."""

    def adjoint(self, post: Tensor, route: Any, size: Size) -> Tensor:
        return post


POOLS: dict[str, Callable[[], nn.Module]] = {"m": MaxPool, "a": AvgPool, "i": NoPool}


def make_pools(letters: str) -> nn.ModuleList:
    """A pooling per convolution: `m` maximum, `a` average (both 2x2 with stride 2), `i` none.
    Raises ValueError for other letters."""
    unknown = sorted(set(letters) - set(POOLS))
    if unknown:
        raise ValueError(f"unknown pooling {' '.join(unknown)}: use one of {' '.join(POOLS)}")
    return nn.ModuleList([POOLS[letter]() for letter in letters])
