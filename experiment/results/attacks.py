"""Results of `--todo attack`: Adversarial_Accuracy in .csv and .txt, figures, messages."""

import itertools
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data_utils import TASKS
from experiment.config import Config
from experiment.inference import Convergence
from experiment.plots import attacks as plots
from experiment.plots.style import norm_name
from experiment.results import settings
from experiment.results.record import Record, pack
from experiment.results.store import Store
from experiment.results.tables import measured_with, read_eps
from experiment.runs.files import read_arrays, replacing
from experiment.runs.folder import RunFolder
from experiment.text import count, format_eps, format_value, listed
from metrics import MASKED


def default_eps(norm: str) -> list[float]:
    """The eps of an attack without --eps-list: a geometric grid, and the most common value."""
    if norm == "2":
        return [*(round(float(eps), 4) for eps in np.geomspace(0.05, 3, 10)), 1.0]
    return [*(float(f"{eps:.4g}") for eps in np.geomspace(1e-4, 0.1, 10)), 8 / 255]


def describe_sweep(config: Config, images: int, convergence: Convergence | None) -> str:
    """Attack, images, steps and precision of a sweep, for the log. convergence: of its predictions,
    None for models without time steps."""
    attack = config.attack
    half_precision = config.session.precision != "fp32"
    precision = f" in {config.session.precision}" if half_precision else ""
    text = f"{attack.name}, {norm_name(attack.norm)} norm, {count(images, 'image')}"
    if not config.model.has_dynamics:
        return text + precision
    text += f", predictions after {count(config.predict_steps, 'step')}"
    if convergence is not None:
        text += f" ({convergence})"
    text += precision
    if attack.uses_gradient:
        text += f", gradients unrolled through {listed([*map(str, config.attack_steps)])} steps"
        text += " in fp32" if half_precision else ""
    return text


def describe_result(
    config: Config, eps: float, label: str, value: Mapping[str, Any], recorded: bool = False
) -> str:
    """A measurement, for the log. label: of the gradient method; value: of the record; recorded:
    whether an earlier command measured it."""
    gradient = "" if label == config.attack.name else f"{label}: "
    text = (
        f"eps {format_eps(eps)}, {gradient}adversarial accuracy {100 * value['adversarial']:.2f} %"
        f", mean norm {_norm(value, '.3g')}"
    )
    if recorded:
        text += " (recorded)"
    if value["masked"] > MASKED and config.attack.uses_gradient:
        others = "--attack square"
        if config.model.has_dynamics:
            others = "--attack-grad smooth ep, --attack-start equilibrium, --attack square"
        text += (
            f"\n  warning: the gradient of {100 * value['masked']:.1f} % of the images was "
            "exactly zero or not finite: this number is only an upper bound of the robust "
            f"accuracy; try {others}"
        )
    return text


def describe_sweep_result(results: Mapping[float, Mapping[str, Record]]) -> str:
    """The adversarial accuracies of a sweep, by the strongest gradient, for the end of a command.
    results: {eps: of `Sweep.results`}."""
    labels = next(iter(results.values())).keys()
    methods = [label for label in labels if label != settings.WORST]
    gradient = f", strongest of {listed(methods)} per image" if len(methods) > 1 else ""
    accuracies = (
        f"{100 * list(records.values())[-1].value['adversarial']:.2f} % at eps {format_eps(eps)}"
        for eps, records in results.items()
    )
    return f"adversarial accuracy{gradient}: {', '.join(accuracies)}"


def value_of(result: Mapping[str, Any]) -> dict[str, Any]:
    """The value of a record. result: see `ART_Timesteps_Addition.attacks.summary`."""
    return {
        "adversarial": float(result["correct"].mean()),
        "masked": result["masked"],
        "unmoved": result["unmoved"],
        "mean_norm": result["mean_norm"],
        "outcomes": pack(result["correct"]),
        "masked_outcomes": pack(result["masked_images"]),
    }


# Columns of Adversarial_Accuracy.csv behind those of `columns`: the settings of each row
SETTINGS_COLUMNS = (
    "steps", "start", "predict_step", "iters", "queries", "restarts", "clip", "mbs", "seed", "tol",
    "precision", "compile",
)  # fmt: skip


