#!/usr/bin/env bash
# Audits the robust accuracy of a run in both norms, with a verdict on its reliability:
#     bash check/audit.sh RUN [further flags]
# EPS_2 (1.0) and EPS_INF (0.1) set eps, e.g. EPS_INF=0.031373 for CIFAR-10. --surrogate RUN2 adds
# adversarial examples of RUN2.
# Needs: for the CIFAR-10 network an NVIDIA GPU with 10 GB and hours; for a small model and
# --test-size 100 a CPU (--device -1) and half an hour per norm, with --budget quick minutes.
# Output: Audit_NORM_EPS.* in RUN. Repeating the command resumes it.
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,8s/^# //p' "$0"; exit 2; }
source "$(dirname "$0")/common.sh" mnist
[ $# -gt 0 ] || { smoke_run --mbs 5 --thirdphase --betas 0 0.5 --optim adam --lrs 1e-3 1e-3 && set -- "$run" --budget quick; }
run=$1
shift
for norm in 2 inf; do
    [ $norm = 2 ] && eps=${EPS_2:-1.0} || eps=${EPS_INF:-0.1}
    suite main.py --todo audit --load-path "$run" --attack-norm $norm --eps "$eps" "$@"
    [ "${SMOKE:-}" != 1 ] || break # the other norm runs the same command
done
