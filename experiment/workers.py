"""The processes that torchrun starts to work on one thing together, the device each computes on,
and the seeds they share."""

import contextlib
import datetime
import glob
import itertools
import os
import random
import re
import secrets
import socket
import sys
import threading
import time
import warnings

import numpy as np
import torch
import torch.distributed as dist

from data_utils import RunFailed, UserError, one_line
from experiment.launch import PARALLEL, launched

# Timeout of the collectives, whose waits `_Heartbeat` ends; in milliseconds it fits 32 bits.
FOREVER = datetime.timedelta(days=20)


class LostWorker(RunFailed):
    """Another worker has ended, or was not heard of for too long."""

    resumable = True


class _Heartbeat(threading.Thread):
    """Counts up in torchrun's store while this worker lives, and watches the counts of the others.

    A killed process closes its connections, which the others notice at once. A frozen process, or a
    machine that lost its power, does not: it is lost once its count has stood still for `patience`
    seconds. A worker that computes, writes or downloads for hours goes on counting. Seconds are
    measured in beats of this thread, not by a clock: workers that were suspended together, by a
    batch system, do not count as lost when they resume."""

    ENDED = 2**40  # added to the count of a worker whose work is complete; no beat gets there

    def __init__(self, store, workers, patience):
        """store: see `Workers._store`, used by this thread alone; patience: in seconds."""
        super().__init__(daemon=True)
        self.store, self.workers, self.patience = store, workers, patience
        self.interval, self._stopped = min(2.0, patience / 20), threading.Event()

    def run(self):
        """Beats until `stop`, or until another worker is lost; calls `on_loss` of the workers
        then."""
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
            lost = max(others, key=silent.get)
            if silent[lost] * self.interval >= self.patience and not self._stopped.is_set():
                self.workers.on_loss(
                    f"a worker was lost (rank {lost}: no heartbeat for {self.patience:g} s)"
                )
                return

    def _beat(self, others):
        """Counts up. Returns {rank: its count, at most ENDED}, or None without a connection to the
        store: its machine, and the worker on it, are lost."""
        try:
            self.store.add(f"heartbeat {self.workers.rank}", 1)
            found = {rank: self.store.add(f"heartbeat {rank}", 0) for rank in others}
        except RuntimeError:
            return None
        return {rank: min(count, self.ENDED) for rank, count in found.items()}

    def stop(self):
        """Ends the thread, and lets the others know that this worker's work is complete."""
        self._stopped.set()
        with contextlib.suppress(RuntimeError):  # torchrun has ended before
            self.store.add(f"heartbeat {self.workers.rank}", self.ENDED)


