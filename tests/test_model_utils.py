"""The written-out dynamics and updates against automatic differentiation of Phi, in float64, on
shapes the golden cases lack."""

import functools
import subprocess
import sys

import autodiff
import pytest
import torch
from conftest import MODELS, ROOT, criterion_of, grads, rule, sample

import model_utils as mu
from experiment import command_line, training
from experiment.command_line import MAIN_FLAGS

TOLERANCE = dict(rtol=1e-9, atol=1e-12)


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        torch.testing.assert_close(a, b, **TOLERANCE)


@pytest.mark.parametrize("loss", ["mse", "cel"])
def test_steps_are_the_gradient_of_phi(model, loss):
    if model.softmax and loss == "mse":
        pytest.skip("a read-out takes the cross-entropy")
    criterion, (x, y) = mu.make_criterion(loss), sample(model)
    zero = model.init_neurons(len(x), "cpu")
    free = model(x, y, None, 6, 0.0, criterion)
    assert_same(free, autodiff.relax(model, x, y, zero, 6, 0.0, criterion))
    assert_same(model(x, None, zero, 6, 0.0, criterion), free)
    nudged = model(x, y, free, 4, 0.3, criterion)
    assert_same(nudged, autodiff.relax(model, x, y, free, 4, 0.3, criterion))
    assert not any(n.requires_grad for n in nudged)


@pytest.mark.parametrize("loss", ["mse", "cel"])
@pytest.mark.parametrize("thirdphase", [False, True])
def test_ep_update_of_tied_weights_is_the_gradient_of_phi(model, loss, thirdphase):
    if len(model.B_syn) or model.softmax and loss == "mse":
        pytest.skip("the sum of phis is no energy with separate weights")
    criterion, (x, y) = mu.make_criterion(loss), sample(model)
    autodiff.ep_gradients(model, x, y, rule(6, 4, criterion, 0.3, thirdphase=thirdphase))
    expected = grads(model)
    mu.ep_gradients(model, x, y, rule(6, 4, criterion, 0.3, thirdphase=thirdphase))
    for name, grad in grads(model).items():
        torch.testing.assert_close(grad, expected[name], msg=name, **TOLERANCE)


def test_vector_field_update_is_the_local_one(model):
    """Layer n's term: d phi_n / dp with the free state around s_n, between s_n nudged and s_n free;
    or, with the same update, both ends nudged, and the mean of the two gradients of a
    connection."""
    if not len(model.B_syn):
        pytest.skip("tied weights")
    criterion, (x, y), beta = criterion_of(model), sample(model), 0.3
    free = model(x, y, None, 6, 0.0, criterion)
    plus, minus = (model(x, y, free, 4, b, criterion) for b in (beta, -beta))

    def local(states, betas):
        model.zero_grad()
        for (state, b), sign in zip(zip(states, betas), (-1, 1)):
            for n in range(len(free)):
                mixed = [state[n] if k == n else free[k] for k in range(len(free))]
                (
                    sign * model.Phi(x, y, mixed, b, criterion)[n].mean() / (betas[0] - betas[1])
                ).backward()
        return grads(model)

    for states, betas, third in (
        ((free, plus), (0.0, beta), None),
        ((plus, minus), (beta, -beta), minus),
    ):
        expected = local(states, betas)
        model.compute_syn_grads(x, y, free, plus, betas, criterion, neurons_3=third)
        for name, grad in grads(model).items():
            torch.testing.assert_close(grad, expected[name], msg=name, **TOLERANCE)

    model.same_update = True
    model.compute_syn_grads(x, y, free, plus, (0.0, beta), criterion)
    ours = grads(model)
    model.zero_grad()
    for state, b, sign in ((free, 0.0, -1), (plus, beta, 1)):
        (sign * sum(model.Phi(x, y, state, b, criterion)).mean() / -beta).backward()
    for c in model.connections[1:]:
        forward, backward = c.synapse.weight.grad, c.feedback.weight.grad
        transposed = (
            backward.shape != c.feedback.weight.shape
            or c.feedback.weight.shape != c.synapse.weight.shape
        )
        mean = (forward + (backward.t() if transposed else backward)) / 2
        c.synapse.weight.grad = mean
        c.feedback.weight.grad = mean.t() if transposed else mean
    for name, grad in grads(model).items():
        torch.testing.assert_close(ours[name], grad, msg=name, **TOLERANCE)


@pytest.mark.parametrize("T1", [7, 4])
def test_bptt_is_the_second_derivative(model, T1):
    criterion, (x, y) = criterion_of(model), sample(model)
    expected_neurons = autodiff.bptt_gradients(model, x, y, rule(T1, 4, criterion))
    expected = {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }
    neurons = mu.bptt_gradients(model, x, y, rule(T1, 4, criterion))
    torch.testing.assert_close(neurons[-1], expected_neurons[-1], **TOLERANCE)
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name, **TOLERANCE)


