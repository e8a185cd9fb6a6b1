"""The forms of records: what every reader of results.jsonl relies on, whoever wrote the file."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from data_utils import SEVERITIES

# A form is a function that accepts a value; the forms of the values under some names; one form of
# all items of a list, or the forms of each of several items
Form = Callable[[Any], bool] | dict[str, Any] | list[Any]


def has_form(value: Any, form: Form) -> bool:
    """Whether a value of a JSON file has a form."""
    if isinstance(form, dict):
        return isinstance(value, dict) and all(
            has_form(value.get(name), own) for name, own in form.items()
        )
    if isinstance(form, list):
        if not isinstance(value, list):
            return False
        forms = form * len(value) if len(form) == 1 else form
        return len(value) == len(forms) and all(map(has_form, value, forms))
    return form(value)


def _number(value: Any) -> bool:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return is_number and abs(value) < 1e300


def _share(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1


def _eps(value: Any) -> bool:
    return _number(value) and 0 <= value <= 1e9


def _count(value: Any) -> bool:
    return isinstance(value, int) and _eps(value)


def _text(value: Any) -> bool:
    return isinstance(value, str) and len(value) < 1000 and value.isprintable()


def _name(value: Any) -> bool:
    return _text(value) and len(value) < 100


def _truth(value: Any) -> bool:
    return isinstance(value, bool)


def _optional(form: Form) -> Form:
    """That form, or None, which a missing value is too."""
    return lambda value: value is None or has_form(value, form)


def _by_name(form: Form) -> Form:
    """A mapping from names to values of that form."""
    return lambda value: (
        isinstance(value, dict)
        and all(_name(name) and has_form(own, form) for name, own in value.items())
    )


_CHECK: Form = {"passed": _truth, "value": _number, "limit": _number, "why": _text}
_ATTACK: Form = {
    "stage": _name,
    "name": _text,
    "broken": _count,
    "standing": _count,
    "masked": _share,
    "seconds": _number,
}
_COSINES = ("rmse", "sign_error", "cosine", "distance", "cosine_median", "cosine_worst")
_VALUES: dict[str, Form] = {
    "evaluate": {
        "accuracy": _share,
        "steps_mean": _optional(_number),
        "steps_max": _optional(_count),
        "unsettled": _optional(_number),
        "convergence_images": _optional(_count),
    },
    "attack": {
        "adversarial": _share,
        "masked": _share,
        "unmoved": _optional(_share),
        "mean_norm": _optional(_number),
    },
    "audit": {
        "clean": _share,
        "robust": _share,
        "interval": [_share, _share],
        "images": _count,
        "trusted": _truth,
        "checks": _by_name(_CHECK),
        "attacks": [_ATTACK],
        "strongest": _text,
        "curve": [[_number, _share]],
        "sample": _count,
        "early": {"t": _count, "robust": _share},
        "seconds": _by_name(_number),
        "model": _text,
        "computed_on": _optional([_text]),
    },
    "corruption": {"accuracy": [_share] * SEVERITIES},
    "characteristic": {
        "accuracy": [_share],
        "converged": [_share],
        "residual": [_optional(_number)],
        "energy": _optional([_optional(_number)]),
        "relaxed_images": _count,
    },
    "gducheck": {
        "rows": [
            {
                "name": _name,
                "estimate": _name,
                **dict.fromkeys(_COSINES, _optional(_number)),
            }
        ],
        "verdict": _text,
        "converged": _count,
    },
}
_BALL: dict[str, Form] = {"norm": _name, "eps": _eps}
_SETTINGS: dict[str, Form] = {
    "evaluate": {"predict_step": _optional(_count)},
    "attack": {"attack": _name, "gradient": _name, **_BALL},
    "audit": _BALL,
    "corruption": {"corruption": _name},
    "characteristic": {"T1": _optional(_count)},
    "gducheck": {},
}
FORMS: dict[str, Form] = {
    kind: {
        "model": {"weights": _optional(_name), "converged": _optional(_share)},
        "data": {"images": _count, "fingerprint": _optional(_name)},
        "settings": _SETTINGS[kind],
        "value": _VALUES[kind],
        "versions": {},
    }
    for kind in _VALUES
}
