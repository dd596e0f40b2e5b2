"""Are prior samples draws of the aggregate posterior? The energy distance, in latent space.

A prior is as good as it gets when its latents cannot be told from those of the encoder,
q(z) = mean over images of q(z|x). Between two distributions the energy distance is

    D^2 = 2 E|X - Y| - E|X - X'| - E|Y - Y'|,

zero if and only if they are the same, in any dimension and without any model of either. (It has
nothing to do with the energy E of the heads. scipy's `energy_distance` is D, of one dimension.)

Reference: Szekely and Rizzo, "Energy statistics: a class of statistics based on distances",
Journal of Statistical Planning and Inference 143(8), 2013.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import flatten
from ebm_prior.memory import rows_in_memory
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior

__all__ = ["AggregatePosterior", "TwoSample", "energy_test"]

PERMUTATIONS = 999
DRAWS = 500  # of the aggregate posterior


class TwoSample(NamedTuple):
    """How far apart two samples are.

    Attributes:
        distance: D^2, without bias: within a sample no point is paired with itself, so that
            the mean over equal distributions is 0, and single values may lie below.
        p_value: Probability of at least this distance if both had the same distribution.
    """

    distance: float
    p_value: float


def energy_test(
    x: Tensor, y: Tensor, *, permutations: int = PERMUTATIONS, seed: int = 0
) -> TwoSample:
    """Energy distance of two samples, and its p-value by permutation.

    The labels x and y are shuffled over the pooled points, whose distances are computed once.
    The p-value is (1 + number of shuffles at least as far apart) / (1 + shuffles), which is
    exact (Phipson and Smyth, 2010, https://arxiv.org/abs/1603.05766).

    Args:
        x: (N, D), N > 1.
        y: (M, D), M > 1.
        permutations: Number of shuffles.
        seed: Of the shuffles.

    Raises:
        EbmPriorError: If there are too few points, or some are not finite.
    """
    from sklearn.metrics.pairwise import euclidean_distances

    n, m = len(x), len(y)
    if n < 2 or m < 2:
        raise EbmPriorError(f"a two-sample test needs two points of each, got {n} and {m}")
    points = torch.cat([x, y]).detach().cpu().numpy()
    if not np.isfinite(points).all():
        raise EbmPriorError("a two-sample test needs finite points")
    distances = euclidean_distances(points).astype(np.float64)  # the diagonal is exactly 0
    first = np.zeros((1 + permutations, n + m))
    first[:, :n] = 1
    np.random.default_rng(seed).permuted(first[1:], axis=1, out=first[1:])
    to_first = first @ distances  # (1 + permutations, n + m)
    of_first = (to_first * first).sum(1)  # each pair twice, here and below
    across = to_first.sum(1) - of_first
    of_second = distances.sum() - of_first - 2 * across
    found = 2 * across / (n * m) - of_first / (n * (n - 1)) - of_second / (m * (m - 1))
    # a shuffle that changes nothing counts as equal, whatever the order of its sum
    beyond = found[1:] >= found[0] - 1e-12 * distances.max()
    return TwoSample(float(found[0]), float((1 + beyond.sum()) / (1 + permutations)))


@dataclass(frozen=True, eq=False)
class AggregatePosterior:
    """Draws of q(z), all groups side by side, and the scale of every unit.

    The scale comes from other images than the draws: estimated from the draws themselves it
    would fit these better than samples of the very same distribution.

    Attributes:
        mean: Of every unit, (D,).
        std: Of every unit, (D,), by which distances are measured, so that every unit counts
            alike, in whatever group it is; 1 where a unit is constant.
        draws: Standardised, (M, D).
    """

    mean: Tensor
    std: Tensor
    draws: Tensor

    @classmethod
    def of(
        cls, prior: EnergyPrior, images: Tensor, n: int = DRAWS, seed: int = 0
    ) -> AggregatePosterior:
        """One draw of q(z|x) each for 2 n images, or all: half for the scale, half to keep.

        Args:
            prior: Supplies the backbone.
            images: uint8, (N, C, H, W), at least 4.
            n: Draws; fewer where latents are so large that memory is short.
            seed: Of images and draws.

        Raises:
            EbmPriorError: If there are too few images.
        """
        if len(images) < 4:
            raise EbmPriorError(f"an aggregate posterior needs 4 images, got {len(images)}")
        units = sum(group.numel for group in prior.backbone.groups)
        n = min(n, rows_in_memory(units))
        draws = PosteriorStream(prior, images).picked(2 * n, seed)
        z = torch.cat([flatten(batch)[0].cpu() for batch in draws])
        own, other = z.tensor_split(2)
        std, mean = torch.std_mean(own, 0)
        std = torch.where(std > 0, std, 1)
        return cls(mean, std, (other - mean) / std)

    def test(self, z: Tensor) -> TwoSample:
        """Prior samples z (N, D), not standardised, against the draws."""
        return energy_test((z.to(self.mean) - self.mean) / self.std, self.draws)
