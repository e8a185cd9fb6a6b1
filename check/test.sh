#!/usr/bin/env bash
# Runs the linters, mypy and the tests. With arguments it passes them to pytest and runs only these tests.
# Needs: two cores and some minutes. TEST_WORKERS=N sets the number of processes.
set -euo pipefail
cd "$(dirname "$0")/.."
bash check/setup.sh
[ $# -gt 0 ] || { .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy; }
# One thread per process: the models of the tests are too small to gain from more, and with more threads tests that start
# processes slow the others down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -q --durations=15 -n "${TEST_WORKERS:-2}" --dist worksteal "${@:-tests}"
