#!/usr/bin/env bash
# Dense models on MNIST: EP one-sided, random sign, symmetric, BPTT, and separate backward weights.
# Needs: any CPU, about 15 s a line and epoch on two cores. MNIST is downloaded to ./data, or: DATA=... names its folder.
# Further flags are passed on to every line, e.g.  bash check/train_mnist.sh --epochs 50 --device 0
source "$(dirname "$0")/common.sh" mnist
common=(--task MNIST --data-dir "$data" --archi 784 512 10 --act mysig --loss mse --optim adam --lrs 5e-4 5e-4
    --T1 30 --T2 10 --mbs 50 --epochs 2 --device -1 --save)
train() { suite main.py "${common[@]}" "$@"; }
train --model MLP --alg EP --betas 0.0 0.1 "$@"
train --model MLP --alg EP --betas 0.0 0.1 --random-sign "$@"
train --model MLP --alg EP --betas 0.0 0.1 --thirdphase "$@"
train --model MLP --alg BPTT "$@"
train --model VFMLP --alg EP --betas 0.0 0.5 --thirdphase --lrs 1e-3 2e-4 "$@"
