"""The version of this program, and the git revision of its code. Imports no torch."""

import pathlib
import re
import subprocess

ROOT = pathlib.Path(__file__).parents[1]


def version() -> str:
    """The version in pyproject.toml; `unknown` without that file."""
    try:
        text = (ROOT / "pyproject.toml").read_text()
    except OSError:
        return "unknown"
    found = re.search(r'^version = "(.*)"$', text, re.MULTILINE)
    return found[1] if found else "unknown"


def git_revision() -> str:
    """The git revision of the code, `-dirty` behind it if files have changed; `unknown` without
    git."""
    git = ["git", "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        found = subprocess.run(git, capture_output=True, text=True, cwd=ROOT)
    except OSError:  # no git
        return "unknown"
    return found.stdout.strip() or "unknown"
