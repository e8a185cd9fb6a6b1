#!/usr/bin/env bash
# Trains the published CIFAR-10 network by symmetric EP with cross-entropy; two GPUs (or GPUS=N)
# share each mini-batch.
# Needs: N NVIDIA GPUs of one machine with 10 GB each, about 1/N of the time of one GPU. DATA=...
# sets the data folder.
# Output: a run folder in results/. Further flags are passed on. Other recipes: GPUS=N bash
# check/train_cifar10.sh NAME
export GPUS=${GPUS:-2}
exec bash "$(dirname "$0")/train_cifar10.sh" ep-symmetric-cel "$@"
