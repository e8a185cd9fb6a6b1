"""The files of an audit in a run folder: one per finished stage, and the result."""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from data_utils import UserError
from experiment import arguments, checks
from experiment.devices import computed_on
from experiment.flags import FEED_FORWARD
from experiment.plots import attacks
from experiment.report import same_settings
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

# The arguments that an audit's numbers depend on.
NAMES = (
    "task",
    "attack_norm",
    "eps",
    "attack_step",
    "predict_step",
    "T1",
    "no_clip",
    "seed",
    "mbs",
    "tol",
    "precision",
    "compile",
    "surrogate",
    "budget",
    "test_size",
)


class AuditFiles:
    """The files of one audit in a run folder: its stages and its result.

    The result is Audit_<norm>_<eps>.json, .txt, .png and .npz. Each finished stage is
    Audit_<norm>_<eps>_<stage>.npz, from which a stopped audit resumes. Stages of other settings are
    replaced, results of other settings renamed.

    settings     all that the numbers depend on, for JSON
    source       the audited checkpoint, one line
    computed_on  the machines that computed the stages
    """

    ENDS = (".json", ".png", ".pdf", ".npz", ".txt")  # in the order in which they are renamed

    def __init__(
        self,
        run: RunFolder,
        args: Any,
        saved: Any,
        surrogate: tuple[Any, Any] | None = None,
        ends_early: float | None = None,
        data: Any = None,
    ):
        """args: of the command line; saved: the SavedRun that is audited; surrogate: of
        `open_surrogate`; ends_early: tolerance of the predictions within attacks; data: fingerprint
        of images and labels. Raises UserError if another process writes this audit."""
        self.run = run
        self.args = args
        self.stem = f"Audit_{args.attack_norm}_{args.eps:g}"
        self.source = saved.source
        self.computed_on: list[str] = []
        self.settings = {
            **{name: getattr(args, name) for name in NAMES},
            "weights": fingerprint(saved.weights),
            "ends_early": ends_early,
            "data": data,
        }
        if surrogate:
            model, own = surrogate
            self.settings["surrogate"] = [fingerprint(model.state_dict()), own.T1, own.loss]
        run.lock(self.stem)
        run.finish_move(self.stem, self.ENDS)

    @property
    def text(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}.txt"

    def advice(self) -> str:
        """How to resume after an interruption."""
        return f"finished stages are in {self.run.folder}; the same command resumes after them"

    def _title(self) -> str:
        return f"Audit, {self.args.attack_norm}-norm, eps {self.args.eps:g}, {self.args.budget}"

    def _stage(self, name: str) -> pathlib.Path:
        return self.run.folder / f"{self.stem}_{name}.npz"

    def load(self, name: str) -> tuple[dict[str, np.ndarray], Any] | None:
        """(arrays, record) of a stage as given to `save`; None if none has these settings."""
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
        self.run.save_figure(f"{self.stem}.png", attacks.audit, result, self._title())

    def _settings_of_result(self) -> Any:
        """Those of the result in the folder; None without one."""
        try:
            return parse_json(read_text(self.run.folder / f"{self.stem}.json"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def open_surrogate(
    args: Any, build: Callable[[Any], Any], attack_step: Any = None
) -> tuple[Any, Any]:
    """(model, its arguments) of --surrogate, with norm, eps and clipping from `args`.

    build: arguments -> model; attack_step: of the command line, None for the surrogate's own
    default. Raises UserError."""
    saved = checkpoint.open_saved(args.surrogate, "audit")
    given = {"todo": "audit", "mbs": args.mbs, "tol": args.tol}
    if attack_step and args.model not in FEED_FORWARD:
        given["attack_step"] = attack_step
    own = arguments.resolve(given, saved.args)
    own.attack_norm, own.eps, own.no_clip = args.attack_norm, args.eps, args.no_clip
    if own.task != args.task:
        raise UserError(
            f"argument --surrogate: its task is {own.task}, that of the audited run {args.task}"
        )
    try:
        checks.check(own)
    except UserError as e:
        raise UserError(f"argument --surrogate: {e}") from None
    model = build(own)
    checkpoint.load_weights(model, saved)
    return model, own
