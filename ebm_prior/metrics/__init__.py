"""Sample quality: Fréchet distance, manifolds, inception score, spread over classes.

    network = load_features(image_shape=backbone.image_shape)
    quality = compare(network(test_images), network(samples), network)

Nothing here imports torchvision, scipy or scikit-learn before a number is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.metrics.features import FeatureNetwork, load_features
from ebm_prior.metrics.frechet import FeatureStatistics, StatisticsBuilder, frechet_distance
from ebm_prior.metrics.inception import InceptionScore, inception_score
from ebm_prior.metrics.manifold import (
    MIN_IMAGES,
    Manifold,
    class_counts,
    entropy_of_counts,
    manifold_overlap,
)

__all__ = [
    "FeatureNetwork",
    "FeatureStatistics",
    "Manifold",
    "SampleQuality",
    "SampleSet",
    "check_count",
    "compare",
    "frechet_distance",
    "gap_closed",
    "inception_score",
    "load_features",
    "manifold_overlap",
]


@dataclass(frozen=True)
class SampleQuality:
    """How close a set of samples is to a set of reference images.

    Attributes:
        frechet: Fréchet distance on `features`; 0 is best. Comparable only at equal `n`.
        precision: Share of samples on the reference's manifold. This and the next three are
            None where only the reference's mean and covariance are known.
        recall: Share of reference images on the samples' manifold.
        entropy: Of the histogram of predicted classes, nats; None without a classifier of
            the data.
        n: Number of samples.
        features: Name of the feature network; belongs next to every number.
        density: Number of reference balls that a sample lies in, on average, divided by k.
        coverage: Share of reference balls that hold a sample.
        inception_score: On the classes of `features`, mean over ten parts; comparable only
            on the same features. None without classes, or for fewer than ten samples.
        inception_score_std: Its standard deviation over the parts.
    """

    frechet: float
    precision: float | None
    recall: float | None
    entropy: float | None
    n: int
    features: str
    density: float | None = None
    coverage: float | None = None
    inception_score: float | None = None
    inception_score_std: float | None = None


class SampleSet:
    """Features of samples that arrive in batches, reduced to what the numbers need.

    Memory is bounded: moments, the features of 10 000 samples, sums over class probabilities.

    Args:
        network: Where the features come from.
        total: Number of samples to come.
    """

    def __init__(self, network: FeatureNetwork, total: int) -> None:
        self.network = network
        self.statistics = StatisticsBuilder(network.name, total)
        self.score = InceptionScore(total)
        self.counts = torch.zeros(network.num_classes, dtype=torch.int64)

    def add(self, features: Tensor) -> None:
        """Take in features (B, dim).

        Raises:
            EbmPriorError: If features are NaN or infinite.
        """
        self.statistics.add(features)
        if self.network.num_classes and len(features):
            probabilities = self.network.classify(features)
            self.score.add(probabilities)
            self.counts += class_counts(probabilities)

    def quality(self, reference: FeatureStatistics) -> SampleQuality:
        """Measure all that was added against a reference of the same features."""
        found = self.statistics.finish()
        overlap = (None,) * 4
        if reference.rows is not None:
            overlap = manifold_overlap(
                torch.from_numpy(reference.rows), torch.from_numpy(found.rows)
            )
        precision, recall, density, coverage = overlap
        score = self.score.finish() or (None, None)
        own_classes = self.network.num_classes and self.network.knows_data
        return SampleQuality(
            frechet=frechet_distance(reference, found),
            precision=precision,
            recall=recall,
            entropy=entropy_of_counts(self.counts) if own_classes else None,
            n=found.n,
            features=self.network.name,
            density=density,
            coverage=coverage,
            inception_score=score[0],
            inception_score_std=score[1],
        )


def compare(
    reference: Tensor | FeatureStatistics, samples: Tensor, network: FeatureNetwork
) -> SampleQuality:
    """Measure samples against reference images.

    Args:
        reference: Features of held-out images, `network(images)`, (N, dim), or their
            statistics.
        samples: Features of the samples, (M, dim).
        network: Where both come from.

    Raises:
        EbmPriorError: If features are NaN, or of too few images.
    """
    if not isinstance(reference, FeatureStatistics):
        reference = FeatureStatistics.from_features(reference, network.name)
    found = SampleSet(network, len(samples))
    found.add(samples)
    return found.quality(reference)


def check_count(n: int, reference: FeatureStatistics) -> None:
    """Refuse, before the work is done, too few images to measure anything on.

    Raises:
        EbmPriorError: Says how many are needed.
    """
    least = 2 if reference.rows is None else MIN_IMAGES
    for count, what in ((n, "samples"), (reference.n, "reference images")):
        if count is not None and count < least:
            raise EbmPriorError(f"{count} {what} are too few to measure; give at least {least}")


def gap_closed(gaussian: float, energy: float, reconstruction: float) -> float:
    """Share of the way from the Gaussian prior to the best any prior can do.

    (FD_Gaussian - FD_energy) / (FD_Gaussian - FD_reconstruction), all three Fréchet
    distances from the same number of images to the same reference. Reconstructions mark the
    floor: their latents come from the posterior itself. 0 is no gain, 1 the floor; NaN where
    the Gaussian prior is at the floor already and there is no gap.
    """
    gap = gaussian - reconstruction
    return (gaussian - energy) / gap if gap > 0 else float("nan")
