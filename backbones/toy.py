"""A two-group linear-Gaussian hierarchical VAE whose every answer is known in closed form.

    z_2 ~ N(0, I)                              top group, (D2,)
    z_1 | z_2 ~ N(A z_2 + a, diag(s)^2)        bottom group, (D1,)
    x | z_1 ~ N(W z_1 + 0.5, sigma^2 I)        image, (1, H, W)

so p(z), p(z|x) and p(x) are Gaussian. For tests, documentation and examples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from ebm_prior.backbone import Backbone, LatentGroup, Latents, Posterior
from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import randn
from ebm_prior.likelihoods import GaussianLikelihood

__all__ = ["ToyBackbone", "load", "recognises"]

SETTINGS = {"top", "bottom", "size", "sigma", "seed"}
MAX_FILE = 1 << 12  # bytes


class ToyBackbone(Backbone):
    """Linear-Gaussian backbone with seeded random weights.

    Args:
        top: Units of the top group, D2.
        bottom: Units of the bottom group, D1.
        size: Height and width of the image.
        sigma: Standard deviation of the pixels.
        seed: Seed of the weights.
    """

    def __init__(
        self, top: int = 2, bottom: int = 3, size: int = 4, sigma: float = 0.1, seed: int = 0
    ) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.groups = (LatentGroup("z2", (top,)), LatentGroup("z1", (bottom,)))
        self.image_shape = (1, size, size)
        self.feature_shape = (top + bottom,)
        self.sigma = sigma
        self.register_buffer("A", torch.randn(bottom, top, generator=g) / math.sqrt(top))
        self.register_buffer("a", 0.3 * torch.randn(bottom, generator=g))
        self.register_buffer("s", 0.3 + 0.5 * torch.rand(bottom, generator=g))
        self.register_buffer("W", 0.15 * torch.randn(size * size, bottom, generator=g))
        self.name = "toy"
        self.sha256 = f"toy-{top}-{bottom}-{size}-{sigma}-{seed}"

    def transform(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Latents:
        """z_2 = t eps_2; z_1 = A z_2 + a + t s eps_1."""
        self.check_latents(eps, "eps")
        z2 = temperature * eps[0]
        return z2, z2 @ self.A.T + self.a + temperature * self.s * eps[1]

    def inverse(self, z: Sequence[Tensor]) -> Latents:
        """eps_2 = z_2; eps_1 = (z_1 - A z_2 - a) / s."""
        self.check_latents(z, "z")
        return z[0], (z[1] - z[0] @ self.A.T - self.a) / self.s

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """Log p(z_2), log p(z_1 | z_2): (B, 2), nats."""
        self.check_latents(z, "z")
        top = torch.distributions.Normal(0.0, 1.0).log_prob(z[0])
        bottom = torch.distributions.Normal(z[0] @ self.A.T + self.a, self.s).log_prob(z[1])
        return torch.stack([top.sum(1), bottom.sum(1)], 1)

    def prior_moments(self) -> tuple[Tensor, Tensor]:
        """Mean (D,) and covariance (D, D) of (z_2, z_1) under the Gaussian prior."""
        eye = torch.eye(self.A.shape[1], dtype=self.A.dtype, device=self.A.device)
        cross = self.A
        bottom = self.A @ self.A.T + self.s.square().diag()
        covariance = torch.cat([torch.cat([eye, cross.T], 1), torch.cat([cross, bottom], 1)])
        return torch.cat([torch.zeros_like(self.A[0]), self.a]), covariance

    def posterior_moments(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Exact mean (B, D) and covariance (D, D) of (z_2, z_1) given images x."""
        mean, covariance = self.prior_moments()
        lift = torch.cat([torch.zeros_like(self.W[:, : self.A.shape[1]]), self.W], 1)
        precision = covariance.inverse() + lift.T @ lift / self.sigma**2
        residual = x.flatten(1) - 0.5 - mean @ lift.T
        posterior = precision.inverse()
        return mean + residual @ lift @ posterior.T / self.sigma**2, posterior

    def posterior(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """Draw from the exact posterior, top group first."""
        self.check_images(x)
        top = self.A.shape[1]
        mean, cov = self.posterior_moments(x)
        if noise is None:
            noise = [randn(x.new_empty(len(x), *g.shape), generator) for g in self.groups]
        self.check_latents(noise, "noise")
        log_q, z = [], []
        for i, block in enumerate((slice(0, top), slice(top, None))):
            mu, sigma = mean[:, block], cov[block, block]
            if i:  # condition the bottom group on the top one
                gain = cov[block, :top] @ cov[:top, :top].inverse()
                mu = mu + (z[0] - mean[:, :top]) @ gain.T
                sigma = sigma - gain @ cov[:top, block]
            root = torch.linalg.cholesky(sigma)
            z.append(mu + noise[i] @ root.T)
            normal = torch.distributions.MultivariateNormal(mu, scale_tril=root)
            log_q.append(normal.log_prob(z[i]))
        return Posterior(tuple(z), torch.stack(log_q, 1), self.log_prior(z))

    def features(self, z: Sequence[Tensor]) -> Tensor:
        """Both groups side by side, (B, D2 + D1)."""
        self.check_latents(z, "z")
        return torch.cat(list(z), 1)

    def decode(self, z: Sequence[Tensor]) -> GaussianLikelihood:
        """N(W z_1 + 0.5, sigma^2 I)."""
        self.check_latents(z, "z")
        pixels = z[1] @ self.W.T + 0.5
        return GaussianLikelihood(pixels.reshape(len(pixels), *self.image_shape), self.sigma)


def recognises(path: Path) -> bool:
    """A small JSON file with settings of the toy, such as `top`."""
    try:
        if path.stat().st_size > MAX_FILE:
            return False
        settings = json.loads(path.read_text())
    except (ValueError, OSError):
        return False
    return isinstance(settings, dict) and bool(settings) and settings.keys() <= SETTINGS


def load(path: str | Path, device: torch.device) -> ToyBackbone:
    """Build from a JSON file with the constructor's arguments."""
    try:
        settings = json.loads(Path(path).read_text())
        backbone = ToyBackbone(**settings)
    except (ValueError, TypeError, OSError) as error:
        raise EbmPriorError(
            f'{path} is not a toy backbone: expected JSON such as {{"top": 2, "bottom": 3}}'
        ) from error
    return backbone.to(device)