def columns(record: Record, label: str = "") -> dict[str, str]:
    """A record as a row of Adversarial_Accuracy.csv. label: of its gradient method."""
    value = record.value
    own = record.settings
    grad = own["attack"] if own["gradient"] == settings.NO_GRADIENT else own["gradient"]
    steps = own.get("steps", 0)
    if isinstance(steps, int) and steps:
        grad = f"{grad}@{steps}"
    described = {name: format_value(own.get(name, "")) for name in SETTINGS_COLUMNS}
    return {
        "eps": repr(own["eps"]),
        "grad": label or grad,
        "clean": _share(record.data.get("clean")),
        "adversarial": _share(value.get("adversarial")),
        "masked": _share(value.get("masked")),
        "unmoved": _share(value.get("unmoved")),
        "mean_norm": _norm(value, ".6g"),
        "computed_on": record.computed_on,
        "images": str(record.data.get("images", "")),
        "weights": str(record.model.get("weights") or ""),
        **described,
    }


def _share(value: Any) -> str:
    return f"{value:.6f}" if isinstance(value, (int, float)) else ""


def _norm(value: Mapping[str, Any], digits: str) -> str:
    """The mean norm of a record as text; it has none where perturbations were not finite."""
    norm = value.get("mean_norm")
    return "nan" if norm is None else format(norm, digits)


