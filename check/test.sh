#!/usr/bin/env bash
# Runs the tests, on two cores in some minutes; TEST_WORKERS=N takes N processes. Arguments are passed on to pytest.
set -euo pipefail
cd "$(dirname "$0")/.."
bash check/setup.sh
[ $# -gt 0 ] || { .venv/bin/ruff check . && .venv/bin/ruff format --check . && .venv/bin/mypy; }
# Processes of one thread each: the tests' models are too small to gain from more, and those that start processes
# themselves leave the others waiting.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -q --durations=15 -n "${TEST_WORKERS:-2}" --dist worksteal "${@:-tests}"
