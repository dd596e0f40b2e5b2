"""Stage one for the BIVA and HVAE families: train by the ELBO, write the public format.

    loss = -log p(x|z) + beta * sum_i max(free_bits, KL(q_i || p_i)),   z ~ q(z|x)

per image, averaged over the batch; one draw of z, and KL of each group in closed form given
the groups that its two Gaussians depend on. beta rises linearly from nearly 0 to 1. Free bits
keep a group's KL free of charge up to a budget, so that it is not switched off while the
decoder still ignores it; after `free_share` of the steps there are none, and once beta is 1 the
loss is minus the ELBO.

The public codes differ in the free bits. BIVA's takes the maximum per group and image, as here,
but on the sampled log q - log p. HVAE's takes it unit by unit, also on samples, with the budget
divided by a group's units (for feature maps by its channels, so that every position has all
of it).

References: Kingma et al., 2016, free bits, https://arxiv.org/abs/1606.04934; Sonderby et al.,
2016, KL warm-up, https://arxiv.org/abs/1602.02282; Salimans and Kingma, 2016, weight
normalisation and its initialisation from data, https://arxiv.org/abs/1602.07868
"""

from __future__ import annotations

import abc
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from backbones.stages import StagedBackbone
from backbones.stages.checkpoint import WEIGHTS
from backbones.stages.layers import Block, Layer
from backbones.stages.network import normal_kl
from backbones.training import (
    Progress,
    Terms,
    Training,
    TrainingConfig,
    check_unused,
    configure,
    elbo_of,
    save_torch_file,
)
from ebm_prior.errors import EbmPriorError
from ebm_prior.registry import check_device

__all__ = [
    "PretrainConfig", "StagedTraining", "elbo", "initialise", "normalise", "public_state",
    "train",
]  # fmt: skip

