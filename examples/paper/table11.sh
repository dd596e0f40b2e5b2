#!/usr/bin/env bash
# Table 11: AUROC, AUPRC and FPR80 of L>k and LLR>k under the Gaussian and the energy prior, of
# BIVA trained on CIFAR-10, with SVHN as outliers.
#
# Data: the test images that the heads were fitted for, or DATA; outliers OUTLIERS.
# Cost: 2 minutes.
# Needs: heads on a BIVA of CIFAR-10, ebm-prior fit --ckpt SESSION --out FOLDER; then
#   HEADS=FOLDER OUTLIERS=svhn K=0,3,6,9 N=10000 table11.sh
# Instead: the shipped BIVA of MNIST and its heads, with Fashion-MNIST as outliers.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/table11} N=${N:-1000} OUTLIERS=${OUTLIERS:-fashion_mnist}
kept "$OUT/table11-n$N.txt" ebm-prior ood --heads "${HEADS:-$ROOT/checkpoints/biva_mnist/heads}" \
  ${DATA:+--in "$DATA"} --out "$OUTLIERS" ${K:+--k "$K"} -n "$N" --device "$DEVICE"
