#!/usr/bin/env bash
# Check style and types and run the tests:
#     bash check/test.sh [--all | arguments of pytest, e.g. tests/test_model_utils.py]
# Without arguments it runs the fast tests. --all adds the tests marked slow; .ci/run uses it. Other
# arguments go to pytest, which then runs what they name, slow tests too, without the checks of
# style and types.
# Needs: two cores and some minutes. TEST_WORKERS=N runs N processes (2).
set -euo pipefail
cd "$(dirname "$0")/.."
bash check/setup.sh
case "${1:-}" in
    "") tests=(-m "not slow" tests) ;;
    --all) tests=("${@:2}" tests) ;;
    *) tests=("$@") ;;
esac
if [ $# -eq 0 ] || [ "$1" = --all ]; then
    .venv/bin/ruff check .
    .venv/bin/ruff format --check .
    .venv/bin/mypy
fi
# One thread per process: the models of the tests are too small to gain from more, and with more
# threads tests that start processes slow the others down.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest -q --durations=15 -n "${TEST_WORKERS:-2}" --dist worksteal "${tests[@]}"
