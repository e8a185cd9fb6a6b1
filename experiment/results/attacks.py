"""Results of `--todo attack`: Adversarial_Accuracy in .csv and .txt, figures, messages."""

import itertools
import pathlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from ART_Timesteps_Addition.names import WITHOUT_GRADIENT
from data_utils import TASKS, UserError
from experiment.config import MOST_EPS, Config
from experiment.devices import computed_on
from experiment.inference import Convergence
from experiment.plots import attacks as plots
from experiment.plots.style import norm_name
from experiment.results.tables import header, read_eps, read_settings, read_share, same_settings
from experiment.runs.files import number, replacing
from experiment.runs.folder import RunFolder
from experiment.text import count, describe, format_value

MASKED = 0.01  # share of masked images above which an accuracy is only an upper bound


def default_eps(norm: str) -> list[float]:
    """The eps of an attack without --eps-list: a geometric grid, and the most common value."""
    if norm == "2":
        return [*(round(float(eps), 4) for eps in np.geomspace(0.05, 3, 10)), 1.0]
    return [*(float(f"{eps:.4g}") for eps in np.geomspace(1e-4, 0.1, 10)), round(8 / 255, 6)]


def sweep_settings(identity: Mapping[str, Any], config: Config, smooth: str) -> dict[str, Any]:
    """The settings that a sweep's rows depend on, as its table records them.

    identity: flags, weights and data; smooth: how the gradient method `smooth` works, as text."""
    attack = config.attack.at(1.0)
    settings = dict(identity)
    if len(settings["attack_step"]) == 1:
        (settings["attack_step"],) = settings["attack_step"]
    settings["attack_iters"] = attack.iters
    if attack.queries:
        settings["attack_queries"] = attack.queries
    if attack.restarts:
        settings["attack_restarts"] = attack.restarts
    if attack.name != "pgd":
        settings["budget"] = attack.describe()
    if "smooth" in config.attack.grads:
        settings["smooth"] = smooth
    if config.learning.tol:
        settings["tol"] = config.learning.tol
    if config.session.precision != "fp32":
        settings["precision"] = config.session.precision
        settings["gradient_precision"] = "fp32"
    return settings


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
        text += f", gradients unrolled through {format_value(config.attack_steps)} steps"
        text += " in fp32" if half_precision else ""
    return text


def describe_result(attack: str, eps: float, grad: str, result: Mapping[str, Any]) -> str:
    """A row of a sweep, for the log. result: see `ART_Timesteps_Addition.attacks.summary`."""
    gradient = "" if grad == attack else f"{grad}: "
    text = (
        f"eps {eps:g}, {gradient}adversarial accuracy {100 * result['correct'].mean():.2f} %, "
        f"mean norm {result['mean_norm']:.3g}"
    )
    if result["masked"] > MASKED and attack not in WITHOUT_GRADIENT:
        text += (
            f"\n  warning: the gradient of {100 * result['masked']:.1f} % of the images was "
            "exactly zero or not finite: this number is only an upper bound of the robust "
            "accuracy; try --attack-grad smooth ep, --attack-start equilibrium, --attack square"
        )
    return text