INITIAL_SPREAD = 0.05  # of the entries of a weight's direction; Salimans and Kingma, 2016
INITIAL_IMAGES = 64  # at least, to initialise on: the statistics of a few images mislead


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Settings of stage one; what is 0 or empty is chosen by family and image size.

    Tuples have an entry per stage, from the image upwards.

    Attributes:
        stages: Kind of the stages: "biva" (two groups in each but the top one), "lvae" or
            "vae".
        channels: Channels of each stage's blocks.
        strides: Down-sampling of each stage, a power of two.
        latents: Latents of each of a stage's groups: units, or channels of a feature map.
        blocks: Residual blocks per stage.
        maps: Number of stages, counted from the image, whose latents are feature maps.
        dropout: Share of the blocks' middle activations set to zero.
        free_bits: Budget of KL per group and image, nats.
        free_share: Share of the steps with free bits.
    """

    stages: str = ""
    channels: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    latents: tuple[int, ...] = ()
    blocks: int = 0
    maps: int = 0
    dropout: float = 0.0
    free_bits: float = 2.0
    free_share: float = 0.5
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.dropout < 1 or self.free_share > 1:
            raise EbmPriorError("dropout and free_share are shares, dropout below 1")
        if any(stride & (stride - 1) for stride in self.strides):
            raise EbmPriorError(f"strides must be powers of two, got {list(self.strides)}")
        given = {
            name: len(getattr(self, name))
            for name in ("channels", "strides", "latents")
            if getattr(self, name)
        }
        if len(set(given.values())) > 1:
            counts = ", ".join(f"{name} has {n}" for name, n in given.items())
            raise EbmPriorError(f"one entry per stage is needed: {counts}")

    def for_images(self, defaults: PretrainConfig, height: int, width: int) -> PretrainConfig:
        """Fill in what is left to the family (`defaults`) and to the image size."""
        bottom = 1
        while not height % (2 * bottom) and not width % (2 * bottom):
            bottom *= 2
            if max(height, width) // bottom <= 8:
                break
        count = max(len(self.channels), len(self.strides), len(self.latents))
        count = count or len(defaults.channels)

        def fill(name: str) -> tuple[int, ...]:
            values = getattr(defaults, name)
            return getattr(self, name) or (values + values[-1:] * count)[:count]

        return replace(
            self,
            stages=self.stages or defaults.stages,
            channels=fill("channels"),
            strides=self.strides or (bottom,) + (1,) * (count - 1),
            latents=fill("latents"),
            blocks=self.blocks or max(defaults.blocks, bottom.bit_length() - 1),
        )

    def blocks_of(self, i: int) -> list[tuple[int, int, int]]:
        """Channels, kernel and stride of each inference block of stage i.

        Both codes want the stride in the last block; only those of the lowest stage may
        share it, and do, which makes the better filter.
        """
        strides, left = [1] * self.blocks, self.strides[i]
        for j in reversed(range(self.blocks)):
            strides[j] = left if i or j == 0 else min(left, 2)
            left //= strides[j]
        # Transposed convolutions must be able to cover the whole stride.
        kernel = 3 if i else max(5, self.strides[0])
        return [(self.channels[i], kernel, stride) for stride in strides]


class StagedTraining(Training):
    """A run of either family, which adds its format.

    Args:
        images: Training images, uint8, (N, C, H, W).
        out: Folder of the result and of the state to resume from.
        dataset: Name that the result is to carry.
        settings: Fields of `PretrainConfig` and `TrainingConfig`.
        device: Where to train.

    Attributes:
        family: "biva" or "hvae".
        kinds: Stages that the family offers.
        defaults: Its architecture where the settings leave it open.
    """

    kinds: tuple[str, ...]
    defaults: PretrainConfig

    def __init__(
        self, images: Tensor, out: Path, dataset: str, settings: Mapping[str, Any],
        device: torch.device,
    ) -> None:  # fmt: skip
        config = configure(PretrainConfig, settings, images)
        shape = tuple(images.shape[1:])
        if shape[0] not in (1, 3):
            raise EbmPriorError(f"images must have 1 or 3 channels, got {shape[0]}")
        config = config.for_images(self.defaults, *shape[1:])
        if config.stages not in self.kinds:
            raise EbmPriorError(
                f"unknown stages {config.stages!r}; known are {', '.join(self.kinds)}"
            )
        with torch.random.fork_rng(devices=[]):  # leave the caller's generator alone
            torch.manual_seed(config.seed)
            model = self.build(config, shape, dataset)
            normalise(model.network)
        for module in model.network.modules():
            if isinstance(module, Block):
                module.dropout = config.dropout
        model.to(device)
        super().__init__(images, out, dataset, config, model, model.network, adam_eps=1e-8)
        generator = self.generator()
        x = self.draw(self.initial_images, generator)
        initialise(model.network, lambda: self.terms(x, 1.0, generator))

    @property
    def initial_images(self) -> Tensor:
        """Indices of the images to initialise on: the first batch's, and more if it is small."""
        return self.shuffled(0)[: max(self.config.batch_size, INITIAL_IMAGES)]

    @abc.abstractmethod
    def build(
        self, config: PretrainConfig, shape: tuple[int, int, int], dataset: str
    ) -> StagedBackbone:
        """Backbone of random weights; keeps what `write_arguments` needs."""

    @abc.abstractmethod
    def write_arguments(self) -> None:
        """Write all files of the folder but the weights."""

    def weights(self) -> dict[str, Tensor]:
        """Weights under the public keys."""
        return public_state(self.network)

    def write(self) -> Path:
        """Write the folder, the weights last."""
        self.write_arguments()
        path = self.out / WEIGHTS[self.family]
        save_torch_file(path, self.weights())
        return path

    def terms(self, x: Tensor, beta: float, generator: torch.Generator) -> Terms:
        """Loss with free bits; see the module."""
        config = self.config
        noise = self.model.noise(len(x), generator)
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices, enabled=config.dropout > 0):
            if config.dropout > 0:
                torch.manual_seed(generator.initial_seed())
            draws, state = self.network.infer(self.model._prepare(x), noise, "decoder")
            params = self.network.image_parameters(state, self.model.padding)
        log_px = self.model.likelihood(params).log_prob(x)
        kl = torch.stack([normal_kl(draw.q, draw.p) for draw in draws], 1)
        free = config.free_bits if self.step < config.free_share * config.iterations else 0.0
        return Terms((beta * kl.clamp(min=free).sum(1) - log_px).mean(), log_px, kl)


