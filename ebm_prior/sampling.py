"""Many samples in batches, each depending on its own seed alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from tqdm import tqdm

from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import StepInfo
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.ranks import Ranks

__all__ = ["SeededBatch", "parse_seeds", "seeded_batches"]


class SeededBatch(NamedTuple):
    """One batch of chains.

    Attributes:
        seeds: One per sample.
        start: eps ~ N(0, I): through T and the decoder, the Gaussian prior's samples.
        end: The chains' last states: the tilted prior's samples.
    """

    seeds: Sequence[int]
    start: Latents
    end: Latents


def seeded_batches(
    prior: EnergyPrior,
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    batch_size: int = 100,
    temperature: float = 1.0,
    callback: Callable[[StepInfo], None] | None = None,
    ranks: Ranks | None = None,
) -> Iterator[SeededBatch]:
    """Run one chain per seed; start, noise and acceptance of a chain come from its seed.

    Args:
        prior: Energy prior to sample.
        seeds: One per sample.
        config: Transition, steps, step size.
        batch_size: Chains run together; changes results by rounding only.
        temperature: Multiplies every prior sigma.
        callback: Called with a `StepInfo` after every step of every batch.
        ranks: Processes that share the chains of each batch, of which every one gets all; a
            callback then sees those of its own process.
    """
    rank, size = (0, 1) if ranks is None else (ranks.rank, ranks.size)
    total = len(seeds) * config.steps
    with tqdm(total=total, desc="sampling", unit="step", disable=None, delay=1) as bar:

        def advance(info: StepInfo) -> None:
            bar.update(size * len(info.accepted))
            if callback is not None:
                callback(info)

        for first in range(0, len(seeds), batch_size):
            batch = list(seeds[first : first + batch_size])
            # as many rows in every process: the last is repeated where they do not come out even
            each = -(-len(batch) // size)
            own = (batch + batch[-1:] * size)[rank * each : (rank + 1) * each]
            generators = [torch.Generator().manual_seed(seed) for seed in own]
            start = prior.noise(len(own), generators)
            end = prior.run_chain(
                start, config, temperature=temperature, generator=generators, callback=advance
            )
            if size > 1:
                start, end = (
                    tuple(ranks.gather(e)[: len(batch)] for e in eps) for eps in (start, end)
                )
            yield SeededBatch(batch, start, end)


def parse_seeds(text: str) -> list[int]:
    """Seeds such as `0-49999` or `1,5,10-12`, in the order given.

    Raises:
        EbmPriorError: If the text is no such list.
    """
    seeds: list[int] = []
    for part in text.split(","):
        first, _, last = part.strip().partition("-")
        try:
            low, high = int(first), int(last or first)
            torch.Generator().manual_seed(high)
        except (ValueError, RuntimeError):  # no number, or beyond 64 bits
            raise EbmPriorError(
                f"cannot read seeds {text!r}; expected a list such as 0-99 or 1,5,10-12"
            ) from None
        if high < low:
            raise EbmPriorError(f"seed range {part!r} runs backwards")
        seeds.extend(range(low, high + 1))
    return seeds
