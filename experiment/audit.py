"""The files of an audit in a run folder: one for each stage that is done, and the result."""

import json

import numpy as np

from data_utils import UserError
from experiment import arguments, checks, figures_checks
from experiment.devices import computed_on
from experiment.flags import FEED_FORWARD
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
from experiment.runs.folder import fingerprint

# of the arguments, what an audit's numbers depend on
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
    """Audit_<norm>_<eps>.json, .txt, .png and .npz of a run folder, and
    Audit_<norm>_<eps>_<stage>.npz of each stage, which an audit that was stopped goes on from.
    Stages of other settings are replaced, results moved aside.

    settings: all that the numbers depend on, a dict that JSON can say; source: what is audited, in
    words."""

    ENDS = (".json", ".png", ".pdf", ".npz", ".txt")  # in the order in which they move aside

    def __init__(self, run, args, saved, surrogate=None, ends_early=None, data=None):
        """run: the RunFolder; args: of the command line; saved: the SavedRun that is audited;
        surrogate: of `open_surrogate`; ends_early: see
        the `fast_tol` of `ART_Timesteps_Addition.audit.model.AuditedModel`; data: the fingerprint of images and labels.
        Raises UserError where another process writes this audit."""
        self.run, self.args, self.stem = run, args, f"Audit_{args.attack_norm}_{args.eps:g}"
        self.source = saved.source
        self.settings = {
            **{name: getattr(args, name) for name in NAMES},
            "weights": fingerprint(saved.weights),
            "ends_early": ends_early,
            "data": data,
        }
        self.computed_on = []  # the places where stages were computed, in words
        if surrogate:
            self.settings["surrogate"] = [
                fingerprint(surrogate[0].state_dict()),
                surrogate[1].T1,
                surrogate[1].loss,
            ]
        run.lock(self.stem)
        run.finish_move(self.stem, self.ENDS)

    @property
    def text(self):
        return self.run.folder / f"{self.stem}.txt"

    def advice(self):
        """How to go on after an interruption."""
        return f"the stages that are done are in {self.run.folder}, the same command goes on behind them"

    def _title(self):
        return f"Audit, {self.args.attack_norm}-norm, eps {self.args.eps:g}, {self.args.budget}"

    def _stage(self, name):
        return self.run.folder / f"{self.stem}_{name}.npz"

    def load(self, name):
        """(arrays, record) of a stage as `save` got them; None where there is none of these
        settings."""
        try:
            arrays = read_arrays(self._stage(name))
            if not same_settings(parse_json(str(arrays.pop("settings"))), self.settings):
                return None
            self._note_place(printable(arrays.pop("computed_on", "")))
            return arrays, parse_json(str(arrays.pop("record")))
        except (ValueError, KeyError):
            return None

    def save(self, name, arrays, record):
        """Writes a stage; those after it, of another audit maybe, are removed."""
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

    def _note_place(self, place):
        if place and place not in self.computed_on:
            self.computed_on.append(place)

    def _write(self, path, **arrays):
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(file, **arrays)

    def write(self, result, lines, x_adv, labels):
        """The result: a dict; its text: lines; the strongest adversarial images with their labels.
        That of another audit of this bound is kept, with a number behind its name."""
        before = self._settings_of_result()
        if before is not None and not same_settings(before, self.settings):
            self.run.move_aside(self.stem, self.ENDS)
        self._write(self.run.folder / f"{self.stem}.npz", x_adv=x_adv, labels=labels)
        self.run.write_lines(self.text.name, lines)
        write_text(self.run.folder / f"{self.stem}.json", json.dumps(result, indent=1) + "\n")

    def plot(self, result):
        """Draws the result."""
        self.run.save_figure(f"{self.stem}.png", figures_checks.audit, result, self._title())

    def _settings_of_result(self):
        """Those of the result that is there; None where there is none."""
        try:
            return parse_json(read_text(self.run.folder / f"{self.stem}.json"))["settings"]
        except (OSError, ValueError, KeyError, TypeError):
            return None


def open_surrogate(args, build, attack_step=None):
    """(model, its arguments) of --surrogate, with those of the attack from `args`. build: arguments
    -> model; attack_step: of the command line, None for the surrogate's own default. Raises
    UserError."""
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
