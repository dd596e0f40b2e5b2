"""HVAE's discretised logistic likelihood."""

from __future__ import annotations

import torch
from torch import Tensor

from ebm_prior.backbone import Likelihood
from ebm_prior.likelihoods import uniforms_like

__all__ = ["DiscretizedLogistic"]

LEVELS = 256


class DiscretizedLogistic(Likelihood):
    """Independent logistics, integrated over 256 bins of [0, 1].

    Args:
        params: (B, 2 C, H, W): locations less one half, then log-scales plus one.

    Attributes:
        location: Centre of each logistic, (B, C, H, W).
        log_scale: Logarithm of its scale, at least -7.
    """

    name = "discretized logistic"

    def __init__(self, params: Tensor) -> None:
        self.params = params
        location, log_scale = params.chunk(2, 1)
        self.location = location + 0.5
        self.log_scale = (log_scale - 1.0).clamp(min=-7.0)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of images (B, C, H, W) in [0, 1]: (B,), nats."""
        centre = x.to(self.params.dtype) * ((LEVELS - 1) / LEVELS) + 0.5 / LEVELS
        lower = torch.floor(centre * LEVELS) / LEVELS
        scale = torch.exp(self.log_scale)
        below = torch.sigmoid((lower - self.location) / scale)
        above = torch.sigmoid((lower + 1 / LEVELS - self.location) / scale)
        # The outermost bins reach to infinity.
        below = torch.where(lower <= 0, torch.zeros_like(below), below)
        above = torch.where(lower >= 1 - 1 / LEVELS, torch.ones_like(above), above)
        return torch.log(above - below + 1e-7).flatten(1).sum(1)

    def is_mass(self, x: Tensor) -> bool:
        """True: a level's probability is its bin's mass."""
        return True

    @property
    def mean(self) -> Tensor:
        """Image at the locations, (B, C, H, W)."""
        return ((self.location * LEVELS - 0.5) / (LEVELS - 1)).clamp(0, 1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Random images with 256 levels, (B, C, H, W)."""
        u = uniforms_like(self.params, tuple(self.location.shape), generator, 1e-5)
        value = self.location + torch.exp(self.log_scale) * (torch.log(u) - torch.log1p(-u))
        return torch.floor(value * LEVELS).clamp(0, LEVELS - 1) / (LEVELS - 1)
