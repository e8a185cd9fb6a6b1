"""Inputs of another floating type, and mini-batches without an image."""

import argparse
import functools

import numpy as np
import pytest
import torch
from conftest import MODELS, criterion_of, grads, rule, sample, settle

import model_utils as mu
from ART_Timesteps_Addition.pytorch import PyTorchClassifier
from data_utils import TASKS, Batches
from experiment import inference, training

RULES = {
    "EP": lambda m, x, y, c: mu.ep_gradients(m, x, y, rule(7, 4, c, 0.5)),
    "EP symmetric": lambda m, x, y, c: mu.ep_gradients(
        m, x, y, rule(7, 4, c, 0.5, thirdphase=True)
    ),
    "EP, ending early": lambda m, x, y, c: mu.ep_gradients(m, x, y, rule(7, 4, c, 0.5, tol=1e-2)),
    "BPTT": lambda m, x, y, c: mu.bptt_gradients(m, x, y, rule(7, 4, c)),
    "CEP": lambda m, x, y, c: mu.cep_updates(
        m,
        x,
        y,
        rule(7, 4, c, 0.5),
        change=functools.partial(training.gradient_step, torch.optim.SGD(m.parameters(), lr=0.1)),
    ),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_an_input_of_another_type_is_converted(model, dtype):
    criterion = criterion_of(model)
    x, y = sample(model)
    x = x.to(dtype)
    start, results = [p.detach().clone() for p in model.parameters()], []
    for name, learn in RULES.items():
        for given in (x, x.double()):
            with torch.no_grad():
                torch._foreach_copy_(list(model.parameters()), start)
            neurons = learn(model, given, y, criterion)
            inference.correct(model.chain(), neurons, y)
            weights = {f"weight {i}": p.detach().clone() for i, p in enumerate(model.parameters())}
            results.append(
                {**grads(model), **weights, **{f"neurons {i}": s for i, s in enumerate(neurons)}}
            )
        ours, theirs = results[-2:]
        assert all(
            torch.equal(ours[key], theirs[key]) and ours[key].dtype == torch.float64
            for key in theirs
        ), name
    states = [model(x, y, None, 5, beta, criterion) for beta in (0.0, 0.5)]
    found = []
    for given in (x, x.double()):
        model.compute_syn_grads(given, y, *states, (0.0, 0.5), criterion)
        phi = model.Phi(given, y, states[1], 0.5, criterion)
        gdu = mu.check_gdu(model, given, y, 5, 3, (0.0, 0.5), criterion)
        found.append(
            [
                *grads(model).values(),
                *(phi if isinstance(phi, list) else [phi]),
                *(tensor for part in gdu for tensor in part.values()),
            ]
        )
    assert all(torch.equal(a, b) for a, b in zip(*found))


@pytest.mark.parametrize("name", MODELS)
def test_a_mini_batch_without_an_image(name):
    torch.manual_seed(0)
    model = MODELS[name](torch.tanh)
    criterion = criterion_of(model)
    (x, y), shapes = sample(model, 0), [(0, *c.post_shape) for c in model.connections]
    states = [model(x, y, None, 12, beta, criterion) for beta in (0.0, 0.5)]
    states += [
        model(x, None, model.init_neurons(0, "cpu"), 3, criterion=criterion),
        model(x, None, None, 12, criterion=criterion, output_in=0),
        model(x.clone().requires_grad_(), None, None, 3, criterion=criterion, check_thm=True),
        *(settle(model, x, y, 12, beta, criterion, 1e-3)[0] for beta in (0.0, 0.5)),
    ]
    assert all([tuple(s.shape) for s in state] == shapes for state in states)
    kept = [torch.randn_like(p) for p in model.parameters()]
    for p, grad in zip(model.parameters(), kept):
        p.grad = grad
    calls = [lambda learn=learn: learn(model, x, y, criterion) for learn in RULES.values()]
    calls += [
        lambda: model.compute_syn_grads(x, y, *states[:2], (0.0, 0.5), criterion),
        lambda: mu.check_gdu(model, x, y, 4, 3, (0.0, 0.5), criterion),
    ]
    for call in calls:
        with pytest.raises(ValueError, match="the mini-batch is empty"):
            call()
    assert all(p.grad is grad for p, grad in zip(model.parameters(), kept))


@pytest.mark.parametrize("grad", ["bptt", "smooth", "ep"])
def test_a_classifier_without_an_image(grad):
    model = MODELS["CNN max"](mu.my_hard_sig)
    loss = torch.nn.CrossEntropyLoss()
    classifier = PyTorchClassifier(model, loss, (2, 13, 13), 5, 6, 4, grad=grad, device_type="cpu")
    x, y = np.zeros((0, 2, 13, 13), dtype=np.float32), np.zeros((0, 5), dtype=np.float32)
    assert classifier.predict(x).shape == (0, 5) and classifier.loss_gradient(x, y).shape == x.shape


@pytest.mark.parametrize("attack", ["pgd", "autoattack"])
def test_a_data_set_without_an_image(attack):
    model, task = mu.P_MLP([784, 12, 10], mu.my_sigmoid), TASKS["digits"]
    images, labels = torch.zeros(0, 1, 28, 28, dtype=torch.uint8), torch.zeros(0, dtype=torch.long)
    data = Batches(images, labels, 4, task, "cpu")
    assert np.isnan(mu.evaluate(model, data, mu.Rule(T1=5))) and inference.predict(
        model, data, mu.Rule(T1=5)
    ).classes.shape == (0,)
    args = argparse.Namespace(
        task="digits",
        attack=attack,
        attack_norm="2",
        attack_iters=2,
        attack_step=5,
        attack_start="zero",
        T1=8,
        predict_step=None,
        loss="mse",
        no_clip=False,
        tol=0.0,
        mbs=2,
        seed=0,
        attack_grad=["bptt", "ep"],
    )
    for eps in (0.0, 1.0):
        results = mu.attack(model, images, labels, args, eps)
        assert [*results] == ["bptt", "ep", "worst"]
        for result in results.values():
            assert result["x_adv"].shape == (0, 1, 28, 28)
            assert result["correct"].shape == result["prediction"].shape == (0,)
