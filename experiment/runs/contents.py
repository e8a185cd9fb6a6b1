"""Validation of what a checkpoint contains: types, shapes and ranges that the program relies on.

`open_saved` validates everything here once, except what only training needs, which
`training_state` compares with the run's own optimizer and scheduler. All raise Damaged.

Arguments called `saved` come from a file and can be of any type."""

import pathlib
import re
import sys
from typing import Any

import torch

from experiment.command_line import validate_saved
from experiment.config import ALWAYS_SAVED, FINGERPRINTS, FLAGS, LARGEST, SESSION
from experiment.text import describe

LARGEST_FLOAT = sys.float_info.max
FLOATS = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

# Numbers of optimizer, scheduler and random states that may differ from those of a new run:
# name -> (smallest, largest). All other numbers are settings and must be equal.
RANGES = {
    "lr": (0, LARGEST_FLOAT),
    "initial_lr": (0, LARGEST_FLOAT),
    "weight_decay": (0, LARGEST_FLOAT),
    "momentum": (0, 1),
    "base_lrs": (0, LARGEST_FLOAT),
    "_last_lr": (0, LARGEST_FLOAT),
    "last_epoch": (0, LARGEST),
    "_step_count": (0, LARGEST),
    "python": (-(2**32), 2**32),
    "numpy": (-(2**32), 2**32),
}
NOT_NEGATIVE = ("step", "exp_avg_sq")  # tensors


class Damaged(Exception):
    """A file contains something that no run writes. The message says what, and where."""


def expect(condition: Any, what: str, value: object) -> None:
    """Raise Damaged, with the message that `what` is `value`, unless the condition is true."""
    if not condition:
        raise Damaged(f"{what} is {describe(value)}")


def is_number(
    value: Any, low: float = -LARGEST_FLOAT, high: float = LARGEST_FLOAT, whole: bool = False
) -> bool:
    """Whether `value` is a finite number (whole: an int) from low to high, and no bool."""
    return (
        isinstance(value, int if whole else (int, float))
        and not isinstance(value, bool)
        and low <= value <= high
    )


def plain(value: Any) -> Any:
    """The number in a 0-d tensor, also in lists of them; any other value as it is."""
    if isinstance(value, (list, tuple)):
        return type(value)(v.item() if torch.is_tensor(v) and not v.dim() else v for v in value)
    return value.item() if torch.is_tensor(value) and not value.dim() else value


def conform(saved: Any, template: Any, what: str) -> Any:
    """Compare `saved` with `template` recursively and return it in the template's types.

    Keys, lengths and shapes must be equal, and so must all values except the finite ones of tensors
    and the numbers in RANGES. Tensors get the template's dtype, device and memory layout, on which
    fused kernels rely. None in the template matches None or a number."""
    if isinstance(template, torch.Tensor):
        return _conforming_tensor(saved, template, what)
    if isinstance(template, dict):
        expect(isinstance(saved, dict), what, saved)
        for name in template:
            if name not in saved:
                raise Damaged(f"{what} lacks {name}")
        for name in saved:
            if name not in template:
                raise Damaged(f"{what} also has {describe(name)}")
        return {name: conform(saved[name], template[name], f"{name} of {what}") for name in saved}
    if isinstance(template, (list, tuple)):
        fits = isinstance(saved, (list, tuple)) and len(saved) == len(template)
        expect(fits, f"{what}, expected to have {len(template)} values,", saved)
        return type(template)(conform(*pair, what) for pair in zip(saved, template))
    saved = plain(saved)
    name = what.partition(" ")[0]
    if template is None:
        expect(saved is None or is_number(saved), what, saved)
    elif name in RANGES and is_number(template):
        expect(is_number(saved, *RANGES[name], whole=isinstance(template, int)), what, saved)
    else:
        expect(isinstance(saved, (bool, int, float, str)) and saved == template, what, saved)
        return template
    return saved


def _conforming_tensor(saved: Any, template: torch.Tensor, what: str) -> torch.Tensor:
    if template.dtype in FLOATS:
        if is_number(saved):  # a step, as older versions of torch save it
            saved = torch.tensor(float(saved))
        saved = real_tensor(saved, what)
    expect(_is_plain_tensor(saved, template.dtype), what, saved)
    if saved.shape != template.shape:
        shapes = f"{tuple(saved.shape)} instead of {tuple(template.shape)}"
        raise Damaged(f"{what} has the shape {shapes}")
    if what.startswith(NOT_NEGATIVE) and (saved < 0).any():
        raise Damaged(f"{what} is negative")
    return torch.empty_like(template, requires_grad=False).copy_(saved)


# ---- weights


def _is_plain_tensor(value: Any, *dtypes: torch.dtype) -> bool:
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.is_cpu
        and value.dtype in dtypes
    )


def _expect_stored(tensors: list[torch.Tensor], what: str) -> None:
    """Raise Damaged if tensors have more bytes than their storages: views that repeat values."""
    claimed = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    storages = [tensor.untyped_storage() for tensor in tensors]
    stored = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    if claimed > stored:
        raise Damaged(f"{what} claims {claimed:,} bytes, but the file has only {stored:,}")


def real_tensor(saved: Any, what: str) -> torch.Tensor:
    """A float32 tensor of finite values; other floating types are converted."""
    expect(_is_plain_tensor(saved, *FLOATS), what, saved)
    _expect_stored([saved], what)
    tensor = saved.detach().resolve_neg().to(torch.float32)
    if not tensor.isfinite().all():
        raise Damaged(f"{what} is not finite")
    return tensor


