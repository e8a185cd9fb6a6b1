"""Values of runs for a comparison: their keys, statistics over seeds."""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple


class Key(NamedTuple):
    """The identity of a value: the measure and, for attacks, their settings.

    measure: clean, seconds, adversarial, audit, audit trusted or corruptions; grad: gradient
    method; steps: time steps that gradients are unrolled through; eps: of corruptions the severity,
    0 for the mean; detail: budget and other settings, as text."""

    measure: str
    attack: str = ""
    norm: str = ""
    grad: str = ""
    steps: str = ""
    eps: float = 0.0
    detail: str = ""


@dataclasses.dataclass
class RunResults:
    """The results of one run. args: {dest: value}; values: in %, `seconds` in s; epochs: [(epoch,
    test accuracy in %)]; characteristic: accuracy in % after 1, 2, ... free steps."""

    args: dict[str, Any]
    values: dict[Key, float] = dataclasses.field(default_factory=dict)
    epochs: list[tuple[int, float]] = dataclasses.field(default_factory=list)
    characteristic: list[float] = dataclasses.field(default_factory=list)


class Statistics(NamedTuple):
    """Mean, standard deviation of the sample (None for one value), and number of values."""

    mean: float
    std: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Statistics:
        std = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), std, len(values))

    def __str__(self) -> str:
        deviation = "" if self.std is None else f" ± {self.std:.2f}"
        return f"{self.mean:.2f}{deviation} ({self.n})"


@dataclasses.dataclass
class Group:
    """Runs that differ in the seed alone. published: whether they are from a published table."""

    label: str
    runs: list[RunResults]
    published: bool = False

    def keys(self) -> list[Key]:
        """The keys that at least one run has, in a stable order."""
        return list(dict.fromkeys(key for run in self.runs for key in run.values))

    def values(self, key: Key) -> list[float]:
        """The values under a key, of the runs that have it."""
        return [run.values[key] for run in self.runs if key in run.values]


def own_keys(groups: Sequence[Group]) -> list[Key]:
    """The keys of all groups that are not published, as often as they occur."""
    return [key for group in groups if not group.published for key in group.keys()]
