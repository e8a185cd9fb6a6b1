"""A measurement of a run, with all that identifies it."""

from __future__ import annotations

import base64
import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from experiment.devices import computed_on
from experiment.results.forms import FORMS, has_form
from experiment.runs.files import parse_json, printable
from experiment.runs.folder import versions

PARTS = ("model", "data", "settings", "value", "versions")
ATTACK_LIBRARIES = ("adversarial-robustness-toolbox", "torchattacks")


@dataclasses.dataclass(frozen=True)
class Record:
    """One measurement.

    kind      one of FORMS
    model     weights (fingerprint), file, epoch, chosen_on, converged (share of images, or None)
    data      task, split, images (number), fingerprint, clean (accuracy without perturbation)
    settings  everything else that the value depends on, {name: value}. None, in tables of earlier
              versions, is a setting that they did not record
    value     what was measured
    when, computed_on, versions   time, machine and libraries; they do not identify it
    """

    kind: str
    model: Mapping[str, Any]
    data: Mapping[str, Any]
    settings: Mapping[str, Any]
    value: Mapping[str, Any]
    when: str = ""
    computed_on: str = ""
    versions: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @classmethod
    def now(
        cls,
        kind: str,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        settings: Mapping[str, Any],
        value: Mapping[str, Any],
    ) -> Record:
        """A record of a measurement that has just been made."""
        when = datetime.datetime.now().isoformat(" ", "seconds")
        return cls(kind, model, data, settings, value, when, computed_on(), _versions())

    @classmethod
    def from_json(cls, line: str) -> Record:
        """The record in a line of results.jsonl. Raises ValueError."""
        content = parse_json(line)
        if not isinstance(content, dict):
            raise ValueError("it is no record")
        record = cls(
            str(content.get("kind")),
            **{name: content.get(name, {}) for name in PARTS},
            when=printable(content.get("when", "")),
            computed_on=printable(content.get("computed_on", "")),
        )
        if not record.is_valid:
            raise ValueError("it is no record of this version")
        return record

    @property
    def is_valid(self) -> bool:
        """Whether the values that every reader relies on are there and in range."""
        form = FORMS.get(self.kind)
        parts = {name: getattr(self, name) for name in PARTS}
        return form is not None and has_form(parts, form)

    def to_json(self) -> str:
        """One line, without its end."""
        return json.dumps(_plain(dataclasses.asdict(self)), allow_nan=False)

    @property
    def outcomes(self) -> np.ndarray | None:
        """Whether each image is classified correctly, (n,) bool; None if that is not recorded."""
        return unpack(self.value.get("outcomes"), self.data["images"])

    @functools.cached_property
    def identity(self) -> str:
        """Everything that identifies the measurement, as text: equal for equal measurements."""
        return json.dumps(self._identifying, sort_keys=True)

    @functools.cached_property
    def _identifying(self) -> dict[str, Any]:
        """What identifies the measurement, {name: value}, as JSON has it."""
        data = {name: self.data.get(name) for name in ("task", "split", "images", "fingerprint")}
        parts = {
            "kind": self.kind,
            "weights": self.model.get("weights"),
            **{f"data {name}": value for name, value in data.items()},
            **{f"settings {name}": value for name, value in self.settings.items()},
        }
        return json.loads(json.dumps(parts))

    def answers(self, wanted: Record) -> bool:
        """Whether this is the measurement `wanted`. A value that this record, of an earlier
        version, contains as None matches any."""
        own = self._identifying
        others = wanted._identifying
        return own.keys() == others.keys() and all(
            value is None or value == others[name] for name, value in own.items()
        )


def _plain(value: Any) -> Any:
    """The value as JSON has it: None instead of nan and infinities."""
    if isinstance(value, dict):
        return {str(name): _plain(own) for name, own in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(own) for own in value]
    if isinstance(value, np.generic):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


# ---- outcomes of single images


def pack(outcomes: np.ndarray) -> str:
    """Booleans, (n,), as text: their bits in base64, the first image in the highest bit."""
    return base64.b64encode(np.packbits(np.asarray(outcomes, dtype=bool)).tobytes()).decode()


def unpack(text: Any, n: int) -> np.ndarray | None:
    """The booleans of `pack`, (n,); None for anything else."""
    try:
        bits = np.frombuffer(base64.b64decode(text, validate=True), dtype=np.uint8)
    except (TypeError, ValueError):
        return None
    return np.unpackbits(bits, count=n).astype(bool) if len(bits) == -(-n // 8) else None


@functools.cache
def attack_libraries() -> dict[str, str]:
    """{name: version} of the libraries whose attacks a result depends on."""
    return {name: importlib.metadata.version(name) for name in ATTACK_LIBRARIES}


@functools.cache
def _versions() -> dict[str, str]:
    return {**versions(), **attack_libraries()}
