#!/usr/bin/env bash
# Trains MLPs on MNIST by continual EP, which changes the weights at every step of the nudged phase:
# one-sided and symmetric.
# Needs: any CPU, about 15 s per epoch on two cores, 30 s for the symmetric one. MNIST is downloaded
# to ./data, or to DATA=...
# Output: run folders in results/. Further flags apply to every command.
source "$(dirname "$0")/common.sh" mnist
common=(--task MNIST --data-dir "$data" --model MLP --archi 784 512 10 --act mysig --loss mse --alg CEP --optim sgd --lrs 0.005 0.005
    --T1 30 --T2 10 --betas 0.0 0.5 --mbs 50 --epochs 2 --device -1 --save)
suite main.py "${common[@]}" "$@"
suite main.py "${common[@]}" --thirdphase "$@"
