"""The multi-layer generator of the paper's Table 12 and its bottom-up inference network.

    z_L ~ N(0, I),   z_i | z_{i+1} ~ N(mu(z_{i+1}), sigma(z_{i+1})^2),   x | z_1     (Eq. 2)
    q(z|x) = q(z_1|x) prod_i q(z_{i+1}|z_i)                                          (Eq. 4)

All latents are vectors; with one layer it is the generator of the single-layer latent EBM
(Pang et al., 2020, https://arxiv.org/abs/2006.08205).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
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
HALF, SAME = (4, 2, 1), (3, 1, 1)  # kernel, stride and padding that halve a side, or keep it
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
        start: Shorter side of the first feature map, in pixels; 0: what is left when the image
            is halved while its sides are even and above 4. That is Table 12's 4 for 64 pixels
            and the single-layer model's for SVHN; CIFAR-10's 32 pixels begin at 8.
        image_stride: Stride of the layer that makes the image: 2 with a 4x4 kernel, as in
            Table 12, or 1 with a 3x3 kernel after one feature map more, as for CIFAR-10.
    """

    image_shape: tuple[int, int, int]
    latents: tuple[int, ...] = (100, 100)
    hidden: tuple[int, ...] = (200, 200)
    ngf: int = 64
    sigma: float = 0.3
    dataset: str | None = None
    start: int = 0
    image_stride: int = 2

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
        if type(self.start) is not int or not 0 <= self.start <= MAX_START:
            raise EbmPriorError(
                f"generator: start must lie in 0 ... {MAX_START}, got {shown(self.start)}"
            )
        if type(self.image_stride) is not int or self.image_stride not in (1, 2):
            raise EbmPriorError(
                f"generator: image_stride must be 1 or 2, got {shown(self.image_stride)}"
            )
        height, width, halvings = self.first_map
        pixels = f"images of {self.image_shape[1]}x{self.image_shape[2]} pixels"
        if self.start and min(height, width) != self.start:
            raise EbmPriorError(
                f"{pixels} do not fit a generator with start={self.start}: halved {halvings} "
                f"times they are {height}x{width}; leave start out, or resize them"
            )
        if max(height, width) > MAX_START:
            raise EbmPriorError(
                f"{pixels} do not fit a "
                f"generator: halved {halvings} times they are {height}x{width} and odd, and at "
                f"most {MAX_START}x{MAX_START} is made from a vector; resize them, to 28, 32 or "
                "64 for example"
            )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> GeneratorConfig:
        """Rebuild from `to_dict`.

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

    def to_dict(self) -> dict[str, Any]:
        """What `from_dict` reads, without later settings at their default, as in old files."""
        later = {"start", "image_stride"}
        default = {field.name: field.default for field in fields(self) if field.name in later}
        return {k: v for k, v in asdict(self).items() if k not in later or v != default[k]}

    @property
    def first_map(self) -> tuple[int, int, int]:
        """Height and width of the first feature map, and how often it is then doubled."""
        _, height, width = self.image_shape
        least, halvings = self.start or MIN_SIZE, 0
        while height % 2 == 0 and width % 2 == 0 and min(height, width) > least:
            height, width, halvings = height // 2, width // 2, halvings + 1
        return height, width, halvings

    @property
    def channels(self) -> list[int]:
        """Channels of the feature maps, the largest first; of half its size, twice as many."""
        maps = self.first_map[2] + (self.image_stride == 1)
        return [self.ngf << i for i in range(maps)]


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
    inputs, layers = config.latents[-1], []
    kernel = (config.first_map[:2], 1, 0)
    for channels in reversed(config.channels):
        layers += [nn.ConvTranspose2d(inputs, channels, *kernel), nn.LeakyReLU(0.2)]
        inputs, kernel = channels, HALF
    if config.image_stride == 1:
        kernel = SAME
    return nn.Sequential(*layers, nn.ConvTranspose2d(inputs, config.image_shape[0], *kernel))


def image_encoder(config: GeneratorConfig) -> nn.Sequential:
    """Convolutions from an image to mu and log sigma of z_1, (B, 2 D, 1, 1)."""
    inputs, layers = config.image_shape[0], []
    kernel = SAME if config.image_stride == 1 else HALF
    for channels in config.channels:
        layers += [nn.Conv2d(inputs, channels, *kernel), nn.LeakyReLU(0.2)]
        inputs, kernel = channels, HALF
    return nn.Sequential(*layers, nn.Conv2d(inputs, 2 * config.latents[-1], config.first_map[:2]))
