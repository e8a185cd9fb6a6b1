"""What the surroundings can do to a long run: streams that break, signals, a launcher that dies;
and how the user started it."""

import contextlib
import math
import os
import pathlib
import re
import signal
import sys
import threading
import time

from data_utils import RunFailed, one_line
from experiment.arguments import shown
from experiment.launch import launched


class _Lenient:
    """A text stream that goes on without its reader: once a write fails (a closed pipe, a full
    disk), nothing more is written."""

    def __init__(self, stream):
        self._stream = stream

    def __getattr__(self, name):
        return getattr(self._stream, name)

    def write(self, text):
        self._attempt(self._stream.write, text)
        return len(text)

    def flush(self):
        self._attempt(self._stream.flush)

    def _attempt(self, function, *args):
        try:
            function(*args)
        except (OSError, ValueError):
            # What is still in the stream's buffer would fail again when Python flushes it at its
            # end.
            with contextlib.suppress(OSError, ValueError), open(os.devnull, "w") as nowhere:
                os.dup2(nowhere.fileno(), self._stream.fileno())
            self._stream = open(os.devnull, "w")


@contextlib.contextmanager
def lenient_streams():
    """Within the block standard output and error may close, fill up, be missing, or know ASCII
    alone, and nobody who prints need care."""
    # a file opened later must not get the number of a missing stream, and what is printed to it
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    before = sys.stdout, sys.stderr
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name) or open(os.devnull, "w")
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
        setattr(sys, name, _Lenient(stream))
    try:
        yield
    finally:
        sys.stdout.flush(), sys.stderr.flush()
        sys.stdout, sys.stderr = before


def command_words(argv, name):
    """The words of the command line in front of the program's own arguments, as the user typed
    them: interpreter or torchrun with its flags, and the path of the program. argv: the arguments,
    None where they come from the command line; name: of the program. Raises UserError."""
    own, program = sys.argv[1:], name if argv is not None else sys.argv[0]
    launch = launched()
    if launch.torchrun:
        typed, fallback = (
            _torchrun_words(),
            ["torchrun", "--standalone", "--nproc_per_node", str(launch.size), program],
        )
    else:
        typed, fallback = sys.orig_argv, ["python", program]
    before = typed[: len(typed) - len(own)]
    return (
        before
        if argv is None and typed[len(before) :] == own and before[-1:] == [program]
        else fallback
    )


def _torchrun_words():
    """The command line of the torchrun that started this worker; [] on another system than
    Linux."""
    try:
        words = os.fsdecode(pathlib.Path(f"/proc/{os.getppid()}/cmdline").read_bytes()).split("\0")[
            :-1
        ]
    except OSError:
        return []
    for n, word in enumerate(words):
        if (
            pathlib.Path(word).name == "torchrun"
            or word == "torch.distributed.run"
            and words[n - 1] == "-m"
        ):
            return ["torchrun", *words[n + 1 :]]
    return []


def memory_limit(root="/"):
    """Bytes of memory that this process may use: those of the machine, or fewer where its container
    or batch job (cgroup, version 1 or 2, or one of its parents) has a limit; inf if unknown.

    root: the folder that holds proc/ and sys/."""
    sizes = [math.inf]
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
            places, name = (mounted, mounted / "unified"), "memory.max"
        elif "memory" in controllers.split(","):
            places, name = (mounted / "memory", mounted / controllers), "memory.limit_in_bytes"
        else:
            continue
        # inside a container the path can be the one outside, of which only the root is mounted
        parts = [part for part in path.split("/") if part not in ("", ".", "..")]
        for place in places:
            for depth in range(len(parts) + 1):
                with contextlib.suppress(OSError, ValueError):  # ValueError: max
                    sizes.append(int(place.joinpath(*parts[:depth], name).read_text()))
    return min(size for size in sizes if size > 0)


def out_of_memory(error, given):
    """The RunFailed that says in one line what memory was missing for; None where `error` is
    something else. given: the flags."""
    words = one_line(error)
    known = (
        "DefaultCPUAllocator",
        "not enough memory",
        "out of memory",
        "allocate memory",
        "calculation overflowed",
        "array is too big",
    )
    if not isinstance(error, MemoryError) and not (
        isinstance(error, (RuntimeError, ValueError)) and any(word in words for word in known)
    ):
        return None
    asked = re.search(r"(?:allocate|allocated?) ([\d.]+ ?\w*)", words)
    sizes = ", ".join(
        f"--{name.replace('_', '-')} {shown(given[name])}"
        for name in ("mbs", "archi", "channels", "fc", "T2")
        if name in given
    )
    failed = RunFailed(
        f"out of memory{f' (asked for {asked[1]})' if asked else ''}: a smaller --mbs, fewer or "
        "smaller layers, and with BPTT a "
        f"smaller --T2 need less{f'; now {sizes}' if sizes else ''}"
    )
    failed.resumable = True
    return failed


# Ctrl-C; what batch systems send before a time limit or preemption; a closed terminal; ulimit -t.
SIGNALS = [
    getattr(signal, name)
    for name in ("SIGINT", "SIGTERM", "SIGUSR1", "SIGHUP", "SIGXCPU")
    if hasattr(signal, name)
]


class Interruption:
    """Each of SIGNALS raises KeyboardInterrupt within the block, except those that the process
    inherited as ignored (as with nohup): they stay ignored.

    number: the signal that came, or None; advice: a function that says what is saved and how to go
    on."""

    def __init__(self, workers):
        self.number, self.advice, self.workers = None, lambda: "nothing was changed", workers
        self._before = {}

    def _handle(self, number, frame):
        self.number = number
        raise KeyboardInterrupt

    def __enter__(self):
        if threading.current_thread() is threading.main_thread():
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
                for watch in ((self._insist, arrivals), (self._outlive_no_launcher, os.getppid())):
                    threading.Thread(target=watch[0], args=watch[1:], daemon=True).start()
        return self

    def _insist(self, arrivals):
        """For a worker that waits for a lost one inside a library, where no exception reaches
        it."""
        self.number = os.read(arrivals, 1)[0]
        time.sleep(3)
        self.end()

    def _outlive_no_launcher(self, launcher):
        """Ends a worker whose torchrun was killed without a chance to end it: it would hold its
        GPU, and the run's lock."""
        while os.getppid() == launcher:
            time.sleep(1)
        self.number = signal.SIGTERM
        self.end()

    def end(self):
        """Says what was interrupted, and returns the exit code. torchrun sends SIGTERM to those
        that are left when it has lost a worker."""
        lost = (
            " or lost a worker" if self.number == signal.SIGTERM and self.workers.size > 1 else ""
        )
        return self.workers.end(f"\ninterrupted{lost}; {self.advice()}", 128 + self.number)

    def end_for(self, reason):
        """Prints why the run ends, and ends this worker. For one that waits inside a library, where
        no exception reaches it."""
        return self.workers.end(f"\ninterrupted: {reason}; {self.advice()}", 1)

    def ignore(self):
        """From here on no further signal interrupts."""
        for number in self._before:
            signal.signal(number, signal.SIG_IGN)

    def __exit__(self, *_):
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self._before:
            signal.set_wakeup_fd(-1)
