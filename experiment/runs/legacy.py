"""Modules that the original code pickled whole, read through stand-ins for the classes and
functions that such a file names."""

import pickle

from data_files import StandIn, expect


class Pickled(StandIn):
    """What stands in for an object of a file by the original code: its attributes, and none of its
    class's code."""

    def __init__(self, *args):
        pass

    def set_state(self, state):
        expect(isinstance(state, dict))
        self.__dict__.update(state)

    def children(self, name):
        """The members of a ModuleList or list called `name`."""
        value = self.__dict__.get("_modules", {}).get(name, self.__dict__.get(name, []))
        value = list(value._modules.values()) if isinstance(value, Pickled) else value
        if not isinstance(value, list):
            raise pickle.UnpicklingError(f"its {name} are not a list")
        return value


def _named(name):
    return type(name.rpartition(".")[2], (Pickled,), {})


def _activation(name):
    """Stands in for an activation function, which is never called through the file."""

    def named():
        raise TypeError(name)

    named.__name__ = name
    return named


def _getattr(owner, name):
    """torch.tanh is pickled as getattr(torch._C._VariableFunctionsClass, 'tanh'): this getattr
    knows such names alone."""
    if name not in ("tanh", "sigmoid"):
        raise pickle.UnpicklingError(f"it asks for the attribute {name}")
    return _activation(name)


def _set(values=()):
    """Stands in for a set, whose elements are not read."""
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
OLD_GLOBALS = {
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


def checkpoint_of(module):
    """The checkpoint that a module pickled by the original code amounts to: its parameters, and, as
    `architecture`, those arguments of its model that it knows. Fails in any way where it is no such
    module."""
    kind = type(module).__name__.replace("P_", "").replace("_", "")  # P_CNN -> CNN, VF_CNN -> VFCNN
    synapses, pools = module.children("synapses"), module.children("pools")
    state = {
        f"{group}.{i}.{name}": p.detach()
        for group in ("synapses", "B_syn")
        for i, layer in enumerate(module.children(group))
        for name, p in layer._parameters.items()
        if p is not None
    }
    act = {"my_sigmoid": "mysig"}.get(module.activation.__name__, module.activation.__name__)
    told = {"model": kind, "act": act}
    told.update((name, module.__dict__.get(name, False)) for name in ("softmax", "same_update"))
    dense = [layer for layer in synapses if type(layer).__name__ == "Linear"]
    if kind in ("MLP", "VFMLP"):
        told["archi"] = [dense[0].in_features, *(layer.out_features for layer in dense)]
    else:
        convolutions = synapses[: len(synapses) - len(dense)]
        square = lambda value: value[0] if isinstance(value, tuple) else value  # noqa: E731
        letters = {"MaxPool2d": "m", "AvgPool2d": "a", "Identity": "i"}
        geometry = {
            "channels": "out_channels",
            "kernels": "kernel_size",
            "strides": "stride",
            "paddings": "padding",
        }
        told.update(
            (flag, [square(getattr(c, name)) for c in convolutions])
            for flag, name in geometry.items()
        )
        told.update(
            pools="".join(letters[type(pool).__name__] for pool in pools),
            fc=[layer.out_features for layer in dense],
        )
    return {"model_state_dict": state, "architecture": told}
