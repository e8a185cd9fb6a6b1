"""Ends before T1 steps, layers in turn, two phases in one batch, lower precision: what is to stay the same, and what is not."""
import argparse
import csv
import functools
import re

import pytest
import torch
from conftest import MODELS, criterion_of, grads, only_run, sample

import model_utils as mu
from experiment.timing import Stopwatch

TOLERANCE = dict(rtol=1e-9, atol=1e-12)


def test_some_model_goes_through_matrix_products():
    model = MODELS["CNN product"](torch.tanh)
    assert all(c._as_product(4, c.synapse.weight) for c in model.connections[1:2])
    assert not any(c._as_product(4, c.synapse.weight) for c in MODELS["CNN max"](torch.tanh).connections[:2])


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_an_image_that_has_settled_is_as_of_its_last_step(model, schedule):
    model.schedule = schedule
    criterion, (x, y) = criterion_of(model), sample(model, 12)
    x *= torch.logspace(-2, 1.5, 12, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))  # faint and saturated images settle early
    drive = model.input_drive(x)
    neurons, steps, settled = model.settle(drive, None, 60, 0.0, criterion, 1e-6, every=3)
    assert ((steps % 3 == 0) | (steps == 60)).all() and (settled | (steps == 60)).all()
    assert len(steps.unique()) > 1 or steps.min() == 60  # a cycle of two steps never settles
    for i, T in enumerate(steps.tolist()):
        states = [model(x[i:i + 1], None, None, t, 0.0, criterion) for t in (T - 3, T)]
        for ours, row in zip(neurons, states[1]):
            torch.testing.assert_close(ours[i:i + 1], row, **TOLERANCE)
        change = max(((b - a).norm() / b.norm()).item() for a, b in zip(*states))
        assert (change < 1e-6) == settled[i]


WIDE = {"strides, odd sizes": lambda: mu.P_CNN(23, [3, 96, 96, 100], [3, 4, 3], [1, 2, 1], [9, 5], mu.make_pools("mia"), [1, 1, 1], mu.my_hard_sig, softmax=True),
        "feedback": lambda: mu.VF_CNN(21, [3, 90, 90], [3, 3], [2, 1], [5], mu.make_pools("im"), [1, 1], mu.my_hard_sig)}


@pytest.mark.parametrize("schedule", ["sync", "async"])
@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("name", WIDE)
def test_packed_weights_change_nothing(name, dropped, schedule, monkeypatch):
    torch.manual_seed(0)
    model = WIDE[name]()
    model.schedule = schedule
    criterion, x, y = criterion_of(model), torch.randn(6, *model.connections[0].pre_shape), torch.randint(0, 5, (6,))
    x *= torch.logspace(-2, 1, 6).view(-1, 1, 1, 1)
    if dropped:
        model = model.dropped(mu.draw_masks(model, [0.8] * (len(model.connections) + model.softmax), 6))
    found = []
    for packs in (True, False):
        monkeypatch.setattr(mu, "PACKS", packs)
        with torch.no_grad():
            drive = model.input_drive(x)
            assert any(c.packs for c in model.packed(drive, 10).connections if isinstance(getattr(c, "connection", c), mu.Conv)) == packs
            neurons, steps, _ = model.settle(drive, None, 30, 0.0, criterion, 1e-6, every=1)
        mu.ep_gradients(model, x, y, 10, 8, (0.0, 0.5), criterion, thirdphase=True)
        found.append([*neurons, *(p.grad for p in model.parameters())])
    assert len(steps.unique()) > 1
    for a, b in zip(*found):
        assert (a - b).double().norm() <= 1e-4 * b.double().norm() + 1e-7


