"""The least that an energy prior must beat: one Gaussian, fitted to what the encoder produces.

In eps-space the prior is N(0, I), and draws of the posterior, eps = T^-1(z) with z ~ q(z|x) and
x from the training images, are not. This baseline takes their mean and full covariance, over all
units of all groups, in place of 0 and I, and nothing else. Draws are

    eps* = mean + sum_j g_j (eps_j - mean) / sqrt(n - 1),    g ~ N(0, I_n),

which has exactly the sample covariance of the n fitted draws, so that no D x D matrix is ever
formed, and holds for any n and D: where n <= D the covariance is singular, and so are the draws,
and the baseline is weaker than it could be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import Generators, flatten, randn
from ebm_prior.memory import rows_in_memory
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior

__all__ = ["GaussianFit"]

DRAWS = 10_000


@dataclass(frozen=True, eq=False)
class GaussianFit:
    """A Gaussian over eps with the mean and covariance of posterior draws.

    Attributes:
        mean: (D,).
        deviations: Of the draws from their mean, (n, D).
        unflatten: Makes a tensor per group of (B, D).
    """

    mean: Tensor
    deviations: Tensor
    unflatten: Callable[[Tensor], Latents]

    @classmethod
    @torch.no_grad()
    def of(cls, prior: EnergyPrior, images: Tensor, n: int = DRAWS, seed: int = 0) -> GaussianFit:
        """Fit to one draw of q(z|x) each for n images.

        Args:
            prior: Supplies the backbone.
            images: uint8, (N, C, H, W), of which n are picked without repetition, or all if
                there are fewer.
            n: Draws, at least 2; fewer where latents are so large that memory is short.
            seed: Of images and draws.

        Raises:
            EbmPriorError: If there are fewer than two, or the backbone cannot invert them.
        """
        backbone = prior.backbone
        n = min(n, len(images), rows_in_memory(sum(group.numel for group in backbone.groups)))
        if n < 2:
            raise EbmPriorError(f"a Gaussian is fitted to at least two images, got {n}")
        draws = PosteriorStream(prior, images).picked(n, seed)
        flat, ways = zip(*(flatten(backbone.inverse(z)) for z in draws), strict=True)
        rows = torch.cat(flat)
        if not rows.isfinite().all():
            raise EbmPriorError("no Gaussian fits: T^-1 of some posterior draws is not finite")
        mean = rows.mean(0)
        return cls(mean, rows.sub_(mean), ways[0])

    @property
    def n(self) -> int:
        """Posterior draws that it is fitted to."""
        return len(self.deviations)

    def sample_eps(self, count: int, generator: Generators = None) -> Latents:
        """Draws, one tensor per group, (count, *shape).

        Args:
            count: How many.
            generator: One generator, or one per draw.
        """
        weights = randn(self.mean.new_empty(count, self.n), generator)
        return self.unflatten(self.mean + weights @ self.deviations / (self.n - 1) ** 0.5)
