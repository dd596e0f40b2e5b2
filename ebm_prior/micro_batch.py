"""Gradients of a large batch of chains in what memory there is.

Chains are independent, so parts of a batch give what the whole gives, up to the rounding of
operations that compute differently for other batch sizes. In this order:

1. all chains at once, where they comfortably fit into the memory that is free;
2. as many at a time as fit;
3. where not even one does, one at a time, computing again in the backward pass what the
   backbone would have kept for it (`Backbone.checkpointing`). Last, as it costs a third to a
   half more time, where parts cost a few percent.

What memory they need is estimated. Where that was wrong and memory runs out, the number of
chains halves, and after a single one comes step 3.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.backbone import Backbone, Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.memory import free_memory, saved_bytes

__all__ = ["ChainMemory", "MicroBatched"]

HEADROOM = 1.6
"""Memory that must be free, in units of what a gradient keeps for its backward pass.

All tensors of a step peak at 1.00 to 1.17 of it, as `python -m benchmarks.memory` counts them.
Measured on the CPU, a process grew by 1.12 to 1.25 of it for NVAEs with 10 groups and more; for
small networks by more, but then by megabytes, as kernels' own buffers weigh more. The rest is
left to everybody else: too small a micro-batch costs a few percent of time, too large a one
the run.
"""


@dataclass
class ChainMemory:
    """What has been found out about the memory of chains, so as to ask only once.

    Attributes:
        kept_bytes: What the gradient of one chain keeps, by density.
        rows: Chains to take at a time, by density and batch size. They decide how results are
            rounded, so that a run keeps them with its state.
    """

    kept_bytes: dict[str, int] = field(default_factory=dict)
    rows: dict[str, int] = field(default_factory=dict)


class Owner(Protocol):
    """Whose chains they are, such as an `EnergyPrior`.

    Attributes:
        micro_batch: Samples at a time, None for as many as fit.
        chain_memory: How many that are.
        backbone: What can save memory by computing again.
        compiled: Whether gradients are compiled, anew for every number of samples.
    """

    micro_batch: int | None
    chain_memory: ChainMemory
    compiled: bool
    backbone: Backbone


class MicroBatched:
    """A density or energy whose gradient is taken of at most so many samples at once.

    That is `owner.micro_batch`, or as many as fit. Where memory runs out, `owner.micro_batch`
    becomes half of what was tried, for good, and the chain goes on.

    Args:
        function: Maps latents of batch B, and the tensors of `fixed`, to (B,), nats.
        owner: Holds `micro_batch`, and what is known about memory.
        fixed: What else it reads that has a row per sample, (B, *) each: a part of the batch
            gets the same rows of them.
        kind: What tells it from other functions of the same name, where they differ in memory.
    """

    def __init__(
        self,
        function: Callable[..., Tensor],
        owner: Owner,
        fixed: Sequence[Tensor] = (),
        kind: str = "",
    ) -> None:
        if owner.micro_batch is not None and owner.micro_batch < 1:
            raise EbmPriorError(f"micro_batch must be at least 1 or None, got {owner.micro_batch}")
        self.function, self.owner, self.fixed, self.kind = function, owner, tuple(fixed), kind
        self.rows = slice(None)

    def __call__(self, eps: Latents) -> Tensor:
        """The function itself."""
        return self.function(eps, *(tensor[self.rows] for tensor in self.fixed))

    def in_parts(
        self,
        evaluate: Callable[[Tensor], tuple[Tensor, Tensor]],
        flat: Tensor,
        unflatten: Callable[[Tensor], Latents] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Values (B,) and gradients (B, D) by `evaluate`, called on parts of flat (B, D).

        Args:
            evaluate: Gives values and gradients of some rows.
            flat: The samples.
            unflatten: Makes latents of rows; None where no gradient is taken, so that nothing is
                kept of which to estimate the size.

        Raises:
            EbmPriorError: If there is no memory for even one sample.
        """
        fit = self.owner.micro_batch
        if fit is None:
            fit = max(len(flat), 1) if unflatten is None else self.that_fit(flat, unflatten)
        parts, done = [], 0
        while done < len(flat) or not parts:
            self.rows = slice(done, done + fit)
            part = flat[self.rows]
            try:
                parts.append(evaluate(part))
                done += len(part)
                continue
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                # without a gradient nothing is kept that could be computed again
                last = unflatten is None or self.owner.backbone.checkpointing is not False
                if len(part) < 2 and last:
                    raise EbmPriorError(
                        "out of memory for a single chain; free some, or use another --device"
                    ) from error
            # only here has the failed attempt let go of its memory, which its error still held
            if len(part) < 2:
                self.recompute("out of memory for the gradient of a single chain")
                continue
            fit = self.owner.micro_batch = len(part) // 2
            say(
                f"out of memory for {len(part)} chains at once: from now on {fit}, with the same "
                "result up to rounding"
            )
        self.rows = slice(None)
        if len(parts) == 1:
            return parts[0]
        values, grads = zip(*parts, strict=True)
        return torch.cat(values), torch.cat(grads)

    def that_fit(self, flat: Tensor, unflatten: Callable[[Tensor], Latents]) -> int:
        """Samples to take at a time, at least 1; asked once per density and batch size."""
        name = getattr(self.function, "__qualname__", type(self.function).__qualname__)
        precision = getattr(self.owner, "precision", "")
        density = f"{name} {self.kind} {precision} {flat.dtype} {flat.device} {flat.shape[1]}"
        batch, known = f"{density} x {len(flat)}", self.owner.chain_memory
        if batch in known.rows:
            return known.rows[batch]
        rows = self.choose(density, flat, unflatten)
        if not self.owner.backbone.checkpointing:  # else it holds only as long as that is on
            known.rows[batch] = rows
        return rows

    def choose(self, density: str, flat: Tensor, unflatten: Callable) -> int:
        """As many samples as fit into the memory that is free now."""
        known, backbone = self.owner.chain_memory, self.owner.backbone
        if backbone.checkpointing:
            return 1
        free = free_memory(flat.device)
        if free is None or not len(flat):
            return max(len(flat), 1)
        if density not in known.kept_bytes:
            # never compiled for a single chain, which takes longer than it could save
            compiled, self.owner.compiled = self.owner.compiled, False
            try:
                known.kept_bytes[density] = self.kept_bytes(flat, unflatten)
            except RuntimeError as error:
                if not out_of_memory(error):
                    raise
                return len(flat)  # the attempts will tell
            finally:
                self.owner.compiled = compiled
        each = HEADROOM * known.kept_bytes[density]
        if each * len(flat) <= free:
            return len(flat)
        if each > free and backbone.checkpointing is False:
            self.recompute(
                f"the gradient of one chain may take {gib(each)} of memory, of which "
                f"{gib(free)} are free"
            )
            return 1
        parts = math.ceil(len(flat) / max(int(free / each), 1))
        rows = math.ceil(len(flat) / parts)
        say(
            f"the gradient of {len(flat)} chains at once may take {gib(each * len(flat))} of "
            f"memory, of which {gib(free)} are free: {rows} at a time, with the same result up to "
            "rounding"
        )
        return rows

    def kept_bytes(self, flat: Tensor, unflatten: Callable) -> int:
        """What the gradient of one sample keeps; copies of weights, which all share, aside."""
        self.rows = slice(1)
        one = saved_bytes(self, flat[:1], unflatten)
        if getattr(self.owner, "precision", "fp32") == "fp32" or len(flat) < 2:
            return one  # without copies
        self.rows = slice(2)
        return saved_bytes(self, flat[:2], unflatten) - one

    def recompute(self, why: str) -> None:
        """From now on let the backbone compute again what it would keep."""
        self.owner.backbone.checkpointing = True
        say(
            f"{why}: from now on one at a time, computing again what does not fit, which is "
            "slower, with the same result"
        )


def say(line: str) -> None:
    """One line to whoever watches, below no progress bar."""
    tqdm.write(line, file=sys.stderr)


def gib(size: float) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.3g} GiB"


# What libraries beneath torch say in a plain RuntimeError. cuDNN's line is also torch's last
# word where every algorithm of a convolution failed for lack of memory.
NO_MEMORY = (
    "DefaultCPUAllocator: can't allocate memory",
    "MPS backend out of memory",
    "CUDA error: out of memory",
    "CUBLAS_STATUS_ALLOC_FAILED",
    "CUDNN_STATUS_ALLOC_FAILED",
    "was unable to find an engine to execute this computation",
)


def out_of_memory(error: RuntimeError) -> bool:
    """Whether an allocation failed; only those of torch on CUDA have an error class."""
    text = str(error)
    return (
        isinstance(error, torch.OutOfMemoryError)
        or text == "could not create a primitive"  # of oneDNN, on the CPU
        or any(line in text for line in NO_MEMORY)
    )
