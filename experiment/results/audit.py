"""Results of `--todo audit`: its record, a file per finished stage, and the files of the result."""

import json
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_utils import UserError
from experiment.command_line import resolve
from experiment.config import Config
from experiment.devices import computed_on
from experiment.plots import attacks
from experiment.results.record import Record, pack
from experiment.results.store import FILE, Store
from experiment.runs import checkpoint
from experiment.runs.files import (
    parse_json,
    printable,
    read_arrays,
    replacing,
    write_text,
)
from experiment.runs.folder import RunFolder, fingerprint
from experiment.text import format_eps
from experiment.validate import validate


class AuditFiles:
    """The record and the files of one audit in a run folder.

    Audit_<norm>_<eps>.json, .txt, .png and .npz are those of the latest command with this norm and
    eps. Each finished stage is Audit_<norm>_<eps>_<stage>.npz, from which a stopped audit resumes;
    stages of other settings are replaced.

    wanted       the record without its value
    source       the audited checkpoint, one line
    eps          as text
    computed_on  the machines that computed the stages
    """

    def __init__(self, run: RunFolder, store: Store, wanted: Record, source: str) -> None:
        """Raises UserError if another process computes an audit with this norm and eps."""
        self.run = run
        self.store = store
        self.wanted = wanted
        self.source = printable(source)
        self.computed_on: list[str] = []
        own = wanted.settings
        self.eps = format_eps(own["eps"])
        self.stem = f"Audit_{own['norm']}_{own['eps']:g}"
        self.budget = own["budget"]
        if self.result() is None:
            run.lock(self.stem)

    @property
    def text(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}.txt"

    def advice(self) -> str:
        """How to resume after an interruption."""
        return f"finished stages are in {self.run.folder}; the same command resumes after them"

    # ---- stages

    def _stage(self, name: str) -> pathlib.Path:
        return self.run.folder / f"{self.stem}_{name}.npz"

    def load(self, name: str) -> tuple[dict[str, np.ndarray], Any] | None:
        """(arrays, record) of a stage as passed to `save`; None without one of these settings."""
        try:
            arrays = read_arrays(self._stage(name))
            if str(arrays.pop("identity")) != self.wanted.identity:
                return None
            self._note_place(printable(arrays.pop("computed_on", "")))
            return arrays, parse_json(str(arrays.pop("record")))
        except (ValueError, KeyError):
            return None

    def save(self, name: str, arrays: Mapping[str, np.ndarray], record: Mapping[str, Any]) -> None:
        """Write a stage and remove those after it, which may be another audit's."""
        for path in self.run.folder.glob(f"{self.stem}_[a-z].npz"):
            if path.name > self._stage(name).name:
                path.unlink(missing_ok=True)
        self._note_place(computed_on())
        place = computed_on()
        self._write(self._stage(name), **arrays, record=json.dumps(record), computed_on=place)

    def _note_place(self, place: str) -> None:
        if place and place not in self.computed_on:
            self.computed_on.append(place)

    def _write(self, path: pathlib.Path, **arrays: Any) -> None:
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **arrays, identity=self.wanted.identity)

    # ---- the result

    def result(self) -> dict[str, Any] | None:
        """The result in the record, for JSON; None if this has not been measured."""
        self.store.refresh()
        record = self.store.find(self.wanted)
        return None if record is None else self._with_settings(record.value, record.settings)

    def _with_settings(
        self, value: Mapping[str, Any], settings: Mapping[str, Any]
    ) -> dict[str, Any]:
        own = {name: part for name, part in value.items() if name != "outcomes"}
        described = {
            **settings,
            "attack_norm": settings["norm"],
            "weights": self.wanted.model["weights"],
            "data": self.wanted.data["fingerprint"],
        }
        return {**own, "settings": described}

    def add(
        self,
        value: Mapping[str, Any],
        robust: np.ndarray,
        x_adv: np.ndarray,
        labels: np.ndarray,
    ) -> dict[str, Any]:
        """Write the strongest adversarial examples with their labels, add the record, and return
        the result, for JSON. robust: (n,) bool."""
        wanted = self.wanted
        value = {**value, "computed_on": self.computed_on, "outcomes": pack(robust)}
        if self._examples.exists() and self._examples_of() != wanted.identity:
            _note(
                f"{self._examples.name} contained the adversarial examples of another audit, which "
                f"are replaced; its result is kept in {FILE}"
            )
        self._write(self._examples, x_adv=x_adv, labels=labels)
        self.store.add(Record.now("audit", wanted.model, wanted.data, wanted.settings, value))
        return self._with_settings(value, wanted.settings)

    @property
    def _examples(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}.npz"

    def _examples_of(self) -> str | None:
        """The identity of the audit whose adversarial examples are saved; None if unknown."""
        try:
            return str(read_arrays(self._examples, ["identity"])["identity"])
        except (ValueError, KeyError):
            return None

    def write(self, result: Mapping[str, Any], lines: Sequence[str]) -> None:
        """Write the result and its text."""
        if self._examples_of() not in (None, self.wanted.identity):
            _note(f"{self._examples.name} contains the adversarial examples of another audit")
        with self.store.locked():
            self.run.write_lines(self.text.name, lines)
            write_text(self.text.with_suffix(".json"), json.dumps(result, indent=1) + "\n")

    def plot(self, result: Mapping[str, Any]) -> None:
        """Draw the result."""
        self.run.save_figure(
            f"{self.stem}.png", attacks.audit, result, self.budget, table=self.store.locked
        )


def _note(text: str) -> None:
    print(f"note: {text}", file=sys.stderr, flush=True)


def open_surrogate(
    config: Config, build: Callable[[Config], Any], attack_steps: Any = None
) -> tuple[Any, Config]:
    """(model, its config) of --surrogate.

    build: config -> model; attack_steps: --attack-step of the command line, None for the
    surrogate's own default. Raises UserError."""
    assert config.audit.surrogate is not None
    try:
        saved = checkpoint.open_saved(config.audit.surrogate, "audit")
    except UserError as e:
        reason = str(e).removeprefix("argument --load-path: ")
        raise UserError(f"argument --surrogate: {reason}") from None
    given = {"todo": "audit", "mbs": config.data.mbs, "tol": config.learning.tol}
    if attack_steps and config.model.has_dynamics:
        given["attack_step"] = attack_steps
    own = resolve(given, saved.args)
    if own.data.task != config.data.task:
        raise UserError(
            f"argument --surrogate: its task is {own.data.task}, that of the audited run "
            f"{config.data.task}"
        )
    try:
        validate(own)
    except UserError as e:
        raise UserError(f"argument --surrogate: {e}") from None
    model = build(own)
    checkpoint.load_weights(model, saved)
    return model, own


def surrogate_identity(model: Any, config: Config) -> list[Any]:
    """What identifies a surrogate and its predictions. model, config: of `open_surrogate`."""
    return [fingerprint(model.state_dict()), config.learning.T1, config.model.loss]