def test_what_never_settles_takes_every_step(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    neurons, steps, settled = model.settle(model.input_drive(x), y, 7, 0.3, criterion, 1e-300)
    assert steps.tolist() == [7] * len(x) and not settled.any()
    for a, b in zip(neurons, model(x, y, None, 7, 0.3, criterion), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def phi_slope(model, x, y, neurons, n, beta, criterion):
    """dPhi/ds_n by automatic differentiation, activated as the model does it."""
    leaves = [s.detach().requires_grad_() for s in neurons]
    phi = model.Phi(x, y, leaves, beta, criterion)
    drive, = torch.autograd.grad((phi[n] if isinstance(phi, list) else phi).sum(), leaves[n])
    linear = n == len(neurons) - 1 and not model.softmax and not isinstance(criterion, torch.nn.MSELoss)
    return drive if linear else model.activation(drive)


@pytest.mark.parametrize("loss", ["mse", "cel"])
def test_an_asynchronous_step_is_that_of_odd_layers_and_then_even_ones(model, loss):
    if model.softmax and loss == "mse":
        pytest.skip("a read-out takes the cross-entropy")
    criterion, (x, y) = mu.make_criterion(loss), sample(model)
    model.schedule = "async"
    for start, beta in ((None, 0.0), (model(x, y, None, 2, 0.0, criterion), 0.3)):
        state = [s.clone() for s in start or model.init_neurons(len(x), "cpu")]
        for _ in range(3):
            for parity in (0, 1):
                for n in range(parity, len(state), 2):
                    state[n] = phi_slope(model, x, y, state, n, beta, criterion)
        for ours, theirs in zip(model(x, y, start, 3, beta, criterion), state, strict=True):
            torch.testing.assert_close(ours, theirs, **TOLERANCE)


def test_bptt_goes_through_asynchronous_steps(model):
    """Against differences of the loss in a few directions."""
    model.schedule = "async"
    criterion, (x, y) = criterion_of(model), sample(model)
    mu.bptt_gradients(model, x, y, 3, 3, criterion)
    directions = [torch.randn_like(p) for p in model.parameters()]
    slope = sum((p.grad * d).sum() for p, d in zip(model.parameters(), directions))

    def loss(h):
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions):
                p.add_(d, alpha=h)
            value = model.loss(model(x, None, None, 3, criterion=criterion), y, criterion).mean()
            for p, d in zip(model.parameters(), directions):
                p.sub_(d, alpha=h)
            return value
    assert slope.item() == pytest.approx(((loss(1e-6) - loss(-1e-6)) / 2e-6).item(), rel=1e-5)


def test_on_the_asynchronous_schedule_ep_sums_up_to_bptt():
    torch.manual_seed(0)
    model = mu.P_MLP([30, 24, 16, 12, 5], torch.tanh, schedule="async").double()
    x, y, criterion = torch.randn(6, 30, dtype=torch.float64), torch.randint(0, 5, (6,)), mu.make_criterion("mse")
    BPTT = mu.bptt_contributions(model, x, y, 400, 200, 0.0, criterion)
    EP = [mu.ep_contributions(model, x, y, 400, 200, (0.0, b), criterion) for b in (1e-3, -1e-3)]
    for name, p in model.named_parameters():
        bptt = BPTT[name].sum(0)
        assert ((EP[0][name] + EP[1][name]).sum(0) / 2 - bptt).norm() < 1e-4 * bptt.norm()


def test_both_schedules_settle_where_phi_is_stationary():
    torch.manual_seed(0)
    state = [mu.P_MLP([30, 24, 16, 12, 5], torch.tanh).double()]
    state.append(mu.P_MLP([30, 24, 16, 12, 5], torch.tanh, schedule="async").double())
    state[1].load_state_dict(state[0].state_dict())
    x = torch.randn(6, 30, dtype=torch.float64)
    steps = [m.settle(m.input_drive(x), None, 500, 0.0, mu.make_criterion("mse"), 1e-8, every=1)[1].double().mean() for m in state]
    for a, b in zip(*(m(x, None, None, 500) for m in state)):
        torch.testing.assert_close(a, b)
    assert steps[1] < 0.7 * steps[0]


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_two_nudged_phases_in_one_batch(model, schedule, monkeypatch):
    model.schedule = schedule
    criterion, (x, y), found = criterion_of(model), sample(model), []
    for limit in (0, 2 ** 20):
        monkeypatch.setattr(mu, "PAIRED", limit)
        mu.ep_gradients(model, x, y, 6, 4, (0.0, 0.3), criterion, thirdphase=True)
        found.append(grads(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], **TOLERANCE)


@pytest.mark.parametrize("alg", ["EP", "BPTT"])
def test_lower_precision_keeps_weights_and_gradients_whole(model, alg):
    model.float()
    x, y = sample(model)
    args = argparse.Namespace(alg=alg, T1=6, T2=4, betas=(0.0, 0.5), random_sign=False, thirdphase=True, tol=0.0, dropouts=None)
    twin, found = mu.lowered(model, torch.bfloat16), []
    for used in (None, twin):
        mu.gradients(model, x, y, args, criterion_of(model), twin=used)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0.9 < torch.nn.functional.cosine_similarity(*found, dim=0) < 1 - 1e-7
    with torch.no_grad():
        model.synapses[0].weight.add_(1)
    mu.refresh(twin, model)
    assert torch.equal(twin.synapses[0].weight, model.synapses[0].weight.bfloat16())


def one_by_one(model, x, neurons, T, criterion):
    """The neurons after every number of free steps up to T, each step on its own."""
    states = [neurons or model.init_neurons(len(x), "cpu")]
    for _ in range(T):
        states.append(model(x, None, states[-1], 1, 0.0, criterion))
    return states


@pytest.mark.parametrize("dropped", [False, True])
def test_two_trajectories_are_the_steps_one_by_one(request, model, dropped):
    name = request.node.callspec.params["model"]
    assert model.two_trajectories == (name in ("MLP", "MLP softmax", "VFMLP", "VFMLP softmax", "CNN avg deep softmax", "CNN product"))
    criterion, (x, _) = criterion_of(model), sample(model)
    if dropped:
        model = model.dropped(mu.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), len(x)))
    for start in (None, [torch.rand_like(s) for s in model.init_neurons(len(x), "cpu")]):
        states = one_by_one(model, x, start, 11, criterion)
        for T in (8, 9, 10, 11):
            for ours, theirs in zip(model(x, None, start, T, 0.0, criterion), states[T], strict=True):
                torch.testing.assert_close(ours, theirs, **TOLERANCE)
        for T, later in [(0, 3), (1, 0), (1, 1), (4, 0), (4, 1), (4, 2), (4, 5), (5, 0), (5, 1), (5, 4)]:
            before = model(x, None, start, T, 0.0, criterion, output_in=later)
            output = model(x, None, before, later, 0.0, criterion, output_in=0)[-1]
            torch.testing.assert_close(output, states[T + later][-1], **TOLERANCE)


