"""How well chains mix: effective sample size and split R-hat of scalar summaries.

A chain lives in thousands of dimensions, so it is judged by a few numbers per state: its
energy E, its half squared norm |eps|^2 / 2, and its projections <u, eps> on fixed random unit
vectors u. Both diagnostics are rank-normalised and split every chain in halves; they are
those of Vehtari, Gelman, Simpson, Carpenter and Buerkner, "Rank-normalization, folding, and
localization: an improved R-hat", Bayesian Analysis 16(2), 2021,
https://arxiv.org/abs/1903.08008, as ArviZ computes them.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError

__all__ = ["Mixing", "directions", "mixing"]

MIN_DRAWS = 8  # of a chain; halves of four are the least the autocovariance can do with


class Mixing(NamedTuple):
    """Diagnostics of one scalar summary of parallel chains.

    Attributes:
        ess: Bulk effective sample size of all chains together; chains that swing to and fro
            may exceed the number of draws. NaN where all draws are the same.
        rhat: Split R-hat; near 1 where the chains and their halves agree. NaN where no
            chain moves, and of a single chain.
    """

    ess: float
    rhat: float


def mixing(traces: Mapping[str, np.ndarray]) -> dict[str, Mixing]:
    """Diagnose summaries of parallel chains.

    Args:
        traces: Each summary by its name, (draws, chains), after the chains have settled.

    Raises:
        EbmPriorError: If there are fewer than eight draws.
    """
    from arviz_stats.base import array_stats

    found = {}
    for name, trace in traces.items():
        if trace.ndim != 2 or len(trace) < MIN_DRAWS:
            raise EbmPriorError(
                f"mixing needs at least {MIN_DRAWS} draws of every chain, got {trace.shape}"
            )
        x = np.asarray(trace, np.float64).T
        with np.errstate(all="ignore"):  # chains that stand still: 0 / 0 is the answer
            ess, rhat = array_stats.ess(x, method="bulk"), array_stats.rhat(x, method="rank")
        if np.ptp(x) == 0:  # where ArviZ calls every draw an effective one
            ess = np.nan
        found[name] = Mixing(float(ess), float(rhat))
    return found


def directions(size: int, count: int) -> Tensor:
    """Random unit vectors to project on, the same in every run: (size, count), float64."""
    generator = torch.Generator().manual_seed(0)
    u = torch.randn(size, count, generator=generator, dtype=torch.float64)
    return u / u.norm(dim=0)
