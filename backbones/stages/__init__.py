"""What the BIVA and HVAE adapters share: layers, stages, checks, and the interface."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from backbones.stages.layers import Shape
from backbones.stages.network import Draw, Moments, Network, log_normal
from ebm_prior.backbone import Backbone, LatentGroup, Latents, Likelihood, Posterior
from ebm_prior.langevin import randn

__all__ = ["StagedBackbone"]


class StagedBackbone(Backbone):
    """A trained hierarchy of stages.

    Groups are named as in the public code, z1 at the bottom, and listed as the prior draws
    them: z3, z2_td, z2_bu, z1_td, z1_bu. `features` is the state the last groups are drawn
    from, next to these groups' own feature map (channels side by side).

    Args:
        network: The network with its weights.
        likelihood: Turns the decoder's output into p(x|z).
        image_shape: (C, H, W) of the user's images.
        padding: Zeros around them, (vertical, horizontal), in pixels.
        centred: Whether the network takes images in [-1, 1].
        dataset: Name of the data set it was trained on.
        binarize: Whether that was drawn as x ~ Bernoulli(image).
    """

    checkpointing = False

    def __init__(
        self,
        network: Network,
        likelihood: Callable[[Tensor], Likelihood],
        image_shape: Shape,
        padding: tuple[int, int] = (0, 0),
        centred: bool = False,
        dataset: str | None = None,
        binarize: bool = False,
    ) -> None:
        super().__init__()
        self.network = network
        self.likelihood = likelihood
        self.image_shape = image_shape
        self.padding = padding
        self.centred = centred
        self.dataset = dataset
        self.binarize = binarize
        self.groups = tuple(LatentGroup(name, shape) for name, shape in network.groups)
        self.feature_shape = network.feature_shape
        self.freeze()

    def transform(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Latents:
        """T: noise to latents; stops at the last group."""
        return self._run(eps, temperature, "latents")[0]

    def top_down(self, eps: Sequence[Tensor], temperature: float = 1.0) -> tuple[Latents, Tensor]:
        """Latents and features in one pass."""
        return self._run(eps, temperature, "features")

    def _run(
        self, eps: Sequence[Tensor], temperature: float, output: str
    ) -> tuple[Latents, Tensor | None]:
        self.check_latents(eps, "eps")

        def choose(i: int, _stage: object, _index: int, _d: object, p: Moments) -> Draw:
            sigma = p[1] if temperature == 1 else temperature * p[1]
            return Draw(torch.addcmul(p[0], sigma, eps[i]), p)

        draws, state = self.network.descend(choose, eps[0], output, bool(self.checkpointing))
        return tuple(draw.z for draw in draws), state

    def _follow(self, z: Sequence[Tensor], output: str) -> tuple[list[Draw], Tensor | None]:
        """The top-down pass along given latents."""
        self.check_latents(z, "z")
        return self.network.descend(
            lambda i, *a: Draw(z[i], a[-1]), z[0], output, bool(self.checkpointing)
        )

    def prior_parameters(self, z: Sequence[Tensor]) -> list[Moments]:
        """Mean and deviation of p(z_i | z_>i) at temperature 1 for each group."""
        return [draw.p for draw in self._follow(z, "latents")[0]]

    def inverse(self, z: Sequence[Tensor]) -> Latents:
        """T^-1: (z_i - mu_i(z_>i)) / sigma_i(z_>i)."""
        moments = self.prior_parameters(z)
        return tuple((v - mu) / sigma for v, (mu, sigma) in zip(z, moments, strict=True))

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """Log p(z_i | z_>i) of any latents: (B, L), nats."""
        moments = self.prior_parameters(z)
        return torch.stack([log_normal(v, p) for v, p in zip(z, moments, strict=True)], 1)

    def posterior(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """Draw from q(z|x)."""
        draws = self.infer(x, noise, generator)
        return Posterior(
            tuple(draw.z for draw in draws),
            torch.stack([log_normal(draw.z, draw.q) for draw in draws], 1),
            torch.stack([log_normal(draw.z, draw.p) for draw in draws], 1),
        )

    def infer(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[Draw]:
        """Like `posterior`, with every distribution's moments, one entry per group."""
        self.check_images(x)
        if noise is None:
            noise = self.noise(len(x), generator)
        self.check_latents(noise, "noise")
        return self.network.infer(self._prepare(x), noise)[0]

    def noise(self, n: int, generator: torch.Generator | None = None) -> Latents:
        """Standard-normal tensor (n, *shape) per group."""
        like = torch.empty(n, device=self.device, dtype=self.dtype)
        return tuple(randn(like.new_empty(n, *group.shape), generator) for group in self.groups)

    def encode(self, x: Tensor, noise: Sequence[Tensor]) -> tuple[Latents, Tensor]:
        """Posterior draw and features in one pass."""
        self.check_images(x)
        self.check_latents(noise, "noise")
        draws, state = self.network.infer(self._prepare(x), noise, "features")
        return tuple(draw.z for draw in draws), state

    def features(self, z: Sequence[Tensor]) -> Tensor:
        """State the last groups are drawn from beside their own map, (B, *feature_shape)."""
        return self._follow(z, "features")[1]

    def decode(self, z: Sequence[Tensor]) -> Likelihood:
        """p(x|z); `params` are those of the user's image, without the padding."""
        state = self._follow(z, "decoder")[1]
        return self.likelihood(self.network.image_parameters(state, self.padding))

    def _prepare(self, x: Tensor) -> Tensor:
        """Images as the network takes them."""
        x = x.to(self.dtype)
        x = 2 * x - 1 if self.centred else x
        vertical, horizontal = self.padding
        if not any(self.padding):
            return x
        return torch.nn.functional.pad(x, (horizontal, horizontal, vertical, vertical))


def crop(x: Tensor, padding: tuple[int, int]) -> Tensor:
    """Cut the padding (vertical, horizontal) off (B, C, H, W)."""
    vertical, horizontal = padding
    height, width = x.shape[-2:]
    return x[..., vertical : height - vertical, horizontal : width - horizontal]
