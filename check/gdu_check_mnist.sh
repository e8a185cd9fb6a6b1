#!/usr/bin/env bash
# Compares EP with BPTT on an untrained MLP: one-sided with two values of beta, and symmetric with
# the larger one.
# Needs: any CPU, a few seconds per command. DATA=... sets the folder of MNIST. Further flags are
# passed on to every command.
# Output: a table, a verdict, and figures in the run folders that it prints.
source "$(dirname "$0")/common.sh" mnist
common=(--todo gducheck --model MLP --task MNIST --data-dir "$data" --archi 784 512 10 --act tanh --loss mse --T1 30 --T2 10
    --device -1 --seed 0 --save)
suite main.py "${common[@]}" --betas 0.0 0.01 "$@"
suite main.py "${common[@]}" --betas 0.0 0.1 "$@"
suite main.py "${common[@]}" --betas 0.0 0.1 --thirdphase "$@"
