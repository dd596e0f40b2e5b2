#!/usr/bin/env bash
# Table 2: inception score and FID of NVAE on CIFAR-10, with its Gaussian prior and with heads
# fitted on the frozen model. The paper's heads are factorized; joint is this library's default.
#
# Data: what the checkpoint was trained on, or DATA.
# Cost: 13 minutes of one core: two fits, 3 and 7, and the distances.
# Needs: CKPT=nvae_cifar.pt, a checkpoint.pt as NVAE's own code writes it, and for colour images
#   pytorch-fid's download of Inception, or FEATURES.
#   CKPT=nvae_cifar.pt N=50000 DEVICE=cuda FIT="--preset paper" KINDS=factorized table2.sh
# Instead: the shipped NVAE of MNIST on the features of the shipped MNIST classifier.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/table2} N=${N:-2000}
stage_two "${CKPT:-$ROOT/checkpoints/nvae_mnist/checkpoint.pt}"
