#!/usr/bin/env bash
# Figure 12: hierarchical reconstruction: held-out images whose lower latents come from the prior
# in place of q(z|x), from the bottom group alone to all of them.
#
# Data: the test images numbered IMAGES of what the heads were fitted for, or of DATA.
# Cost: 6 seconds of processor time.
# Needs: heads on a BIVA of CelebA-64, ebm-prior fit --ckpt SESSION --out FOLDER; HEADS=FOLDER.
# Instead: the shipped BIVA of MNIST and its heads.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure12}
ebm-prior hierarchy ${IMAGES:-0 1 2 3} --heads "${HEADS:-$ROOT/checkpoints/biva_mnist/heads}" \
  ${DATA:+--data "$DATA"} --out "$OUT/figure12.png" --device "$DEVICE"
