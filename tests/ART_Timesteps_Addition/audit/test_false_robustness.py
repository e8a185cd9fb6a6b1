"""Models that look robust and are not are exposed by an audit: broken down to what their honest
twin withstands, or not trusted, for a reason that names it. Honest models are trusted."""

import argparse
import copy
import dataclasses

import pytest
import torch
from conftest import tiers

import model_utils as mu
from ART_Timesteps_Addition.audit import criteria, stages
from ART_Timesteps_Addition.audit.model import AuditedModel
from ART_Timesteps_Addition.settings import Attack
from data_utils import TASKS, load_split
from energy.dynamics import Chain

IMAGES = 12
TINY = stages.Budget(8, 3, 60, 150, 5, 1, IMAGES)
MODELS = {
    "mysig": "digits",
    "tanh": "digits, tanh",
    "softmax": "digits, softmax",
    "CNN": "digits, VFCNN",
}


@pytest.fixture(scope="module")
def honest(zoo):
    """name -> (model, args, result of its audit), each trained and audited once."""
    known = {}

    def get(name):
        if name not in known:
            state = torch.load(zoo(MODELS[name]) / "model.pt", weights_only=True)
            args = argparse.Namespace(
                **{
                    **state["config"],
                    "attack_step": [12],
                    "predict_step": None,
                    "attack_norm": "2",
                    "eps": 1.0,
                }
            )
            model = mu.make_model(args)
            model.load_state_dict(state["model_state_dict"])
            known[name] = model, args, audited(model, args)
        return known[name]

    return get


class Nowhere(dict):
    """A store that remembers nothing."""

    def load(self, name):
        return None

    def save(self, name, arrays, record):
        pass


def audited(model, args, **changes):
    args = argparse.Namespace(**{**vars(args), **changes})
    images, labels = load_split("digits", "", False, IMAGES)
    audited_model = AuditedModel(
        model,
        args.loss,
        TASKS[args.task],
        args.T1,
        args.attack_step,
        Attack(norm=args.attack_norm, eps=args.eps),
        (images.float() / 255).numpy(),
        labels.numpy(),
        args.mbs,
        args.seed,
    )
    state = stages.Audit(audited_model, TINY, report=lambda line: None).run(Nowhere())
    return criteria.result_of(state, audited_model, {})


def failed(result):
    return {name for name, check in result["checks"].items() if not check["passed"]}


def exposed(result, twin, *names):
    """Whether a fraud is: names are those of checks that name it."""
    broken = result["robust"] <= twin["robust"] + 2.01 / IMAGES
    return broken or bool(failed(result) & set(names))


def scaled(model, hidden=1.0, readout=1.0):
    """A copy with other weights: of all layers, and of the read-out."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for n, synapse in enumerate(model.synapses):
            factor = readout if model.softmax and n == len(model.synapses) - 1 else hidden
            synapse.weight.mul_(factor), synapse.bias.mul_(factor)
    return model


def seeing(model, change):
    """A copy whose input is changed before it drives the first layer."""
    model = copy.deepcopy(model)

    class Changed(Chain):
        def input_drive(self, x):
            return super().input_drive(change(x))

    def chain(self, *args, original=type(model).chain, **more):
        found = original(self, *args, **more)
        return Changed(
            **{field.name: getattr(found, field.name) for field in dataclasses.fields(Chain)}
        )

    model.__class__ = type("Fraud", (type(model),), {"chain": chain})
    return model


@pytest.mark.parametrize("name", tiers(MODELS, "mysig"))
def test_an_honest_model_is_trusted(honest, name):
    result = honest(name)[2]
    assert result["clean"] > 0.6 and not failed(result)
    assert result["robust"] < result["clean"] and result["curve"][-1][1] == 0


@pytest.mark.parametrize(
    "name, factor",
    [
        ("mysig", 20),
        *(
            pytest.param(name, factor, marks=pytest.mark.slow)
            for name, factor in [("mysig", 60), ("tanh", 20), ("tanh", 60), ("softmax", 60)]
        ),
    ],
)
def test_saturated_neurons(honest, name, factor):
    model, args, twin = honest(name)
    result = audited(scaled(model, factor, 10 if factor == 60 else 1), args)
    assert exposed(
        result, twin, "unbounded", "blind_attacks", "loss_rises", "gradients", "settled"
    ), result["checks"]


@pytest.mark.slow
def test_a_saturated_softmax_changes_nothing(honest):
    model, args, twin = honest("softmax")
    result = audited(scaled(model, readout=1000.0), args)
    assert (
        result["clean"] == twin["clean"] and abs(result["robust"] - twin["robust"]) <= 1.01 / IMAGES
    )


@pytest.mark.slow
def test_a_rounded_input(honest):
    model, args, twin = honest("mysig")
    for levels in (2, 8):
        assert exposed(
            audited(seeing(model, lambda x: torch.round(levels * x) / levels), args),
            twin,
            "responds",
        )


def test_noise(honest):
    model, args, _ = honest("mysig")
    assert "deterministic" in failed(
        audited(seeing(model, lambda x: x + 0.7 * torch.randn_like(x)), args)
    )


def test_too_few_time_steps(honest):
    model, args, _ = honest("mysig")
    result = audited(model, args, T1=2, attack_step=[2])
    assert failed(result) & {"settled", "time_steps"}, result["checks"]


def test_an_attack_through_one_step(honest):
    model, args, twin = honest("mysig")
    result = audited(model, args, attack_step=[1])
    assert {"attack_steps", "gradients", "unbounded"} <= failed(result)
