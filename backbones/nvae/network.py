"""The NVAE network (Vahdat and Kautz, 2020) under the key names of its public checkpoints.

Latent groups are indexed top-down everywhere: 0 is the coarsest scale's first group. The
towers are flat lists, as the public files number them:

    enc_tower   bottom-up: per group its cells, then a combiner; a down cell after a scale
    dec_tower   top-down: per group its cells (none for group 0), then a combiner; an up
                cell after a scale

`Network` is the plain form (weight norm, batch norm), which trains and saves.
`Network.folded` returns the same function of the same weights as plain convolutions.

Reference: Vahdat and Kautz, 2020, NVAE: A Deep Hierarchical Variational Autoencoder,
https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from backbones.nvae.frozen import FrozenConv2d, gated_sum
from ebm_prior.errors import EbmPriorError
from ebm_prior.memory import recomputed

__all__ = [
    "GroupPosterior",
    "Network",
    "NetworkConfig",
    "TOP_SIGMA",
    "kl_divergence",
    "log_normal",
    "soft_clamp",
]

BATCH_NORM = {"eps": 1e-5, "momentum": 0.05}
RESIDUAL_SCALE = 0.1
SIGMA_FLOOR = 0.01
TOP_SIGMA = 1.0 + SIGMA_FLOOR  # the top prior is N(0, exp(0)) plus the same floor


@dataclass(frozen=True)
class NetworkConfig:
    """Shape of an NVAE.

    Attributes:
        image_channels: Channels of the image.
        image_size: Height and width the network works on (32 for the padded 28x28 sets).
        output_channels: Channels of the raw decoder output.
        cells: Operation names per cell type, such as {"normal_enc": ("res_bnswish",), ...}.
        groups_per_scale: Latent groups per scale, finest scale first.
        latents: Channels of a latent group.
        channels_enc: Encoder channels at full resolution.
        channels_dec: Decoder channels at full resolution.
        preprocess_blocks: Halvings before the first latent scale.
        preprocess_cells: Cells per halving.
        postprocess_blocks: Doublings after the last latent scale.
        postprocess_cells: Cells per doubling.
        cells_enc: Encoder cells per group.
        cells_dec: Decoder cells per group.
        flows: Normalizing flows per group, in the posterior only.
        use_se: Whether cells end in squeeze-and-excitation.
        res_dist: Whether q's parameters are offsets to p's.
    """

    image_channels: int
    image_size: int
    output_channels: int
    cells: Mapping[str, Sequence[str]] = field(hash=False)
    groups_per_scale: tuple[int, ...]
    latents: int
    channels_enc: int
    channels_dec: int
    preprocess_blocks: int
    preprocess_cells: int
    postprocess_blocks: int
    postprocess_cells: int
    cells_enc: int = 1
    cells_dec: int = 1
    flows: int = 0
    use_se: bool = False
    res_dist: bool = False

    @property
    def num_groups(self) -> int:
        """Latent groups over all scales."""
        return sum(self.groups_per_scale)

    @property
    def halvings(self) -> int:
        """Halvings of the image on the way to the coarsest scale."""
        return self.preprocess_blocks + len(self.groups_per_scale) - 1

    @property
    def group_sizes(self) -> tuple[int, ...]:
        """Height (and width) of each latent group, top first."""
        finest = self.image_size >> self.preprocess_blocks
        return tuple(
            finest >> scale
            for scale in reversed(range(len(self.groups_per_scale)))
            for _ in range(self.groups_per_scale[scale])
        )


# --- convolutions ---------------------------------------------------------------------


def _normalize(weight: Tensor, log_norm: Tensor) -> Tensor:
    """exp(log_norm) * W / (||W|| + 1e-5), the norm per output channel."""
    norm = weight.square().sum((1, 2, 3), keepdim=True).sqrt()
    return log_norm.exp() * weight / (norm + 1e-5)


def _plain_conv(like: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> nn.Conv2d:
    """A convolution shaped like `like` with the given weight and bias."""
    shape = weight.shape[1] * like.groups, len(weight), like.kernel_size[0]
    options = {"groups": like.groups, "bias": False, "device": "meta"}
    if like.stride == like.dilation == (1, 1):
        conv: nn.Conv2d = FrozenConv2d(*shape, **options)
    else:
        conv = nn.Conv2d(*shape, like.stride, like.padding, like.dilation, **options)
    conv.weight = nn.Parameter(weight.detach().clone())
    conv.bias = None if bias is None else nn.Parameter(bias.detach().clone())
    return conv


class Conv2d(nn.Conv2d):
    """Convolution with weight normalization, whose log-scale is a parameter of its own."""

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, stride: int = 1, padding: int = 0,
        dilation: int = 1, groups: int = 1, bias: bool = True,
    ) -> None:  # fmt: skip
        super().__init__(c_in, c_out, kernel, stride, padding, dilation, groups, bias)
        # Start from the scale that the initial weights already have.
        norm = self.weight.detach().square().sum((1, 2, 3), keepdim=True).sqrt()
        self.log_weight_norm = nn.Parameter(torch.log(norm + 0.01))

    def normalized_weight(self) -> Tensor:
        """The weight that the convolution applies."""
        return _normalize(self.weight, self.log_weight_norm)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        return self._conv_forward(x, self.normalized_weight(), self.bias)

    def folded(self) -> nn.Conv2d:
        """The same map with the normalization done once."""
        return _plain_conv(self, self.normalized_weight(), self.bias)


class MaskedConv2d(Conv2d):
    """Autoregressive convolution: sees rows above, the row's left part, earlier channels.

    The norm is taken over the masked weight. `mirror` flips the spatial order, not the
    order of channels; `zero_diag` hides the unit itself.
    """

    def __init__(
        self, c_in: int, c_out: int, kernel: int, *, groups: int = 1, bias: bool = True,
        mirror: bool = False, zero_diag: bool = False,
    ) -> None:  # fmt: skip
        super().__init__(c_in, c_out, kernel, padding=kernel // 2, groups=groups, bias=bias)
        # Checkpoints do not store masks; build them on the CPU even inside a meta context.
        with torch.device("cpu"):
            per_group = c_in // groups
            blocks = min(c_in, c_out)
            if groups == 1:
                inputs = torch.arange(c_in) // (c_in // blocks)
                outputs = torch.arange(c_out) // (c_out // blocks)
                order = outputs[:, None] - inputs[None, :]
            else:
                order = torch.zeros(c_out, per_group)
            centre = kernel // 2
            mask = torch.zeros(c_out, per_group, kernel, kernel)
            mask[:, :, :centre] = 1
            mask[:, :, centre, :centre] = 1
            mask[:, :, centre, centre] = (order > 0 if zero_diag else order >= 0).float()
            if mirror and kernel > 1:
                mask = mask.flip(2, 3)
        self.register_buffer("mask", mask, persistent=False)

    def normalized_weight(self) -> Tensor:
        """The masked weight that the convolution applies."""
        return _normalize(self.weight * self.mask, self.log_weight_norm)


# --- batch normalization --------------------------------------------------------------


def _affine(bn: nn.BatchNorm2d) -> tuple[Tensor, Tensor]:
    """Scale and shift that `bn` applies in evaluation mode, each (C,)."""
    scale = bn.weight * (bn.running_var + bn.eps).rsqrt()
    return scale, bn.bias - bn.running_mean * scale


def _conv_then_bn(conv: nn.Conv2d, bn: nn.BatchNorm2d) -> nn.Conv2d:
    """bn(conv(x)) in evaluation mode as one convolution."""
    scale, shift = _affine(bn)
    bias = shift if conv.bias is None else conv.bias * scale + shift
    return _plain_conv(conv, conv.weight * scale[:, None, None, None], bias)


def _bn_then_pointwise(bn: nn.BatchNorm2d, conv: nn.Conv2d) -> nn.Conv2d:
    """conv(bn(x)) in evaluation mode as one convolution; exact as `conv` pads nothing."""
    scale, shift = _affine(bn)
    bias = (conv.weight[:, :, 0, 0] @ shift) + (0 if conv.bias is None else conv.bias)
    return _plain_conv(conv, conv.weight * scale[:, None, None], bias)


class BatchNormSwish(nn.BatchNorm2d):
    """Batch norm followed by x * sigmoid(x)."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return F.silu(super().forward(x))


