"""Progress bars, a stopwatch for the parts of a training, and the count of steps that --tol
saves."""

import contextlib
import io
import sys
import time

import torch
from tqdm import tqdm

LOG_SECONDS = 60.0  # between two lines of a bar in a log file


class _LogBar(tqdm):
    """A bar in a log file: a line now and then, and nothing that moves a cursor."""

    @staticmethod
    def status_printer(file):
        def write(text):
            if text:
                file.write(f"{text}\n")
                file.flush()

        return write

    def moveto(self, n):
        """A log file has no lines to move between."""

    def close(self):
        self.fp = io.StringIO()  # for what would clear the line
        super().close()


def progress(iterable, description, total=None):
    """A tqdm bar on standard error; in a log file a line a minute, and only of work that takes
    longer."""
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


def write(text):
    """Prints a line, and leaves a bar in one piece."""
    if sys.stderr.isatty():
        tqdm.write(text)
    else:
        print(text, flush=True)


class Stopwatch:
    """Where the time of a training goes, in seconds by part; settling: the SettlingCount of its
    free phases.

    On a CUDA device work is timed by events and added up only when asked for, so that nothing waits
    for it meanwhile."""

    def __init__(self, device=None):
        self.cuda = device is not None and device.type == "cuda"
        self._seconds, self._events, self.settling = {}, [], SettlingCount()

    @contextlib.contextmanager
    def part(self, name):
        """Counts the time that the block takes to the part `name`."""
        if self.cuda:
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            yield
            events[1].record()
            self._events.append((name, *events))
        else:
            start = time.perf_counter()
            yield
            self._seconds[name] = self._seconds.get(name, 0.0) + time.perf_counter() - start

    def iterate(self, batches, name):
        """Iterates over `batches`, and counts the time that they take to come to the part
        `name`."""
        iterator = iter(batches)
        while True:
            with self.part(name):
                batch = next(iterator, None)
            if batch is None:
                return
            yield batch

    def seconds(self):
        """{part: seconds}."""
        for name, start, end in self._events:
            end.synchronize()
            self._seconds[name] = self._seconds.get(name, 0.0) + start.elapsed_time(end) / 1000
        self._events = []
        return self._seconds

    def add(self, other):
        """Adds the seconds of another stopwatch."""
        for name, seconds in other.seconds().items():
            self._seconds[name] = self._seconds.get(name, 0.0) + seconds

    def shares(self):
        """The parts in words, with their shares of the whole."""
        total = sum(self.seconds().values()) or 1.0
        return ", ".join(
            f"{name} {seconds:.1f} s ({100 * seconds / total:.0f} %)"
            for name, seconds in self._seconds.items()
        )


class SettlingCount:
    """How many steps the free phases of a data set took with --tol, and how many of its images
    stayed above it."""

    def __init__(self):
        self.images = self.steps = self.most = self.unsettled = 0

    def add(self, steps, settled):
        """Counts in one mini-batch. steps: of each image, (mbs,) whole numbers; settled: whether it
        had settled by then, (mbs,) bool."""
        if len(steps):
            self.images += len(steps)
            self.steps, self.unsettled = self.steps + steps.sum(), self.unsettled + (~settled).sum()
            most = steps.max()  # a number brought to the device would wait for it
            self.most = (
                torch.maximum(most, self.most)
                if torch.is_tensor(self.most)
                else most.clamp(min=self.most)
            )

    def gather(self, workers):
        """Counts in the free phases of all workers, in each one's count."""
        counted = workers.gather(
            [int(count) for count in (self.images, self.steps, self.unsettled, self.most)]
        )
        self.images, self.steps, self.unsettled = (sum(row[i] for row in counted) for i in range(3))
        self.most = max(row[3] for row in counted)

    def columns(self):
        """Columns of metrics.csv: mean and maximum of the steps, and the share in % of images that
        did not settle; {} if not counted."""
        if not self.images:
            return {}
        return {
            "steps_mean": round(int(self.steps) / self.images, 2),
            "steps_max": int(self.most),
            "unsettled": round(100 * int(self.unsettled) / self.images, 4),
        }

    def __str__(self):
        text = (
            "{steps_mean:.1f} steps on average, {steps_max} at most, {unsettled:.2f} % above --tol"
        )
        return text.format(**self.columns())
