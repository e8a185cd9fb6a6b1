"""What a training goes on with besides its weights: the states of random numbers, optimizer and
scheduler. What a file holds of them is held against the run's own generators, optimizer and
scheduler; anything that does not fit raises Damaged."""

import random

import numpy as np
import torch

from data_utils import one_line
from experiment.flags import LARGEST
from experiment.runs.contents import (
    LARGEST_FLOAT,
    Damaged,
    are_numbers,
    expect,
    is_number,
    plain,
    real_tensor,
)

# ----------------------------------------------------------------------------------- random numbers


def random_states(generator):
    """The states of all random numbers that a run draws, in types that a safe load reads.
    generator: of the mini-batches. Of CUDA devices only where one is in use: on the CPU they are
    left to other processes."""
    kind, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "data": generator.get_state(),
    }


def restore_random_states(states, generator):
    """Sets all that `random_states` read, checked; a CUDA state only where there is such a
    device."""
    version, internal, gauss = states["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
    generator.set_state(states["data"])


def checked_random_states(saved):
    """The states that `random_states` read, or None where there are none. The generators themselves
    say whether they take them, and what they would take unseen is looked at here: a position beyond
    its table would be read from foreign memory."""
    if saved is None:
        return None
    expect(isinstance(saved, dict), "random_states", saved)
    for name in ("python", "numpy", "torch", "cuda", "data"):
        if name not in saved:
            raise Damaged(f"random_states lacks those of {name}")
    python, numpy, cuda, words = saved["python"], saved["numpy"], saved["cuda"], 2**32 - 1
    expect(
        isinstance(python, (list, tuple))
        and len(python) == 3
        and are_numbers(python[1], 625, 0, words, True)
        and (python[2] is None or is_number(python[2])),
        "the state of python's random numbers",
        python,
    )
    expect(
        isinstance(numpy, (list, tuple))
        and len(numpy) == 5
        and isinstance(numpy[0], str)
        and numpy[0] == "MT19937"
        and are_numbers(numpy[1], 624, 0, words, True)
        and is_number(numpy[2], 0, 624, True)
        and is_number(numpy[3], 0, 1, True)
        and is_number(numpy[4]),
        "the state of numpy's random numbers",
        numpy,
    )
    expect(
        isinstance(cuda, (list, tuple)) and all(map(_is_cuda_state, cuda)),
        "the state of CUDA's random numbers",
        cuda,
    )
    try:
        random.Random().setstate((python[0], tuple(python[1]), python[2]))
        np.random.RandomState().set_state(
            (numpy[0], np.array(numpy[1], dtype=np.uint32), *numpy[2:])
        )
        for name in ("torch", "data"):
            torch.Generator().set_state(saved[name])
            left, position = (
                saved[name].clone().view(torch.int32)[[2, 4]].tolist()
            )  # in a table of 624
            expect(
                (left, position) == (1, 0) or left + position == 625,
                f"the position in the random numbers of {name}",
                position,
            )
    except (RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise Damaged(f"random_states: {one_line(e)}") from None
    return saved


def _is_cuda_state(value):
    """A seed and an offset, which is a multiple of four, of 8 bytes each."""
    return (
        isinstance(value, torch.Tensor)
        and value.layout == torch.strided
        and value.device.type == "cpu"
        and value.dtype == torch.uint8
        and value.shape == (16,)
        and int(value.clone().view(torch.int64)[1]) % 4 == 0
    )


# -------------------------------------------------------------------------- optimizer and scheduler

# What an optimizer remembers of a parameter; the rates of a group of parameters, which are from 0
# to this; and ways to compute the same, which differ between versions of torch.
MOMENTS = {"SGD": {"momentum_buffer"}, "Adam": {"step", "exp_avg", "exp_avg_sq"}}
RATES = {
    "lr": LARGEST_FLOAT,
    "initial_lr": LARGEST_FLOAT,
    "weight_decay": LARGEST_FLOAT,
    "momentum": 1,
}
WAYS = {"foreach", "fused", "capturable", "differentiable"}


def optimizer_state(saved, optimizer):
    """The state dict to load into `optimizer`: rates and moments of the one that a file holds,
    everything else the optimizer's own. Moments are float32 and in their parameter's shape and
    layout, as fused kernels take for granted."""
    expect(isinstance(saved, dict) and set(saved) == {"param_groups", "state"}, "opt", saved)
    own, groups, entries = (
        optimizer.state_dict()["param_groups"],
        saved["param_groups"],
        saved["state"],
    )
    expect(
        isinstance(groups, list) and len(groups) == len(own),
        f"opt's list of {len(own)} groups",
        groups,
    )
    expect(isinstance(entries, dict), "opt's state", entries)
    names, result, state, used = MOMENTS[type(optimizer).__name__], [], {}, set()
    for n, (group, ours) in enumerate(zip(groups, own)):
        result.append(_group(group, ours, f"group {n} of opt"))
        moments = {}  # by the optimizer's own numbers: versions of torch number parameters in other ways
        for index, number, parameter in zip(
            ours["params"], group["params"], optimizer.param_groups[n]["params"]
        ):
            expect(number not in used, f"a parameter listed twice in group {n} of opt", number)
            used.add(number)
            moments[index] = _moments(
                entries.get(number, {}), names, parameter, f"of parameter {index} in opt"
            )
        if any(moments.values()) and not all(moments.values()):
            raise Damaged(f"group {n} of opt remembers nothing of some of its parameters")
        state.update((index, entry) for index, entry in moments.items() if entry)
    expect(set(entries) <= used, "opt's list of parameters", list(entries))
    return {"state": state, "param_groups": result}


def _group(saved, own, what):
    """A group of parameters with the rates of `saved`; `own`: the optimizer's own group, with which
    the rest agrees."""
    known = set(own) | set(RATES) | WAYS
    expect(
        isinstance(saved, dict) and all(isinstance(name, str) and name in known for name in saved),
        what,
        saved,
    )
    ids = saved.get("params")
    expect(
        isinstance(ids, list) and are_numbers(ids, len(own["params"]), whole=True),
        f"the list of {len(own['params'])} parameters of {what}",
        ids,
    )
    saved = {name: plain(value) for name, value in saved.items()}
    rates = {
        name: saved.get(name)
        for name in RATES
        if name in saved or name in own and name != "initial_lr"
    }
    for name, value in rates.items():
        expect(is_number(value, 0, RATES[name]), f"{name} of {what}", value)
    for name, value in saved.items():
        if name in WAYS:
            expect(value is None or isinstance(value, bool), f"{name} of {what}", value)
        elif name != "params" and name not in RATES:
            expect(_same(value, own[name]), f"{name} of {what}", value)
    return {**own, **rates}


def _same(value, own):
    """Whether a value from a file is the number, or the numbers, `own`."""
    if isinstance(own, (list, tuple)):
        return are_numbers(value, len(own)) and list(value) == list(own)
    return isinstance(value, (bool, int, float)) and value == own


def _moments(saved, names, parameter, what):
    """What an optimizer remembers of a parameter, {} at first."""
    expect(isinstance(saved, dict) and set(saved) <= names, f"what is remembered {what}", saved)
    saved = {
        name: value
        for name, value in saved.items()
        if name != "momentum_buffer" or value is not None
    }
    expect(not saved or set(saved) == names, f"what is remembered {what}", saved)
    result = {}
    for name, value in saved.items():
        if name == "step":
            value = torch.tensor(float(value)) if is_number(value, 0) else value
            result[name] = value = real_tensor(value, f"step {what}", torch.Size()).clone()
        else:
            value = real_tensor(value, f"{name} {what}", parameter.shape)
            result[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)
        if name in ("step", "exp_avg_sq") and (value < 0).any():
            raise Damaged(f"{name} {what} is negative")
    return result


def scheduler_state(saved, scheduler):
    """The state dict to load into `scheduler`: how far it is and its rates, from a file; its
    settings must be the scheduler's own."""
    own = scheduler.state_dict()
    expect(
        isinstance(saved, dict) and all(isinstance(name, str) for name in saved), "scheduler", saved
    )
    result, rates = dict(own), len(scheduler.optimizer.param_groups)
    for name in {**own, **saved}:
        if (
            name == "verbose"
            or name[:1] == "_"
            and (name not in ("_step_count", "_last_lr") or name not in saved)
        ):
            continue  # how a version of torch keeps its books
        value = plain(saved.get(name))
        if name in ("last_epoch", "_step_count"):
            good = is_number(value, 0, LARGEST, True)
        elif name in ("base_lrs", "_last_lr"):
            good = are_numbers(value, rates, 0)
        else:
            good = name in own and _same(value, own[name])
        expect(good, f"{name} of scheduler", value)
        result[name] = value
    return result
