#!/usr/bin/env bash
# Measures the test accuracy of a run after each number of free steps up to T1:
#     bash check/characteristic.sh RUN [further flags, e.g. --T1 500]
# Needs: for the CIFAR-10 network an NVIDIA GPU and minutes; for a small model a CPU and seconds
# (--device -1).
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
source "$(dirname "$0")/common.sh" mnist
[ $# -gt 0 ] || { smoke_run && set -- "$run"; }
last main.py --todo characteristic --load-path "$@"
