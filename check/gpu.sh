#!/usr/bin/env bash
# Tests and benchmarks the project on a GPU.
# Needs: an NVIDIA GPU, 9 minutes, PyTorch 2.11 or later and ART. It uses .venv if it exists,
# otherwise python3; it installs nothing.
# Output: gpu_report.md (--out sets another name): GPU, versions, all results. Without a GPU it
# lists what it would run.
# With SMOKE=1 every part runs once on the CPU, with small sizes.
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
