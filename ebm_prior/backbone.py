"""The interface a pretrained hierarchical VAE must offer: groups, T, T^-1, q(z|x), p(x|z).

A hierarchical VAE draws its latent groups top-down,

    p(z) = p(z_L) * prod_i N(z_i; mu_i(z_>i), sigma_i(z_>i)),            (Eq. 2)

so z is a deterministic, invertible function z = T(eps) of standard-normal noise
(App. A.3, Eq. 28-29). An adapter in `backbones/` wraps someone else's network
behind the five methods below; everything else in the package works on these alone.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from ebm_prior.errors import EbmPriorError

__all__ = ["Backbone", "LatentGroup", "Latents", "Likelihood", "Posterior"]

Latents = tuple[Tensor, ...]
"""One tensor per group in ancestral order (top group first), each (B, *group.shape)."""


@dataclass(frozen=True)
class LatentGroup:
    """One group of latents: `shape` is (C, H, W) or (D,), without the batch dimension."""

    name: str
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        """Number of latent units."""
        return prod(self.shape)


class Posterior(NamedTuple):
    """A draw from q(z|x).

    Attributes:
        z: Latents as the decoder receives them (normalizing flows applied).
        log_q: log q(z_i | z_>i, x), summed over units, (B, L), nats.
        log_p: log p(z_i | z_>i), summed over units, (B, L), nats.
    """

    z: Latents
    log_q: Tensor
    log_p: Tensor


class Likelihood(abc.ABC):
    """p(x|z) for a batch of images.

    Attributes:
        params: Raw decoder output, (B, *), before any cropping.
        name: What people call it, such as "Bernoulli"; where empty, the class's name is shown.
    """

    params: Tensor
    name: str = ""

    @abc.abstractmethod
    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of images x (B, C, H, W) in [0, 1], summed over pixels: (B,), nats."""

    @property
    @abc.abstractmethod
    def mean(self) -> Tensor:
        """Deterministic image, (B, C, H, W) in [0, 1]."""

    @abc.abstractmethod
    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Random image, (B, C, H, W) in [0, 1]."""

    def is_mass(self, x: Tensor) -> bool:
        """Whether `log_prob(x)` is the logarithm of a probability, and not of a density.

        Only then do bits per dimension compare with other models of the same data.
        """
        return False


class Backbone(nn.Module, abc.ABC):
    """A pretrained hierarchical VAE: frozen, always in evaluation mode.

    Attributes:
        groups: Latent groups in ancestral order; [0] is the top (the paper's z_L).
        image_shape: (C, H, W) of the user's images; x is float in [0, 1], unpadded.
        feature_shape: Shape of `features(z)` without the batch dimension.
        dataset: Name of the data set the checkpoint says it was trained on, or None.
        binarize: Whether it was trained on images drawn as x ~ Bernoulli(image).
        checkpointing: Whether `transform`, `top_down` and `features` keep, for a gradient, no
            more than the state before each group, and compute what is inside it again: less
            memory for more time, and the same gradient. Chains of which not even one fits turn
            it on; with it they run one at a time unless `EnergyPrior.micro_batch` says otherwise.
            None for an adapter that cannot; one that can starts with False.
        name: Registry name; set by `load_backbone`.
        checkpoint: Path it was loaded from; set by `load_backbone`.
        files: The files that make it, by name, for an adapter to set whose checkpoints are
            folders: their hash tells it from others; else that of the whole path does.
        sha256: Hash of that checkpoint; set by `load_backbone`.
    """

    groups: tuple[LatentGroup, ...]
    image_shape: tuple[int, int, int]
    feature_shape: tuple[int, ...]
    dataset: str | None = None
    binarize: bool = False
    checkpointing: bool | None = None
    name: str = ""
    checkpoint: str = ""
    files: Mapping[str, Path] | None = None
    sha256: str = ""

    @abc.abstractmethod
    def transform(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Latents:
        """T: noise to latents, z_i = mu_i(z_>i) + temperature * sigma_i(z_>i) * eps_i.

        Args:
            eps: One tensor per group, (B, *group.shape).
            temperature: Multiplies every sigma, the top group's included.

        Returns:
            Latents, in any memory format; differentiable with respect to `eps`. No image
            decoder runs.
        """

    @abc.abstractmethod
    def inverse(self, z: Sequence[Tensor]) -> Latents:
        """T^-1 at temperature 1: the noise with `transform(eps) == z`."""

    @abc.abstractmethod
    def posterior(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """Draw z ~ q(z|x) for images x (B, C, H, W) in [0, 1].

        Args:
            x: Images of `image_shape`.
            noise: Standard-normal tensor per group, (B, *group.shape), for a fixed draw.
            generator: Source of the noise where `noise` is not given.
        """

    @abc.abstractmethod
    def features(self, z: Sequence[Tensor]) -> Tensor:
        """Deterministic top-down state after the last group, (B, *feature_shape)."""

    @abc.abstractmethod
    def decode(self, z: Sequence[Tensor]) -> Likelihood:
        """p(x|z)."""

    def top_down(self, eps: Sequence[Tensor], temperature: float = 1.0) -> tuple[Latents, Tensor]:
        """`transform` and `features` together; override where one pass yields both."""
        z = self.transform(eps, temperature)
        return z, self.features(z)

    def encode(self, x: Tensor, noise: Sequence[Tensor]) -> tuple[Latents, Tensor]:
        """`posterior(x, noise).z` and `features` together; override as `top_down`."""
        z = self.posterior(x, noise=noise).z
        return z, self.features(z)

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """Log p(z_i | z_>i) of any latents, summed over units: (B, L), nats; no gradient.

        This default asks nothing but T and T^-1 of an adapter. As z_i = mu_i + sigma_i eps_i
        unit by unit, with mu_i and sigma_i functions of the groups above, sigma_i is the
        derivative of the sum of z_i with respect to eps_i, so

            log p(z_i | z_>i) = sum over units of -eps_i^2 / 2 - log(dz_i/deps_i) - log(2 pi) / 2

        at the price of one pass each of T^-1 and T; override it where the moments are at hand.
        """
        with torch.inference_mode(False), torch.enable_grad():
            # clones, as inference tensors know no gradient
            eps = [e.detach().clone().requires_grad_() for e in self.inverse([*z])]
            drawn = self.transform(eps)
            log_p = []
            for e, value in zip(eps, drawn, strict=True):
                (sigma,) = torch.autograd.grad(value.sum(), e, retain_graph=True)
                density = -0.5 * e.detach().square() - sigma.log() - 0.5 * math.log(2 * math.pi)
                log_p.append(density.flatten(1).sum(1))
        return torch.stack(log_p, 1)

    def train(self, mode: bool = True) -> Backbone:
        """Stay in evaluation mode: a backbone is frozen, whatever contains it is doing."""
        return super().train(False)

    def freeze(self) -> Backbone:
        """Turn off gradients of every parameter and return self."""
        return self.requires_grad_(False).eval()

    @property
    def device(self) -> torch.device:
        """Device of the weights."""
        return next(self._state()).device

    @property
    def dtype(self) -> torch.dtype:
        """Floating-point type of the weights, hence of latents and images."""
        return next(t for t in self._state() if t.is_floating_point()).dtype

    def _state(self):  # noqa: ANN202
        yield from self.parameters()
        yield from self.buffers()

    def check_latents(self, latents: Sequence[Tensor], what: str = "latents") -> None:
        """Raise `EbmPriorError` unless `latents` is one (B, *group.shape) tensor per group."""
        if len(latents) != len(self.groups):
            raise EbmPriorError(
                f"{what}: expected {len(self.groups)} groups, got {len(latents)} tensors"
            )
        batch = latents[0].shape[:1]
        for group, tensor in zip(self.groups, latents, strict=True):
            if tuple(tensor.shape) != (*batch, *group.shape):
                raise EbmPriorError(
                    f"{what}: group {group.name} must be {('B', *group.shape)}, "
                    f"got {tuple(tensor.shape)}"
                )

    def check_images(self, x: Tensor) -> None:
        """Raise `EbmPriorError` unless `x` is (B, *image_shape)."""
        if x.ndim != 4 or tuple(x.shape[1:]) != tuple(self.image_shape):
            raise EbmPriorError(
                f"images must be (B, C, H, W) = (B, {', '.join(map(str, self.image_shape))}), "
                f"got {tuple(x.shape)}"
            )
