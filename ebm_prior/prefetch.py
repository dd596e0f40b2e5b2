"""The next batch is made by a thread while the caller works on the last one."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from ebm_prior.backbone import Latents
from ebm_prior.micro_batch import out_of_memory

__all__ = ["Prefetch"]


class Prefetch:
    """Batches by number, one ahead; a context, at whose end the thread has ended too.

    torch computes without Python's lock, so the two run beside each other; on CUDA the thread
    has a stream of its own.

    Args:
        make: Batch of a number: a function of it alone, so that it does not matter when it is
            called. An error is raised where the batch is asked for.
        length: No batch of this or a higher number is made ahead.
        device: Where batches are.
    """

    def __init__(self, make: Callable[[int], Latents], length: int, device: torch.device) -> None:
        self.make, self.device = make, device
        self.length = 0 if device.type == "mps" else length  # MPS serves one thread at a time
        self.ahead: tuple[int, Future] | None = None
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None

    def __enter__(self) -> Prefetch:
        self.thread = ThreadPoolExecutor(1, "prefetch")
        if self.stream is not None:  # what batches are made from may still be on its way
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
        return self

    def __exit__(self, *_: object) -> None:
        self.thread.shutdown(cancel_futures=True)

    def __call__(self, number: int) -> Latents:
        """Batch of this number; the making of the next one begins."""
        batch = self._made_ahead(number)
        if batch is None:
            batch = self.thread.submit(self._make, number).result()
        if number + 1 < self.length:
            self.ahead = number + 1, self.thread.submit(self._make, number + 1)
        if self.stream is not None:
            for tensor in batch:  # its memory is free when the caller's kernels have read it
                tensor.record_stream(torch.cuda.current_stream(self.device))
        return batch

    def _made_ahead(self, number: int) -> Latents | None:
        """The batch made ahead, if it is this one and there was memory for it."""
        ahead, self.ahead = self.ahead, None
        if ahead is None or ahead[0] != number:
            return None
        # Not raised here: its traceback, which holds what the attempt had allocated, would then
        # hold this frame and so itself, and keep the memory until a garbage collection.
        error = ahead[1].exception()
        if isinstance(error, RuntimeError) and out_of_memory(error):
            return None  # no memory beside the caller's work; alone it may fit
        return ahead[1].result()

    def _make(self, number: int) -> Latents:
        if self.stream is None:
            return self.make(number)
        with torch.cuda.stream(self.stream):
            batch = self.make(number)
        self.stream.synchronize()  # keeps this thread alone waiting
        return batch
