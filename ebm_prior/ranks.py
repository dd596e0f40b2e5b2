"""Several processes that work as one, each on its own device.

`accelerate launch` or `torchrun` start them, with the same command line; the set-up and the
communication are accelerate's. Every process draws the same random numbers (on GPUs, the seeds
of large ones) for the whole batch and works on its own rows, so that the result does not depend
on their number but for rounding. Files are written by the main process alone.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError

__all__ = ["Ranks", "Share", "is_main", "processes_here"]


def is_main() -> bool:
    """Whether this is the process that writes and speaks; true where it is the only one."""
    return _place()[0] == 0


def processes_here() -> int:
    """How many of the processes share this machine."""
    size = _place()[1]
    return min(int(os.environ.get("LOCAL_WORLD_SIZE", size)), size)


def _place() -> tuple[int, int]:
    """Which process this is, from 0, of how many; one without the other is somebody else's."""
    found = os.environ.get("RANK", ""), os.environ.get("WORLD_SIZE", "")
    rank, size = map(int, found) if all(text.isdecimal() for text in found) else (0, 1)
    return (rank, size) if rank < size else (0, 1)


class Share:
    """A generator that draws for all processes and keeps the rows of this one.

    Args:
        generator: In the same state in every process; it stays so.
        rank: Which process this is, from 0.
        size: How many there are.
    """

    def __init__(self, generator: torch.Generator, rank: int, size: int) -> None:
        self.generator, self.rank, self.size = generator, rank, size
        self.device = generator.device

    def draw(self, sampler: Callable, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Rows of this process, (B, *), of a draw of shape (size * B, *)."""
        rows = shape[0]
        whole = sampler(
            (self.size * rows, *shape[1:]),
            generator=self.generator,
            dtype=dtype,
            device=self.device,
        )
        return whole[self.rank * rows : (self.rank + 1) * rows]


class Ranks:
    """The processes of this run, from the environment that their launcher sets.

    With a single process nothing is imported, sent or copied.

    Args:
        device: Where the tensors to exchange are.

    Attributes:
        rank: Which process this is, from 0.
        size: How many there are.
    """

    def __init__(self, device: torch.device) -> None:
        self.rank, self.size = _place()
        self.device = device
        if self.size > 1:
            from accelerate import PartialState

            self._state = self._exchange(lambda: PartialState(cpu=device.type == "cpu"))

    @property
    def is_main(self) -> bool:
        """Whether this process writes the files."""
        return self.rank == 0

    def share(self, generator: torch.Generator) -> torch.Generator | Share:
        """The generator that draws this process's rows of a batch."""
        return generator if self.size == 1 else Share(generator, self.rank, self.size)

    def rows(self, batch: Tensor) -> Tensor:
        """Rows of this process, (B / size, *), of a batch (B, *) that all have."""
        each = len(batch) // self.size
        return batch if self.size == 1 else batch[self.rank * each : (self.rank + 1) * each]

    def gather(self, rows: Tensor) -> Tensor:
        """The batch (size * B, *) of the rows (B, *) of every process: undoes `rows`."""
        if self.size == 1:
            return rows
        from accelerate.utils import gather

        return self._exchange(lambda: gather(rows.contiguous()))

    def mean(self, values: Tensor) -> Tensor:
        """Mean over the processes, element by element."""
        if self.size == 1:
            return values
        from accelerate.utils import reduce

        return self._exchange(lambda: reduce(values, "mean"))

    def average_gradients(self, parameters: Sequence[Tensor]) -> None:
        """Replace every gradient by its mean over the processes, in one exchange."""
        if self.size == 1:
            return
        grads = [p.grad for p in parameters]
        flat = self.mean(torch.cat([g.flatten() for g in grads]))
        for grad, part in zip(grads, flat.split([g.numel() for g in grads]), strict=True):
            grad.copy_(part.view_as(grad))

    def any(self, flag: bool) -> bool:
        """Whether the flag is set in any process."""
        return flag if self.size == 1 else self.mean(self._scalar(flag)).item() > 0

    def agree(self, value: Any) -> Any:
        """The main process's value, which can be any plain one."""
        if self.size == 1:
            return value
        from accelerate.utils import broadcast_object_list

        return self._exchange(lambda: broadcast_object_list([value])[0])

    def wait(self) -> None:
        """Go on when all have come this far."""
        if self.size > 1:
            self._exchange(self._state.wait_for_everyone)

    def _scalar(self, value: float) -> Tensor:
        return torch.tensor([float(value)], device=self.device)

    def _exchange(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except RuntimeError as error:  # of torch.distributed: there is no narrower class
            if isinstance(error, torch.OutOfMemoryError):
                raise
            line = str(error).strip().splitlines()[0]
            raise EbmPriorError(
                f"process {self.rank} cannot reach the others, one of which may have stopped "
                f"({line}); see its own error, then start all again, a fit with --resume"
            ) from error
