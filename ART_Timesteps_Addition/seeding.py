"""Reproducible random numbers for code that seeds itself."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch


@contextlib.contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """A block in which these whole numbers, of at least 0, determine all random numbers.

    It covers the generators of Python, NumPy and PyTorch, and new ones of NumPy without a seed,
    such as those of ART's HopSkipJump. Afterwards all states are restored."""
    sequence = np.random.SeedSequence(numbers)
    originals = np.random.RandomState, np.random.default_rng

    def next_seed() -> np.ndarray:
        return sequence.spawn(1)[0].generate_state(4)

    class RandomState(np.random.RandomState):
        def __init__(self, seed: Any = None):
            super().__init__(next_seed() if seed is None else seed)

    def default_rng(seed: Any = None) -> np.random.Generator:
        return originals[1](next_seed() if seed is None else seed)

    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(int(next_seed()[0]))
        np.random.seed(next_seed())
        torch.default_generator.manual_seed(int(next_seed()[0]))
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(int(next_seed()[0]))
        replaceable: Any = np.random  # its types allow no other class
        replaceable.RandomState = RandomState
        replaceable.default_rng = default_rng
        try:
            yield
        finally:
            replaceable.RandomState, replaceable.default_rng = originals
            random.setstate(python_state)
            np.random.set_state(numpy_state)
