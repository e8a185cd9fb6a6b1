"""The typed configuration: what it is made from, and what files contain of it."""

import argparse
import dataclasses

import numpy as np
import pytest

from experiment.config import BY_DEST, FLAGS, SECTIONS, Config, training_identity


def test_a_config_and_its_flat_values_are_the_same():
    config = Config().replace(model="CNN", channels=[4, 8], betas=[0.0, 0.5], train_data="ab12")
    assert config.model.channels == (4, 8)
    assert config.flat()["channels"] == [4, 8]
    assert Config.from_flat(config.flat()) == config


def test_every_field_has_a_flag_of_its_own():
    fields = [f for section in SECTIONS.values() for f in dataclasses.fields(section)]
    assert len(fields) == len(FLAGS) == len(BY_DEST)


def test_a_config_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        Config().learning.T1 = 3


class Arguments:
    """Attributes of a class, and one that is computed."""

    model = "MLP"
    archi = (784, 16, 10)
    schedule = "async"

    @property
    def scale(self):
        return 0.5


@pytest.mark.parametrize(
    "args",
    [
        Arguments(),
        argparse.Namespace(model="MLP", archi=[784, 16, 10], schedule="async", scale=0.5, more=1),
        {"model": "MLP", "archi": np.array([784, 16, 10]), "schedule": "async", "scale": 0.5},
    ],
)
def test_a_config_is_read_from_whatever_has_the_values(args):
    config = Config.of(args)
    assert config.model.archi == (784, 16, 10)
    assert config.learning.schedule == "async"
    assert config.model.scale == 0.5
    assert config.learning.T1 == 20


def test_repetitions_of_a_training_have_one_identity():
    config = Config()
    repeated = config.replace(seed=3, deterministic=True, data_dir="elsewhere", device=-1)
    assert training_identity(config.flat()) == training_identity(repeated.flat())
    assert training_identity(config.flat()) != training_identity(config.replace(T1=21).flat())
