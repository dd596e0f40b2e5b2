"""Decision functions for outliers: the likelihood without the lowest latent groups.

Low-level latents rebuild unfamiliar images as well as familiar ones, so that the likelihood
alone calls neither an outlier. L^{>k} therefore takes only the groups above the k lowest from
q(z|x), and the rest from the prior. Of the backbone (Havtorn et al., 2021)

    L^{>k} = log p(x|z) - sum_{i>k} [log q(z_i|x, z_>i) - log p(z_i|z_>i)],   z_>k ~ q(z|x),

with z_<=k the prior's mode, as in their code, or a sample of it; of the energy prior (Cui, Wu
and Han, 2023, Eq. 20, E = -f)

    L_EBM^{>k} = log p(x|z) + log p(z) - sum E,   z_>k ~ q(z|x),   z_<=k ~ p_alpha(z|z_>k),

an unnormalised log-posterior. It lacks the entropy that L^{>k} has, so a third function, the
ELBO of the energy prior up to ln Z, compares like with like:

    L^{>k} of the same z - sum E.

At k = 0 this is a bound on log p(x) but for the constant; for k > 0 it exceeds one by the
divergence of the two priors of z_<=k. The ratio LLR^{>k} = L^{>0} - L^{>k} (Eq. 21) is high
for outliers, L^{>k} is low.

With S importance samples the bounds become log (1/S) sum_s exp(L_s), as in Havtorn's code;
Eq. 20, an expectation of logarithms, becomes their mean.

References: Havtorn et al., 2021, https://arxiv.org/abs/2102.08248; Cui, Wu and Han, 2023,
https://arxiv.org/abs/2306.06323
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.backbone import Backbone, Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.hierarchy import redraw
from ebm_prior.langevin import StepInfo, keyed_generator
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior, SamplerConfig

__all__ = [
    "METHODS", "Terms", "Upper", "compute_terms", "default_k", "draw_noise", "draw_pixels",
    "infer_upper", "parse_k", "score_images",
]  # fmt: skip

METHODS = {
    "mode": "Gaussian: mode",
    "sample": "Gaussian: sample",
    "log_posterior": "energy: Eq. 20",
    "energy_elbo": "energy: ELBO",
}
"""Decision functions: name in results, and in tables."""

MAX_LEVELS = 6  # by default; more rows than that say nothing new


class Upper(NamedTuple):
    """z_>k ~ q(z|x), with the k lowest groups still open.

    Attributes:
        z: Latents of all groups; the k lowest are posterior means.
        eps: Their noise, with zeros for the k lowest.
        log_ratio: log q(z_i|x, z_>i) - log p(z_i|z_>i) of the upper groups, (B, L - k), nats.
        k: Number of open groups.
    """

    z: Latents
    eps: Latents
    log_ratio: Tensor
    k: int

    def complete(self, backbone: Backbone, eps: Latents | None = None) -> Latents:
        """Latents with the k lowest groups from the prior.

        Args:
            backbone: The one that `z` comes from.
            eps: Noise of all groups, whose k lowest are read; by default zeros, the prior's
                mode (its mean, given the groups above).
        """
        if not self.k:
            return self.z
        top = len(self.z) - self.k
        lower = (self.eps if eps is None else eps)[top:]
        return (*self.z[:top], *backbone.transform((*self.eps[:top], *lower))[top:])


@torch.no_grad()
def infer_upper(backbone: Backbone, x: Tensor, noise: Sequence[Tensor], k: int) -> Upper:
    """Draw the groups above the k lowest from q(z|x).

    Where inference runs upwards through the skipped groups, they hand on their posterior mean,
    as in Havtorn's code.

    Args:
        backbone: Any backbone.
        x: Images in [0, 1], (B, C, H, W), drawn from {0, 1} where the backbone wants that.
        noise: Standard-normal tensor per group, (B, *shape).
        k: Latent groups to skip, counted from the bottom, 0 to L - 1.
    """
    top = len(backbone.groups) - k
    part = [n if i < top else torch.zeros_like(n) for i, n in enumerate(noise)]
    post = backbone.posterior(x, noise=part)
    eps = backbone.inverse(post.z)
    eps = tuple(e if i < top else torch.zeros_like(e) for i, e in enumerate(eps))
    return Upper(post.z, eps, (post.log_q - post.log_p)[:, :top], k)


class Terms(NamedTuple):
    """What the decision functions are made of, each (B,), nats, float64.

    Of many units the terms are large and their differences small: float32 sums would round
    ratios to some thousandths of a nat.

    Attributes:
        log_px: log p(x|z).
        log_ratio: Sum over the upper groups of log q - log p.
        log_prior: log p(z) of the backbone, all groups.
        energy: Sum of the heads' energies.
    """

    log_px: Tensor
    log_ratio: Tensor
    log_prior: Tensor
    energy: Tensor

    @property
    def elbo(self) -> Tensor:
        """L^{>k}: the backbone's bound."""
        return self.log_px - self.log_ratio

    @property
    def log_posterior(self) -> Tensor:
        """Eq. 20: the energy prior's unnormalised log-posterior."""
        return self.log_px + self.log_prior - self.energy

    @property
    def energy_elbo(self) -> Tensor:
        """The energy prior's ELBO, up to ln Z; see the module."""
        return self.elbo - self.energy


