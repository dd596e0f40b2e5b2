"""Precision, recall and the spread over classes: what a Fréchet distance mixes into one number."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError

__all__ = ["PrecisionRecall", "class_entropy", "precision_recall"]


class PrecisionRecall(NamedTuple):
    """Shares between 0 and 1.

    Attributes:
        precision: Of samples that lie on the reference's manifold.
        recall: Of reference images that lie on the samples' manifold.
    """

    precision: float
    recall: float


def precision_recall(
    reference: Tensor, samples: Tensor, *, k: int = 3, max_images: int = 10_000, seed: int = 0
) -> PrecisionRecall:
    """Improved precision and recall (Kynkäänniemi et al., 2019, arXiv:1904.06991, Eq. 1-2).

    The manifold of a set is the union of balls around its points, each reaching to the
    point's k-th nearest neighbour in the set. Both sets are cut to the same size, as in the
    paper: radii shrink as a set grows.

    Args:
        reference: Features (N, dim).
        samples: Features (M, dim).
        k: Neighbours.
        max_images: Largest number of images of either set; memory is bounded, time quadratic.
        seed: Of the random choice of images from the larger set.

    Raises:
        EbmPriorError: If a set has no more than k images.
    """
    size = min(len(reference), len(samples), max_images)
    if size <= k:
        raise EbmPriorError(f"precision and recall with k={k} need more than {k} images each")
    generator = torch.Generator().manual_seed(seed)

    def subset(x: Tensor) -> np.ndarray:
        if len(x) > size:
            x = x[torch.randperm(len(x), generator=generator)[:size]]
        return x.detach().cpu().double().numpy()

    real, fake = subset(reference), subset(samples)
    # Distances come from a matrix product, |a|^2 - 2ab + |b|^2: keep the norms small.
    centre = real.mean(axis=0)
    real, fake = real - centre, fake - centre
    return PrecisionRecall(_share_inside(fake, real, k), _share_inside(real, fake, k))


def _share_inside(queries: np.ndarray, points: np.ndarray, k: int) -> float:
    """Share of queries within the ball of at least one of the points."""
    from sklearn.metrics import pairwise_distances_chunked
    from sklearn.neighbors import NearestNeighbors

    # Without an argument, kneighbors() leaves each point itself out.
    neighbours = NearestNeighbors(n_neighbors=k, algorithm="brute").fit(points)
    radii = neighbours.kneighbors()[0][:, -1]
    # The product's rounding error: two equal points may come out this far apart.
    radii = radii + 1e-7 * np.linalg.norm(points, axis=1).max()
    inside = pairwise_distances_chunked(
        queries,
        points,
        reduce_func=lambda distances, _: (distances <= radii).any(axis=1),
        working_memory=128,  # MiB
    )
    return float(np.concatenate(list(inside)).mean())


def class_entropy(probabilities: Tensor) -> float:
    """Entropy of the histogram of predicted classes, nats; log(classes) if all are as likely.

    Args:
        probabilities: Class probabilities of samples, (N, classes).
    """
    classes = probabilities.shape[1]
    share = torch.bincount(probabilities.argmax(1), minlength=classes) / len(probabilities)
    return torch.special.entr(share.double()).sum().item()
