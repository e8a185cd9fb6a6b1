#!/usr/bin/env bash
# The published CIFAR-10 recipes: symmetric connections (EP one-sided, random sign, symmetric; BPTT), both losses, and separate
# backward weights. Needs: an NVIDIA GPU with 10 GB; each line is a run of 40 to 120 epochs, days on one GPU: start one at a time,
#   bash check/train_cifar10.sh ep-symmetric-cel [further flags]
# DATA=... names the data folder. Without a name the names are listed.
set -euo pipefail
cd "$(dirname "$0")/.."
common=(--task CIFAR10 --data-dir "${DATA:-./data}" --data-aug --channels 128 256 512 512 --kernels 3 3 3 3 --pools mmmm
    --strides 1 1 1 1 --paddings 1 1 1 0 --fc 10 --optim sgd --lrs 0.25 0.15 0.1 0.08 0.05 --wds 3e-4 3e-4 3e-4 3e-4 3e-4
    --mmt 0.9 --lr-decay --act my_hard_sig --T1 250 --mbs 128 --device 0 --save)
mse=(--T2 30 --loss mse --betas 0.0 0.5)
cel=(--T2 25 --loss cel --softmax --betas 0.0 1.0)
vf=(--model VFCNN --T2 30 --loss cel --softmax --betas 0.0 1.0 --epochs 120)
case "${1:-}" in
    ep-one-sided-mse) line=(--model CNN "${mse[@]}" --alg EP --epochs 120) ;;
    ep-random-sign-mse) line=(--model CNN "${mse[@]}" --alg EP --random-sign --epochs 120) ;;
    ep-symmetric-mse) line=(--model CNN "${mse[@]}" --alg EP --thirdphase --epochs 40) ;;
    bptt-mse) line=(--model CNN "${mse[@]}" --alg BPTT --epochs 40) ;;
    ep-random-sign-cel) line=(--model CNN --T2 30 --loss cel --betas 0.0 1.0 --alg EP --random-sign --epochs 120) ;;
    ep-symmetric-cel) line=(--model CNN "${cel[@]}" --alg EP --thirdphase --epochs 120) ;;
    bptt-cel) line=(--model CNN "${cel[@]}" --alg BPTT --epochs 120) ;;
    vf-different) line=("${vf[@]}" --alg EP --thirdphase) ;;
    vf-same) line=("${vf[@]}" --alg EP --thirdphase --same-update) ;;
    vf-bptt) line=("${vf[@]}" --alg BPTT) ;;
    *) sed -n 's/^    \([a-z-]*\)) .*/\1/p' "$0"; exit 2 ;;
esac
shift
bash check/setup.sh
exec .venv/bin/python main.py "${common[@]}" "${line[@]}" "$@"