@torch.no_grad()
def compute_terms(
    prior: EnergyPrior, x: Tensor, upper: Upper, eps: Latents | None = None
) -> Terms:
    """Evaluate images x (B, C, H, W) at `upper.complete(prior.backbone, eps)`."""
    z = upper.complete(prior.backbone, eps)
    return Terms(
        prior.backbone.decode(z).log_prob(x).double(),
        upper.log_ratio.double().sum(1),
        prior.backbone.log_prior(z).double().sum(1),
        prior.energy(z).double(),
    )


def score_images(
    prior: EnergyPrior,
    images: Tensor,
    seeds: Sequence[int],
    ks: Sequence[int],
    *,
    samples: int = 1,
    config: SamplerConfig | None = None,
    batch_size: int = 100,
    name: str = "images",
) -> dict[str, dict[int, Tensor]]:
    """L^{>k} of images by every method.

    Args:
        prior: Fitted heads.
        images: uint8, (N, C, H, W); drawn once as x ~ Bernoulli(image) where the backbone was
            trained on such images.
        seeds: One per image; its scores depend on image and seed alone. All k share the noise
            of z_>k, and sample and chain of one k their start.
        ks: Numbers of groups to take from the prior, counted from the bottom.
        samples: Importance samples S.
        config: Transition, steps and step size; those stored with the heads by default.
        batch_size: Images at a time; changes results by rounding only.
        name: For the progress bar.

    Returns:
        Of each method in `METHODS` and each k the scores, (N,), float64, nats, low for
        outliers.

    Raises:
        EbmPriorError: If a k leaves no group to infer.
    """
    for k in ks:
        check_k(k, len(prior.backbone.groups))
    config = config or prior.sampler
    stream = PosteriorStream(prior, images)
    parts: dict[str, dict[int, list[Tensor]]] = {m: {k: [] for k in ks} for m in METHODS}
    total = len(seeds) * samples * sum(config.steps if k else 1 for k in ks)
    with tqdm(total=total, desc=f"scoring {name}", unit="step", disable=None, delay=1) as bar:
        for first in range(0, len(seeds), batch_size):
            own = seeds[first : first + batch_size]
            x = draw_pixels(stream, first, own)
            drawn = [score_draw(prior, x, own, s, ks, config, bar.update) for s in range(samples)]
            for method, values in parts.items():
                for k, found in values.items():
                    draws = torch.stack([draw[method][k] for draw in drawn]).cpu()
                    found.append(combine(draws, method))
    return {m: {k: torch.cat(found) for k, found in v.items()} for m, v in parts.items()}


def draw_pixels(stream: PosteriorStream, first: int, seeds: Sequence[int]) -> Tensor:
    """Images from row `first` on, as the backbone takes them, each drawn by its own seed."""
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    return stream.pictures(torch.arange(first, first + len(seeds)), generators)


def draw_noise(prior: EnergyPrior, seeds: Sequence[int], draw: int) -> Latents:
    """Noise of q(z|x) for one importance sample of each image."""
    return prior.noise(len(seeds), [keyed_generator(seed, draw) for seed in seeds])


def combine(draws: Tensor, method: str) -> Tensor:
    """One score from S importance samples (S, B): (B,)."""
    if method == "log_posterior":
        return draws.mean(0)
    return torch.logsumexp(draws, 0) - math.log(len(draws))


def score_draw(
    prior: EnergyPrior,
    x: Tensor,
    seeds: Sequence[int],
    draw: int,
    ks: Sequence[int],
    config: SamplerConfig,
    advance: Callable[[int], object],
) -> dict[str, dict[int, Tensor]]:
    """One importance sample of every method and k."""
    found: dict[str, dict[int, Tensor]] = {method: {} for method in METHODS}
    noise = draw_noise(prior, seeds, draw)
    names = [group.name for group in prior.backbone.groups]

    def count(info: StepInfo) -> None:
        advance(len(info.accepted))

    for k in ks:
        upper = infer_upper(prior.backbone, x, noise, k)
        mode = gaussian = energy = compute_terms(prior, x, upper)
        if k:
            generators = [keyed_generator(seed, draw, k) for seed in seeds]
            held = names[: len(names) - k]
            drawn = redraw(prior, upper.eps, held, config, generator=generators, callback=count)
            gaussian, energy = (compute_terms(prior, x, upper, eps) for eps in drawn)
        else:
            advance(len(x))
        found["mode"][k], found["sample"][k] = mode.elbo, gaussian.elbo
        found["log_posterior"][k] = energy.log_posterior
        found["energy_elbo"][k] = energy.energy_elbo
    return found


def default_k(groups: int) -> list[int]:
    """All k, 0 to L - 1; six even steps where there are more."""
    count = min(groups, MAX_LEVELS)
    return [groups * i // count for i in range(count)]


def parse_k(text: str, groups: int) -> list[int]:
    """Values of k such as `0,1,2`, sorted, with the 0 that every ratio needs.

    Raises:
        EbmPriorError: If one is no number of groups that leaves a group to infer.
    """
    parts = [part.strip() for part in text.split(",")]
    ks = [check_k(int(part) if part.isdecimal() else part, groups) for part in parts]
    return sorted({0, *ks})


def check_k(k: int | str, groups: int) -> int:
    """Return k if it is a number of groups that leaves one to infer."""
    if k not in range(groups):
        raise EbmPriorError(
            f"cannot skip {k!r} groups: k counts latent groups from the bottom, 0 to "
            f"{groups - 1}, several separated by commas"
        )
    return k
