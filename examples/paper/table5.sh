#!/usr/bin/env bash
# Table 5: the joint EBM against Gaussian priors with 2, 4 and 8 times the generator's parameters.
#
# Data: DATA, MNIST by default; SVHN in the paper, where ours is Table 7's of inference (28.60).
# Cost: 5 methods x MINUTES (3), of which table1.sh trains two; see there for the rest.
# Needs: as table1.sh, whose folder it shares.
# Instead: as table1.sh.
set -euo pipefail
python "$(dirname "$0")/compare.py" --tables 5 --data "${DATA:-mnist}" --minutes "${MINUTES:-3}" \
  --out "${OUT:-runs/paper/compare}" ${FEATURES:+--features "$FEATURES"} "$@"
