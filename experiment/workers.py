"""The workers of torchrun: processes that share the mini-batches of one command."""

import contextlib
import dataclasses
import datetime
import itertools
import os
import re
import secrets
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from data_utils import RunFailed, one_line
from experiment.launch import launched

T = TypeVar("T")

# Timeout of the collectives, whose waits `_Heartbeat` ends; in milliseconds it fits 32 bits.
FOREVER = datetime.timedelta(days=20)


@dataclasses.dataclass(frozen=True)
class Shared:
    """A mini-batch of `samples` that workers share. fraction: this worker's, from 0 to 1."""

    workers: "Workers"
    fraction: float
    samples: int


class LostWorker(RunFailed):
    """Another worker has ended, or sent no heartbeat for too long."""

    resumable = True


class _Heartbeat(threading.Thread):
    """Counts in torchrun's store while this worker lives, and watches the counts of the others.

    A killed process closes its connections, which the others notice at once. A frozen process, or a
    machine without power, does not: it is lost once its count has not changed for `patience`
    seconds. A worker that computes, writes or downloads for hours keeps counting. Seconds are
    counted in beats of this thread instead of a clock: workers that a batch system suspended
    together are not lost when they resume."""

    ENDED = 2**40  # added to the count of a worker whose work is complete; beats never reach it

    def __init__(self, store: "dist.Store", workers: "Workers", patience: float) -> None:
        """store: see `Workers._store`, used by this thread alone; patience: in seconds."""
        super().__init__(daemon=True)
        self.store = store
        self.workers = workers
        self.patience = patience
        self.interval = min(2.0, patience / 20)
        self._stopped = threading.Event()

    def run(self) -> None:
        """Beat until `stop`, or until another worker is lost; then call `workers.on_loss`."""
        others = [rank for rank in range(self.workers.size) if rank != self.workers.rank]
        counts = dict.fromkeys(others, 0)
        silent = dict.fromkeys(others, 0)  # beats of this worker without one of the other
        self._beat(others)
        while not self._stopped.wait(self.interval):
            now = self._beat(others)
            for rank in others:
                # with 0 it has not connected yet
                alive = now is not None and (
                    now[rank] != counts[rank] or now[rank] in (0, self.ENDED)
                )
                silent[rank] = 0 if alive else silent[rank] + 1
            counts = now or counts
            lost = max(others, key=lambda rank: silent[rank])
            if silent[lost] * self.interval >= self.patience and not self._stopped.is_set():
                self.workers.on_loss(
                    f"a worker was lost (rank {lost}: no heartbeat for {self.patience:g} s)"
                )
                return

    def _beat(self, others: list[int]) -> dict[int, int] | None:
        """Count once. Returns {rank: its count, at most ENDED}, or None without a connection to the
        store: its machine, and the worker on it, are lost."""
        try:
            self.store.add(f"heartbeat {self.workers.rank}", 1)
            found = {rank: self.store.add(f"heartbeat {rank}", 0) for rank in others}
        except RuntimeError:
            return None
        return {rank: min(count, self.ENDED) for rank, count in found.items()}

    def stop(self) -> None:
        """End the thread, and record for the others that the work of this worker is complete."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):  # torchrun has ended before
            self.store.add(f"heartbeat {self.workers.rank}", self.ENDED)


class Workers:
    """The processes that torchrun started; a single process without it.

    rank: the number of this worker, 0 for the one that writes the files; size: the number of
    workers; local_rank: this worker's number on its machine. All workers have to call collectives
    (`sum`, `average_gradients`, a mini-batch within `sharing_statistics`, `deal`, `gather`,
    `gather_dealt`, `broadcast`, `rank_zero_first`) in the same order. Collectives wait for slower
    workers without a limit, and raise LostWorker if one has ended. If one is frozen or its machine
    is gone, `on_loss` is called with the reason, from another thread."""

    PATIENCE = datetime.timedelta(minutes=1)  # without a heartbeat, after which a worker is lost
    START = datetime.timedelta(minutes=10)  # in which all have to start: libraries can load slowly

    def __init__(self, rank: int = 0, size: int = 1, local_rank: int = 0) -> None:
        self.rank = rank
        self.size = size
        self.local_rank = local_rank
        self.device: torch.device | None = None
        self.stderr = sys.stderr
        self.on_loss: Callable[[str], object] = lambda reason: self.end(reason, LostWorker.code)
        self.hosts = [socket.gethostname()]  # of each worker, once they are connected
        self._board: dist.Store | None = None
        self._heartbeat: _Heartbeat | None = None
        self._deals = 0
        self._meeting = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    @classmethod
    def launched(cls) -> "Workers":
        """The workers that torchrun's environment variables describe."""
        launch = launched()
        return cls(launch.rank, launch.size, launch.local_rank)

    def connect(self, device: torch.device) -> None:
        """Connect the workers: tensors on the CPU are exchanged by gloo, those on a CUDA device by
        nccl. See `_Heartbeat`."""
        self.device = device
        if self.size == 1:
            return
        if device.type == "cuda":
            torch.cuda.set_device(device)
        with self._exchange():
            self._meeting = self._meet()
            # nccl exchanges addresses there when it is first used
            self._board = self._store(FOREVER)
            heartbeats = self._store(self.PATIENCE)
            self._heartbeat = _Heartbeat(heartbeats, self, self.PATIENCE.total_seconds())
            self._heartbeat.start()
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                store=self._board,
                rank=self.rank,
                world_size=self.size,
                timeout=FOREVER,
            )
        self.hosts = self.gather(socket.gethostname())
        self.sum(0)  # connects the devices now, while all workers are here
        if len(set(self.hosts)) > 1:
            print(
                f"note: the workers are on {', '.join(dict.fromkeys(self.hosts))}; "
                f"{self.hosts[0]} reads and writes the run folder",
                file=sys.stderr,
            )

    def disconnect(self) -> None:
        """Undo `connect`."""
        if self._heartbeat:
            self._heartbeat.stop()
            self._board = None
            self._heartbeat = None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _exchange(self) -> Iterator[None]:
        """A block whose errors of torch.distributed become LostWorker."""
        try:
            yield
        except RuntimeError as e:
            # without the place in gloo's source
            reason = re.sub(r"^\[\S+:\d+\] ", "", one_line(e)).split(". ")[0]
            raise LostWorker(f"a worker was lost ({reason})") from None

    @property
    def elsewhere(self) -> bool:
        """Whether this worker is on another machine than rank 0, which reads and writes files."""
        return self.hosts[0] != socket.gethostname()

    # ---- shares of the work

    def shard(self, n: int) -> tuple[slice, int]:
        """This worker's part of a mini-batch of n samples: (slice, number of samples).

        With fewer samples than workers some get none. They compute on a sample of another worker,
        with weight 0: no learning rule has to handle empty batches, and all draw the same random
        numbers."""
        first, last = (-(-n * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(min(first, n - 1), max(first + 1, last)), last - first

    def deal(self, iterable: Iterable[T], in_turn: bool = False) -> Iterator[tuple[int, T]]:
        """Yields (place, item) for the items of this worker. See `gather_dealt`.

        Each item goes to the next worker that is free. The work on an item has to be complete on
        the device before the next one is requested. in_turn: items of equal work go to the workers
        in turn, without waiting for the device."""
        places: Iterator[int] = itertools.count(self.rank, self.size)
        if self._board and not in_turn:
            places = self._next_places(self._board)
        mine = next(places)
        for place, item in enumerate(iterable):
            if place == mine:
                yield place, item
                mine = next(places)

    def _next_places(self, board: "dist.Store") -> Iterator[int]:
        """The places of this worker's items in a `deal`, from a counter that the workers share."""
        self._deals += 1
        name = f"deal {self._deals}"
        while True:
            with self._exchange():
                place = board.add(name, 1) - 1
            yield place

    # ---- exchange

    @torch.no_grad()
    def average_gradients(self, model: torch.nn.Module, n_local: int, n_global: int) -> None:
        """Replace every p.grad, the mean over this worker's n_local samples, by the mean over all
        n_global samples of the mini-batch."""
        if self.size == 1:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        together = torch.cat([grad.flatten() for grad in grads]).mul_(n_local / n_global)
        with self._exchange():
            dist.all_reduce(together)
        for grad, mean in zip(grads, together.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    @contextlib.contextmanager
    def sharing_statistics(
        self, model: torch.nn.Module, n_local: int, n_global: int
    ) -> Iterator[None]:
        """A block in which batch normalisations (modules with an attribute `whole`) take the
        statistics of all n_global samples of a mini-batch, n_local of them this worker's. Gradients
        through them are what `average_gradients` expects."""
        norms: list[Any] = []
        if self.size > 1:
            norms = [module for module in model.modules() if hasattr(module, "whole")]
        for module in norms:
            module.whole = Shared(self, n_local / n_global, n_global)
        try:
            yield
        finally:
            for module in norms:
                module.whole = None

    def sum(self, value: Any) -> torch.Tensor:
        """The sum over the workers of a number or tensor, as a tensor."""
        total = torch.as_tensor(value, device=self.device)
        if self.size > 1:
            total = total.clone()
            with self._exchange():
                dist.all_reduce(total)
        return total

    def gather(self, item: T) -> list[T]:
        """[item of rank 0, of rank 1, ...]."""
        items: list[Any] = [item]
        if self.size > 1:
            items = [None] * self.size
            with self._exchange():
                dist.all_gather_object(items, item)
        return items

    def gather_dealt(self, results: list[tuple[int, T]]) -> list[T]:
        """The results of all items of `deal`, in their order. results: (place, result) for each
        item of this worker."""
        together = [result for own in self.gather(results) for result in own]
        return [result for _, result in sorted(together, key=lambda result: result[0])]

    def broadcast(self, item: Any) -> Any:
        """The item of rank 0."""
        items = [item]
        if self.size > 1:
            with self._exchange():
                dist.broadcast_object_list(items, src=0)
        return items[0]

    @contextlib.contextmanager
    def rank_zero_first(self) -> Iterator[None]:
        """A block that rank 0 executes before all others."""
        if self.rank > 0:
            self.gather(None)
        yield
        if self.rank == 0:
            self.gather(None)

    # ---- output and end

    @contextlib.contextmanager
    def only_rank_zero_prints(self) -> Iterator[None]:
        """A block in which only rank 0 prints and shows progress."""
        with contextlib.ExitStack() as stack:
            if self.rank > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def end(self, message: str, code: int) -> int:
        """Print why the run ends, unless another worker has printed it, and return `code`. With
        several workers the process exits at once: an orderly end would wait for lost workers."""
        if self.size == 1 or self._is_first_to_end():
            print(message, file=self.stderr, flush=True)
        if self.size > 1:
            sys.stdout.flush()
            os._exit(code)
        return code

    def _is_first_to_end(self) -> bool:
        try:
            return self._store(datetime.timedelta(seconds=2)).add("ended", 1) == 1
        except RuntimeError:  # torchrun is gone as well
            return True

    def _store(self, timeout: datetime.timedelta, prefix: str | None = None) -> "dist.Store":
        """The store that torchrun serves, whichever worker is lost; empty for workers that torchrun
        starts in place of lost ones."""
        address = os.environ["MASTER_ADDR"]
        port = int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(address, port, timeout=timeout)
        return dist.PrefixStore(prefix or self._meeting, store)

    def _meet(self) -> str:
        """A name that all workers of this start share, and no earlier start had.

        torchrun's count of restarts is no such name: each machine has its own count. So every
        worker calls with a random word until rank 0 answers, which may first find the call of a
        lost worker."""
        store = self._store(self.START, "meeting")
        word = secrets.token_hex(8)
        if self.rank:
            store.set(f"call {self.rank}", word)
            name = store.get(f"answer {word}").decode()
            store.set(f"{name} {self.rank}", "here")
            return name
        missing = set(range(1, self.size))
        deadline = time.monotonic() + self.START.total_seconds()
        while missing:
            for rank in sorted(missing):
                if store.check([f"call {rank}"]):
                    store.set(f"answer {store.get(f'call {rank}').decode()}", word)
                if store.check([f"{word} {rank}"]):
                    missing.remove(rank)
            if time.monotonic() > deadline:
                raise RuntimeError(f"worker {min(missing)} did not start")
            time.sleep(0.02)
        return word
