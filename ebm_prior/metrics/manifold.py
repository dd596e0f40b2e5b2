"""Precision, recall, density, coverage and the spread over classes: what a Fréchet distance mixes.

The manifold of a set is the union of balls around its points, each reaching to the point's
k-th nearest neighbour in the set.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError

__all__ = [
    "MIN_IMAGES", "Manifold", "class_counts", "entropy_of_counts", "manifold_overlap",
]  # fmt: skip

PRECISION_K, DENSITY_K = 3, 5  # those of the two papers
MIN_IMAGES = max(PRECISION_K, DENSITY_K) + 1
WORKING_MEMORY = 128  # MiB, of a block of distances


class Manifold(NamedTuple):
    """How two sets of features overlap.

    Attributes:
        precision: Share of samples that lie on the reference's manifold.
        recall: Share of reference images that lie on the samples' manifold.
        density: Number of reference balls that a sample lies in, on average, divided by k:
            about 1 where both sets are drawn alike, more where samples crowd.
        coverage: Share of reference balls that hold a sample.
    """

    precision: float
    recall: float
    density: float
    coverage: float


def manifold_overlap(
    reference: Tensor,
    samples: Tensor,
    *,
    k: int = PRECISION_K,
    density_k: int = DENSITY_K,
) -> Manifold:
    """Precision and recall, density and coverage, from one pass over the distances.

    Improved precision and recall (Kynkäänniemi et al., 2019, arXiv:1904.06991, Eq. 1-2);
    density and coverage (Naeem et al., 2020, arXiv:2002.09797, Eq. 3-4), whose balls are the
    reference's alone, so that one stray sample does not count for much. The larger set is cut
    to the size of the other, at random: radii shrink as a set grows. Memory is bounded, time
    quadratic; `FeatureStatistics` keep 10 000 images.

    Args:
        reference: Features (N, dim).
        samples: Features (M, dim).
        k: Neighbours for precision and recall.
        density_k: Neighbours for density and coverage.

    Raises:
        EbmPriorError: If a set has no more images than neighbours are needed.
    """
    from sklearn.metrics import pairwise_distances_chunked

    size, most = min(len(reference), len(samples)), max(k, density_k)
    if size <= most:
        raise EbmPriorError(
            f"manifolds of the {most} nearest neighbours need more than {most} images each"
        )

    def subset(x: Tensor) -> np.ndarray:
        if len(x) > size:
            x = x[torch.randperm(len(x), generator=torch.Generator().manual_seed(0))[:size]]
        return x.detach().cpu().double().numpy()

    real, fake = subset(reference), subset(samples)
    # Distances come from a matrix product, |a|^2 - 2ab + |b|^2: keep the norms small.
    centre = real.mean(axis=0)
    real, fake = real - centre, fake - centre
    real_radii, dense_radii = _radii(real, (k, density_k))
    (fake_radii,) = _radii(fake, (k,))

    recalled = np.zeros(size, dtype=bool)
    nearest = np.full(size, np.inf)  # sample, of every reference image

    def reduce(distances: np.ndarray, start: int) -> np.ndarray:
        """Of some samples: whether in any ball, and in how many of the wider ones."""
        own = fake_radii[start : start + len(distances), None]
        np.logical_or(recalled, (distances <= own).any(axis=0), out=recalled)
        np.minimum(nearest, distances.min(axis=0), out=nearest)
        precise = (distances <= real_radii).any(axis=1)
        return np.stack([precise, (distances <= dense_radii).sum(axis=1)], axis=1)

    blocks = pairwise_distances_chunked(
        fake, real, reduce_func=reduce, working_memory=WORKING_MEMORY
    )
    precise, balls = np.concatenate(list(blocks)).T
    return Manifold(
        precision=float(precise.mean()),
        recall=float(recalled.mean()),
        density=float(balls.mean() / density_k),
        coverage=float((nearest <= dense_radii).mean()),
    )


def _radii(points: np.ndarray, ks: tuple[int, ...]) -> list[np.ndarray]:
    """Distance of every point to its k-th nearest neighbour among the others, for each k."""
    from sklearn.neighbors import NearestNeighbors

    # Without an argument, kneighbors() leaves each point itself out.
    neighbours = NearestNeighbors(n_neighbors=max(ks), algorithm="brute").fit(points)
    distances = neighbours.kneighbors()[0]
    # The product's rounding error: two equal points may come out this far apart.
    slack = 1e-7 * np.linalg.norm(points, axis=1).max()
    return [distances[:, k - 1] + slack for k in ks]


def class_counts(probabilities: Tensor) -> Tensor:
    """How often each class is the likeliest: (classes,)."""
    return torch.bincount(probabilities.argmax(1), minlength=probabilities.shape[1])


def entropy_of_counts(counts: Tensor) -> float:
    """Entropy of a histogram, nats; log(classes) if all are as likely."""
    share = counts / counts.sum()
    return torch.special.entr(share.double()).sum().item()
