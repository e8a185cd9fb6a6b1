"""Old names of `experiment.validate`, until their last users are gone."""

from experiment import validate
from experiment.config import Config
from experiment.validate import validate_eps as check_bounds  # noqa: F401
from experiment.validate import validate_run_dir as check_run_dir  # noqa: F401
from experiment.validate import validate_todo as check_todo  # noqa: F401


def check(args):
    """See `validate.validate`."""
    validate.validate(Config.of(args))


def check_held_out(args, saved):
    """See `validate.validate_held_out`."""
    validate.validate_held_out(Config.of(args), saved)


def notes(args, given):
    """See `validate.notes`."""
    return validate.notes(Config.of(args), given)
