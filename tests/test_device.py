"""Work on a GPU, shown without one: on tensors without numbers, which have a device and a layout (benchmarks/counting.py).

That each of these tests fails where it should was shown by hand: with a `.cpu()`, a `.clone()` and an NCHW tensor put
into a step in turn."""
import collections
import contextlib
import math

import pytest
import torch
from conftest import MODELS, criterion_of, grads, masked, rule, sample
from counting import Counting, moved, on_pretended_gpu

import model_utils as mu
from data_utils import TASKS, Batches
from energy import fast
from energy.poolings import MaxPool
from experiment.health import Health
from ART_Timesteps_Addition.pytorch import Unrolled, by_equilibrium_propagation

PUBLISHED = dict(mbs=128, free=(26, 560e6), nudged=(32, 560e6))  # most operations and bytes of a step


@contextlib.contextmanager
def pretended(*models):
    """A device that need not be there, with models on it, and a mini-batch for them: x, y."""
    with on_pretended_gpu() as device:
        for model in models:
            moved(model, device)
        shape = models[0].connections[0].pre_shape
        yield torch.rand(4, *shape, device=device), torch.zeros(4, dtype=torch.int64, device=device)


def everything(model, x, y, twin):
    """What every rule of learning gives that needs no backward pass, predictions, and EP's gradient of images."""
    criterion = criterion_of(model)
    masks = mu.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), len(x))
    for drop, moving, more in ((None, None, {}), (masks, twin, {"thirdphase": True})):
        yield from mu.ep_gradients(model, x, y, rule(4, 2, criterion, **more), drop, moving)
        yield from (p.grad for p in model.parameters())
    yield from mu.cep_updates(model, x, y, rule(2, 2, criterion, thirdphase=True), lambda share: None, masks)
    yield from mu.predicting_neurons(twin, x, rule(8, 2, criterion))
    out, pullback = by_equilibrium_propagation(Unrolled(model, 7, 2, criterion, grad="ep"), x)
    yield from (out, pullback(out))


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("name", MODELS)
def test_everything_stays_on_the_device(name, schedule):
    model = MODELS[name](mu.my_hard_sig if "CNN" in name else mu.my_sigmoid)
    model.schedule = schedule
    twin = mu.lowered(model, torch.bfloat16)
    with pretended(model, twin) as (x, y), Counting() as counted:
        assert all(t.device == x.device for t in everything(model, x, y, twin))
    assert not counted.names(lambda o: o.waits)
