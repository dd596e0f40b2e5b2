"""HVAE's network: stages of `backbones.stages` and a likelihood layer."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch.nn.functional as F
from torch import Tensor, nn

from backbones.stages import crop
from backbones.stages.layers import Conv, Shape
from backbones.stages.network import Family, Network, StageSpec

__all__ = ["HvaeNetwork"]

NAMES = {
    "q_stack": "q_deterministic", "p_stack": "p_deterministic", "q_head": "in_transform_q",
    "p_head": "in_transform_p", "q_proj": "q_projection", "p_proj": "p_projection",
    "bu_proj": "bu_proj", "z_proj": "z_proj", "stored_prior": "prior_logits",
}  # fmt: skip


def _deviation(raw: Tensor) -> Tensor:
    """log2(1 + 2^raw): one at zero."""
    return F.softplus(raw, beta=math.log(2)).clamp(min=1e-6)


class LikelihoodLayer(nn.Module):
    """Parameters of p(x|z) from the decoder's output.

    Args:
        layer: The convolution.
        activation: Applied before it.
        activate: Whether it is; the discretised likelihoods only carry it.
    """

    def __init__(self, layer: Conv, activation: nn.Module, activate: bool) -> None:
        super().__init__()
        self.parameter_net = layer
        self.activation = activation
        self.activate = activate

    def unused(self) -> list[str]:
        """Names of activations that take no part in `forward`."""
        return [] if self.activate else ["activation"]

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to (B, outputs, H, W)."""
        return self.parameter_net(self.activation(x) if self.activate else x)


class HvaeNetwork(Network):
    """VAE, LVAE or BIVA as the public HVAE code builds them.

    Args:
        specs: Stages, from the image upwards.
        in_shape: Images as the network takes them.
        image_size: Height and width without padding.
        outputs: Channels of the likelihood parameters.
        kernel: Kernel of the likelihood layer.
        activate: Whether the likelihood layer activates its input.
        activation: Makes an activation.
    """

    def __init__(
        self,
        specs: Sequence[StageSpec],
        in_shape: Shape,
        image_size: tuple[int, int],
        outputs: int,
        kernel: int,
        activate: bool,
        activation: Callable[[], nn.Module],
    ) -> None:
        family = Family(
            NAMES,
            projection="transform",
            sigma=_deviation,
            top_sigma=_deviation,
            needless_aux=False,
            widen=True,
        )
        biva = specs[0].kind == "biva"
        # The code does not pass the model's activation on to BIVA's heads.
        super().__init__(family, specs, in_shape, activation, nn.ELU if biva else activation)
        shape = (self.out_shape[0], *image_size)
        normed = specs[-1].blocks[-1].normed
        self.likelihood = LikelihoodLayer(
            Conv(shape, outputs, kernel, image_size, normed), activation(), activate
        )

    def image_parameters(self, state: Tensor, padding: tuple[int, int]) -> Tensor:
        """Likelihood parameters (B, outputs, H, W) of the unpadded image.

        The padding goes before the last convolution, which sees zeros at the image's border.
        """
        return self.likelihood(crop(state, padding))
