"""Files of the original code and of earlier versions: pickled modules, hyperparameters.txt, lists
of accuracies, bare state dicts."""

import ast
import contextlib
import pathlib
import pickle
import re
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from data_files import StandIn, expect, open_regular
from experiment import command_line
from experiment.config import FLAGS, SESSION
from experiment.runs import contents
from experiment.runs.contents import is_number, plain
from experiment.text import name_path

# ---- modules that the original code pickled whole


class Pickled(StandIn):
    """Replaces an object of a file by the original code, and has its attributes."""

    def __init__(self, *_: object) -> None:
        pass

    def __getattr__(self, name: str) -> Any:  # for type checkers: attributes come from the file
        raise AttributeError(name)

    def set_state(self, state: Any) -> None:
        expect(isinstance(state, dict))
        self.__dict__.update(state)

    def children(self, name: str) -> list:
        """The members of the ModuleList or list called `name`."""
        value = self.__dict__.get("_modules", {}).get(name, self.__dict__.get(name, []))
        value = list(value._modules.values()) if isinstance(value, Pickled) else value
        if not isinstance(value, list):
            raise pickle.UnpicklingError(f"its {name} are not a list")
        return value


def _named(name: str) -> type[Pickled]:
    return type(name.rpartition(".")[2], (Pickled,), {})


def _activation(name: str) -> Callable[[], None]:
    """A function in place of an activation function; no file calls it."""

    def named() -> None:
        raise TypeError(name)

    named.__name__ = name
    return named


def _getattr(owner: Any, name: Any) -> Callable[[], None]:
    """Replaces `getattr`: torch.tanh is pickled as getattr(torch._C._VariableFunctionsClass,
    "tanh"). Only such names are known here."""
    if name not in ("tanh", "sigmoid"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name}")
    return _activation(name)


def _set(values: Any = ()) -> list:
    """Replaces `set`; the elements are not read."""
    return []


_MODELS = ["P_MLP", "VF_MLP", "P_CNN", "VF_CNN"]
_ACTIVATIONS = ["my_sigmoid", "hard_sigmoid", "my_hard_sig", "ctrd_hard_sig"]
_LAYERS = [
    "conv.Conv2d",
    "linear.Linear",
    "linear.Identity",
    "container.ModuleList",
    "pooling.MaxPool2d",
    "pooling.AvgPool2d",
]
_FUNCTIONS = _named("_VariableFunctionsClass")
OLD_GLOBALS: dict[str, Any] = {
    **{f"model_utils.{name}": _named(name) for name in _MODELS},
    **{f"torch.nn.modules.{name}": _named(name) for name in _LAYERS},
    **{f"model_utils.{name}": _activation(name) for name in _ACTIVATIONS},
    **{f"torch.{name}": _activation(name) for name in ("tanh", "sigmoid")},
    "torch._C._VariableFunctionsClass": _FUNCTIONS,
    "torch._C._VariableFunctions": _FUNCTIONS,
    "builtins.getattr": _getattr,
    "__builtin__.getattr": _getattr,
    "builtins.set": _set,
    "__builtin__.set": _set,
}


def _first(value: Any) -> Any:
    """The size that a square kernel, stride or padding has in both directions."""
    return value[0] if isinstance(value, tuple) else value


def checkpoint_of(module: Pickled) -> dict:
    """Convert a pickled module to a checkpoint: its parameters and, as `architecture`, those
    arguments of its model that it records. Raises any exception if it is another module."""
    kind = type(module).__name__.replace("P_", "").replace("_", "")  # P_CNN -> CNN, VF_CNN -> VFCNN
    synapses = module.children("synapses")
    state = {
        f"{group}.{i}.{name}": p.detach()
        for group in ("synapses", "B_syn")
        for i, layer in enumerate(module.children(group))
        for name, p in layer._parameters.items()
        if p is not None
    }
    act = {"my_sigmoid": "mysig"}.get(module.activation.__name__, module.activation.__name__)
    found: dict[str, Any] = {
        "model": kind,
        "act": act,
        "softmax": getattr(module, "softmax", False),
        "same_update": getattr(module, "same_update", False),
    }
    dense = [layer for layer in synapses if type(layer).__name__ == "Linear"]
    if kind in ("MLP", "VFMLP"):
        found["archi"] = [dense[0].in_features, *(layer.out_features for layer in dense)]
    else:
        convolutions = synapses[: len(synapses) - len(dense)]
        letters = {"MaxPool2d": "m", "AvgPool2d": "a", "Identity": "i"}
        found |= {
            "channels": [layer.out_channels for layer in convolutions],
            "kernels": [_first(layer.kernel_size) for layer in convolutions],
            "strides": [_first(layer.stride) for layer in convolutions],
            "paddings": [_first(layer.padding) for layer in convolutions],
            "pools": "".join(letters[type(pool).__name__] for pool in module.children("pools")),
            "fc": [layer.out_features for layer in dense],
        }
    return {"model_state_dict": state, "architecture": found}


