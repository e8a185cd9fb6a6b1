"""For torchrun: attacks the run folders `slow` and `frozen` with the given words, with a patience
of few seconds.

In `slow`, the first worker is slow to read data and the second to attack a mini-batch. In `frozen`,
the second worker freezes."""

import datetime
import os
import pathlib
import signal
import sys
import time

sys.path.insert(0, str(pathlib.Path(__file__).parent.parent))

import data_utils  # noqa: E402
import main  # noqa: E402
from ART_Timesteps_Addition import attacks  # noqa: E402
from experiment.workers import Workers  # noqa: E402

SECONDS = 5
first = os.environ["RANK"] == "0"


def once(module, name, stop):
    """Calls `stop` before the next call of a function."""
    function = getattr(module, name)

    def stopped(*args):
        setattr(module, name, function)
        stop()
        return function(*args)

    setattr(module, name, stopped)


Workers.PATIENCE = datetime.timedelta(seconds=SECONDS)
once(
    *((data_utils, "load_split") if first else (attacks, "attack_batch")),
    lambda: time.sleep(SECONDS + 1),
)
if main.main([*sys.argv[1:], "slow"]):
    sys.exit("slow failed")
os.environ["TORCHELASTIC_RESTART_COUNT"] = "1"  # see share_work.py
if not first:
    once(attacks, "attack_batch", lambda: os.kill(os.getpid(), signal.SIGSTOP))
sys.exit(main.main([*sys.argv[1:], "frozen"]))
