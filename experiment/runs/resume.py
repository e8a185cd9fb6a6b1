"""Resuming a training: from which file, with which arguments, and by which command."""

import contextlib
import os
import pathlib
import shlex
from collections.abc import Callable
from typing import Any, Protocol

from data_utils import UserError
from experiment import command_line
from experiment.command_line import words_of
from experiment.config import BY_DEST, FLAGS, RESUMED, SESSION, Config, Flag
from experiment.runs.checkpoint import RESUMABLE, SavedRun, open_saved, read_checkpoint
from experiment.runs.files import exists, why
from experiment.runs.folder import RunFolder
from experiment.text import count, format_value, name_path
from experiment.workers import Workers

# Files of a training besides its checkpoint.tar
WRITTEN = (
    "hyperparameters.txt",
    "config.json",
    "metrics.csv",
    "gducheck.csv",
    "model.pt",
    "final_model.pt",
    "final_checkpoint.tar",
    *(
        f"{figure}.{end}"
        for figure in ("train-test_acc", "neural_activity")
        for end in ("png", "pdf", "svg", "txt")
    ),
)
# Flags that the command that resumes sets itself
SET_TO_RESUME = ("todo", "load-path", "run-dir", "save", "epochs")


class Job(Protocol):
    """A training that can be interrupted.

    given: the flags of its command line, {dest: value}; program: the words in front of them; saved:
    the run that it resumes, or None"""

    config: Config
    given: dict[str, Any]
    program: list[str]
    saved: SavedRun | None
    workers: Workers


# ---- --run-dir


def make_folder(path: str | os.PathLike) -> None:
    """Make the folder of --run-dir if it is missing. Raises UserError."""
    try:
        pathlib.Path(path).mkdir(parents=True, exist_ok=True)
    except FileExistsError:
        raise UserError(f"argument --run-dir: {name_path(path)} is no folder") from None
    except (OSError, ValueError) as e:  # ValueError: not a possible path
        reason = why(e) if isinstance(e, OSError) else e
        raise UserError(f"argument --run-dir: cannot make {name_path(path)}: {reason}") from None


def enter_run_dir(path: str) -> RunFolder:
    """The folder of --run-dir, created if it is missing, and locked.

    Raises UserError if another process trains in it or nothing can be written to it."""
    make_folder(path)
    run = RunFolder(path)
    run.check_writable()
    run.lock()
    return run


def read_run_dir(run: RunFolder) -> SavedRun | None:
    """The run in a locked --run-dir; None if no run has begun there. Other files have no effect.

    Raises UserError if its checkpoint is damaged or of another program, or if there is none and a
    training would overwrite files."""
    path = run.folder / "checkpoint.tar"
    if not os.path.lexists(path):
        found = [name for name in WRITTEN if os.path.lexists(run.folder / name)]
        if found:
            raise UserError(
                f"argument --run-dir: {run.folder} contains {', '.join(found)}, which "
                "training would overwrite, but no checkpoint.tar to resume from; "
                "choose another folder or move these files away"
            )
        run.clean_up()
        return None
    if not path.is_file():
        raise UserError(f"argument --run-dir: {path} is no file; choose another folder")
    saved = open_saved(path, "train")
    if not saved.own:
        raise UserError(
            f"argument --run-dir: {path} was not written by this program; choose another folder"
        )
    run.clean_up()
    return saved


def refuse_run_elsewhere(path: str, workers: Workers) -> None:
    """Raise UserError in all workers if another worker's machine has the run in --run-dir, or more
    epochs of it, than that of rank 0, which reads and writes it."""
    checkpoint = pathlib.Path(path, "checkpoint.tar")
    stamps = workers.gather(_stamp(checkpoint))
    if len(set(stamps)) == 1:  # one file system, or no run anywhere
        return
    epochs = workers.gather(_saved_epochs(checkpoint))
    if max(epochs) > epochs[0]:
        owner = workers.hosts[epochs.index(max(epochs))]
        more = "" if epochs[0] < 0 else f" with {count(max(epochs), 'epoch')}, not {epochs[0]}"
        raise UserError(
            f"argument --run-dir: {path}/checkpoint.tar is on {owner}{more}, but "
            f"{workers.hosts[0]} reads and writes the run folder; give {owner} the "
            "--node_rank 0, or copy the folder"
        )


def _stamp(path: pathlib.Path) -> tuple[int, int] | None:
    """(time of change in ns, bytes) of a file; None if there is none."""
    try:
        status = path.stat()
        return status.st_mtime_ns, status.st_size
    except (OSError, ValueError):
        return None


def _saved_epochs(path: pathlib.Path) -> int:
    """The epochs in a checkpoint; -1 if there is none, 0 if it cannot be read."""
    if not os.path.lexists(path):
        return -1
    try:
        epoch = read_checkpoint(path).get("epoch")
    except UserError:
        return 0
    return epoch if isinstance(epoch, int) else 0


