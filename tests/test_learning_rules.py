"""Masks on connections, and weights that change at every nudged step."""

import argparse
import functools
import re

import autodiff
import pytest
import torch
from conftest import MODELS, criterion_of, grads, masked, only_run, rule, sample, settle

import main
import main_dropout
import model_utils as mu
from energy import dynamics, fast, gdu
from experiment import command_line, training

KEEP = 0.7


@pytest.fixture
def dropped(model):
    torch.manual_seed(1)
    connections = len(model.connections) + model.softmax
    return masked(model, training.draw_masks(model, [KEEP] * connections, 4))


def same(ours, theirs, tolerance=1e-9):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, rtol=tolerance, atol=1e-12)


@pytest.mark.parametrize("schedule", ["sync", "async"])
def test_phases_and_updates_are_those_of_the_masked_phi(dropped, schedule):
    criterion, (x, y) = criterion_of(dropped), sample(dropped)
    dropped.schedule = schedule
    free = dropped(x, y, None, 6, 0.0, criterion)
    if schedule == "sync":
        same(free, autodiff.relax(dropped, x, y, dropped.init_neurons(4, "cpu"), 6, 0.0, criterion))
        same(
            dropped(x, y, free, 4, 0.3, criterion),
            autodiff.relax(dropped, x, y, free, 4, 0.3, criterion),
        )
    mu.ep_gradients(dropped, x, y, rule(6, 4, criterion, 0.3, thirdphase=True))
    ours = grads(dropped)
    if not len(dropped.B_syn):
        dropped.zero_grad()
        for beta, sign in ((0.3, -1), (-0.3, 1)):
            state = dropped(x, y, free, 4, beta, criterion)
            (sign * dropped.Phi(x, y, state, beta, criterion).mean() / 0.6).backward()
        same(ours.values(), grads(dropped).values())


def test_gducheck_holds_with_masks_held(dropped):
    criterion, (x, y) = criterion_of(dropped), sample(dropped)
    if any(c.routed for c in dropped.connections) or len(dropped.B_syn):
        pytest.skip("the theorem is of smooth dynamics with an energy")
    BPTT = gdu.bptt_contributions(dropped, x, y, 300, 100, 0.0, criterion)
    EP = [gdu.ep_contributions(dropped, x, y, 300, 100, (0.0, b), criterion) for b in (1e-3, -1e-3)]
    for name, _ in list(dropped.named_parameters())[: -2 if dropped.softmax else None]:
        for ours, theirs in zip((EP[0][name] + EP[1][name]) / 2, BPTT[name]):  # step by step
            assert (ours - theirs).norm() <= 1e-3 * BPTT[name].flatten(1).norm(dim=1).max()


def test_bptt_goes_through_the_masks(dropped):
    criterion, (x, y) = criterion_of(dropped), sample(dropped)
    expected = autodiff.bptt_gradients(dropped, x, y, rule(7, 4, criterion))
    theirs = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in dropped.named_parameters()
    }
    same(mu.bptt_gradients(dropped, x, y, rule(7, 4, criterion))[-1:], expected[-1:])
    same(grads(dropped).values(), theirs.values())


