#!/usr/bin/env bash
# Trains dense models on MNIST: EP one-sided, with random sign, symmetric; BPTT; untied feedback
# weights.
# Needs: any CPU, about 15 s per command and epoch on two cores. MNIST is downloaded to ./data, or
# to DATA=...
# Output: run folders in results/. Further flags apply to every command, e.g.
#     bash check/train_mnist.sh --epochs 50 --device 0
source "$(dirname "$0")/common.sh" mnist
common=(--task MNIST --data-dir "$data" --archi 784 512 10 --act mysig --loss mse --optim adam --lrs 5e-4 5e-4
    --T1 30 --T2 10 --mbs 50 --epochs 2 --device -1 --save)
train() { suite main.py "${common[@]}" "$@"; }
train --model MLP --alg EP --betas 0.0 0.1 "$@"
train --model MLP --alg EP --betas 0.0 0.1 --random-sign "$@"
train --model MLP --alg EP --betas 0.0 0.1 --thirdphase "$@"
train --model MLP --alg BPTT "$@"
train --model VFMLP --alg EP --betas 0.0 0.5 --thirdphase --lrs 1e-3 2e-4 "$@"
