"""ln Z, the normalising constant of the tilted prior, by annealed importance sampling.

In eps-space (z = T(eps), App. A.3 of the paper) the tilted prior is, normalised,

    p_alpha(eps) = exp(-E(T(eps))) N(eps; 0, I) / Z,    Z = E_{eps ~ N(0, I)}[exp(-E(T(eps)))],

and p_alpha(z) = exp(-E(z)) p(z) / Z with the same Z. A chain starts at N(0, I) and passes
the densities exp(-beta_t E) N(0, I), 0 = beta_0 < ... < beta_T = 1, by one transition each
that leaves density t invariant. Its weight

    w = prod_t exp(-(beta_t - beta_{t-1}) E(eps_{t-1}))

has expectation Z, however far the chains are from equilibrium, as long as the transitions
are fixed beforehand: step sizes are tuned on pilot chains and then frozen. With T = 1
nothing moves, and this is plain importance sampling from N(0, I).

Z is estimated without bias, so ln Z is too low on average (Jensen), by half the squared
standard error to second order. log p_alpha errs to the high side then: the error must be
small beside what is concluded from it.

Reference: Neal, "Annealed importance sampling", Statistics and Computing 11, 2001.
https://arxiv.org/abs/physics/9803008
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import ChainState, flatten, keyed_generator, pcnl_step, start_chain
from ebm_prior.micro_batch import MicroBatched
from ebm_prior.prior import EnergyPrior, frozen

__all__ = ["ENOUGH", "Partition", "log_mean_exp", "log_partition"]

ENOUGH = 0.2
"""Share of effective chains below which an estimate is not to be trusted: the share itself
is too high where the chains miss what carries Z."""

PILOT_CHAINS, PILOT_BETAS, PILOT_STEPS = 32, 10, 10
TARGET = 0.6  # acceptance; Langevin proposals move fastest near 0.57 (Roberts and Rosenthal)
MAX_STEP_SIZE = 4.0  # there a pcnl proposal at beta = 0 is a fresh draw of N(0, I)


@dataclass(frozen=True)
class Partition:
    """An estimate of ln Z and how far to trust it.

    Attributes:
        log_z: Logarithm of the mean weight, nats.
        standard_error: Of log_z, nats, by the delta method: the weights are independent with
            mean Z, so the variance of their mean is Var(w) / chains, and d ln Z = dZ / Z.
        effective_share: (sum w)^2 / sum w^2 of the chains' weights, divided by their number.
        chains: Number of independent chains.
        temperatures: T, the number of steps in beta.
        acceptance: Mean acceptance probability of the transitions; None where T = 1.
        seed: Seed of all chains.
    """

    log_z: float
    standard_error: float
    effective_share: float
    chains: int
    temperatures: int
    acceptance: float | None
    seed: int

    @property
    def warning(self) -> str | None:
        """One line if too few chains carry the estimate."""
        if self.effective_share >= ENOUGH:
            return None
        return (
            f"ln Z is not reliable: only {self.effective_share:.1%} of the chains are effective "
            f"(at least {ENOUGH:.0%} are needed); take more --temperatures"
        )

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)


def log_partition(
    prior: EnergyPrior,
    *,
    chains: int = 200,
    temperatures: int = 500,
    seed: int = 0,
    batch_size: int = 100,
) -> Partition:
    """Estimate ln Z of an energy prior.

    Args:
        prior: Fitted heads.
        chains: Independent chains, at least 2.
        temperatures: T, the number of steps of beta from 0 to 1; one gradient each.
        seed: Another seed gives independent chains.
        batch_size: Chains run together; changes results by rounding only.

    Raises:
        EbmPriorError: If a setting is out of range or an energy is not finite.
    """
    if chains < 2:
        raise EbmPriorError(f"ln Z needs at least 2 chains for its standard error, got {chains}")
    if temperatures < 1:
        raise EbmPriorError(f"the number of temperatures must be at least 1, got {temperatures}")
    betas = schedule(temperatures)
    with frozen(prior.heads):
        sizes = tuned_step_sizes(prior, betas, seed) if temperatures > 1 else []
        parts = []
        with tqdm(total=chains * temperatures, desc="annealing", unit="step", disable=None,
                  delay=1) as bar:  # fmt: skip
            for first in range(0, chains, batch_size):
                own = range(first, min(first + batch_size, chains))
                generators = [keyed_generator(seed, 0, i) for i in own]
                parts.append(anneal(prior, generators, betas, sizes, lambda: bar.update(len(own))))  # noqa: B023
    log_w, acceptance = (torch.cat(tensors) for tensors in zip(*parts, strict=True))
    w = (log_w - log_w.max()).exp()
    return Partition(
        log_mean_exp(log_w, 0).item(),
        (w.std() / w.mean()).item() / math.sqrt(chains),
        (w.sum().square() / w.square().sum()).item() / chains,
        chains,
        temperatures,
        acceptance.mean().item() if temperatures > 1 else None,
        seed,
    )


def schedule(temperatures: int) -> list[float]:
    """beta_0 = 0 to beta_T = 1, evenly: against powers of t / T it left the least variance."""
    return [t / temperatures for t in range(temperatures + 1)]


def anneal(
    prior: EnergyPrior,
    generators: list[torch.Generator],
    betas: list[float],
    sizes: list[float],
    advance: Callable[[], None],
) -> tuple[Tensor, Tensor]:
    """Log weights (B,) of one chain per generator, and its mean acceptance probability (B,).

    The energy and its gradient at a state only scale with beta, so that they are evaluated
    for proposals alone.
    """
    state, unflatten = start(prior, generators)
    log_w = torch.zeros(len(generators), dtype=torch.float64, device=state.eps.device)
    rates = torch.zeros_like(log_w)
    for t in range(1, len(betas)):
        log_w -= (betas[t] - betas[t - 1]) * state.energy.double()
        if t < len(betas) - 1:  # a move at beta = 1 would change no weight
            state, rate = move(prior, state, unflatten, betas[t], sizes[t], generators)
            rates += rate
        advance()
    return log_w, rates / max(len(betas) - 2, 1)


def start(
    prior: EnergyPrior, generators: list[torch.Generator] | torch.Generator, n: int | None = None
) -> tuple[ChainState, Callable]:
    """States of chains at N(0, I), with energy and gradient at beta = 1."""
    flat, unflatten = flatten(prior.noise(n or len(generators), generators))
    state = start_chain(MicroBatched(prior.energy_of_noise, prior), flat, unflatten)
    if not state.energy.isfinite().all():
        raise EbmPriorError(
            "ln Z needs finite energies, but those of some draws from N(0, I) are not: "
            "the heads are damaged or did not converge"
        )
    return state, unflatten


def move(
    prior: EnergyPrior,
    state: ChainState,
    unflatten: Callable,
    beta: float,
    step_size: float,
    generator: list[torch.Generator] | torch.Generator,
) -> tuple[ChainState, Tensor]:
    """One transition that leaves exp(-beta E) N(0, I) invariant; also acceptances (B,).

    States are kept at beta = 1.
    """
    moved, _, probability = pcnl_step(
        MicroBatched(lambda eps: beta * prior.energy_of_noise(eps), prior),
        scaled(state, beta),
        unflatten,
        step_size,
        generator,
    )
    return scaled(moved, 1 / beta), probability


def scaled(state: ChainState, factor: float) -> ChainState:
    """The same points with `factor` times the energy."""
    return ChainState(state.eps, factor * state.energy, factor * state.grad)


def tuned_step_sizes(prior: EnergyPrior, betas: list[float], seed: int) -> list[float]:
    """A step size per beta at which pilot chains accept `TARGET` of their proposals.

    The pilot anneals chains of its own through a few betas, since tuning on the measured
    chains would bias their weights, and interpolates between.
    """
    generator = keyed_generator(seed, 1)
    state, unflatten = start(prior, generator, PILOT_CHAINS)
    knots, found, log_size = [], [], math.log(MAX_STEP_SIZE)
    for i in range(1, PILOT_BETAS + 1):
        beta, history = i / PILOT_BETAS, []
        for _ in range(PILOT_STEPS):
            state, rate = move(prior, state, unflatten, beta, math.exp(log_size), generator)
            log_size += rate.mean().item() - TARGET
            log_size = min(log_size, math.log(MAX_STEP_SIZE))
            history.append(log_size)
        knots.append(beta)
        found.append(np.mean(history[PILOT_STEPS // 3 :]))
    return np.exp(np.interp(betas, knots, found)).tolist()


def log_mean_exp(values: Tensor, dim: int) -> Tensor:
    """Logarithm of the mean of exp(values) along `dim`."""
    return values.logsumexp(dim) - math.log(values.shape[dim])