class WrappedBatchNorm(nn.Module):
    """Batch norm one level down, where the public checkpoints keep some of them."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bn = nn.BatchNorm2d(channels, **BATCH_NORM)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) to the same shape."""
        return self.bn(x)


# --- operations of a cell -------------------------------------------------------------


def _nearest(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2, mode="nearest")


class ActivationConv(nn.Module):
    """[batch norm], activation, [nearest x2], 3x3 convolution.

    `kind` is "swish" (batch norm and swish), "bnelu" or "elu"; `dilation` 2 is the
    operation that the public code calls res_bnswish5. The public code initializes "elu"
    layers from the first batch it sees, even after loading; here they stay as saved.
    """

    def __init__(self, c_in: int, c_out: int, stride: int, kind: str, dilation: int = 1) -> None:
        super().__init__()
        if kind == "swish":
            self.bn_act = BatchNormSwish(c_in, **BATCH_NORM)
        elif kind == "bnelu":
            self.bn = WrappedBatchNorm(c_in)
        self.upsample = stride == -1
        self.kind = kind
        self.conv_0 = Conv2d(
            c_in, c_out, 3, stride=abs(stride), padding=dilation, dilation=dilation
        )

    @property
    def batch_norm(self) -> nn.BatchNorm2d | None:
        """The normalization in front, if any."""
        return {"swish": lambda: self.bn_act, "bnelu": lambda: self.bn.bn}.get(
            self.kind, lambda: None
        )()

    def without_batch_norm(self) -> None:
        """Drop the normalization: the operation before applies it."""
        if self.kind == "swish":
            self.bn_act = nn.SiLU()
        elif self.kind == "bnelu":
            self.bn = nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        if self.kind == "swish":
            x = self.bn_act(x)
        else:
            x = F.elu(self.bn(x) if self.kind == "bnelu" else x)
        return self.conv_0(_nearest(x) if self.upsample else x)


