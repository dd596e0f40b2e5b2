"""Image likelihoods p(x|z) that several backbone families share.

Images are in [0, 1]; log-likelihoods are in nats, summed over pixels.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from ebm_prior.backbone import Likelihood
from ebm_prior.errors import EbmPriorError

__all__ = [
    "BernoulliLikelihood",
    "BinomialLikelihood",
    "DiscretizedLogisticMixture",
    "GaussianLikelihood",
    "uniforms_like",
]


def uniforms_like(
    reference: Tensor, shape: tuple[int, ...], generator: torch.Generator | None, margin: float
) -> Tensor:
    """Uniform draws from (margin, 1 - margin), made on the generator's own device."""
    device = reference.device if generator is None else generator.device
    draw = torch.rand(shape, generator=generator, device=device, dtype=reference.dtype)
    return (margin + (1 - 2 * margin) * draw).to(reference.device)


class BernoulliLikelihood(Likelihood):
    """Independent Bernoulli pixels.

    On grey images `log_prob` is minus the cross-entropy, x log p + (1 - x) log(1 - p).

    Args:
        params: Logits, (B, C, H, W).
        crop: Pixels cut from each border where the network works on a padded image.
    """

    name = "Bernoulli"

    def __init__(self, params: Tensor, crop: int = 0) -> None:
        self.params = params
        self.logits = params[..., crop : -crop or None, crop : -crop or None]

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of images (B, C, H, W): (B,), nats."""
        loss = F.binary_cross_entropy_with_logits(
            self.logits, x.to(self.logits.dtype), reduction="none"
        )
        return -loss.flatten(1).sum(1)

    def is_mass(self, x: Tensor) -> bool:
        """True of binary images; on grey ones `log_prob` is a cross-entropy."""
        return bool(((x == 0) | (x == 1)).all())

    @property
    def mean(self) -> Tensor:
        """Pixel probabilities, (B, C, H, W)."""
        return torch.sigmoid(self.logits)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Binary images, (B, C, H, W)."""
        uniforms = uniforms_like(self.logits, tuple(self.logits.shape), generator, 0.0)
        return (uniforms < self.mean).to(self.logits.dtype)


