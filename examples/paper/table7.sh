#!/usr/bin/env bash
# Table 7: MCMC or an inference network for the posterior: Fréchet distance and seconds per
# iteration. Here both get the same minutes, in the paper the same iterations.
#
# Data: DATA, MNIST by default; SVHN, CelebA-64 and CIFAR-10 in the paper.
# Cost: 2 methods x MINUTES (3), both of which table1.sh trains; see there for the rest.
# Needs: as table1.sh, whose folder it shares.
# Instead: as table1.sh.
set -euo pipefail
python "$(dirname "$0")/compare.py" --tables 7 --data "${DATA:-mnist}" --minutes "${MINUTES:-3}" \
  --out "${OUT:-runs/paper/compare}" ${FEATURES:+--features "$FEATURES"} "$@"
