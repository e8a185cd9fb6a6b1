"""What a saved file holds, held against what a run writes. Everything that is read of a checkpoint
passes here once, what only training needs in `training_state`; what these functions return has the
types, shapes and ranges that the rest of the program relies on. They raise Damaged for anything
else."""

import re
import sys

import torch

from experiment.arguments import described, judge_saved
from experiment.flags import ALL, ALWAYS_SAVED, DATA, LARGEST

LARGEST_FLOAT = sys.float_info.max


class Damaged(Exception):
    """A file holds what no run writes. The message says where in the file, and what there is."""


def expect(holds, what, value):
    """Raises Damaged, which says that `what` is `value`, unless `holds`."""
    if not holds:
        raise Damaged(f"{what} is {described(value)}")


def is_number(value, low=-LARGEST_FLOAT, high=LARGEST_FLOAT, whole=False):
    """Whether `value` is a finite number (whole: an int) from low to high; True and False are
    none."""
    return (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
    )


def are_numbers(values, length, low=-LARGEST_FLOAT, high=LARGEST_FLOAT, whole=False):
    """Whether `values` is a list or tuple of `length` numbers, as `is_number` has them."""
    return (
        isinstance(values, (list, tuple))
        and len(values) == length
        and all(is_number(value, low, high, whole) for value in values)
    )


def _is_name(value):
    return isinstance(value, str) and len(value) <= 100 and value.isidentifier()


