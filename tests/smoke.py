"""Runs command lines of the suite one after another, each in a fork of this process, which has loaded the libraries for
all of them.

Writes 0 to file descriptor 4 once it is ready. Reads `PROGRAM FLAGS`, a line each, from standard input, and writes the
exit code of each. Started by check/common.sh with SMOKE=1, in an empty folder, where it first writes random images in
the formats of CIFAR-10 and CIFAR-10-C to data/.
"""
import importlib
import os
import pathlib
import runpy
import shlex
import sys

import quick_figures  # noqa: F401
from make_cifar import write_cifar, write_corruptions

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch.fx.experimental.symbolic_shapes  # noqa: E402, F401
import torchvision  # noqa: E402, F401

import main  # noqa: E402, F401
import model_utils  # noqa: E402, F401
from data_utils import CORRUPTIONS  # noqa: E402
from experiment import records  # noqa: E402, F401

# what main.py loads where it needs it
LIBRARIES = {"attack": "ART_Timesteps_Addition.attacks", "audit": "ART_Timesteps_Addition.audit_checks",
             "digits": "sklearn.model_selection"}

write_cifar("data")
write_corruptions("data", CORRUPTIONS)
os.write(4, b"0\n")
for line in sys.stdin:
    program, *words = shlex.split(line)
    for word, libraries in LIBRARIES.items():
        if word in words:
            importlib.import_module(libraries)
    child = os.fork()
    if child == 0:
        sys.argv = [program, *words]
        try:
            runpy.run_path(str(ROOT / program), run_name="__main__")
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(code)  # tidying up all that the parent has loaded takes a second
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    os.write(4, b"%d\n" % (code if code >= 0 else 128 - code))
