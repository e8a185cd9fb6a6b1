"""The files of an audit in a run folder: one per finished stage, and the result."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_utils import UserError
from experiment.command_line import resolve
from experiment.config import Config
from experiment.devices import computed_on
from experiment.plots import attacks
from experiment.results.tables import same_settings
from experiment.runs import checkpoint
from experiment.runs.files import (
    parse_json,
    printable,
    read_arrays,
    read_text,
    replacing,
    write_text,
)
from experiment.runs.folder import RunFolder, fingerprint
from experiment.validate import validate


class AuditFiles:
    """The files of one audit in a run folder: its stages and its result.

    The result is Audit_<norm>_<eps>.json, .txt, .png and .npz. Each finished stage is
    Audit_<norm>_<eps>_<stage>.npz, from which a stopped audit resumes. Stages of other settings are
    replaced, results of other settings renamed.

    settings     settings that identify the result, for JSON
    source       the audited checkpoint, one line
    computed_on  the machines that computed the stages
    """

    ENDS = (".json", ".png", ".pdf", ".npz", ".txt")  # in the order in which they are renamed

    def __init__(
        self,
        run: RunFolder,
        config: Config,
        settings: dict[str, Any],
        source: str,
        surrogate: tuple[Any, Config] | None = None,
    ) -> None:
        """surrogate: of `open_surrogate`. Raises UserError if another process writes this audit."""
        self.run = run
        self.source = source
        self.settings = settings
        self.computed_on: list[str] = []
        norm = config.attack.norm
        eps = f"{config.audit.eps:g}"
        self.stem = f"Audit_{norm}_{eps}"
        self.title = f"Audit, {norm}-norm, eps {eps}, {config.audit.budget}"
        if surrogate:
            model, own = surrogate
            identity = [fingerprint(model.state_dict()), own.learning.T1, own.model.loss]
            self.settings = {**settings, "surrogate": identity}
        run.lock(self.stem)
        run.finish_move(self.stem, self.ENDS)

    @property
    def text(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}.txt"

    def advice(self) -> str:
        """How to resume after an interruption."""
        return f"finished stages are in {self.run.folder}; the same command resumes after them"

    def _stage(self, name: str) -> pathlib.Path:
        return self.run.folder / f"{self.stem}_{name}.npz"

    def load(self, name: str) -> tuple[dict[str, np.ndarray], Any] | None:
        """(arrays, record) of a stage as passed to `save`; None without one of these settings."""
        try:
            arrays = read_arrays(self._stage(name))
            if not same_settings(parse_json(str(arrays.pop("settings"))), self.settings):
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
        self._write(
            self._stage(name),
            **arrays,
            record=json.dumps(record),
            settings=json.dumps(self.settings),
            computed_on=computed_on(),
        )

    def _note_place(self, place: str) -> None:
        if place and place not in self.computed_on:
            self.computed_on.append(place)

    def _write(self, path: pathlib.Path, **arrays: Any) -> None:
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **arrays)

    def write(
        self,
        result: Mapping[str, Any],
        lines: Sequence[str],
        x_adv: np.ndarray,
        labels: np.ndarray,
    ) -> None:
        """Write the result, its text, and the strongest adversarial examples with their labels.

        The result of another audit with this norm and eps is renamed, with a number at its end."""
        before = self._settings_of_result()
        if before is not None and not same_settings(before, self.settings):
            self.run.move_aside(self.stem, self.ENDS)
        self._write(self.run.folder / f"{self.stem}.npz", x_adv=x_adv, labels=labels)
        self.run.write_lines(self.text.name, lines)
        write_text(self.run.folder / f"{self.stem}.json", json.dumps(result, indent=1) + "\n")

    def plot(self, result: Mapping[str, Any]) -> None:
        """Draw the result."""
        self.run.save_figure(f"{self.stem}.png", attacks.audit, result, self.title)

    def _settings_of_result(self) -> Any:
        """Those of the result in the folder; None without one."""
        try:
            return parse_json(read_text(self.run.folder / f"{self.stem}.json"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def open_surrogate(
    config: Config, build: Callable[[Config], Any], attack_steps: Any = None
) -> tuple[Any, Config]:
    """(model, its config) of --surrogate.

    build: config -> model; attack_steps: --attack-step of the command line, None for the
    surrogate's own default. Raises UserError."""
    assert config.audit.surrogate is not None
    saved = checkpoint.open_saved(config.audit.surrogate, "audit")
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
