"""Before and after: Gaussian prior, energy prior and reconstructions against held-out images."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.images import to_uint8
from ebm_prior.metrics import FeatureNetwork, SampleQuality, compare, gap_closed
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.sampling import seeded_batches

__all__ = ["Evaluation", "evaluate"]


@dataclass(frozen=True)
class Evaluation:
    """Sample quality on equal terms: same number of images, same reference, same features.

    Attributes:
        gaussian: The backbone's own prior.
        energy: The tilted prior, its chains started from the very same noise.
        reconstruction: Training images through q(z|x) and p(x|z): the floor for any prior.
        gap_closed: (FD_gaussian - FD_energy) / (FD_gaussian - FD_reconstruction).
        reference_images: Number of held-out images.
        sampler: Transition, steps and step size.
        temperature: Of both priors.
        seed: First of the consecutive seeds.
    """

    gaussian: SampleQuality
    energy: SampleQuality
    reconstruction: SampleQuality
    gap_closed: float
    reference_images: int
    sampler: SamplerConfig
    temperature: float
    seed: int

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        return asdict(self)

    def table(self) -> str:
        """A small table for the terminal."""
        rows = [
            ("Gaussian prior", self.gaussian),
            ("energy prior", self.energy),
            ("reconstructions", self.reconstruction),
        ]
        lines = [f"{'':16} {'Fréchet':>9} {'precision':>9} {'recall':>9} {'entropy':>9}"]
        for name, q in rows:
            entropy = "-" if q.entropy is None else f"{q.entropy:.3f}"
            lines.append(
                f"{name:16} {q.frechet:9.2f} {q.precision:9.3f} {q.recall:9.3f} {entropy:>9}"
            )
        s = self.sampler
        lines.append(
            f"gap closed: {self.gap_closed:.3f}   ({self.energy.n} samples against "
            f"{self.reference_images} held-out images; features: {self.energy.features}; "
            f"{s.steps} {s.transition} steps of size {s.step_size:.3g})"
        )
        return "\n".join(lines)


def evaluate(
    prior: EnergyPrior,
    reference: Tensor,
    train: Tensor,
    network: FeatureNetwork,
    *,
    n: int = 10_000,
    config: SamplerConfig | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
) -> Evaluation:
    """Compare Gaussian and energy prior with held-out images.

    Args:
        prior: Fitted heads.
        reference: Held-out images, uint8, (N, C, H, W).
        train: Training images for the reconstructions, uint8.
        network: Feature network.
        n: Samples of each prior, and reconstructions (fewer if `train` is smaller).
        config: Transition, steps and step size; those stored with the heads by default.
        temperature: Multiplies every prior sigma.
        seed: Sample i uses seed + i.
        batch_size: Chains run together.
    """
    if len(reference) < 2 or len(train) < 2:
        raise EbmPriorError("evaluation needs at least two held-out and two training images")
    config = config or prior.sampler
    want = network(reference)
    before, after = [], []
    seeds = range(seed, seed + n)
    for batch in seeded_batches(
        prior, seeds, config, batch_size=batch_size, temperature=temperature
    ):
        before.append(network(to_uint8(prior.images(batch.start, temperature))))
        after.append(network(to_uint8(prior.images(batch.end, temperature))))
    floor = [network(x) for x in reconstructions(prior, train, n, seed, batch_size)]
    gaussian, energy, reconstruction = (
        compare(want, torch.cat(features), network) for features in (before, after, floor)
    )
    return Evaluation(
        gaussian,
        energy,
        reconstruction,
        gap_closed(gaussian.frechet, energy.frechet, reconstruction.frechet),
        len(reference),
        config,
        temperature,
        seed,
    )


@torch.no_grad()
def reconstructions(
    prior: EnergyPrior, images: Tensor, n: int, seed: int, batch_size: int
) -> list[Tensor]:
    """Batches of uint8 decoder means at z ~ q(z|x) for n images picked without repetition."""
    generator = torch.Generator().manual_seed(seed)
    picked = torch.randperm(len(images), generator=generator)[:n]
    stream = PosteriorStream(prior, images)
    return [
        to_uint8(prior.backbone.decode(stream.latents(index, generator)).mean)
        for index in picked.split(batch_size)
    ]
