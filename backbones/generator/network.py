"""The multi-layer generator of the paper's Table 12 and its bottom-up inference network.

    z_L ~ N(0, I),   z_i | z_{i+1} ~ N(mu(z_{i+1}), sigma(z_{i+1})^2),   x | z_1     (Eq. 2)
    q(z|x) = q(z_1|x) prod_i q(z_{i+1}|z_i)                                          (Eq. 4)

All latents are vectors; with one layer it is the generator of the single-layer latent EBM
(Pang et al., 2020, https://arxiv.org/abs/2006.08205).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import shown
from ebm_prior.saved import is_text

__all__ = [
    "POSTERIOR_BOUND", "PRIOR_BOUND", "GeneratorConfig", "gaussian", "image_decoder",
    "image_encoder", "mlp",
]  # fmt: skip

MIN_SIZE = 4  # Table 12 begins at 4x4 pixels
MAX_START = 16  # pixels; one kernel of this size makes the first feature map from a vector
MAX_WIDTH = 1 << 16
MAX_LAYERS = 64
PRIOR_BOUND = 1.0  # of |log sigma| of p(z_i|z_{i+1})
POSTERIOR_BOUND = 5.0  # of q's, which must be able to become narrow


@dataclass(frozen=True)
class GeneratorConfig:
    """Sizes of a generator.

    Attributes:
        image_shape: (C, H, W).
        latents: Units of every layer, the top one (z_L) first, as in `Backbone.groups`.
        hidden: Units of the hidden layers of each conditional, p(z_i|z_{i+1}) and
            q(z_{i+1}|z_i).
        ngf: Channels of the largest feature map; each of half its size has twice as many.
        sigma: Standard deviation of p(x|z_1), on pixels scaled to [-1, 1].
        dataset: Name of the data it was trained on, or None.
    """

    image_shape: tuple[int, int, int]
    latents: tuple[int, ...] = (100, 100)
    hidden: tuple[int, ...] = (200, 200)
    ngf: int = 64
    sigma: float = 0.3
    dataset: str | None = None

    def __post_init__(self) -> None:
        for name in ("image_shape", "latents", "hidden"):
            value = getattr(self, name)
            if not isinstance(value, (list, tuple)) or not all(map(_is_width, value)):
                raise EbmPriorError(
                    f"generator: {name} must list whole numbers from 1 to {MAX_WIDTH}, got "
                    f"{shown(value)}"
                )
            object.__setattr__(self, name, tuple(value))
        if len(self.image_shape) != 3:
            raise EbmPriorError(
                f"generator: image_shape must be (C, H, W), got {shown(self.image_shape)}"
            )
        for name, least in (("latents", 1), ("hidden", 0)):
            if not least <= len(getattr(self, name)) <= MAX_LAYERS:
                raise EbmPriorError(f"generator: {name} must list {least} to {MAX_LAYERS} layers")
        if not _is_width(self.ngf):
            raise EbmPriorError(
                f"generator: ngf must lie in 1 ... {MAX_WIDTH}, got {shown(self.ngf)}"
            )
        if type(self.sigma) not in (int, float) or not 1e-6 < self.sigma < 1e6:
            raise EbmPriorError(f"generator: sigma must be positive, got {shown(self.sigma)}")
        if self.dataset is not None and not is_text(self.dataset):
            raise EbmPriorError("generator: dataset must be a name")
        if max(self.start[:2]) > MAX_START:
            height, width, halvings = self.start
            raise EbmPriorError(
                f"images of {self.image_shape[1]}x{self.image_shape[2]} pixels do not fit a "
                f"generator: halved {halvings} times they are {height}x{width} and odd, and at "
                f"most {MAX_START}x{MAX_START} is made from a vector; resize them, to 28, 32 or "
                "64 for example"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Rebuild from `asdict`.

        Raises:
            EbmPriorError: If a key is unknown or a value out of range; it is named.
        """
        unknown = values.keys() - {field.name for field in fields(cls)}
        if unknown:
            names = ", ".join(shown(key) for key in sorted(unknown)[:5])
            raise EbmPriorError(f"generator: unknown settings {names}")
        if "image_shape" not in values:
            raise EbmPriorError("generator: image_shape is missing")
        return cls(**values)

    @property
    def start(self) -> tuple[int, int, int]:
        """Height and width of the first feature map, and how often it is then doubled.

        Sides are halved while they are even and above 4: 64 and 32 pixels begin at 4x4, as
        Table 12 does and the single-layer model's code for 32 pixels; 28 at 7x7.
        """
        _, height, width = self.image_shape
        halvings = 0
        while height % 2 == 0 and width % 2 == 0 and min(height, width) > MIN_SIZE:
            height, width, halvings = height // 2, width // 2, halvings + 1
        return height, width, halvings


def _is_width(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_WIDTH


def gaussian(net: nn.Module, x: Tensor, bound: float) -> Normal:
    """N(mu, sigma^2), whose mu and log sigma are the two halves of a network's output.

    log sigma is bounded, softly, by bound * tanh(. / bound). Of the prior it has to be: a head
    whose energy falls linearly tilts the mean of exp(-E) over N(mu, sigma^2) by about
    exp(slope^2 sigma^2 / 2), and with log sigma linear in the layer above that is a double
    exponential, which no N(0, I) makes integrable: log Z would be infinite. The scale of
    latents being free, the bound costs nothing but extreme ratios.

    Args:
        net: Maps x to (B, 2 D, ...).
        x: Its input.
        bound: Largest |log sigma|.
    """
    mu, log_sigma = net(x).flatten(1).chunk(2, 1)
    return Normal(mu, (bound * torch.tanh(log_sigma / bound)).exp(), validate_args=False)


def mlp(inputs: int, hidden: tuple[int, ...], outputs: int) -> nn.Sequential:
    """Linear layers with LeakyReLU(0.2) between them."""
    layers: list[nn.Module] = []
    for width in hidden:
        layers += [nn.Linear(inputs, width), nn.LeakyReLU(0.2)]
        inputs = width
    return nn.Sequential(*layers, nn.Linear(inputs, outputs))


def image_decoder(config: GeneratorConfig) -> nn.Sequential:
    """Transposed convolutions from z_1 (B, D, 1, 1) to an image (B, C, H, W) before its tanh."""
    height, width, doublings = config.start
    inputs, layers = config.latents[-1], []
    for i in reversed(range(doublings)):
        channels = config.ngf << i
        first = i == doublings - 1
        kernel = ((height, width), 1, 0) if first else (4, 2, 1)
        layers += [nn.ConvTranspose2d(inputs, channels, *kernel), nn.LeakyReLU(0.2)]
        inputs = channels
    kernel = (4, 2, 1) if doublings else ((height, width), 1, 0)
    return nn.Sequential(*layers, nn.ConvTranspose2d(inputs, config.image_shape[0], *kernel))


def image_encoder(config: GeneratorConfig) -> nn.Sequential:
    """Convolutions from an image to mu and log sigma of z_1, (B, 2 D, 1, 1)."""
    height, width, halvings = config.start
    inputs, layers = config.image_shape[0], []
    for i in range(halvings):
        channels = config.ngf << i
        layers += [nn.Conv2d(inputs, channels, 4, 2, 1), nn.LeakyReLU(0.2)]
        inputs = channels
    return nn.Sequential(*layers, nn.Conv2d(inputs, 2 * config.latents[-1], (height, width)))
