#!/usr/bin/env bash
# Prints the accuracy of a run on its training and test images and appends it to its
# hyperparameters.txt:
#     bash check/evaluate.sh RUN [flags]
# Needs: for the CIFAR-10 network an NVIDIA GPU and minutes; for a small model a CPU and seconds
# (--device -1).
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,6s/^# //p' "$0"; exit 2; }
source "$(dirname "$0")/common.sh" mnist
[ $# -gt 0 ] || { smoke_run && set -- "$run"; }
last main.py --todo evaluate --load-path "$@"
