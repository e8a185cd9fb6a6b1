"""Results of `--todo corruptions`: Corruption_Accuracy.txt and its figure."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from data_utils import CORRUPTIONS, PUBLISHED, SEVERITIES
from experiment.devices import computed_on
from experiment.plots import attacks as plots
from experiment.results.tables import header, read_rows, read_settings, read_share, same_settings
from experiment.runs.files import read_text
from experiment.runs.folder import RunFolder

COMPUTED_ON = "; computed on: "


class CorruptionTable:
    """Corruption_Accuracy.txt of a run folder: one row per corruption with the accuracy at each
    severity. A table with the same settings is continued, as after a kill; a table with other
    settings is moved aside, to Corruption_Accuracy_1.txt and so on.

    settings: what the rows depend on, with `data`: {corruption: fingerprint}; names: the available
    corruptions, in order; source: the evaluated model, as text; text: path of the table; rows:
    {corruption: accuracies as written, one per severity}; machines: where they were computed."""

    def __init__(
        self, run: RunFolder, settings: Mapping[str, Any], names: Collection[str], source: str
    ) -> None:
        """Raises UserError if another process writes this table."""
        self.run = run
        self.settings = settings
        self.source = source
        self.text = run.folder / "Corruption_Accuracy.txt"
        self.rows: dict[str, list[str]] = {}
        self.machines: list[str] = []
        run.lock("Corruption_Accuracy")
        recorded = read_settings(self.text)
        if recorded is not None and same_settings(recorded, settings):
            self._read(recorded)
        elif self.text.exists():
            run.move_aside("Corruption_Accuracy", (".png", ".pdf", ".txt"))
        self.names = [name for name in CORRUPTIONS if name in names or name in self.rows]

    def _read(self, recorded: Mapping[str, Any]) -> None:
        fingerprints = recorded.get("data")
        if isinstance(fingerprints, dict):
            self.settings = {**self.settings, "data": {**fingerprints, **self.settings["data"]}}
        for name, *shares in read_rows(self.text):
            valid = len(shares) == SEVERITIES and None not in map(read_share, shares)
            if name in CORRUPTIONS and valid:
                self.rows[name] = shares
        for line in read_text(self.text).splitlines()[:2]:
            self.machines += filter(None, line.partition(COMPUTED_ON)[2].split("; "))

    def add(self, name: str, accuracies: Sequence[float]) -> None:
        """Add the row of one corruption. accuracies: shares, one per severity."""
        self.rows[name] = [f"{accuracy:.6f}" for accuracy in accuracies]
        self.machines = list(dict.fromkeys([*self.machines, computed_on()]))
        self.write()

    def _mean(self, names: Sequence[str]) -> float:
        return float(np.mean(np.array([self.rows[name] for name in names], dtype=float)))

    def means(self) -> tuple[float | None, float]:
        """Mean accuracies of a complete table: over all corruptions, None if some are missing, and
        over the first 15, as published means are."""
        has_all = set(CORRUPTIONS) <= set(self.rows)
        return self._mean(CORRUPTIONS) if has_all else None, self._mean(PUBLISHED)

    def write(self) -> None:
        """Write the table, with the means once it is complete."""
        lines = [
            header(self.settings),
            f"# corruption, accuracy at severity 1 to 5, of {self.source}"
            f"{COMPUTED_ON}{'; '.join(self.machines)}",
            *(f"{name} {' '.join(self.rows[name])}" for name in self.names if name in self.rows),
        ]
        if len(self.rows) == len(self.names):
            over_all, over_first = self.means()
            means = f"over the first {len(PUBLISHED)}: {over_first:.6f}"
            if over_all is not None:
                means = f"over all {len(CORRUPTIONS)}: {over_all:.6f}, {means}"
            lines.append(f"# mean {means}")
        self.run.write_lines(self.text.name, lines)

    def describe_means(self) -> str:
        """The mean accuracies of a complete table, for the log."""
        over_all, over_first = self.means()
        text = "mean accuracy "
        if over_all is not None:
            text += f"{100 * over_all:.2f} %, "
        return text + f"over the first {len(PUBLISHED)} corruptions {100 * over_first:.2f} %"

    def plot(self) -> None:
        """Draw a heat map of a complete table."""
        shares = np.array([self.rows[name] for name in self.names], dtype=float)
        self.run.save_figure(
            "Corruption_Accuracy.png",
            plots.corruptions,
            100 * shares,
            self.names,
            self.means(),
            self.settings["images"],
        )
