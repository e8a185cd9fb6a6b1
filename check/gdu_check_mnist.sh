#!/usr/bin/env bash
# EP against BPTT on an untrained MLP: two betas one-sided, and the larger one symmetric. Writes plots to the run folders it names.
# Needs: any CPU, a few seconds a line. DATA=... names MNIST's folder. Further flags are passed on to every line.
set -euo pipefail
cd "$(dirname "$0")/.."
bash check/setup.sh
common=(--todo gducheck --model MLP --task MNIST --data-dir "${DATA:-./data}" --archi 784 512 10 --act tanh --loss mse --T1 30 --T2 10
    --device -1 --seed 0 --save)
.venv/bin/python main.py "${common[@]}" --betas 0.0 0.01 "$@"
.venv/bin/python main.py "${common[@]}" --betas 0.0 0.1 "$@"
.venv/bin/python main.py "${common[@]}" --betas 0.0 0.1 --thirdphase "$@"
