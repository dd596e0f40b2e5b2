#!/usr/bin/env bash
# Table 3: FID of NVAE with and without heads on CelebA-HQ-256 and on LSUN-Church-64. Batch norm is
# adjusted to the prior's samples, as in the paper on CelebA-HQ-256. One call per data set.
#
# Data: what the checkpoint was trained on, or DATA.
# Cost: 4 minutes.
# Needs: a checkpoint.pt of NVAE and its images, and pytorch-fid's download of Inception.
#   CKPT=nvae_celeba_256.pt DATA=celeba-hq/ OUT=runs/celeba N=30000 DEVICE=cuda table3.sh
#   CKPT=nvae_church.pt DATA=lsun_church_64 OUT=runs/church N=50000 DEVICE=cuda table3.sh
# Instead: the shipped NVAE of scikit-learn's digits, which needs no download at all.
set -euo pipefail
. "$(dirname "$0")/lib.sh"
OUT=${OUT:-runs/paper/table3} N=${N:-1500}
stage_two "${CKPT:-$ROOT/checkpoints/nvae_digits/checkpoint.pt}" --readjust-bn