class Sweep:
    """An attack on one model over eps: its records, and the tables made of them in a run folder.

    Adversarial_Accuracy.txt, and .png, show the measurements with the settings of the latest
    command, whatever eps they have; Adversarial_Accuracy.csv contains those of this attack and norm
    with any settings. Names of other attacks than PGD in the 2-norm end in _ATTACK_NORM.

    model, data: of the records (`results.record.Record`); source: the attacked model, as text;
    smooth: how the gradient method `smooth` works, as text."""

    def __init__(
        self,
        run: RunFolder,
        store: Store,
        config: Config,
        model: Mapping[str, Any],
        data: Mapping[str, Any],
        source: str,
        smooth: str,
    ) -> None:
        self.run = run
        self.store = store
        self.config = config
        self.model = model
        self.data = data
        self.source = source
        self.smooth = smooth
        attack = config.attack
        self.stem = "Adversarial_Accuracy"
        if (attack.name, attack.norm) != ("pgd", "2"):
            self.stem += f"_{attack.name}_{attack.norm}"

    @property
    def text(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}.txt"

    def _wanted(self, eps: float) -> dict[str, Record]:
        """{label: a record without a value} of the measurements at one eps."""
        found = settings.attack(self.config, eps, self.smooth)
        return {
            label: Record("attack", self.model, self.data, own, {}) for label, own in found.items()
        }

    def results(self, eps: float) -> dict[str, Record] | None:
        """{label: record} of all gradient methods at one eps, as far as records have been read;
        None if one is missing."""
        found = {label: self.store.find(record) for label, record in self._wanted(eps).items()}
        complete = {label: record for label, record in found.items() if record is not None}
        return complete if len(complete) == len(found) else None

    def is_missing(self, eps: float, with_images: bool) -> bool:
        """Whether no process has measured one eps yet. with_images: or saved its adversarial
        examples."""
        self.store.refresh()
        return self.results(eps) is None or with_images and not self.has_images(eps)

    def add(self, eps: float, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the records of one eps and write the tables. results: {gradient method: result}, see
        `ART_Timesteps_Addition.attacks.summary`."""
        wanted = self._wanted(eps)
        records = []
        for label, result in results.items():
            own = wanted[label].settings
            value = value_of(result)
            records.append(Record.now("attack", self.model, self.data, own, value))
        self.store.add(*records)
        self.write()

    def _measured(self) -> list[tuple[str, Record]]:
        """(label, record) of the measurements with these settings, sorted by eps."""
        all_eps = {
            eps
            for record in self.store.records
            if record.kind == "attack"
            and (eps := read_eps(record.settings.get("eps"))) is not None
            and record.settings.get("attack") == self.config.attack.name
        }
        found = [(eps, self.results(eps)) for eps in sorted(all_eps)]
        return [pair for _, results in found if results for pair in results.items()]

    @property
    def rows(self) -> list[dict[str, str]]:
        """The measurements with these settings, sorted by eps, see `columns`."""
        return [columns(record, label) for label, record in self._measured()]

    def write(self) -> None:
        """Write the .txt and the .csv, from all records that any process has added."""
        with self.store.locked():
            measured = self._measured()
            self._write_text([columns(record, label) for label, record in measured])
            self._write_csv(measured)

    def _write_text(self, rows: Sequence[Mapping[str, str]]) -> None:
        (wanted, *_) = self._wanted(0.0).values()
        machines = dict.fromkeys(row["computed_on"] for row in rows if row["computed_on"])
        source = f"# examined: {self.source}"
        if machines:
            source += f"; computed on: {'; '.join(machines)}"
        lines = [
            measured_with(wanted, without=("eps", "gradient")),
            source,
            "# masked: share of images whose gradient was exactly zero or not finite at some "
            "iteration; unmoved: whose perturbation is zero",
            "# eps, clean accuracy, adversarial accuracy (of the strongest gradient, per image)",
        ]
        for _, same_eps in itertools.groupby(rows, key=lambda row: row["eps"]):
            for row in same_eps:
                masked = float(row["masked"]) > MASKED
                lines.append(
                    f"# {row['grad']}: adversarial {row['adversarial']}, masked {row['masked']}, "
                    f"unmoved {row['unmoved']}, mean norm {row['mean_norm']}"
                    + (", an upper bound only" if masked else "")
                )
            lines.append(f"{float(row['eps']):g} {row['clean']} {row['adversarial']}")
        self.run.write_lines(self.text.name, lines)

    def _write_csv(self, measured: Sequence[tuple[str, Record]]) -> None:
        """Write the measurements of the .txt, then those with other settings."""
        rows = [columns(record, label) for label, record in measured]
        rows += [columns(record) for record in self._others(measured)]
        self.run.write_csv(f"{self.stem}.csv", rows)

    def notes(self) -> Iterator[str]:
        """A note if the .txt lacks measurements of this attack and norm."""
        if self._others(self._measured()):
            yield (
                f"{self.stem}.txt shows these settings alone; {self.stem}.csv and "
                f"{self.store.path.name} have those of other settings too"
            )

    def _others(self, measured: Sequence[tuple[str, Record]]) -> list[Record]:
        """The records of this attack and norm that are not among the `measured`: of other settings
        or weights."""
        attack = self.config.attack
        return [
            record
            for record in self.store.records
            if record.kind == "attack"
            and record.settings.get("attack") == attack.name
            and record.settings.get("norm") == attack.norm
            and all(record is not shown for _, shown in measured)
        ]

    def plot(self) -> None:
        """Draw accuracy over eps."""
        chance = 1 / TASKS[self.config.data.task].classes
        attack = self.config.attack
        self.run.save_figure(
            f"{self.stem}.png",
            plots.sweep,
            self.rows,
            attack.name,
            attack.norm,
            self.data["images"],
            self.data["clean"],
            chance,
            table=self.store.locked,
        )

    @property
    def _images(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}_images.npz"

    def has_images(self, eps: float) -> bool:
        """Whether the saved adversarial examples are those of this eps and these settings."""
        try:
            saved = str(read_arrays(self._images, ["identity"])["identity"])
        except (ValueError, KeyError):
            return False
        return saved == self._identity(eps)

    def _identity(self, eps: float) -> str:
        return "\n".join(record.identity for record in self._wanted(eps).values())

    def save_images(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        clean: np.ndarray,
        eps: float,
        result: Mapping[str, Any],
    ) -> None:
        """Write all adversarial examples of one eps to .npz, and draw some. images: uint8; clean:
        (n,) bool, whether each image is classified correctly; result: of `model_utils.attack`."""
        with replacing(self._images) as beside, open(beside, "wb") as file:
            np.savez_compressed(
                file,
                x_adv=result["x_adv"],
                labels=labels.numpy(),
                prediction=result["prediction"],
                eps=eps,
                identity=self._identity(eps),
            )
        norm = norm_name(self.config.attack.norm)
        caption = f"Adversarial examples: {self.config.attack.name}, {norm} eps {format_eps(eps)}"
        pixels = (images.float() / 255).numpy()
        self.run.save_figure(
            f"{self.stem}_images.png",
            plots.adversarial_examples,
            pixels,
            labels.numpy(),
            clean,
            result,
            caption,
            TASKS[self.config.data.task].names,
        )
