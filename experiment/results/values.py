"""Values of runs for a comparison: what identifies them, pooled over seeds, paired differences."""

from __future__ import annotations

import dataclasses
import functools
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ART_Timesteps_Addition.names import GRADIENTS
from metrics import MASKED

STRONGEST = "worst"  # the gradient of the rows of the strongest gradient per image
DRAWS = 2000  # of the bootstrap
MINUS = "−"


RECORDED = "recorded in training"  # begins the detail of accuracies that the training measured


class Images(NamedTuple):
    """The images that a value was measured on. fingerprint: of images and labels, "" if unknown."""

    task: str = ""
    split: str = ""
    number: int = 0
    fingerprint: str = ""


class Key(NamedTuple):
    """The identity of a value, the same in all runs that it is compared in.

    measure     clean, adversarial, audit, audit trusted, corruptions, seconds; and of curves
                characteristic and training
    attack      the attack, or the set of corruptions
    grad        gradient method, STRONGEST for the strongest one per image
    steps       time steps that gradients are unrolled through
    eps         of corruptions the severity, 0 for the mean; of curves the time step or the epoch
    detail      budget, images and settings that are not the run's own, as text
    predicted   the settings of predictions that are not the run's own, as JSON
    rest        everything else that the value depends on, as JSON
    """

    measure: str
    attack: str = ""
    norm: str = ""
    grad: str = ""
    steps: str = ""
    eps: float = 0.0
    detail: str = ""
    images: Images = Images()
    predicted: str = "{}"
    rest: str = "{}"


@dataclasses.dataclass(frozen=True)
class Value:
    """A measurement of one run.

    value             in %, `seconds` in s
    methods           gradient methods, of which the strongest per image counts
    outcomes          whether each image is classified correctly, (images,); None if unknown
    masked            share of images whose gradients were zero
    masked_outcomes   which images these are
    converged         share of the images that had converged; None if unknown
    """

    value: float
    methods: frozenset[str] = frozenset()
    outcomes: np.ndarray | None = None
    masked: float = 0.0
    masked_outcomes: np.ndarray | None = None
    converged: float | None = None


def method_order(name: str) -> tuple[int, str, int, str]:
    """The place of a gradient method such as `bptt@29 from equilibrium` in lists."""
    gradient = re.split("@| ", name)[0]
    place = GRADIENTS.index(gradient) if gradient in GRADIENTS else len(GRADIENTS)
    return place, gradient, len(name), name


def strongest(values: Sequence[Value]) -> Value:
    """The strongest attack per image of some values on the same images. Where the outcomes of
    single images are unknown, the smallest accuracy."""
    outcomes = _all_of([value.outcomes for value in values])
    masked = _all_of([value.masked_outcomes for value in values])
    smallest = min(value.value for value in values)
    return Value(
        value=smallest if outcomes is None else 100 * float(outcomes.mean()),
        methods=frozenset().union(*(value.methods for value in values)),
        outcomes=outcomes,
        masked=min(v.masked for v in values) if masked is None else float(masked.mean()),
        masked_outcomes=masked,
        converged=values[0].converged,
    )


def _all_of(outcomes: Sequence[np.ndarray | None]) -> np.ndarray | None:
    """Where all of them are true; None if one is unknown, or there are no images."""
    known = [outcome for outcome in outcomes if outcome is not None and len(outcome)]
    return np.logical_and.reduce(known) if len(known) == len(outcomes) else None


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


@dataclasses.dataclass(frozen=True)
class Cell:
    """The values of a group under one key. values: {seed, or number of the run: value}; left_out:
    seeds that were attacked by other gradient methods."""

    values: Mapping[Any, Value]
    left_out: tuple[Any, ...] = ()

    @property
    def statistics(self) -> Statistics:
        return Statistics.of([value.value for value in self.values.values()])

    @property
    def methods(self) -> list[str]:
        """The gradient methods, of all values the same."""
        return sorted(next(iter(self.values.values())).methods, key=method_order)

    @property
    def masked(self) -> float:
        """The mean share of masked images."""
        return statistics.fmean(value.masked for value in self.values.values())

    @property
    def is_upper_bound(self) -> bool:
        """Whether robust accuracy may be smaller, because gradients of some seed are masked."""
        return any(value.masked > MASKED for value in self.values.values())

    @property
    def converged(self) -> float | None:
        """The mean share of converged images; None if it is unknown."""
        known = [v.converged for v in self.values.values() if v.converged is not None]
        return statistics.fmean(known) if known else None

    def __str__(self) -> str:
        return f"{'≤ ' if self.is_upper_bound else ''}{self.statistics}"


