"""Energy heads: small networks that read one tensor per sample and return one energy.

Sign, once for the whole package: a head computes an **energy** E, low where latents are
likely. The paper writes f = -E, so its exp(sum f) is exp(-sum E) here.

Shapes follow Table 12: a spatial input goes through stride-2 4x4 convolutions with `nef`
channels and LeakyReLU(0.2) until it is 4x4, then through as many Linear(`ndf`)+LeakyReLU
as there were convolutions, then Linear(1). A vector goes through the linear part alone.
Where a table gives a head linear layers of its own, as Table 12 does, their widths are listed.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import Tensor, nn

from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import shown

__all__ = ["EnergyHead", "check_layers", "make_heads", "widths_of"]

MIN_SIZE = 4  # Table 12 stops its convolutions at 4x4
VECTOR_LAYERS = 2  # Table 12's head on the top vector group
MAX_LAYERS = 16  # linear layers of a head that may be listed; Table 12's deepest has 4
MAX_UNITS = 1 << 16  # of such a layer


class EnergyHead(nn.Module):
    """One energy per sample of a tensor of fixed shape.

    Args:
        shape: (C, H, W) or (D,) of the input, without the batch dimension. Any size works:
            a side already at most 4 keeps its size (3x3 convolution, stride 1), odd sides
            round up when halved.
        nef: Channels of the convolutions.
        ndf: Units of the linear layers.
        layers: Units of each linear layer, in order, in place of as many of `ndf` as there
            were convolutions, or of two for a vector.
    """

    def __init__(
        self,
        shape: Sequence[int],
        nef: int = 64,
        ndf: int = 200,
        layers: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.shape = tuple(shape)
        modules: list[nn.Module] = []
        if len(self.shape) == 3:
            channels, *size = self.shape
            depth = 0
            while depth == 0 or max(size) > MIN_SIZE:
                if max(size) > MIN_SIZE:
                    # halving with ceil: (n + 2p - 4) // 2 + 1 with p = 1 for even n; odd n
                    # and sides that are done already need their own kernel and padding
                    kernel, stride, padding = zip(*(_halving(n) for n in size), strict=True)
                else:
                    kernel, stride, padding = (3, 3), (1, 1), (1, 1)
                modules += [nn.Conv2d(channels, nef, kernel, stride, padding), nn.LeakyReLU(0.2)]
                size = [
                    (n + 2 * p - k) // s + 1
                    for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
                ]
                channels = nef
                depth += 1
            modules.append(nn.Flatten())
            width = channels * math.prod(size)
        elif len(self.shape) == 1:
            width, depth = self.shape[0], VECTOR_LAYERS
        else:
            raise ValueError(f"a head reads (C, H, W) or (D,), got shape {self.shape}")
        for units in [ndf] * depth if layers is None else layers:
            modules += [nn.Linear(width, units), nn.LeakyReLU(0.2)]
            width = units
        modules.append(nn.Linear(width, 1))
        self.layers = nn.Sequential(*modules)
        # An untrained head must barely tilt the prior: the last layer starts near zero.
        nn.init.normal_(self.layers[-1].weight, std=0.1 / math.sqrt(width))
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Energies of x (B, *shape): (B,), nats."""
        return self.layers(x).squeeze(1)

    def extra_repr(self) -> str:
        """Input shape, for `print(prior)`."""
        return f"shape={self.shape}"


def make_heads(
    shapes: Iterable[Sequence[int]],
    nef: int,
    ndf: int,
    layers: Sequence[Sequence[int]] | None = None,
) -> nn.ModuleList:
    """One head for each input shape, with its row of `layers` where they are listed."""
    shapes = list(shapes)
    rows = [None] * len(shapes) if layers is None else layers
    return nn.ModuleList(
        EnergyHead(shape, nef, ndf, row) for shape, row in zip(shapes, rows, strict=True)
    )


def check_layers(layers: object, heads: Sequence[str]) -> None:
    """Refuse lists of linear layers that do not fit these heads.

    Args:
        layers: For each head the units of its linear layers.
        heads: Names of the heads.

    Raises:
        EbmPriorError: Saying what is expected.
    """

    def is_row(row: object) -> bool:
        listed = isinstance(row, (list, tuple)) and 1 <= len(row) <= MAX_LAYERS
        return listed and all(type(n) is int and 1 <= n <= MAX_UNITS for n in row)

    if (
        not isinstance(layers, (list, tuple))
        or len(layers) != len(heads)
        or not all(map(is_row, layers))
    ):
        names = ", ".join(map(shown, heads[:4])) + (", ..." if len(heads) > 4 else "")
        raise EbmPriorError(
            f"the heads' linear layers must be one list of widths for each of {len(heads)} heads "
            f"({names}), 1 to {MAX_LAYERS} whole numbers up to {MAX_UNITS}; got {shown(layers)}"
        )


def widths_of(heads: Mapping[str, Any]) -> str:
    """Widths of stored heads in words.

    Args:
        heads: Field `heads` of a checked configuration.
    """
    if heads.get("layers") is None:
        return f"nef {heads['nef']}, ndf {heads['ndf']}"
    rows = ", ".join("-".join(map(str, row)) for row in heads["layers"])
    return f"nef {heads['nef']}, linear layers {rows}"


def _halving(n: int) -> tuple[int, int, int]:
    """Kernel, stride and padding that take a side n to ceil(n / 2), or keep n <= 4."""
    if n <= MIN_SIZE:
        return 3, 1, 1
    return (4, 2, 1) if n % 2 == 0 else (5, 2, 2)
