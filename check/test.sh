#!/usr/bin/env bash
# Runs the tests (a few minutes on two cores). Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash check/setup.sh
exec .venv/bin/python -m pytest -q --durations=5 "${@:-tests}"
