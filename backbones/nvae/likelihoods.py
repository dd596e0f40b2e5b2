"""NVAE's image likelihoods: the shared ones, and its Gaussian."""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.nvae.network import log_normal, soft_clamp
from ebm_prior.backbone import Likelihood
from ebm_prior.likelihoods import DiscretizedLogisticMixture

__all__ = ["NvaeGaussian", "NvaeLogisticMixture", "reduce_bits"]


def reduce_bits(x: Tensor, bits: int) -> Tensor:
    """Keep the upper `bits` of 8-bit images: levels k / 255 to levels j / (2^bits - 1).

    Leaves images alone that are already reduced.
    """
    if bits == 8:
        return x
    levels = torch.round(x * 255)  # k / 255 * 255 may fall just short of k
    return torch.floor(levels / 2 ** (8 - bits)) / (2**bits - 1)


class NvaeLogisticMixture(DiscretizedLogisticMixture):
    """Discretized logistic mixture on images reduced to the bits of the training data."""

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of 8-bit images (B, 3, H, W), reduced first: (B,), nats."""
        return super().log_prob(reduce_bits(x, self.bits))


class NvaeGaussian(Likelihood):
    """Independent Gaussian per pixel, a density over 2x - 1.

    Args:
        params: (B, 2 C, H, W): raw means, then raw log-deviations.
        bits: Bits per channel of the data.
    """

    name = "Gaussian"

    def __init__(self, params: Tensor, bits: int = 8) -> None:
        self.params = params
        self.bits = bits
        self.mu, self.sigma = soft_clamp(params)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of 2x - 1 for images (B, C, H, W): (B,), nats."""
        x = reduce_bits(x, self.bits).to(self.mu.dtype)
        return log_normal(2 * x - 1, self.mu, self.sigma)

    @property
    def mean(self) -> Tensor:
        """Mean image, clamped to [0, 1]."""
        return 0.5 * self.mu.clamp(-1, 1) + 0.5

    def sample(
        self, generator: torch.Generator | None = None, noise: Tensor | None = None
    ) -> Tensor:
        """Random images (B, C, H, W), clamped to [0, 1].

        Args:
            generator: Source of randomness.
            noise: Fixed standard-normal draw (B, C, H, W) instead.
        """
        if noise is None:
            device = self.mu.device if generator is None else generator.device
            noise = torch.randn(
                self.mu.shape, generator=generator, device=device, dtype=self.mu.dtype
            ).to(self.mu.device)
        return 0.5 * (self.mu + self.sigma * noise).clamp(-1, 1) + 0.5
