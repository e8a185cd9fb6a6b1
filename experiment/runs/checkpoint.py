"""Checkpoints: what is written of a run, and how it is read back. A file can come from anywhere:
`open_saved` hands on nothing that `untrusted` has not looked at, and `restore` nothing that
`training_state` has not held against the run."""

import ast
import contextlib
import dataclasses
import os
import pathlib
import re
import stat
import sys
import warnings

import torch

from data_files import open_regular
from data_utils import UserError, one_line
from experiment import arguments
from experiment.arguments import named
from experiment.flags import ALL
from experiment.runs import contents, torch_file, training_state
from experiment.runs.contents import Damaged
from experiment.runs.files import printable
from experiment.runs.history import Story, best_of, changes, chosen_on, other_images, summary
from experiment.runs.legacy import Pickled, checkpoint_of

LARGEST_TEXT = 2**20  # bytes of a hyperparameters.txt that are read; ours have two thousand
LARGEST_VALUE = 2000  # characters of a value in it that can be a list of numbers
NO_LITERAL = (
    ValueError,
    SyntaxError,
    TypeError,
    MemoryError,
    RecursionError,
)  # what ast.literal_eval raises

# Labels in the original code's hyperparameters.txt: the argument that each stands for
LABELS = {
    "data augmentation": "data_aug",
    "learning rate decay": "lr_decay",
    "scale for weight init": "scale",
    "activation": "act",
    "learning rates": "lrs",
    "weight decays": "wds",
    "momentum": "mmt",
    "optimizer": "optim",
    "minibatch size": "mbs",
    "random beta_2 sign": "random_sign",
    "random sign beta_2": "random_sign",
    "same update vfcnn": "same_update",
}


def read_checkpoint(path):
    """What a checkpoint file holds: a dict with a model_state_dict, of which nothing else has been
    looked at; a module pickled by the original code is read as one. Raises UserError, one line with
    the file's name, for anything else; runs no code."""
    return _read(path)[0]


def _read(path):
    """(what `read_checkpoint` returns, when the file was written in ns)"""
    empty = False
    try:
        with open_regular(path) as file:
            status = os.fstat(file.fileno())
            empty = not status.st_size
            state = torch_file.load(file, status.st_size)
        state = checkpoint_of(state) if isinstance(state, Pickled) else state
    except FileNotFoundError:
        raise UserError(f"{named(path)} does not exist") from None
    except Exception as e:  # a damaged file can fail in any way
        reason = printable(one_line(e))[:300]  # it can quote the file
        if pathlib.Path(path).suffix in (".csv", ".txt", ".json", ".png", ".pdf", ".npz"):
            reason = "it is no checkpoint; name the run folder, or its model.pt or checkpoint.tar"
        raise UserError(
            f"{named(path)} cannot be loaded: {'it is empty' if empty else reason}"
        ) from None
    if isinstance(state, dict) and state and all(map(torch.is_tensor, state.values())):
        state = {"model_state_dict": state}  # a bare state dict
    if not isinstance(state, dict) or not isinstance(state.get("model_state_dict"), dict):
        raise UserError(f"{named(path)} is no checkpoint of a model: it holds no model_state_dict")
    return state, status.st_mtime_ns


def read_arguments(folder):
    """The arguments written in a run folder's hyperparameters.txt, as text or plain values; {}
    where there are none.

    Reads lines `name: value` (any indentation, or a dash before them; value a Python literal or a
    word) as this program writes them, and as the original code does: its first line is the command
    line, which has priority, and some of its names are LABELS. Lines that make no sense are
    ignored, and text beyond LARGEST_TEXT bytes.
    """
    path = pathlib.Path(folder, "hyperparameters.txt")
    try:
        with open_regular(path) as file:
            lines = file.read(LARGEST_TEXT).decode("utf-8", "replace").splitlines()
    except OSError:
        return {}
    texts = {}
    for line in lines:
        name, colon, value = line.strip().lstrip("- \t").partition(":")
        name = name.partition("(")[0].strip()  # as in "momentum (if sgd)"
        name = LABELS.get(name.lower(), name)
        if colon and value.strip() and re.fullmatch(r"[A-Za-z]\w*", name):
            texts[name] = value.strip()
    values = {name: _value(text) for name, text in texts.items()}
    values = {name: value for name, value in values.items() if value != []}  # not given
    first = lines[0] if lines and not lines[0].startswith("command line:") else ""
    given = arguments.parse_leniently(first)
    differing = [
        f"--{flag.name}"
        for flag in ALL
        if flag.dest in given
        and flag.scope != "session"
        and values.get(flag.dest, given[flag.dest]) != given[flag.dest]
    ]
    if differing:
        print(
            f"note: {named(path)}: the command line and the lines below it differ in "
            f"{', '.join(differing)}; used: the command line",
            file=sys.stderr,
        )
    return {**(arguments.implied() if given else {}), **values, **given}


