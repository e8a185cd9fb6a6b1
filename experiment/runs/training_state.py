"""What resuming needs besides weights: the states of random numbers, optimizer and scheduler.

Those in a file are compared with the run's own; differences raise Damaged. Arguments called `saved`
come from a file and can be of any type."""

import random
from typing import Any

import numpy as np
import torch

from data_utils import one_line
from experiment.runs.contents import RANGES, Damaged, conform, expect, is_number

# ---- random numbers


def random_states(generator: torch.Generator) -> dict:
    """The states of all random numbers that a run draws, in types that a safe load reads.

    generator: of the mini-batches. CUDA states only if a CUDA device is in use: reading them
    would otherwise start one."""
    kind, keys, *rest = np.random.get_state(legacy=True)
    assert isinstance(keys, np.ndarray)  # the stubs do not know what legacy=True returns
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), *rest],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [],
        "data": generator.get_state(),
    }


def restore_random_states(states: dict, generator: torch.Generator) -> None:
    """Set the states, which are validated; a CUDA state only if there is such a device."""
    random.setstate(states["python"])
    kind, keys, *rest = states["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(states["torch"])
    for index, state in enumerate(states["cuda"][: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(state, index)
    generator.set_state(states["data"])


def validated_random_states(saved: Any) -> dict | None:
    """The states that `random_states` read, or None; each is tried on a new generator.

    Positions within the tables of numbers are compared here: NumPy and torch would read foreign
    memory beyond a table's end."""
    if saved is None:
        return None
    expect(isinstance(saved, dict), "random_states", saved)
    template = random_states(torch.Generator())
    template["python"] = random.Random().getstate()
    devices = saved.get("cuda")
    expect(isinstance(devices, (list, tuple)), "cuda of random_states", devices)
    template["cuda"] = [torch.zeros(16, dtype=torch.uint8)] * len(devices)
    saved = conform(saved, template, "random_states")
    kind, keys, position, *gauss = saved["numpy"]
    expect(0 <= position <= 624, "the position in the random numbers of numpy", position)
    for state in saved["cuda"]:  # a seed and an offset, a multiple of four, of 8 bytes each
        offset = int(state.view(torch.int64)[1])
        expect(offset % 4 == 0, "the offset in the random numbers of cuda", offset)
    try:
        random.Random().setstate(saved["python"])
        np.random.RandomState().set_state((kind, np.array(keys, dtype=np.uint32), position, *gauss))
        for name in ("torch", "data"):
            torch.Generator().set_state(saved[name])
            left, position = saved[name].view(torch.int32)[[2, 4]].tolist()
            good = (left, position) == (1, 0) or left + position == 625
            expect(good, f"the position in the random numbers of {name}", position)
    except (RuntimeError, TypeError, ValueError, OverflowError) as e:
        raise Damaged(f"random_states: {one_line(e)}") from None
    return saved


# ---- optimizer and scheduler

# Options of a parameter group that select an implementation and differ between versions of torch
IMPLEMENTATIONS = {"foreach", "fused", "capturable", "differentiable"}


def optimizer_state(saved: Any, optimizer: torch.optim.Optimizer) -> dict:
    """The state dict to load into `optimizer`: rates and moments from a file, everything else the
    optimizer's own. The moments are compared with those of a new optimizer after one step."""
    expect(isinstance(saved, dict) and set(saved) == {"param_groups", "state"}, "opt", saved)
    own = optimizer.state_dict()["param_groups"]
    groups = saved["param_groups"]
    fits = isinstance(groups, list) and len(groups) == len(own)
    expect(fits, f"the list of {len(own)} groups of opt", groups)
    groups = [_group(*pair, f"group {n} of opt") for n, pair in enumerate(zip(groups, own))]
    # versions of torch number parameters in different ways
    numbers = [number for group in saved["param_groups"] for number in group["params"]]
    distinct = len(set(numbers)) == len(numbers)
    expect(distinct, "opt's list of parameters, one of them twice,", numbers)
    entries = saved["state"]
    expect(isinstance(entries, dict) and set(entries) <= set(numbers), "opt's state", entries)
    indices = [index for group in own for index in group["params"]]
    template = _state_after_one_step(optimizer, groups)
    state = {}
    for index, number in zip(indices, numbers):
        entry = entries.get(number, {})
        expect(isinstance(entry, dict), f"parameter {index} of opt", entry)
        entry = {name: value for name, value in entry.items() if value is not None}
        if entry:
            state[index] = conform(entry, template.get(index, {}), f"parameter {index} of opt")
    for n, group in enumerate(own):
        present = [index in state for index in group["params"]]
        if any(present) and not all(present):
            raise Damaged(f"group {n} of opt has no state of some of its parameters")
    return {"state": state, "param_groups": groups}


def _group(saved: Any, own: dict, what: str) -> dict:
    """The optimizer's own group of parameters with the rates of `saved`."""
    expect(isinstance(saved, dict), what, saved)
    ids = saved.get("params")
    fits = isinstance(ids, list) and len(ids) == len(own["params"])
    fits = fits and all(is_number(number, whole=True) for number in ids)
    expect(fits, f"the list of {len(own['params'])} parameters of {what}", ids)
    dropped = IMPLEMENTATIONS | {"params"} | ({"initial_lr"} - own.keys())
    saved = {name: value for name, value in saved.items() if name not in dropped}
    template = {name: value for name, value in own.items() if name not in dropped}
    later = template.keys() - RANGES.keys() | {"initial_lr"}  # settings of later versions of torch
    defaults = {name: template[name] for name in later & template.keys()}
    return {**own, **conform({**defaults, **saved}, template, what)}


def _state_after_one_step(
    optimizer: torch.optim.Optimizer, groups: list[dict]
) -> dict[int, dict[str, torch.Tensor]]:
    """{index: {name: tensor}}: the state of a new optimizer with these groups after a step."""
    stepped = []
    for group, own in zip(groups, optimizer.param_groups):
        parameters = [torch.zeros_like(parameter) for parameter in own["params"]]
        for parameter in parameters:
            parameter.grad = torch.zeros_like(parameter)
        stepped.append({**group, "params": parameters})
    kind: Any = type(optimizer)
    new = kind(stepped)
    new.step()
    return new.state_dict()["state"]


def scheduler_state(saved: Any, scheduler: torch.optim.lr_scheduler.LRScheduler) -> dict:
    """The state dict to load into `scheduler`: its progress and rates from a file; its settings
    must be equal."""
    expect(isinstance(saved, dict) and all(isinstance(n, str) for n in saved), "scheduler", saved)

    def compared(name: str) -> bool:  # internal entries differ between versions of torch
        return name in RANGES or not name.startswith("_") and name != "verbose"

    own = scheduler.state_dict()
    saved = {name: value for name, value in saved.items() if compared(name)}
    template = {name: value for name, value in own.items() if compared(name)}
    optional = {name: template[name] for name in ("_step_count", "_last_lr") if name in template}
    return {**own, **conform({**optional, **saved}, template, "scheduler")}