def train(
    kind: type[StagedTraining],
    images: Tensor,
    *,
    out: str | Path,
    dataset: str,
    resume: bool,
    device: str | torch.device,
    progress: Progress | None,
    settings: Mapping[str, Any],
) -> Path:
    """Train a model of either family and write its folder: all that its `pretrain` does.

    One-channel images are drawn anew as x ~ Bernoulli(image) at every step; three-channel
    images have the discretized logistic mixture.

    Args:
        kind: The family's training.
        images: Training images, uint8, (N, C, H, W) with C = 1 or 3.
        out: Folder to create: the family's files, and `state.safetensors` to resume from.
        dataset: Name stored in the folder.
        resume: Continue an interrupted run of the same settings, on the CPU to the
            bit-identical result.
        device: Where to train.
        progress: Called after every step with steps done, steps in all, and the batch's
            `loss`, `elbo` (nats per image) and `kl`; None: a progress bar, on a terminal.
        settings: Fields of `PretrainConfig` and of `TrainingConfig`.

    Returns:
        Path of the weights, which `ebm_prior.load_backbone` loads under the family's name, as
        the public code loads the folder.

    Raises:
        EbmPriorError: On unusable images or settings, an `out` that holds another run or a
            model or cannot be written, or a loss that is not finite.
        Interrupted: On Ctrl-C, after saving.
    """
    check_unused(Path(out), kind.family, resume)
    training = kind(images, Path(out), dataset, settings, check_device(device))
    training.prepare(resume)
    training.run(progress)
    return training.finish()


def elbo(
    backbone: StagedBackbone, images: Tensor, *, batch_size: int = 250, seed: int = 0
) -> Tensor:
    """Single-sample ELBO of each image, every group's KL in closed form.

    Args:
        backbone: Model.
        images: Images, uint8, (N, C, H, W); drawn as x ~ Bernoulli(image) where the model
            was trained so.
        batch_size: Images at a time.
        seed: Seed of that draw and of the posterior sample.

    Returns:
        (N,), nats.
    """

    def infer(x: Tensor, generator: torch.Generator) -> tuple[list[Tensor], Tensor]:
        draws = backbone.infer(x, generator=generator)
        return [d.z for d in draws], torch.stack([normal_kl(d.q, d.p) for d in draws], 1)

    return elbo_of(backbone, images, infer, batch_size, seed)


def normalise(network: nn.Module) -> None:
    """Redraw all weights and train them as direction and length, w = g v / |v|."""
    for layer in network.modules():
        if isinstance(layer, Layer):
            module = layer.get_submodule(layer.inner)
            nn.init.normal_(module.weight, std=INITIAL_SPREAD)
            nn.init.zeros_(module.bias)
            weight_norm(module, dim=layer.out_axis)


@torch.no_grad()
def initialise(network: nn.Module, run: Callable[[], object]) -> None:
    """Scale and shift every layer so that its outputs have mean 0 and variance 1 on a batch.

    Each output channel's mean and variance are taken over images and positions. As every
    layer sees the normalised outputs of those before it, one pass does for all.

    Args:
        network: Freshly normalised network; its lengths and biases are changed.
        run: Passes the batch through all of it, once.
    """

    def scale(layer: Layer, _: object, output: Tensor) -> Tensor:
        module = layer.get_submodule(layer.inner)
        axes = [i for i in range(output.ndim) if i != 1]
        variance, mean = torch.var_mean(output, axes, correction=0)
        # A channel that is constant on the batch has no scale to correct.
        factor = torch.where(variance > 1e-12, variance.rsqrt(), 1.0)
        length = module.parametrizations.weight.original0
        length.mul_(factor.view([-1 if i == layer.out_axis else 1 for i in range(length.ndim)]))
        module.bias.copy_((module.bias - mean) * factor)
        shape = [-1 if i == 1 else 1 for i in range(output.ndim)]
        return (output - mean.view(shape)) * factor.view(shape)

    layers = [module for module in network.modules() if isinstance(module, Layer)]
    hooks = [layer.register_forward_hook(scale) for layer in layers]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()


def public_state(network: nn.Module) -> dict[str, Tensor]:
    """Weights of a normalised network under the public keys, all marked as initialised."""
    layers = {name: m for name, m in network.named_modules() if isinstance(m, Layer)}
    state = {
        key: value
        for key, value in network.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in layers)
    }
    for name, layer in layers.items():
        module = layer.get_submodule(layer.inner)
        state[f"{name}.initialized"] = torch.tensor(True)
        state[f"{name}.{layer.inner}.bias"] = module.bias.detach()
        for key, value in zip("gv", module.parametrizations.weight.parameters(), strict=True):
            state[f"{name}.{layer.inner}.weight_{key}"] = value.detach()
    return state
