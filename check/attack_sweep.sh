#!/usr/bin/env bash
# The attacks of the published tables on a run:  bash check/attack_sweep.sh RUN [further flags]
# PGD in both norms, as published (images may leave [0, 1]) and clipped, with every way to get gradients; Auto-PGD, Square, AutoAttack.
# Needs: for the CIFAR-10 network an NVIDIA GPU with 10 GB and some hours; for a small model a CPU and minutes. A sweep that was
# stopped goes on where it was when started again. Add e.g. --test-size 1000 for a first look, --device -1 for the CPU.
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { sed -n '2,5s/^# //p' "$0"; exit 2; }
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
