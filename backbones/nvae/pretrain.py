"""Stage one: train a small NVAE by its ELBO and write it in the public format.

    loss = -log p(x|z) + beta * sum_i gamma_i KL(q_i || p_i)

beta rises linearly from nearly 0 to 1. While it is below 1, gamma_i balances the groups:
proportional to the group's size and to its mean KL, so that none is switched off early;
afterwards gamma_i = 1 and the loss is minus the ELBO.

Reference: Vahdat and Kautz, 2020, NVAE, https://arxiv.org/abs/2007.03898
"""

from __future__ import annotations

import argparse
import io
import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

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
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import write_bytes
from ebm_prior.interrupt import CtrlC, Interrupted
from ebm_prior.registry import check_device
from ebm_prior.safe_load import load_torch_file

__all__ = ["PretrainConfig", "elbo", "pretrain"]

CHECKPOINT, STATE = "checkpoint.pt", "state.pt"
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class PretrainConfig:
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
        iterations: Optimizer steps.
        epochs: Passes over the images; where given, decides `iterations`.
        batch_size: Images per step.
        lr: Adamax learning rate after warm-up; falls to `lr_min` along a cosine.
        lr_min: Learning rate at the end.
        warmup: Share of the steps over which the rate rises.
        weight_decay: Adamax L2 penalty.
        kl_anneal: Share of the steps over which beta rises to 1.
        clip: Largest gradient norm; beyond, the gradient is scaled down to it.
        save_every: Steps between saves of the state to resume from.
        seed: Seed of everything random.
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
    iterations: int = 6000
    epochs: int = 0
    batch_size: int = 64
    lr: float = 1e-2
    lr_min: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 3e-4
    kl_anneal: float = 0.3
    clip: float = 200.0
    save_every: int = 500
    seed: int = 0

    def __post_init__(self) -> None:
        for field in fields(self):
            value, default = getattr(self, field.name), field.default
            kind = type(default)
            if kind is float:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise EbmPriorError(f"{field.name} must be a number, got {value!r}")
                valid = 0 <= value < math.inf
            elif kind is int and not isinstance(value, bool):
                valid = isinstance(value, int) and value >= 0
            else:
                valid = isinstance(value, kind)
            if not valid:
                raise EbmPriorError(f"{field.name} must not be {value!r}")
        for name in ("iterations", "save_every", "cells", "mixtures", "lr", "clip"):
            if not getattr(self, name) > 0:
                raise EbmPriorError(f"{name} must be positive, got {getattr(self, name)}")
        if self.batch_size < 2:
            raise EbmPriorError("batch_size must be at least 2: batch norm needs more than one")
        if not 1 <= self.bits <= 8:
            raise EbmPriorError(f"bits must lie in 1 ... 8, got {self.bits}")
        if self.warmup >= 1 or self.kl_anneal > 1:
            raise EbmPriorError("warmup and kl_anneal are shares of the steps, below 1")
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
        out: Folder to create: the checkpoint, and `state.pt` to resume from.
        dataset: Name stored in the checkpoint; see above for what it decides.
        resume: Continue an interrupted run of the same settings, on the CPU to the
            bit-identical result.
        device: Where to train.
        progress: Called after every step with steps done, steps in all, and the batch's
            `loss`, `elbo` (nats per image) and `kl`; by default a progress bar, on a
            terminal.
        settings: Fields of `PretrainConfig`.

    Returns:
        Path of the checkpoint, which `ebm_prior.load_backbone("nvae", path)` and the public
        NVAE code load.

    Raises:
        EbmPriorError: On unusable images or settings, an `out` that holds another run, or
            a loss that is not finite.
        Interrupted: On Ctrl-C, after saving.
    """
    unknown = settings.keys() - {field.name for field in fields(PretrainConfig)}
    if unknown:
        raise EbmPriorError(f"unknown pretrain settings: {', '.join(sorted(unknown))}")
    channels, size = _working_format(images, dataset)
    config = PretrainConfig(**settings).for_images(channels, size)
    if config.epochs:
        steps = _steps_per_epoch(len(images), config.batch_size)
        config = replace(config, iterations=config.epochs * steps)
    training = _Training(images, Path(out), dataset, config, check_device(device), size)
    training.prepare(resume)
    training.run(progress)
    return training.finish()


@torch.no_grad()
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
    generator = torch.Generator().manual_seed(seed)
    values = []
    for batch in images.split(batch_size):
        x = batch.to(backbone.dtype) / 255
        if backbone.binarize:
            x = torch.bernoulli(x, generator=generator)
        x = x.to(backbone.device)
        groups = backbone.infer(x, generator=generator)
        analytic = backbone.network.config.flows == 0
        log_px = backbone.decode([group.z for group in groups]).log_prob(x)
        values.append((log_px - sum(_kl(group, analytic) for group in groups)).cpu())
    return torch.cat(values)


def _kl(group: GroupPosterior, analytic: bool) -> Tensor:
    """KL(q || p) of a group, (B,), nats: in closed form unless flows change q."""
    if analytic:
        return kl_divergence(group.q_mu, group.q_sigma, group.p_mu, group.p_sigma)
    return group.log_q - group.log_p


def _working_format(images: Tensor, dataset: str) -> tuple[int, int]:
    """Channels and working size of the images, after checking them."""
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
        raise EbmPriorError(
            f"images must be uint8 of shape (N, C, H, W) with N >= 2, got {images.dtype} "
            f"{tuple(images.shape)}"
        )
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


class _Training:
    """State of one run. Randomness is seeded per step, so the step number is its state."""

    def __init__(
        self, images: Tensor, out: Path, dataset: str, config: PretrainConfig,
        device: torch.device, size: int,
    ) -> None:  # fmt: skip
        self.images, self.out, self.dataset = images, out, dataset
        self.config, self.device = config, device
        self.args = _public_args(config, dataset, len(images))
        shape, likelihood = network_config(
            self.args, ARCHITECTURES[config.architecture], images.shape[1], size
        )
        with torch.random.fork_rng(devices=[]):  # leave the caller's generator alone
            torch.manual_seed(config.seed)
            network = Network(shape)
        # The backbone around the network being trained knows its padding and likelihood.
        self.model = NVAEBackbone(
            Checkpoint(shape, network, dataset, config.bits, likelihood, self.args)
        ).to(device)
        self.network = network.requires_grad_(True)
        if device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # 1.6 times the speed
        self.optimizer = torch.optim.Adamax(
            self.network.parameters(), lr=config.lr, weight_decay=config.weight_decay, eps=1e-3
        )
        self.step = 0
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))
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

    # -- files ----------------------------------------------------------------------------

    @property
    def description(self) -> str:
        """Everything that must agree for a run to be continued."""
        values = asdict(self.config) | {
            "dataset": self.dataset,
            "images": list(self.images.shape),
            "sum": int(self.images.sum(dtype=torch.int64)),
        }
        values.pop("save_every")
        return json.dumps(values, sort_keys=True)

    def prepare(self, resume: bool) -> None:
        """Refuse to overwrite a run, or load the state of the one to continue."""
        state = self.out / STATE
        if not resume:
            if state.exists() or (self.out / CHECKPOINT).exists():
                raise EbmPriorError(
                    f"{self.out} already holds a training run; continue it with --resume, or "
                    "choose another --out"
                )
            return
        if not state.exists():
            raise EbmPriorError(f"{self.out} holds no interrupted run; start without --resume")
        data = load_torch_file(state)
        if not isinstance(data, dict) or "description" not in data:
            raise EbmPriorError(f"{state} is not a state that pretraining wrote")
        if data["description"] != self.description:
            old, new = json.loads(data["description"]), json.loads(self.description)
            changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise EbmPriorError(
                f"{self.out} was started with other settings ({', '.join(changed)}); resume "
                "with the same ones, or choose another --out"
            )
        self.network.load_state_dict(data["network"])
        self.optimizer.load_state_dict(data["optimizer"])
        self.step = data["step"]

    def save(self) -> None:
        """Write the state to resume from, atomically."""
        _save(
            self.out / STATE,
            {
                "description": self.description,
                "step": self.step,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def finish(self) -> Path:
        """Write the checkpoint, without the optimizer's state, and drop the state file."""
        path = self.out / CHECKPOINT
        network = self.network.to("cpu", memory_format=torch.contiguous_format).eval()
        steps = _steps_per_epoch(len(self.images), self.config.batch_size)
        _save(
            path,
            checkpoint_dict(
                network, self.args, epoch=math.ceil(self.step / steps), global_step=self.step
            ),
        )
        (self.out / STATE).unlink(missing_ok=True)
        return path

    # -- steps ----------------------------------------------------------------------------

    def run(self, progress: Progress | None) -> None:
        """All remaining steps."""
        total = self.config.iterations
        self.network.train()
        bar = tqdm(
            total=total,
            initial=self.step,
            desc="pretrain",
            disable=None if progress is None else True,
        )
        with bar, CtrlC() as ctrl_c:
            while self.step < total:
                metrics = self.one_step()
                self.step += 1
                if progress is not None:
                    progress(self.step, total, metrics)
                bar.set_postfix(elbo=f"{metrics['elbo']:.1f}", refresh=False)
                bar.update()
                if self.step % self.config.save_every == 0 or self.step == total:
                    self.save()
                if ctrl_c.pressed:
                    self.save()
                    raise Interrupted(
                        f"interrupted at iteration {self.step} of {total}; the state is saved: "
                        f"run the same command with --resume --out {self.out}"
                    )

    def one_step(self) -> dict[str, float]:
        """Gradient step on one batch."""
        config, step = self.config, self.step
        generator = torch.Generator().manual_seed((config.seed + 1) * 1_000_003 + step)
        x = self.batch(generator)
        beta = min(1.0, max(1e-4, step / max(1.0, config.kl_anneal * config.iterations)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        noise = self.model._noise(len(x), generator)
        groups, features = self.network.infer(self.model._prepare(x), noise)
        px = self.model._likelihood(self.network.decode(features))
        kl = torch.stack([_kl(group, config.flows == 0) for group in groups], 1)
        log_px = px.log_prob(x)
        loss = (beta * self.balanced(kl, beta) - log_px).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        value = loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            saved = step - step % config.save_every
            raise EbmPriorError(
                f"the loss or its gradient is not finite at iteration {step + 1}; start again "
                f"with a lower lr than {config.lr:g} (last state saved: iteration {saved})"
            )
        self.optimizer.step()
        total_kl = kl.sum(1).mean().item()
        return {"loss": value, "elbo": log_px.mean().item() - total_kl, "kl": total_kl}

    def batch(self, generator: torch.Generator) -> Tensor:
        """Images of this step in [0, 1], every image once per epoch."""
        size = min(self.config.batch_size, len(self.images))
        steps = _steps_per_epoch(len(self.images), size)
        epoch, index = divmod(self.step, steps)
        if self.order[0] != epoch:
            shuffle = torch.Generator().manual_seed(self.config.seed * 7919 + epoch)
            self.order = epoch, torch.randperm(len(self.images), generator=shuffle)
        x = self.images[self.order[1][index * size : (index + 1) * size]].float() / 255
        if self.model.binarize:
            x = torch.bernoulli(x, generator=generator)
        return x.to(self.device)

    def balanced(self, kl: Tensor, beta: float) -> Tensor:
        """Sum over groups of (B, L) divergences, weighted while beta is below 1: (B,)."""
        if beta >= 1:
            return kl.sum(1)
        weight = self.sizes * (kl.detach().abs().mean(0) + 0.01)
        return (kl * (weight / weight.mean())).sum(1)

    def rate(self) -> float:
        """Learning rate of this step: linear rise, then a cosine."""
        config = self.config
        rise = config.warmup * config.iterations
        if self.step < rise:
            return config.lr * (self.step + 1) / (rise + 1)
        share = (self.step - rise) / max(1.0, config.iterations - rise)
        low = min(config.lr_min, config.lr)
        return low + 0.5 * (config.lr - low) * (1 + math.cos(math.pi * share))


def _steps_per_epoch(images: int, batch_size: int) -> int:
    """Whole batches in an epoch."""
    return max(1, images // min(batch_size, images))


def _save(path: Path, data: Mapping[str, Any]) -> None:
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write_bytes(path, buffer.getvalue())


def _public_args(config: PretrainConfig, dataset: str, images: int) -> dict[str, Any]:
    """The training arguments under the names, and with all the keys, of the public parser."""
    epochs = math.ceil(config.iterations / _steps_per_epoch(images, config.batch_size))
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
