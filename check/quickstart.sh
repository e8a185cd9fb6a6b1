#!/usr/bin/env bash
# Trains an energy model with Equilibrium Propagation on the digits of scikit-learn.
# Needs: any CPU, half a minute, and the set-up the first time. Further flags are passed on to
# main.py. Output: a run folder in results/.
source "$(dirname "$0")/common.sh" mnist
last main.py --task digits --model MLP --archi 784 512 10 --act mysig --loss mse --alg EP --thirdphase \
    --T1 30 --T2 10 --betas 0.0 0.1 --optim adam --lrs 5e-4 5e-4 --mbs 20 --epochs 20 --seed 1 --device -1 --save "$@"
