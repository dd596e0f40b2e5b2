#!/usr/bin/env bash
# Table 6: heads of 10, 20, 50 and 100 hidden units on the same generator, by MCMC.
#
# Data: DATA, MNIST by default; CIFAR-10 in the paper.
# Cost: 4 methods x MINUTES (3), of which table1.sh trains one; see there for the rest.
# Needs: as table1.sh, whose folder it shares.
# Instead: as table1.sh.
set -euo pipefail
python "$(dirname "$0")/compare.py" --tables 6 --data "${DATA:-mnist}" --minutes "${MINUTES:-3}" \
  --out "${OUT:-runs/paper/compare}" ${FEATURES:+--features "$FEATURES"} "$@"
