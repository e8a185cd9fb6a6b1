"""Old names of `experiment.command_line` and `experiment.text`, until their last users are gone."""

import argparse

from experiment import command_line
from experiment.command_line import convert as judge  # noqa: F401
from experiment.command_line import describe_change as contrast  # noqa: F401
from experiment.command_line import implied, parse, parse_leniently  # noqa: F401
from experiment.command_line import validate_saved as judge_saved  # noqa: F401
from experiment.text import describe as described  # noqa: F401
from experiment.text import format_value as shown  # noqa: F401
from experiment.text import name_path as named  # noqa: F401


def resolve(given, saved=None):
    """See `command_line.resolve`, as a namespace."""
    return argparse.Namespace(**command_line.resolve(given, saved).flat())