def pool(found: Mapping[Any, Sequence[Value]]) -> Cell:
    """The strongest value of each run over the gradient methods that all runs share.

    If they share none, the most runs with the same methods. found: {seed: values}, not empty."""
    shared: frozenset[str] = frozenset().union(*(v.methods for vs in found.values() for v in vs))
    while True:
        usable = {
            seed: [v for v in values if v.methods <= shared] for seed, values in found.items()
        }
        covered = [frozenset().union(*(v.methods for v in vs)) for vs in usable.values()]
        common = frozenset.intersection(*covered)
        if common == shared:
            break
        shared = common
    if all(usable.values()):
        return Cell({seed: strongest(values) for seed, values in usable.items()})
    candidates = [_over(found, v.methods) for values in found.values() for v in values]
    candidates += [
        _over(found, frozenset().union(*(v.methods for v in values))) for values in found.values()
    ]
    same = max(candidates, key=len)
    return Cell(same, tuple(seed for seed in found if seed not in same))


def _over(found: Mapping[Any, Sequence[Value]], methods: frozenset[str]) -> dict[Any, Value]:
    """The strongest value over exactly these gradient methods, of each seed that has all."""
    pooled = {}
    for seed, values in found.items():
        usable = [value for value in values if value.methods <= methods]
        if usable and (value := strongest(usable)).methods == methods:
            pooled[seed] = value
    return pooled


@dataclasses.dataclass
class RunResults:
    """The results of one run.

    args: {dest: value}; identity: {name: value} of what all runs of a group share; folder, weights:
    which model it is; values: those of each key, one per gradient method; notes: lines about what
    was left out."""

    args: Mapping[str, Any]
    identity: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    folder: str = ""
    weights: str = ""
    values: dict[Key, list[Value]] = dataclasses.field(default_factory=dict)
    notes: list[str] = dataclasses.field(default_factory=list)

    def add(self, key: Key, value: Value) -> None:
        """Add a value, beside those of other gradient methods."""
        self.values.setdefault(key, []).append(value)


@dataclasses.dataclass(eq=False)
class Group:
    """Runs that differ in the seed alone. published: whether they are from a published table;
    caveats: (measure, text for the captions of figures with its values)."""

    label: str
    runs: list[RunResults]
    published: bool = False
    caveats: list[tuple[str, str]] = dataclasses.field(default_factory=list)

    @functools.cached_property
    def cells(self) -> dict[Key, Cell]:
        """The values of each key that at least one run has."""
        found: dict[Key, dict[Any, list[Value]]] = {}
        for n, run in enumerate(self.runs):
            seed = run.args.get("seed")
            for key, values in run.values.items():
                found.setdefault(key, {})[f"run {n + 1}" if seed is None else seed] = values
        return {key: pool(values) for key, values in found.items()}


def own_keys(groups: Iterable[Group]) -> set[Key]:
    """The keys of all groups that are not published."""
    return {key for group in groups if not group.published for key in group.cells}


# ---- differences


class Difference(NamedTuple):
    """A difference in percentage points, with its 95 % interval, over n seeds.

    alone: these seeds, where the two groups have others besides, or where it is a single one; the
    difference of their means is another one, or the interval does not cover how trainings differ"""

    mean: float
    low: float
    high: float
    n: int
    alone: tuple[Any, ...] = ()

    def __str__(self) -> str:
        text = f"{self.mean:+.2f} ({self.low:+.2f} to {self.high:+.2f}"
        if self.alone:
            seeds = ", ".join(map(str, self.alone))
            text += f"; {'seed' if self.n == 1 else 'seeds'} {seeds} alone"
        return f"{text})".replace("-", MINUS)


def difference(first: Cell, second: Cell) -> Difference | None:
    """second - first, of the seeds that both have with outcomes of the same images; None without
    such seeds."""
    pairs = {}
    for seed, value in second.values.items():
        other = first.values.get(seed)
        if other and value.outcomes is not None and other.outcomes is not None:
            pairs[seed] = value.outcomes.astype(int) - other.outcomes.astype(int)
    if not pairs:
        return None
    paired = np.stack(list(pairs.values()))
    low, high = bootstrap_interval(paired)
    of_all = 1 < len(pairs) == len(first.values) == len(second.values)
    alone = () if of_all else tuple(pairs)
    return Difference(100 * float(paired.mean()), 100 * low, 100 * high, len(pairs), alone)


def bootstrap_interval(paired: np.ndarray, draws: int = DRAWS) -> tuple[float, float]:
    """The 95 % interval of the mean of `paired`, (seeds, images), by resampling both.

    The percentile bootstrap (Efron and Tibshirani, An Introduction to the Bootstrap, 1993) with
    fixed random numbers. Images with the same values in all seeds are drawn together, which changes
    nothing but the time. With few seeds it underestimates how much seeds differ."""
    seeds, images = paired.shape
    generator = np.random.default_rng(0)
    values, counts = np.unique(paired, axis=1, return_counts=True)  # (seeds, different images)
    drawn = generator.multinomial(images, counts / images, draws)  # (draws, different images)
    of_each_seed = drawn @ values.T / images  # (draws, seeds)
    drawn_seeds = generator.integers(seeds, size=(draws, seeds))
    means = np.take_along_axis(of_each_seed, drawn_seeds, 1).mean(1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
