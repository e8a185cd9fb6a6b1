#!/usr/bin/env bash
# Measures the accuracy of a CIFAR-10 run on the 19 corruptions of CIFAR-10-C, five severities:
#     bash check/corruptions.sh RUN [flags]
# Needs: an NVIDIA GPU and 95 times the time of predicting CIFAR-10's test images (--test-size 1000:
# a tenth); the files of CIFAR-10-C, 2.9 GB, in the folder CORRUPTIONS=..., or in CIFAR-10-C in the
# run's data folder. Repeating the command resumes it.
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,6s/^# //p' "$0"; exit 2; }
source "$(dirname "$0")/common.sh" cifar
[ $# -gt 0 ] || { unset CORRUPTIONS && smoke_run --task CIFAR10 --archi 3072 16 10 && set -- "$run"; }
last main.py --todo corruptions ${CORRUPTIONS:+--corruptions-dir "$CORRUPTIONS"} --load-path "$@"