class Workers:
    """The processes that torchrun started; one, for which nothing here does anything, without it.

    rank, size: which one this is, of how many; rank 0 writes the files. local_rank: which one on
    its machine. What exchanges (`sum`, `average_gradients`, a mini-batch within
    `sharing_statistics`, `deal`, `gather`, `gather_dealt`, `gather_strided`, `broadcast`,
    `rank_zero_first`) is to be called by all, in the same order. It waits for slower workers
    without a limit, and raises LostWorker where one has ended. Where one is frozen or its machine
    is gone, `on_loss` is called with the reason, from another thread."""

    PATIENCE = datetime.timedelta(minutes=1)  # without a heartbeat, after which a worker is lost
    START = datetime.timedelta(minutes=10)  # in which all have to start: libraries can load slowly

    def __init__(self, rank=0, size=1, local_rank=0):
        self.rank, self.size, self.local_rank, self.device, self.stderr = (
            rank,
            size,
            local_rank,
            None,
            sys.stderr,
        )
        self.on_loss = lambda reason: self.end(reason, LostWorker.code)
        self.hosts = [socket.gethostname()]  # of each worker, once they are connected
        self._board, self._heartbeat, self._deals = None, None, 0
        self._meeting = f"attempt {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"

    @classmethod
    def launched(cls):
        """Those that torchrun's environment variables speak of."""
        launch = launched()
        return cls(launch.rank, launch.size, launch.local_rank)

    def connect(self, device):
        """From here on workers exchange: what is on the CPU by gloo, what is on a CUDA device by
        nccl. See `_Heartbeat`."""
        self.device = device
        if self.size > 1:
            if device.type == "cuda":
                torch.cuda.set_device(device)
            with self._exchange():
                self._meeting = self._meet()
                self._board = self._store(
                    FOREVER
                )  # nccl exchanges addresses there when it is first used
                self._heartbeat = _Heartbeat(
                    self._store(self.PATIENCE), self, self.PATIENCE.total_seconds()
                )
                self._heartbeat.start()
                dist.init_process_group(
                    "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo",
                    store=self._board,
                    rank=self.rank,
                    world_size=self.size,
                    timeout=FOREVER,
                )
            self.hosts = self.gather(socket.gethostname())
            self.sum(0)  # connects the devices now, while all are here
            if len(set(self.hosts)) > 1:
                print(
                    f"note: the workers are on {', '.join(dict.fromkeys(self.hosts))}; "
                    f"{self.hosts[0]} reads and writes the run folder",
                    file=sys.stderr,
                )

    def disconnect(self):
        """The end of `connect`."""
        if self._heartbeat:
            self._heartbeat.stop()
            self._board, self._heartbeat = None, None
        if self.size > 1 and dist.is_initialized():
            dist.destroy_process_group()

    @contextlib.contextmanager
    def _exchange(self):
        try:
            yield
        except RuntimeError as e:  # all of torch.distributed's errors are
            reason = re.sub(r"^\[\S+:\d+\] ", "", one_line(e)).split(". ")[
                0
            ]  # without the place in gloo's source
            raise LostWorker(f"a worker was lost ({reason})") from None

    @property
    def elsewhere(self) -> bool:
        """Whether this worker is on another machine than rank 0, which reads and writes files."""
        return self.hosts[0] != socket.gethostname()

    # ---- shares of the work

    def shard(self, n):
        """This worker's part of a mini-batch of n samples: (a slice, how many they are).

        With fewer samples than workers some get none. They compute along on a sample of another's,
        for a weight of 0: no learning rule has to do with empty batches, and all draw the same
        random numbers."""
        first, last = (-(-n * rank // self.size) for rank in (self.rank, self.rank + 1))
        return slice(min(first, n - 1), max(first + 1, last)), last - first

    def strided(self, iterable):
        """Every size-th item, from this worker's first on: for work that is even. See
        `gather_strided`."""
        return itertools.islice(iterable, self.rank, None, self.size)

    def deal(self, iterable):
        """(place, item) of the items that this worker takes: each item goes to the next worker that
        is free, so that slow ones do not pile up. For work that is complete on the device before
        the next item is asked for. See `gather_dealt`."""
        places = self._places()
        mine = next(places)
        for place, item in enumerate(iterable):
            if place == mine:
                yield place, item
                mine = next(places)

    def _places(self):
        """The places of the items that `deal` gives to this worker, by a shared counter; every
        size-th without `connect`."""
        if not self._board:
            yield from itertools.count(self.rank, self.size)
        self._deals += 1
        name = f"deal {self._deals}"
        while True:
            with self._exchange():
                place = self._board.add(name, 1) - 1
            yield place

    # ---- exchange

    @torch.no_grad()
    def average_gradients(self, model, n_local, n_global):
        """Makes every p.grad, this worker's mean over its n_local samples, the mean over all
        n_global of the mini-batch."""
        if self.size == 1:
            return
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        together = torch.cat([grad.flatten() for grad in grads]).mul_(n_local / n_global)
        with self._exchange():
            dist.all_reduce(together)
        for grad, mean in zip(grads, together.split([grad.numel() for grad in grads])):
            grad.copy_(mean.view_as(grad))

    @contextlib.contextmanager
    def sharing_statistics(self, model, n_local, n_global):
        """Within the block the model's batch normalisations, modules with a `whole`, take the
        statistics of all n_global samples of a mini-batch, of which n_local are this worker's. What
        a gradient gets through them is what `average_gradients` expects."""
        norms = (
            [module for module in model.modules() if hasattr(module, "whole")]
            if self.size > 1
            else []
        )
        for module in norms:
            module.whole = self, n_local / n_global, n_global
        try:
            yield
        finally:
            for module in norms:
                module.whole = None

    def sum(self, value):
        """The sum over the workers of a number or tensor, as a tensor."""
        total = torch.as_tensor(value, device=self.device)
        if self.size > 1:
            total = total.clone()
            with self._exchange():
                dist.all_reduce(total)
        return total

    def gather(self, item):
        """[item of rank 0, of rank 1, ...]."""
        items = [item]
        if self.size > 1:
            items = [None] * self.size
            with self._exchange():
                dist.all_gather_object(items, item)
        return items

    def gather_strided(self, results):
        """The list whose items `strided` gave out, from what each worker made of its own."""
        missing = object()
        rounds = itertools.zip_longest(*self.gather(results), fillvalue=missing)
        return [item for row in rounds for item in row if item is not missing]

    def gather_dealt(self, results):
        """The results of all items of `deal`, in their order. results: (place, result) of those
        that this worker took."""
        together = [result for own in self.gather(results) for result in own]
        return [result for _, result in sorted(together, key=lambda result: result[0])]

    def broadcast(self, item):
        """Rank 0's item."""
        items = [item]
        if self.size > 1:
            with self._exchange():
                dist.broadcast_object_list(items, src=0)
        return items[0]

    @contextlib.contextmanager
    def rank_zero_first(self):
        """Rank 0 goes through the block before all others do."""
        if self.rank > 0:
            self.gather(None)
        yield
        if self.rank == 0:
            self.gather(None)

    # ---- what the user hears

    @contextlib.contextmanager
    def only_rank_zero_prints(self):
        """Within the block only rank 0 prints and shows progress."""
        with contextlib.ExitStack() as stack:
            if self.rank > 0:
                nowhere = stack.enter_context(open(os.devnull, "w"))
                stack.enter_context(contextlib.redirect_stdout(nowhere))
                stack.enter_context(contextlib.redirect_stderr(nowhere))
            yield

    def end(self, message, code):
        """Says why the run ends, if no other worker has said so before, and returns `code`; of
        several workers ends this one at once, for orderly goodbyes would wait for those that are
        lost."""
        if self.size == 1 or self._first_to_speak():
            print(message, file=self.stderr, flush=True)
        if self.size > 1:
            sys.stdout.flush()
            os._exit(code)
        return code

    def _first_to_speak(self):
        try:
            return self._store(datetime.timedelta(seconds=2)).add("said why", 1) == 1
        except RuntimeError:  # torchrun is gone as well
            return True

    def _store(self, timeout, prefix=None):
        """What torchrun itself keeps for the workers, whichever of them is lost; empty for those
        that it starts in place of lost ones."""
        address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        return dist.PrefixStore(
            prefix or self._meeting, dist.TCPStore(address, port, timeout=timeout)
        )

    def _meet(self):
        """A name that all workers of this start have in common, and no earlier start had.

        torchrun's count of restarts is no such name: each machine has its own count. So every
        worker calls with a random word until rank 0, which may first find the call of a lost
        worker, answers."""
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


def computed_on():
    """The machine that a number is computed on, and how many threads torch uses there, in words."""
    threads = torch.get_num_threads()
    return f"{socket.gethostname()}, {threads} thread{'s' * (threads != 1)}"


def check_parallel(todo, workers):
    """What --todo demands of the number of workers. Raises UserError."""
    if workers.size > 1 and todo not in PARALLEL:
        raise UserError(
            f"--todo {todo} is the work of one process: start it with python instead of torchrun"
        )


def pick_device(index, workers):
    """The torch.device of --device: -1 the CPU, else that GPU, made the current one; under torchrun
    the one of the worker's place on the machine. Without an NVIDIA device, or with
    CUDA_VISIBLE_DEVICES empty, index 0 is the CPU (`check_device` prints a note). Raises UserError,
    with the cause, for a GPU that is there and cannot be used."""
    if index == -1:
        return torch.device("cpu")
    on_the_cpu = "--device -1 runs on the CPU"
    with warnings.catch_warnings(record=True) as caught:  # torch warns of the cause
        warnings.simplefilter("always")
        available = torch.cuda.is_available()
    if not available:
        cause = _why_unusable(caught)
        if cause:
            raise UserError(f"argument --device: {cause}; {on_the_cpu}")
        if index > 0 and not _hides_all_gpus():
            raise UserError(
                f"argument --device: got {index}, there is no CUDA device here; {on_the_cpu}"
            )
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if workers.size > 1:
        index = workers.local_rank
        if index >= count:
            raise UserError(
                f"torchrun --nproc_per_node: each process needs a GPU, this machine has {count} (--device "
                "-1: the CPU)"
            )
    if index >= count:
        raise UserError(
            f"argument --device: got {index}, the GPUs of this machine are 0 to {count - 1}; {on_the_cpu}"
        )
    device = torch.device("cuda", index)
    try:
        torch.cuda.set_device(device)  # events and streams are the current device's
        torch.zeros(1, device=device).add_(1).item()
    except (
        Exception
    ) as e:  # in exclusive use, without memory, not supported: the driver raises several types
        raise UserError(
            f"argument --device: GPU {index} cannot be used: {_first_sentence(e)}; {on_the_cpu}"
        ) from None
    return device


def _hides_all_gpus():
    """Whether CUDA_VISIBLE_DEVICES hides every GPU, the usual way to ask for the CPU."""
    return os.environ.get("CUDA_VISIBLE_DEVICES", "0").strip() in ("", "-1")


def _why_unusable(caught):
    """The reason why torch cannot use a GPU of this machine; None where it has none, or
    CUDA_VISIBLE_DEVICES hides them all. caught: the warnings of torch.cuda.is_available."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if _hides_all_gpus():
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        seen = torch.cuda.device_count()
        try:
            there = (
                torch.cuda._raw_device_count_nvml()
            )  # those that CUDA_VISIBLE_DEVICES hides as well
        except (OSError, AttributeError):  # no driver
            there = 0
    there = max(seen, there) > 0 or bool(glob.glob("/dev/nvidia[0-9]*"))
    # indices, UUIDs of GPUs or of MIG instances, and what Slurm writes for none
    name = r"\d+|(GPU|MIG)-[\w/-]+|NoDevFiles"
    if visible and (
        there
        and not seen
        or not all(re.fullmatch(name, part.strip()) for part in visible.split(","))
    ):
        return f"CUDA_VISIBLE_DEVICES={visible} names no GPU of this machine"
    if not there:
        return None
    if torch.version.cuda is None and torch.version.hip is None:
        return "there is a GPU, but this PyTorch was built without CUDA"
    if caught:
        return f"the GPU of this machine cannot be used: {_first_sentence(caught[0].message)}"
    try:
        torch.cuda.init()
    except Exception as e:
        return f"the GPU of this machine cannot be used: {_first_sentence(e)}"
    return "the GPU of this machine cannot be used: torch.cuda.is_available() is False"


def _first_sentence(error):
    """The cause in an error or warning of CUDA, without its advice."""
    text = str(error).partition("\n")[0]
    text = re.sub(r"\. (Please|Alternatively)\b.*|\(Triggered internally.*", "", text)
    return text.removeprefix("CUDA initialization: ")[:300].rstrip(" .")


def check_device(args, device):
    """Validate the arguments compile and precision for the device. Raises UserError. Prints a note
    if a GPU was requested and there is none."""
    if device.type == "cpu" and args.device != -1:
        print(
            "note: there is no CUDA device here, running on the CPU (--device -1 says so without "
            "this note)",
            file=sys.stderr,
        )
    if args.compile and device.type != "cuda":
        raise UserError(
            "argument --compile: needs a CUDA device; on a CPU compiled steps are no faster"
        )
    if args.precision != "fp32":
        if device.type != "cuda":
            raise UserError(
                f"argument --precision: {args.precision} needs a CUDA device, this one "
                "computes in fp32; give --precision fp32"
            )
        capability = torch.cuda.get_device_capability(device)
        if capability < (8, 0):
            raise UserError(
                f"argument --precision: {args.precision} needs a GPU of compute capability "
                f"8.0, {torch.cuda.get_device_name(device)} has "
                f"{'.'.join(map(str, capability))}; give --precision fp32"
            )


def seed_everything(args, workers):
    """Seeds python, NumPy and torch with args.seed, which is drawn first where it is None; with
    args.deterministic asks torch for kernels that always sum in the same order."""
    if args.seed is None:
        args.seed = workers.broadcast(random.SystemRandom().randrange(2**31))
    random.seed(args.seed)
    np.random.seed(args.seed % 2**32)
    torch.manual_seed(args.seed)
    if args.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # without it cuBLAS refuses
        torch.backends.cudnn.benchmark = False
    torch.use_deterministic_algorithms(args.deterministic)