def weights(saved: Any) -> dict[str, torch.Tensor]:
    """{name: float32 tensor} of a model_state_dict; counts of batch normalisation stay int64. The
    prefixes of DataParallel, DistributedDataParallel and torch.compile are removed from names."""
    expect(isinstance(saved, dict), "model_state_dict", saved)
    for name in saved:
        is_name = isinstance(name, str) and len(name) <= 200 and name.isprintable()
        expect(is_name, "the name of a weight", name)
    found = {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in saved.items()}
    expect(len(found) == len(saved), "the list of weights, with two of one name,", list(saved))
    # together, because conversion copies each of many views of one storage
    tensors = [value for value in found.values() if isinstance(value, torch.Tensor)]
    _expect_stored(tensors, "model_state_dict")
    return {name: _weight(value, name) for name, value in found.items()}


def _weight(value: Any, name: str) -> torch.Tensor:
    if name.endswith(".num_batches_tracked"):  # of batch normalisation
        fits = _is_plain_tensor(value, torch.int64) and not value.dim() and value >= 0
        expect(fits, f"the count {name}", value)
        return value.clone()
    value = real_tensor(value, f"the weight {name}")
    if name.endswith(".running_var") and (value < 0).any():
        raise Damaged(f"the variance {name} is negative")
    return value


# ---- arguments


def validated_arguments(values: dict, path: pathlib.Path) -> dict:
    """{dest: value} of the flags among `values`, each validated as its flag; flags of one call are
    left out. path: the file with the values. Raises UserError."""
    return {
        flag.dest: validate_saved(flag, values[flag.dest], path)
        for flag in FLAGS
        if flag.dest in values and flag.scope != SESSION
    }


def config(saved: Any, path: pathlib.Path) -> dict:
    """The arguments in a checkpoint of this program: a dict of plain values, with every flag that
    all versions have saved. Raises UserError as well."""
    expect(isinstance(saved, dict) and all(map(_is_name, saved)), "config", saved)
    missing = [name.replace("_", "-") for name in ALWAYS_SAVED if name not in saved]
    if missing:
        raise Damaged(f"its config lacks --{', --'.join(missing)}")
    saved = {name: plain(value) for name, value in saved.items()}
    validated_arguments(saved, path)
    for name, value in saved.items():
        for item in value if isinstance(value, (list, tuple)) else [value]:
            fits = item is None or isinstance(item, (bool, str, float))
            expect(fits or is_number(item, -(2**63), 2**63), f"config's {name}", value)
    return saved


def data(config: dict) -> dict[str, str]:
    """The fingerprints of data that a config has, see `config.FINGERPRINTS`."""
    found = {name: config[name] for name in FINGERPRINTS if name in config}
    for name, value in found.items():
        is_digest = isinstance(value, str) and re.fullmatch("[0-9a-f]{1,64}", value)
        expect(is_digest, f"config's {name}", value)
    return found


def _is_name(value: object) -> bool:
    return isinstance(value, str) and len(value) <= 100 and value.isidentifier()


# ---- history


def history(saved: dict) -> list[dict]:
    """The rows of metrics.csv in a checkpoint: [{"epoch": 1, "train_acc": %, "test_acc": %,
    "seconds": s or "", ...}, ...]."""
    rows: Any = saved.get("history")
    expect(isinstance(rows, list) and all(isinstance(row, dict) for row in rows), "history", rows)
    epoch = plain(saved.get("epoch"))
    good = is_number(epoch, len(rows), len(rows), whole=True)
    expect(good, f"epoch, with {len(rows)} epochs in history,", epoch)
    return [_row(row, n) for n, row in enumerate(rows, 1)]


def _row(row: dict, epoch: int) -> dict:
    where = f"epoch {epoch} in history"
    row = {name: plain(value) for name, value in row.items()}
    expect(all(map(_is_name, row)), where, row)
    row = {"epoch": "", "train_acc": "", "test_acc": "", "seconds": "", **row}
    expect(is_number(row["epoch"], epoch, epoch, whole=True), f"the number of {where}", row)
    for name, value in row.items():
        if name.endswith("_acc"):
            good = is_number(value, 0, 100)
        elif name == "seconds" and value != "":
            good = is_number(value, 0)
        elif isinstance(value, str):
            good = len(value) <= 100 and value.isprintable()
        else:
            good = isinstance(value, float) or is_number(value, -LARGEST, LARGEST)  # an angle: nan
        expect(good, f"{name} of {where}", value)
    return row


def resumptions(saved: Any) -> dict[int, str] | None:
    """{epoch: text} of a checkpoint; None if it does not record them."""
    if saved is None:
        return None
    expect(isinstance(saved, dict), "resumptions", saved)
    for epoch, text in saved.items():
        fits = is_number(epoch, 1, LARGEST, whole=True) and isinstance(text, str)
        expect(fits and len(text) <= 2000 and text.isprintable(), "resumptions", saved)
    return dict(saved)


def number(saved: Any, what: str, low: float, high: float, whole: bool = False) -> Any:
    """The number in a checkpoint called `what`, from low to high."""
    saved = plain(saved)
    expect(is_number(saved, low, high, whole), what, saved)
    return saved
