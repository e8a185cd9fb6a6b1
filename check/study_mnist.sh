#!/usr/bin/env bash
# Runs a whole study on MNIST: small CNNs trained by EP, by BPTT and by EP with adversarial
# training, feed-forward CNNs without and with adversarial training, three seeds each; PGD over eps,
# audits at two eps; one table and figures:
#     bash check/study_mnist.sh
# Needs: two CPU cores and an hour and a half. DATA=... sets the folder of MNIST, PROCESSES=... the
# number of processes (2), one thread each.
# Output: results/study_mnist (STUDY=... sets another folder). Repeating the command resumes it.
source "$(dirname "$0")/common.sh" mnist
GPUS=0 processes=${PROCESSES:-2}
if [ "${SMOKE:-}" = 1 ]; then
    seeds=0 all_eps=(2) held_out=20
else
    seeds="1 2 3" all_eps=(1 2) held_out=2000
    data=$(absolute "$data")
    enter "$(absolute "${STUDY:-results/study_mnist}")" "" "$data"
fi

# 8,000 training images; model.pt is chosen on 2,000 further images; test images are used only for
# the results
common="--task MNIST --data-dir '$data' --train-size 10000 --val-size $held_out --test-size 2000 \
    --channels 16 32 --kernels 5 5 --strides 1 1 --paddings 0 0 --pools mm --fc 10 --loss cel --mbs 50 --epochs 3 --optim adam --save"
energy="--model CNN --act my_hard_sig --softmax --schedule async --T1 20 --T2 6 --lrs 3e-3 3e-3 3e-3"
forward="--model FFCNN --alg BP --lrs 1e-3 1e-3 1e-3"
adversarial="--adv-train 2 --adv-iters 5"
for seed in $seeds; do
    for line in "$energy --alg EP --thirdphase --betas 0 1 $adversarial --adv-step 10 --adv-grad ep" \
            "$energy --alg EP --thirdphase --betas 0 1" "$energy --alg BPTT" "$forward" "$forward $adversarial"; do
        echo "$common $line --seeds $seed"
    done
done | side_by_side

for run in $(runs); do
    for eps in "${all_eps[@]}"; do
        echo "--todo audit --load-path $run --attack-norm 2 --eps $eps --test-size 50 --budget quick"
    done
    echo "--todo attack --load-path $run --attack-norm 2 --eps-list 1/2 1 2 3 --test-size 200 --attack-iters 10 $(
        [[ $run == results/BP/* ]] || echo --attack-step 15 --attack-grad bptt smooth)"
done | side_by_side
for run in $(runs CNN); do
    echo "--todo characteristic --load-path $run --T1 60 --test-size 1000"
done | side_by_side
suite main.py --todo compare --load-path $(runs)