def _value(text):
    if len(text) <= LARGEST_VALUE:
        with warnings.catch_warnings(), contextlib.suppress(*NO_LITERAL):
            warnings.simplefilter("ignore")  # about escapes
            return ast.literal_eval(text)
    return text


@dataclasses.dataclass
class SavedRun:
    """What --load-path opened, all of it checked but `optimizer` and `scheduler`: state dicts as
    the file has them, or None, which `restore` holds against the run's own.

    path: the checkpoint file; weights: {name: float32 tensor}; args: {dest: value} of those
    arguments that the run says, and fingerprints of its data (see `flags.DATA`); stamp: when the
    file was written in ns, to notice that it is another by now; story: what its training went
    through; random_states: those that `training_state.random_states` read, or None; own: whether
    this program wrote the file; best_beside: see `_best_beside`, only read to train."""

    path: pathlib.Path
    weights: dict
    args: dict
    stamp: int
    story: Story
    random_states: dict | None
    optimizer: object
    scheduler: object
    own: bool
    best_beside: dict | None = None

    @property
    def source(self):
        """What was opened, and how that model was chosen, in words."""
        epochs = len(self.story.history)
        if not epochs:
            return self.path.name
        chosen = {
            "model.pt": "the best on " + chosen_on(self.args),
            "final_model.pt": "the last of its training",
        }
        return f"{self.path.name} (epoch {epochs}, {chosen.get(self.path.name, 'the latest')})"


def find_saved(path, todo):
    """The checkpoint file that --load-path names: itself, or in a folder the latest epoch to go on
    with training, the best model to examine."""
    names = ["checkpoint.tar"] if todo == "train" else ["model.pt", "checkpoint.tar"]
    if stat.S_ISREG(_mode(path)):
        return pathlib.Path(path)
    if not stat.S_ISDIR(_mode(path)):
        raise UserError(f"argument --load-path: {named(path)} is no folder and no file")
    found = next(
        (pathlib.Path(path, name) for name in names if _mode(pathlib.Path(path, name))), None
    )
    if found is None:
        raise UserError(f"argument --load-path: {named(path)} has no {' or '.join(names)}")
    if not stat.S_ISREG(_mode(found)):
        raise UserError(f"argument --load-path: {named(found)} is no file")
    return found


def _mode(path):
    """What kind of file `path` is, as os.stat says it; 0 where there is none."""
    try:
        return os.stat(path).st_mode
    except PermissionError:
        raise UserError(
            f"argument --load-path: {named(path)} cannot be read: permission denied"
        ) from None
    except (OSError, ValueError):  # ValueError: no path can be written like this
        return 0


def open_saved(path, todo):
    """The SavedRun of the run folder that --load-path names. Raises UserError."""
    path = find_saved(path, todo)
    state, stamp = _read(path)
    try:
        weights = contents.weights(state["model_state_dict"])
        best = contents.best_model(state.get("best_model"), weights, path)
        best = best and {"model_state_dict": best[0], "config": best[1], **summary(best[2])}
        random_states = training_state.checked_random_states(state.get("random_states"))
        history = contents.history(state)
        # the original code's `best` is a number of images, not an accuracy
        best_accuracy = state.get("best") if "config" in state else None
        best_accuracy = contents.accuracy(best_accuracy, best_of(history))
        story = Story(
            history,
            best,
            best_accuracy,
            contents.resumptions(state.get("resumptions", {})),
            contents.asked(state.get("asked", 0)),
        )
        saved = SavedRun(
            path,
            weights,
            _arguments(state, path, weights),
            stamp,
            story,
            random_states,
            state.get("opt"),
            state.get("scheduler"),
            "config" in state,
        )
        if todo == "train" and saved.own:
            _expect_all_for_training(saved)
    except Damaged as e:
        raise UserError(f"{named(path)} is damaged: {e}") from None
    if todo == "train" and best is None:
        saved.best_beside = _best_beside(saved)
    return saved


