"""The transitions by name: the one place that says what each of them runs on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from ebm_prior.backbone import Latents
from ebm_prior.hmc import LEAPFROG, hmc, mala
from ebm_prior.importance import sir
from ebm_prior.langevin import langevin, pcnl

__all__ = ["FITTED", "MAX_STEP_SIZE", "TRANSITIONS", "Transition"]

MAX_STEP_SIZE = 1.9
"""For tuning: beyond, the Crank-Nicolson proposal forgets its start and turns over."""


@dataclass(frozen=True)
class Transition:
    """One way to move a chain.

    Attributes:
        chain: Runs it: `chain(density, eps, steps=..., step_size=..., generator=...,
            callback=...)`.
        density: Method of `EnergyPrior` that it takes: the Metropolis-adjusted ones know the
            Gaussian factor themselves and take the energy alone.
        gradients: Of the energy, per transition; 0 where it takes the energy alone.
        target: Acceptance rate to tune the step size to; None where there is none.
    """

    chain: Callable[..., Latents]
    density: Literal["log_density", "energy_of_noise"]
    gradients: int = 1
    target: float | None = None

    @property
    def sized(self) -> bool:
        """Whether it has a step size: not where it draws from N(0, I) and follows no gradient."""
        return self.gradients > 0


# Targets. mala: optimal as the dimension grows, Roberts and Rosenthal, 1998, J. R. Stat. Soc.
# B 60(1). hmc: the optimum is 0.651 (Beskos et al., 2013, Bernoulli 19(5A)), and higher is
# safer: 0.6 to 0.9 in Betancourt, Byrne and Girolami, 2014, https://arxiv.org/abs/1411.6669.
# pcnl: no such theory, as its rate does not fall with the dimension; `FitConfig.acceptance`,
# what heads are fitted with.
TRANSITIONS = {
    "langevin": Transition(langevin, "log_density"),
    "mala": Transition(mala, "energy_of_noise", target=0.574),
    "hmc": Transition(hmc, "energy_of_noise", gradients=LEAPFROG, target=0.7),
    "pcnl": Transition(pcnl, "energy_of_noise", target=0.7),
    "sir": Transition(sir, "energy_of_noise", gradients=0),
}
FITTED = ("langevin", "pcnl")
"""Those that heads can be fitted with."""
