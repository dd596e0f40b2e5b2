"""Parts of the folded network: layers with frozen weights, whose gradient reaches inputs alone.

Autograd keeps what a weight's gradient would need too, and goes through a cell in many passes
over its largest tensors. The backward passes written out here keep half as much, and are exact.
They belong to weights that do not train: where one does, where `torch.func` transforms them, or
where a compiler chooses what to keep, the same layers run as plain operations. So does a
backward pass that is to be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["FrozenConv2d", "gated_sum"]

WORTH = 2**24  # multiplications; below, torch's own kernels are as fast


class FrozenConv2d(nn.Conv2d):
    """Convolution of stride 1 that keeps height and width, and what comes in front of it.

    While its weights are frozen they are prepared once: turned for the backward pass, and cast
    where autocast computes in another type.

    Args:
        c_in: Input channels.
        c_out: Output channels.
        kernel: Side of the kernel, odd.
        groups: As in `nn.Conv2d`.
        options: Others of `nn.Conv2d`.

    Attributes:
        swish: Whether swish(x) is convolved, in place of x.
        doubled: Whether height and width double first, with nearest neighbours.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, groups: int = 1, **options: Any
    ) -> None:
        super().__init__(c_in, c_out, kernel, padding=kernel // 2, groups=groups, **options)
        self.swish = self.doubled = False
        self._kept: dict[tuple[str, torch.dtype], Any] = {}
        self._kept_of: tuple[int | None, ...] = ()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W), or twice the height and width."""
        if all_frozen(self.weight, self.bias):
            return _FrozenConv.apply(x, self)
        return super().forward(self.convolved(x))

    def convolved(self, x: Tensor) -> Tensor:
        """What is convolved, from what comes in."""
        if self.swish:
            x = F.silu(x)
        return F.interpolate(x, scale_factor=2) if self.doubled else x

    def convolve(self, x: Tensor) -> Tensor:
        """The convolution alone, in the type of x and without a graph."""
        weight, bias = self.weight.detach(), self.bias
        if weight.dtype != x.dtype:
            weight, bias = self._keep("cast", x.dtype, lambda: self._cast(x.dtype))
        return convolution(x, weight, bias, self.groups)

    def adjoint(self, grad: Tensor) -> Tensor:
        """Gradient of what is convolved, from the output's.

        It is a convolution too: the kernel flipped, inputs and outputs exchanged. oneDNN's
        depthwise kernels take a third less time for it than for the same gradient.
        """
        weight = self._keep("turned", grad.dtype, lambda: self._turned().to(grad.dtype))
        return convolution(grad, weight, None, self.groups)

    def _cast(self, dtype: torch.dtype) -> tuple[Tensor, Tensor | None]:
        bias = None if self.bias is None else self.bias.detach().to(dtype)
        return self.weight.detach().to(dtype), bias

    def _turned(self) -> Tensor:
        parts = self.weight.detach().unflatten(0, (self.groups, -1))
        return parts.transpose(1, 2).flatten(0, 1).flip(2, 3).contiguous()

    def _keep(self, name: str, dtype: torch.dtype, make: Callable[[], Any]) -> Any:
        """Made once from the weights as they are."""
        versions = self.weight._version, None if self.bias is None else self.bias._version
        if versions != self._kept_of:
            self._kept, self._kept_of = {}, versions
        if (name, dtype) not in self._kept:
            self._kept[name, dtype] = make()
        return self._kept[name, dtype]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        self._kept = {}
        return super()._apply(fn, recurse)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, groups: int) -> Tensor:
    """Of stride 1, height and width kept.

    oneDNN is called directly where there is enough to do. On one thread torch gives 1x1
    convolutions of fewer than 16 samples a kernel of its own, a tenth slower than oneDNN's.
    """
    padding = (weight.shape[-1] // 2,) * 2
    if (
        x.device.type == "cpu"
        and x.dtype == torch.float32
        and x.numel() // x.shape[1] * weight.numel() >= WORTH
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_grad_enabled()
    ):
        return torch.mkldnn_convolution(x, weight, bias, padding, (1, 1), (1, 1), groups)
    return F.conv2d(x, weight, bias, padding=padding, groups=groups)


def gated_sum(skip: Tensor, y: Tensor, gate: nn.Sequential, scale: float) -> Tensor:
    """Skip + scale * gate(channel means of y) * y.

    Args:
        skip: (B, C, H, W).
        y: The same shape.
        gate: Linear, ReLU, Linear, sigmoid: (B, C) to (B, C).
        scale: A constant.
    """
    weights = gate[0].weight, gate[0].bias, gate[2].weight, gate[2].bias
    if all_frozen(*weights):
        return _GatedSum.apply(skip, y, *weights, scale)
    _, gates = hidden_and_gate(y, *weights)
    return torch.addcmul(skip, y, gates[:, :, None, None], value=scale)


def all_frozen(*weights: Tensor | None) -> bool:
    """Whether no gradient of these is taken, and those of others by torch itself."""
    return not (
        any(weight is not None and weight.requires_grad for weight in weights)
        or torch.compiler.is_compiling()
        or torch._C._are_functorch_transforms_active()  # those of torch.func
    )


class _FrozenConv(torch.autograd.Function):
    """Keeps x; autograd keeps swish(x) as well, which only the weight's gradient reads."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: FrozenConv2d) -> Tensor:
        y = layer.convolve(layer.convolved(x).to(autocast_type(x)))
        ctx.save_for_backward(x if layer.swish else None)
        ctx.layer, ctx.dtype, ctx.format = layer, x.dtype, memory_format(y)
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x,), layer = ctx.saved_tensors, ctx.layer
        grad = layer.adjoint(grad.contiguous(memory_format=ctx.format))
        if layer.doubled:
            grad = 4 * F.avg_pool2d(grad, 2)
        grad = grad.to(ctx.dtype)
        return swish_backward(grad, x) if layer.swish else grad, None


def autocast_type(x: Tensor) -> torch.dtype:
    """In which a convolution of x computes."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def swish_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Gradient of x from that of swish(x)."""
    if torch.is_grad_enabled():  # to be differentiated again
        return torch.autograd.grad(F.silu(x), x, grad, create_graph=True)[0]
    return torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)


def memory_format(x: Tensor) -> torch.memory_format:
    """Of a convolution's output."""
    channels_last = x.is_contiguous(memory_format=torch.channels_last)
    return torch.channels_last if channels_last else torch.contiguous_format


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
    hidden = F.linear(y.sum((2, 3)) / y.shape[2:].numel(), w1, b1).relu()
    return hidden, F.linear(hidden, w2, b2).sigmoid()
