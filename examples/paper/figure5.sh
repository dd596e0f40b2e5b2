#!/usr/bin/env bash
# Figure 5: images along the Langevin chains of the prior, from the Gaussian prior's on the left.
#
# Data: none.
# Cost: 7 seconds of processor time.
# Needs: heads on an NVAE of CIFAR-10: CKPT=nvae_cifar.pt table2.sh, then
#   HEADS=runs/paper/table2/joint figure5.sh
# Instead: the shipped NVAE of MNIST and its heads.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure5}
ebm-prior sample --heads "${HEADS:-$ROOT/checkpoints/nvae_mnist/heads}" --steps "${STEPS:-40}" \
  -n "${N:-64}" --compare --out "$OUT/samples.png" --trajectory "$OUT/figure5.png" \
  --device "$DEVICE"
