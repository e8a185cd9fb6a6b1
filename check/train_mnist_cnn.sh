#!/usr/bin/env bash
# Trains small convolutional models on MNIST: symmetric EP and BPTT, squared error and
# cross-entropy, tied and untied feedback weights.
# Needs: a CPU, about 3 minutes per command and epoch on two cores (--train-size 10000: half a
# minute). DATA=... sets the folder of MNIST.
# Output: run folders in results/. Further flags apply to every command.
source "$(dirname "$0")/common.sh" mnist
common=(--task MNIST --data-dir "$data" --channels 16 32 --kernels 5 5 --strides 1 1 --paddings 0 0 --pools mm --fc 10
    --act my_hard_sig --optim adam --lrs 3e-3 3e-3 3e-3 --T1 20 --T2 8 --mbs 50 --epochs 2 --device -1 --save)
train() { suite main.py "${common[@]}" "$@"; }
train --model CNN --alg EP --thirdphase --betas 0.0 0.5 --loss mse "$@"
train --model CNN --alg EP --thirdphase --betas 0.0 1.0 --loss cel --softmax "$@"
train --model CNN --alg BPTT --loss mse --act mysig "$@"
train --model CNN --alg BPTT --loss cel --softmax "$@"
train --model VFCNN --alg EP --thirdphase --betas 0.0 1.0 --loss cel --softmax "$@"
train --model VFCNN --alg EP --thirdphase --betas 0.0 1.0 --loss cel --softmax --same-update "$@"
