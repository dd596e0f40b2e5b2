#!/usr/bin/env bash
# Figure 2: two layers of two latents each on the digits 0 and 1: chains of the prior every ten of
# their 40 steps, beside the posterior.
#
# Data: DATA, the zeros and ones of MNIST, as in the paper; DATA=mnist.npz:0,1 for a file.
# Cost: 2 minutes.
# Needs: the download of MNIST. ITERATIONS is not stated in the paper.
# Instead: the paper's data and model, learned in few iterations at higher rates; at the trainer's own,
#   GENERATOR_LR=1e-4 HEADS_LR=2e-5 ITERATIONS=10000 figure2.sh
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure2}
once train "$OUT/run" --data "${DATA:-mnist:0,1}" --preset figure2 \
  --set iterations="${ITERATIONS:-1200}" --set ngf="${NGF:-16}" \
  --set generator_lr="${GENERATOR_LR:-0.001}" --set heads_lr="${HEADS_LR:-0.0005}"
ebm-prior chains --heads "$OUT/run" --steps 40 --at 0,10,20,30,40 -n "${N:-400}" --out "$OUT" \
  --device "$DEVICE"
echo "Figure 2 -> $OUT/chains-latents.png"
