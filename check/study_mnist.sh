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
    all_eps=(2) held_out=20
else
    all_eps=(1 2) held_out=2000
    data=$(absolute "$data")
    enter "$(absolute "${STUDY:-results/study_mnist}")" "$data"
fi

# 8,000 training images; model.pt is chosen on 2,000 further images; test images are used only for
# the results
adversarial="--adv-train 2 --adv-iters 5"
share --todo study --task MNIST --data-dir "$data" --train-size 10000 --val-size $held_out --test-size 200 \
    --model CNN --channels 16 32 --kernels 5 5 --strides 1 1 --paddings 0 0 --pools mm --fc 10 --act my_hard_sig \
    --loss cel --softmax --schedule async --T1 20 --T2 6 --thirdphase --betas 0 1 --mbs 50 --epochs 3 --optim adam --lrs 3e-3 3e-3 3e-3 \
    --models EP BPTT "EP $adversarial --adv-step 10 --adv-grad ep" \
    "FFCNN:BP --lrs 1e-3 1e-3 1e-3" "FFCNN:BP --lrs 1e-3 1e-3 1e-3 $adversarial" \
    --seeds 1 2 3 --attack-norm 2 --eps 1/2 1 2 3 --attack-iters 10 --attack-step 15
for eps in "${all_eps[@]}"; do
    echo "--todo audit --load-path results --attack-norm 2 --eps $eps --test-size 50 --budget quick"
done | side_by_side
echo "--todo characteristic --load-path results/EP results/BPTT --T1 60 --test-size 1000" | side_by_side
suite main.py --todo compare --load-path results/EP results
