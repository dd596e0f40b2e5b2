"""A step size for any Metropolis-adjusted transition, by its acceptance rate."""

from __future__ import annotations

import math

import torch
from tqdm import tqdm

from ebm_prior.langevin import StepInfo
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.transitions import MAX_STEP_SIZE, TRANSITIONS

__all__ = ["tuned"]


def tuned(
    prior: EnergyPrior,
    transition: str,
    steps: int,
    *,
    temperature: float = 1.0,
    chains: int = 32,
    rounds: int = 40,
) -> SamplerConfig:
    """Sampler whose step size meets the transition's acceptance target on settled chains.

    Robbins and Monro's recursion on log s, over rounds of four transitions of the same
    chains, and the mean of its second half. `langevin` rejects nothing and gets mala's; `sir`,
    which has none, keeps that stored with the heads.

    Args:
        prior: Energy prior to sample.
        transition: Name in `TRANSITIONS`.
        steps: For the result.
        temperature: Multiplies every prior sigma.
        chains: Run together.
        rounds: Steps of the recursion.
    """
    if not TRANSITIONS[transition].sized:
        return SamplerConfig(transition, steps, prior.sampler.step_size)
    name = "mala" if TRANSITIONS[transition].target is None else transition
    target = TRANSITIONS[name].target
    generator = torch.Generator().manual_seed(0)
    eps = prior.noise(chains, generator)
    log_size, logs = math.log(0.2), []
    bar = tqdm(range(rounds), desc=f"tuning {name}", leave=False, disable=None, delay=1)
    for i in bar:
        config = SamplerConfig(name, 4, math.exp(log_size))
        infos: list[StepInfo] = []
        eps = prior.run_chain(eps, config, temperature, generator, infos.append)
        rate = torch.stack([info.accepted for info in infos]).double().mean().item()
        log_size += 3 / (1 + i) ** 0.6 * (rate - target)
        log_size = min(max(log_size, math.log(1e-8)), math.log(MAX_STEP_SIZE))
        logs.append(log_size)
    half = logs[rounds // 2 :]
    return SamplerConfig(transition, steps, math.exp(sum(half) / len(half)))
