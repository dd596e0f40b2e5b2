"""Parts of the folded network: layers with frozen weights, whose gradient reaches inputs alone.

Autograd keeps what a weight's gradient would need too, and goes through a cell in many passes
over its largest tensors. The backward passes written out here keep half as much, and are exact.
They belong to weights that do not train: where one does, where nothing is differentiated, where
`torch.func` transforms them, or where a compiler chooses what to keep, the same layers run as
plain operations. So does a backward pass that is to be differentiated again.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.grad import conv2d_input

__all__ = ["FrozenConv2d", "gated_sum"]

WORTH = 2**24  # multiplications; below, torch's own kernels are as fast


class FrozenConv2d(nn.Conv2d):
    """Convolution of stride 1 that keeps height and width, and what comes in front of it.

    Casts of its weights, and on the CPU their turned form, are made once and kept.

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
        self._kept: dict[tuple[str, torch.dtype], tuple[Tensor, int, Tensor]] = {}

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H, W), or twice the height and width."""
        if not all_frozen(self.weight, self.bias):
            return super().forward(self.entering(x))
        if torch.is_grad_enabled() and x.requires_grad:
            return _FrozenConv.apply(x, self.weight, self.bias, self)
        return self.convolve(self.entering(x), self.weight, self.bias)

    def entering(self, x: Tensor) -> Tensor:
        """What the convolution reads."""
        if self.swish:
            x = F.silu(x)
        return F.interpolate(x, scale_factor=2) if self.doubled else x

    def convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The convolution alone, in the type that autocast asks for."""
        dtype = autocast_type(x)
        if dtype is not None and not x.dtype == weight.dtype == dtype:
            x, weight = x.to(dtype), self.keep("cast", weight, dtype, Tensor.detach)
            bias = None if bias is None else self.keep("bias", bias, dtype, Tensor.detach)
        return convolution(x, weight, bias, self.groups)

    def adjoint(self, grad: Tensor, weight: Tensor, shape: torch.Size) -> Tensor:
        """Gradient of what the convolution reads, of this shape, from the output's.

        It is a convolution too: the kernel turned, inputs and outputs exchanged. oneDNN's
        depthwise kernels take a third less time for it than for the same gradient.
        """
        if not on_cpu(grad):
            weight = self.keep("cast", weight, grad.dtype, Tensor.detach)
            return conv2d_input(shape, weight, grad, padding=self.padding, groups=self.groups)
        turned = self.keep("turned", weight, grad.dtype, self.turn)
        return convolution(grad, turned, None, self.groups)

    def turn(self, weight: Tensor) -> Tensor:
        """The weight of the adjoint, from this layer's."""
        parts = weight.detach().unflatten(0, (self.groups, -1))
        return parts.transpose(1, 2).flatten(0, 1).flip(2, 3).contiguous()

    def keep(
        self, name: str, origin: Tensor, dtype: torch.dtype, make: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """What is made of a weight, in this type, anew where the weight is not what it was."""
        version = 0 if origin.is_inference() else origin._version
        kept = self._kept.get((name, dtype))
        if kept is None or kept[0].data_ptr() != origin.data_ptr() or kept[1] != version:
            with torch.inference_mode(False), torch.no_grad():
                kept = origin.detach(), version, make(origin).to(dtype)
            self._kept[name, dtype] = kept
        return kept[2]

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
        on_cpu(x)
        and x.dtype == weight.dtype == torch.float32
        and x.numel() // x.shape[1] * weight.numel() >= WORTH
        and torch.backends.mkldnn.is_available()
        and torch.backends.mkldnn.enabled
        and not torch.is_grad_enabled()  # it knows no forward mode
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
    if all_frozen(*weights) and torch.is_grad_enabled() and y.requires_grad:
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


def on_cpu(x: Tensor) -> bool:
    """Whether oneDNN's kernels are what counts."""
    return x.device.type == "cpu"


def autocast_type(x: Tensor) -> torch.dtype | None:
    """In which autocast lets convolutions of x compute; None where it leaves them alone."""
    kind = x.device.type
    if x.dtype == torch.float64 or not torch.amp.is_autocast_available(kind):
        return None
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


class _FrozenConv(torch.autograd.Function):
    """Keeps x; autograd keeps swish(x) as well, which only the weight's gradient reads."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, layer: FrozenConv2d
    ) -> Tensor:
        entering = layer.entering(x)
        y = layer.convolve(entering, weight, bias)
        ctx.save_for_backward(x if layer.swish else None, weight)
        ctx.layer, ctx.shape, ctx.dtype = layer, entering.shape, x.dtype
        ctx.format = torch.contiguous_format
        if y.is_contiguous(memory_format=torch.channels_last):
            ctx.format = torch.channels_last
        return y

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (x, weight), layer = ctx.saved_tensors, ctx.layer
        batched = torch._C._functorch.is_legacy_batchedtensor(grad)  # `is_grads_batched`
        if not batched:
            grad = grad.contiguous(memory_format=ctx.format)
        grad = layer.adjoint(grad, weight, ctx.shape)
        if layer.doubled:
            grad = 4 * F.avg_pool2d(grad, 2)
        grad = grad.to(ctx.dtype)
        if layer.swish:
            if torch.is_grad_enabled():  # to be differentiated again
                (grad,) = torch.autograd.grad(F.silu(x), x, grad, create_graph=True)
            elif batched:
                grad = torch.ops.aten.silu_backward(grad, x)
            else:  # in place, as no one else has this gradient
                torch.ops.aten.silu_backward.grad_input(grad, x, grad_input=grad)
        return grad, None, None, None


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
