"""Results of `--todo corruptions`: Corruption_Accuracy.txt and its figure."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from data_utils import CORRUPTIONS, PUBLISHED
from experiment.config import Config
from experiment.plots import attacks as plots
from experiment.results import settings
from experiment.results.record import Record, pack
from experiment.results.store import Store
from experiment.results.tables import measured_with
from experiment.runs.folder import RunFolder


class CorruptionTable:
    """The accuracies of one model under corruptions: a record each, and Corruption_Accuracy.txt,
    one row per corruption with the accuracy at each severity, of the latest command.

    model: of the records (`results.record.Record`); data: {corruption: its images}, the available
    ones, in order; source: the evaluated model, as text; text: path of the table."""

    def __init__(
        self,
        run: RunFolder,
        store: Store,
        config: Config,
        model: Mapping[str, Any],
        data: Mapping[str, Mapping[str, Any]],
        source: str,
    ) -> None:
        self.run = run
        self.store = store
        self.source = source
        self.text = run.folder / "Corruption_Accuracy.txt"
        self._wanted = {
            name: Record("corruption", model, images, settings.corruption(config, name), {})
            for name, images in data.items()
        }

    def measured(self) -> dict[str, Record]:
        """{corruption: record}, of any process."""
        self.store.refresh()
        found = {name: self.store.find(record) for name, record in self._wanted.items()}
        return {name: record for name, record in found.items() if record is not None}

    def add(self, name: str, outcomes: Sequence[torch.Tensor]) -> None:
        """Add the record of one corruption. outcomes: for each severity whether each image is
        classified correctly, (n,) bool."""
        wanted = self._wanted[name]
        value = {
            "accuracy": [correct.double().mean().item() for correct in outcomes],
            "outcomes": [pack(correct.numpy()) for correct in outcomes],
        }
        self.store.add(Record.now("corruption", wanted.model, wanted.data, wanted.settings, value))
        self.write()

    def _means(self, records: Mapping[str, Record]) -> tuple[float | None, float]:
        """Mean accuracies: over all corruptions, None if some are missing, and over the first 15,
        as published means are."""

        def mean(names: Sequence[str]) -> float:
            return float(np.mean([records[name].value["accuracy"] for name in names]))

        has_all = set(CORRUPTIONS) <= set(records)
        return mean(CORRUPTIONS) if has_all else None, mean(PUBLISHED)

    def write(self) -> None:
        """Write the table, with the means once it is complete."""
        with self.store.locked():
            records = self.measured()
            if records:
                self.run.write_lines(self.text.name, self._lines(records))

    def _lines(self, records: Mapping[str, Record]) -> list[str]:
        machines = dict.fromkeys(record.computed_on for record in records.values())
        (wanted, *_) = self._wanted.values()
        fingerprints = {name: record.data["fingerprint"] for name, record in self._wanted.items()}
        lines = [
            measured_with(wanted, without=("corruption",), fingerprint=fingerprints),
            f"# corruption, accuracy at severity 1 to 5, of {self.source}; computed on: "
            f"{'; '.join(filter(None, machines))}",
        ]
        for name, record in records.items():
            shares = " ".join(f"{share:.6f}" for share in record.value["accuracy"])
            lines.append(f"{name} {shares}")
        if len(records) == len(self._wanted):
            over_all, over_first = self._means(records)
            means = f"over the first {len(PUBLISHED)}: {over_first:.6f}"
            if over_all is not None:
                means = f"over all {len(CORRUPTIONS)}: {over_all:.6f}, {means}"
            lines.append(f"# mean {means}")
        return lines

    def describe(self, name: str) -> str:
        """The accuracies under one corruption that is measured, for the log."""
        accuracies = self.measured()[name].value["accuracy"]
        return f"{name}: {', '.join(f'{100 * accuracy:.2f}' for accuracy in accuracies)} %"

    def describe_means(self) -> str:
        """The mean accuracies of a complete table, for the log."""
        over_all, over_first = self._means(self.measured())
        text = "mean accuracy "
        if over_all is not None:
            text += f"{100 * over_all:.2f} %, "
        return text + f"over the first {len(PUBLISHED)} corruptions {100 * over_first:.2f} %"

    def plot(self) -> None:
        """Draw a heat map of a complete table."""
        records = self.measured()
        shares = np.array([record.value["accuracy"] for record in records.values()])
        (wanted, *_) = self._wanted.values()
        self.run.save_figure(
            "Corruption_Accuracy.png",
            plots.corruptions,
            100 * shares,
            list(records),
            self._means(records),
            wanted.data["images"],
            table=self.store.locked,
        )
