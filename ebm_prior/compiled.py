"""The energy of noise and its gradient as one compiled graph, or as they are where that fails."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.micro_batch import out_of_memory

if TYPE_CHECKING:
    from ebm_prior.prior import EnergyPrior

__all__ = ["CompiledEnergy"]

MAX_GRAPHS = 8  # torch keeps no more of one function, and gives all up at the next


class CompiledEnergy:
    """`function(prior, eps, temperature)` by `torch.compile`.

    Every batch size, choice of groups that move, temperature and precision is compiled once,
    forward and backward pass; after the first eight, others run as they are. The first time that
    compiling does not work, for whatever reason, one line says why, and from then on the function
    runs as it is.
    On CUDA the passes are replayed as CUDA graphs.

    Args:
        function: Energies (B,) of noise, one (B, *shape) tensor per group; differentiable.
            It holds no state of its own: what it reads of the prior may change.
    """

    def __init__(self, function: Callable[[EnergyPrior, Sequence[Tensor], float], Tensor]) -> None:
        self.function = function
        self.graph: Callable[..., Tensor] | None = None
        self.tried: set[tuple] = set()
        self.works = True

    def __reduce__(self) -> tuple:
        return CompiledEnergy, (self.function,)  # neither copied nor stored: compiled anew

    def __call__(self, prior: EnergyPrior, eps: Sequence[Tensor], temperature: float) -> Tensor:
        """The function's value; errors of its own are raised, those of compiling are not."""
        eps = tuple(tensor.contiguous() for tensor in eps)  # else compiled for each layout too
        of_eps = ((tensor.shape, tensor.requires_grad) for tensor in eps)
        what = (prior.precision, temperature, *of_eps)
        if self.works and what not in self.tried:
            if len(self.tried) == MAX_GRAPHS:
                return self.function(prior, eps, temperature)
            self.try_out(prior, eps, temperature)
            self.tried.add(what)
        if not self.works:
            return self.function(prior, eps, temperature)
        return self.run(prior, eps, temperature)

    def run(self, prior: EnergyPrior, eps: Sequence[Tensor], temperature: float) -> Tensor:
        """The compiled function's value, in memory of its own: a CUDA graph reuses its own."""
        torch.compiler.cudagraph_mark_step_begin()
        return self.graph(prior, eps, temperature).clone()

    def try_out(self, prior: EnergyPrior, eps: Sequence[Tensor], temperature: float) -> None:
        """Compile for these shapes, both passes, as a failure may show in the second only."""
        with torch.no_grad():  # raises the function's own errors, and makes what is made lazily
            self.function(prior, eps, temperature)
        if sys.stderr.isatty():
            tqdm.write(f"compiling for {len(eps[0])} chains: a minute or more", file=sys.stderr)
        on_cuda = prior.backbone.device.type == "cuda"
        try:
            if self.graph is None:
                self.graph = torch.compile(
                    self.function,
                    fullgraph=True,
                    dynamic=False,
                    mode="reduce-overhead" if on_cuda else None,
                )
            # on CUDA the first run warms up, the second records the graphs, the third replays
            for _ in range(3 if on_cuda else 1):
                points = tuple(e.detach().clone().requires_grad_(e.requires_grad) for e in eps)
                value = self.run(prior, points, temperature)
                moving = [point for point in points if point.requires_grad]
                torch.autograd.grad(value.sum(), moving, allow_unused=True)
        except Exception as error:  # a compiler may raise anything
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            self.works, self.graph = False, None
            tqdm.write(f"not compiled, which is only slower: {reason(error)}", file=sys.stderr)


def reason(error: Exception) -> str:
    """What a compiler's error says, in one line."""
    error = getattr(error, "inner_exception", error)
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__