def test_where_two_trajectories_meet_none_is_left_out(model):
    """A max-pooling's winners, a nudge and the asynchronous schedule make a layer's next state depend on its own."""
    criterion, (x, y) = criterion_of(model), sample(model)
    states = [model(x, y, None, 4, 0.0, criterion)]
    for _ in range(9):
        states.append(model(x, y, states[-1], 1, 0.3, criterion))
    for ours, theirs in zip(model(x, y, states[0], 9, 0.3, criterion), states[9], strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)
    model.schedule = "async"
    assert not model.two_trajectories


def test_an_asynchronous_step_is_two_synchronous_ones_of_one_trajectory(model):
    criterion, (x, _) = criterion_of(model), sample(model)
    if not model.two_trajectories:
        pytest.skip("a max-pooling ties the two together")
    states = one_by_one(model, x, None, 8, criterion)
    model.schedule = "async"
    for n, s in enumerate(model(x, None, None, 4, 0.0, criterion)):
        torch.testing.assert_close(s, states[7 + n % 2][n], **TOLERANCE)


def test_only_the_output_takes_half_of_the_work_and_both_take_half_of_the_calls(monkeypatch):
    model, rows = mu.P_MLP([6, 5, 4, 3], torch.tanh), []
    up = mu.Dense.up
    monkeypatch.setattr(mu.Dense, "up", lambda self, pre: rows.append(len(pre)) or up(self, pre))
    x, found = torch.rand(7, 6), {}
    for name, words, paired in (("steps", {}, 0), ("both", {}, 2 ** 20), ("output", {"output_in": 0}, 0)):
        monkeypatch.setattr(mu, "PAIRED", paired)
        rows.clear()
        model(x, None, None, 41, **words)
        found[name] = len(rows), sum(rows)
    assert found["steps"] == (1 + 2 * 40, 7 * (1 + 2 * 40))
    assert found["both"][0] < 0.55 * found["steps"][0] and found["both"][1] <= found["steps"][1]
    assert found["output"][0] == 1 + 40 and found["output"][1] == 7 * 41


