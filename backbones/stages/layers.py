"""Convolutions, dense layers and residual blocks of the BIVA and HVAE families.

Weights are held plain: the public files keep them weight-normalised, and `Layer.fold`
multiplies that out once, at load. Shapes of feature maps are (C, H, W) throughout.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ebm_prior.errors import EbmPriorError

__all__ = [
    "ACTIVATIONS", "Block", "BlockSpec", "Conv", "Dense", "Layer", "PSwish", "Projection",
    "Shape", "Stack", "Swish",
]  # fmt: skip

Shape = tuple[int, int, int]


class Swish(nn.Module):
    """x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return F.silu(x)


class PSwish(nn.Module):
    """x * sigmoid(beta * x) with one trained scalar."""

    def __init__(self) -> None:
        super().__init__()
        self.beta = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape as `x`."""
        return x * torch.sigmoid(self.beta * x)


ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "relu": nn.ReLU,
    "elu": nn.ELU,
    "leakyrelu": nn.LeakyReLU,
    "swish": Swish,
    "pswish": PSwish,
}


class Layer(nn.Module):
    """One weight matrix or kernel with bias, stored under the public files' keys.

    Attributes:
        inner: Name of the submodule that holds the plain weight.
        normed: Whether the file keeps the weight as a direction and a length.
        out_axis: Axis of the weight that counts output channels.
    """

    inner: str
    normed: bool
    out_axis: int = 0

    def stored(self) -> dict[str, tuple[int, ...]]:
        """Keys and shapes under which the public file keeps this layer."""
        module = self.get_submodule(self.inner)
        shape = tuple(module.weight.shape)
        keys = {"initialized": (), f"{self.inner}.bias": tuple(module.bias.shape)}
        if not self.normed:
            return keys | {f"{self.inner}.weight": shape}
        length = tuple(n if i == self.out_axis else 1 for i, n in enumerate(shape))
        return keys | {f"{self.inner}.weight_g": length, f"{self.inner}.weight_v": shape}

    def fold(self, stored: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Plain weight and bias from the tensors named by `stored()`."""
        bias = stored[f"{self.inner}.bias"]
        if self.normed:
            length, direction = (stored[f"{self.inner}.weight_{x}"].double() for x in "gv")
            axes = [i for i in range(direction.ndim) if i != self.out_axis]
            weight = length * direction / torch.linalg.vector_norm(direction, 2, axes, True)
            weight = weight.to(bias.dtype)
        else:
            weight = stored[f"{self.inner}.weight"]
        return {f"{self.inner}.weight": weight, f"{self.inner}.bias": bias}


