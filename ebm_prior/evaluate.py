"""Before and after: Gaussian prior, energy prior and reconstructions against held-out images.

Baselines tell what of the gain is the energy's and its chains': a Gaussian with the covariance
of the posterior, without any energy, and importance resampling, with the energy but no chains.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.errors import EbmPriorError
from ebm_prior.feature_cache import FeatureCache
from ebm_prior.files import finite
from ebm_prior.gaussian_fit import GaussianFit
from ebm_prior.images import to_uint8
from ebm_prior.metrics import (
    FeatureNetwork,
    FeatureStatistics,
    SampleQuality,
    SampleSet,
    check_count,
    gap_closed,
)
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.ranks import Ranks
from ebm_prior.sampling import seeded_batches
from ebm_prior.tables import Table

__all__ = ["Evaluation", "Repeated", "evaluate", "evaluate_images", "quality_table"]

SETS = {
    "gaussian": "Gaussian prior",
    "full_covariance": "full-covariance Gaussian",
    "resampling": "importance resampling",
    "energy": "energy prior",
    "reconstruction": "reconstructions",
}
CHAINS = ("gaussian", "energy")  # start and end
NUMBERS = {  # of a SampleQuality: heading, digits
    "frechet": ("Fréchet", 2),
    "precision": ("precision", 3),
    "recall": ("recall", 3),
    "density": ("density", 3),
    "coverage": ("coverage", 3),
    "inception_score": ("IS", 3),
    "entropy": ("entropy", 3),
}


@dataclass(frozen=True)
class Evaluation:
    """Sample quality on equal terms: same number of images, same reference, same features.

    Attributes:
        gaussian: The backbone's own prior.
        energy: The tilted prior, its chains started from the very same noise.
        reconstruction: Training images through q(z|x) and p(x|z): the floor for any prior.
        gap_closed: (FD_gaussian - FD_energy) / (FD_gaussian - FD_reconstruction); NaN where
            there is no gap.
        reference_images: Number of held-out images; None where their statistics do not say.
        sampler: Transition, steps and step size.
        temperature: Of both priors.
        seed: First of the consecutive seeds.
        full_covariance: A Gaussian with mean and covariance of the posterior's noise
            (`GaussianFit`); None, as the next two, where no baselines were asked for.
        resampling: The same heads by `sir`, with as many draws as the chains have steps, beside
            the same start.
        fitted_to: Number of posterior draws behind `full_covariance`.
    """

    gaussian: SampleQuality
    energy: SampleQuality
    reconstruction: SampleQuality
    gap_closed: float
    reference_images: int | None
    sampler: SamplerConfig
    temperature: float
    seed: int
    full_covariance: SampleQuality | None = None
    resampling: SampleQuality | None = None
    fitted_to: int | None = None

    def to_dict(self) -> dict:
        """Plain values for JSON; `gap_closed` is None where there is no gap."""
        found = asdict(self) | {"gap_closed": finite(self.gap_closed)}
        absent = ("full_covariance", "resampling", "fitted_to")
        return {k: v for k, v in found.items() if k not in absent or v is not None}

    def sets(self) -> dict[str, str]:
        """Titles of the sets of images that were measured, by their names."""
        return {name: title for name, title in SETS.items() if getattr(self, name) is not None}

    def table(self) -> Table:
        """A row per set of images."""
        return quality_table(_rows((self,)), f"{_gaps((self,))}   ({self.terms()})")

    def terms(self) -> str:
        """What the numbers were measured on, for the line below the table."""
        count = self.reference_images
        terms = (
            f"{self.energy.n} samples against {'' if count is None else f'{count} '}held-out "
            f"images; features: {self.energy.features}; {self.sampler}"
        )
        if self.fitted_to is not None:
            terms += (
                f"; Gaussian fitted to {self.fitted_to} posterior draws; one of "
                f"{self.sampler.steps + 1} draws resampled"
            )
        return terms


@dataclass(frozen=True)
class Repeated:
    """The same evaluation with other seeds: means, and standard deviations over the runs.

    Attributes:
        runs: At least two.
    """

    runs: tuple[Evaluation, ...]

    def to_dict(self) -> dict:
        """Plain values for JSON: means where `Evaluation` has values, `std`, and all `runs`."""
        runs = [run.to_dict() for run in self.runs]
        mean, std = dict(runs[0]), {}
        for name in self.runs[0].sets():
            qualities = [run[name] for run in runs]
            mean[name] = qualities[0] | _over(qualities, np.mean)
            std[name] = _over(qualities, _std)
        gaps = [run.gap_closed for run in self.runs]
        mean["gap_closed"], std["gap_closed"] = finite(np.mean(gaps)), finite(_std(gaps))
        return mean | {"std": std, "runs": runs}

    def table(self) -> Table:
        """A row per set of images."""
        return quality_table(
            _rows(self.runs),
            f"{_gaps(self.runs)}   (mean ± standard deviation of {len(self.runs)} runs; "
            f"{self.runs[0].terms()})",
        )


def _rows(runs: Sequence[Evaluation]) -> dict[str, list[SampleQuality]]:
    """Every set of images, over the runs, by its title."""
    return {title: [getattr(run, name) for run in runs] for name, title in runs[0].sets().items()}


def _gaps(runs: Sequence[Evaluation]) -> str:
    """Shares of the gap that are closed: by the energy prior, and by baselines if there are."""
    text = f"gap closed: {_cell([run.gap_closed for run in runs], 3)}"
    for title, found in _rows(runs).items():
        if title in (SETS["full_covariance"], SETS["resampling"]):
            shares = [
                gap_closed(run.gaussian.frechet, quality.frechet, run.reconstruction.frechet)
                for run, quality in zip(runs, found, strict=True)
            ]
            text += f", by {title} {_cell(shares, 3)}"
    return text


def _over(qualities: Sequence[dict], function: Callable) -> dict:
    """A statistic over several runs, of each number that they have."""
    names = [name for name in (*NUMBERS, "inception_score_std") if qualities[0][name] is not None]
    return {name: float(function([quality[name] for quality in qualities])) for name in names}


def quality_table(qualities: dict[str, Sequence[SampleQuality]], note: str) -> Table:
    """Rows of numbers by title; of several runs, mean ± standard deviation.

    Of a single run the inception score has that over its ten parts.
    """
    rows = []
    for title, runs in qualities.items():
        cells = [
            _cell([getattr(q, name) for q in runs], digits)
            for name, (_, digits) in NUMBERS.items()
        ]
        if len(runs) == 1 and runs[0].inception_score_std is not None:
            cells[list(NUMBERS).index("inception_score")] += (
                f" ± {runs[0].inception_score_std:.3f}"
            )
        rows.append((title, *cells))
    return Table("", ("", *(heading for heading, _ in NUMBERS.values())), rows, note)


def _std(values: Sequence[float]) -> float:
    return np.std(values, ddof=1)


def _cell(values: Sequence[float | None], digits: int) -> str:
    if values[0] is None:
        return "-"
    mean = f"{round(np.mean(values), digits) + 0.0:.{digits}f}"  # no -0.00
    return mean if len(values) == 1 else f"{mean} ± {_std(values):.{digits}f}"


def evaluate(
    prior: EnergyPrior,
    reference: Tensor | FeatureStatistics,
    train: Tensor,
    network: FeatureNetwork,
    *,
    n: int = 10_000,
    config: SamplerConfig | None = None,
    temperature: float = 1.0,
    seed: int = 0,
    batch_size: int = 100,
    cache: FeatureCache | None = None,
    baselines: bool = False,
) -> Evaluation:
    """Compare Gaussian and energy prior with held-out images.

    Args:
        prior: Fitted heads.
        reference: Held-out images, uint8, (N, C, H, W), or the statistics of their features.
        train: Training images for the reconstructions, uint8.
        network: Feature network.
        n: Samples of each prior, and reconstructions (fewer if `train` is smaller).
        config: Transition, steps and step size; those stored with the heads by default.
        temperature: Multiplies every prior sigma.
        seed: Sample i uses seed + i.
        batch_size: Chains run together; changes results by rounding only.
        cache: Where features of finished batches are kept, and found after an interruption:
            the result is then the same as without one.
        baselines: Also measure a Gaussian fitted to posterior draws of training images (10 000,
            whatever `n`, as few would make it a weak one), and importance resampling: with the
            same seeds.

    Raises:
        EbmPriorError: If there are too few images, or the reference's statistics are of other
            features or of images of another size.
    """
    if len(train) < 2 or (isinstance(reference, Tensor) and len(reference) < 2):
        raise EbmPriorError("evaluation needs at least two held-out and two training images")
    config = config or prior.sampler
    if isinstance(reference, Tensor):
        reference = FeatureStatistics.from_images(reference, network)
    reference = reference.of(network, prior.backbone.image_shape)
    check_count(min(n, len(train)), reference)
    before, after = SampleSet(network, n), SampleSet(network, n)
    batches = [range(seed + i, seed + min(i + batch_size, n)) for i in range(0, n, batch_size)]
    for gaussian, energy in _features(prior, batches, config, temperature, network, cache):
        before.add(gaussian)
        after.add(energy)
    floor = SampleSet(network, min(n, len(train)))
    for z in PosteriorStream(prior, train).picked(n, seed):
        floor.add(network(to_uint8(prior.backbone.decode(z).mean)))
    extra = {}
    if baselines:
        fitted = GaussianFit.of(prior, train, seed=seed)
        covariance, resampled = SampleSet(network, n), SampleSet(network, n)
        for features in _fitted_features(prior, fitted, batches, temperature, network):
            covariance.add(features)
        sir = replace(config, transition="sir")
        for (features,) in _features(
            prior, batches, sir, temperature, network, cache, ("resampling",)
        ):
            resampled.add(features)
        extra = {
            "full_covariance": covariance.quality(reference),
            "resampling": resampled.quality(reference),
            "fitted_to": fitted.n,
        }
    gaussian, energy, reconstruction = (s.quality(reference) for s in (before, after, floor))
    return Evaluation(
        gaussian,
        energy,
        reconstruction,
        gap_closed(gaussian.frechet, energy.frechet, reconstruction.frechet),
        reference.n,
        config,
        temperature,
        seed,
        **extra,
    )


def _fitted_features(
    prior: EnergyPrior,
    fitted: GaussianFit,
    batches: Sequence[range],
    temperature: float,
    network: FeatureNetwork,
) -> Iterator[Tensor]:
    """Features of the fitted Gaussian's samples, batch by batch."""
    for seeds in tqdm(batches, "fitted Gaussian", leave=False, disable=None, delay=1):
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        eps = fitted.sample_eps(len(seeds), generators)
        yield network(to_uint8(prior.images(eps, temperature)))


