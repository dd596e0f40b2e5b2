"""What the stage-one trainers of all families share: settings, the ELBO's step, files."""

from __future__ import annotations

import abc
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from backbones.loop import (
    STATE,
    Loop,
    LoopConfig,
    Progress,
    State,
    configure,
    entries,
    load_optimizer,
    optimizer_tensors,
    save_torch_file,
    state_exists,
)
from backbones.stages.checkpoint import FILES
from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError

__all__ = [
    "CHECKPOINT", "Progress", "Terms", "Training", "TrainingConfig", "check_unused", "configure",
    "elbo_of", "save_torch_file",
]  # fmt: skip

CHECKPOINT = "checkpoint.pt"
RESULTS = {"nvae": (CHECKPOINT,), **FILES}  # of each family: one folder holds one model


@dataclass(frozen=True)
class TrainingConfig(LoopConfig):
    """Settings of every family's stage one; each adds its own.

    Attributes:
        lr: Adamax learning rate after warm-up; falls to `lr_min` along a cosine.
        lr_min: Learning rate at the end.
        warmup: Share of the steps over which the rate rises.
        weight_decay: Adamax L2 penalty.
        kl_anneal: Share of the steps over which beta rises to 1.
        clip: Largest gradient norm; beyond, the gradient is scaled down to it.
    """

    lr: float = 1e-2
    lr_min: float = 1e-4
    warmup: float = 0.05
    weight_decay: float = 3e-4
    kl_anneal: float = 0.3
    clip: float = 200.0

    def __post_init__(self) -> None:
        super().__post_init__()
        self.require_positive("lr", "clip")
        if self.batch_size < 2:
            raise EbmPriorError(
                "batch_size must be at least 2: activations are normalised over it"
            )
        if self.warmup >= 1 or self.kl_anneal > 1:
            raise EbmPriorError("warmup and kl_anneal are shares of the steps, below 1")


def check_unused(out: Path, family: str, resume: bool) -> None:
    """Refuse a folder that holds a model or another run; the network need not exist yet.

    Args:
        out: Folder of the run.
        family: Family to be trained, one of `RESULTS`.
        resume: Whether the folder must hold an interrupted run instead.

    Raises:
        EbmPriorError: Saying how to go on.
    """
    # false in a folder that may not be read, which `prepare` refuses
    if state_exists(out / STATE):
        if not resume:
            raise EbmPriorError(
                f"{out} already holds an interrupted run; continue it with --resume, or choose "
                "another --out"
            )
        return
    names = sorted({name for files in RESULTS.values() for name in files})
    found = [name for name in names if os.path.exists(out / name)]
    if set(RESULTS[family]) <= set(found):
        raise EbmPriorError(f"the run in {out} is finished; choose another --out")
    if found:
        raise EbmPriorError(
            f"{out} already holds files of a model ({', '.join(found)}); choose another --out"
        )
    if resume:
        raise EbmPriorError(f"{out} holds no interrupted run; start without --resume")


class Terms(NamedTuple):
    """What a step's objective is made of.

    Attributes:
        loss: What is minimised, a scalar.
        log_px: log p(x|z), (B,), nats.
        kl: KL(q_i || p_i) of each group, (B, L), nats.
    """

    loss: Tensor
    log_px: Tensor
    kl: Tensor


