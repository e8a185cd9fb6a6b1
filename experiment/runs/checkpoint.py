"""Checkpoints: their format, reading a saved run, and resuming from it.

A file can come from anywhere: `open_saved` returns only what `contents` has validated, and
`restore` loads only what `training_state` has compared with the run."""

import dataclasses
import os
import pathlib
import stat
from typing import Any

import torch

from data_files import open_regular
from data_utils import UserError, one_line
from experiment.config import ARCHITECTURE, FLAGS, LARGEST
from experiment.runs import contents, legacy, torch_file, training_state
from experiment.runs.contents import Damaged
from experiment.runs.files import printable
from experiment.runs.find import closest, find_runs
from experiment.runs.history import History, best_of, changes, chosen_on, other_images
from experiment.text import name_path

# Files of a run folder that are no checkpoints
OTHER_FILES = (".csv", ".txt", ".json", ".jsonl", ".png", ".pdf", ".svg", ".npz")
MOST_NAMED = 5  # runs in an error


# ---- the format: written


def snapshot(model: torch.nn.Module, config: dict, history: History) -> dict:
    """The content of a saved model after the epochs of `history`. config: {dest: value}."""
    content = saved_model(model.state_dict(), config, history.epochs, history.resumptions)
    return {**content, "best": history.best_accuracy}


def saved_model(
    weights: dict[str, torch.Tensor],
    config: dict,
    epochs: list[dict],
    resumptions: dict[int, str] | None,
) -> dict:
    """The content of a saved model, with the keys of the original code about its epochs.

    config: {dest: value}; epochs: the rows of metrics.csv; resumptions: of `History`."""
    return {
        "model_state_dict": weights,
        "config": config,
        "epoch": len(epochs),
        "history": epochs,
        "resumptions": resumptions,
        "train_acc": [row["train_acc"] for row in epochs],
        "test_acc": [row["test_acc"] for row in epochs],
        "best": best_of(epochs),
    }


# The names of what `resumable_state` adds.
RESUMABLE = ("opt", "scheduler", "random_states", "best_model", "asked")


def resumable_state(
    history: History,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    generator: torch.Generator,
) -> dict:
    """What a checkpoint contains besides `snapshot`, so that training can resume from it.

    It contains the best model, so that one file commits all that an epoch changes."""
    return {
        "opt": optimizer.state_dict(),
        "scheduler": scheduler and scheduler.state_dict(),
        "random_states": training_state.random_states(generator),
        "best_model": history.best,
        "asked": history.requested,
    }


# ---- the format: read


def read_checkpoint(path: str | os.PathLike) -> dict:
    """The content of a checkpoint file: a dict with a model_state_dict, and nothing validated.

    A module pickled by the original code is converted. Runs no code from the file. Raises
    UserError, one line with the file's name, for anything else."""
    return _read(path)[0]


def _read(path: str | os.PathLike) -> tuple[dict, int]:
    """(what `read_checkpoint` returns, time of the file's last change in ns)."""
    empty = False
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            empty = not status.st_size
            state = torch_file.load(file, status.st_size)
        if isinstance(state, legacy.Pickled):
            state = legacy.checkpoint_of(state)
    except FileNotFoundError:
        raise UserError(f"{name_path(path)} does not exist") from None
    except Exception as e:  # a damaged file can fail in any way
        reason = "it is empty" if empty else printable(one_line(e))[:300]  # it can quote the file
        if pathlib.Path(path).suffix in OTHER_FILES:
            reason = "it is no checkpoint; name the run folder, or its model.pt or checkpoint.tar"
        raise UserError(f"{name_path(path)} cannot be loaded: {reason}") from None
    if isinstance(state, dict) and state and all(map(torch.is_tensor, state.values())):
        state = {"model_state_dict": state}  # a bare state dict
    if not isinstance(state, dict) or not isinstance(state.get("model_state_dict"), dict):
        raise UserError(
            f"{name_path(path)} is no checkpoint of a model: it contains no model_state_dict"
        )
    return state, status.st_mtime_ns


