"""Progress bars, a stopwatch for the parts of a training, and the count of steps with --tol."""

import contextlib
import dataclasses
import io
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import IO, Any, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from energy.rule import Observer
from experiment.workers import Workers

T = TypeVar("T")

LOG_SECONDS = 60.0  # between two lines of a bar in a log file


class _LogBar(tqdm):
    """A bar in a log file: a line now and then, and nothing that moves a cursor."""

    @staticmethod
    def status_printer(file: IO[str]) -> Callable[[str], None]:
        def write(text: str) -> None:
            if text:
                file.write(f"{text}\n")
                file.flush()

        return write

    def moveto(self, n: int) -> None:
        """Do nothing: a log file has no lines to move between."""

    def close(self) -> None:
        self.fp = io.StringIO()  # takes the characters that would clear the line
        super().close()


def progress(iterable: Iterable[T], description: str, total: int | None = None) -> tqdm:
    """A tqdm bar on standard error; in a log file a line a minute, from the second minute on."""
    if sys.stderr.isatty():
        return tqdm(iterable, desc=description, total=total, leave=False, dynamic_ncols=True)
    return _LogBar(
        iterable,
        desc=description,
        total=total,
        leave=False,
        delay=LOG_SECONDS,
        mininterval=LOG_SECONDS,
        ncols=80,
    )


def write(text: str) -> None:
    """Print a line without breaking a bar."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)


class Stopwatch(Observer):
    """Seconds that each part of a training takes. steps: the `StepCount` of its free phases.

    On a CUDA device work is timed by events, which only `seconds` waits for."""

    def __init__(self, device: torch.device | None = None) -> None:
        self.cuda = device is not None and device.type == "cuda"
        self.steps = StepCount()
        self._seconds: dict[str, float] = {}
        self._events: list[tuple[str, torch.cuda.Event, torch.cuda.Event]] = []

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Add the time that the block takes to the part `name`."""
        if self.cuda:
            start = torch.cuda.Event(enable_timing=True)
            end = torch.cuda.Event(enable_timing=True)
            start.record()
            yield
            end.record()
            self._events.append((name, start, end))
        else:
            begun = time.perf_counter()
            yield
            self._add(name, time.perf_counter() - begun)

    def _add(self, name: str, seconds: float) -> None:
        self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def count_steps(self, steps: Tensor, converged: Tensor) -> None:
        """Count a mini-batch whose free phase ended early, see `Observer.count_steps`."""
        self.steps.add(steps, converged)

    def iterate(self, batches: Iterable[T], name: str) -> Iterator[T]:
        """Iterate over `batches`, and add the time that they take to arrive to the part `name`."""
        iterator = iter(batches)
        while True:
            with self.part(name):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def seconds(self) -> dict[str, float]:
        """{part: seconds}."""
        for name, start, end in self._events:
            end.synchronize()
            self._add(name, start.elapsed_time(end) / 1000)
        self._events = []
        return self._seconds

    def add(self, other: "Stopwatch") -> None:
        """Add the seconds of another stopwatch."""
        for name, seconds in other.seconds().items():
            self._add(name, seconds)

    def shares(self) -> str:
        """The parts with their seconds and their shares of the whole, one line."""
        total = sum(self.seconds().values()) or 1.0
        return ", ".join(
            f"{name} {seconds:.1f} s ({100 * seconds / total:.0f} %)"
            for name, seconds in self._seconds.items()
        )


@dataclasses.dataclass
class StepCount:
    """Number of steps of the free phases of a data set with --tol, and of images that had not
    converged to it. Counts stay on the device until they are read.

    images: counted; steps: their sum; most: of an image; unconverged: images"""

    images: int = 0
    steps: int | Tensor = 0
    most: int | Tensor = 0
    unconverged: int | Tensor = 0

    def add(self, steps: Tensor, converged: Tensor) -> None:
        """Count a mini-batch. steps: of each image, (mbs,) int64; converged: (mbs,) bool."""
        if len(steps):
            self.images += len(steps)
            self.steps = self.steps + steps.sum()
            self.unconverged = self.unconverged + (~converged).sum()
            self.most = steps.max().clamp(min=self.most)

    def gather(self, workers: Workers) -> None:
        """Make each worker's count the count of all workers."""
        own = StepCount(self.images, int(self.steps), int(self.most), int(self.unconverged))
        counts = workers.gather(own)
        self.images = sum(count.images for count in counts)
        self.steps = sum(count.steps for count in counts)
        self.most = max(int(count.most) for count in counts)
        self.unconverged = sum(count.unconverged for count in counts)

    def columns(self) -> dict[str, float]:
        """Columns of metrics.csv: mean and maximum of the steps, and the share of images in % that
        had not converged; {} without --tol."""
        if not self.images:
            return {}
        return {
            "steps_mean": round(int(self.steps) / self.images, 2),
            "steps_max": int(self.most),
            "unsettled": round(100 * int(self.unconverged) / self.images, 4),
        }

    def __str__(self) -> str:
        return describe_steps(self.columns())


def describe_steps(columns: Mapping[str, Any]) -> str:
    """The columns of `StepCount` as text."""
    text = "{steps_mean:.1f} steps on average, {steps_max} at most, {unsettled:.2f} % above --tol"
    return text.format(**columns)
