#!/usr/bin/env bash
# Runs the attacks of the published tables on a run:
#     bash check/attack_sweep.sh RUN [further flags]
# PGD in both norms, as published (images may leave [0, 1]) and clipped, with three gradient
# methods; FGSM, Auto-PGD, Square, AutoAttack.
# Needs: for the CIFAR-10 network an NVIDIA GPU with 10 GB and some hours; for a small model a CPU
# and minutes (--device -1).
# Output: tables of robust accuracy in RUN. Repeating the command resumes it. Add e.g. --test-size
# 1000 for a first estimate.
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,9s/^# //p' "$0"; exit 2; }
source "$(dirname "$0")/common.sh" mnist
[ $# -gt 0 ] || { smoke_run --mbs 5 --thirdphase --betas 0 0.5 --optim adam --lrs 1e-3 1e-3 && set -- "$run"; }
attack() { suite main.py --todo attack --load-path "$run" "$@"; }
run=$1
shift
for norm in 2 inf; do
    attack --attack pgd --attack-norm $norm --no-clip "$@"
    attack --attack pgd --attack-norm $norm --attack-grad bptt smooth ep --save "$@"
    for name in fgsm apgd-ce apgd-dlr square autoattack; do
        attack --attack $name --attack-norm $norm "$@"
    done
done
