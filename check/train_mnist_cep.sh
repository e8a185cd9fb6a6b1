#!/usr/bin/env bash
# Continual EP on MNIST, whose weights move at every step of the nudged phase: one-sided and symmetric.
# Needs: any CPU, about a quarter of a minute a line and epoch on two cores, half a minute for the symmetric one. MNIST is downloaded to ./data, or: DATA=... names its folder.
# Further flags are passed on to every line.
source "$(dirname "$0")/common.sh" mnist
common=(--task MNIST --data-dir "$data" --model MLP --archi 784 512 10 --act mysig --loss mse --alg CEP --optim sgd --lrs 0.005 0.005
    --T1 30 --T2 10 --betas 0.0 0.5 --mbs 50 --epochs 2 --device -1 --save)
suite main.py "${common[@]}" "$@"
suite main.py "${common[@]}" --thirdphase "$@"
