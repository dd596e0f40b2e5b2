"""BIVA's network: stages of `backbones.stages` and a 1x1 convolution to the image."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.stages import crop
from backbones.stages.layers import Conv, Shape
from backbones.stages.network import Family, Network, StageSpec

__all__ = ["BivaNetwork", "LOG_VARIANCE"]

NAMES = {
    "q_stack": "q_convs", "p_stack": "p_convs", "q_head": "qx2z", "p_head": "px2z",
    "q_proj": "q_proj", "p_proj": "p_proj", "bu_proj": "bu_proj", "z_proj": "z_proj",
    "stored_prior": "prior",
}  # fmt: skip


def _deviation(log_variance: Tensor) -> Tensor:
    return torch.exp(0.5 * log_variance)


LOG_VARIANCE: dict[str | None, Callable[[Tensor], Tensor]] = {
    # Softplus keeps log-variances above zero, so every learned deviation exceeds one.
    "softplus": lambda raw: _deviation(F.softplus(raw)),
    "tanh": lambda raw: _deviation(torch.tanh(raw)),
    None: _deviation,
}
"""Deviation from a head's raw output, by the name of its activation."""


class BivaNetwork(Network):
    """BIVA, LVAE or VAE as the public BIVA code builds them.

    Args:
        specs: Stages, from the image upwards.
        in_shape: Images as the network takes them.
        outputs: Channels of the likelihood parameters.
        activation: Makes an activation.
        log_variance: Key of `LOG_VARIANCE`.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        in_shape: Shape,
        outputs: int,
        activation: Callable[[], nn.Module],
        log_variance: str | None,
    ) -> None:
        family = Family(
            NAMES,
            projection="linear",
            sigma=LOG_VARIANCE[log_variance],
            top_sigma=_deviation,
            needless_aux=True,
            widen=False,
        )
        super().__init__(family, specs, in_shape, activation, activation)
        size = self.out_shape[1:]
        self.projection = nn.Sequential(activation(), Conv(self.out_shape, outputs, 1, size))

    def image_parameters(self, state: Tensor, padding: tuple[int, int]) -> Tensor:
        """Likelihood parameters (B, outputs, H, W), padding cut off."""
        return crop(self.projection(state), padding)
