"""Runs command lines of the suite one after another, each in a fork of this process, which has
loaded the libraries for all of them.

First it reads a folder from standard input, goes there, writes random images in the formats of
CIFAR-10 and CIFAR-10-C to data/, and then 0 to file descriptor 4. It reads `PROGRAM FLAGS`, a line
each, and writes the exit code of each. Started by check/common.sh with SMOKE=1."""

import importlib
import multiprocessing
import os
import pathlib
import runpy
import shlex
import sys
import tempfile

import quick_figures  # noqa: F401
from make_cifar import write_cifar, write_corruptions

ROOT = pathlib.Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

import torch.fx.experimental.symbolic_shapes  # noqa: E402, F401
import torchvision  # noqa: E402, F401

import experiment.results.evaluation  # noqa: E402, F401
import main  # noqa: E402, F401
import model_utils  # noqa: E402, F401
from data_utils import CORRUPTIONS  # noqa: E402

# what main.py loads where it needs it
LIBRARIES = {
    "attack": "ART_Timesteps_Addition.attacks",
    "audit": "ART_Timesteps_Addition.audit",
    "digits": "sklearn.model_selection",
}


def serve(commands, codes):
    """commands: the file that it reads from; codes: the file descriptor that it writes to."""
    os.chdir(commands.readline().rstrip("\n"))
    os.environ["TMPDIR"] = tempfile.tempdir = os.getcwd()  # which Python may have looked up already
    write_cifar("data")
    write_corruptions("data", CORRUPTIONS)
    os.write(codes, b"0\n")
    for line in commands:
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
        os.write(codes, b"%d\n" % (code if code >= 0 else 128 - code))


def serve_pipes(folder):
    """`serve` through the named pipes `commands` and `codes` of a folder; what the commands say
    goes to its files `out` and `err`, behind what is there."""
    multiprocessing.set_start_method(
        "fork", force=True
    )  # so that no lock has a name, which would be left behind
    for name, descriptor in (("out", 1), ("err", 2)):
        with open(f"{folder}/{name}", "a") as file:
            os.dup2(file.fileno(), descriptor)
    with open(f"{folder}/commands") as commands, open(f"{folder}/codes", "w") as codes:
        serve(commands, codes.fileno())


if __name__ == "__main__":
    serve(sys.stdin, 4)
