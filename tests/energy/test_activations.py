import pytest
import torch

import model_utils as mu
from energy.activations import ACTIVATIONS, CURVES, register
from energy.rule import Rule
from experiment.diagnostics import Diagnostics


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_curves_describe_their_activation(name):
    activation = ACTIVATIONS[name]
    curve = CURVES[activation]
    drives = torch.linspace(-60, 60, 120_001, dtype=torch.float64, requires_grad=True)
    values = activation(drives)
    (slopes,) = torch.autograd.grad(values.sum(), drives)
    at_centre = (drives - curve.centre).abs().argmin()
    assert (values.min().item(), values.max().item()) == pytest.approx((curve.low, curve.high))
    assert values[at_centre].item() == pytest.approx((curve.low + curve.high) / 2)
    assert slopes[at_centre].item() == pytest.approx(curve.slope)
    assert slopes.max().item() == pytest.approx(curve.slope)


def test_corners_are_those_of_the_tangent():
    corners = {name: CURVES[activation].corners for name, activation in ACTIVATIONS.items()}
    assert corners == {
        "mysig": (0.0, 1.0),
        "sigmoid": (-2.0, 2.0),
        "tanh": (-1.0, 1.0),
        "hard_sigmoid": (0.0, 1.0),
        "my_hard_sig": (0.0, 2.0),
        "ctrd_hard_sig": (-0.5, 0.5),
    }


@pytest.mark.parametrize("low, high, slope", [(0, 0, 1), (1, 0, 1), (0, 1, 0), (0, 1, -1)])
def test_an_impossible_curve_is_refused(low, high, slope):
    with pytest.raises(ValueError, match="activation nothing: expected low < high and slope > 0"):
        register("nothing", torch.relu, low=low, high=high, centre=0, slope=slope)
    assert "nothing" not in ACTIVATIONS


def test_a_layer_is_not_saturated_if_its_activation_is_not_registered():
    model = mu.P_MLP([20, 8, 5], torch.relu)
    rule = Rule(T1=4, T2=2, betas=(0.0, 0.1))
    diagnostics = Diagnostics(
        model, rule, torch.optim.SGD(model.parameters(), lr=0.1), None, "fp32"
    )
    kinds = [kind for kind, _ in diagnostics.warnings(model.init_neurons(2, "cpu"), None)]
    assert "saturated" not in kinds
