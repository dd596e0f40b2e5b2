"""Lower bounds of log p(x) of held-out images, under the Gaussian and the energy prior.

With z_1 ... z_K ~ q(z|x) and l_k = log p(x|z_k) + log p(z_k) - log q(z_k|x), in nats,

    ELBO = mean of l_k,        IW = log of the mean of exp(l_k)       (Burda et al., 2016).

Both are lower bounds of log p(x) in expectation; IW grows with K and tends to log p(x). The
energy prior p_alpha(z) = exp(-E(z)) p(z) / Z puts l_k - E(z_k) - ln Z in the place of l_k, so
both priors are compared on the same draws, image by image.

What the numbers say: q was trained for the Gaussian prior, so the energy prior's bounds may
be the looser ones, its ELBO above all; a gain in a bound is no bound of the gain in
log p(x). ln Z is an estimate whose error shifts all images alike, so it is stated beside
the standard errors over images and not in them.

Bits per dimension are -bound / (ln 2 * pixels * channels). They compare with other models
only where p(x|z) gives probabilities of the stored pixel values: discretized logistics,
binomials, Bernoullis of binary images. For a density over pixels, or Bernoullis of grey
images, they would depend on the pixels' scale or mean nothing, and are left out.

Reference: Burda, Grosse and Salakhutdinov, "Importance weighted autoencoders", ICLR 2016.
https://arxiv.org/abs/1509.00519
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import keyed_generator
from ebm_prior.partition import Partition, log_mean_exp, log_partition
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior
from ebm_prior.tables import Table

__all__ = ["Bound", "Estimate", "Likelihoods", "Weights", "bounds", "compare", "log_weights"]


class Weights(NamedTuple):
    """What the bounds of N images are made of, K draws z ~ q(z|x) each.

    Attributes:
        gaussian: log p(x|z) + log p(z) - log q(z|x), (N, K), nats, float64.
        energy: E(z), (N, K), nats, float64.
        is_mass: Whether p(x|z) gives probabilities of these images, not densities.
        likelihood: Name of p(x|z).
    """

    gaussian: Tensor
    energy: Tensor
    is_mass: bool
    likelihood: str


class Estimate(NamedTuple):
    """Mean over images and its standard error, nats."""

    mean: float
    standard_error: float

    def __str__(self) -> str:
        return f"{self.mean:.2f} ± {self.standard_error:.2f}"


class Bound(NamedTuple):
    """One bound under both priors.

    Attributes:
        gaussian: Under the Gaussian prior.
        energy: Under the energy prior, with the estimated ln Z.
        gain: Of the energy prior, image by image; its standard error is the paired one.
    """

    gaussian: Estimate
    energy: Estimate
    gain: Estimate


@dataclass(frozen=True)
class Likelihoods:
    """Bounds of log p(x), in nats, and what they rest on.

    Attributes:
        elbo: Evidence lower bound.
        iw: Importance-weighted bound of `samples` draws.
        partition: ln Z; its standard error comes on top of those of energy and gain.
        images: Number of held-out images.
        samples: K, draws of q(z|x) per image.
        dimensions: Pixels times channels.
        likelihood: Name of p(x|z).
        is_mass: Whether bits per dimension can be compared.
        seed: Seed of everything drawn.
    """

    elbo: Bound
    iw: Bound
    partition: Partition
    images: int
    samples: int
    dimensions: int
    likelihood: str
    is_mass: bool
    seed: int

    @property
    def bits_per_dimension(self) -> dict[str, float] | None:
        """Of the importance-weighted bound by prior; None where it would compare with nothing."""
        if not self.is_mass:
            return None
        scale = -math.log(2) * self.dimensions
        return {"gaussian": self.iw.gaussian.mean / scale, "energy": self.iw.energy.mean / scale}

    def to_dict(self) -> dict:
        """Plain values for JSON."""
        plain = asdict(self)
        for name in ("elbo", "iw"):
            parts = getattr(self, name)._asdict().items()
            plain[name] = {prior: estimate._asdict() for prior, estimate in parts}
        return plain | {
            "bits_per_dimension": self.bits_per_dimension,
            "warning": self.partition.warning,
        }

    def table(self, data: str = "") -> Table:
        """Bounds by prior, for the terminal, the card and the report.

        Args:
            data: Name of the images.
        """
        rows = [("ELBO", *map(str, self.elbo))]
        rows.append((f"importance-weighted, K = {self.samples}", *map(str, self.iw)))
        p, notes = self.partition, []
        if bits := self.bits_per_dimension:
            values = (f"{bits['gaussian']:.4f}", f"{bits['energy']:.4f}")
            rows.append(("bits per dimension of it", *values, ""))
        else:
            notes.append(f"No bits per dimension: {self.likelihood} gives no probabilities here.")
        rows.append(("ln Z", "0", f"{p.log_z:.3f} ± {p.standard_error:.3f}", ""))
        of = f" of {data[:80]}" if data else ""  # a longer note would be no table text
        notes.append(
            f"± standard error over {self.images} held-out images{of}, of the gain paired; that "
            f"of ln Z shifts the energy prior as a whole ({p.chains} chains, {p.temperatures} "
            f"temperatures, {p.effective_share:.0%} effective)."
        )
        if p.warning:
            notes.append(f"Caution: {p.warning}.")
        header = ("nats", "Gaussian prior", "energy prior", "gain")
        return Table("Lower bounds of log p(x)", header, rows, " ".join(notes))


def compare(
    prior: EnergyPrior,
    images: Tensor,
    *,
    samples: int = 50,
    chains: int = 200,
    temperatures: int = 500,
    seed: int = 0,
    batch_size: int = 100,
) -> Likelihoods:
    """Bounds of log p(x) under the backbone's Gaussian prior and under the energy prior.

    Args:
        prior: Fitted heads.
        images: Held-out images, uint8, (N, C, H, W); drawn once as x ~ Bernoulli(image) where
            the backbone was trained on such images.
        samples: K, draws of q(z|x) per image.
        chains: Chains for ln Z, as in `log_partition`.
        temperatures: Its number of temperatures.
        seed: Another seed gives independent chains, draws and binary images.
        batch_size: Chains or images at a time; changes results by rounding only.

    Raises:
        EbmPriorError: If a setting is out of range or a term is not finite.
    """
    check(images, samples)
    partition = log_partition(
        prior, chains=chains, temperatures=temperatures, seed=seed, batch_size=batch_size
    )
    weights = log_weights(prior, images, samples=samples, seed=seed, batch_size=batch_size)
    return Likelihoods(
        *bounds(weights, partition.log_z),
        partition,
        len(images),
        samples,
        math.prod(prior.backbone.image_shape),
        weights.likelihood,
        weights.is_mass,
        seed,
    )


def check(images: Tensor, samples: int) -> None:
    """Raise `EbmPriorError` unless there is something to average."""
    if samples < 1:
        raise EbmPriorError(f"samples per image must be at least 1, got {samples}")
    if len(images) < 2:
        raise EbmPriorError(
            f"a mean with a standard error needs at least two held-out images, got {len(images)}"
        )


@torch.no_grad()
def log_weights(
    prior: EnergyPrior, images: Tensor, *, samples: int, seed: int = 0, batch_size: int = 100
) -> Weights:
    """Log-weights of K draws z ~ q(z|x) per image.

    Image i draws from a stream of its own, its binary pixels first and then draw after
    draw, so more samples add to those of fewer.

    Args:
        prior: Fitted heads.
        images: uint8, (N, C, H, W).
        samples: K.
        seed: Seed of all streams.
        batch_size: Images at a time; changes results by rounding only.
    """
    check(images, samples)
    backbone, pictures = prior.backbone, PosteriorStream(prior, images)
    parts, is_mass = [], True
    with tqdm(total=len(images) * samples, desc="bounds", unit="draw", disable=None,
              delay=1) as bar:  # fmt: skip
        for index in torch.arange(len(images)).split(batch_size):
            generators = [keyed_generator(seed, 2, i) for i in index.tolist()]
            x = pictures.pictures(index, generators)
            draws = []
            for _ in range(samples):
                post = backbone.posterior(x, noise=prior.noise(len(x), generators))
                px = backbone.decode(post.z)
                terms = (px.log_prob(x), post.log_p.double().sum(1), -post.log_q.double().sum(1))
                draws.append(torch.stack([sum(terms), prior.energy(post.z).double()]).cpu())
                bar.update(len(x))
            is_mass = is_mass and px.is_mass(x)
            parts.append(torch.stack(draws, 2))
    gaussian, energy = torch.cat(parts, 1)
    for name, values in (("log-likelihood terms", gaussian), ("energies", energy)):
        if bad := (~values.isfinite()).any(1).sum().item():
            raise EbmPriorError(
                f"{name} of {bad} of {len(values)} images are not finite: the backbone or the "
                "heads are damaged or did not converge"
            )
    return Weights(gaussian, energy, is_mass, px.name or type(px).__name__)


def bounds(weights: Weights, log_z: float) -> tuple[Bound, Bound]:
    """ELBO and importance-weighted bound of log p(x), as means over images.

    Args:
        weights: Log-weights of N images.
        log_z: ln Z of the energy prior.
    """
    tilted = weights.gaussian - weights.energy - log_z
    found = []
    for of in (lambda w: w.mean(1), lambda w: log_mean_exp(w, 1)):
        gaussian, energy = of(weights.gaussian), of(tilted)
        found.append(Bound(estimate(gaussian), estimate(energy), estimate(energy - gaussian)))
    return tuple(found)


def estimate(values: Tensor) -> Estimate:
    """Mean of (N,) and its standard error."""
    return Estimate(values.mean().item(), values.std().item() / math.sqrt(len(values)))
