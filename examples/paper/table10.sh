#!/usr/bin/env bash
# Table 10: FID and parameters of NVAE with a Gaussian decoder, with and without heads.
#
# Data: DATA, CIFAR-10 by default, as in the paper; also CelebA-HQ-256 there.
# Cost: hours on two cores, most of them for the backbone.
# Needs: CKPT, a checkpoint.pt of NVAE with num_mixture_dec 1, 30 groups in the paper; the download
#   of DATA, and pytorch-fid's of Inception, or FEATURES.
# Instead: a small NVAE, trained first for ITERATIONS (6000): no shipped one has colours.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/table10} N=${N:-2000} DATA=${DATA:-cifar10} resume=
if [ -z "${CKPT:-}" ]; then
  CKPT=$OUT/backbone/checkpoint.pt
  if [ -e "$OUT/backbone/state.safetensors" ]; then resume=--resume; fi
  if [ ! -e "$CKPT" ]; then
    ebm-prior pretrain --backbone nvae --data "$DATA" --out "$OUT/backbone" --device "$DEVICE" \
      --set mixtures=1 --set iterations="${ITERATIONS:-6000}" $resume
  fi
fi
ebm-prior info "$CKPT"
stage_two "$CKPT"
for kind in ${KINDS:-factorized joint}; do ebm-prior info "$OUT/$kind"; done
