"""Run folders: created atomically, with files that are replaced atomically, and locked for one
training at a time."""

import contextlib
import csv
import dataclasses
import datetime
import errno
import functools
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import socket
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from data_files import refusing_links
from data_utils import UserError, one_line
from experiment.config import Config
from experiment.plots import style
from experiment.results.training import write_scalars
from experiment.runs.files import (
    TEXT,
    Lock,
    WriteFailed,
    append,
    csv_cell,
    hidden_name,
    left_behind,
    owner_is_gone,
    read_table,
    read_text,
    replacing,
    why,
    write_text,
)
from experiment.version import git_revision

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch.utils.tensorboard import SummaryWriter


FIGURE = "# figure: "  # begins the line of a table that is the caption of its figure


@dataclasses.dataclass(frozen=True)
class Setup:
    """What a training was started with, as hyperparameters.txt and config.json record it.

    model: printed as a module tree"""

    command_line: str
    config: Config
    model: torch.nn.Module
    device: torch.device


class RunFolder:
    """The folder of one run.

    folder: its path; figures: the format of its figures, png, pdf or svg; about: model and task,
    for their captions; at_commit: a function that is called once, after the first commit."""

    def __init__(self, folder: str | os.PathLike, figures: str = "png", about: str = ""):
        self.folder = pathlib.Path(folder)
        self.figures = figures
        self.about = about
        self.at_commit: Callable[[], None] | None = None
        self._locks: list[Lock] = []
        self._board: SummaryWriter | None = None
        self._not_drawn: set[str] = set()  # names of the figures that a warning was printed for

    @classmethod
    def create(
        cls, setup: Setup, checkpoint: dict, root: str | os.PathLike = "results"
    ) -> "RunFolder":
        """Create root/ALG/LOSS/yyyy-mm-dd/hh-mm-ss_gpuN (or _cpu; then _2, _3 ...), locked.

        It appears with hyperparameters.txt and the checkpoint of epoch 0 inside, so that a run
        killed at any moment can resume."""
        config = setup.config
        now = datetime.datetime.now()
        device = "cpu" if setup.device.type == "cpu" else f"gpu{setup.device.index or 0}"
        parent = pathlib.Path(root, config.learning.alg, config.model.loss, f"{now:%Y-%m-%d}")
        final = parent / f"{now:%H-%M-%S}_{device}"
        hidden = hidden_name(final)
        try:
            hidden.mkdir(parents=True)
            run = cls(hidden, config.session.figures, config.about)
            run.lock()  # first, see `remove_half_made`
            run.write_hyperparameters(setup)
            run.save("checkpoint.tar", checkpoint)
            attempt = 1
            target = final
            while not run._move(target):
                attempt += 1
                target = final.with_name(f"{final.name}_{attempt}")
            return run
        except OSError as e:
            raise WriteFailed(f"cannot create the run folder {final}: {why(e)}") from None
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def _move(self, folder: pathlib.Path) -> bool:
        """Rename the folder; False if there is another of that name."""
        try:
            os.rename(self.folder, folder)
        except OSError as e:
            if e.errno in (errno.EEXIST, errno.ENOTEMPTY):  # another run was first
                return False
            raise
        self.folder = folder
        self._locks[0].path = folder / ".lock"
        return True

    def begin(self, setup: Setup, checkpoint: dict) -> None:
        """Make this folder, which exists and is locked, a new run.

        The checkpoint of epoch 0 comes first: from then on the run can resume, and `complete`
        writes what is missing."""
        self.save("checkpoint.tar", checkpoint)
        self.write_hyperparameters(setup)

    def complete(self, setup: Setup) -> None:
        """Write the files that are missing because a kill stopped `begin`."""
        if not (self.folder / "hyperparameters.txt").exists():
            self.write_hyperparameters(setup)

    def lock(self, table: str = "") -> None:
        """Lock the folder, or a table in it, until `release`. Raises UserError if another process
        has locked it."""
        self._locks.append(Lock(self.folder, table))

    def release(self) -> None:
        """Release all locks."""
        if self._board:
            self._board.close()
        while self._locks:
            self._locks.pop().release()

    def clean_up(self) -> None:
        """Remove half-written files of killed processes. Only for the training with the lock."""
        for path in self.folder.glob(".*.tmp-*"):
            if left_behind(path):
                path.unlink(missing_ok=True)

    def check_writable(self) -> None:
        """Raise UserError if nothing can be written to the folder, before the work begins."""
        probe = hidden_name(self.folder / "probe")
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as e:
            raise UserError(
                f"cannot write to {self.folder}, where the results would go: {why(e)}"
            ) from None

    # ---- its files

    def write_hyperparameters(self, setup: Setup) -> None:
        """Write config.json and then, see `complete`, hyperparameters.txt."""
        args = setup.config.flat()
        self.write_config(args)
        lines = [
            *_heading(setup.command_line, setup.device),
            "",
            "arguments:",
            *(f"  {name}: {value!r}" for name, value in sorted(args.items())),
            "",
            "model:",
            str(setup.model),
        ]
        self.write_lines("hyperparameters.txt", lines)

    def write_config(self, args: dict) -> None:
        """Write every argument to config.json. args: {dest: value}."""
        self.write_lines("config.json", [json.dumps(args, indent=2, sort_keys=True)])

    def note_resumption(self, setup: Setup, epoch: int, before: dict) -> None:
        """Append to hyperparameters.txt that a training resumes from `epoch` on, and rewrite
        config.json. before: {dest: value} of the arguments until now."""
        args = setup.config.flat()
        changed = [
            f"  {name}: {value!r}  # before: {before[name]!r}"
            for name, value in sorted(args.items())
            if name in before and before[name] != value
        ]
        lines = [
            "",
            f"resumed from epoch {epoch} on",
            *_heading(setup.command_line, setup.device),
            "arguments that differ from before:",
            *(changed or ["  none"]),
        ]
        self.append_hyperparameters("\n".join(lines))
        self.write_config(args)

    def append_hyperparameters(self, text: str) -> None:
        """Append lines to hyperparameters.txt in one write."""
        append(self.folder / "hyperparameters.txt", text + "\n")

    def save(self, name: str, state: dict) -> None:
        """torch.save to a file that is replaced atomically."""
        with replacing(self.folder / name) as beside:
            try:
                torch.save(state, beside)
            except RuntimeError as e:  # of torch, if the disk is full or the folder is gone
                raise _disk_error(beside, e) from None

    def write_csv(self, name: str, rows: list[dict]) -> None:
        """Write a table; missing cells are empty."""
        with replacing(self.folder / name) as path, open(path, "w", newline="", **TEXT) as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
            writer.writeheader()
            writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)

    def read_csv(self, name: str) -> list[dict[str, str]]:
        """The rows of a table; [] without the file. Raises UserError if it cannot be read."""
        try:
            return read_table(self.folder / name)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder / name} cannot be read: {one_line(e)}") from None

    def append_csv(self, name: str, rows: list[dict]) -> None:
        """Add rows to a table."""
        self.write_csv(name, self.read_csv(name) + rows)

    def commit(self, state: dict, resumable: dict, improved: bool, final: bool) -> None:
        """Write the models of an epoch and metrics.csv. The checkpoint comes last and commits the
        epoch: after a kill before it, resuming repeats the epoch and rewrites everything.

        state, resumable: of `runs.checkpoint`; improved: whether the model is the best so far;
        final: whether the training ends."""
        self.write_csv("metrics.csv", state["history"])
        if improved:
            self.save("model.pt", state)
        if final:
            self.save("final_model.pt", state)
            self.save("final_checkpoint.tar", {**state, **resumable})
        if state["config"].get("tensorboard"):
            self._board = write_scalars(self._board, self.folder, state["history"][-1])
        self.save("checkpoint.tar", {**state, **resumable})
        if self.at_commit:
            self.at_commit()
            self.at_commit = None

    def restore(self, epochs: list[dict], best: dict | None) -> None:
        """Make the tables and model.pt those of `epochs`, the rows of metrics.csv.

        A killed process may have written one epoch more, which can differ when it is repeated.
        best: the checkpoint of the best model, or None if it is not known."""
        rows = self.read_csv("gducheck.csv")
        if rows:
            numbers = [row.get("epoch") or "" for row in rows]
            kept = [not n.isdecimal() or int(n) <= len(epochs) for n in numbers]
            self.write_csv("gducheck.csv", list(itertools.compress(rows, kept)))
        if epochs:
            self.write_csv("metrics.csv", epochs)
        if best is not None:
            self.save("model.pt", best)

    def write_lines(self, name: str, lines: Sequence[str]) -> None:
        """Write a text file."""
        write_text(self.folder / name, "\n".join(lines) + "\n")

    @property
    def title(self) -> str:
        """Model and task, and the run's path below results/ or, of a folder elsewhere, the last two
        parts of its path."""
        parts = self.folder.resolve().parts
        shown = parts[parts.index("results") + 1 :] if "results" in parts else parts[-2:]
        return ", ".join(filter(None, (self.about, "/".join(shown))))

    def save_figure(
        self,
        name: str,
        draw: "Callable[..., Figure]",
        *args: Any,
        table: Callable[[], contextlib.AbstractContextManager] | None = None,
    ) -> None:
        """Save the figure draw(*args) in the format of `figures`, and its caption beside it.

        The caption is NAME.txt or, if that is a table of results, a comment of its head. table: the
        block in which no other process writes that table.

        Raises no Exception: a figure that cannot be drawn or written is a warning on standard
        error, once per figure. Write the results that it shows first."""
        path = (self.folder / name).with_suffix(f".{self.figures}")
        try:
            figure = draw(*args)
            with replacing(path) as beside:
                style.save_figure(figure, beside, self.figures, self.title, creator())
            with table() if table else contextlib.nullcontext():
                caption = str(figure.get_label())
                self._write_caption(path.with_suffix(".txt"), caption, bool(table))
        except Exception as e:
            if name not in self._not_drawn:
                self._not_drawn.add(name)
                reason = one_line(e).removeprefix(f"cannot write {path}: ")[:300]
                print(f"warning: {path} was not drawn: {reason}", file=sys.stderr, flush=True)

    def _write_caption(self, path: pathlib.Path, caption: str, table: bool) -> None:
        lines = [caption, self.title]
        if table:
            results = read_text(path).splitlines()
            lines = [line for line in results if not line.startswith(FIGURE)]
            head = list(itertools.takewhile(lambda line: line.startswith("#"), lines))
            # below what was measured and how, two lines at most; at the end of a text without head
            place = min(len(head), 2) or len(lines)
            lines.insert(place, FIGURE + " ".join(caption.split()))
        self.write_lines(path.name, lines)


