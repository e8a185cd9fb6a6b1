"""How the processes of a command were started: by torchrun, to share the work, or each on its own.
Imports no torch, so that wrong flags are reported at once."""

import os
from collections.abc import Mapping
from dataclasses import dataclass

from data_utils import UserError

# Variables that torchrun sets for a worker. If one is missing, the process is no worker.
TORCHRUN = ("TORCHELASTIC_RUN_ID", "RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
PARALLEL = ("train", "evaluate", "attack")  # tasks of --todo that several workers can share


@dataclass(frozen=True)
class Launch:
    """Place of this process among the workers of a command.

    torchrun: whether it started this process; rank: this worker's number; size: the number of
    workers; local_rank: this worker's number on its machine"""

    torchrun: bool = False
    rank: int = 0
    size: int = 1
    local_rank: int = 0


def launched(environ: Mapping[str, str] = os.environ) -> Launch:
    """How this process was started, from its environment variables. Raises UserError if torchrun's
    contradict each other."""
    if not all(environ.get(name, "").strip() for name in TORCHRUN):
        return Launch()
    rank, size, local_rank, port = (
        _whole(environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT")
    )
    if not (0 <= local_rank <= rank < size and 0 <= port <= 65535):
        values = ", ".join(f"{name}={environ[name]!r}" for name in TORCHRUN[1:])
        raise UserError(
            f"the environment contradicts itself: {values}; start with torchrun, or unset "
            "TORCHELASTIC_RUN_ID to run as one process"
        )
    return Launch(True, rank, size, local_rank)


def note_on_separate_processes(todo: str, environ: Mapping[str, str] = os.environ) -> str | None:
    """A note for one of several processes that do the same work without torchrun; None for a single
    process, and for a worker of torchrun."""
    if launched(environ).size > 1:
        return None
    found = _separate(environ)
    if found.count < 2:
        return None
    if todo in PARALLEL:
        torchrun = f"torchrun --standalone --nproc_per_node {found.count} main.py ..."
        action = todo
        advice = f"to share the work start {found.one_task}{torchrun}"
    else:
        action = f"run --todo {todo}"
        advice = "start one, as this is the work of one process"
    processes = f"these {found.count} processes each {action} on their own"
    return f"{found.launcher}: {processes}; {advice}"


def validate_parallel(todo: str, size: int) -> None:
    """Refuse several workers for a task of one process. Raises UserError."""
    if size > 1 and todo not in PARALLEL:
        raise UserError(
            f"--todo {todo} is the work of one process: start it with python instead of torchrun"
        )


@dataclass(frozen=True)
class _Separate:
    """Processes that another launcher started.

    launcher: its part of a message; one_task: the command that starts one process, a prefix"""

    count: int
    launcher: str
    one_task: str = ""


def _separate(environ: Mapping[str, str]) -> _Separate:
    """The processes that another launcher than torchrun started."""

    def number(name: str) -> int:
        return max(0, _whole(environ.get(name, "")))

    # The script of `sbatch --ntasks 4` runs once, with SLURM_NTASKS 4 and SLURM_PROCID 0.
    batch_script = (
        "SLURM_JOB_ID" in environ and "SLURM_STEP_ID" not in environ and not number("SLURM_PROCID")
    )
    if "SLURM_PROCID" in environ and not batch_script:
        tasks = number("SLURM_STEP_NUM_TASKS") or number("SLURM_NTASKS") or number("SLURM_NPROCS")
        if tasks > 1:
            one_task = "one task with torchrun: srun --ntasks 1 "
            return _Separate(tasks, f"srun has started {tasks} tasks", one_task)
    for name in ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE"):
        if number(name) > 1:
            return _Separate(number(name), f"{name}={environ[name]}")
    size = environ.get("WORLD_SIZE")
    return _Separate(number("WORLD_SIZE"), f"WORLD_SIZE={size} without torchrun")


def _whole(text: str) -> int:
    """The whole number in a text; -1 for other texts."""
    text = text.strip()
    return int(text) if text.isascii() and text.isdecimal() and len(text) < 10 else -1
