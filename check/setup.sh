#!/usr/bin/env bash
# Builds .venv from requirements.txt (some minutes and 6 GB the first time; nothing to do when it is up to date).
# Source of truth for every other script: they call this one first and use .venv/bin/python.
set -euo pipefail
cd "$(dirname "$0")/.."
cmp -s requirements.txt .venv/.requirements && exit 0
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "setup: $python is $("$python" --version 2>&1); Python 3.10 or newer is needed (PYTHON=... names another)" >&2; exit 2; }
echo "setup: building .venv from requirements.txt (about 6 GB)" >&2
if command -v uv >/dev/null; then
    [ -x .venv/bin/python ] || uv venv --quiet --python "$python" .venv
    uv pip install --quiet --python .venv/bin/python -r requirements.txt
else
    [ -x .venv/bin/python ] || "$python" -m venv .venv
    .venv/bin/python -m pip install --quiet --disable-pip-version-check -r requirements.txt
fi
cp requirements.txt .venv/.requirements # only now is the environment complete
