"""Joint training: generator, heads and inference network learn together (Sec. 3.2 and 3.3).

With theta = (alpha, beta) and E = -f, the joint density of the tilted prior is

    log p(x, z) = log p_beta0(x|z) + log p_beta>0(z) - E_alpha(z) - log Z,

and the derivative of log Z is an expectation under the tilted prior itself (Eq. 24-25),

    grad log Z = E_p(z) [ grad (log p_beta>0(z) - E_alpha(z)) ].

So one loss serves both methods, which differ in where the positive samples come from:

    loss = mean over z_pos of  log q(z|x) - log p(x|z) - log p(z) + E(z)
         + mean over z_neg of  log p(z) - E(z),        z_neg ~ the tilted prior, constants.

* Maximum likelihood: z_pos ~ p(z|x) by Langevin dynamics, constants, and no log q. The
  gradient is minus that of log p(x): Eq. 9 in beta0, Eq. 10 in alpha, Eq. 11 in beta>0.
* Variational: z_pos ~ q(z|x), differentiable in its parameters omega, with its log q. The
  gradient is that of KL(q(x, z) || p(x, z)): Eq. 16 in beta0, 17 in alpha, 18 in beta>0, 19
  in omega, where the first mean is minus the ELBO with the energy in it.

Nothing has to be held back from anything else: z_pos depends on omega alone, so whatever
reaches beta and alpha comes from the densities themselves, which is the first expectation of
Eq. 16-18; and z_neg depends on nothing, which leaves the second.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.langevin import Generators, langevin
from ebm_prior.micro_batch import MicroBatched
from ebm_prior.prior import EnergyPrior, frozen

__all__ = ["JointTerms", "joint_loss", "posterior_chains", "posterior_log_density"]


class JointTerms(NamedTuple):
    """What a step's objective is made of.

    Attributes:
        loss: What is minimised, a scalar, nats per image.
        log_px: log p(x|z_pos), (B,), nats.
        e_pos: Energies of the positive samples, (B, heads), nats; None without negative ones.
        e_neg: Those of the negative samples, (B', heads).
    """

    loss: Tensor
    log_px: Tensor
    e_pos: Tensor | None
    e_neg: Tensor | None


def joint_loss(
    prior: EnergyPrior,
    x: Tensor,
    z_pos: Sequence[Tensor],
    z_neg: Sequence[Tensor] | None,
    log_q: Tensor | None = None,
    log_p: Tensor | None = None,
) -> JointTerms:
    """The loss of the module, whose gradient is Eq. 9-11 or Eq. 16-19.

    Args:
        prior: Heads on a backbone whose weights take gradients; its `log_prior` must be
            differentiable in them.
        x: Images, (B, C, H, W) in [0, 1].
        z_pos: Latents of these images: detached samples of p(z|x), or samples of q(z|x) that
            carry their gradient.
        z_neg: Detached samples of the tilted prior, any number of them; None for the Gaussian
            prior, E = 0, whose negative mean has gradient zero and is left out.
        log_q: log q(z_pos|x) of the variational method, (B, L), nats.
        log_p: log p(z_pos), (B, L), nats, where it is already known.
    """
    backbone = prior.backbone
    log_px = backbone.decode(z_pos).log_prob(x)
    if log_p is None:
        log_p = backbone.log_prior(z_pos)
    loss = -(log_px + log_p.sum(1)).mean()
    if log_q is not None:
        loss = loss + log_q.sum(1).mean()
    if z_neg is None:
        return JointTerms(loss, log_px, None, None)
    e_pos, e_neg = prior.energies(z_pos), prior.energies(z_neg)
    loss = (
        loss + e_pos.sum(1).mean() - e_neg.sum(1).mean() + backbone.log_prior(z_neg).sum(1).mean()
    )
    return JointTerms(loss, log_px, e_pos, e_neg)


def posterior_log_density(prior: EnergyPrior, x: Tensor, eps: Sequence[Tensor]) -> Tensor:
    """Unnormalised log p(eps|x) of the tilted prior's posterior (Eq. 14), (B,), nats.

        log p(x|T(eps)) - E(T(eps)) - |eps|^2 / 2

    In eps-space the change of variables is already in it, as in `EnergyPrior.log_density`.
    """
    z, features = prior.backbone.top_down(eps)
    energy = prior.energies_of(prior.head_inputs(z, features)).sum(1)
    half_norm = sum(e.square().flatten(1).sum(1) for e in eps) / 2
    return prior.backbone.decode(z).log_prob(x) - energy - half_norm


def posterior_chains(
    prior: EnergyPrior,
    x: Tensor,
    *,
    steps: int,
    step_size: float,
    generator: Generators = None,
) -> Latents:
    """Langevin chains of p(eps|x), one per image, started at N(0, I).

    Args:
        prior: Heads on a backbone.
        x: Images, (B, C, H, W) in [0, 1].
        steps: Number of steps.
        step_size: s of `langevin`.
        generator: One generator, or one per image.

    Returns:
        The chains' last states, detached: T of them are the latents.
    """
    start = prior.noise(len(x), generator)
    with frozen(prior):  # a chain needs the gradient of eps alone
        return langevin(
            MicroBatched(lambda eps, x: posterior_log_density(prior, x, eps), prior, [x]),
            start,
            steps=steps,
            step_size=step_size,
            generator=generator,
        )
