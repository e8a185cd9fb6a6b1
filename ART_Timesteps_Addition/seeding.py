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
    """A block in which all random numbers follow from these whole numbers, of at least 0.

    It covers the generators of Python, NumPy and PyTorch, and those that NumPy would seed from the
    system, as ART's HopSkipJump makes them. Afterwards all are as they were before."""
    sequence = np.random.SeedSequence(numbers)
    system_seeded = np.random.RandomState
    default_rng = np.random.default_rng

    def next_seed() -> np.ndarray:
        return sequence.spawn(1)[0].generate_state(4)

    class RandomState(system_seeded):
        def __init__(self, seed: Any = None):
            super().__init__(next_seed() if seed is None else seed)

    python_state = random.getstate()
    numpy_state = np.random.get_state()
    devices = [torch.cuda.current_device()] if torch.cuda.is_initialized() else []
    with torch.random.fork_rng(devices):
        random.seed(int(next_seed()[0]))
        np.random.seed(next_seed())
        torch.default_generator.manual_seed(int(next_seed()[0]))
        for device in devices:
            torch.cuda.default_generators[device].manual_seed(int(next_seed()[0]))
        np.random.RandomState = RandomState
        np.random.default_rng = lambda seed=None: default_rng(next_seed() if seed is None else seed)
        try:
            yield
        finally:
            np.random.RandomState = system_seeded
            np.random.default_rng = default_rng
            random.setstate(python_state)
            np.random.set_state(numpy_state)
