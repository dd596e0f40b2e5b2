"""Metropolis-adjusted Langevin and Hamiltonian transitions in eps-space.

Both leave exp(-E(eps)) N(eps; 0, I) exactly invariant. The Hamiltonian

    H(eps, p) = E(eps) + |eps|^2 / 2 + |p|^2 / 2

has the wanted density as its marginal over eps. A transition draws a momentum
p ~ N(0, I), follows Hamilton's equations by the leapfrog integrator, which is reversible and
keeps volume, and takes the end point with probability min(1, exp(H_start - H_end)).

The step size s is that of `langevin`: the integrator advances by h = sqrt(s), so one
leapfrog step proposes

    eps + (s/2) grad log p(eps) + sqrt(s) p,

which is the paper's Langevin step (Eq. 12) to the letter. MALA is therefore HMC with a
single leapfrog step, and that is how it is written here.

References: Roberts and Tweedie, 1996, Bernoulli 2(4), on MALA; Neal, 2011, "MCMC using
Hamiltonian dynamics", Sec. 3.2 and 5.2, https://arxiv.org/abs/1206.1901
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import (
    ChainState,
    Generators,
    StepInfo,
    metropolis,
    metropolis_chain,
    rand,
    randn,
    start_chain,
)

__all__ = ["LEAPFROG", "hmc", "mala"]

LEAPFROG = 5
"""Leapfrog steps, hence gradients, of one `hmc` transition.

Steps that a Metropolis test accepts often have h of about 0.3 here, so five of them go
about a quarter of the period 2 pi of N(0, I): far enough to forget the start.
"""
SHORTEST = 0.5
"""Least share of sqrt(step_size) that an `hmc` trajectory advances by.

A direction whose half period is the trajectory's length would otherwise end at minus its
start time and again, and its variance never change.
"""


def mala(
    energy: Callable[[Latents], Tensor],
    eps: Latents,
    *,
    steps: int,
    step_size: float,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Latents:
    """Metropolis-adjusted Langevin chain: `langevin`'s proposals, accepted or not.

    One gradient per transition. Arguments and result as for `ebm_prior.pcnl`, where
    `energy` is E alone, without |eps|^2 / 2.

    Raises:
        EbmPriorError: If `steps`, `step_size` or the shape of the energy is wrong.
    """
    transition = partial(hmc_step, leapfrog=1)
    return metropolis_chain(transition, energy, eps, steps, step_size, generator, callback)


def hmc(
    energy: Callable[[Latents], Tensor],
    eps: Latents,
    *,
    steps: int,
    step_size: float,
    leapfrog: int = LEAPFROG,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Latents:
    """Hamiltonian Monte Carlo chain with identity mass.

    `leapfrog` gradients per transition. Every trajectory has its own h, uniform between half
    of sqrt(step_size) and all of it, so that no direction's period fits them all (Neal, 2011,
    Sec. 3.2).

    Args:
        energy: Maps latents of batch B to (B,), nats: E alone, without |eps|^2 / 2.
        eps: Start, one tensor per group, (B, *shape).
        steps: Number of transitions, at least 1.
        step_size: s > 0, the square of the integrator's longest step; from 4 on unstable.
        leapfrog: Leapfrog steps of one transition.
        generator: One generator, or one per sample.
        callback: Called with a `StepInfo` after every transition.

    Returns:
        New detached tensors; `eps` is not changed.

    Raises:
        EbmPriorError: If `steps`, `step_size`, `leapfrog` or the shape of the energy is wrong.
    """
    if leapfrog < 1:
        raise EbmPriorError(f"leapfrog steps must be at least 1, got {leapfrog}")
    transition = partial(hmc_step, leapfrog=leapfrog, shortest=SHORTEST)
    return metropolis_chain(transition, energy, eps, steps, step_size, generator, callback)


def hmc_step(
    energy: Callable,
    state: ChainState,
    unflatten: Callable,
    step_size: float,
    generator: Generators = None,
    *,
    leapfrog: int,
    shortest: float = 1.0,
) -> tuple[ChainState, Tensor, Tensor]:
    """One transition; returns as `pcnl_step`, the new state, which moved, and how likely."""
    h = step_size**0.5
    if shortest < 1:
        share = shortest + (1 - shortest) * rand(state.energy, generator)
        h = h * share[:, None]
    start = randn(state.eps, generator)
    new, momentum = state, start
    for _ in range(leapfrog):
        momentum = momentum + (h / 2) * (new.grad - new.eps)
        new = start_chain(energy, new.eps + h * momentum, unflatten)
        momentum = momentum + (h / 2) * (new.grad - new.eps)
    # |a|^2 - |b|^2 as (a - b)(a + b): in float32 the norms of many units would cancel badly
    kinetic = ((start - momentum) * (start + momentum)).sum(1) / 2
    potential = ((state.eps - new.eps) * (state.eps + new.eps)).sum(1) / 2
    return metropolis(state, new, state.energy - new.energy + potential + kinetic, generator)