def plain(value):
    """The number in a 0-d tensor, also in lists of them; any other value as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(v.item() if torch.is_tensor(v) and not v.dim() else v for v in value)
    return value.item() if torch.is_tensor(value) and not value.dim() else value


# ------------------------------------------------------------------------------------------ tensors


def real_tensor(value, what, shape=None):
    """The float32 tensor with the values of `value`, which are finite. Weights of another floating
    type (float64, float16, bfloat16) are converted, where that leaves them finite: models compute
    in float32. shape: the one that it must have."""
    expect(
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16),
        what,
        value,
    )
    held = value.untyped_storage().nbytes() // value.element_size()
    if value.numel() > held:  # a view that repeats a few values
        raise Damaged(f"{what} claims {value.numel():,} values, of which the file has {held:,}")
    if shape is not None and value.shape != shape:
        raise Damaged(f"{what} has the shape {tuple(value.shape)} instead of {tuple(shape)}")
    value = value.detach().resolve_neg().to(torch.float32)
    if not value.isfinite().all():
        raise Damaged(f"{what} is not finite")
    return value


def weights(saved):
    """{name: float32 tensor} of a model_state_dict; counts of batch normalisation stay int64. The
    prefixes of DataParallel, DistributedDataParallel and torch.compile are removed from names."""
    expect(isinstance(saved, dict), "model_state_dict", saved)
    for name in saved:
        expect(
            isinstance(name, str) and len(name) <= 200 and name.isprintable(),
            "the name of a weight",
            name,
        )
    found = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in saved.items()}
    expect(len(found) == len(saved), "names of weights, two of which mean the same,", list(saved))
    tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
    claimed = sum(value.numel() * value.element_size() for value in tensors)
    storages = [value.untyped_storage() for value in tensors]
    held = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > held:  # views that repeat values; converted, each would be a copy
        raise Damaged(f"model_state_dict claims {claimed:,} bytes, of which the file has {held:,}")
    return {
        name: _count(value, name) if name.endswith(".num_batches_tracked") else _weight(value, name)
        for name, value in found.items()
    }


def architecture(weights: dict) -> dict:
    """{dest: value} of the arguments that the shapes of an energy model's weights determine; {}
    for other weights. weights: {name: tensor}."""
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
    found = {"model": ("VF" if feedback else "") + ("CNN" if convolutions else "MLP")}
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


def _weight(value, name):
    value = real_tensor(value, f"the weight {name}")
    if name.endswith(".running_var") and (value < 0).any():
        raise Damaged(f"the weight {name} is negative, which no variance is")
    return value


def _count(value, name):
    """How many mini-batches a batch normalisation has seen."""
    expect(
        isinstance(value, torch.Tensor)
        and value.dtype == torch.int64
        and not value.dim()
        and value.is_cpu
        and value.layout == torch.strided
        and value >= 0,
        f"the count {name}",
        value,
    )
    return value.clone()


# ---------------------------------------------------------------------------- arguments and history


def judged(values, path):
    """{dest: value} of the flags among `values`, a dict, each held to its flag's type and range,
    those of one call left out. path: the file that they are from. Raises UserError."""
    return {
        flag.dest: judge_saved(flag, values[flag.dest], path)
        for flag in ALL
        if flag.dest in values and flag.scope != "session"
    }


def config(saved, path):
    """The arguments that a checkpoint of this program carries, as it carries them: a dict of plain
    values, those of flags judged, and all there that no version left out. Raises UserError as
    well."""
    expect(isinstance(saved, dict) and all(_is_name(name) for name in saved), "config", saved)
    missing = [name.replace("_", "-") for name in ALWAYS_SAVED if name not in saved]
    if missing:
        raise Damaged(f"its config does not say --{', --'.join(missing)}")
    saved = {name: plain(value) for name, value in saved.items()}
    judged(saved, path)
    for name, value in saved.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        expect(all(map(_is_plain, values)), f"config's {name}", value)
    return saved


def data(config):
    """The fingerprints of its data that a config has, see `flags.DATA`."""
    found = {name: config[name] for name in DATA if name in config}
    for name, value in found.items():
        is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{1,64}", value)
        expect(is_digest, f"config's {name}", value)
    return found


def _is_plain(value):
    return (
        value is None
        or isinstance(value, (bool, str, float))
        or is_number(value, -(2**63), 2**63, True)
    )


def history(saved):
    """The history of a checkpoint: [{"epoch": 1, "train_acc": %, "test_acc": %, "seconds": s or "",
    ...}, ...], the rows of metrics.csv. One of the original code, without `config`, may have two
    lists of accuracies instead."""
    epoch = plain(saved.get("epoch"))
    if "history" not in saved and "config" not in saved:
        return _history_of_lists(saved.get("train_acc", []), saved.get("test_acc", []), epoch)
    rows = saved.get("history")
    expect(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), "history", rows)
    rows = [{name: plain(value) for name, value in row.items()} for row in rows]
    expect(
        is_number(epoch, len(rows), len(rows), True),
        f"epoch, with {len(rows)} epochs in history,",
        epoch,
    )
    for n, row in enumerate(rows, 1):
        what = f"epoch {n} in history"
        expect(all(_is_name(name) for name in row), what, row)
        expect(is_number(row.get("epoch"), n, n, True), f"the number of {what}", row.get("epoch"))
        for name in ("train_acc", "test_acc"):
            expect(is_number(row.get(name), 0, 100), f"{name} of {what}", row.get(name))
        if "val_acc" in row:
            expect(is_number(row["val_acc"], 0, 100), f"val_acc of {what}", row["val_acc"])
        seconds = row.get("seconds", "")
        expect(
            isinstance(seconds, str) and not seconds or is_number(seconds, 0),
            f"seconds of {what}",
            seconds,
        )
        for name, value in row.items():
            expect(
                isinstance(value, float)
                or is_number(value, -LARGEST, LARGEST)  # an angle may be nan
                or isinstance(value, str)
                and len(value) <= 100
                and value.isprintable(),
                f"{name} of {what}",
                value,
            )
    first = dict.fromkeys(("epoch", "train_acc", "test_acc", "seconds"), "")
    return [{**first, **row} for row in rows]


def _history_of_lists(train, test, epoch):
    """The history of a checkpoint of the original code, without the accuracy of 10 % with which
    its lists begin before the first epoch."""
    expect(
        isinstance(train, list) and isinstance(test, list) and len(train) == len(test),
        "train_acc and test_acc, which are two lists of one length,",
        (train, test),
    )
    pairs = [plain([*pair]) for pair in zip(train, test)]
    for n, pair in enumerate(pairs):
        expect(are_numbers(pair, 2, 0, 100), f"entry {n} of train_acc and test_acc", pair)
    # `epoch` of a final_checkpoint.tar counts the epochs of its last session alone
    if pairs and (
        pairs[0] == [10.0, 10.0]
        and epoch != len(pairs)
        or pairs[0][0] == pairs[0][1]
        and epoch == len(pairs) - 1
    ):
        del pairs[0]
    return [
        {"epoch": n, "train_acc": float(pair[0]), "test_acc": float(pair[1]), "seconds": ""}
        for n, pair in enumerate(pairs, 1)
    ]


def resumptions(saved):
    """{epoch: text} of a checkpoint."""
    expect(
        isinstance(saved, dict)
        and all(is_number(epoch, 1, LARGEST, True) for epoch in saved)
        and all(
            isinstance(text, str) and len(text) <= 2000 and text.isprintable()
            for text in saved.values()
        ),
        "resumptions",
        saved,
    )
    return dict(saved)


def asked(saved):
    """The most epochs that a checkpoint was asked to have."""
    saved = plain(saved)
    expect(is_number(saved, 0, LARGEST, True), "asked", saved)
    return saved


def accuracy(saved, otherwise):
    """The accuracy of the best model, in %, or -1; `otherwise` where the file does not say it."""
    if saved is None:
        return otherwise
    saved = plain(saved)
    expect(is_number(saved, -1, 100), "best", saved)
    return float(saved)


def best_model(saved, own, path):
    """(weights, config, history) of the best model, which a checkpoint carries along as model.pt
    holds it; or None. own: the weights of the checkpoint. Raises UserError as well."""
    if saved is None:
        return None
    expect(isinstance(saved, dict), "best_model", saved)
    state = weights(saved.get("model_state_dict"))
    shapes = [
        {name: tuple(value.shape) for name, value in tensors.items()} for tensors in (state, own)
    ]
    if shapes[0] != shapes[1]:
        raise Damaged("the weights of best_model are those of another model")
    return state, config(saved.get("config"), path), history(saved)