def test_no_step_and_no_update_calls_autograd(model, monkeypatch):
    def forbidden(*args, **kwargs):
        raise AssertionError("automatic differentiation was called")

    monkeypatch.setattr(torch.autograd, "grad", forbidden)
    monkeypatch.setattr(torch.autograd, "backward", forbidden)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mu.ep_gradients(
            model, *sample(model), rule(3, 2, criterion_of(model), 0.5, thirdphase=True)
        )
    assert not saved


def test_input_drive_is_computed_once_a_phase(model, monkeypatch):
    calls = []
    first = model.connections[0]
    up = type(first).up
    monkeypatch.setattr(
        type(first), "up", lambda self, pre: calls.append(self is first) or up(self, pre)
    )
    model(sample(model)[0], None, None, 9)
    assert sum(calls) == 1


def test_one_sample_equals_its_row_in_a_batch(model):
    criterion, (x, y) = criterion_of(model), sample(model)
    batch = model(x, y, None, 6, 0.2, criterion)
    alone = model(x[1:2], y[1:2], None, 6, 0.2, criterion)
    assert_same(alone, [n[1:2] for n in batch])
    mu.ep_gradients(model, x[1:2], y[1:2], rule(3, 2, criterion, 0.5))
    mu.bptt_gradients(model, x[1:2], y[1:2], rule(3, 2, criterion))
    assert all(p.grad.isfinite().all() for p in model.parameters())


def test_labels_are_needed_only_to_nudge(model):
    x, _ = sample(model)
    model(x, None, None, 2)
    with pytest.raises(ValueError, match="labels"):
        model(x, None, None, 2, beta=0.5)


def test_forward_leaves_its_arguments_as_they_are(model):
    x, y = sample(model)
    neurons = [torch.rand_like(n) for n in model.init_neurons(len(x), "cpu")]
    copies = [n.clone() for n in neurons]
    model(x, y, neurons, 3, 0.5, criterion_of(model))
    assert_same(neurons, copies)
    assert_same(model(x, y, neurons, 0), copies)


@pytest.mark.parametrize("name", mu.ACTIVATIONS)
def test_activations(name):
    x = torch.linspace(-3, 3, 1001, dtype=torch.float64, requires_grad=True)
    formula = {
        "mysig": lambda x: 1 / (1 + torch.exp(-4 * (x - 0.5))),
        "sigmoid": lambda x: 1 / (1 + torch.exp(-x)),
        "tanh": lambda x: (torch.exp(2 * x) - 1) / (torch.exp(2 * x) + 1),
        "hard_sigmoid": lambda x: (1 + torch.nn.functional.hardtanh(2 * x - 1)) / 2,
        "my_hard_sig": lambda x: (1 + torch.nn.functional.hardtanh(x - 1)) / 2,
        "ctrd_hard_sig": lambda x: torch.nn.functional.hardtanh(2 * x) / 2,
    }[name]
    ours, theirs = mu.ACTIVATIONS[name](x), formula(x)
    torch.testing.assert_close(ours, theirs)
    slopes = [torch.autograd.grad(v.sum(), x)[0] for v in (ours, theirs)]
    torch.testing.assert_close(*slopes)


def test_wrong_constructions_are_refused():
    with pytest.raises(ValueError, match="unknown pooling"):
        mu.make_pools("mx")
    with pytest.raises(
        ValueError, match="layer 2: a 5x5 convolution .* leaves nothing of a 3x3 map"
    ):
        mu.P_CNN(8, [1, 2, 2], [3, 5], [1, 1], [10], mu.make_pools("mi"), [0, 0], torch.tanh)
    with pytest.raises(ValueError, match="layer 1: .*pooling"):
        mu.P_CNN(3, [1, 2], [3], [1], [10], mu.make_pools("m"), [0], torch.tanh)
    with pytest.raises(ValueError, match="one entry per convolution"):
        mu.P_CNN(8, [1, 2, 2], [3], [1, 1], [10], mu.make_pools("mm"), [0, 0], torch.tanh)


def test_backward_weights_take_the_rates_of_their_twins():
    model = mu.VF_CNN(12, [1, 2, 3], [3, 3], [1, 1], [4], mu.make_pools("mi"), [0, 0], torch.tanh)
    args = __import__("argparse").Namespace(
        optim="sgd", lrs=[0.1, 0.2, 0.3], wds=[1e-1, 1e-2, 1e-3], mmt=0.9, lr_decay=True
    )
    optimizer, scheduler = mu.make_optimizer(model, args)
    rates = {
        id(p): (group["lr"], group["weight_decay"])
        for group in optimizer.param_groups
        for p in group["params"]
    }
    for n, c in enumerate(model.connections):
        for p in [*c.synapse.parameters(), *(c.feedback.parameters() if c.feedback else [])]:
            assert rates[id(p)] == (args.lrs[n], args.wds[n])
    assert scheduler.T_max == 100 and scheduler.eta_min == 1e-5


