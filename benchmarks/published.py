"""The Langevin step's log-density as the public trainer computes it, to compare with ours."""

from __future__ import annotations

from collections.abc import Sequence
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor

from backbones.nvae.network import RESIDUAL_SCALE, TOP_SIGMA, Cell, log_normal
from ebm_prior import EnergyPrior

__all__ = ["Published"]


class Published:
    """log p(z) - E(z) at z = T(eps), through the plain network.

    Batch norms and weight norms are applied at every call, activation and residual sums are the
    public code's, the image is decoded at every step and held through the backward pass, and
    log p(z) is differentiated: its gradient with respect to eps is -eps - grad sum log sigma,
    which is not the paper's score (App. A.3). The heads are the same as ours.

    Args:
        prior: Heads on an NVAE.
    """

    def __init__(self, prior: EnergyPrior) -> None:
        self.prior = prior
        self.logits: Tensor | None = None

    @patch.object(F, "silu", lambda x: Swish.apply(x))
    @patch.object(Cell, "forward", lambda cell, x: cell_as_published(cell, x))
    def __call__(self, eps: Sequence[Tensor]) -> Tensor:
        """Noise, one (B, *shape) per group, to (B,), nats."""
        self.logits = None
        network = self.prior.backbone.network
        z, log_p = [], []

        def draw(index: int, state: Tensor) -> Tensor:
            if index == 0:
                mu, sigma = torch.zeros_like(eps[0]), torch.full_like(eps[0], TOP_SIGMA)
            else:
                mu, sigma = network.prior_params(index, state)
            z.append(mu + sigma * eps[index])
            log_p.append(log_normal(z[-1], mu, sigma))
            return z[-1]

        _, features = network.descend(draw)
        self.logits = network.decode(features)
        return sum(log_p) - self.prior.energies_of(self.prior.head_inputs(z, features)).sum(1)


def cell_as_published(cell: Cell, x: Tensor) -> Tensor:
    """skip(x) + 0.1 * (operations(x) * gate), each a pass over the whole tensor."""
    y = x
    for operation in cell._ops:
        y = operation(y)
    if cell.use_se:
        y = y * cell.se.se(y.mean((2, 3)))[:, :, None, None]
    return cell.skip(x) + RESIDUAL_SCALE * y


class Swish(torch.autograd.Function):
    """x * sigmoid(x) with a backward pass written out in whole-tensor operations."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # noqa: D102
        ctx.save_for_backward(x)
        return x * torch.sigmoid(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # noqa: D102
        (x,) = ctx.saved_tensors
        gate = torch.sigmoid(x)
        return grad * (gate * (1 + x * (1 - gate)))
