"""Pictures of a prior at work: before and after from the same noise, and chains on their way."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.images import labelled_rows, png_bytes, to_uint8
from ebm_prior.langevin import StepInfo

if TYPE_CHECKING:
    from ebm_prior.prior import EnergyPrior

__all__ = ["BEFORE_AFTER", "CARD_SEEDS", "TRANSITION", "Strip", "before_after", "card_pictures"]

CARD_SEEDS = range(32)
BEFORE_AFTER, TRANSITION = "samples/before-after.png", "samples/transition.png"


class Strip:
    """Collects the transition strip (Fig. 5): the first chains along their way.

    Pass it as the `callback` of `seeded_batches` and call `close` with the first batch.

    Args:
        prior: Prior that is sampled.
        steps: Length of the chains.
        temperature: Of the prior.
    """

    chains, columns = 8, 9

    def __init__(self, prior: EnergyPrior, steps: int, temperature: float = 1.0) -> None:
        self.prior, self.temperature = prior, temperature
        shown = min(self.columns, steps)
        self.at = {round(steps * (i + 1) / shown) for i in range(shown)}
        self.rows: dict[int, Tensor] = {}
        self.closed = False

    def __call__(self, info: StepInfo) -> None:
        """Take a picture at the chosen steps of the first batch."""
        if not self.closed and info.step in self.at:
            self.rows[info.step] = self.images(info.eps)

    def close(self, start: Latents) -> None:
        """Add the start, once the first batch is done."""
        if not self.closed:
            self.rows = {0: self.images(start), **self.rows}
            self.closed = True

    def images(self, eps: Latents) -> Tensor:
        """Pictures of the first chains."""
        return self.prior.images([e[: self.chains] for e in eps], self.temperature)

    def picture(self) -> Tensor:
        """One labelled row per recorded step: (3, H, W), uint8."""
        return labelled_rows([(f"step {k}", to_uint8(x)) for k, x in self.rows.items()])


def before_after(before: Sequence[Tensor], after: Sequence[Tensor], steps: int) -> Tensor:
    """Gaussian prior above energy prior, from the same noise: (3, H, W), uint8.

    Args:
        before: Batches of images, uint8, (B, C, H, W).
        after: As many of the energy prior.
        steps: Length of the chains, for the label.
    """
    rows = [
        ("Gaussian prior", torch.cat(list(before))),
        (f"energy prior, {steps} steps", torch.cat(list(after))),
    ]
    return labelled_rows(rows, columns=min(len(rows[0][1]), 16))


def card_pictures(prior: EnergyPrior) -> dict[str, bytes]:
    """The two pictures of a model card, as PNG files by their path in the repository.

    They are those of `ebm-prior sample --seeds 0-31 --compare --trajectory ...`.
    """
    from ebm_prior.sampling import seeded_batches

    config = prior.sampler
    strip = Strip(prior, config.steps)
    before, after = [], []
    for batch in seeded_batches(prior, CARD_SEEDS, config, callback=strip):
        strip.close(batch.start)
        before.append(to_uint8(prior.images(batch.start)))
        after.append(to_uint8(prior.images(batch.end)))
    return {
        BEFORE_AFTER: png_bytes(before_after(before, after, config.steps)),
        TRANSITION: png_bytes(strip.picture()),
    }
