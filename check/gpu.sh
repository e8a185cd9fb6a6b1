#!/usr/bin/env bash
# Tests and measures the project on a GPU and writes one file, gpu_report.md (--out names another): card, versions, every number.
# Needs: an NVIDIA GPU, 9 minutes, PyTorch 2.11 or later and ART; no set-up: it takes .venv where there is one, else python3.
# Without a GPU it says what it would run. With SMOKE=1 every part runs once on the CPU, with small sizes.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=.venv/bin/python
[ -x "$python" ] || python=python3
if [ "${SMOKE:-}" = 1 ]; then
    temporary=$(mktemp -d)
    trap 'rm -rf "$temporary"' EXIT
    export TMPDIR=$temporary PYTHONDONTWRITEBYTECODE=1
    "$python" benchmarks/gpu_report.py --small --out "$temporary/report.md" "$@"
    cat "$temporary/report.md"
else
    exec "$python" benchmarks/gpu_report.py "$@"
fi
