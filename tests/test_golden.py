"""The numbers of the original code (golden/README in the hand-over): same inputs, same outputs, to
the order of float32 operations."""

import pytest
import torch.nn.functional as F
from shared import assert_close

import model_utils as mu


def grads(model):
    return {name: p.grad for name, p in model.named_parameters()}


def test_phases_and_phi(case, golden_model):
    x, y, c = case["x"], case["y"], case["case"]
    beta_1, beta_2 = c["betas"]
    free = golden_model(
        x, y, golden_model.init_neurons(6, "cpu"), c["T1"], beta_1, case["case"]["loss"]
    )
    assert_close(free, case["free"], 1e-4)
    assert_close(golden_model.readout(free), case["output"], 1e-4)
    assert_close(
        golden_model(x, y, case["free"], c["T2"], beta_2, case["case"]["loss"]),
        case["nudged"],
        1e-4,
    )
    assert_close(
        golden_model(x, y, case["free"], c["T2"], -beta_2, case["case"]["loss"]),
        case["nudged_minus"],
        1e-4,
    )
    phi = golden_model.Phi(x, y, case["nudged"], beta_2, case["case"]["loss"])
    assert_close(phi if isinstance(phi, list) else [phi], case["phi"], 1e-4)


def test_ep_updates(case, golden_model):
    x, y, (beta_1, beta_2) = case["x"], case["y"], case["case"]["betas"]
    golden_model.compute_syn_grads(
        x, y, case["free"], case["nudged"], (beta_1, beta_2), case["case"]["loss"]
    )
    assert_close(grads(golden_model), case["grad_one_sided"], 1e-2)
    if case["case"]["model"] == "VFMLP":  # the original pairs the states at +beta and -beta there
        states, third = (case["nudged"], case["nudged_minus"]), None
    else:
        states, third = (case["free"], case["nudged"]), case["nudged_minus"]
    golden_model.compute_syn_grads(
        x, y, *states, (beta_2, -beta_2), case["case"]["loss"], neurons_3=third
    )
    assert_close(grads(golden_model), case["grad_thirdphase"], 5e-3)


def test_bptt(case, golden_model):
    c = case["case"]
    neurons = mu.bptt_gradients(
        golden_model, case["x"], case["y"], mu.Rule(T1=c["T1"], T2=c["T2"], loss=c["loss"])
    )
    assert golden_model.loss(
        neurons, case["y"], case["case"]["loss"]
    ).mean().item() == pytest.approx(case["loss_bptt"], rel=1e-4)
    assert_close(grads(golden_model), case["grad_bptt"], 1e-3)


def test_input_gradient(case, golden_model):
    x = case["x"].clone().requires_grad_()
    out = golden_model.readout(
        golden_model(
            x, None, None, case["case"]["T2"], criterion=case["case"]["loss"], check_thm=True
        )
    )
    if case["case"]["loss"] == "mse":
        loss = F.mse_loss(out, F.one_hot(case["y"], out.size(1)).float())
    else:
        loss = F.cross_entropy(out, case["y"])
    loss.backward()
    assert_close(x.grad, case["input_grad"], 1e-3)
