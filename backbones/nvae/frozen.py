"""Parts of the folded network: layers with frozen weights, whose gradient reaches inputs alone.

Autograd keeps what a weight's gradient would need too, and goes through a cell in many passes
over its largest tensors. The backward passes written out here keep half as much, and are exact.
They belong to weights that do not train: where one does, where nothing is differentiated, where
`torch.func` transforms them, or where a compiler chooses what to keep, the same layers run as
plain operations. So does a backward pass that is to be differentiated again.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["PointwiseConv2d", "SwishConv2d", "adjoint", "gated_sum"]

WORTH = 2**26  # multiplications of a 1x1 convolution; below, views cost as much as they save


def pointwise(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A 1x1 convolution of stride 1, as fast on one thread as it could be.

    There torch gives 1x1 convolutions of fewer than 16 samples a kernel of their own, a sixth
    slower than the one for larger batches. To a 1x1 convolution any 16 equal parts of the pixels
    are 16 samples; in channels-last tensors they are a view.

    Args:
        x: (B, C_in, H, W).
        weight: (C_out, C_in, 1, 1).
        bias: (C_out,) or None.

    Returns:
        (B, C_out, H, W).
    """
    batch, channels, height, width = x.shape
    pixels = batch * height * width
    if (
        torch.compiler.is_compiling()  # which chooses its own kernels
        or x.device.type != "cpu"
        or batch >= 16
        or pixels % 16
        or pixels * weight.numel() < WORTH
        or torch.get_num_threads() > 1
        or x.dtype != torch.float32
        or not x.is_contiguous(memory_format=torch.channels_last)
    ):
        return F.conv2d(x, weight, bias)
    parts = x.permute(0, 2, 3, 1).reshape(16, 1, pixels // 16, channels)
    y = F.conv2d(parts.permute(0, 3, 1, 2), weight, bias).permute(0, 2, 3, 1)
    return y.reshape(batch, height, width, -1).permute(0, 3, 1, 2)


class PointwiseConv2d(nn.Conv2d):
    """`pointwise` as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W)."""
        return pointwise(x, self.weight, self.bias)


class SwishConv2d(nn.Module):
    """conv(swish(x)), or conv(double(swish(x))) with nearest neighbours.

    Args:
        conv: With an odd kernel, stride and dilation 1, and padding that keeps the size.
        doubled: Whether height and width double in front of it.
    """

    def __init__(self, conv: nn.Conv2d, doubled: bool = False) -> None:
        super().__init__()
        self.conv, self.doubled = conv, doubled

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W), or twice the height and width."""
        conv = self.conv
        if in_one_pass(x, conv.weight, conv.bias):
            return _SwishConv.apply(x, conv.weight, conv.bias, conv.groups, self.doubled)
        y = F.silu(x)
        return conv(F.interpolate(y, scale_factor=2) if self.doubled else y)


def gated_sum(skip: Tensor, y: Tensor, gate: nn.Sequential, scale: float) -> Tensor:
    """Skip + scale * gate(channel means of y) * y.

    Args:
        skip: (B, C, H, W).
        y: The same shape.
        gate: Linear, ReLU, Linear, sigmoid: (B, C) to (B, C).
        scale: A constant.
    """
    weights = gate[0].weight, gate[0].bias, gate[2].weight, gate[2].bias
    if in_one_pass(y, *weights):
        return _GatedSum.apply(skip, y, *weights, scale)
    _, gates = hidden_and_gate(y, *weights)
    return torch.addcmul(skip, y, gates[:, :, None, None], value=scale)


def in_one_pass(x: Tensor, *weights: Tensor | None) -> bool:
    """Whether a gradient of x alone is taken, by torch itself."""
    return (
        torch.is_grad_enabled()
        and x.requires_grad
        and not any(weight is not None and weight.requires_grad for weight in weights)
        and not torch.compiler.is_compiling()
        and not torch._C._are_functorch_transforms_active()  # those of torch.func
    )


class _SwishConv(torch.autograd.Function):
    """Keeps x; autograd keeps swish(x) as well, which only the weight's gradient reads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, doubled: bool
    ) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.groups, ctx.doubled = groups, doubled
        return swish_conv(x, weight, bias, groups, doubled)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            y = swish_conv(x.to(grad.dtype), weight.to(grad.dtype), None, ctx.groups, ctx.doubled)
            return *torch.autograd.grad(y, x, grad, create_graph=True), None, None, None, None
        grad = adjoint(grad, weight.to(grad.dtype), ctx.groups)
        if ctx.doubled:
            grad = 4 * F.avg_pool2d(grad, 2)
        return torch.ops.aten.silu_backward(grad.to(x.dtype), x), None, None, None, None


def swish_conv(
    x: Tensor, weight: Tensor, bias: Tensor | None, groups: int, doubled: bool
) -> Tensor:
    """`SwishConv2d` as plain operations."""
    y = F.silu(x)
    return convolution(F.interpolate(y, scale_factor=2) if doubled else y, weight, bias, groups)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Of stride 1, height and width kept."""
    if weight.shape[-2:] == (1, 1) and groups == 1:
        return pointwise(x, weight, bias)
    return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=groups)


def adjoint(grad: Tensor, weight: Tensor, groups: int) -> Tensor:
    """Gradient of the input of `convolution`, from that of its output.

    It is a convolution too: the kernel flipped, inputs and outputs exchanged. oneDNN's depthwise
    kernels take a third less time for it than for the same gradient.
    """
    parts = weight.unflatten(0, (groups, -1))
    return convolution(grad, parts.transpose(1, 2).flatten(0, 1).flip(2, 3), None, groups)


class _GatedSum(torch.autograd.Function):
    """Two passes over a gradient where autograd takes six."""

    @staticmethod
    def forward(
        ctx: Any, skip: Tensor, y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor,
        scale: float,
    ) -> Tensor:  # fmt: skip
        hidden, gate = hidden_and_gate(y, w1, b1, w2, b2)
        ctx.save_for_backward(y, hidden, gate, w1, b1, w2, b2)
        ctx.scale = scale
        return torch.addcmul(skip, y, gate[:, :, None, None], value=scale)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        y, hidden, gate, *weights = ctx.saved_tensors
        if torch.is_grad_enabled():  # to be differentiated again
            like, *weights = (tensor.to(grad.dtype) for tensor in (y, *weights))
            branch = ctx.scale * like * hidden_and_gate(like, *weights)[1][:, :, None, None]
            to_y = torch.autograd.grad(branch, y, grad, create_graph=True)
            return grad, *to_y, None, None, None, None, None
        w1, _, w2, _ = weights
        # means -> hidden -> logits -> gate, from behind, all (B, channels)
        to_logits = ctx.scale * (grad * y).sum((2, 3)) * gate * (1 - gate)
        to_hidden = (to_logits.to(w2.dtype) @ w2) * (hidden > 0)
        to_means = (to_hidden @ w1).to(grad.dtype) / y.shape[2:].numel()
        gate = gate.to(grad.dtype)
        to_y = torch.addcmul(
            to_means[:, :, None, None], grad, gate[:, :, None, None], value=ctx.scale
        )
        return grad, to_y, None, None, None, None, None


def hidden_and_gate(
    y: Tensor, w1: Tensor, b1: Tensor, w2: Tensor, b2: Tensor
) -> tuple[Tensor, Tensor]:
    """Hidden units (B, hidden) and gate (B, C) of squeeze-and-excitation."""
    hidden = F.linear(y.mean((2, 3)), w1, b1).relu()
    return hidden, F.linear(hidden, w2, b2).sigmoid()
