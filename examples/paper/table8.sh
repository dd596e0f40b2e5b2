#!/usr/bin/env bash
# Table 8: 10, 20, 40, 80 and 100 Langevin steps of the prior in training, by MCMC: Fréchet
# distance and seconds per iteration. Here all get the same minutes, in the paper iterations.
#
# Data: DATA, MNIST by default; CIFAR-10 in the paper.
# Cost: 5 methods x MINUTES (3), of which table1.sh trains one; see there for the rest.
# Needs: as table1.sh, whose folder it shares.
# Instead: as table1.sh.
set -euo pipefail
python "$(dirname "$0")/compare.py" --tables 8 --data "${DATA:-mnist}" --minutes "${MINUTES:-3}" \
  --out "${OUT:-runs/paper/compare}" ${FEATURES:+--features "$FEATURES"} "$@"
