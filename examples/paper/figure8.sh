#!/usr/bin/env bash
# Figure 8: chains of 100 and of 2500 steps of a prior that was trained with 40: images and energy
# on the way. The paper's model is trained by MCMC.
#
# Data: DATA, MNIST by default; CelebA-64 in the paper.
# Cost: 5 minutes.
# Needs: the download of DATA. As the paper:
#   DATA=celeba METHOD=mle NGF=128 NDF=200 BATCH=100 GENERATOR_LR=1e-4 HEADS_LR=2e-5 \
#     ITERATIONS=50000 DEVICE=cuda figure8.sh
# Instead: "ours, inference" of table1.sh: a narrow generator that learns by inference, which is
#   faster, in few iterations at higher rates.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure8}
once train "$OUT/run" --data "${DATA:-mnist}" --method "${METHOD:-variational}" \
  --set ngf="${NGF:-16}" --set ndf="${NDF:-100}" --set batch_size="${BATCH:-32}" \
  --set generator_lr="${GENERATOR_LR:-0.001}" --set heads_lr="${HEADS_LR:-0.0001}" \
  --set iterations="${ITERATIONS:-2700}"
ebm-prior chains --heads "$OUT/run" --steps "${STEPS:-2500}" -n "${N:-64}" --out "$OUT" \
  --device "$DEVICE"
echo "Figure 8 -> $OUT/chains.png, $OUT/chains-energy.png"
