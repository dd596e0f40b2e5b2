"""Gradients of a large batch of chains a few samples at a time: less memory for more time.

Chains are independent, so the parts give what the whole gives, up to the rounding of
operations that compute differently for other batch sizes.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError

__all__ = ["MicroBatched"]


class HasMicroBatch(Protocol):
    """What remembers the size, such as an `EnergyPrior`: samples at a time, None for all."""

    micro_batch: int | None


class MicroBatched:
    """A density or energy whose gradient is taken of at most `owner.micro_batch` samples at once.

    Where memory runs out, that number halves, for good, and the chain goes on.

    Args:
        function: Maps latents of batch B, and the tensors of `fixed`, to (B,), nats.
        owner: Holds `micro_batch`.
        fixed: What else it reads that has a row per sample, (B, *) each: a part of the batch
            gets the same rows of them.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        owner: HasMicroBatch,
        fixed: Sequence[Tensor] = (),
    ) -> None:
        if owner.micro_batch is not None and owner.micro_batch < 1:
            raise EbmPriorError(f"micro_batch must be at least 1 or None, got {owner.micro_batch}")
        self.function, self.owner, self.fixed = function, owner, tuple(fixed)
        self.rows = slice(None)

    def __call__(self, eps: Latents) -> Tensor:
        """The function itself."""
        return self.function(eps, *(tensor[self.rows] for tensor in self.fixed))

    def in_parts(
        self, evaluate: Callable[[Tensor], tuple[Tensor, Tensor]], flat: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Values (B,) and gradients (B, D) by `evaluate`, called on parts of flat (B, D).

        Raises:
            EbmPriorError: If there is no memory for even one sample.
        """
        parts, done = [], 0
        while done < len(flat) or not parts:
            self.rows = slice(done, done + (self.owner.micro_batch or len(flat)))
            part = flat[self.rows]
            try:
                parts.append(evaluate(part))
                done += len(part)
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                if len(part) < 2:
                    raise EbmPriorError(
                        "out of memory for a single chain; free some, or use another --device"
                    ) from error
            # only here has the failed attempt let go of its memory, which its error still held
            self.owner.micro_batch = len(part) // 2
            tqdm.write(
                f"out of memory for the gradient of {len(part)} chains at once: from now on "
                f"{self.owner.micro_batch}, with the same result",
                file=sys.stderr,
            )
        self.rows = slice(None)
        if len(parts) == 1:
            return parts[0]
        values, grads = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(grads)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only those on CUDA have an error class of their own."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or "DefaultCPUAllocator: can't allocate memory" in text
        or "MPS backend out of memory" in text
    )
