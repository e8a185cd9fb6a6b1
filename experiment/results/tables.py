"""The text tables of a run folder: a header with the settings of the result, rows of columns."""

import json
from collections.abc import Collection
from typing import Any

from experiment.config import LEAST_EPS, MOST_EPS
from experiment.results.record import Record
from experiment.runs.files import number

HEADER = "# settings: "


def measured_with(record: Record, without: Collection[str] = (), **more: Any) -> str:
    """The line of a table with what identifies the measurements in it. without: names of settings
    in which its rows differ; more: {name: value} instead of those of the record."""
    settings = {name: value for name, value in record.settings.items() if name not in without}
    described = {"weights": record.model.get("weights"), **record.data, **settings, **more}
    return f"# measured with: {json.dumps(described, sort_keys=True)}"


def read_share(text: Any) -> float | None:
    """A share from a table, from 0 to 1; None for any other text."""
    return number(text, 0, 1)


def read_eps(text: Any) -> float | None:
    """The eps of an attack from a table, 0 or in the range of --eps; None for any other text."""
    value = number(text, 0, MOST_EPS)
    return value if value == 0 or value is not None and value >= LEAST_EPS else None
