#!/usr/bin/env bash
# Builds .venv from requirements.txt. Every other script calls this one first and uses
# .venv/bin/python.
# Needs: 5 to 20 minutes and 6 GB the first time, and prints its progress; no time and no output if
# .venv is up to date.
set -euo pipefail
cd "$(dirname "$0")/.."
# works MODULE: whether the interpreter of .venv starts, has the version that .venv was built for,
# and finds MODULE
works() {
    .venv/bin/python -c 'import importlib.util, os, sys, sysconfig
sys.exit(not os.path.isdir(sysconfig.get_path("purelib")) or not importlib.util.find_spec(sys.argv[1]))' "$1" 2>/dev/null
}
up_to_date() { cmp -s requirements.txt .venv/.requirements && works torch; }
up_to_date && exit 0
python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 10))' ||
    { echo "setup: $python is $("$python" --version 2>&1); Python 3.10 or newer is needed (set PYTHON=...)" >&2; exit 2; }
# of jobs that start together one builds; without locks each builds
if command -v flock >/dev/null; then
    # network file systems lock only files that are opened for writing
    { exec 9<>requirements.txt; } 2>/dev/null || exec 9<requirements.txt
    code=0
    flock -n 9 2>/dev/null || code=$?
    [ $code -ne 1 ] || { echo "setup: waiting for another process that builds .venv" >&2; flock 9 || true; }
    up_to_date && exit 0
fi
say() { echo "setup: $*" >&2; }
say "building .venv from requirements.txt: 5 to 20 minutes, most of them downloads, and 6 GB"
# empties an incomplete .venv, or one without its interpreter
begin() {
    say "step 1 of 2: creating .venv with $("$python" --version 2>&1)"
    [ ! -e .venv ] || find -H .venv -mindepth 1 -delete
}
install() {
    say "step 2 of 2: installing the packages with $1"
    "${@:2}" -r requirements.txt >&2
}
if command -v uv >/dev/null; then
    works sys || { begin; uv venv --quiet --python "$python" .venv; }
    install uv uv pip install --python .venv/bin/python
else
    works pip || { begin; "$python" -m venv .venv; }
    install pip .venv/bin/python -m pip install --disable-pip-version-check
fi
cp requirements.txt .venv/.requirements # only now is the environment complete
say "done after $((SECONDS / 60)) min $((SECONDS % 60)) s"
