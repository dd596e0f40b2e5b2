"""Stage one: train a small NVAE by its ELBO and write it in the public format.

    loss = -log p(x|z) + beta * sum_i gamma_i KL(q_i || p_i)

beta rises linearly from nearly 0 to 1. While it is below 1, gamma_i balances the groups:
proportional to the group's size and to its mean KL, so that none is switched off early;
afterwards gamma_i = 1 and the loss is minus the ELBO.

Reference: Vahdat and Kautz, 2020, NVAE, https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

import argparse
import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.nvae import NVAEBackbone
from backbones.nvae.checkpoint import (
    ARCHITECTURES,
    PADDED,
    Checkpoint,
    checkpoint_dict,
    image_format,
    network_config,
)
from backbones.nvae.network import GroupPosterior, Network, kl_divergence
from backbones.training import (
    CHECKPOINT,
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

__all__ = ["PretrainConfig", "elbo", "pretrain"]


@dataclass(frozen=True)
class PretrainConfig(TrainingConfig):
    """Settings of stage one; what is 0 or empty is chosen by image size.

    Attributes:
        channels_enc: Encoder channels at full resolution.
        channels_dec: Decoder channels at full resolution.
        halvings: Halvings before the first latent scale.
        scales: Latent scales.
        groups: Latent groups at the finest scale, halved from scale to scale.
        latents: Channels of a group.
        cells: Residual cells per group and per resizing block.
        architecture: Cells' operations, a name from `ARCHITECTURES`.
        use_se: Squeeze-and-excitation in every cell.
        res_dist: q's parameters as offsets to p's.
        flows: Normalizing flows per group, in q only.
        mixtures: Components of the logistic mixture (colour images; 1: Gaussian).
        bits: Bits per channel the images are reduced to (colour images).
    """

    channels_enc: int = 0
    channels_dec: int = 0
    halvings: int = 0
    scales: int = 0
    groups: int = 0
    latents: int = 0
    cells: int = 1
    architecture: str = ""
    use_se: bool = True
    res_dist: bool = True
    flows: int = 0
    mixtures: int = 10
    bits: int = 8

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("cells", "mixtures"):
            self.require_positive(name)
        if not 1 <= self.bits <= 8:
            raise EbmPriorError(f"bits must lie in 1 ... 8, got {self.bits}")
        if self.architecture and self.architecture not in ARCHITECTURES:
            raise EbmPriorError(
                f"unknown architecture {self.architecture!r}; known are {', '.join(ARCHITECTURES)}"
            )

    def for_images(self, channels: int, size: int) -> PretrainConfig:
        """Fill in what is left to the image size (that of the network, padding included)."""
        if size <= 16:
            shape = (12, 12, 1, 2, 2, 4)
        elif channels == 1:
            shape = (8, 12, 2, 2, 4, 8)
        elif size <= 32:
            shape = (24, 24, 1, 2, 6, 12)
        else:
            shape = (16, 24, 2, 3, 6, 12)
        # At this size plain residual cells train twice as fast per step as mobile ones.
        grey = size > 16 and channels == 1
        architecture = self.architecture or ("res_bnswish" if grey else "res_mbconv")
        names = ("channels_enc", "channels_dec", "halvings", "scales", "groups", "latents")
        blanks = {
            name: value
            for name, value in zip(names, shape, strict=True)
            if getattr(self, name) == 0
        }
        return replace(self, architecture=architecture, **blanks)


def pretrain(
    images: Tensor,
    *,
    out: str | Path,
    dataset: str,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **settings: Any,  # noqa: ANN401
) -> Path:
    """Train an NVAE on images and write `out/checkpoint.pt`.

    `mnist` and `omniglot` are padded to 32x32 and drawn anew as x ~ Bernoulli(image) at
    every step, as the public code does. `digits` (scikit-learn's, 8x8) keeps its size and
    has a binomial likelihood, as its pixels are counts of 0 to 16. Other one-channel sets
    keep their grey levels, with the cross-entropy of a Bernoulli as likelihood;
    three-channel images have the discretized logistic mixture.

    Args:
        images: Training images, uint8, (N, C, H, W) with C = 1 or 3, square.
        out: Folder to create: the checkpoint, and `state.safetensors` to resume from.
        dataset: Name stored in the checkpoint; see above for what it decides.
        resume: Continue an interrupted run of the same settings, on the CPU to the
            bit-identical result.
        device: Where to train.
        progress: Called after every step with steps done, steps in all, and the batch's
            `loss`, `elbo` (nats per image) and `kl`; by default a progress bar, on a
            terminal.
        settings: Fields of `PretrainConfig` and of `TrainingConfig`.

    Returns:
        Path of the checkpoint, which `ebm_prior.load_backbone("nvae", path)` and the public
        NVAE code load.

    Raises:
        EbmPriorError: On unusable images or settings, an `out` that holds another run or a
            model or cannot be written, or a loss that is not finite.
        Interrupted: On Ctrl-C, after saving.
    """
    config = configure(PretrainConfig, settings, images)
    channels, size = _working_format(images, dataset)
    config = config.for_images(channels, size)
    check_unused(Path(out), _Training.family, resume)
    training = _Training(images, Path(out), dataset, config, check_device(device), size)
    training.prepare(resume)
    training.run(progress)
    return training.finish()


def elbo(
    backbone: NVAEBackbone, images: Tensor, *, batch_size: int = 250, seed: int = 0
) -> Tensor:
    """Single-sample ELBO of each image.

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
        groups = backbone.infer(x, generator=generator)
        analytic = backbone.network.config.flows == 0
        return [g.z for g in groups], torch.stack([_kl(g, analytic) for g in groups], 1)

    return elbo_of(backbone, images, infer, batch_size, seed)


def _kl(group: GroupPosterior, analytic: bool) -> Tensor:
    """KL(q || p) of a group, (B,), nats: in closed form unless flows change q."""
    if analytic:
        return kl_divergence(group.q_mu, group.q_sigma, group.p_mu, group.p_sigma)
    return group.log_q - group.log_p


def _working_format(images: Tensor, dataset: str) -> tuple[int, int]:
    """Channels and working size of the images, after checking them."""
    _, channels, height, width = images.shape
    if height != width or channels not in (1, 3):
        raise EbmPriorError(
            f"NVAE takes square images of 1 or 3 channels, got {channels} x {height} x {width}"
        )
    if dataset == "stacked_mnist":
        raise EbmPriorError("stacked_mnist is not supported; name the data set otherwise")
    size = height
    if dataset in PADDED:
        if (channels, height) != (1, 28):
            raise EbmPriorError(
                f"{dataset} means 1 x 28 x 28 images, got {channels} x {height} x {width}; "
                "name the data set otherwise"
            )
        size = 32
    known = image_format(dataset)
    if known[0] is not None and known != (channels, size):
        raise EbmPriorError(
            f"{dataset} means {known[0]} x {known[1]} x {known[1]} images, got {channels} x "
            f"{height} x {width}; name the data set otherwise"
        )
    return channels, size


class _Training(Training):
    family = "nvae"

    def __init__(
        self, images: Tensor, out: Path, dataset: str, config: PretrainConfig,
        device: torch.device, size: int,
    ) -> None:  # fmt: skip
        self.args = _public_args(config, dataset, len(images))
        shape, likelihood = network_config(
            self.args, ARCHITECTURES[config.architecture], images.shape[1], size
        )
        with torch.random.fork_rng(devices=[]):  # leave the caller's generator alone
            torch.manual_seed(config.seed)
            network = Network(shape)
        model = NVAEBackbone(
            Checkpoint(shape, network, dataset, config.bits, likelihood, self.args)
        ).to(device)
        super().__init__(images, out, dataset, config, model, network, adam_eps=1e-3)
        finest = shape.group_sizes[-1]
        # Larger maps count more, shared among the groups of a scale.
        self.sizes = torch.tensor(
            [
                (side / shape.group_sizes[0]) ** 2
                / shape.groups_per_scale[(finest // side).bit_length() - 1]
                for side in shape.group_sizes
            ],
            device=device,
        )

    def write(self) -> Path:
        """Write the checkpoint."""
        path = self.out / CHECKPOINT
        steps = self.config.steps_per_epoch(len(self.images))
        save_torch_file(
            path,
            checkpoint_dict(
                self.network, self.args, epoch=math.ceil(self.step / steps), global_step=self.step
            ),
        )
        return path

    def terms(self, x: Tensor, beta: float, generator: torch.Generator) -> Terms:
        """Loss with groups balanced while beta is below 1."""
        noise = self.model._noise(len(x), generator)
        groups, features = self.network.infer(self.model._prepare(x), noise)
        px = self.model._likelihood(self.network.decode(features))
        kl = torch.stack([_kl(group, self.config.flows == 0) for group in groups], 1)
        log_px = px.log_prob(x)
        return Terms((beta * self.balanced(kl, beta) - log_px).mean(), log_px, kl)

    def balanced(self, kl: Tensor, beta: float) -> Tensor:
        """Sum over groups of (B, L) divergences, weighted while beta is below 1: (B,)."""
        if beta >= 1:
            return kl.sum(1)
        weight = self.sizes * (kl.detach().abs().mean(0) + 0.01)
        return (kl * (weight / weight.mean())).sum(1)


def _public_args(config: PretrainConfig, dataset: str, images: int) -> dict[str, Any]:
    """The training arguments under the names, and with all the keys, of the public parser."""
    epochs = math.ceil(config.iterations / config.steps_per_epoch(images))
    return vars(
        argparse.Namespace(
            root="", save="", dataset=dataset, data="",
            batch_size=config.batch_size,
            learning_rate=config.lr, learning_rate_min=min(config.lr_min, config.lr),
            weight_decay=config.weight_decay, weight_decay_norm=0.0,
            weight_decay_norm_init=10.0, weight_decay_norm_anneal=False,
            epochs=epochs, warmup_epochs=math.ceil(config.warmup * epochs), fast_adamax=False,
            arch_instance=config.architecture,
            kl_anneal_portion=config.kl_anneal, kl_const_portion=0.0001, kl_const_coeff=0.0001,
            num_nf=config.flows, num_x_bits=config.bits,
            num_latent_scales=config.scales, num_groups_per_scale=config.groups,
            num_latent_per_group=config.latents, ada_groups=True, min_groups_per_scale=1,
            num_channels_enc=config.channels_enc, num_channels_dec=config.channels_dec,
            num_preprocess_blocks=config.halvings, num_preprocess_cells=max(config.cells, 1),
            num_cell_per_cond_enc=config.cells,
            num_postprocess_blocks=config.halvings, num_postprocess_cells=max(config.cells, 1),
            num_cell_per_cond_dec=config.cells,
            num_mixture_dec=config.mixtures, use_se=config.use_se, res_dist=config.res_dist,
            cont_training=False, num_proc_node=1, node_rank=0, local_rank=0, global_rank=0,
            num_process_per_node=1, master_address="127.0.0.1", seed=config.seed,
            distributed=False, num_total_iter=config.iterations,
        )
    )  # fmt: skip
