"""The two stage-two objectives, on per-head energies."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

__all__ = ["contrastive_loss", "nce_loss"]


def contrastive_loss(e_pos: Tensor, e_neg: Tensor, regularizer: float = 0.0) -> Tensor:
    """Maximum-likelihood objective, whose gradient is Eq. 10/17 with E = -f.

        L = sum_i mean_q[E_i] - mean_p[E_i] + regularizer * (mean_q[E^2] + mean_p[E^2])

    Args:
        e_pos: Energies of posterior samples, (B, heads), nats.
        e_neg: Energies of samples of the tilted prior, (B', heads), nats; the samples
            themselves must be detached.
        regularizer: Weight of the squared total energies; keeps their scale in check.

    Returns:
        Scalar in nats; negative while the heads tell the two apart.
    """
    loss = (e_pos.mean(0) - e_neg.mean(0)).sum()
    if regularizer:
        squares = e_pos.sum(1).square().mean() + e_neg.sum(1).square().mean()
        loss = loss + regularizer * squares
    return loss


def nce_loss(e_pos: Tensor, e_neg: Tensor, regularizer: float = 0.0) -> Tensor:
    """Noise-contrastive estimation: tell q(z) from the backbone's own prior.

    The logit is -sum_i E_i, so at the optimum exp(-E) = q(z) / p(z): the heads then turn
    the Gaussian prior into the aggregate posterior.

    Reference: Aneja et al., "A Contrastive Learning Approach for Training Variational
    Autoencoder Priors", NeurIPS 2021, Eq. 7. https://arxiv.org/abs/2010.02917

    Args:
        e_pos: Energies of posterior samples, (B, heads), nats.
        e_neg: Energies of Gaussian-prior samples, (B', heads), nats.
        regularizer: As in `contrastive_loss`.

    Returns:
        Scalar in nats; 2 log 2 = 1.386 when the heads know nothing.
    """
    pos, neg = e_pos.sum(1), e_neg.sum(1)
    loss = F.softplus(pos).mean() + F.softplus(-neg).mean()
    if regularizer:
        loss = loss + regularizer * (pos.square().mean() + neg.square().mean())
    return loss
