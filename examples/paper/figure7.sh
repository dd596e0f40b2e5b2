#!/usr/bin/env bash
# Figure 7: hierarchical sampling: samples whose lower latents are drawn again, from the bottom
# group alone to all of them; the Gaussian prior on the left, the energy prior on the right.
#
# Data: none.
# Cost: 5 seconds of processor time.
# Needs: heads on a BIVA of CelebA-64, ebm-prior fit --ckpt SESSION --out FOLDER; HEADS=FOLDER.
# Instead: the shipped BIVA of MNIST and its heads.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure7}
ebm-prior hierarchy --heads "${HEADS:-$ROOT/checkpoints/biva_mnist/heads}" -n "${N:-2}" \
  --out "$OUT/figure7.png" --device "$DEVICE"
