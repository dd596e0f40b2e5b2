"""Sampling importance resampling from N(0, I): what the energy alone is worth, without chains.

A draw of the tilted prior exp(-E(T(eps))) N(eps; 0, I) / Z is chosen among draws of N(0, I) by
their weights w = exp(-E(T(eps))), as NCP-VAE samples its contrastive prior at test time.

References: Rubin, 1987, J. Am. Stat. Assoc. 82(398), the comment on Tanner and Wong; Aneja,
Schwing, Kautz and Vahdat, "A contrastive learning approach for training variational autoencoder
priors", 2021 (NeurIPS), https://arxiv.org/abs/2010.02917
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.langevin import (
    Generators,
    StepInfo,
    check_settings,
    flatten,
    rand,
    randn,
    value_alone,
)

__all__ = ["sir"]


def sir(
    energy: Callable[[Latents], Tensor],
    eps: Latents,
    *,
    steps: int,
    step_size: float,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Latents:
    """One of `steps` + 1 draws of N(0, I), the start among them, with probability ~ exp(-E).

    Streaming: draw k takes the place of the one that is kept with probability
    w_k / (w_0 + ... + w_k), so that after every step draw j is kept with probability
    w_j / (w_0 + ... + w_k): self-normalised importance resampling, exact as k grows and
    biased to N(0, I) before. Where few draws carry all the weight, that is late.

    It is no Markov chain of the tilted prior: a start from elsewhere stays as one draw that
    does not belong. One energy per step, and no gradient.

    Args:
        energy: Maps latents of batch B to (B,), nats: E alone, without |eps|^2 / 2.
        eps: Start, drawn from N(0, I), one tensor per group, (B, *shape).
        steps: Draws beside the start, at least 1.
        step_size: Not used: nothing here is near to anything.
        generator: One generator, or one per sample.
        callback: Called with a `StepInfo` after every step; `accepted` says who was replaced.

    Returns:
        New detached tensors; `eps` is not changed.

    Raises:
        EbmPriorError: If `steps`, `step_size` or the shape of the energy is wrong.
    """
    check_settings(steps, step_size)
    kept, unflatten = flatten(eps)
    value = value_alone(energy, kept, unflatten)
    log_sum = log_weight(value)
    for step in range(1, steps + 1):
        draw = randn(kept, generator)
        new = value_alone(energy, draw, unflatten)
        log_w = log_weight(new)
        log_sum = torch.logaddexp(log_sum, log_w)
        probability = (log_w - log_sum).exp().nan_to_num(0.0)  # NaN: no weight at all yet
        replaced = rand(probability, generator) < probability
        kept = torch.where(replaced[:, None], draw, kept)
        value = torch.where(replaced, new, value)
        if callback is not None:
            callback(StepInfo(step, unflatten(kept), replaced, value))
    return unflatten(kept)


def log_weight(energy: Tensor) -> Tensor:
    """Logarithm of the weight, -E, of energies (B,); a non-finite one weighs nothing."""
    return torch.where(energy.isfinite(), -energy, -torch.inf)
