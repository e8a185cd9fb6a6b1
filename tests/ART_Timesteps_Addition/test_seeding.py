"""Attacks that draw random numbers: the same ones for the same seed and images, whatever came
before and whoever computes them."""

import argparse
import random

import numpy as np
import pytest
import torch
from conftest import tiers
from shared import OneOfTwo, Stopped

import model_utils as mu
from ART_Timesteps_Addition import names
from ART_Timesteps_Addition.seeding import seeded
from data_utils import load_split
from experiment.workers import Workers

RANDOM = set(names.ATTACKS) - {"pgd", "fgsm", "fab", "deepfool", "cw"}


@pytest.fixture(scope="module")
def attacked():
    """(model, images, the labels it predicts)."""
    torch.manual_seed(0)
    model = mu.P_CNN(
        28, [1, 4, 6], [5, 5], [2, 2], [10], mu.make_pools("ii"), [0, 0], torch.tanh, softmax=True
    )
    images = load_split("digits", "", False, 4)[0]
    neurons = model(images.float() / 255, None, None, 8, criterion=mu.make_criterion("cel"))
    return model, images, model.readout(neurons).argmax(1)


def sweep(attacked, name, *eps, seed=3, workers=Workers(), grads=("bptt", "ep")):
    """{eps: results} of a sweep from wherever all random generators are."""
    if name in names.WITHOUT_GRADIENT:
        grads = grads[:1]
    args = argparse.Namespace(
        task="digits",
        attack=name,
        attack_norm="2",
        attack_iters=1,
        attack_step=5,
        attack_start="zero",
        T1=8,
        predict_step=None,
        loss="cel",
        no_clip=False,
        tol=0.0,
        mbs=2,
        seed=seed,
        attack_grad=list(grads),
    )
    return {e: mu.attack(*attacked, args, e, "", workers) for e in eps}


def images_of(results):
    return np.stack([result["x_adv"] for result in results.values()])


def disturb():
    random.seed(), np.random.seed(), torch.seed()


@pytest.mark.parametrize(
    "name", tiers(names.ATTACKS, *set(names.ATTACKS) - {"cw", "art-autoattack", "hopskipjump"})
)
def test_an_attack_is_the_same_again(attacked, name):
    disturb()
    both = sweep(attacked, name, 1.0, 2.0)
    disturb()
    again = sweep(attacked, name, 2.0)
    assert np.array_equal(images_of(both[2.0]), images_of(again[2.0]))
    if name in RANDOM:
        assert not np.array_equal(
            images_of(again[2.0]), images_of(sweep(attacked, name, 2.0, seed=4)[2.0])
        )
    disturb()
    with pytest.raises(Stopped) as second:
        sweep(attacked, name, 2.0, workers=OneOfTwo(1), grads=["bptt"])
    disturb()
    first = sweep(attacked, name, 2.0, workers=OneOfTwo(0, second.value.args[0]), grads=["bptt"])
    label = name if name in names.WITHOUT_GRADIENT else "bptt"
    assert np.array_equal(first[2.0][label]["x_adv"], both[2.0][label]["x_adv"])


@pytest.mark.parametrize("name", ["pgd", "square", "autoattack"])
def test_an_attack_leaves_the_callers_random_numbers_alone(attacked, name):
    def drawn():
        return random.random(), np.random.rand(), torch.rand(()).item()

    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    expected = drawn()
    random.setstate(states[0]), np.random.set_state(states[1]), torch.set_rng_state(states[2])
    originals = np.random.RandomState, np.random.default_rng
    sweep(attacked, name, 1.0)
    assert drawn() == expected and (np.random.RandomState, np.random.default_rng) == originals


def test_mini_batches_draw_different_numbers(attacked):
    def drawn(*numbers):
        with seeded(*numbers):
            return (
                random.random(),
                np.random.rand(),
                torch.rand(()).item(),
                np.random.RandomState().rand(),
                np.random.RandomState().rand(),
                np.random.default_rng().random(),
                np.random.RandomState(0).rand(),
                np.random.default_rng(0).random(),
            )

    found = [drawn(*numbers) for numbers in ((0, 0), (0, 20), (1, 0), (2**70, 0))]
    assert all(len(set(values)) == len(values) for values in list(zip(*found))[:6]) and found[
        0
    ] == drawn(0, 0)
    assert found[0][3] != found[0][4]
    given = (
        np.random.RandomState(0).rand(),
        np.random.default_rng(0).random(),
    )  # a seed, and so not the block's
    assert all(values[6:] == given for values in found)
    with pytest.raises(Stopped):
        with seeded(0):
            raise Stopped
    assert np.random.RandomState().rand() != np.random.RandomState().rand()
