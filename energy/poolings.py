"""Poolings of 2x2 windows with stride 2, as linear maps.

A pooling is a linear map of a map u, (mbs, C, H, W), once its route is known (the winners of a max-pooling, None
elsewhere): `pool(u)` gives the pooled map and the route, `follow(u, route)` is the linear map, `adjoint(post, route,
size)` its adjoint, into a map of `size` (H, W).
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class MaxPool(nn.MaxPool2d):
    """The largest entry of each 2x2 window, of equal ones the first. The route is the index of each winner in its
    map."""

    routed = True  # the route depends on what is pooled

    def pool(self, u):
        return F.max_pool2d(u, self.kernel_size, self.stride, return_indices=True)

    def follow(self, u, route):
        # gathered with the channels innermost, which is how channels-last memory lies
        pixels = [t.permute(0, 2, 3, 1).flatten(1, 2) for t in (u, route)]
        return pixels[0].gather(1, pixels[1]).unflatten(1, route.shape[2:]).permute(0, 3, 1, 2)

    def adjoint(self, post, route, size):
        if torch.are_deterministic_algorithms_enabled():  # torch does not know that windows of stride 2 share no pixel
            pixels = post.new_zeros(post.size(0), size[0] * size[1], post.size(1))
            index = tuple(torch.arange(n, device=post.device) for n in (post.size(0), post.size(1)))
            route, post = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (route, post))
            pixels[index[0].view(-1, 1, 1), route, index[1]] = post
            return pixels.unflatten(1, size).permute(0, 3, 1, 2)
        u = F.max_unpool2d(post, route, self.kernel_size, self.stride, output_size=size)
        return u.contiguous(memory_format=torch.channels_last)  # a copy only where post was 1x1, which has no layout


class AvgPool(nn.AvgPool2d):
    """The mean of each 2x2 window."""

    routed = False

    def pool(self, u):
        return self(u), None

    def follow(self, u, route):
        return self(u)

    def adjoint(self, post, route, size):
        u = F.interpolate(post, scale_factor=2, mode="nearest") * 0.25
        return F.pad(u, (0, size[1] - u.size(3), 0, size[0] - u.size(2)))  # an odd last row or column was in no window


class NoPool(nn.Identity):
    """The map as it is."""

    routed = False

    def pool(self, u):
        return u, None

    def follow(self, u, route):
        return u

    def adjoint(self, post, route, size):
        return post


POOLS = {"m": lambda: MaxPool(2, 2), "a": lambda: AvgPool(2, 2), "i": NoPool}


def make_pools(letters):
    """A pooling per convolution: `m` maximum, `a` average (both 2x2 with stride 2), `i` none. Raises ValueError for
    other letters."""
    unknown = sorted(set(letters) - set(POOLS))
    if unknown:
        raise ValueError(f"unknown pooling {' '.join(unknown)}: use m (max), a (average) or i (none)")
    return nn.ModuleList([POOLS[letter]() for letter in letters])