class Sweep:
    """The table of one attack over eps in a run folder: Adversarial_Accuracy.csv, with .txt and
    .png made from its rows. Names of other attacks than PGD in the 2-norm end in _ATTACK_NORM.

    A table with the same settings is continued, whatever eps it has. A table with other settings is
    moved aside, to NAME_1 and so on, before the sweep starts.

    source: the attacked model, as text; clean: clean accuracy; rows: of the .csv, sorted by eps;
    text: path of the .txt."""

    # the .txt, which records the settings, moves last
    ENDS = (".csv", ".png", ".pdf", "_images.png", "_images.pdf", "_images.npz", ".txt")

    def __init__(
        self, run: RunFolder, settings: Mapping[str, Any], clean: float, source: str
    ) -> None:
        """Raises UserError if another process writes this table, or if it is damaged."""
        self.run = run
        self.settings = settings
        self.clean = clean
        self.source = source
        self.rows: list[dict[str, str]] = []
        name = "Adversarial_Accuracy"
        if (settings["attack"], settings["attack_norm"]) != ("pgd", "2"):
            name += f"_{settings['attack']}_{settings['attack_norm']}"
        run.lock(name)
        run.finish_move(name, self.ENDS)
        recorded = self._find_recorded(name)
        self.stem = recorded or name
        if recorded:
            self.rows = run.read_csv(f"{self.stem}.csv")
            self._validate_rows()
        elif self.text.exists():
            run.move_aside(name, self.ENDS)
        self.write()

    @property
    def text(self) -> pathlib.Path:
        return self.run.folder / f"{self.stem}.txt"

    def _find_recorded(self, name: str) -> str | None:
        """The name of the table with these settings, or else with those of them that it records."""
        matching = None
        for stem in (name, *(f"{name}_{n}" for n in range(1, self.run.next_number(name)))):
            recorded = read_settings(self.run.folder / f"{stem}.txt") or {}
            recorded.pop("eps_list", None)  # of an earlier version
            if recorded == self.settings:
                return stem
            if matching is None and same_settings(recorded, self.settings):
                matching = stem
        return matching

    def _validate_rows(self) -> None:
        for row in self.rows:
            names = ("clean", "adversarial", "masked", "unmoved")
            values = [read_share(row.get(name)) for name in names]
            values += [read_eps(row.get("eps")), number(row.get("mean_norm"), 0, MOST_EPS**2)]
            if not row.get("grad") or None in values:
                raise UserError(
                    f"{self.run.folder / self.stem}.csv is damaged, with the row {describe(row)}; "
                    "move the file away to start again"
                )

    def has(self, eps: float) -> bool:
        return any(float(row["eps"]) == eps for row in self.rows)

    def add(self, eps: float, results: Mapping[str, Mapping[str, Any]]) -> None:
        """Add the rows of one eps. results: {gradient method: result}, of `model_utils.attack`."""
        for grad, result in results.items():
            self.rows.append(
                {
                    "eps": repr(eps),
                    "grad": grad,
                    "clean": f"{self.clean:.6f}",
                    "adversarial": f"{result['correct'].mean():.6f}",
                    "masked": f"{result['masked']:.6f}",
                    "unmoved": f"{result['unmoved']:.6f}",
                    "mean_norm": f"{result['mean_norm']:.6g}",
                    "computed_on": computed_on(),
                }
            )
        self.rows.sort(key=lambda row: float(row["eps"]))
        self.run.write_csv(f"{self.stem}.csv", self.rows)
        self.write()

    def write(self) -> None:
        """Write the .txt."""
        source = f"# examined: {self.source}"
        machines = dict.fromkeys(row["computed_on"] for row in self.rows if row.get("computed_on"))
        if machines:
            source += f"; computed on: {'; '.join(machines)}"
        lines = [
            header(self.settings),
            source,
            "# masked: share of images whose gradient was exactly zero or not finite at some "
            "iteration; unmoved: whose perturbation is zero",
            "# eps, clean accuracy, adversarial accuracy (of the strongest gradient, per image)",
        ]
        for _, rows in itertools.groupby(self.rows, key=lambda row: row["eps"]):
            for row in rows:
                masked = float(row["masked"]) > MASKED
                lines.append(
                    f"# {row['grad']}: adversarial {row['adversarial']}, masked {row['masked']}, "
                    f"unmoved {row['unmoved']}, mean norm {row['mean_norm']}"
                    + (", an upper bound only" if masked else "")
                )
            lines.append(f"{float(row['eps']):g} {row['clean']} {row['adversarial']}")
        self.run.write_lines(self.text.name, lines)

    def plot(self) -> None:
        """Draw accuracy over eps."""
        chance = 1 / TASKS[self.settings["task"]].classes
        self.run.save_figure(
            f"{self.stem}.png", plots.sweep, self.rows, self.settings, self.clean, chance
        )

    def save_images(
        self,
        images: torch.Tensor,
        labels: torch.Tensor,
        clean: torch.Tensor,
        eps: float,
        result: Mapping[str, Any],
    ) -> None:
        """Write all adversarial examples of one eps to .npz, and draw some. images: uint8; clean:
        whether each image is classified correctly."""
        path = self.run.folder / f"{self.stem}_images.npz"
        with replacing(path) as beside, open(beside, "wb") as file:
            np.savez_compressed(
                file,
                x_adv=result["x_adv"],
                labels=labels.numpy(),
                prediction=result["prediction"],
                eps=eps,
            )
        norm = norm_name(self.settings["attack_norm"])
        title = f"Adversarial examples: {self.settings['attack']}, {norm} norm, eps = {eps:g}"
        pixels = (images.float() / 255).numpy()
        self.run.save_figure(
            f"{self.stem}_images.png",
            plots.adversarial_examples,
            pixels,
            labels.numpy(),
            clean.numpy(),
            result,
            title,
        )