STRIDED = """
import sys
sys.path.insert(0, sys.argv[1])
import torch
import model_utils as mu
torch.set_num_threads(1)
worst = 0.0
for kernel in (1, 2, 3):
    for stride in (1, 2, 3, 4):
        for channels in range(1, 10):
            for size in range(26, 33, 1 if kernel == 1 else 2):
                torch.manual_seed(size)
                model = mu.P_CNN(size, [channels, 3], [kernel], [stride], [4], mu.make_pools("i"), [0], torch.tanh)
                x, y, found = torch.randn(1, channels, size, size), torch.tensor([1]), []
                for m, x in ((model, x), (mu.lowered(model, torch.float64), x.double())):
                    grads = []
                    for learn in (mu.ep_gradients, mu.bptt_gradients):
                        learn(m, x, y, mu.Rule(T1=2, T2=2, betas=(0.0, 0.5)))
                        grads += [p.grad for p in m.parameters()]
                    leaf = x.clone().requires_grad_()
                    grads.append(torch.autograd.grad(m(leaf, T=2, check_thm=True)[-1].sum(), leaf)[0])
                    grads += torch.autograd.grad(m.Phi(x, y, m(x, T=1), 0.5, "mse").sum(), list(m.parameters()))
                    found.append(torch.cat([g.flatten().double() for g in grads]))
                worst = max(worst, ((found[0] - found[1]).norm() / found[1].norm()).item())
print(worst)
"""


@pytest.mark.slow
def test_no_kernel_stride_or_number_of_channels_corrupts_memory():
    """In a process of its own, which torch's own convolution would crash for a 1x1 kernel with a
    stride."""
    done = subprocess.run(
        [sys.executable, "-c", STRIDED, str(ROOT)], capture_output=True, text=True
    )
    assert done.returncode == 0, (done.returncode, done.stderr)
    assert float(done.stdout) < 1e-4


@pytest.mark.parametrize("softmax", [False, True])
def test_states_share_no_memory_with_parameters(softmax):
    models = [
        mu.P_MLP([20, 16, 5], torch.tanh, softmax=softmax),
        mu.P_MLP([20, 5], torch.tanh),
        mu.P_CNN(8, [2, 4], [3], [1], [5], mu.make_pools("m"), [0], torch.tanh, softmax=softmax),
    ]
    for model in models:
        (x, y), owned = sample(model), {p.untyped_storage().data_ptr() for p in model.parameters()}
        for T in (0, 1, 2):
            for neurons in (model(x, y, None, T, 0.0, "cel"), model(x, y, None, T, 0.5, "cel")):
                assert not owned & {s.untyped_storage().data_ptr() for s in neurons}


def test_continual_ep_after_one_free_step_is_that_of_its_own_free_state():
    """Whose linear output was once the bias itself, which the first update then moved."""
    torch.manual_seed(0)
    model = mu.P_MLP([20, 16, 5], torch.tanh).double()
    x, y = sample(model)
    mu.ep_gradients(model, x, y, mu.Rule(T1=1, T2=2, betas=(0.0, 0.3), loss="cel"))
    exact, before = grads(model), [p.detach().clone() for p in model.parameters()]
    change = functools.partial(training.gradient_step, torch.optim.SGD(model.parameters(), lr=1e-7))
    mu.cep_updates(model, x, y, mu.Rule("CEP", 1, 2, (0.0, 0.3), "cel"), change=change)
    for name, old, p in zip(exact, before, model.parameters()):
        torch.testing.assert_close((old - p.detach()) / 1e-7, exact[name], rtol=1e-4, atol=1e-6)


def test_a_random_sign_of_beta_is_drawn_for_each_mini_batch(monkeypatch):
    model, betas = MODELS["MLP"](torch.tanh), []

    def ep(model, x, y, rule, *_, **__):
        betas.append(tuple(rule.betas))
        return model(x, T=1)

    monkeypatch.setitem(mu.LEARN, "EP", ep)
    given = command_line.parse("--betas 0.1 0.5 --random-sign".split(), MAIN_FLAGS)
    trainer = mu.make_trainer(
        model, torch.optim.SGD(model.parameters(), 0.1), command_line.resolve(given)
    )
    torch.manual_seed(0)
    for _ in range(40):
        trainer.gradients(torch.randn(2, 20), torch.tensor([0, 1]))
    assert set(betas) == {(0.1, 0.5), (0.1, -0.5)}
    assert 10 < sum(beta < 0 for _, beta in betas) < 30


def test_names_instead_of_functions_are_refused():
    with pytest.raises(ValueError, match=r"activation: .* ACTIVATIONS\['mysig'\], got 'mysig'"):
        mu.P_MLP([4, 3], "mysig")
    with pytest.raises(ValueError, match=r"pools: use make_pools\('mm'\)"):
        mu.P_CNN(13, [2, 4, 5], [3, 3], [1, 1], [5], "mm", [1, 0], torch.tanh)


def test_the_schedule_of_an_mlp_is_named():
    """By position it would be taken for another argument."""
    assert mu.P_MLP([20, 5], torch.tanh, schedule="async").schedule == "async"
    with pytest.raises(TypeError):
        mu.P_MLP([20, 5], torch.tanh, False, "async")
