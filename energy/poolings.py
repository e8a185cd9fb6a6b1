"""Poolings of 2x2 windows with stride 2, as linear maps.

A pooling is a linear map of a map u, (mbs, C, H, W), once its route is known (the winners of a max-pooling, None
elsewhere): `pool(u)` gives the pooled map and the route, `follow(u, route)` is the linear map, `adjoint(post, route,
size)` its adjoint, into a map of `size` (H, W). A map is channels-last in memory.
"""
import torch
import torch.nn as nn
import torch.nn.functional as F


class MaxPool(nn.MaxPool2d):
    """The largest entry of each 2x2 window, of equal ones the first. The route is one of

    - the index of each winner in its map, (mbs, C, h, w), which PyTorch's poolings follow fastest on a CPU;
    - a mask of the winners, (mbs, h, 2, w, 2, C) bool, in the layout of the map: on a GPU, where `max_unpool2d` copies
      its arguments and loses the layout, and indices take twice the memory.

    masks: whether it is a mask; None: where the map is on a CUDA device.
    """

    routed = True  # the route depends on what is pooled

    def __init__(self, masks=None):
        super().__init__(2, 2)
        self.masks = masks
        for name in ("places", "zero"):  # made once: a step is to make nothing, nor to bring it to the device
            self.register_buffer(name, None, persistent=False)

    def prepare(self, size):
        """Makes ready for maps of `size` (H, W)."""
        self.places, self.zero = self._places(size, None), torch.zeros(())

    @staticmethod
    def _places(size, device):
        """The index in the map of each entry of each window, (1, h, 2, w, 2, 1)."""
        return _windows(torch.arange(size[0] * size[1], device=device).view(1, *size, 1))

    def pool(self, u):
        post, index = F.max_pool2d(u, self.kernel_size, self.stride, return_indices=True)
        if not (u.is_cuda if self.masks is None else self.masks):
            return post, index
        places = self.places
        if places is None or places.shape[1:4:2] != post.shape[2:]:
            places = self._places(u.shape[2:], u.device)
        # By way of PyTorch's indices, which are gone at once. Comparing the entries with `post` instead marks all of
        # equal ones, and to keep the first takes three more operations, and more traffic than the indices.
        return post, _spread(index) == places

    def follow(self, u, route):
        if route.dtype == torch.bool:
            pixels = _windows(u.permute(0, 2, 3, 1))
            return torch.where(route, pixels, self._zero(u)).sum((2, 4)).permute(0, 3, 1, 2)
        # gathered with the channels innermost, which is how channels-last memory lies
        pixels = [t.permute(0, 2, 3, 1).flatten(1, 2) for t in (u, route)]
        return pixels[0].gather(1, pixels[1]).unflatten(1, route.shape[2:]).permute(0, 3, 1, 2)

    def adjoint(self, post, route, size):
        if route.dtype == torch.bool:
            u = torch.where(route, _spread(post), self._zero(post)).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)
            return _padded(u, size)
        if torch.are_deterministic_algorithms_enabled():  # torch does not know that windows of stride 2 share no pixel
            pixels = post.new_zeros(post.size(0), size[0] * size[1], post.size(1))
            index = tuple(torch.arange(n, device=post.device) for n in (post.size(0), post.size(1)))
            route, post = (t.permute(0, 2, 3, 1).flatten(1, 2) for t in (route, post))
            pixels[index[0].view(-1, 1, 1), route, index[1]] = post
            return pixels.unflatten(1, size).permute(0, 3, 1, 2)
        u = F.max_unpool2d(post, route, self.kernel_size, self.stride, output_size=size)
        return u.contiguous(memory_format=torch.channels_last)  # a copy only where post was 1x1, which has no layout

    def _zero(self, like):
        return like.new_zeros(()) if self.zero is None else self.zero


def _windows(pixels):
    """The 2x2 windows of a map (mbs, H, W, C), (mbs, h, 2, w, 2, C): a view, without an odd last row or column."""
    h, w = (n // 2 for n in pixels.shape[1:3])
    return pixels[:, :2 * h, :2 * w].unflatten(2, (w, 2)).unflatten(1, (h, 2))


def _spread(post):
    """A pooled map as one that repeats in all windows, (mbs, h, 1, w, 1, C): a view."""
    return post.permute(0, 2, 3, 1).unsqueeze(3).unsqueeze(2)


def _padded(u, size):
    """The map with zeros behind its last row and column, up to `size`: an odd one was in no window."""
    missing = size[0] - u.size(2), size[1] - u.size(3)
    return F.pad(u, (0, missing[1], 0, missing[0])) if any(missing) else u


class AvgPool(nn.AvgPool2d):
    """The mean of each 2x2 window."""

    routed = False

    def pool(self, u):
        return self(u), None

    def follow(self, u, route):
        return self(u)

    def adjoint(self, post, route, size):
        u = F.interpolate(post, scale_factor=2, mode="nearest") * 0.25
        return _padded(u, size)


class NoPool(nn.Identity):
    """The map as it is."""

    routed = False

    def pool(self, u):
        return u, None

    def follow(self, u, route):
        return u

    def adjoint(self, post, route, size):
        return post


POOLS = {"m": MaxPool, "a": lambda: AvgPool(2, 2), "i": NoPool}


def make_pools(letters):
    """A pooling per convolution: `m` maximum, `a` average (both 2x2 with stride 2), `i` none. Raises ValueError for
    other letters."""
    unknown = sorted(set(letters) - set(POOLS))
    if unknown:
        raise ValueError(f"unknown pooling {' '.join(unknown)}: use m (max), a (average) or i (none)")
    return nn.ModuleList([POOLS[letter]() for letter in letters])
