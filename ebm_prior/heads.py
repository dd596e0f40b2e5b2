"""Energy heads: small networks that read one tensor per sample and return one energy.

Sign, once for the whole package: a head computes an **energy** E, low where latents are
likely. The paper writes f = -E, so its exp(sum f) is exp(-sum E) here.

Shapes follow Table 12: a spatial input goes through stride-2 4x4 convolutions with `nef`
channels and LeakyReLU(0.2) until it is 4x4, then through as many Linear(`ndf`)+LeakyReLU
as there were convolutions, then Linear(1). A vector goes through the linear part alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor, nn

__all__ = ["EnergyHead"]

MIN_SIZE = 4  # Table 12 stops its convolutions at 4x4
VECTOR_LAYERS = 2  # Table 12's head on the top vector group


class EnergyHead(nn.Module):
    """One energy per sample of a tensor of fixed shape.

    Args:
        shape: (C, H, W) or (D,) of the input, without the batch dimension. Any size works:
            a side already at most 4 keeps its size (3x3 convolution, stride 1), odd sides
            round up when halved.
        nef: Channels of the convolutions.
        ndf: Units of the linear layers.
    """

    def __init__(self, shape: Sequence[int], nef: int = 64, ndf: int = 200) -> None:
        super().__init__()
        self.shape = tuple(shape)
        layers: list[nn.Module] = []
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
                layers += [nn.Conv2d(channels, nef, kernel, stride, padding), nn.LeakyReLU(0.2)]
                size = [
                    (n + 2 * p - k) // s + 1
                    for n, k, s, p in zip(size, kernel, stride, padding, strict=True)
                ]
                channels = nef
                depth += 1
            layers.append(nn.Flatten())
            width = channels * math.prod(size)
        elif len(self.shape) == 1:
            width, depth = self.shape[0], VECTOR_LAYERS
        else:
            raise ValueError(f"a head reads (C, H, W) or (D,), got shape {self.shape}")
        for _ in range(depth):
            layers += [nn.Linear(width, ndf), nn.LeakyReLU(0.2)]
            width = ndf
        layers.append(nn.Linear(width, 1))
        self.layers = nn.Sequential(*layers)
        # An untrained head must barely tilt the prior: the last layer starts near zero.
        nn.init.normal_(self.layers[-1].weight, std=0.1 / math.sqrt(width))
        nn.init.zeros_(self.layers[-1].bias)

    def forward(self, x: Tensor) -> Tensor:
        """Energies of x (B, *shape): (B,), nats."""
        return self.layers(x).squeeze(1)

    def extra_repr(self) -> str:
        """Input shape, for `print(prior)`."""
        return f"shape={self.shape}"


def _halving(n: int) -> tuple[int, int, int]:
    """Kernel, stride and padding that take a side n to ceil(n / 2), or keep n <= 4."""
    if n <= MIN_SIZE:
        return 3, 1, 1
    return (4, 2, 1) if n % 2 == 0 else (5, 2, 2)
