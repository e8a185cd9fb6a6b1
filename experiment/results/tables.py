"""The text tables of a run folder: a header with the settings of the result, rows of columns."""

import json
import pathlib
from collections.abc import Collection
from typing import Any

from experiment.config import LEAST_EPS, MOST_EPS
from experiment.results.record import Record
from experiment.runs.files import number, parse_json, read_text

HEADER = "# settings: "


def measured_with(record: Record, without: Collection[str] = (), **more: Any) -> str:
    """The line of a table with what identifies the measurements in it. without: names of settings
    in which its rows differ; more: {name: value} instead of those of the record."""
    settings = {name: value for name, value in record.settings.items() if name not in without}
    described = {"weights": record.model.get("weights"), **record.data, **settings, **more}
    return f"# measured with: {json.dumps(described, sort_keys=True)}"


def read_settings(path: pathlib.Path) -> dict[str, Any] | None:
    """The settings in the header of a table; None if there is no such table or header."""
    for line in _lines(path):
        if line.startswith(HEADER):
            try:
                settings = parse_json(line.removeprefix(HEADER))
            except ValueError:
                return None
            return settings if isinstance(settings, dict) else None
    return None


def read_rows(path: pathlib.Path) -> list[list[str]]:
    """The words of each line that is not a comment; [] if there is no such table."""
    return [line.split() for line in _lines(path) if line.strip() and line[0] != "#"]


def _lines(path: pathlib.Path) -> list[str]:
    try:
        return read_text(path).splitlines()
    except (OSError, ValueError):
        return []


def read_share(text: Any) -> float | None:
    """A share from a table, from 0 to 1; None for any other text."""
    return number(text, 0, 1)


def read_eps(text: Any) -> float | None:
    """The eps of an attack from a table, 0 or in the range of --eps; None for any other text."""
    value = number(text, 0, MOST_EPS)
    return value if value == 0 or value is not None and value >= LEAST_EPS else None