@dataclasses.dataclass
class SavedRun:
    """A saved run, validated except for `optimizer` and `scheduler`.

    path: the checkpoint file
    weights: {name: float32 tensor}
    args: {dest: value} of the arguments that the run records, and fingerprints of its data
        (`config.FINGERPRINTS`)
    stamp: time of the file's last change in ns, to notice that it has changed since
    random_states: of `training_state.random_states`, or None
    optimizer, scheduler: state dicts from the file, or None; `restore` validates them
    own: whether this program wrote the file
    best_beside: the best model if the checkpoint has none, see `_best_beside`; only for training"""

    path: pathlib.Path
    weights: dict[str, torch.Tensor]
    args: dict
    stamp: int
    history: History
    random_states: dict | None
    optimizer: object
    scheduler: object
    own: bool
    best_beside: dict | None = None

    @property
    def source(self) -> str:
        """The file's name, its epochs and how the model was chosen, to be printed."""
        epochs = len(self.history.epochs)
        if not epochs:
            return self.path.name
        chosen = {
            "model.pt": "the best on " + chosen_on(self.args),
            "final_model.pt": "the last of its training",
        }
        return f"{self.path.name} (epoch {epochs}, {chosen.get(self.path.name, 'the latest')})"


def find_saved(path: str | os.PathLike, todo: str) -> pathlib.Path:
    """The checkpoint file of --load-path: the file itself, or in a folder the latest epoch for
    training, the best model for every other --todo. Raises UserError."""
    names = ["checkpoint.tar"] if todo == "train" else ["model.pt", "checkpoint.tar"]
    if stat.S_ISREG(_mode(path)):
        return pathlib.Path(path)
    if not stat.S_ISDIR(_mode(path)):
        problem = f"{name_path(path)} is no folder and no file{closest(path)}"
        raise UserError(f"argument --load-path: {problem}")
    paths = [pathlib.Path(path, name) for name in names]
    found = next(filter(_mode, paths), None)
    if found is None:
        lacking = f"{name_path(path)} has no {' or '.join(names)}"
        raise UserError(f"argument --load-path: {lacking}{_runs_below(path, names)}")
    if not stat.S_ISREG(_mode(found)):
        raise UserError(f"argument --load-path: {name_path(found)} is no file")
    return found


def _runs_below(path: str | os.PathLike, names: list[str]) -> str:
    """The runs below a folder that have one of the files, for an error; '' without one."""
    runs = [str(run) for run in find_runs([path]) if any(_mode(run / name) for name in names)]
    if not runs:
        return ""
    more = " ..." if len(runs) > MOST_NAMED else ""
    return f"; name one of its runs: {printable(', '.join(runs[:MOST_NAMED]))}{more}"