# ---- hyperparameters.txt

LARGEST_TEXT = 2**20  # bytes of a hyperparameters.txt that are read; ours have two thousand
LARGEST_VALUE = 2000  # characters of a value in it that can be a list of numbers
# What ast.literal_eval raises
NO_LITERAL = (ValueError, SyntaxError, TypeError, MemoryError, RecursionError)

# Labels in the original code's hyperparameters.txt, and the arguments that they label
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


def read_arguments(folder: str | pathlib.Path) -> dict:
    """The arguments in a run folder's hyperparameters.txt, as text or plain values; {} without one.

    Reads lines `name: value` (any indentation, or a dash before them; value a Python literal or a
    word) as this program writes them, and as the original code does: its first line is the command
    line, which has priority, and some of its names are LABELS. Other lines are ignored, and text
    beyond LARGEST_TEXT bytes."""
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
    given = command_line.parse_leniently(first)
    differing = [
        f"--{flag.name}"
        for flag in FLAGS
        if flag.dest in given
        and flag.scope != SESSION
        and values.get(flag.dest, given[flag.dest]) != given[flag.dest]
    ]
    if differing:
        print(
            f"note: {name_path(path)}: the command line and the lines below it differ in "
            f"{', '.join(differing)}; used: the command line",
            file=sys.stderr,
        )
    return {**(command_line.implied() if given else {}), **values, **given}


def _value(text: str) -> Any:
    if len(text) <= LARGEST_VALUE:
        with warnings.catch_warnings(), contextlib.suppress(*NO_LITERAL):
            warnings.simplefilter("ignore")  # about escapes
            return ast.literal_eval(text)
    return text


# ---- state dicts


def architecture(weights: dict[str, torch.Tensor]) -> dict:
    """{dest: value} of the arguments that the shapes of an energy model's weights determine.

    weights: {name: tensor}; {} for those of other models."""
    synapses = {
        int(name.split(".")[1]): tuple(value.shape)
        for name, value in weights.items()
        if re.fullmatch(r"synapses\.\d{1,4}\.weight", name)
    }
    shapes = [synapses[n] for n in sorted(synapses)]
    convolutions = [shape for shape in shapes if len(shape) == 4]
    dense = [shape for shape in shapes if len(shape) == 2]
    if not dense or shapes != convolutions + dense:
        return {}
    feedback = sum(name.startswith("B_syn.") and name.endswith(".weight") for name in weights)
    kind = "CNN" if convolutions else "MLP"
    found: dict[str, Any] = {"model": f"VF{kind}" if feedback else kind}
    if feedback:
        readout = feedback < len(shapes) - 1  # which has no feedback weights
        found |= {"softmax": True, "loss": "cel"} if readout else {"softmax": False}
    if not convolutions:
        return {**found, "archi": [dense[0][1], *(shape[0] for shape in dense)]}
    if all(shape[2] == shape[3] for shape in convolutions):
        found["kernels"] = [shape[2] for shape in convolutions]
    return {
        **found,
        "channels": [shape[0] for shape in convolutions],
        "fc": [shape[0] for shape in dense],
    }


def history(saved: dict) -> list[dict]:
    """The history of a checkpoint with two lists of accuracies, in the form of `contents.history`.

    The lists of the original code begin with an accuracy of 10 % before the first epoch."""
    train = saved.get("train_acc", [])
    test = saved.get("test_acc", [])
    lists = isinstance(train, list) and isinstance(test, list) and len(train) == len(test)
    contents.expect(lists, "train_acc and test_acc, which are two lists,", (train, test))
    pairs = list(zip(plain(train), plain(test)))
    for pair in pairs:
        valid = all(is_number(accuracy, 0, 100) for accuracy in pair)
        contents.expect(valid, "an entry of train_acc and test_acc", pair)
    if pairs:
        epoch = plain(saved.get("epoch"))  # of a final_checkpoint.tar: those of its last session
        constant = pairs[0] == (10, 10) and epoch != len(pairs)
        if constant or pairs[0][0] == pairs[0][1] and epoch == len(pairs) - 1:
            del pairs[0]
    return [
        {"epoch": n, "train_acc": float(train), "test_acc": float(test), "seconds": ""}
        for n, (train, test) in enumerate(pairs, 1)
    ]