def test_compiled_steps_are_those_that_record_no_graph(monkeypatch):
    calls = []

    def recording(function):
        def compiled(*args):
            calls.append(function.__name__)
            return function(*args)
        return compiled
    mu._compiled.cache_clear()
    monkeypatch.setattr(torch, "compile", recording)
    for name, T, expected in (("CNN max", 4, ["step"] * 3), ("MLP", 4, ["step"] * 3), ("MLP", 9, ["turn"] * 7)):
        model = MODELS[name](torch.tanh)
        x, y = sample(model)
        plain = model(x, None, None, T)
        calls.clear()
        model.compiled = True
        assert all(torch.equal(a, b) for a, b in zip(plain, model(x, None, None, T))) and calls == expected
        model(x, None, None, T, check_thm=True)
        assert len(calls) == len(expected)
    mu._compiled.cache_clear()


@pytest.mark.parametrize("dropped", [False, True])
def test_steps_compile_whole_and_once(model, dropped, monkeypatch):
    """Traced without a break, and not anew for every mini-batch, whose masks are other tensors."""
    monkeypatch.setattr(mu, "_compiled", functools.cache(lambda f: torch.compile(f, backend="eager", fullgraph=True)))
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    criterion, graphs = criterion_of(model), []
    for _ in range(3):
        (x, y), masks = sample(model), mu.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), 4)
        moving = model.dropped(masks) if dropped else model
        found = []
        for moving.compiled in (True, False):
            mu.ep_gradients(moving, x, y, 9, 3, (0.0, 0.3), criterion, thirdphase=True)
            found.append(grads(model))
        for name, grad in found[0].items():
            torch.testing.assert_close(grad, found[1][name], **TOLERANCE)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < graphs[0] == graphs[1] == graphs[2]
    torch._dynamo.reset()


RESCALABLE = {"MLP": lambda act, softmax: mu.P_MLP([20, 16, 8, 5], act, softmax=softmax),
              "VFMLP": lambda act, softmax: mu.VF_MLP([20, 16, 8, 5], act, softmax=softmax),
              "CNN": lambda act, softmax: mu.VF_CNN(8, [2, 4], [3], [1], [7, 5], mu.make_pools("m"), [0], act, softmax=softmax)}


