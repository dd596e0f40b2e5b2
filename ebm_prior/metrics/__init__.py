"""Sample quality: Fréchet distance, precision and recall, spread over classes.

    network = load_features(image_shape=backbone.image_shape)
    quality = compare(network(test_images), network(samples), network)

Nothing here imports torchvision, scipy or scikit-learn before a number is asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ebm_prior.metrics.features import FeatureNetwork, load_features
from ebm_prior.metrics.frechet import FeatureStatistics, frechet_distance
from ebm_prior.metrics.manifold import PrecisionRecall, class_entropy, precision_recall

__all__ = [
    "FeatureNetwork",
    "FeatureStatistics",
    "PrecisionRecall",
    "SampleQuality",
    "class_entropy",
    "compare",
    "frechet_distance",
    "gap_closed",
    "load_features",
    "precision_recall",
]


@dataclass(frozen=True)
class SampleQuality:
    """How close a set of samples is to a set of reference images.

    Attributes:
        frechet: Fréchet distance on `features`; 0 is best. Comparable only at equal `n`.
        precision: Share of samples on the reference's manifold.
        recall: Share of reference images on the samples' manifold.
        entropy: Of the histogram of predicted classes, nats; None without a classifier.
        n: Number of samples.
        features: Name of the feature network; belongs next to every number.
    """

    frechet: float
    precision: float
    recall: float
    entropy: float | None
    n: int
    features: str


def compare(reference: Tensor, samples: Tensor, network: FeatureNetwork) -> SampleQuality:
    """Measure samples against reference images.

    Args:
        reference: Features of held-out images, `network(images)`, (N, dim).
        samples: Features of the samples, (M, dim).
        network: Where both come from.

    Raises:
        EbmPriorError: If features are NaN, or of too few images.
    """
    frechet = frechet_distance(
        FeatureStatistics.from_features(reference, network.name),
        FeatureStatistics.from_features(samples, network.name),
    )
    precision, recall = precision_recall(reference, samples)
    return SampleQuality(
        frechet=frechet,
        precision=precision,
        recall=recall,
        entropy=class_entropy(network.classify(samples)) if network.num_classes else None,
        n=len(samples),
        features=network.name,
    )


def gap_closed(gaussian: float, energy: float, reconstruction: float) -> float:
    """Share of the way from the Gaussian prior to the best any prior can do.

    (FD_Gaussian - FD_energy) / (FD_Gaussian - FD_reconstruction), all three Fréchet
    distances from the same number of images to the same reference. Reconstructions mark the
    floor: their latents come from the posterior itself. 0 is no gain, 1 the floor; NaN where
    the Gaussian prior is at the floor already and there is no gap.
    """
    gap = gaussian - reconstruction
    return (gaussian - energy) / gap if gap > 0 else float("nan")
