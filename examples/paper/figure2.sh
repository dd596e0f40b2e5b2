#!/usr/bin/env bash
# Figure 2: two layers of two latents each on the digits 0 and 1: chains of the prior every ten of
# their 40 steps, beside the posterior.
#
# Data: DATA, the zeros and ones of MNIST, as in the paper; DATA=mnist.npz:0,1 for a file.
# Cost: not measured.
# Needs: the download of MNIST. ITERATIONS is not stated in the paper.
# Instead: nothing, it is the paper's data and model.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure2}
once train "$OUT/run" --data "${DATA:-mnist:0,1}" --preset figure2 \
  --set iterations="${ITERATIONS:-10000}" --set ngf="${NGF:-16}"
ebm-prior chains --heads "$OUT/run" --steps 40 --at 0,10,20,30,40 -n "${N:-500}" --out "$OUT" \
  --device "$DEVICE"
echo "Figure 2 -> $OUT/chains-latents.png"
