#!/usr/bin/env bash
# Reproduces the whole paper on CIFAR-10:
#     bash check/paper_cifar10.sh [further flags that suit every model, e.g. --precision tf32]
# Trains EP, feed-forward CNNs without and with adversarial training at four eps, and a vision
# transformer, five seeds each; then runs the attacks of the published tables, audits, corruptions,
# accuracy over time steps, and the comparison, to which further flags do not apply.
# Needs: NVIDIA GPUs with 10 GB (GPUS=N, default 1). Predicted by benchmarks/roofline.py for one
# H100, not measured: EP training 27 hours (6 with --precision tf32), PGD on its models 40;
# ensembles and audits are not predicted. Repeating the command resumes it.
# ONLY="train attack" selects stages. DATA=... sets the folder of CIFAR-10, CORRUPTIONS=... the
# folder of CIFAR-10-C, which is not downloaded; without it the stage corruptions is skipped.
# Output: results/paper_cifar10 (PAPER=... sets another folder), with one table and figures;
# published curves are dashed.
source "$(dirname "$0")/common.sh" cifar
GPUS=${GPUS:-1} stages="train attack audit corruptions characteristic compare"
[[ $GPUS =~ ^[0-9]+$ ]] || complain "GPUS=$GPUS: expected a number"
processes=$((GPUS > 0 ? GPUS : 1)) only=${ONLY:-$stages}
for name in $only; do
    [[ " $stages " == *" $name "* ]] || complain "ONLY=$name: unknown stage; choose from $stages"
done
stage() { [[ " $only " == *" $1 "* ]]; }
seeds="11 13 17 19 31" strengths="0.05 0.5 0.75 1" norms="2 inf" small="" budget=standard
if [ "${SMOKE:-}" = 1 ]; then
    seeds=0 strengths=1 norms=2 CORRUPTIONS=data/CIFAR-10-C small="--depth 1 --width 8 --mlp-width 8" budget=quick
else
    data=$(absolute "$data")
    CORRUPTIONS=$(absolute "${CORRUPTIONS:-$data/CIFAR-10-C}")
    enter "$(absolute "${PAPER:-results/paper_cifar10}")" "$*" "$data" "$CORRUPTIONS"
    if stage corruptions && [ ! -d "$CORRUPTIONS" ]; then
        echo "skipping the stage corruptions: $CORRUPTIONS does not exist" >&2
        only=${only/corruptions/}
    fi
fi
further=$([ $# = 0 ] || printf "'%s' " "$@")
each() { # prints the given flags for every run of a model
    local run
    for run in $(runs "$1"); do
        echo "--load-path $run ${*:2} $further"
    done
}

common="--task CIFAR10 --data-dir '$data' --data-aug --loss cel --save"
convolutions="--channels 128 256 512 512 --kernels 3 3 3 3 --pools mmmm --strides 1 1 1 1 --paddings 1 1 1 0 --fc 10"
ep="--model CNN $convolutions --alg EP --thirdphase --softmax --T1 250 --T2 30 --betas 0.0 0.5 --act my_hard_sig --mbs 128 --epochs 120 \
    --optim sgd --lrs 0.25 0.15 0.1 0.08 0.05 --wds 3e-4 3e-4 3e-4 3e-4 3e-4 --mmt 0.9 --lr-decay"
forward="--model FFCNN $convolutions --alg BP --mbs 128 --epochs 50 --optim sgd --lrs 0.1 0.1 0.1 0.1 0.1 --mmt 0.9 --lr-step 8 0.3"
vit="--model ViT --alg BP --patch 4 $small --mbs 128 --epochs 200 --optim adam --lrs 5e-4"
if stage train; then
    for seed in $seeds; do
        echo "$common $ep --seeds $seed $further"
        for strength in $strengths; do
            echo "$common $forward --adv-train $strength --seeds $seed $further"
        done
        echo "$common $forward --seeds $seed $further"
        echo "$common $vit --seeds $seed $further"
    done | side_by_side
fi
[ -n "$(runs)" ] || complain "no complete training in $PWD; run the stage train first"
if stage attack; then
    for norm in $norms; do
        each CNN --todo attack --attack pgd --attack-norm $norm --attack-step 10 15 20 25 29 60 70 --no-clip
        for model in FFCNN ViT; do
            each $model --todo attack --attack pgd --attack-norm $norm --no-clip
        done
        for model in CNN FFCNN ViT; do
            each $model --todo attack --attack square --attack-norm $norm --attack-queries 1000 --test-size 200
        done
    done | side_by_side
    for model in CNN FFCNN ViT; do
        each $model --todo attack --attack art-autoattack --attack-norm inf --test-size 200
    done | side_by_side
fi
if stage audit; then
    for model in CNN FFCNN ViT; do
        for norm in $norms; do
            [ $norm = 2 ] && eps=0.5 || eps=8/255
            each $model --todo audit --attack-norm $norm --eps $eps --test-size 1000 --budget $budget
        done
    done | side_by_side
fi
if stage corruptions; then
    for model in CNN FFCNN ViT; do
        each $model --todo corruptions --corruptions-dir "'$CORRUPTIONS'"
    done | side_by_side
fi
if stage characteristic; then
    each CNN --todo characteristic --T1 250 | side_by_side
fi
if stage compare; then
    suite main.py --todo compare --load-path $(runs) --published "$root"/check/published/*.csv
fi
