"""Checkpoints: what is written of a run, how it is read back, and files by the original code."""
import ast
import dataclasses
import pathlib
import pickle
import random
import re

import numpy as np
import torch

from data_utils import UserError, one_line
from experiment.arguments import judge_saved
from experiment.files import exists
from experiment.flags import ALL


class Pickled:
    """What stands in for an object of a file by the original code: its attributes, and none of its class's code."""

    def __init__(self, *args):
        pass

    def __setstate__(self, state):
        self.__dict__.update(state)

    def children(self, name):
        """The members of a ModuleList or list called `name`."""
        value = self.__dict__.get("_modules", {}).get(name, self.__dict__.get(name, []))
        return list(value._modules.values()) if isinstance(value, Pickled) else list(value)


def _named(name):
    return type(name.rpartition(".")[2], (Pickled,), {})


def _activation(name):
    """Stands in for an activation function, which is never called through the file."""
    def named():
        raise TypeError(name)
    named.__name__ = name
    return named


def _getattr(owner, name):
    """torch.tanh is pickled as getattr(torch._C._VariableFunctionsClass, 'tanh'): this getattr knows such names alone."""
    if name not in ("tanh", "sigmoid"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name}")
    return _activation(name)


_LAYERS = ["conv.Conv2d", "linear.Linear", "linear.Identity", "container.ModuleList", "pooling.MaxPool2d", "pooling.AvgPool2d"]
OLD_GLOBALS = [
    *((_named(f"model_utils.{name}"), f"model_utils.{name}") for name in ("P_MLP", "VF_MLP", "P_CNN", "VF_CNN")),
    *((_named(name), f"torch.nn.modules.{name}") for name in _LAYERS),
    *((_activation(name), f"model_utils.{name}") for name in ("my_sigmoid", "hard_sigmoid", "my_hard_sig", "ctrd_hard_sig")),
    *((_activation(name), f"torch.{name}") for name in ("tanh", "sigmoid")),
    *((_named("_VariableFunctionsClass"), f"torch._C.{name}") for name in ("_VariableFunctionsClass", "_VariableFunctions")),
    (_getattr, "builtins.getattr"), (_getattr, "__builtin__.getattr"), (set, "builtins.set"), (set, "__builtin__.set"),
]


def _from_pickled_module(module):
    """The checkpoint that a module pickled by the original code amounts to: its parameters, and the arguments of its model."""
    kind = type(module).__name__.replace("P_", "").replace("_", "")  # P_CNN -> CNN, VF_CNN -> VFCNN
    synapses, pools = module.children("synapses"), module.children("pools")
    state = {f"{group}.{i}.{name}": p.detach() for group in ("synapses", "B_syn") for i, layer in enumerate(module.children(group))
             for name, p in layer._parameters.items() if p is not None}
    config = {"model": kind, "act": {"my_sigmoid": "mysig"}.get(module.activation.__name__, module.activation.__name__),
              "softmax": bool(module.__dict__.get("softmax", False)), "same_update": bool(module.__dict__.get("same_update", False))}
    dense = [layer for layer in synapses if type(layer).__name__ == "Linear"]
    if kind in ("MLP", "VFMLP"):
        config["archi"] = [dense[0].in_features, *(layer.out_features for layer in dense)]
    else:
        convolutions = synapses[:len(synapses) - len(dense)]
        square = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
        letters = {"MaxPool2d": "m", "AvgPool2d": "a", "Identity": "i"}
        config.update(channels=[c.out_channels for c in convolutions], kernels=[square(c.kernel_size) for c in convolutions],
                      strides=[square(c.stride) for c in convolutions], paddings=[square(c.padding) for c in convolutions],
                      pools="".join(letters[type(pool).__name__] for pool in pools), fc=[layer.out_features for layer in dense])
    return {"model_state_dict": state, "config": config}


def read_checkpoint(path):
    """The dict in a checkpoint file; a module pickled by the original code is read as one, through stand-ins for the classes and
    functions that such a file names. Raises UserError, one line with the file's name, for anything else; runs no code in it."""
    try:
        with torch.serialization.safe_globals(OLD_GLOBALS):
            state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state, Pickled):
            state = _from_pickled_module(state)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except Exception as e:  # a damaged file can fail in any way
        refused = re.search(r"GLOBAL ([\w.]+)", str(e))
        why = f"it asks for {refused[1]}, which could run code; nothing of it was run" if refused else one_line(e).split(". ")[0]
        raise UserError(f"{path} cannot be loaded: {why or 'it is empty'}") from None
    weights = state.get("model_state_dict") if isinstance(state, dict) else None
    if not isinstance(weights, dict) or not all(isinstance(p, torch.Tensor) for p in weights.values()):
        raise UserError(f"{path} is no checkpoint of a model: it holds no model_state_dict")
    return state


