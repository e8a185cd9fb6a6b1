#!/usr/bin/env bash
# How robust a run is, and whether that number can be believed, in both norms:  bash check/audit.sh RUN [further flags]
# EPS_2 (1.0) and EPS_INF (0.1) are the bounds; e.g. EPS_INF=0.031373 for CIFAR-10. An audit that was stopped goes on when started again.
# Needs: for the CIFAR-10 network an NVIDIA GPU with 10 GB and hours; for a small model and --test-size 100 a CPU and half an hour for
# each norm, with --budget quick minutes (--device -1 for the CPU). --surrogate RUN2 adds images that break another model.
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
source "$(dirname "$0")/common.sh" mnist
[ $# -gt 0 ] || { smoke_run --mbs 5 --thirdphase --betas 0 0.5 --optim adam --lrs 1e-3 1e-3 && set -- "$run" --budget quick --test-size 2; }
run=$1
shift
suite main.py --todo audit --load-path "$run" --attack-norm 2 --eps "${EPS_2:-1.0}" "$@"
suite main.py --todo audit --load-path "$run" --attack-norm inf --eps "${EPS_INF:-0.1}" "$@"
