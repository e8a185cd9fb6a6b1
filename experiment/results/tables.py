"""The text tables of a run folder: a header with the settings of the result, rows of columns."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiment.config import LEAST_EPS, MOST_EPS
from experiment.runs.files import number, parse_json, read_text

HEADER = "# settings: "
# Settings that earlier versions did not record: a missing one matches any value.
NOT_ALWAYS_RECORDED = ("data", "compile")


def header(settings: Mapping[str, Any]) -> str:
    """The line of a table that records the settings of its rows."""
    return HEADER + json.dumps(settings, sort_keys=True)


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


def same_settings(recorded: Any, settings: Mapping[str, Any]) -> bool:
    """Whether a table with the settings `recorded` (of a file: any value) is continued by a command
    with these `settings`. Of `data`, a fingerprint or {name: fingerprint}, the entries that both
    have are compared."""
    if not isinstance(recorded, dict):
        return False
    recorded = _flatten(recorded)
    settings = _flatten(json.loads(json.dumps(settings)))
    both = recorded.keys() & settings.keys()
    return all(recorded[name] == settings[name] for name in both) and all(
        name.split(" ")[0] in NOT_ALWAYS_RECORDED for name in recorded.keys() ^ settings.keys()
    )


def _flatten(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings with one entry per fingerprint of `data`."""
    flat = dict(settings)
    data = settings.get("data")
    if isinstance(data, dict) or data is None:
        flat.pop("data", None)
        flat.update({f"data {name}": value for name, value in (data or {}).items()})
    return flat


def read_share(text: Any) -> float | None:
    """A share from a table, from 0 to 1; None for any other text."""
    return number(text, 0, 1)


def read_eps(text: Any) -> float | None:
    """The eps of an attack from a table, 0 or in the range of --eps; None for any other text."""
    value = number(text, 0, MOST_EPS)
    return value if value == 0 or value is not None and value >= LEAST_EPS else None
