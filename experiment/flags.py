"""Old names of `experiment.config`, until their last users are gone."""

from ART_Timesteps_Addition.names import WITHOUT_GRADIENT  # noqa: F401
from experiment.command_line import DROPOUTS, MAIN_FLAGS
from experiment.command_line import words_of as typed  # noqa: F401
from experiment.config import (  # noqa: F401
    ALWAYS_SAVED,
    ATTACK_STEP,
    FEED_FORWARD,
    LARGEST,
    LEAST_EPS,
    MOST_EPS,
    TODOS,
)
from experiment.config import FINGERPRINTS as DATA  # noqa: F401
from experiment.config import FLAGS as ALL

FLAGS = MAIN_FLAGS
__all__ = ["ALL", "DROPOUTS", "FLAGS"]
