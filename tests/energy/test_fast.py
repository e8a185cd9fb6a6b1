"""Every faster way to take steps against the plain way, in float64."""

import functools

import pytest
import torch
from conftest import MODELS, criterion_of, grads, masked, rule, sample, settle

import model_utils as mu
from energy import dynamics, fast
from energy.connections import Convolution, Dense, WindowConvolution
from experiment import command_line, training

TOLERANCE = dict(rtol=1e-9, atol=1e-12)
NAMES = tuple(fast.TABLE)


def varied(model, mbs=4):
    """A mini-batch with faint and strong images, so that they settle at different times."""
    x, y = sample(model, mbs)
    return x * torch.logspace(-2, 1, mbs, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1)), y


def everything(model, x, y):
    """What phases, learning rules and predictions give: a list of tensors."""
    criterion = criterion_of(model)
    free = model(x, None, None, 11, 0.0, criterion)
    found = [
        *free,
        *model(x, y, free, 9, 0.3, criterion),
        *model(x, y, None, 9, -0.3, criterion),
        *model(x, None, free, 3, 0.0, criterion),
        model(x, None, None, 10, 0.0, criterion, output_in=0)[-1],
    ]
    before = model(x, None, None, 5, 0.0, criterion, output_in=4)
    found.append(
        model(x, None, before, 4, 0.0, criterion, check_thm=True, output_in=0)[-1].detach()
    )
    found += settle(model, x, None, 40, 0.0, criterion, 1e-5)[0]
    for learn, more in (
        (mu.ep_gradients, {"thirdphase": True}),
        (mu.ep_gradients, {}),
        (mu.bptt_gradients, {}),
    ):
        learn(model, x, y, rule(9, 4, criterion, **more))
        found += grads(model).values()
    return found


@functools.cache
def plainly(name, schedule, drop):
    """A model, a mini-batch, and `everything` by the plain way."""
    torch.manual_seed(0)
    act = (
        mu.my_hard_sig
        if "CNN" in name and "avg" not in name
        else torch.tanh
        if "VF" in name
        else mu.my_sigmoid
    )
    model = MODELS[name](act).double()
    model.schedule = schedule
    if drop:
        model = masked(
            model, training.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), 4)
        )
    x, y = varied(model)
    kept, fast.TABLE = fast.TABLE, {}
    try:
        return model, x, y, everything(model, x, y)
    finally:
        fast.TABLE = kept


@pytest.mark.parametrize("schedule, drop", [("sync", False), ("async", False), ("sync", True)])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("row", [*NAMES, "all"])
def test_every_row_is_the_plain_way(row, name, schedule, drop, monkeypatch):
    model, x, y, plain = plainly(name, schedule, drop)
    monkeypatch.setattr(fast, "TABLE", fast.TABLE if row == "all" else {row: fast.TABLE[row]})
    monkeypatch.setattr(fast, "_compiled", lambda function: function)
    model.compiled = row == "compiled"
    for ours, theirs in zip(everything(model, x, y), plain, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    model.compiled = False


def test_every_row_applies_to_some_model(monkeypatch):
    seen = set()

    def recording(name, row):
        return row._replace(applies=lambda *args: row.applies(*args) and not seen.add(name))

    monkeypatch.setattr(fast, "_compiled", lambda function: function)
    for name in MODELS:
        model, x, y, _ = plainly(name, "sync", False)
        for model.schedule in ("sync", "async"):
            for model.compiled in (False, True):
                monkeypatch.setattr(
                    fast, "TABLE", {n: recording(n, row) for n, row in fast.TABLE.items()}
                )
                everything(model, x, y)
        model.schedule, model.compiled = "sync", False
    assert seen == set(NAMES)


def test_some_model_goes_through_matrix_products():
    chains = [
        fast.suited(MODELS[name](torch.tanh).chain(), 4) for name in ("CNN product", "CNN max")
    ]
    assert [type(c) for c in chains[0].connections] == [Convolution, WindowConvolution, Dense]
    assert not any(isinstance(c, WindowConvolution) for c in chains[1].connections)


def test_only_the_output_takes_half_of_the_work_and_both_take_half_of_the_calls(monkeypatch):
    model, rows = mu.P_MLP([6, 5, 4, 3], torch.tanh), []
    up = Dense._up
    monkeypatch.setattr(Dense, "_up", lambda self, pre: rows.append(len(pre)) or up(self, pre))
    x, found = torch.rand(7, 6), {}
    for name, words, paired in (
        ("steps", {}, 0),
        ("both", {}, 2**20),
        ("output", {"output_in": 0}, 0),
    ):
        monkeypatch.setattr(fast, "PAIRED", paired)
        rows.clear()
        model(x, None, None, 41, **words)
        found[name] = len(rows), sum(rows)
    assert found["steps"] == (1 + 2 * 40, 7 * (1 + 2 * 40))
    assert found["both"][0] < 0.55 * found["steps"][0] and found["both"][1] <= found["steps"][1]
    assert found["output"][0] == 1 + 40 and found["output"][1] == 7 * 41


def test_asynchronous_steps_find_no_route_twice(monkeypatch):
    torch.manual_seed(0)
    model, found = MODELS["CNN max"](torch.tanh), []
    pool = type(model.pools[1]).pool
    monkeypatch.setattr(
        type(model.pools[1]), "pool", lambda self, u: found.append(self) or pool(self, u)
    )
    model.schedule = "async"
    model(sample(model)[0], None, None, 10)
    # in every step once, and before the first, of zero neurons
    assert sum(p is model.pools[1] for p in found) == 10 + 1


def test_two_steps_of_one_image_do_not_win_back_a_pass_over_the_weights():
    chain = mu.P_MLP([20, 16, 8, 5], mu.my_sigmoid).chain()
    drive = chain.input_drive(torch.rand(4, 20))
    for phase, T, folds in (
        (dynamics.Phase(drive), 5, True),
        (dynamics.Phase(drive[:1]), 2, False),
    ):
        assert (
            fast.rewritten(fast.Steps(chain, phase, None, T)).chain.activation is torch.sigmoid
        ) == folds


def test_compiled_steps_are_those_that_record_no_graph(monkeypatch):
    calls = []

    def recording(function):
        def compiled(*args):
            calls.append(function.__name__)
            return function(*args)

        return compiled

    monkeypatch.setattr(fast, "_compiled", recording)
    for name in ("CNN max", "MLP"):
        model = MODELS[name](torch.tanh)
        x, _ = sample(model)
        plain = model(x, None, None, 4)
        calls.clear()
        model.compiled = True
        assert (
            all(torch.equal(a, b) for a, b in zip(plain, model(x, None, None, 4)))
            and calls == ["step"] * 3
        )
        model(x, None, None, 4, check_thm=True)
        assert len(calls) == 3


@pytest.mark.slow
@pytest.mark.parametrize("drop", [False, True])
def test_steps_compile_whole_and_once(model, drop, monkeypatch):
    """Traced without a break, and not anew for every mini-batch, whose masks are other tensors."""
    monkeypatch.setattr(
        fast,
        "_compiled",
        functools.cache(lambda f: torch.compile(f, backend="eager", fullgraph=True)),
    )
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion, graphs = criterion_of(model), []
    for _ in range(3):
        (x, y), masks = (
            sample(model),
            training.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), 4),
        )
        moving = masked(model, masks) if drop else model
        found = []
        for moving.compiled in (True, False):
            mu.ep_gradients(moving, x, y, rule(9, 3, criterion, thirdphase=True))
            found.append(grads(model))
        for name, grad in found[0].items():
            torch.testing.assert_close(grad, found[1][name], **TOLERANCE)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2]
    torch._dynamo.reset()