def _features(
    prior: EnergyPrior,
    batches: Sequence[range],
    config: SamplerConfig,
    temperature: float,
    network: FeatureNetwork,
    cache: FeatureCache | None,
    names: Sequence[str] = CHAINS,
) -> Iterator[tuple[Tensor, ...]]:
    """Features of samples, batch by batch, from the cache where they are there.

    Names are those of the chains' starts and ends, or of the ends alone.
    """
    ranks = Ranks(prior.backbone.device)
    missing = [seeds for seeds in batches if cache is None or not cache.has(seeds, names)]
    missing = ranks.agree(missing)
    if (found := len(batches) - len(missing)) and ranks.is_main:
        tqdm.write(f"{found} of {len(batches)} batches were finished before", file=sys.stderr)
    # Only the last batch of all may be smaller, so the missing ones keep their boundaries.
    sampled = seeded_batches(
        prior,
        [seed for seeds in missing for seed in seeds],
        config,
        batch_size=len(batches[0]),
        temperature=temperature,
        ranks=ranks,
    )
    wanted = set(missing)
    for seeds in batches:
        if seeds not in wanted:
            yield cache.load(seeds, names)
            continue
        batch = next(sampled)
        found = tuple(
            network(to_uint8(prior.images(eps, temperature)))
            for eps in (batch.start, batch.end)[-len(names) :]
        )
        if cache is not None:
            cache.save(seeds, dict(zip(names, found, strict=True)))
        yield found
    next(sampled, None)  # closes its progress bar


def evaluate_images(
    images: Tensor, reference: FeatureStatistics, network: FeatureNetwork
) -> SampleQuality:
    """Measure pictures that exist already.

    Args:
        images: (N, C, H, W), uint8.
        reference: Statistics of the images that they should be like.
        network: Feature network.

    Raises:
        EbmPriorError: If the reference is of other features or images of another size, or
            there are too few images.
    """
    reference = reference.of(network, images.shape[1:])
    check_count(len(images), reference)
    found = SampleSet(network, len(images))
    for features in network.batches(images):
        found.add(features)
    return found.quality(reference)
