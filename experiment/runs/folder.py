"""Run folders: a folder that appears whole, whose files are replaced whole, and one training at a
time in it."""

import contextlib
import csv
import datetime
import errno
import hashlib
import importlib.metadata
import itertools
import json
import os
import pathlib
import platform
import shutil
import socket
import subprocess
import sys

import numpy as np
import torch

from data_files import refusing_links
from data_utils import UserError, one_line
from experiment import records
from experiment.drawing import run_title, style
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
    replacing,
    why,
    write_text,
)


class RunFolder:
    """The folder of one run. folder: its path; figures: the format of its figures, png or pdf;
    about: model and task, for their titles. Whatever looks at a run leaves alone what a training
    may be writing just now."""

    def __init__(self, folder, figures="png", about=""):
        self.folder, self.figures, self.about = pathlib.Path(folder), figures, about
        self._locks, self._board, self.at_commit = (
            [],
            None,
            None,
        )  # called once, after the first commit
        self._not_drawn = set()  # names of the figures that a warning was printed for

    @classmethod
    def create(cls, args, device, command_line, model, checkpoint, root="results"):
        """A new folder root/ALG/LOSS/yyyy-mm-dd/hh-mm-ss_gpuN (or _cpu; with _2, _3 ... behind it
        where that exists). It appears with hyperparameters.txt and the checkpoint of epoch 0
        inside, so that a run killed at any moment can be resumed, and locked."""
        now = datetime.datetime.now()
        place = "cpu" if device.type == "cpu" else f"gpu{device.index or 0}"
        final = pathlib.Path(
            root,
            args.alg,
            args.loss,
            now.strftime("%Y-%m-%d"),
            now.strftime("%H-%M-%S") + "_" + place,
        )
        hidden = hidden_name(final)
        try:
            hidden.mkdir(parents=True)
            run = cls(hidden, args.figures, f"{args.model} on {args.task}")
            run.lock()  # first, see `remove_half_made`
            run.write_hyperparameters(command_line, vars(args), model, device)
            run.save("checkpoint.tar", checkpoint)
            for attempt in itertools.count(1):
                run._move(final if attempt == 1 else final.with_name(f"{final.name}_{attempt}"))
                if run.folder != hidden:
                    return run
        except OSError as e:
            raise WriteFailed(f"cannot create the run folder {final}: {why(e)}") from None
        finally:
            shutil.rmtree(hidden, ignore_errors=True)

    def _move(self, folder):
        """Renames the folder, where there is none of that name yet."""
        try:
            os.rename(self.folder, folder)
        except OSError as e:
            if e.errno not in (errno.EEXIST, errno.ENOTEMPTY):  # not that another run was first
                raise
            return
        self.folder, self._locks[0].path = folder, folder / ".lock"

    def begin(self, checkpoint, command_line, args, model, device):
        """Make this folder, which exists and is locked, a new run. The checkpoint of epoch 0 comes
        first: from then on the run can be resumed, and `complete` writes what is missing."""
        self.save("checkpoint.tar", checkpoint)
        self.write_hyperparameters(command_line, vars(args), model, device)

    def complete(self, command_line, args, model, device):
        """Write what `begin` did not come to before a kill."""
        if not (self.folder / "hyperparameters.txt").exists():
            self.write_hyperparameters(command_line, vars(args), model, device)

    def lock(self, table=""):
        """Holds the folder, or a table in it, for this process until `release`. Raises UserError
        where another one has it."""
        self._locks.append(Lock(self.folder, table))

    def release(self):
        if self._board:
            self._board.close()
        while self._locks:
            self._locks.pop().release()

    def clean_up(self):
        """Removes what killed processes left half-written. For the training that holds the lock."""
        for path in self.folder.glob(".*.tmp-*"):
            if left_behind(path):
                path.unlink(missing_ok=True)

    def check_writable(self):
        """Raises UserError where nothing can be written to the folder: before the work, not
        after."""
        probe = hidden_name(self.folder / "probe")
        try:
            probe.touch(exist_ok=False)
            probe.unlink()
        except OSError as e:
            raise UserError(
                f"cannot write to {self.folder}, where the results would go: {why(e)}"
            ) from None

    # ---- its files

    def write_hyperparameters(self, command_line, args, model, device):
        self.write_config(args)
        write_text(
            self.folder / "hyperparameters.txt",
            "\n".join(
                [  # last, see `complete`
                    *_heading("command line", command_line, device),
                    "",
                    "arguments:",
                    *(f"  {name}: {value!r}" for name, value in sorted(args.items())),
                    "",
                    "model:",
                    str(model),
                    "",
                ]
            ),
        )

    def write_config(self, args):
        """Writes every argument to config.json. args: {dest: value}."""
        write_text(self.folder / "config.json", json.dumps(args, indent=2, sort_keys=True) + "\n")

    def note_resumption(self, command_line, device, epoch, before, args):
        """Appends to hyperparameters.txt that a training goes on from `epoch`, and renews
        config.json. before, args: dicts of the arguments until now and now."""
        changed = [
            f"  {name}: {value!r}  # before: {before[name]!r}"
            for name, value in sorted(args.items())
            if name in before and before[name] != value
        ]
        self.append_hyperparameters(
            "\n".join(
                [
                    "",
                    f"resumed from epoch {epoch} on",
                    *_heading("command line", command_line, device),
                    "arguments that differ from before:",
                    *(changed or ["  none"]),
                ]
            )
        )
        self.write_config(args)

    def append_hyperparameters(self, text):
        """Appends lines, in one write: who else appends at the same time loses nothing."""
        append(self.folder / "hyperparameters.txt", text + "\n")

    def save(self, name, state):
        """torch.save into a file that is replaced whole."""
        with replacing(self.folder / name) as beside:
            try:
                torch.save(state, beside)
            except (
                RuntimeError
            ) as e:  # torch's way to say that the disk is full, or the folder gone
                raise _disk_error(beside, e) from None

    def write_csv(self, name, rows):
        """rows: list of dicts; what a row lacks stays empty."""
        with replacing(self.folder / name) as path, open(path, "w", newline="", **TEXT) as file:
            writer = csv.DictWriter(file, dict.fromkeys(key for row in rows for key in row))
            writer.writeheader()
            writer.writerows({key: csv_cell(value) for key, value in row.items()} for row in rows)

    def read_csv(self, name):
        """The rows of a table as dicts of texts; [] where there is none. Raises UserError where it
        cannot be read."""
        try:
            return read_table(self.folder / name)
        except FileNotFoundError:
            return []
        except (OSError, ValueError) as e:
            raise UserError(f"{self.folder / name} cannot be read: {one_line(e)}") from None

    def append_csv(self, name, rows):
        self.write_csv(name, self.read_csv(name) + rows)

    def commit(self, state, resumable, improved, final):
        """Writes the models of an epoch, and the table of its history. The checkpoint comes last
        and commits it: before it, resuming repeats the epoch, and writes all again of what the
        checkpoint says. state, resumable: of `experiment.runs.history`; improved: whether the model is the
        best until now; final: whether the training ends."""
        self.write_csv("metrics.csv", state["history"])
        if improved:
            self.save("model.pt", state)
        if final:
            self.save("final_model.pt", state)
            self.save("final_checkpoint.tar", {**state, **resumable})
        if state["config"].get("tensorboard"):
            self._board = records.write_scalars(self._board, self.folder, state["history"][-1])
        self.save("checkpoint.tar", {**state, **resumable})
        told, self.at_commit = self.at_commit, None
        if told:
            told()

    def restore(self, history, best):
        """Makes the log, the table and model.pt those of the epochs in `history`: a killed process
        may have written of one more, which need not come out the same again. best: the checkpoint
        of the best model, or None where it is not known."""
        self._forget_after(len(history))
        if history:
            self.write_csv("metrics.csv", history)
        if best is not None:
            self.save("model.pt", best)

    def _forget_after(self, epoch):
        rows = self.read_csv("gducheck.csv")
        if rows:
            self.write_csv(
                "gducheck.csv",
                [
                    row
                    for row in rows
                    if not (row.get("epoch") or "").isdecimal() or int(row["epoch"]) <= epoch
                ],
            )

    def write_lines(self, name, lines):
        write_text(self.folder / name, "\n".join(lines) + "\n")

    def save_figure(self, name, draw, *args):
        """Save the figure draw(*args), which gets the run's title, in the format of `figures`,
        whatever the ending of `name`. Never raises an Exception: a figure that cannot be drawn or
        written is a warning on standard error, one line per figure however often it fails. Write
        the results that it shows before."""
        path = (self.folder / name).with_suffix(f".{self.figures}")
        try:
            with style():
                figure = draw(*args)
                figure.suptitle(f"{figure.get_suptitle()}\n{run_title(self.folder, self.about)}")
                with replacing(path) as beside:
                    figure.savefig(beside, format=self.figures)
        except Exception as e:
            if name not in self._not_drawn:
                self._not_drawn.add(name)
                reason = one_line(e).removeprefix(f"cannot write {path}: ")[:300]
                print(f"warning: {path} was not drawn: {reason}", file=sys.stderr, flush=True)

    def next_number(self, stem):
        """The first number at which there is no STEM_number.txt yet."""
        return next(n for n in itertools.count(1) if not (self.folder / f"{stem}_{n}.txt").exists())

    def move_aside(self, stem, ends, also=()):
        """Renames the files STEM + end, those that exist, to STEM_1 + end, or the first number at
        which there is no .txt yet; also: further stems, whose files get the same number."""
        number = self.next_number(stem)
        for name, end in itertools.product((*also, stem), ends):
            old = self.folder / (name + end)
            if old.exists():
                os.replace(old, self.folder / f"{name}_{number}{end}")

    def finish_move(self, stem, ends):
        """Goes on where a kill ended `move_aside`, which leaves files of a number without their
        .txt."""
        if any((self.folder / f"{stem}_{self.next_number(stem)}{end}").exists() for end in ends):
            self.move_aside(stem, ends)


