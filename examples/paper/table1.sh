#!/usr/bin/env bash
# Table 1: Fréchet distance of one image decoder below different priors: Gaussian, learned by
# inference or by MCMC (VAE, ABP), a classifier's tilt (as NCP-VAE), an EBM of one layer (LEBM),
# and the joint EBM of two layers (ours). RAE, 2s-VAE and the L=5 rows are not part of this. The
# second layer adds 61 % to the narrow generator's parameters, 1 % to the paper's.
#
# Data: DATA, MNIST by default. Of the paper: DATA=svhn, cifar10 or celeba, then with its sizes,
#   DATA=cifar10 MINUTES=600 table1.sh --device cuda --set ngf=128 -n 50000
# Cost: 6 methods x MINUTES (3), and about one more for each: timing, start, distances.
# Needs: the download of DATA; of colour images also pytorch-fid's of Inception, or FEATURES.
# Instead: MNIST in place of the colour images; in place of Inception, FEATURES=FILE of
#   python -m ebm_prior.metrics.classifier --data DATA --title NAME --out FILE
set -euo pipefail
python "$(dirname "$0")/compare.py" --tables 1 --data "${DATA:-mnist}" --minutes "${MINUTES:-3}" \
  --out "${OUT:-runs/paper/compare}" ${FEATURES:+--features "$FEATURES"} "$@"
