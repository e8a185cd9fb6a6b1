"""Ends before T1 steps, layers in turn, two phases in one batch, lower precision: what is to stay
the same, and what is not."""

import argparse
import csv
import re

import pytest
import torch
from conftest import criterion_of, grads, only_run, rule, sample, settle

import model_utils as mu
from energy import dynamics, fast, gdu
from energy.precision import refresh
from experiment.config import Config
from experiment.diagnostics import Diagnostics
from experiment.timing import Stopwatch

TOLERANCE = dict(rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_an_image_that_has_settled_is_as_of_its_last_step(model, schedule):
    model.schedule = schedule
    criterion, (x, _) = criterion_of(model), sample(model, 12)
    # faint and saturated images settle early
    x *= torch.logspace(-2, 1.5, 12, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    neurons, steps, settled = settle(model, x, None, 60, 0.0, criterion, 1e-6, every=3)
    assert ((steps % 3 == 0) | (steps == 60)).all() and (settled | (steps == 60)).all()
    assert len(steps.unique()) > 1 or steps.min() == 60  # a cycle of two steps never settles
    for i, T in enumerate(steps.tolist()):
        states = [model(x[i : i + 1], None, None, t, 0.0, criterion) for t in (T - 3, T)]
        for ours, row in zip(neurons, states[1]):
            torch.testing.assert_close(ours[i : i + 1], row, **TOLERANCE)
        change = max(((b - a).norm() / b.norm()).item() for a, b in zip(*states))
        assert (change < 1e-6) == settled[i]


def test_what_never_settles_takes_every_step(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    neurons, steps, settled = settle(model, x, y, 7, 0.3, criterion, 1e-300)
    assert steps.tolist() == [7] * len(x) and not settled.any()
    for a, b in zip(neurons, model(x, y, None, 7, 0.3, criterion), strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


def phi_slope(model, x, y, neurons, n, beta, criterion):
    """dPhi/ds_n by automatic differentiation, activated as the model does it."""
    leaves = [s.detach().requires_grad_() for s in neurons]
    phi = model.Phi(x, y, leaves, beta, criterion)
    (drive,) = torch.autograd.grad((phi[n] if isinstance(phi, list) else phi).sum(), leaves[n])
    linear = (
        n == len(neurons) - 1 and not model.softmax and not isinstance(criterion, torch.nn.MSELoss)
    )
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
    mu.bptt_gradients(model, x, y, rule(3, 3, criterion))
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
    x, y, criterion = (
        torch.randn(6, 30, dtype=torch.float64),
        torch.randint(0, 5, (6,)),
        mu.make_criterion("mse"),
    )
    BPTT = gdu.bptt_contributions(model, x, y, 400, 200, 0.0, criterion)
    EP = [gdu.ep_contributions(model, x, y, 400, 200, (0.0, b), criterion) for b in (1e-3, -1e-3)]
    for name, _ in model.named_parameters():
        bptt = BPTT[name].sum(0)
        assert ((EP[0][name] + EP[1][name]).sum(0) / 2 - bptt).norm() < 1e-4 * bptt.norm()


def test_both_schedules_settle_where_phi_is_stationary():
    torch.manual_seed(0)
    state = [mu.P_MLP([30, 24, 16, 12, 5], torch.tanh).double()]
    state.append(mu.P_MLP([30, 24, 16, 12, 5], torch.tanh, schedule="async").double())
    state[1].load_state_dict(state[0].state_dict())
    x = torch.randn(6, 30, dtype=torch.float64)
    steps = [settle(m, x, None, 500, 0.0, "mse", 1e-8, every=1)[1].double().mean() for m in state]
    for a, b in zip(*(m(x, None, None, 500) for m in state)):
        torch.testing.assert_close(a, b)
    assert steps[1] < 0.7 * steps[0]


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_two_nudged_phases_in_one_batch(model, schedule, monkeypatch):
    model.schedule = schedule
    criterion, (x, y), found = criterion_of(model), sample(model), []
    for limit in (0, 2**20):
        monkeypatch.setattr(fast, "PAIRED", limit)
        mu.ep_gradients(model, x, y, rule(6, 4, criterion, 0.3, thirdphase=True))
        found.append(grads(model))
    for name, grad in found[0].items():
        torch.testing.assert_close(grad, found[1][name], **TOLERANCE)


@pytest.mark.parametrize("alg", ["EP", "BPTT"])
def test_lower_precision_keeps_weights_and_gradients_whole(model, alg):
    model.float()
    x, y = sample(model)
    args = argparse.Namespace(
        alg=alg,
        T1=6,
        T2=4,
        betas=(0.0, 0.5),
        random_sign=False,
        thirdphase=True,
        tol=0.0,
        dropouts=None,
        loss="cel" if model.softmax else "mse",
        precision="fp32",
        check_thm=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    trainer = mu.make_trainer(model, optimizer, args)
    twin, found = mu.lowered(model, torch.bfloat16), []
    for trainer.bf16_copy in (None, twin):
        trainer.gradients(x, y)
        found.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    assert 0.9 < torch.nn.functional.cosine_similarity(*found, dim=0) < 1 - 1e-7
    with torch.no_grad():
        model.synapses[0].weight.add_(1)
    refresh(twin, model)
    assert torch.equal(twin.synapses[0].weight, model.synapses[0].weight.bfloat16())


def test_the_nudge_is_held_against_the_rounding_of_the_steps_that_are_taken(model):
    model.float()
    x, y = sample(model)
    args = argparse.Namespace(
        alg="EP",
        T1=30,
        T2=8,
        betas=(0.0, 1e-3),
        random_sign=False,
        thirdphase=True,
        tol=0.0,
        dropouts=None,
        loss="cel" if model.softmax else "mse",
        precision="fp32",
        check_thm=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    noisy = []
    for twin in (None, mu.lowered(model, torch.bfloat16)):
        diagnostics = Diagnostics(model, Config.of(args).rule, optimizer, twin)
        diagnostics.examine(x, y)
        noisy.append(float(diagnostics.contrast) < 4)
    assert noisy == [False, True]


def test_an_asynchronous_step_is_two_synchronous_ones_of_one_trajectory(model):
    criterion, (x, _) = criterion_of(model), sample(model)
    if any(c.routed for c in model.connections[1:]):
        pytest.skip("a max-pooling ties the two together")
    states = [model.init_neurons(len(x), "cpu")]
    for _ in range(8):
        states.append(model(x, None, states[-1], 1, 0.0, criterion))
    model.schedule = "async"
    for n, s in enumerate(model(x, None, None, 4, 0.0, criterion)):
        torch.testing.assert_close(s, states[7 + n % 2][n], **TOLERANCE)


QUICK = (
    "--task digits --device -1 --train-size 200 --test-size 60 --seed 0 --model CNN --channels 4 6 --act "
    "my_hard_sig --betas 0 0.5 --optim adam"
)


@pytest.mark.parametrize(
    "words",
    [
        "",
        pytest.param("--alg BPTT", marks=pytest.mark.slow),
        pytest.param("--alg BPTT --T2 60", marks=pytest.mark.slow),
        pytest.param("--schedule async --thirdphase", marks=pytest.mark.slow),
        pytest.param("--model VFCNN --thirdphase", marks=pytest.mark.slow),
    ],
)
def test_settling_is_counted(ok, tmp_path, words):
    out = ok(QUICK, "--T1 60 --T2 4 --tol 1e-3 --epochs 2 --save", words)
    assert "images/s" in out and re.search("^time: .*evaluation", out, re.M)
    rows = list(csv.DictReader(open(only_run(tmp_path) / "metrics.csv")))
    if "--T2 60" in words:  # no step of the free phase is left to stop early
        assert "steps_mean" not in rows[0]
        return
    assert "steps on average" in out and all(
        5 <= float(r["steps_mean"]) <= float(r["steps_max"]) <= 60
        and 0 <= float(r["unsettled"]) <= 100
        for r in rows
    )
    line = ok(f"--todo evaluate --device -1 --load-path {only_run(tmp_path)}")
    assert line.count("steps on average") == 2
    whole = ok(f"--todo evaluate --device -1 --load-path {only_run(tmp_path)} --tol 0")
    accuracies = [re.findall(r"test accuracy (\S+) %", text)[0] for text in (line, whole)]
    assert abs(float(accuracies[0]) - float(accuracies[1])) < 2
    ok(
        f"--todo attack --device -1 --load-path {only_run(tmp_path)} --eps-list 1 --attack-iters 2 --test-size 8"
    )


def test_a_run_keeps_its_schedule(ok, tmp_path):
    ok(QUICK, "--T1 6 --T2 3 --schedule async --save")
    run = only_run(tmp_path)
    assert torch.load(run / "model.pt", weights_only=True)["config"]["schedule"] == "async"
    ok(f"--todo gducheck --device -1 --load-path {run}")


@pytest.mark.parametrize(
    "words, what",
    [
        ("--precision bf16", "--precision: bf16 needs a CUDA device"),
        ("--precision tf32", "--precision: tf32"),
        ("--compile", "--compile: needs a CUDA device"),
        ("--precision fp64", "--precision: got 'fp64'"),
        ("--tol -1", "--tol"),
        ("--schedule random", "--schedule"),
    ],
)
def test_refusals(cli, words, what):
    code, out, err = cli(QUICK, words)
    assert code == 2 and what in err and err.count("\n") == 1 and not out


def test_the_parts_of_the_time_add_up():
    account = Stopwatch()
    for part in ("free", "nudged", "free"):
        with account.part(part):
            sum(range(20000))
    assert list(account.iterate([1, 2], "data")) == [1, 2]
    assert list(account.seconds()) == ["free", "nudged", "data"] and all(
        seconds > 0 for seconds in account.seconds().values()
    )
    assert re.fullmatch(r"free [\d.]+ s \(\d+ %\), nudged .*, data .*", account.shares())


@pytest.mark.parametrize("looks, share", [(4, 0.25), (2, 0.0), (3, 1.0)])
def test_when_settled_images_leave_changes_nothing(model, looks, share, monkeypatch):
    x, y = sample(model, 9)
    x = x * torch.logspace(-2, 1, 9, dtype=x.dtype).view(-1, *[1] * (x.dim() - 1))
    loss, sizes = mu.loss_name(criterion_of(model)), []
    chain = model.chain(loss)

    def advance(chain, phase, neurons):
        sizes.append(len(phase.drive))
        return dynamics.step(chain, phase, neurons)

    for labels, beta, T in ((None, 0.0, 60), (y, 0.3, 33)):
        phase, found = model.phase(chain.input_drive(x), labels, beta, loss), []
        for leaving in (None, dynamics.Leaving(looks, share)):
            sizes.clear()
            found.append(
                dynamics.relax_until_converged(
                    chain, phase, T, 1e-4, advance=advance, leaving=leaving
                )
            )
        (state, settling), (others, other_settling) = found
        for ours, theirs in zip([*state, *settling], [*others, *other_settling], strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-12)
        leaves = [b for a, b in zip(sizes, sizes[1:]) if a != b]
        assert len(leaves) < 1 + (3 if share == 0.25 else 0 if share == 1 else 9)
