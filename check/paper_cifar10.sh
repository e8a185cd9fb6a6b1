#!/usr/bin/env bash
# Reproduces the whole paper on CIFAR-10:
#     bash check/paper_cifar10.sh [further flags of the study, e.g. --precision tf32]
# Trains EP, feed-forward CNNs without and with adversarial training at four eps, and a vision
# transformer, five seeds each; then runs the attacks of the published tables, audits, corruptions,
# accuracy over time steps, and the comparison.
# Needs: NVIDIA GPUs with 10 GB (GPUS=N, default 1, with a process each). Predicted by
# benchmarks/roofline.py for one H100, not measured: EP training 27 hours (6 with --precision tf32),
# PGD on its models 40; ensembles and audits are not predicted. Repeating the command resumes it.
# ONLY="study attack" selects stages. DATA=... sets the folder of CIFAR-10, CORRUPTIONS=... the
# folder of CIFAR-10-C, which is not downloaded; without it the stage corruptions is skipped.
# Output: results/paper_cifar10 (PAPER=... sets another folder), with one table and figures;
# published curves are dashed.
source "$(dirname "$0")/common.sh" cifar
GPUS=${GPUS:-1} stages="study attack audit corruptions characteristic compare"
[[ $GPUS =~ ^[0-9]+$ ]] || complain "GPUS=$GPUS: expected a number"
processes=$((GPUS > 0 ? GPUS : 1)) only=${ONLY:-$stages}
for name in $only; do
    [[ " $stages " == *" $name "* ]] || complain "ONLY=$name: unknown stage; choose from $stages"
done
stage() { [[ " $only " == *" $1 "* ]]; }
strengths="0.05 0.5 0.75 1" ep_epochs=120 ff_epochs=50 vit_epochs=200 small="" budget=standard
if [ "${SMOKE:-}" = 1 ]; then
    strengths=1 ep_epochs=1 ff_epochs=1 vit_epochs=1 small="--depth 1 --width 8 --mlp-width 8" budget=quick
    CORRUPTIONS=data/CIFAR-10-C
else
    data=$(absolute "$data")
    CORRUPTIONS=$(absolute "${CORRUPTIONS:-$data/CIFAR-10-C}")
    enter "$(absolute "${PAPER:-results/paper_cifar10}")" "$data" "$CORRUPTIONS" "$@"
    if stage corruptions && [ ! -d "$CORRUPTIONS" ]; then
        echo "skipping the stage corruptions: $CORRUPTIONS does not exist" >&2
        only=${only/corruptions/}
    fi
fi

forward="FFCNN:BP --epochs $ff_epochs --lrs 0.1 0.1 0.1 0.1 0.1 --mmt 0.9 --lr-step 8 0.3"
models=("EP --epochs $ep_epochs --lrs 0.25 0.15 0.1 0.08 0.05 --wds 3e-4 3e-4 3e-4 3e-4 3e-4 --mmt 0.9 --lr-decay" "$forward")
for strength in $strengths; do models+=("$forward --adv-train $strength"); done
models+=("ViT:BP --patch 4 $small --epochs $vit_epochs --optim adam --lrs 5e-4")
study() { # trains what is missing; the attack of the published tables in a norm
    share --todo study --task CIFAR10 --data-dir "$data" --data-aug --loss cel --mbs 128 \
        --model CNN --channels 128 256 512 512 --kernels 3 3 3 3 --pools mmmm --strides 1 1 1 1 --paddings 1 1 1 0 --fc 10 \
        --act my_hard_sig --softmax --T1 250 --T2 30 --thirdphase --betas 0.0 0.5 --models "${models[@]}" --seeds 11 13 17 19 31 \
        --attack pgd --no-clip --attack-grad bptt --attack-step 10 15 20 25 29 60 70 --attack-norm "$@"
}
attack() { echo "--todo attack --load-path results --test-size 200 --attack $*"; }
audit() { echo "--todo audit --load-path results --test-size 1000 --budget $budget --attack-norm $*"; }

if stage study; then
    study 2 --eps 0.05 0.078803 0.124198 0.195743 0.308503 0.486219 0.766309 1 1.20775 1.90348 3 "$@"
    study inf --eps 0.0001 0.000215 0.000464 0.001 0.002154 0.004642 0.01 0.021544 8/255 0.046416 0.1 "$@"
fi
if stage attack; then
    { attack square --attack-norm 2 --attack-queries 1000; attack square --attack-norm inf --attack-queries 1000
        attack art-autoattack --attack-norm inf; } | side_by_side
fi
if stage audit; then
    { audit 2 --eps 0.5; audit inf --eps 8/255; } | side_by_side
fi
if stage corruptions; then
    echo "--todo corruptions --load-path results --corruptions-dir '$CORRUPTIONS'" | side_by_side
fi
if stage characteristic; then
    echo "--todo characteristic --load-path results/EP --T1 250" | side_by_side
fi
if stage compare; then
    suite main.py --todo compare --load-path results/EP results --published "$root"/check/published/*.csv
fi
