#!/usr/bin/env bash
# EP against BPTT on an untrained MLP: two betas one-sided, and the larger one symmetric. Writes plots to the run folders it names.
# Needs: any CPU, a few seconds a line. DATA=... names MNIST's folder. Further flags are passed on to every line.
source "$(dirname "$0")/common.sh" mnist
common=(--todo gducheck --model MLP --task MNIST --data-dir "$data" --archi 784 512 10 --act tanh --loss mse --T1 30 --T2 10
    --device -1 --seed 0 --save)
suite main.py "${common[@]}" --betas 0.0 0.01 "$@"
suite main.py "${common[@]}" --betas 0.0 0.1 "$@"
suite main.py "${common[@]}" --betas 0.0 0.1 --thirdphase "$@"
