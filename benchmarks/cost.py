"""What a gradient costs, in numbers without noise: operations, and bytes."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode, conv_flop_count

from backbones.nvae.network import NetworkConfig
from ebm_prior import EnergyPrior, memory

__all__ = ["flops", "needed_flops", "peak_bytes", "saved_bytes"]


def _of_convolution(x: torch.Size, weight: torch.Size, *_: Any, out_shape: Any, **__: Any) -> int:
    return conv_flop_count([*x], [*weight], [*out_shape])


# Not among those that torch counts by itself.
ALSO_COUNTED = {torch.ops.aten.mkldnn_convolution: _of_convolution}


def flops(call: Callable[[], Any]) -> int:
    """Floating-point operations of the convolutions and matrix products in a call."""
    with FlopCounterMode(display=False, custom_mapping=ALSO_COUNTED) as counter:
        call()
    return counter.get_total_flops()


def needed_flops(prior: EnergyPrior) -> int:
    """Operations that one sample's energy and its gradient cannot do without.

    Twice those of the forward pass, as each convolution passes back one gradient, to its
    input, and none to its weights.
    """
    inputs = [torch.zeros(1, *h.shape, device=prior.backbone.device) for h in prior.heads]
    heads = flops(lambda: prior.energies_of(inputs))
    return 2 * (tower_flops(prior.backbone.network.config, prior.reads_features) + heads)


def tower_flops(config: NetworkConfig, features: bool) -> int:
    """Operations of one sample's top-down pass through res_mbconv cells, from shapes alone.

    Counted are: per group the cells, the prior's 1x1 convolution and the combiner; of the
    first combiner, and of the 1x1 convolution behind it, only the latents' part, as the state
    is a constant; the last combiner only where `features` are asked for. 1x1 convolutions run
    before an upsampling, not after.
    """

    if {config.cells["normal_dec"], config.cells["up_dec"]} != {("mconv_e6k5g0",)}:
        raise ValueError(f"only res_mbconv cells are counted, not {config.cells['normal_dec']}")

    def cell(c_in: int, c_out: int, size_in: int, size: int, read: int) -> int:
        hidden, squeezed = 6 * c_in, max(c_out // 16, 4)
        widen = 2 * read * hidden * size_in**2
        spatial = 2 * hidden * 5 * 5 * size**2
        narrow = 2 * hidden * c_out * size**2
        gate = 4 * c_out * squeezed if config.use_se else 0
        skip = 2 * c_in * c_out * size_in**2 if size != size_in else 0
        return widen + spatial + narrow + gate + skip

    total, before = 0, config.group_sizes[0]
    for index, size in enumerate(config.group_sizes):
        width, latents = config.channels_dec * config.image_size // size, config.latents
        cells = [(2 * width, width, before, size)] if size != before else []
        if index:
            cells += [(width, width, size, size)] * config.cells_dec
            total += 2 * width * 2 * latents * size**2
        for place, shape in enumerate(cells):
            first = index == 1 and place == 0
            total += cell(*shape, read=latents if first else shape[0])
        if features or index < config.num_groups - 1:
            total += 2 * ((width if index else 0) + latents) * width * size**2
        before = size
    return total


def saved_bytes(function: Callable, flat: Tensor, unflatten: Callable) -> int:
    """Bytes that autograd keeps per sample between the forward and the backward pass.

    The difference between two samples and one, so that copies of weights, which are kept
    once, drop out.

    Args:
        function: Density or energy of latents.
        flat: At least two samples, (B, D).
        unflatten: Makes latents of them.
    """
    one, two = (memory.saved_bytes(function, flat[:n], unflatten) for n in (1, 2))
    return two - one


class _Live(TorchDispatchMode):
    """Counts the bytes of all tensors made inside it, while they are alive."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # noqa: ANN001
        out = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves(args) if isinstance(t, Tensor)}
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self.add(tensor.untyped_storage(), given)
        return out

    def add(self, storage: torch.UntypedStorage, given: set[int]) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or key in given:  # a view is nothing new
            return
        self.known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self.remove, key, size)

    def remove(self, key: int, size: int) -> None:
        self.known.remove(key)
        self.live -= size


def peak_bytes(call: Callable[[], Any]) -> int:
    """Most bytes that the tensors made in a call take at one time.

    Works on the meta device; what kernels allocate for themselves is not seen.
    """
    with _Live() as counter:
        call()
    return counter.peak