def read_arguments(folder):
    """The arguments written in a run folder's hyperparameters.txt, as text or plain values; {} where there are none.

    Reads lines `name: value` (any indentation, or a dash before them; value a Python literal or a word), as ours are, and as
    the original code's are.
    """
    try:
        lines = pathlib.Path(folder, "hyperparameters.txt").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return {}
    arguments = {}
    for line in lines:
        found = re.match(r"[\s-]*([A-Za-z]\w*)\s*:\s*(.+?)\s*$", line)
        if found:
            try:
                arguments[found[1]] = ast.literal_eval(found[2])
            except (ValueError, SyntaxError):
                arguments[found[1]] = found[2]
    return arguments


def random_states(generator):
    """The states of all random numbers that a run draws, in types that a safe load reads."""
    kind, keys, *rest = np.random.get_state()
    return {"python": random.getstate(), "numpy": [kind, keys.tolist(), *rest], "torch": torch.get_rng_state(),
            "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [], "data": generator.get_state()}


def restore_random_states(states, generator):
    """Sets all that `random_states` read; a CUDA state only where there is such a device."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][:torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
    generator.set_state(states["data"])


@dataclasses.dataclass
class SavedRun:
    """What --load-path opened. path: the checkpoint file; state: what it holds; args: {dest: value} of the run's arguments; stamp: when
    the file was written, to notice that it is another by now."""

    path: pathlib.Path
    state: dict
    args: dict
    stamp: int

    @property
    def weights(self):
        return self.state["model_state_dict"]


def find_saved(path, todo):
    """The checkpoint file that --load-path names: the latest epoch to go on with training, the best model to examine."""
    names = ["checkpoint.tar"] if todo == "train" else ["model.pt", "checkpoint.tar"]
    found = next((pathlib.Path(path, name) for name in names if exists(pathlib.Path(path, name))), None)
    if found is None:
        where = f"has no {' or '.join(names)}" if exists(path) and pathlib.Path(path).is_dir() else "is no folder"
        raise UserError(f"argument --load-path: {path} {where}")
    return found


def open_saved(path, todo):
    """The SavedRun of the run folder that --load-path names. Raises UserError."""
    path = find_saved(path, todo)
    stamp = path.stat().st_mtime_ns
    state = read_checkpoint(path)
    config = {**read_arguments(path.parent), **state.get("config", {})}
    args = {flag.dest: judge_saved(flag, config[flag.dest], path) for flag in ALL if flag.dest in config and flag.scope != "session"}
    return SavedRun(path, state, args, stamp)


def load_weights(model, saved):
    """Puts the run's weights into the model. Raises UserError where they do not fit."""
    try:
        model.load_state_dict(saved.weights)
    except RuntimeError as e:
        raise UserError(f"the weights in {saved.path} do not fit the model: {one_line(e).partition(': ')[2]}") from None


def restore(saved, optimizer, scheduler, generator):
    """Puts the rest of a checkpoint back and returns (history, best): a list of dicts, the rows of metrics.csv; and the checkpoint of
    the best model, as `snapshot` made it, or None. A checkpoint of the original code has no random states, and lists of accuracies for
    a history."""
    state = saved.state
    try:
        if "opt" in state:
            optimizer.load_state_dict(state["opt"])
        if scheduler and state.get("scheduler"):
            scheduler.load_state_dict(state["scheduler"])
        if "random_states" in state:
            restore_random_states(state["random_states"], generator)
        if "history" in state:
            history = [{"epoch": row["epoch"], "train_acc": row["train_acc"], "test_acc": row["test_acc"], **row} for row in state["history"]]
        else:
            accuracies = zip(state.get("train_acc", []), state.get("test_acc", []))
            history = [{"epoch": epoch, "train_acc": float(a), "test_acc": float(b), "seconds": ""} for epoch, (a, b) in enumerate(accuracies, 1)]
    except Exception as e:  # whatever else such a file may hold
        raise UserError(f"{saved.path} does not fit this run: {one_line(e)}") from None
    return history, state.get("best_model")


def snapshot(model, args, history):
    """What is written down of a model after len(history) epochs."""
    return {"model_state_dict": model.state_dict(), "config": vars(args), "epoch": len(history), "history": history,
            "train_acc": [row["train_acc"] for row in history], "test_acc": [row["test_acc"] for row in history],
            "best": best_of(history)}


def resumable_state(best, optimizer, scheduler, generator):
    """What a checkpoint holds besides `snapshot`, so that training can go on from it. best: the snapshot of the best
    model so far, which it carries along so that one file commits all that an epoch changes; None before the first."""
    return {"opt": optimizer.state_dict(), "scheduler": scheduler and scheduler.state_dict(),
            "random_states": random_states(generator), "best_model": best}


def best_of(history):
    """The best test accuracy of a history, in %; -1 before the first epoch."""
    return max((row["test_acc"] for row in history), default=-1.0)