class ConvBnSwish(nn.Module):
    """Convolution without bias or weight norm, batch norm, swish."""

    def __init__(self, c_in: int, c_out: int, kernel: int, stride: int, groups: int) -> None:
        super().__init__()
        conv = nn.Conv2d(c_in, c_out, kernel, stride, kernel // 2, groups=groups, bias=False)
        self.conv = nn.Sequential(conv, BatchNormSwish(c_out, **BATCH_NORM))

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        return self.conv(x)


class InvertedResidual(nn.Module):
    """Mobile convolution: widen by `expand`, k x k in `groups` (0: depthwise), narrow."""

    def __init__(
        self, c_in: int, c_out: int, stride: int, expand: int, kernel: int, groups: int
    ) -> None:
        super().__init__()
        hidden = round(c_in * expand)
        groups = groups or hidden
        if hidden % groups:
            raise EbmPriorError(
                f"a mobile cell of {c_in} channels widens to {hidden}, which {groups} groups "
                "do not divide; the checkpoint's args and arch_instance disagree"
            )
        self.upsample = stride == -1
        parts: list[nn.Module] = [nn.UpsamplingNearest2d(scale_factor=2)] if self.upsample else []
        parts += [
            WrappedBatchNorm(c_in),
            ConvBnSwish(c_in, hidden, 1, 1, 1),
            ConvBnSwish(hidden, hidden, kernel, abs(stride), groups),
            nn.Conv2d(hidden, c_out, 1, bias=False),
            WrappedBatchNorm(c_out),
        ]
        self.conv = nn.Sequential(*parts)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        return self.conv(x)

    def folded(self) -> FoldedMobile:
        """Three plain convolutions.

        All padding follows a swish, so each batch norm folds into its neighbour exactly.
        Nearest-neighbour doubling commutes with everything pointwise, so the widening
        convolution runs before it, at a quarter of the pixels.
        """
        bn, widen, spatial, narrow, last = list(self.conv)[-5:]
        widening = _conv_then_bn(_bn_then_pointwise(bn.bn, widen.conv[0]), widen.conv[1])
        middle = _conv_then_bn(spatial.conv[0], spatial.conv[1])
        narrowing = _conv_then_bn(narrow, last.bn)
        if middle.stride == (1, 1):
            middle.swish, middle.doubled = True, self.upsample
        else:  # of an encoder, through which no gradient goes
            middle = nn.Sequential(nn.SiLU(), middle)
        narrowing.swish = True
        return FoldedMobile(widening, middle, narrowing)


class FoldedMobile(nn.Sequential):
    """Widening convolution, spatial one of swish, narrowing one of swish."""


_MOBILE = re.compile(r"mconv_e(\d+)k(\d+)g(\d+)")
_OPERATIONS = {
    "res_elu": {"kind": "elu"},
    "res_bnelu": {"kind": "bnelu"},
    "res_bnswish": {"kind": "swish"},
    "res_bnswish5": {"kind": "swish", "dilation": 2},
}


def _operation(name: str, c_in: int, c_out: int, stride: int) -> nn.Module:
    """Build one operation of a cell from its public name."""
    if name in _OPERATIONS:
        return ActivationConv(c_in, c_out, stride, **_OPERATIONS[name])
    if match := _MOBILE.fullmatch(name):
        expand, kernel, groups = map(int, match.groups())
        return InvertedResidual(c_in, c_out, stride, expand, kernel, groups)
    raise EbmPriorError(
        f"unknown cell operation {name!r} in the checkpoint's arch_instance; known are "
        f"{', '.join(_OPERATIONS)} and mconv_e<expansion>k<kernel>g<groups>"
    )


# --- cells ----------------------------------------------------------------------------


class SqueezeExcitation(nn.Module):
    """Adds a branch of which every channel is gated, by what the channels' means say."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        hidden = max(channels // 16, 4)
        self.se = nn.Sequential(
            nn.Linear(channels, hidden), nn.ReLU(), nn.Linear(hidden, channels), nn.Sigmoid()
        )

    def forward(self, skip: Tensor, y: Tensor) -> Tensor:
        """Skip + 0.1 * gate * y, both (B, C, H, W), with gates (B, C) in (0, 1)."""
        return gated_sum(skip, y, self.se, RESIDUAL_SCALE)


class DownSkip(nn.Module):
    """Swish, then four stride-2 1x1 convolutions, one per pixel of each 2x2 block."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__()
        quarter = c_out // 4
        self.conv_1 = Conv2d(c_in, quarter, 1, stride=2)
        self.conv_2 = Conv2d(c_in, quarter, 1, stride=2)
        self.conv_3 = Conv2d(c_in, quarter, 1, stride=2)
        self.conv_4 = Conv2d(c_in, c_out - 3 * quarter, 1, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H/2, W/2)."""
        x = F.silu(x)
        parts = (
            self.conv_1(x),
            self.conv_2(x[:, :, 1:, 1:]),
            self.conv_3(x[:, :, :, 1:]),
            self.conv_4(x[:, :, 1:, :]),
        )
        return torch.cat(parts, 1)


class UpSkip(nn.Sequential):
    """Bilinear x2 (corners aligned), then a 1x1 convolution without bias."""

    def __init__(self, c_in: int, c_out: int) -> None:
        super().__init__(
            nn.UpsamplingBilinear2d(scale_factor=2), Conv2d(c_in, c_out, 1, bias=False)
        )

    def folded(self) -> nn.Sequential:
        """Both are linear and the convolution is pointwise: do it first, on fewer pixels."""
        return nn.Sequential(self[1].folded(), nn.UpsamplingBilinear2d(scale_factor=2))


class Cell(nn.Module):
    """Residual cell: skip(x) + 0.1 * gate * operations(x).

    Args:
        c_in: Input channels.
        c_out: Output channels.
        stride: 1, 2 (halve) or -1 (double).
        operations: Public names; the first one carries the stride.
        use_se: Whether the branch is gated by squeeze-and-excitation.
    """

    def __init__(
        self, c_in: int, c_out: int, stride: int, operations: Sequence[str], use_se: bool
    ) -> None:
        super().__init__()
        if stride == 1:
            self.skip: nn.Module = nn.Identity()
        else:
            self.skip = DownSkip(c_in, c_out) if stride == 2 else UpSkip(c_in, c_out)
        self._ops = nn.ModuleList(
            _operation(name, c_out if i else c_in, c_out, 1 if i else stride)
            for i, name in enumerate(operations)
        )
        if use_se:
            self.se = SqueezeExcitation(c_out)
        self.use_se = use_se

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) to (B, C_out, H', W')."""
        return self.joined(x, x)

    def joined(self, x: Tensor, y: Tensor) -> Tensor:
        """The sum of skip(x) and 0.1 * gate * operations(y)."""
        for operation in self._ops:
            y = operation(y)
        if self.use_se:
            return self.se(self.skip(x), y)
        return torch.add(self.skip(x), y, alpha=RESIDUAL_SCALE)

    def folded(self) -> Cell:
        """Fold the parts, and each batch norm that follows a convolution into it."""
        _fold_children(self)
        for first, second in zip(self._ops, self._ops[1:], strict=False):
            if (
                isinstance(first, ActivationConv)
                and isinstance(second, ActivationConv)
                and second.batch_norm is not None
            ):
                first.conv_0 = _conv_then_bn(first.conv_0, second.batch_norm)
                second.without_batch_norm()
        return self


class EncoderCombiner(nn.Module):
    """Encoder feature plus a 1x1 convolution of the top-down state."""

    def __init__(self, c_enc: int, c_dec: int) -> None:
        super().__init__()
        self.conv = Conv2d(c_dec, c_enc, 1)

    def forward(self, encoder: Tensor, state: Tensor) -> Tensor:
        """(B, C_enc, H, W) and (B, C_dec, H, W) to (B, C_enc, H, W)."""
        return encoder + self.conv(state)


class DecoderCombiner(nn.Module):
    """1x1 convolution of the top-down state and the group's latents, in this order."""

    def __init__(self, c_state: int, c_latent: int) -> None:
        super().__init__()
        self.split = c_state
        self.conv = Conv2d(c_state + c_latent, c_state, 1)

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """(B or 1, C, H, W) and (B, Z, H, W) to (B, C, H, W)."""
        return self.conv(torch.cat([state.expand(len(z), -1, -1, -1), z], 1))

    def folded(self) -> FoldedCombiner:
        """The same sum as two convolutions, without the concatenation."""
        conv = self.conv.folded()
        weight = conv.weight
        return FoldedCombiner(
            _plain_conv(conv, weight[:, : self.split], conv.bias),
            _plain_conv(conv, weight[:, self.split :], None),
        )


class FoldedCombiner(nn.Module):
    """Sum of one convolution of the state and one of the latents."""

    def __init__(self, conv_state: nn.Conv2d, conv_z: nn.Conv2d) -> None:
        super().__init__()
        self.conv_state, self.conv_z = conv_state, conv_z

    def forward(self, state: Tensor, z: Tensor) -> Tensor:
        """(B or 1, C, H, W) and (B, Z, H, W) to (B, C, H, W)."""
        return self.conv_state(state) + self.conv_z(z)


class ConstantCombiner(nn.Module):
    """The first group's combiner: its state is a constant, so half the sum is too."""

    def __init__(self, combiner: FoldedCombiner, state: Tensor) -> None:
        super().__init__()
        self.conv_z = combiner.conv_z
        self.register_buffer("constant", combiner.conv_state(state).detach())

    def forward(self, state: Tensor | None, z: Tensor) -> Tensor:  # noqa: ARG002
        """(B, Z, H, W) to (B, C, H, W); `state` is already in the constant."""
        return _constant_and(self.constant, self.conv_z(z))


class LatentsAlone(nn.Module):
    """In place of the first group's combiner where `FirstCell` does its work."""

    def forward(self, state: Tensor, z: Tensor) -> Tensor:  # noqa: ARG002
        """(B, Z, H, W), unchanged."""
        return z


class FirstCell(nn.Module):
    """The first group's combiner and the mobile cell behind it.

    The state between them is a constant plus a convolution of z_0, so the cell's widening is
    one as well, of Z channels in place of C.
    """

    def __init__(self, combiner: ConstantCombiner, cell: Cell) -> None:
        super().__init__()
        self.combiner, self.cell = combiner, cell
        widening = cell._ops[0][0]
        weight = torch.einsum("hcij,czij->hzij", widening.weight, combiner.conv_z.weight)
        self.widening = _plain_conv(widening, weight, None)
        self.register_buffer("constant", widening(combiner.constant).detach())
        cell._ops[0] = cell._ops[0][1:]

    def forward(self, z: Tensor) -> Tensor:
        """(B, Z, H, W) to (B, C', H', W')."""
        widened = _constant_and(self.constant, self.widening(z))
        return self.cell.joined(self.combiner(None, z), widened)


def _constant_and(constant: Tensor, y: Tensor) -> Tensor:
    """Their sum, in the type of y, which autocast chose."""
    return constant.to(y.dtype) + y


# --- normalizing flows of the posterior -----------------------------------------------


class AutoregressiveShift(nn.Module):
    """z - mu(z) with mu autoregressive, so the log-determinant is zero."""

    def __init__(self, latents: int, mirror: bool) -> None:
        super().__init__()
        hidden = 6 * latents
        first = MaskedConv2d(latents, hidden, 3, bias=False, mirror=mirror, zero_diag=True)
        second = MaskedConv2d(hidden, hidden, 5, groups=hidden, bias=False, mirror=mirror)
        self.conv = nn.ModuleDict({"convz": nn.Sequential(first, nn.ELU(), second, nn.ELU())})
        self.mu = nn.ModuleDict({"conv_0": MaskedConv2d(hidden, latents, 1, mirror=mirror)})

    def forward(self, z: Tensor) -> Tensor:
        """(B, Z, H, W) to the same shape."""
        # The public network applies ELU twice here, and its weights are trained with it.
        return z - self.mu["conv_0"](F.elu(self.conv["convz"](z)))


class FlowPair(nn.Module):
    """Two shifts, the second in mirrored pixel order."""

    def __init__(self, latents: int) -> None:
        super().__init__()
        self.cell1 = AutoregressiveShift(latents, mirror=False)
        self.cell2 = AutoregressiveShift(latents, mirror=True)

    def forward(self, z: Tensor) -> Tensor:
        """(B, Z, H, W) to the same shape."""
        return self.cell2(self.cell1(z))


# --- distributions --------------------------------------------------------------------


def soft_clamp(raw: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation from raw parameters.

    mu = 5 tanh(raw_mu / 5),   sigma = exp(5 tanh(raw_log_sigma / 5)) + 0.01

    Args:
        raw: Raw means, then raw log-deviations, (B, 2 Z, H, W).

    Returns:
        mu and sigma, each (B, Z, H, W).
    """
    mu, log_sigma = (5 * torch.tanh(raw / 5)).chunk(2, 1)
    return mu, log_sigma.exp() + SIGMA_FLOOR


def log_normal(z: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
    """Log N(z; mu, sigma^2) summed over all but the batch: (B,), nats."""
    log_density = (
        -0.5 * ((z - mu) / sigma).square() - torch.log(sigma) - 0.9189385332046727
    )  # 0.5 log 2 pi
    return log_density.flatten(1).sum(1)


def kl_divergence(q_mu: Tensor, q_sigma: Tensor, p_mu: Tensor, p_sigma: Tensor) -> Tensor:
    """KL(q || p) of diagonal Gaussians, summed over all but the batch: (B,), nats."""
    ratio = q_sigma / p_sigma
    kl = 0.5 * (((q_mu - p_mu) / p_sigma).square() + ratio.square() - 1) - torch.log(ratio)
    return kl.flatten(1).sum(1)


@dataclass(frozen=True)
class GroupPosterior:
    """One group of a posterior draw, all (B, Z, H, W).

    Attributes:
        q_mu: Mean of q(z_i | z_>i, x).
        q_sigma: Its standard deviation.
        p_mu: Mean of p(z_i | z_>i) on the same path.
        p_sigma: Its standard deviation.
        z_base: Sample of q before the flows.
        z: Sample after the flows: what the decoder receives.
    """

    q_mu: Tensor
    q_sigma: Tensor
    p_mu: Tensor
    p_sigma: Tensor
    z_base: Tensor
    z: Tensor

    @property
    def log_q(self) -> Tensor:
        """Log q of the sample, (B,); the flows' log-determinant is zero."""
        return log_normal(self.z_base, self.q_mu, self.q_sigma)

    @property
    def log_p(self) -> Tensor:
        """Log p of the sample after the flows, (B,)."""
        return log_normal(self.z, self.p_mu, self.p_sigma)


# --- the network ----------------------------------------------------------------------


@dataclass(frozen=True)
class _Group:
    """Where a latent group's parts sit in the flat towers."""

    cells: tuple[int, ...]
    combiner: int
    encoder_combiner: int | None


class Network(nn.Module):
    """Encoder, hierarchical prior and decoder of an NVAE.

    Args:
        config: Shape of the network.
    """

    def __init__(self, config: NetworkConfig) -> None:
        super().__init__()
        self.config = c = config
        self._check(c)
        self.vanilla = c.num_groups == 1
        top = 2**c.halvings
        self.prior_ftr0 = nn.Parameter(
            torch.rand(c.channels_dec * top, *[c.image_size // top] * 2)
        )
        self.stem = Conv2d(c.image_channels, c.channels_enc, 3, padding=1)

        channels = c.channels_enc
        pre = []
        for _ in range(c.preprocess_blocks):
            for _ in range(c.preprocess_cells - 1):
                pre.append(self._cell("normal_pre", channels, channels, 1))
            pre.append(self._cell("down_pre", channels, 2 * channels, 2))
            channels *= 2
        self.pre_process = nn.ModuleList(pre)

        # Encoder: remember the tower index and width of every combiner, bottom-up.
        tower: list[nn.Module] = []
        combiners = []
        scales = len(c.groups_per_scale)
        ratio = 2**c.preprocess_blocks
        for scale, groups in enumerate(c.groups_per_scale):
            for group in range(groups):
                for _ in range(c.cells_enc):
                    tower.append(self._cell("normal_enc", channels, channels, 1))
                if not (scale == scales - 1 and group == groups - 1):
                    combiners.append(len(tower))
                    tower.append(EncoderCombiner(channels, c.channels_dec * ratio))
            if scale < scales - 1:
                tower.append(self._cell("down_enc", channels, 2 * channels, 2))
                channels, ratio = 2 * channels, 2 * ratio
        self.enc_tower = nn.ModuleList(tower)
        self.enc0 = nn.Sequential(nn.ELU(), Conv2d(channels, channels, 1), nn.ELU())

        # Decoder, top-down.
        self.enc_sampler = nn.ModuleList()
        self.dec_sampler = nn.ModuleList()
        self.nf_cells = nn.ModuleList()
        tower, plan = [], []
        state = c.channels_dec * ratio
        for scale in reversed(range(scales)):
            pending = []  # the up cell counts as the first cell of the next group
            if scale < scales - 1:
                pending.append(len(tower))
                tower.append(self._cell("up_dec", state, state // 2, -1))
                state, channels = state // 2, channels // 2
            for _ in range(c.groups_per_scale[scale]):
                first = not plan
                if not first:
                    for _ in range(c.cells_dec):
                        pending.append(len(tower))
                        tower.append(self._cell("normal_dec", state, state, 1))
                    self.dec_sampler.append(
                        nn.Sequential(nn.ELU(), Conv2d(state, 2 * c.latents, 1))
                    )
                self.enc_sampler.append(Conv2d(channels, 2 * c.latents, 3, padding=1))
                for _ in range(c.flows):
                    self.nf_cells.append(FlowPair(c.latents))
                plan.append(_Group(tuple(pending), len(tower), None if first else combiners.pop()))
                if not self.vanilla:
                    tower.append(DecoderCombiner(state, c.latents))
                pending = []
        self.dec_tower = nn.ModuleList(tower)
        if self.vanilla:
            self.stem_decoder = Conv2d(c.latents, state, 1)
        self._plan = tuple(plan)
        self.feature_shape = (state, *[c.image_size >> c.preprocess_blocks] * 2)

        post = []
        for _ in range(c.postprocess_blocks):
            for i in range(c.postprocess_cells):
                if i == 0:
                    post.append(self._cell("up_post", state, state // 2, -1))
                    state //= 2
                else:
                    post.append(self._cell("normal_post", state, state, 1))
        self.post_process = nn.ModuleList(post)
        self.image_conditional = nn.Sequential(
            nn.ELU(), Conv2d(state, c.output_channels, 3, padding=1)
        )

    @staticmethod
    def _check(c: NetworkConfig) -> None:
        top = 2**c.halvings
        if c.image_size % top:
            raise EbmPriorError(
                f"images of {c.image_size} pixels cannot be halved {c.halvings} times; "
                "use fewer scales or pre-processing blocks"
            )
        if c.preprocess_blocks != c.postprocess_blocks:
            raise EbmPriorError(
                f"{c.preprocess_blocks} pre-processing but {c.postprocess_blocks} "
                "post-processing blocks: decoded images would not have the size of the data"
            )

    def _cell(self, kind: str, c_in: int, c_out: int, stride: int) -> Cell:
        return Cell(c_in, c_out, stride, self.config.cells[kind], self.config.use_se)

    @property
    def group_shapes(self) -> tuple[tuple[int, int, int], ...]:
        """(Z, H, W) of each latent group, top first."""
        return tuple((self.config.latents, size, size) for size in self.config.group_sizes)

    def prior_params(self, index: int, state: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and deviation of p(z_i | z_>i) from the state before group i > 0."""
        return soft_clamp(self.dec_sampler[index - 1](state))

    def descend(
        self,
        draw: Callable[[int, Tensor], Tensor],
        features: bool = True,
        checkpointing: bool = False,
    ) -> tuple[list[Tensor], Tensor | None]:
        """Walk down the hierarchy once.

        Args:
            draw: Gives z_i (B, Z, H, W) for group i and the state in front of it; the
                state of group 0 is the learned constant (1, C, H, W).
            features: Whether to go on to the state after the last group.
            checkpointing: Whether a gradient keeps the states between groups alone, and goes
                through each group once more; `draw` must then be a pure function.

        Returns:
            z per group, and that state, (B, *feature_shape), or None.
        """
        z: list[Tensor] = []
        state = self.prior_ftr0[None]
        for index in range(len(self._plan)):
            onward = features or index < len(self._plan) - 1
            step = partial(self._through_group, index, draw=draw, onward=onward)
            drawn, state = recomputed(step, state) if checkpointing else step(state)
            z.append(drawn)
        return z, state

    def _through_group(
        self, index: int, state: Tensor, draw: Callable[[int, Tensor], Tensor], onward: bool
    ) -> tuple[Tensor, Tensor | None]:
        """Latents of a group and, to go onward, the state after it, from the state before."""
        group = self._plan[index]
        for cell in group.cells:
            state = self.dec_tower[cell](state)
        z = draw(index, state)
        if not onward:
            return z, None
        if self.vanilla:
            return z, self.stem_decoder(z)
        return z, self.dec_tower[group.combiner](state, z)

    def encode(self, x: Tensor) -> list[Tensor]:
        """Bottom-up pass.

        Args:
            x: Images (B, C, size, size) in [0, 1].

        Returns:
            Encoder feature of each latent group, top first; the top group's is final.
        """
        s = self.stem(2 * x - 1)
        for cell in self.pre_process:
            s = cell(s)
        kept = []
        for module in self.enc_tower:
            if isinstance(module, EncoderCombiner):
                kept.append(s)  # combined on the way down, once the top-down state is known
            else:
                s = module(s)
        return [self.enc0(s), *reversed(kept)]

    def infer(
        self, x: Tensor, noise: Sequence[Tensor], features: bool = True
    ) -> tuple[list[GroupPosterior], Tensor | None]:
        """Draw from q(z|x), top group first.

        Args:
            x: Images (B, C, size, size) in [0, 1].
            noise: Standard-normal tensor per group.
            features: Whether to return the state after the last group as well.

        Returns:
            The draw per group, and the state (B, *feature_shape) or None.
        """
        encoded = self.encode(x)
        groups: list[GroupPosterior] = []

        def draw(index: int, state: Tensor) -> Tensor:
            if index == 0:
                q_mu, q_sigma = soft_clamp(self.enc_sampler[0](encoded[0]))
                p_mu = torch.zeros_like(q_mu)
                p_sigma = torch.full_like(q_sigma, TOP_SIGMA)
            else:
                raw_p = self.dec_sampler[index - 1](state)
                combiner = self.enc_tower[self._plan[index].encoder_combiner]
                raw_q = self.enc_sampler[index](combiner(encoded[index], state))
                # Raw parameters are added, and clamped as a sum.
                q_mu, q_sigma = soft_clamp(raw_p + raw_q if self.config.res_dist else raw_q)
                p_mu, p_sigma = soft_clamp(raw_p)
            z = base = torch.addcmul(q_mu, q_sigma, noise[index])
            flows = self.config.flows
            for cell in self.nf_cells[index * flows : (index + 1) * flows]:
                z = cell(z)
            groups.append(GroupPosterior(q_mu, q_sigma, p_mu, p_sigma, base, z))
            return z

        return groups, self.descend(draw, features)[1]

    def decode(self, features: Tensor) -> Tensor:
        """Raw decoder output (B, output_channels, size, size) from the last state."""
        s = features
        for cell in self.post_process:
            s = cell(s)
        return self.image_conditional(s)

    def folded(self) -> Network:
        """The evaluation-mode function as plain convolutions, in new, frozen weights.

        Folding runs in double precision and rounds once at the end. On the CPU the weights
        are laid out channels-last, which makes convolutions up to half as fast again.
        """
        dtype, device = self.prior_ftr0.dtype, self.prior_ftr0.device
        network = copy.deepcopy(self).to("cpu", torch.float64).eval().requires_grad_(False)
        _fold_children(network)
        if not self.vanilla:
            network._start_from_constant()
        network = network.to(device, dtype)
        if device.type == "cpu":
            network = network.to(memory_format=torch.channels_last)
        return network.requires_grad_(False)

    def _start_from_constant(self) -> None:
        """Compute once what the constant state of the first group contributes."""
        tower, index = self.dec_tower, self._plan[0].combiner
        combiner = ConstantCombiner(tower[index], self.prior_ftr0[None])
        tower[index] = combiner
        for cell in self._plan[1].cells[:1]:
            if isinstance(tower[cell]._ops[0], FoldedMobile):
                tower[index], tower[cell] = LatentsAlone(), FirstCell(combiner, tower[cell])


def _fold_children(module: nn.Module) -> None:
    """Replace every descendant that can fold by its folded form."""
    for name, child in list(module.named_children()):
        if hasattr(child, "folded"):
            setattr(module, name, child.folded())
        else:
            _fold_children(child)