def remove_half_made(folder: pathlib.Path) -> None:
    """Remove the hidden folders below results/ALG/LOSS that killed processes left: runs without an
    epoch, and folders that earlier versions locked for a seed."""
    for path in [*folder.glob(".seed_*"), *folder.glob("*/.[0-9]*")]:
        if path.is_symlink() or not path.is_dir() or (path / "metrics.csv").exists():
            continue
        of_seed = path.name.startswith(".seed_")
        # a run is locked right after its folder is made
        if of_seed or (path / ".lock").exists() or owner_is_gone(path):
            with contextlib.suppress(UserError):
                lock = Lock(path)
                shutil.rmtree(path, ignore_errors=True)
                lock.release()


def _disk_error(path: pathlib.Path, error: RuntimeError) -> OSError:
    """The OSError behind a RuntimeError of torch.save, found by writing to the same file."""
    try:
        with open(path, "ab", opener=refusing_links) as file:
            file.write(b"0" * 2**16)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        return e
    return OSError(errno.EIO, one_line(error).split(". ")[0])


def _heading(command_line: str, device: torch.device) -> list[str]:
    """Lines about a call: command, date, machine and versions."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        name = platform.processor() or platform.machine()
    return [
        f"command line: {command_line}",
        f"date: {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        f"device: {device} ({name})",
        f"host: {socket.gethostname()}",
        f"threads: {torch.get_num_threads()}",
        *(f"{name}: {value}" for name, value in versions().items()),
    ]


def fingerprint(state: dict[str, torch.Tensor]) -> str:
    """A short digest of a state dict's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(name.encode())
        digest.update(tensor.flatten().contiguous().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


@functools.cache
def versions() -> dict[str, str]:
    """The versions of libraries and code that a run depends on."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        # not imported, which takes seconds
        "torchvision": importlib.metadata.version("torchvision"),
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "none",
        "git revision": git_revision(),
    }


def creator() -> str:
    """The versions of what draws a figure."""
    own = versions()
    matplotlib = importlib.metadata.version("matplotlib")
    return f"git revision {own['git revision']}, torch {own['torch']}, Matplotlib {matplotlib}"