@pytest.mark.parametrize("alg", ["EP", "BPTT"])
def test_training_counts_what_the_masked_read_out_says(alg, monkeypatch):
    torch.manual_seed(0)
    model = mu.P_MLP([20, 16, 8, 5], torch.tanh, softmax=True)
    x, y = torch.randn(50, 20), torch.randint(0, 5, (50,))
    monkeypatch.setattr(
        training, "draw_masks", lambda model, keep, mbs, part: [None, None, torch.zeros(mbs, 8)]
    )
    args = argparse.Namespace(
        alg=alg,
        T1=6,
        T2=4,
        betas=(0.0, 0.5),
        random_sign=False,
        thirdphase=True,
        tol=0.0,
        dropouts=[1, 1, 0.5],
        loss="cel",
        precision="fp32",
        check_thm=False,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    right = mu.make_trainer(model, optimizer, args).gradients(x, y).correct
    assert (
        right == (y == model.synapses[-1].bias.argmax()).sum()
    )  # all that is left for the read-out to say


def test_settling_keeps_each_image_with_its_mask(dropped):
    criterion, (x, _) = criterion_of(dropped), sample(dropped)
    x[::2] *= 20
    neurons, steps, _ = settle(dropped, x, None, 40, 0.0, criterion, 1e-4, every=1)
    for i, T in enumerate(steps.tolist()):
        same(
            [s[i : i + 1] for s in neurons],
            [s[i : i + 1] for s in dropped(x, None, None, T, 0.0, criterion)],
        )


def test_masks_differ_between_images_and_batches_and_keep_the_mean(model):
    count = len(model.connections) + model.softmax
    torch.manual_seed(0)
    first, second = (training.draw_masks(model, [0.9] * count, 500) for _ in range(2))
    for a, b, c in zip(first, second, [*model.connections, model.output]):
        assert (
            a.shape == (500, *c.pre_shape)
            and a.mean().item() == pytest.approx(1, abs=0.03)
            and not torch.equal(a, b)
        )
        assert len(a.flatten(1).unique(dim=0)) > 1
    assert training.draw_masks(model, [1.0] * count, 3) == [None] * count


def test_one_mask_serves_all_phases_of_a_batch_and_evaluation_draws_none(ok, monkeypatch, tmp_path):
    drawn, masks, relaxed = [], training.draw_masks, []
    monkeypatch.setattr(
        training, "draw_masks", lambda *args: drawn.append(masks(*args)) or drawn[-1]
    )
    relax = dynamics.relax

    def watched(chain, *args):
        relaxed.append([c.mask for c in chain.connections if c.mask is not None])
        return relax(chain, *args)

    monkeypatch.setattr(dynamics, "relax", watched)
    monkeypatch.setattr(fast, "TABLE", {})  # every phase on its own, by the plain way
    ok(
        QUICK,
        "--thirdphase --dropouts 0.9 0.5 --save",
        flags=main_dropout.FLAGS,
        name="main_dropout.py",
    )
    batches = 5
    evaluations = 2 * 3  # of 3 mini-batches, each until five steps before the end and then to it
    looks = 3  # phases of `Diagnostics` on the first mini-batch, without masks
    assert len(drawn) == batches and len(relaxed) == looks + 3 * batches + evaluations
    assert all(not phase for phase in relaxed[:looks])
    for n, batch in enumerate(drawn):
        assert all(
            phase[0] is batch[0] and phase[1] is batch[1]
            for phase in relaxed[looks + 3 * n : looks + 3 * n + 3]
        )
    assert all(not phase for phase in relaxed[looks + 3 * batches :])
    before = len(drawn)
    ok(f"--todo evaluate --device -1 --load-path {only_run(tmp_path)}")
    assert len(drawn) == before
    ok(
        f"--device -1 --load-path {only_run(tmp_path)}"
    )  # main.py goes on with what the run was trained with
    assert len(drawn) == 2 * before


QUICK = (
    "--task digits --device -1 --train-size 100 --test-size 60 --mbs 20 --archi 784 20 10 --T1 8 --T2 4 --betas 0 "
    "0.3 --seed 0"
)


@pytest.mark.parametrize(
    "words",
    [
        "--alg EP --thirdphase",
        pytest.param("--alg BPTT", marks=pytest.mark.slow),
        pytest.param("--alg EP --thirdphase --model VFCNN --same-update", marks=pytest.mark.slow),
        pytest.param("--alg EP --thirdphase --tol 1e-3", marks=pytest.mark.slow),
    ],
)
def test_a_cnn_learns_with_dropout(ok, words):
    out = ok(
        "--task digits --device -1 --seed 0 --model CNN --channels 6 8 --act my_hard_sig --loss cel --softmax "
        "--betas 0 1 --T1 12 --T2 5",
        "--train-size 600 --epochs 3 --optim adam --lrs 5e-3 5e-3 5e-3",
        words,
        "--dropouts 1.0 0.9 0.9",
        flags=main_dropout.FLAGS,
    )
    assert float(re.findall(r"^epoch .* test (\S+) %", out, re.M)[-1]) > 50


@pytest.mark.parametrize(
    "words, what",
    [
        ("--dropouts 0.9", "--dropouts: got 1 value (0.9), expected 2: dense 1, dense 2"),
        ("--dropouts 0 1", "--dropouts: got 0.0 1.0"),
        ("--dropouts 1 1.5", "--dropouts: got '1.5'"),
        ("--dropouts half 1", "--dropouts: got 'half'"),
    ],
)
def test_bad_probabilities(cli, words, what):
    code, _, err = cli(QUICK, words, flags=main_dropout.FLAGS, name="main_dropout.py")
    assert code == 2 and what in err and err.count("\n") == 1 and err.startswith("main_dropout.py")


def test_main_has_no_dropouts(cli):
    code, _, err = cli(QUICK, "--dropouts 1 1")
    assert code == 2 and "--dropouts" in err


# ---- continual EP


@pytest.mark.parametrize("thirdphase", [False, True])
def test_the_sum_of_small_continual_updates_is_that_of_ep(model, thirdphase):
    criterion, (x, y) = criterion_of(model), sample(model)
    before = [p.detach().clone() for p in model.parameters()]
    mu.ep_gradients(model, x, y, rule(8, 5, criterion, 0.3, thirdphase=thirdphase))
    exact, errors = torch.cat([p.grad.flatten() for p in model.parameters()]), []
    for lr in (1e-3, 1e-4, 1e-5):
        optimizer = torch.optim.SGD(model.parameters(), lr=lr)
        mu.cep_updates(
            model,
            x,
            y,
            rule(8, 5, criterion, thirdphase=thirdphase),
            change=functools.partial(training.gradient_step, optimizer),
        )
        optimizer.step()
        change = torch.cat(
            [(a - p).detach().flatten() / lr for a, p in zip(before, model.parameters())]
        )
        errors.append(((change - exact).norm() / exact.norm()).item())
        with torch.no_grad():
            for a, p in zip(before, model.parameters()):
                p.copy_(a)
    assert 0 < errors[2] < 1e-2 and errors[2] < errors[0] / 5
    if not any(c.routed for c in model.connections):  # a winner that changes is a jump
        assert errors[1] / errors[2] == pytest.approx(10, rel=0.1)  # of first order in the rate


def test_cep_decays_weights_once_a_batch(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0, weight_decay=0.1)
    mu.cep_updates(
        model,
        x,
        y,
        rule(4, 2, criterion),
        change=functools.partial(training.gradient_step, optimizer),
    )
    optimizer.param_groups[0]["lr"] = 0.5
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    same([0.95 * p for p in before], [p.detach() for p in model.parameters()])


@pytest.mark.parametrize(
    "words",
    [
        "",
        pytest.param("--thirdphase", marks=pytest.mark.slow),
        pytest.param("--random-sign --lr-decay", marks=pytest.mark.slow),
        pytest.param("--model VFMLP", marks=pytest.mark.slow),
    ],
)
def test_cep_learns_and_resumes(ok, tmp_path, words):
    line = (
        "--task digits --device -1 --archi 784 64 10 --alg CEP --betas 0 0.2 --T1 20 --T2 6 --lrs 0.005 0.005 "
        f"--seed 0 --save {words}"
    )
    out = ok(line, "--epochs 10")
    accuracies = [
        float(text.split("test ")[1].split(" %")[0])
        for text in out.splitlines()
        if text.startswith("epoch")
    ]
    assert accuracies[-1] > (
        60 if "VF" not in words else 1.5 * accuracies[0]
    )  # VF models learn slower
    run = only_run(tmp_path)
    assert run.parts[-4] == "CEP"
    ok(f"--load-path {run} --device -1")
    assert torch.load(run / "checkpoint.tar", weights_only=True)["epoch"] == 11


@pytest.mark.parametrize(
    "words, what",
    [
        ("--optim adam", "--optim: got adam"),
        ("--mmt 0.9", "--mmt 0.9"),
        ("--betas 0 0", "--betas"),
        ("--betas 0.1 -0.1 --random-sign", "--betas: got 0.1 -0.1"),
        ("--betas 0.5 -0.5 --thirdphase", "--betas"),
    ],
)
def test_what_cep_cannot_do(cli, words, what):
    code, _, err = cli(QUICK, "--alg CEP", words)
    assert code == 2 and what in err and err.count("\n") == 1


def test_flags_are_defined_once():
    names = [flag.name for flag in main_dropout.FLAGS]
    assert len(names) == len(set(names))
    assert set(names) - {flag.name for flag in main.FLAGS} == {"dropouts"}
    assert command_line.resolve({}).learning.dropouts is None


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"loss": "ce"}, "loss is 'ce', expected mse or cel"),
        ({"loss": "MSE"}, "loss is 'MSE', expected mse or cel"),
        ({"loss": torch.nn.MSELoss()}, r"loss is MSELoss\(\), expected mse or cel"),
        ({"alg": "ep"}, "alg is 'ep', expected EP, CEP, BPTT or BP"),
        ({"T1": 0}, "T1 is 0, expected at least 1"),
        ({"T2": 0}, "T2 is 0, expected at least 1"),
        ({"betas": (0.1,)}, r"betas are \(0.1,\), expected two"),
    ],
)
def test_a_rule_refuses_what_no_rule_has(wrong, message):
    with pytest.raises(ValueError, match=message):
        mu.Rule(**wrong)


@pytest.mark.parametrize(
    "alg, betas, thirdphase",
    [
        ("EP", (0.0, 0.0), False),
        ("EP", (0.1, 0.1), False),
        ("EP", (0.1, 0.0), True),
        ("CEP", (0.0, 0.0), False),
    ],
)
def test_a_contrast_needs_two_values_of_beta(alg, betas, thirdphase):
    model = MODELS["MLP"](torch.tanh).double()
    learning = mu.Rule(alg, T1=3, T2=2, betas=betas, thirdphase=thirdphase)
    with pytest.raises(ValueError, match="betas are .*, EP needs two different values"):
        mu.LEARN[alg](model, *sample(model), learning)


@pytest.mark.parametrize("alg", ["EP", "CEP"])
def test_a_softmax_read_out_does_not_learn_by_the_squared_error(alg):
    model = MODELS["MLP softmax"](torch.tanh).double()
    with pytest.raises(ValueError, match="softmax needs loss cel, got mse"):
        mu.LEARN[alg](model, *sample(model), mu.Rule(alg, T1=3, T2=2, betas=(0.0, 0.1)))