def small_published(act):
    """As the network of the published recipe, up to a map of one pixel below the read-out, with
    routes as on a GPU."""
    model = mu.P_CNN(
        12,
        [2, 4, 5, 6],
        [3, 3, 2],
        [1, 1, 1],
        [5],
        mu.make_pools("mmm"),
        [1, 1, 0],
        act,
        softmax=True,
    )
    for pool in model.pools:
        pool.masks = True
    return model


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, schedule",
    [("MLP", "sync"), ("published", "sync"), ("CNN max", "async"), ("VFCNN mixed softmax", "sync")],
)
def test_a_training_compiles_every_kind_of_phase_once(name, schedule, monkeypatch):
    """Random signs of beta, dropout, images that settle and leave, a smaller last mini-batch,
    evaluation between."""
    torch.manual_seed(0)
    torch._dynamo.reset()
    compiled, kinds = [], set()
    step = fast._compiled_step

    def backend(graph, inputs):
        compiled.append(graph)
        return graph.forward

    def recording(chain, phase, neurons):
        kinds.add((phase.target is None, all(c.mask is None for c in chain.connections)))
        return step(chain, phase, neurons)

    monkeypatch.setattr(
        fast,
        "_compiled",
        functools.cache(lambda f: torch.compile(f, backend=backend, fullgraph=True)),
    )
    monkeypatch.setattr(fast, "_compiled_step", recording)
    model = {**MODELS, "published": small_published}[name](mu.my_sigmoid)
    model.compiled, model.schedule = True, schedule
    args = command_line.resolve(
        {
            "T1": 10,
            "T2": 3,
            "betas": (0.0, 0.3),
            "loss": "cel" if model.softmax else "mse",
            "random_sign": True,
            "tol": 1e-2,
            "lrs": [0.1] * len(model.synapses),
            "epochs": 1,
        }
    )
    args = args.replace(dropouts=(0.7,) * (len(model.connections) + model.softmax))
    x, y = varied(model, 24)
    batches = Pieces(
        x, y, 7
    )  # twice as many are below 16, from where on a CPU convolves another way
    for thirdphase in (False, True):
        args = args.replace(thirdphase=thirdphase)
        mu.train(model, mu.make_optimizer(model, args)[0], batches, batches, args)
    assert len(kinds) == 4 and len(compiled) == 4
    torch._dynamo.reset()


class Pieces:
    """Mini-batches of tensors that are what a model sees already."""

    generator = None

    def __init__(self, x, y, mbs):
        self.pieces, self.samples, self.mbs = list(zip(x.split(mbs), y.split(mbs))), len(x), mbs

    def __len__(self):
        return len(self.pieces)

    def __iter__(self):
        return iter(self.pieces)
