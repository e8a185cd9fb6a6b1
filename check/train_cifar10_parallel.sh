#!/usr/bin/env bash
# The published CIFAR-10 network by symmetric EP with the cross-entropy, each mini-batch shared between GPUs: two, or GPUS=N of them.
# Needs: N NVIDIA GPUs of one machine with 10 GB each, about 1/N of the days that one takes. DATA=... names the data folder.
# Further flags are passed on. Other recipes: GPUS=N bash check/train_cifar10.sh NAME
export GPUS=${GPUS:-2}
exec bash "$(dirname "$0")/train_cifar10.sh" ep-symmetric-cel "$@"