def _expect_all_for_training(saved):
    """Raises Damaged where a checkpoint of this program lacks what its training needs to go on as
    if it had not stopped."""
    needed = {"opt": saved.optimizer, "random_states": saved.random_states}
    if saved.args["lr_decay"] or saved.args.get("lr_step"):
        needed["scheduler"] = saved.scheduler
    missing = [name for name, value in needed.items() if value is None]
    if missing and saved.path.suffix == ".pt":  # a model, as every run saves it
        raise UserError(
            f"{named(saved.path)} holds a model without {' and '.join(missing)}, which "
            "resuming needs: name the run folder, or a checkpoint.tar"
        )
    if missing:
        raise Damaged(f"no training can go on from it without {' and '.join(missing)}")


def _arguments(state, path, weights):
    """{dest: value} of the arguments that a run records: in its config, or, without one, in its
    pickled module, then in its hyperparameters.txt, then in the shapes of its weights."""
    if "config" in state:
        config = contents.config(state["config"], path)
        return {**contents.judged(config, path), **contents.data(config)}
    told = state.get("architecture", {})
    contents.expect(isinstance(told, dict), "architecture", told)
    text = path.parent / "hyperparameters.txt"
    found = {**contents.judged(read_arguments(path.parent), text), **contents.judged(told, path)}
    return {**contents.judged(contents.architecture(weights), path), **found}


def load_weights(model, saved):
    """Puts the run's weights into the model. Raises UserError where they do not fit."""
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError as e:
        kind = saved.args.get("model")
        unknown = [
            f"--{flag.name}"
            for flag in ALL
            if flag.scope == "architecture"
            and flag.dest not in saved.args
            and (flag.kind is int and flag.many or flag.dest in ("model", "pools"))
            and (kind is None or flag.models is None or kind in flag.models)
        ]
        reason = one_line(e).partition(": ")[2][:600]
        if unknown:
            reason += f"; the run does not record {', '.join(unknown)}: give these flags"
        raise UserError(
            f"the weights in {named(saved.path)} do not fit the model: {reason}"
        ) from None


def restore(saved, args, optimizer, scheduler, generator):
    """Puts the rest of a checkpoint back and returns the Story that goes on, told of the arguments
    that change. A checkpoint of the original code has no random states. Raises UserError, with
    nothing changed, where optimizer or scheduler of the checkpoint are not those of this run."""
    moments = rates = None
    try:
        if saved.optimizer is not None:
            moments = training_state.optimizer_state(saved.optimizer, optimizer)
        if scheduler and saved.scheduler is not None:
            rates = training_state.scheduler_state(saved.scheduler, scheduler)
    except Damaged as e:
        raise UserError(f"{named(saved.path)} does not fit this run: {e}") from None
    if moments:
        optimizer.load_state_dict(moments)
    if rates:
        scheduler.load_state_dict(rates)
    if saved.random_states:
        training_state.restore_random_states(saved.random_states, generator)
    return _continued(saved, args)


def _continued(saved, args):
    """The Story of a run that goes on with `args`."""
    story, now = saved.story, vars(args)
    text = "; ".join(changes(saved.args, now))[:2000]
    resumptions = {**story.resumptions, len(story.history) + 1: printable(text)}
    if not other_images(saved.args, now):
        return dataclasses.replace(story, resumptions=resumptions)
    return Story(story.history, story.best or saved.best_beside, None, resumptions, story.asked)


def _best_beside(saved):
    """The snapshot in the model.pt beside a checkpoint that carries none, as those of earlier
    versions; None where there is none."""
    try:
        run = open_saved(saved.path.parent / "model.pt", "evaluate")
    except UserError:
        return None
    return {"model_state_dict": run.weights, "config": run.args, **summary(run.story.history)}