class Training(Loop):
    """One run of stage one.

    Args:
        images: Training images, uint8, (N, C, H, W).
        out: Folder of the result and of the state to resume from.
        dataset: Name that the result is to carry.
        config: Settings, complete.
        model: Backbone around the network to train, which knows its padding and likelihood.
        network: That network.
        adam_eps: Adamax's addition to the denominator.

    Attributes:
        family: Name of the family, one of `RESULTS`.
    """

    config: TrainingConfig

    def __init__(
        self, images: Tensor, out: Path, dataset: str, config: TrainingConfig, model: Backbone,
        network: nn.Module, adam_eps: float,
    ) -> None:  # fmt: skip
        super().__init__(images, out, dataset, config, model)
        self.network = network.requires_grad_(True)
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # NVAE: 1.6 times the speed
        self.optimizer = torch.optim.Adamax(
            self.network.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            eps=adam_eps,
        )

    # -- for the family to say ------------------------------------------------------------

    @abc.abstractmethod
    def terms(self, x: Tensor, beta: float, generator: torch.Generator) -> Terms:
        """Objective on images (B, C, H, W) in [0, 1], with all randomness from `generator`."""

    @abc.abstractmethod
    def write(self) -> Path:
        """Write the result, from a network in evaluation mode on the CPU."""

    # -- files ----------------------------------------------------------------------------

    def capture(self) -> State:
        """Weights and the optimizer's state."""
        parts = {
            "network": self.network.state_dict(),
            "optimizer": optimizer_tensors(self.optimizer),
        }
        return {f"{of}.{k}": v for of, part in parts.items() for k, v in part.items()}, {}

    def restore(self, state: State) -> None:
        """Go back to them."""
        tensors, _ = state
        self.network.load_state_dict(entries(tensors, "network"))
        load_optimizer(self.optimizer, entries(tensors, "optimizer"))

    def finish(self) -> Path:
        """Write the result, without the optimizer's state, and drop the state file."""
        self.network.to("cpu", memory_format=torch.contiguous_format).eval()
        path = self.write()
        (self.out / STATE).unlink(missing_ok=True)
        return path

    # -- steps ----------------------------------------------------------------------------

    def run(self, progress: Progress | None) -> None:
        """All remaining steps, with the network in training mode."""
        self.network.train()
        super().run(progress)

    def one_step(self) -> dict[str, float]:
        """Gradient step on one batch."""
        config, step = self.config, self.step
        generator = self.generator()
        x = self.batch(generator)
        beta = min(1.0, max(1e-4, step / max(1.0, config.kl_anneal * config.iterations)))
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate()
        terms = self.terms(x, beta, generator)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        norm = nn.utils.clip_grad_norm_(self.network.parameters(), config.clip)
        value = terms.loss.item()
        if not (math.isfinite(value) and math.isfinite(norm.item())):
            kept = f"{self.out} holds the state of iteration {self.saved}"
            elsewhere = "" if self.saved is None else f" and another --out ({kept})"
            raise EbmPriorError(
                f"the loss or its gradient is not finite at iteration {step + 1}; start again "
                f"with a lower lr than {config.lr:g}{elsewhere}"
            )
        self.optimizer.step()
        kl = terms.kl.sum(1).mean().item()
        return {"loss": value, "elbo": terms.log_px.mean().item() - kl, "kl": kl}

    def rate(self) -> float:
        """Learning rate of this step: linear rise, then a cosine."""
        config = self.config
        rise = config.warmup * config.iterations
        if self.step < rise:
            return config.lr * (self.step + 1) / (rise + 1)
        share = (self.step - rise) / max(1.0, config.iterations - rise)
        low = min(config.lr_min, config.lr)
        return low + 0.5 * (config.lr - low) * (1 + math.cos(math.pi * share))


@torch.no_grad()
def elbo_of(
    backbone: Backbone,
    images: Tensor,
    infer: Callable[[Tensor, torch.Generator], tuple[Sequence[Tensor], Tensor]],
    batch_size: int,
    seed: int,
) -> Tensor:
    """Single-sample ELBO of each image, for the families' `elbo`.

    Args:
        backbone: Model.
        images: Images, uint8, (N, C, H, W); drawn as x ~ Bernoulli(image) where the model
            was trained so.
        infer: Images in [0, 1] and a generator to latents and KL of each group, (B, L).
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
        z, kl = infer(x, generator)
        values.append((backbone.decode(z).log_prob(x) - kl.sum(1)).cpu())
    return torch.cat(values)
