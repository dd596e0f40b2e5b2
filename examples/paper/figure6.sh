#!/usr/bin/env bash
# Figure 6: histograms of L>k for images of the training's kind and for outliers, at growing k.
#
# Data: the test images that the heads were fitted for, or DATA; outliers OUTLIERS.
# Cost: 2 minutes.
# Needs: as table11.sh, whose numbers these are.
# Instead: the shipped BIVA of MNIST and its heads, with Fashion-MNIST as outliers.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/figure6}
ebm-prior ood --heads "${HEADS:-$ROOT/checkpoints/biva_mnist/heads}" ${DATA:+--in "$DATA"} \
  --out "${OUTLIERS:-fashion_mnist}" ${K:+--k "$K"} -n "${N:-1000}" --device "$DEVICE" \
  --plot "$OUT/figure6.png"
