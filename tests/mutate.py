"""Runs tests against a copy of the project with a fault planted in it, for tests/test_mutations.py.

Usage: python tests/mutate.py FOLDER, which must not exist: it becomes the copy. Reads from standard
input a JSON list a line, [file or null, old text, new text, [test ids]], and writes a JSON list a
line, [exit code of pytest, its output]. Every line runs in a fork of this process, which has loaded
the libraries for all of them, but nothing of the project."""

import json
import os
import pathlib
import shutil
import sys
import tempfile

import art.attacks.evasion  # noqa: F401
import matplotlib.figure  # noqa: F401
import pytest
import scipy.stats  # noqa: F401
import sklearn.datasets  # noqa: F401
import sklearn.model_selection  # noqa: F401
import torch.fx.experimental.symbolic_shapes  # noqa: F401
import torchvision  # noqa: F401

ROOT = pathlib.Path(__file__).parent.parent
LEFT_OUT = ("results", "data", "docs", "check")  # of the project's root


def tests_fail(folder, ids):
    """(exit code of pytest, its output) of these tests in the copy, in a fork of this process."""
    with tempfile.TemporaryFile("w+") as file:
        child = os.fork()
        if child == 0:
            for descriptor in (1, 2):
                os.dup2(file.fileno(), descriptor)
            os.chdir(folder)
            sys.path[:0] = [str(folder / "tests"), str(folder)]
            code = pytest.main(["-x", "-q", "-n", "0", "-p", "no:cacheprovider", *ids])
            sys.stdout.flush()
            os._exit(code)
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        file.seek(0)
        return code, file.read()


def left_out(folder, names):
    """The names in a folder that the copy does not need."""
    hidden = [name for name in names if name.startswith((".", "__pycache__"))]
    return [*hidden, *LEFT_OUT] if pathlib.Path(folder) == ROOT else hidden


def main(folder):
    sys.dont_write_bytecode = True
    sys.path.remove(str(ROOT / "tests"))  # of this script, and not of the copy
    shutil.copytree(ROOT, folder, ignore=left_out)
    for line in sys.stdin:
        name, old, new, ids = json.loads(line)
        original = (folder / name).read_text() if name else None
        if name:
            (folder / name).write_text(original.replace(old, new))
        code, output = tests_fail(folder, ids)
        if name:
            (folder / name).write_text(original)
        print(json.dumps([code, output]), flush=True)


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]))