def _mode(path: str | os.PathLike) -> int:
    """The st_mode of a file or folder; 0 if there is none."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise UserError(
            f"argument --load-path: {name_path(path)} cannot be read: permission denied"
        ) from None
    except (OSError, ValueError):  # ValueError: not a possible path
        return 0


def open_saved(path: str | os.PathLike, todo: str) -> SavedRun:
    """Read and validate the run, or the file of a run, that --load-path names. Raises UserError."""
    path = find_saved(path, todo)
    state, stamp = _read(path)
    try:
        saved = _validated(state, path, stamp)
        if todo == "train" and saved.own:
            _expect_all_for_training(saved)
    except Damaged as e:
        raise UserError(f"{name_path(path)} is damaged: {e}") from None
    if todo == "train" and saved.history.best is None:
        saved.best_beside = _best_beside(saved)
    return saved


def _validated(state: dict, path: pathlib.Path, stamp: int) -> SavedRun:
    own = "config" in state
    weights = contents.weights(state["model_state_dict"])
    lists = not own and "history" not in state
    epochs = legacy.history(state) if lists else contents.history(state)
    accuracy = best_of(epochs)
    if own and state.get("best") is not None:  # of the original code: a number of images
        accuracy = float(contents.number(state["best"], "best", -1, 100))
    return SavedRun(
        path=path,
        weights=weights,
        args=_arguments(state, path, weights),
        stamp=stamp,
        history=History(
            epochs=epochs,
            best=_best_model(state.get("best_model"), weights, path),
            best_accuracy=accuracy,
            resumptions=contents.resumptions(state.get("resumptions")),
            requested=contents.number(state.get("asked", 0), "asked", 0, LARGEST, whole=True),
        ),
        random_states=training_state.validated_random_states(state.get("random_states")),
        optimizer=state.get("opt"),
        scheduler=state.get("scheduler"),
        own=own,
    )


def _best_model(saved: Any, own: dict[str, torch.Tensor], path: pathlib.Path) -> dict | None:
    """The best model in a checkpoint with the weights `own`; None without one."""
    if saved is None:
        return None
    contents.expect(isinstance(saved, dict), "best_model", saved)
    weights = contents.weights(saved.get("model_state_dict"))
    return saved_model(
        contents.conform(weights, own, "best_model"),
        contents.config(saved.get("config"), path),
        contents.history(saved),
        contents.resumptions(saved.get("resumptions")),
    )


def _expect_all_for_training(saved: SavedRun) -> None:
    """Raise if a checkpoint of this program lacks something that exact resumption needs."""
    needed = {"opt": saved.optimizer, "random_states": saved.random_states}
    if saved.args["lr_decay"] or saved.args.get("lr_step"):
        needed["scheduler"] = saved.scheduler
    missing = [name for name, value in needed.items() if value is None]
    if missing and saved.path.suffix == ".pt":  # a model, as every run saves it
        raise UserError(
            f"{name_path(saved.path)} lacks {' and '.join(missing)}, which resuming needs: name "
            "the run folder, or a checkpoint.tar"
        )
    if missing:
        raise Damaged(f"it lacks {' and '.join(missing)}, which resuming needs")


def _arguments(state: dict, path: pathlib.Path, weights: dict[str, torch.Tensor]) -> dict:
    """{dest: value} of the arguments that a run records: in its config or, without one, in its
    pickled module, then in its hyperparameters.txt, then in the shapes of its weights."""
    if "config" in state:
        config = contents.config(state["config"], path)
        return {**contents.validated_arguments(config, path), **contents.data(config)}
    pickled = state.get("architecture", {})
    contents.expect(isinstance(pickled, dict), "architecture", pickled)
    text = path.with_name("hyperparameters.txt")
    return {
        **contents.validated_arguments(legacy.architecture(weights), path),
        **contents.validated_arguments(legacy.read_arguments(path.parent), text),
        **contents.validated_arguments(pickled, path),
    }


def load_weights(model: torch.nn.Module, saved: SavedRun) -> None:
    """Load the run's weights into the model. Raises UserError if they do not fit."""
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError as e:
        kind = saved.args.get("model")
        unknown = [
            f"--{flag.name}"
            for flag in FLAGS
            if flag.scope == ARCHITECTURE
            and flag.dest not in saved.args
            and (flag.kind is int and flag.many or flag.dest in ("model", "pools"))
            and (kind is None or flag.models is None or kind in flag.models)
        ]
        reason = one_line(e).partition(": ")[2][:600]
        if unknown:
            reason += f"; the run does not record {', '.join(unknown)}: give these flags"
        raise UserError(
            f"the weights in {name_path(saved.path)} do not fit the model: {reason}"
        ) from None


def restore(
    saved: SavedRun,
    args: dict,
    optimizer: torch.optim.Optimizer,
    scheduler: Any,
    generator: torch.Generator,
) -> History:
    """Load the rest of a checkpoint and return the history that the training continues.

    args: {dest: value} from now on. A checkpoint of the original code has no random states. Raises
    UserError, with nothing changed, if optimizer or scheduler of the checkpoint are not those of
    this run."""
    moments = rates = None
    try:
        if saved.optimizer is not None:
            moments = training_state.optimizer_state(saved.optimizer, optimizer)
        if scheduler and saved.scheduler is not None:
            rates = training_state.scheduler_state(saved.scheduler, scheduler)
    except Damaged as e:
        raise UserError(f"{name_path(saved.path)} does not fit this run: {e}") from None
    if moments:
        optimizer.load_state_dict(moments)
    if rates:
        scheduler.load_state_dict(rates)
    if saved.random_states:
        training_state.restore_random_states(saved.random_states, generator)
    return _continued(saved, args)


def _continued(saved: SavedRun, now: dict) -> History:
    """The history of a run that resumes with the arguments `now`."""
    history = saved.history
    text = "; ".join(changes(saved.args, now))[:2000]
    before = history.resumptions or {}
    history = dataclasses.replace(
        history, resumptions={**before, len(history.epochs) + 1: printable(text)}
    )
    if other_images(saved.args, now):
        history.best = history.best or saved.best_beside
        history.best_accuracy = None
    return history


def _best_beside(saved: SavedRun) -> dict | None:
    """The snapshot in the model.pt beside a checkpoint without a best model, as earlier versions
    wrote it; None if there is none."""
    try:
        run = open_saved(saved.path.with_name("model.pt"), "evaluate")
    except UserError:
        return None
    history = run.history
    return saved_model(run.weights, run.args, history.epochs, history.resumptions)
