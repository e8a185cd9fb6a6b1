"""Records that somebody else wrote: what readers rely on is there, or the line is left out."""

import copy
import json
import math

import pytest

from data_utils import SEVERITIES
from experiment.results.forms import FORMS
from experiment.results.record import Record

ROW = {"name": "synapses.0.weight", "estimate": "one-sided", "rmse": 0.1, "sign_error": 0.0}
CHECK = {"passed": True, "value": 1, "limit": 2.5, "why": "because"}
ATTACK = {"stage": "b", "name": "pgd", "broken": 1, "standing": 3, "masked": 0.0, "seconds": 0.1}
VALUES = {
    "evaluate": {"accuracy": 0.5},
    "attack": {"adversarial": 0.25, "masked": 0.0},
    "audit": {
        "clean": 0.5,
        "robust": 0.25,
        "interval": [0.1, 0.4],
        "images": 4,
        "trusted": False,
        "checks": {"settled": CHECK},
        "attacks": [ATTACK],
        "strongest": "pgd bptt@2 from zero",
        "curve": [[0.0, 1.0], [0.5, 0.5]],
        "sample": 4,
        "early": {"t": 3, "robust": 0.25},
        "seconds": {"a": 1.5},
        "model": "model.pt",
    },
    "corruption": {"accuracy": [0.5] * SEVERITIES},
    "characteristic": {
        "accuracy": [0.1, 0.5],
        "converged": [0.0, 1.0],
        "residual": [1.0, None],
        "relaxed_images": 20,
    },
    "gducheck": {"rows": [ROW], "verdict": "EP agrees with BPTT", "converged": 3},
}
SETTINGS = {
    "attack": {"norm": "2", "eps": 0.5, "attack": "pgd", "gradient": "bptt"},
    "audit": {"norm": "2", "eps": 0.5},
    "corruption": {"corruption": "fog"},
}


def line(kind):
    """A line of results.jsonl, as a dict."""
    record = Record(kind, {"weights": "0"}, {"images": 4}, SETTINGS.get(kind, {}), VALUES[kind])
    return json.loads(record.to_json())


def leaves(value, place=()):
    """The places of all values that are neither a mapping nor a list."""
    if isinstance(value, dict):
        for name, own in value.items():
            yield from leaves(own, (*place, name))
    elif isinstance(value, list):
        for n, own in enumerate(value):
            yield from leaves(own, (*place, n))
    else:
        yield place


WRONG = ("\x1b[2J", "x" * 2000, 10**400, math.nan, [], {}, [[]], {"a": None})


def fits(value):
    """Whether a line is a record; any other exception than ValueError is a failure."""
    try:
        return Record.from_json(json.dumps(value)) is not None
    except ValueError:
        return False


@pytest.mark.parametrize("kind", FORMS)
def test_a_value_of_another_form_is_no_record(kind):
    good = line(kind)
    assert fits(good) and Record.from_json(json.dumps(good)).to_json() == json.dumps(good)
    places = [place for part in ("settings", "value") for place in leaves(good[part], (part,))]
    assert places
    for *others, last in places:
        for wrong in WRONG:
            damaged = copy.deepcopy(good)
            part = damaged
            for name in others:
                part = part[name]
            part[last] = wrong
            assert not fits(damaged), (others, last, wrong)


@pytest.mark.parametrize("kind", FORMS)
def test_parts_that_are_missing_or_none(kind):
    good = line(kind)
    for part in ("model", "data", "settings", "value", "versions"):
        for wrong in (None, [], "text", 3):
            assert not fits({**good, part: wrong})
    assert not fits({**good, "data": {}}) and not fits({**good, "value": {}})
    for images in ("4", 4.5, True, -1, None):
        assert not fits({**good, "data": {"images": images}})
    assert not fits({**good, "model": {"converged": "all"}})
    assert fits({**good, "model": {"converged": 0.5}, "more": 1})
    assert not fits({**good, "kind": "other"}) and not fits({**good, "kind": [kind]})


def test_a_number_of_severities_is_exact():
    good = line("corruption")
    assert not fits({**good, "value": {"accuracy": [0.5] * (SEVERITIES - 1)}})


@pytest.mark.parametrize(
    "kind, name, wrong",
    [
        ("evaluate", "accuracy", -0.1),
        ("evaluate", "accuracy", 1.1),
        ("evaluate", "accuracy", True),
        ("evaluate", "accuracy", "0.5"),
        ("evaluate", "steps_max", 2.5),
        ("attack", "masked", -1),
        ("audit", "trusted", 1),
        ("audit", "sample", True),
        ("audit", "interval", [0.1]),
        ("audit", "curve", [[0.1]]),
        ("audit", "checks", {"\n": CHECK}),
        ("gducheck", "rows", {}),
    ],
)
def test_values_out_of_range(kind, name, wrong):
    good = line(kind)
    assert not fits({**good, "value": {**good["value"], name: wrong}})
