#!/usr/bin/env bash
# Trains a published CIFAR-10 recipe:
#     bash check/train_cifar10.sh ep-symmetric-cel [further flags]
# Recipes: tied weights (EP one-sided, with random sign, symmetric; BPTT), both losses, dropout, and
# untied feedback weights.
# Needs: an NVIDIA GPU with 10 GB (dropout-bptt: more), days per recipe of 40 to 120 epochs. GPUS=N
# uses N GPUs. DATA=... sets the data folder. Output: a run folder in results/. Without a name it
# lists the names.
names=$(sed -n 's/^        \([a-z-]*\)) .*/\1/p' "$0")
[ $# -gt 0 ] || [ "${SMOKE:-}" = 1 ] || { echo "$names"; exit 2; }
source "$(dirname "$0")/common.sh" cifar
[ -z "${GPUS:-}" ] || launcher=("$python" -m torch.distributed.run --standalone --nproc_per_node "$GPUS")
common=(--task CIFAR10 --data-dir "$data" --data-aug --channels 128 256 512 512 --kernels 3 3 3 3 --pools mmmm
    --strides 1 1 1 1 --paddings 1 1 1 0 --fc 10 --optim sgd --lrs 0.25 0.15 0.1 0.08 0.05 --wds 3e-4 3e-4 3e-4 3e-4 3e-4
    --mmt 0.9 --lr-decay --act my_hard_sig --T1 250 --mbs 128 --device 0 --save)
mse=(--T2 30 --loss mse --betas 0.0 0.5)
cel=(--T2 25 --loss cel --softmax --betas 0.0 1.0)
vf=(--model VFCNN --T2 30 --loss cel --softmax --betas 0.0 1.0 --epochs 120)
dropouts=(--dropouts 1.0 1.0 1.0 0.9 1.0)
recipe() {
    program=main.py
    case "$1" in
        ep-one-sided-mse) line=(--model CNN "${mse[@]}" --alg EP --epochs 120) ;;
        ep-random-sign-mse) line=(--model CNN "${mse[@]}" --alg EP --random-sign --epochs 120) ;;
        ep-symmetric-mse) line=(--model CNN "${mse[@]}" --alg EP --thirdphase --epochs 40) ;;
        bptt-mse) line=(--model CNN "${mse[@]}" --alg BPTT --epochs 40) ;;
        ep-random-sign-cel) line=(--model CNN --T2 30 --loss cel --betas 0.0 1.0 --alg EP --random-sign --epochs 120) ;;
        ep-symmetric-cel) line=(--model CNN "${cel[@]}" --alg EP --thirdphase --epochs 120) ;;
        bptt-cel) line=(--model CNN "${cel[@]}" --alg BPTT --epochs 120) ;;
        dropout-ep) program=main_dropout.py line=(--model CNN "${cel[@]}" "${dropouts[@]}" --alg EP --thirdphase --epochs 120) ;;
        dropout-bptt) program=main_dropout.py line=(--model CNN "${cel[@]}" "${dropouts[@]}" --alg BPTT --epochs 120) ;;
        vf-different) line=("${vf[@]}" --alg EP --thirdphase) ;;
        vf-same) line=("${vf[@]}" --alg EP --thirdphase --same-update) ;;
        vf-bptt) line=("${vf[@]}" --alg BPTT) ;;
        *) echo "$names"; exit 2 ;;
    esac
}
if [ $# -gt 0 ]; then
    recipe "$1"
    last $program "${common[@]}" "${line[@]}" "${@:2}"
else
    for name in $names; do
        recipe "$name"
        suite $program "${common[@]}" "${line[@]}"
    done
fi