def remove_half_made(folder):
    """Removes the hidden folders below results/ALG/LOSS that killed processes left: runs that were
    not complete yet, which have no epoch, and claims of seeds by earlier versions."""
    for path in [*folder.glob(".seed_*"), *folder.glob("*/.[0-9]*")]:
        if path.is_symlink() or not path.is_dir() or (path / "metrics.csv").exists():
            continue
        claim = path.name.startswith(".seed_")
        # a run is locked right after its folder is made
        if claim or (path / ".lock").exists() or owner_is_gone(path):
            with contextlib.suppress(UserError):
                lock = Lock(path)
                shutil.rmtree(path, ignore_errors=True)
                lock.release()


def _disk_error(path, error):
    """The OSError behind a RuntimeError of torch.save: what writing to the same place says."""
    try:
        with open(path, "ab", opener=refusing_links) as file:
            file.write(b"0" * 2**16)
            file.flush()
            os.fsync(file.fileno())
    except OSError as e:
        return e
    return OSError(errno.EIO, one_line(error).split(". ")[0])


def _heading(title, command_line, device):
    name = (
        torch.cuda.get_device_name(device)
        if device.type == "cuda"
        else platform.processor() or platform.machine()
    )
    return [
        f"{title}: {command_line}",
        f"date: {datetime.datetime.now():%Y-%m-%d %H:%M:%S}",
        f"device: {device} ({name})",
        f"host: {socket.gethostname()}",
        f"threads: {torch.get_num_threads()}",
        *(f"{name}: {value}" for name, value in versions().items()),
    ]


def fingerprint(state):
    """A short digest of a state dict's weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        digest.update(
            name.encode() + tensor.flatten().contiguous().view(torch.uint8).numpy().tobytes()
        )
    return digest.hexdigest()[:16]


def versions():
    """What a run depends on besides its arguments."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        revision = subprocess.run(
            git, capture_output=True, text=True, cwd=pathlib.Path(__file__).parent
        ).stdout.strip()
    except OSError:  # no git
        revision = ""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "torchvision": importlib.metadata.version(
            "torchvision"
        ),  # not imported: that takes seconds
        "numpy": np.__version__,
        "cuda": torch.version.cuda or "none",
        "git revision": revision or "unknown",
    }