class BinomialLikelihood(Likelihood):
    """Pixels that count how many of `trials` independent coins fell heads.

    scikit-learn's digits are of this kind: each pixel counts the inked points of a 4x4
    block. Unlike a Bernoulli on grey levels it is a distribution over the data, and as
    sharp as they are.

    Args:
        params: Logits, (B, C, H, W).
        trials: Coins per pixel; images have the levels k / trials.
    """

    name = "binomial"

    def __init__(self, params: Tensor, trials: int) -> None:
        self.params = params
        self.trials = trials

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of images (B, C, H, W), rounded to the levels: (B,), nats."""
        n = self.trials
        heads = torch.round(x.to(self.params.dtype) * n)
        ways = math.lgamma(n + 1) - torch.lgamma(heads + 1) - torch.lgamma(n - heads + 1)
        log_p, log_not_p = F.logsigmoid(self.params), F.logsigmoid(-self.params)
        return (ways + heads * log_p + (n - heads) * log_not_p).flatten(1).sum(1)

    def is_mass(self, x: Tensor) -> bool:
        """True: the levels' probabilities sum to one."""
        return True

    @property
    def mean(self) -> Tensor:
        """Expected image, (B, C, H, W)."""
        return torch.sigmoid(self.params)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Images with levels k / trials, (B, C, H, W)."""
        device = self.params.device if generator is None else generator.device
        p = self.mean.detach().to(device)
        heads = torch.binomial(torch.full_like(p, self.trials), p, generator=generator)
        return (heads / self.trials).to(self.params.device)


class GaussianLikelihood(Likelihood):
    """N(mean, sigma^2 I) on the pixels, a density over images in [0, 1].

    Args:
        params: Means, (B, C, H, W), unclamped.
        sigma: Standard deviation of every pixel, in units of [0, 1].
    """

    name = "Gaussian"

    def __init__(self, params: Tensor, sigma: float) -> None:
        self.params = params
        self.sigma = sigma

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-density of images (B, C, H, W): (B,), nats."""
        squared = ((x - self.params) / self.sigma).square().flatten(1).sum(1)
        return -0.5 * squared - self.params[0].numel() * (
            math.log(self.sigma) + 0.5 * math.log(2 * math.pi)
        )

    @property
    def mean(self) -> Tensor:
        """Mean image, clamped to [0, 1]."""
        return self.params.clamp(0, 1)

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Noisy image, clamped to [0, 1]."""
        device = self.params.device if generator is None else generator.device
        noise = torch.randn(
            self.params.shape, generator=generator, device=device, dtype=self.params.dtype
        ).to(self.params.device)
        return (self.params + self.sigma * noise).clamp(0, 1)


class DiscretizedLogisticMixture(Likelihood):
    """Mixture of discretized logistics over RGB pixels (Salimans et al., 2017).

    Green's mean depends on red, blue's on red and green; the mixture is shared by the
    three channels of a pixel. Internally pixels are in [-1, 1].

    Reference: Salimans et al., 2017, PixelCNN++, https://arxiv.org/abs/1701.05517

    Args:
        params: (B, 10 M, H, W): M mixture logits, then per colour M means, M log-scales
            and M coefficients before their tanh.
        bits: Bits per channel of the data.
        edge: Pixels in [-1, 1] above it belong to the uppermost bin; codes differ here.
    """

    name = "mixture of discretized logistics"

    def __init__(self, params: Tensor, bits: int = 8, edge: float = 0.99) -> None:
        if params.shape[1] % 10:
            raise EbmPriorError(
                f"a logistic mixture has 10 channels per component, got {params.shape[1]}"
            )
        self.params = params
        self.bits = bits
        self.edge = edge
        m = params.shape[1] // 10
        self.mixture_logits = params[:, :m]
        rest = params[:, m:].unflatten(1, (3, 3 * m))
        self.means = rest[:, :, :m]
        self.log_scales = rest[:, :, m : 2 * m].clamp(min=-7.0)
        self.coefficients = torch.tanh(rest[:, :, 2 * m :])

    def log_prob(self, x: Tensor) -> Tensor:
        """Log-likelihood of RGB images (B, 3, H, W): (B,), nats."""
        x = (2 * x.to(self.params.dtype) - 1).unsqueeze(2)
        red, green = x[:, 0], x[:, 1]
        c = self.coefficients
        means = torch.stack(
            [
                self.means[:, 0],
                self.means[:, 1] + c[:, 0] * red,
                self.means[:, 2] + c[:, 1] * red + c[:, 2] * green,
            ],
            1,
        )
        half_bin = 1.0 / (2**self.bits - 1)
        centred = x - means
        inverse_scale = torch.exp(-self.log_scales)
        upper = inverse_scale * (centred + half_bin)
        lower = inverse_scale * (centred - half_bin)
        mass = torch.sigmoid(upper) - torch.sigmoid(lower)
        # Where the bin's mass underflows, the density at its centre times its width.
        middle = inverse_scale * centred
        density = middle - self.log_scales - 2 * F.softplus(middle) + math.log(2 * half_bin)
        inside = torch.where(mass > 1e-5, torch.log(mass.clamp(min=1e-10)), density)
        # The outermost bins reach to infinity.
        log_mass = torch.where(
            x < -0.999,
            F.logsigmoid(upper),
            torch.where(x > self.edge, -F.softplus(lower), inside),
        )
        per_component = log_mass.sum(1) + F.log_softmax(self.mixture_logits, 1)
        return torch.logsumexp(per_component, 1).flatten(1).sum(1)

    def is_mass(self, x: Tensor) -> bool:
        """True: a level's probability is its bin's mass."""
        return True

    @property
    def mean(self) -> Tensor:
        """Image from the mixture-averaged parameters, (B, 3, H, W)."""
        return self._compose(torch.softmax(self.mixture_logits, 1))

    def sample(
        self,
        generator: torch.Generator | None = None,
        uniforms: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """Random images (B, 3, H, W), not rounded to the data's levels.

        Args:
            generator: Source of randomness.
            uniforms: Fixed draws in (0, 1) instead: for the component (B, M, H, W) and for
                the logistic noise (B, 3, H, W).
        """
        if uniforms is None:
            b, _, *size = self.params.shape
            uniforms = (
                uniforms_like(self.params, tuple(self.mixture_logits.shape), generator, 1e-5),
                uniforms_like(self.params, (b, 3, *size), generator, 1e-5),
            )
        pick, noise = uniforms
        gumbel = self.mixture_logits - torch.log(-torch.log(pick))
        chosen = torch.zeros_like(gumbel).scatter_(1, gumbel.argmax(1, keepdim=True), 1.0)
        return self._compose(chosen, torch.log(noise) - torch.log1p(-noise))

    def _compose(self, weights: Tensor, logistic: Tensor | None = None) -> Tensor:
        """Weigh the components (B, M, H, W), add scaled noise, couple the colours."""
        weights = weights.unsqueeze(1)
        x = (self.means * weights).sum(2)
        if logistic is not None:
            x = x + torch.exp((self.log_scales * weights).sum(2)) * logistic
        c = (self.coefficients * weights).sum(2)
        red = x[:, 0].clamp(-1, 1)
        green = (x[:, 1] + c[:, 0] * red).clamp(-1, 1)
        blue = (x[:, 2] + c[:, 1] * red + c[:, 2] * green).clamp(-1, 1)
        return 0.5 * torch.stack([red, green, blue], 1) + 0.5
