"""Standard streams, signals and memory limits of a long run, and the command that started it."""

import contextlib
import math
import os
import pathlib
import re
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from data_utils import RunFailed, one_line
from experiment.command_line import words_of
from experiment.config import BY_DEST
from experiment.launch import PARALLEL, launched
from experiment.text import format_value

if TYPE_CHECKING:
    from experiment.workers import Workers  # loads torch


class _Lenient:
    """A text stream that survives its reader: once a write fails (a closed pipe, a full disk),
    nothing more is written."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self) -> None:
        self._attempt(self._stream.flush)

    def _attempt(self, function: Callable[..., object], *args: object) -> None:
        try:
            function(*args)
        except (OSError, ValueError):
            # Python would flush the buffer at exit, and fail again.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = open(os.devnull, "w")


@contextlib.contextmanager
def lenient_streams() -> Iterator[None]:
    """A block in which printing never fails: standard output and error may close, fill up, be
    missing, or encode ASCII alone."""
    # otherwise a file opened later gets the descriptor of a missing stream, and its output
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    stdout = sys.stdout
    stderr = sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Lenient(stream))
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout = stdout
        sys.stderr = stderr


def command_words(argv: Sequence[str] | None, name: str) -> list[str]:
    """The words of the command line in front of the program's own arguments: interpreter or
    torchrun, and the path of the program. argv: the arguments, or None for those of the command
    line; name: the program. Raises UserError."""
    program = name if argv is not None else sys.argv[0]
    launch = launched()
    if launch.torchrun:
        return ["torchrun", *_torchrun_flags(), program]
    own = sys.argv[1:]
    before = sys.orig_argv[: len(sys.orig_argv) - len(own)]
    as_typed = argv is None and before[-1:] == [program] and sys.orig_argv[len(before) :] == own
    return before if as_typed else ["python", program]


def _torchrun_flags() -> list[str]:
    """The flags of torchrun that start this many workers on as many machines again."""
    values = os.environ
    per_node = ["--nproc_per_node", values.get("LOCAL_WORLD_SIZE", values["WORLD_SIZE"])]
    nodes = values.get("GROUP_WORLD_SIZE", "1")
    if nodes == "1":
        return ["--standalone", *per_node]
    address = ["--master_addr", values["MASTER_ADDR"], "--master_port", values["MASTER_PORT"]]
    return ["--nnodes", nodes, *per_node, *address, "--node_rank", values.get("GROUP_RANK", "0")]


def next_line(
    program: Sequence[str],
    given: Mapping[str, Any],
    todo: str,
    runs: str | Sequence[str],
    *words: str,
) -> str:
    """The last line of an output: a command to go on with.

    program: of `command_words`; given: the flags of the command line, whose --device it keeps;
    runs: the value of --load-path; words: further ones of the command."""
    if launched().torchrun and todo not in PARALLEL:
        program = ["python", program[-1]]
    command = [*program, "--todo", todo, *words_of(BY_DEST["load_path"], runs), *words]
    if "device" in given and todo != "compare":
        command += words_of(BY_DEST["device"], given["device"])
    return f"next: {shlex.join(command)}"


def memory_limit(root: str | pathlib.Path = "/") -> float:
    """Bytes of memory that this process may use: those of the machine, or fewer if its container or
    batch job (cgroup, version 1 or 2, or one of its parents) has a limit; inf if unknown.

    root: the folder with proc/ and sys/."""
    sizes: list[float] = [math.inf]
    if hasattr(os, "sysconf"):
        sizes.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    try:
        groups = pathlib.Path(root, "proc/self/cgroup").read_text(errors="replace").splitlines()
    except OSError:  # not Linux
        groups = []
    mounted = pathlib.Path(root, "sys/fs/cgroup")
    for group in groups:  # number:controllers:path, in version 2 without controllers
        _, _, controllers_and_path = group.partition(":")
        controllers, _, path = controllers_and_path.partition(":")
        if not controllers:
            places = (mounted, mounted / "unified")
            name = "memory.max"
        elif "memory" in controllers.split(","):
            places = (mounted / "memory", mounted / controllers)
            name = "memory.limit_in_bytes"
        else:
            continue
        # inside a container the path can be the one outside, but only its root is mounted
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for place in places:
            for depth in range(len(parts) + 1):
                with contextlib.suppress(OSError, ValueError):  # ValueError: max
                    sizes.append(int(place.joinpath(*parts[:depth], name).read_text()))
    return min(size for size in sizes if size > 0)


# In messages of PyTorch and NumPy
OUT_OF_MEMORY = (
    "DefaultCPUAllocator",
    "not enough memory",
    "out of memory",
    "allocate memory",
    "calculation overflowed",
    "array is too big",
)


def out_of_memory(error: BaseException, given: Mapping[str, Any]) -> RunFailed | None:
    """The RunFailed that names the flags to reduce; None if `error` is not about memory. given: the
    flags of the command line, {dest: value}."""
    message = one_line(error)
    is_known = isinstance(error, (RuntimeError, ValueError)) and any(
        text in message for text in OUT_OF_MEMORY
    )
    if not isinstance(error, MemoryError) and not is_known:
        return None
    requested = re.search(r"(?:allocate|allocated?) ([\d.]+ ?\w*)", message)
    amount = f" (requested {requested[1]})" if requested else ""
    sizes = ", ".join(
        f"--{name} {format_value(given[name])}"
        for name in ("mbs", "archi", "channels", "fc", "T2")
        if name in given
    )
    now = f"; now {sizes}" if sizes else ""
    failed = RunFailed(f"out of memory{amount}: reduce --mbs, the layers, or with BPTT --T2{now}")
    failed.resumable = True
    return failed


# Ctrl-C; what batch systems send before a time limit or preemption; a closed terminal; ulimit -t.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU")
    if hasattr(signal, name)
]


class Interruption:
    """A block in which each of SIGNALS raises KeyboardInterrupt, except those that the process
    inherited as ignored (as with nohup): they stay ignored.

    number: the signal that came, or None; advice: a function that returns what is saved and how to
    resume."""

    def __init__(self, workers: "Workers") -> None:
        self.number: int | None = None
        self.advice: Callable[[], str] = lambda: "nothing was changed"
        self.workers = workers
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: object) -> None:
        self.number = number
        raise KeyboardInterrupt

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is not threading.main_thread():
            return self
        self._before = {
            number: signal.signal(number, self._handle)
            for number in SIGNALS
            if signal.getsignal(number) is not signal.SIG_IGN
        }
        if self.workers.size > 1:
            self.workers.on_loss = self.end_for
            arrivals, wakeup = os.pipe()
            os.set_blocking(wakeup, False)
            signal.set_wakeup_fd(wakeup)
            self._start(self._end_after_signal, arrivals)
            self._start(self._end_without_launcher, os.getppid())
        return self

    @staticmethod
    def _start(watch: Callable[[int], None], argument: int) -> None:
        threading.Thread(target=watch, args=(argument,), daemon=True).start()

    def _end_after_signal(self, arrivals: int) -> None:
        """End a worker that waits for a lost one inside a library, where no exception reaches
        it."""
        self.number = os.read(arrivals, 1)[0]
        time.sleep(3)
        self.end()

    def _end_without_launcher(self, launcher: int) -> None:
        """End a worker whose torchrun was killed: it would keep its GPU and the run's lock."""
        while os.getppid() == launcher:
            time.sleep(1)
        self.number = signal.SIGTERM
        self.end()

    def end(self) -> int:
        """Print what was interrupted, and return the exit code."""
        assert self.number is not None
        # torchrun sends SIGTERM to the remaining workers when it has lost one
        may_be_lost = self.number == signal.SIGTERM and self.workers.size > 1
        reason = "interrupted or lost a worker" if may_be_lost else "interrupted"
        return self.workers.end(f"\n{reason}; {self.advice()}", 128 + self.number)

    def end_for(self, reason: str) -> int:
        """Print why the run ends, and end this worker, which may wait inside a library."""
        return self.workers.end(f"\ninterrupted: {reason}; {self.advice()}", 1)

    def ignore(self) -> None:
        """Ignore all further signals."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(-1)
