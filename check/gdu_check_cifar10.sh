#!/usr/bin/env bash
# Compares EP with BPTT on the published CIFAR-10 network, trained (bash check/gdu_check_cifar10.sh
# RUN) or untrained (without RUN).
# Needs: an NVIDIA GPU with 10 GB and a minute, or a CPU and some minutes (--device -1). DATA=...
# sets the data folder.
# Output: a table, a verdict, and figures in the run folder.
source "$(dirname "$0")/common.sh" cifar
common=(--todo gducheck --task CIFAR10 --data-dir "$data" --T1 250 --T2 15 --betas 0.0 0.1 --thirdphase --device 0 --save)
if [ $# -gt 0 ] && [ "${1#--}" = "$1" ]; then
    last main.py "${common[@]}" --load-path "$@"
else
    last main.py "${common[@]}" --model CNN --channels 128 256 512 512 --kernels 3 3 3 3 --pools mmmm --strides 1 1 1 1 \
        --paddings 1 1 1 0 --fc 10 --act my_hard_sig --loss mse --scale 0.5 "$@"
fi