def refuse_changes(saved: SavedRun, given: dict) -> None:
    """Raise UserError, naming them, if flags differ from those that the run was trained with.

    given: the validated flags of the command line. Flags of one call (--device), how the steps are
    computed (--precision, --compile) and places of data may differ."""
    before = {**{flag.dest: flag.default for flag in FLAGS}, **saved.args}
    now = command_line.resolve({**saved.args, **given}).flat()
    differing = [
        f"--{flag.name} (saved: {format_value(before[flag.dest])}, given: "
        f"{format_value(now[flag.dest])})"
        for flag in FLAGS
        if flag.dest in given
        and (flag.todos is None or "train" in flag.todos)
        and flag.scope not in (SESSION, RESUMED)
        and not flag.place
        and before[flag.dest] != now[flag.dest]
    ]
    if differing:
        raise UserError(
            f"argument --run-dir: the run in {saved.path.parent} has other values of "
            f"{', '.join(differing)}; give the saved ones or choose another folder"
        )


def last_epoch(config: Config, given: dict, saved: SavedRun | None) -> int:
    """The number of the last epoch that a command trains.

    With --run-dir, --epochs counts all epochs; if it is not given, the saved number counts."""
    epochs = config.optimizer.epochs
    if not config.session.run_dir:
        return epochs + (len(saved.history.epochs) if saved else 0)
    if saved and "epochs" not in given:
        return max(saved.history.requested, 1)
    return epochs


def finish(run: RunFolder, saved: SavedRun) -> None:
    """Write the final files of a complete run, unless they are of its last epoch.

    They are missing if more epochs were requested when the run was stopped."""
    state = read_checkpoint(saved.path)
    with contextlib.suppress(UserError):  # there are none
        if read_checkpoint(run.folder / "final_checkpoint.tar").get("epoch") == state["epoch"]:
            return
    model = {name: value for name, value in state.items() if name not in RESUMABLE}
    run.save("final_model.pt", model)
    run.save("final_checkpoint.tar", state)


def figures_are_old(run: RunFolder) -> bool:
    """Whether the figures of a training are missing or older than its checkpoint."""
    saved = (run.folder / "checkpoint.tar").stat().st_mtime_ns
    paths = [run.folder / f"{name}.{run.figures}" for name in ("train-test_acc", "neural_activity")]
    return any(not path.exists() or path.stat().st_mtime_ns < saved for path in paths)


def saved_in_run_dir(path: str, workers: Workers) -> str:
    """Describe what is saved of an interrupted training in --run-dir, and how to resume."""
    checkpoint = pathlib.Path(path, "checkpoint.tar")
    if exists(checkpoint):
        epochs = len(open_saved(checkpoint, "train").history.epochs)
        return f"{_are_saved(epochs)} in {path}; the same command resumes"
    if workers.elsewhere:
        return f"the epochs are saved in {path} on {workers.hosts[0]}; the same command resumes"
    return f"nothing is saved in {path} yet; the same command starts again"


def saved_elsewhere(job: Job, folder: str, last: int) -> str:
    """As `how_to_resume`, in a worker whose machine does not have the run folder."""
    command = _command_with(job, lambda flag: flag.scope == SESSION)
    command += [*words_of(BY_DEST["run_dir"], folder), "--epochs", str(last)]
    return (
        f"the epochs are saved in {folder} on {job.workers.hosts[0]}, resume with\n  "
        f"{shlex.join(command)}"
    )


def _command_with(job: Job, wanted: Callable[[Flag], bool]) -> list[str]:
    """The program of a job with those of its flags that are `wanted`, as words."""
    command = list(job.program)
    for flag in FLAGS:
        if flag.dest in job.given and flag.name not in SET_TO_RESUME and wanted(flag):
            command += words_of(flag, job.given[flag.dest])
    return command


# ---- --load-path


def refuse_to_undo(saved: SavedRun) -> None:
    """Raise UserError if resuming from a file would overwrite other epochs of its run."""
    latest = saved.path.with_name("checkpoint.tar")
    if saved.path.name != latest.name and exists(latest):
        epochs = len(saved.history.epochs)
        latest_epochs = len(open_saved(latest, "train").history.epochs)
        if epochs != latest_epochs:
            raise UserError(
                f"{saved.path} has {count(epochs, 'epoch')}, {latest} has {latest_epochs}, "
                "which would be overwritten: copy the file to a folder of its own"
            )


def epochs_left(saved: SavedRun) -> int:
    """The number of requested epochs that a run does not have yet."""
    return max(0, saved.history.requested - len(saved.history.epochs))


def how_to_resume(job: Job, folder: str | None, first: int) -> str:
    """Describe what is saved of a training that began after `first` epochs, and give the shortest
    command that resumes it. folder: of the run, None without --save."""
    if not folder:
        return "this run was not saved (use --save)"
    if not exists(pathlib.Path(folder, "checkpoint.tar")):
        return f"nothing is left to resume in {folder}"
    done = len(open_saved(folder, "train").history.epochs)  # an epoch may just be written
    if done - first >= job.config.optimizer.epochs:
        return f"{_are_saved(done)} in {folder}, as many as requested"
    # changes of this session are saved only with its first epoch
    unsaved = job.saved is not None and done == first
    command = _command_with(job, lambda flag: flag.scope == SESSION or unsaved)
    remaining = job.config.optimizer.epochs - (done - first)
    command += [*words_of(BY_DEST["load_path"], folder), "--epochs", str(remaining)]
    return f"{_are_saved(done)} in {folder}, resume with\n  {shlex.join(command)}"


def _are_saved(epochs: int) -> str:
    return f"{count(epochs, 'epoch')} {'is' if epochs == 1 else 'are'} saved"