@pytest.mark.parametrize("dropped", [False, True])
@pytest.mark.parametrize("softmax", [False, True])
@pytest.mark.parametrize("act", mu.RESCALED)
@pytest.mark.parametrize("name", RESCALABLE)
def test_an_activation_rescaled_in_the_weights_changes_nothing(name, act, softmax, dropped, monkeypatch):
    torch.manual_seed(0)
    model, found = RESCALABLE[name](act, softmax).double(), []
    criterion, (x, y) = criterion_of(model), sample(model)
    masks = mu.draw_masks(model, [0.7] * (len(model.connections) + model.softmax), 4)
    for table in (mu.RESCALED, {}):
        monkeypatch.setattr(mu, "RESCALED", table)
        moving = model.dropped(masks) if dropped else model
        drive = moving.input_drive(x)
        assert (moving.rescaled(drive, 5, 0.3, criterion)[0] is moving) == (not table)
        assert moving.rescaled(drive[:1], 2, 0.3, criterion)[0] is moving  # two steps of one image do not win back a pass over the weights
        tensors = [*moving(x, y, None, 5, 0.3, criterion), *moving.settle(drive, None, 40, 0.0, criterion, 1e-5)[0]]
        mu.ep_gradients(moving, x, y, 9, 3, (0.0, 0.3), criterion, thirdphase=True)
        tensors += grads(model).values()
        mu.bptt_gradients(moving, x, y, 6, 4, criterion)
        found.append([*tensors, *grads(model).values()])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs, **TOLERANCE)


QUICK = "--task digits --device -1 --train-size 200 --test-size 60 --seed 0 --model CNN --channels 4 6 --act my_hard_sig --betas 0 0.5 --optim adam"


@pytest.mark.parametrize("words", ["", "--alg BPTT", "--alg BPTT --T2 60", "--schedule async --thirdphase", "--model VFCNN --thirdphase"])
def test_settling_is_counted(ok, tmp_path, words):
    out = ok(QUICK, "--T1 60 --T2 4 --tol 1e-3 --epochs 2 --save", words)
    assert "images/s" in out and "evaluation" in out.splitlines()[-1]
    rows = list(csv.DictReader(open(only_run(tmp_path) / "metrics.csv")))
    if "--T2 60" in words:  # no step of the free phase is left to stop early
        assert "steps_mean" not in rows[0]
        return
    assert "steps on average" in out and all(5 <= float(r["steps_mean"]) <= float(r["steps_max"]) <= 60 and 0 <= float(r["unsettled"]) <= 100 for r in rows)
    line = ok(f"--todo evaluate --device -1 --load-path {only_run(tmp_path)}")
    assert line.count("steps on average") == 2
    whole = ok(f"--todo evaluate --device -1 --load-path {only_run(tmp_path)} --tol 0")
    accuracies = [re.findall(r"test accuracy (\S+) %", text)[0] for text in (line, whole)]
    assert abs(float(accuracies[0]) - float(accuracies[1])) < 2
    ok(f"--todo attack --device -1 --load-path {only_run(tmp_path)} --eps-list 1 --attack-iters 2 --test-size 8")


def test_a_run_keeps_its_schedule(ok, tmp_path):
    ok(QUICK, "--T1 6 --T2 3 --schedule async --save")
    run = only_run(tmp_path)
    assert torch.load(run / "model.pt", weights_only=True)["config"]["schedule"] == "async"
    ok(f"--todo gducheck --device -1 --load-path {run}")


@pytest.mark.parametrize("words, what", [("--precision bf16", "--precision: bf16 needs a CUDA device"), ("--precision tf32", "--precision: tf32"),
                                         ("--compile", "--compile: needs a CUDA device"), ("--precision fp64", "--precision: got 'fp64'"),
                                         ("--tol -1", "--tol"), ("--schedule random", "--schedule")])
def test_refusals(cli, words, what):
    code, out, err = cli(QUICK, words)
    assert code == 2 and what in err and err.count("\n") == 1 and not out


def test_the_parts_of_the_time_add_up():
    account = Stopwatch()
    for part in ("free", "nudged", "free"):
        with account.part(part):
            sum(range(20000))
    assert list(account.iterate([1, 2], "data")) == [1, 2]
    assert list(account.seconds()) == ["free", "nudged", "data"] and all(seconds > 0 for seconds in account.seconds().values())
    assert re.fullmatch(r"free [\d.]+ s \(\d+ %\), nudged .*, data .*", account.shares())