class Dense(Layer):
    """Fully connected layer; inputs are flattened in (C, H, W) order."""

    inner = "linear"

    def __init__(self, inputs: int, outputs: int, normed: bool = True) -> None:
        super().__init__()
        self.normed = normed
        self.linear = nn.Linear(inputs, outputs)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *) to (B, outputs)."""
        return self.linear(x.flatten(1))


class Conv(Layer):
    """Convolution with TensorFlow's SAME padding, its transpose, or a resize before one.

    Args:
        in_shape: Input feature map.
        channels: Output channels.
        kernel: Kernel size.
        size: Height and width of the output; an integer ratio to the input's.
        normed: Whether the file keeps it weight-normalised.
        resize: "nearest" or "bilinear" to interpolate to `size` and then convolve at
            stride 1, instead of striding.
    """

    inner = "conv"

    def __init__(
        self,
        in_shape: Shape,
        channels: int,
        kernel: int,
        size: tuple[int, int],
        normed: bool = True,
        resize: str | None = None,
    ) -> None:
        super().__init__()
        self.normed = normed
        self.out_shape: Shape = (channels, *size)
        up, stride = _ratio(in_shape[1:], size)
        self.resize = resize if stride > 1 else None
        self.extra = (0, 0)
        self.transposed = up and stride > 1 and not self.resize
        if self.resize:
            in_shape, stride = (in_shape[0], *size), 1
        if self.transposed:
            if kernel < stride:
                raise EbmPriorError(
                    f"a transposed convolution with kernel {kernel} below its stride {stride} "
                    "is not supported"
                )
            self.out_axis = 1
            crop = (kernel - stride) // 2
            self.conv = nn.ConvTranspose2d(in_shape[0], channels, kernel, stride, crop)
            return
        totals = [max((n // stride - 1) * stride + kernel - n, 0) for n in in_shape[1:]]
        # An odd pixel of padding goes right and bottom.
        self.extra = tuple(total % 2 for total in totals)
        padding = tuple(total // 2 for total in totals)
        self.conv = nn.Conv2d(in_shape[0], channels, kernel, stride, padding)

    def forward(self, x: Tensor) -> Tensor:
        """(B, *in_shape) to (B, *out_shape)."""
        height, width = self.out_shape[1:]
        if self.resize == "bilinear":
            x = F.interpolate(x, (height, width), mode="bilinear", align_corners=False)
        elif self.resize:
            x = F.interpolate(x, (height, width), mode=self.resize)
        if self.transposed:
            # An odd pixel is cropped right and bottom.
            return self.conv(x)[..., :height, :width]
        if any(self.extra):
            x = F.pad(x, (0, self.extra[1], 0, self.extra[0]))
        return self.conv(x)


def _ratio(a: tuple[int, ...], b: tuple[int, ...]) -> tuple[bool, int]:
    """Whether `b` is larger than `a`, and by which integer factor they differ."""
    up = b[0] > a[0]
    small, large = (a, b) if up else (b, a)
    factor = large[0] // small[0] if small[0] else 0
    if not factor or any(n * factor != m for n, m in zip(small, large, strict=True)):
        raise EbmPriorError(
            f"feature maps of {a[0]}x{a[1]} and {b[0]}x{b[1]} differ by no whole factor, "
            "which is not supported"
        )
    return up, factor


class Projection(nn.Module):
    """Dense latents back to a feature map; `inner` is the public name of the layer."""

    def __init__(self, inputs: int, shape: Shape, inner: str) -> None:
        super().__init__()
        self.shape = shape
        self.inner = inner
        self.add_module(inner, Dense(inputs, shape[0] * shape[1] * shape[2]))

    def forward(self, z: Tensor) -> Tensor:
        """(B, inputs) to (B, *shape)."""
        return self.get_submodule(self.inner)(z).unflatten(1, self.shape)


@dataclass(frozen=True)
class BlockSpec:
    """One residual block.

    Attributes:
        channels: Output channels.
        kernel: Kernel size.
        stride: Down-sampling factor, of up-sampling where the block is used upside down.
        gated: Whether half of the outputs gate the other half.
        normed: Whether its weights are weight-normalised in the file.
        up: Interpolation that replaces transposed convolutions, or None.
        down: Interpolation that replaces strided convolutions, or None.
    """

    channels: int
    kernel: int
    stride: int = 1
    gated: bool = True
    normed: bool = True
    up: str | None = None
    down: str | None = None


class Block(nn.Module):
    """Residual block with an optional second input ("aux").

    Args:
        in_shape: Input feature map.
        spec: Its geometry.
        activation: Makes an activation.
        aux_shape: Second input, or None.
        residual: Whether the input is activated and added to the output.
        upward: Whether the stride enlarges (generative stacks).
        needless_aux: Whether an aux of the same shape as the first convolution's output is
            used too; HVAE's code drops it.
        widen: Whether a residual with too few channels is padded with zeros (HVAE) rather
            than left out (BIVA).

    Attributes:
        dropout: Share of the middle activations set to zero in training mode.
    """

    dropout: float = 0.0

    def __init__(
        self,
        in_shape: Shape,
        spec: BlockSpec,
        activation: Callable[[], nn.Module],
        aux_shape: Shape | None = None,
        residual: bool = True,
        upward: bool = False,
        needless_aux: bool = True,
        widen: bool = False,
    ) -> None:
        super().__init__()
        size = in_shape[1:]
        resize = spec.up if upward else spec.down
        self.residual = residual
        self.gated = spec.gated
        self.activation_pre = activation()
        self.activation_mid = activation()
        self.activation_aux = activation()
        self.conv1 = Conv(in_shape, spec.channels, spec.kernel, size, spec.normed)
        middle = self.conv1.out_shape
        self.aux_shape = aux_shape
        if aux_shape is None or (aux_shape == middle and not needless_aux):
            self.aux_op = None
        else:
            kernel = 1 if aux_shape[1:] == size else spec.kernel
            self.aux_op = Conv(aux_shape, spec.channels, kernel, size, spec.normed, resize)
        if not upward and any(n % spec.stride for n in size):
            raise EbmPriorError(
                f"stride {spec.stride} on a {size[0]}x{size[1]} feature map is not supported"
            )
        out = tuple(n * spec.stride if upward else n // spec.stride for n in size)
        outputs = 2 * spec.channels if spec.gated else spec.channels
        self.conv2 = Conv(middle, outputs, spec.kernel, out, spec.normed, resize)
        self.out_shape: Shape = (spec.channels, *out)
        grows = upward and spec.stride > 1
        missing = spec.channels - in_shape[0]
        self.adds = residual and not grows and (widen or missing <= 0)
        self.missing = missing
        self.pool = 1 if upward else spec.stride

    def unused(self) -> list[str]:
        """Names of activations that take no part in `forward`."""
        names = [] if self.residual else ["activation_pre"]
        return names + ([] if self.aux_op is not None else ["activation_aux"])

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        """(B, *in_shape) and, where declared, (B, *aux_shape) to (B, *out_shape)."""
        h = self.conv1(self.activation_pre(x) if self.residual else x)
        if self.aux_op is not None:
            h = h + self.aux_op(self.activation_aux(aux))
        h = self.activation_mid(h)
        if self.training and self.dropout:
            h = F.dropout(h, self.dropout)
        h = self.conv2(h)
        if self.gated:
            h, gate = h.chunk(2, 1)
            h = h * torch.sigmoid(gate)
        return h + self._shortcut(x) if self.adds else h

    def _shortcut(self, x: Tensor) -> Tensor:
        x = x[:, : self.out_shape[0]]
        if self.pool > 1:
            # Kernel 3 with SAME padding; its zeros count in the average.
            totals = [max(3 - self.pool, 0)] * 2
            low, high = totals[0] // 2, totals[0] - totals[0] // 2
            x = F.avg_pool2d(F.pad(x, (low, high, low, high)), 3, self.pool)
        if self.missing > 0:
            x = F.pad(x, (0, 0, 0, 0, 0, self.missing))
        return x


class Stack(nn.Module):
    """Blocks in sequence.

    Args:
        blocks: The blocks, first to last.
    """

    def __init__(self, blocks: list[Block]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.out_shape: Shape = blocks[-1].out_shape

    def forward(self, x: Tensor, aux: Tensor | None = None) -> Tensor:
        """Feature map through all blocks, each given the same `aux`."""
        for block in self.layers:
            x = block(x, aux)
        return x

    def generate(self, x: Tensor, skips: list[Tensor]) -> Tensor:
        """Feature map through all blocks; `skips` (changed) links them to the stage above.

        Each block takes the last of the list as its aux and puts its output in front, so
        that a block meets the output of its counterpart one stage up.
        """
        for block in self.layers:
            aux = skips.pop() if block.aux_shape is not None else None
            x = block(x, aux)
            skips.insert(0, x)
        return x
