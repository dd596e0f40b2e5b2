"""What the trainers of all families share: settings, the resumable loop, stopping, files."""

from __future__ import annotations

import abc
import io
import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from tqdm import tqdm

from backbones.stages.checkpoint import FILES
from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import check_writable, write_bytes
from ebm_prior.interrupt import CtrlC, Interrupted
from ebm_prior.safe_load import load_torch_file

__all__ = [
    "CHECKPOINT", "Progress", "Terms", "Training", "TrainingConfig", "check_unused", "configure",
    "elbo_of", "save_torch_file",
]  # fmt: skip

STATE = "state.pt"
CHECKPOINT = "checkpoint.pt"
RESULTS = {"nvae": (CHECKPOINT,), **FILES}  # of each family: one folder holds one model
SEEDS = 2**63  # seeds are taken modulo this: torch has none beyond 64 bits
Progress = Callable[[int, int, dict[str, float]], None]


@dataclass(frozen=True)
class TrainingConfig:
    """Settings of every family's stage one; each adds its own.

    Attributes:
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
            value, kind = getattr(self, field.name), type(field.default)
            if kind is float:
                if isinstance(value, bool) or not isinstance(value, (int, float)):
                    raise EbmPriorError(f"{field.name} must be a number, got {value!r}")
                valid = 0 <= value < math.inf
            elif kind is int:
                valid = _is_whole(value, 0)
            elif kind is tuple:
                valid = isinstance(value, (tuple, list)) and all(_is_whole(v, 1) for v in value)
            else:
                valid = isinstance(value, kind)
            if not valid:
                raise EbmPriorError(f"{field.name} must not be {value!r}")
            if kind is tuple:  # a list where it came as JSON
                object.__setattr__(self, field.name, tuple(value))
        for name in ("iterations", "save_every", "lr", "clip"):
            self.require_positive(name)
        if self.batch_size < 2:
            raise EbmPriorError(
                "batch_size must be at least 2: activations are normalised over it"
            )
        if self.warmup >= 1 or self.kl_anneal > 1:
            raise EbmPriorError("warmup and kl_anneal are shares of the steps, below 1")

    def require_positive(self, name: str) -> None:
        """Raise `EbmPriorError` if the setting is zero."""
        if not getattr(self, name) > 0:
            raise EbmPriorError(f"{name} must be positive, got {getattr(self, name)}")

    def steps_per_epoch(self, images: int) -> int:
        """Whole batches in a pass over so many images."""
        return max(1, images // min(self.batch_size, images))


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


C = TypeVar("C", bound=TrainingConfig)


def configure(kind: type[C], settings: Mapping[str, Any], images: Tensor) -> C:
    """Make a configuration, after checking the images and the names of the settings.

    Args:
        kind: Class of the configuration.
        settings: Its fields.
        images: Training images, uint8, (N, C, H, W) with N >= 2.

    Raises:
        EbmPriorError: If the images are of another kind, or a setting is unknown or out of
            range.
    """
    unknown = settings.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise EbmPriorError(f"unknown pretrain settings: {', '.join(sorted(unknown))}")
    if images.dtype != torch.uint8 or images.ndim != 4 or len(images) < 2:
        raise EbmPriorError(
            f"images must be uint8 of shape (N, C, H, W) with N >= 2, got {images.dtype} "
            f"{tuple(images.shape)}"
        )
    config = kind(**settings)
    if config.epochs:
        steps = config.steps_per_epoch(len(images))
        config = replace(config, iterations=config.epochs * steps)
    return config


def check_unused(out: Path, family: str, resume: bool) -> None:
    """Refuse a folder that holds a model or another run; the network need not exist yet.

    Args:
        out: Folder of the run.
        family: Family to be trained, one of `RESULTS`.
        resume: Whether the folder must hold an interrupted run instead.

    Raises:
        EbmPriorError: Saying how to go on.
    """
    # Unlike Path.exists, false in a folder that may not be read, which `prepare` refuses.
    if os.path.exists(out / STATE):
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


class Training(abc.ABC):
    """State of one run. Randomness is seeded per step, so the step number is its state.

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

    family: str

    def __init__(
        self, images: Tensor, out: Path, dataset: str, config: TrainingConfig, model: Backbone,
        network: nn.Module, adam_eps: float,
    ) -> None:  # fmt: skip
        self.images, self.out, self.dataset, self.config = images, out, dataset, config
        self.model, self.device = model, model.device
        self.network = network.requires_grad_(True)
        if self.device.type == "cpu":
            self.network.to(memory_format=torch.channels_last)  # NVAE: 1.6 times the speed
        self.optimizer = torch.optim.Adamax(
            self.network.parameters(),
            lr=config.lr,
            weight_decay=config.weight_decay,
            eps=adam_eps,
        )
        self.step = 0
        self.saved: int | None = None
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    # -- for the family to say ------------------------------------------------------------

    @abc.abstractmethod
    def terms(self, x: Tensor, beta: float, generator: torch.Generator) -> Terms:
        """Objective on images (B, C, H, W) in [0, 1], with all randomness from `generator`."""

    @abc.abstractmethod
    def write(self) -> Path:
        """Write the result, from a network in evaluation mode on the CPU."""

    # -- files ----------------------------------------------------------------------------

    @property
    def description(self) -> str:
        """Everything that must agree for a run to be continued."""
        values = asdict(self.config) | {
            "backbone": self.family,
            "dataset": self.dataset,
            "images": list(self.images.shape),
            "sum": int(self.images.sum(dtype=torch.int64)),
        }
        values.pop("save_every")
        return json.dumps(values, sort_keys=True)

    def prepare(self, resume: bool) -> None:
        """After `check_unused`: can files be written? Load the state of the run to continue."""
        state = self.out / STATE
        check_writable(state)
        if not resume:
            return
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
        self.step = self.saved = data["step"]

    def save(self) -> None:
        """Write the state to resume from, atomically."""
        save_torch_file(
            self.out / STATE,
            {
                "description": self.description,
                "step": self.step,
                "network": self.network.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )
        self.saved = self.step

    def finish(self) -> Path:
        """Write the result, without the optimizer's state, and drop the state file."""
        self.network.to("cpu", memory_format=torch.contiguous_format).eval()
        path = self.write()
        (self.out / STATE).unlink(missing_ok=True)
        return path

    # -- steps ----------------------------------------------------------------------------

    def run(self, progress: Progress | None) -> None:
        """All remaining steps.

        Raises:
            EbmPriorError: If the loss or its gradient is not finite.
            Interrupted: On Ctrl-C, after saving.
        """
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

    def generator(self) -> torch.Generator:
        """All the randomness of this step."""
        seed = (self.config.seed + 1) * 1_000_003 + self.step
        return torch.Generator().manual_seed(seed % SEEDS)

    def batch(self, generator: torch.Generator) -> Tensor:
        """Images of this step in [0, 1], every image once per epoch."""
        size = min(self.config.batch_size, len(self.images))
        epoch, index = divmod(self.step, self.config.steps_per_epoch(len(self.images)))
        return self.draw(self.shuffled(epoch)[index * size : (index + 1) * size], generator)

    def shuffled(self, epoch: int) -> Tensor:
        """Indices of all images in the order of an epoch."""
        if self.order[0] != epoch:
            seed = self.config.seed * 7919 + epoch
            shuffle = torch.Generator().manual_seed(seed % SEEDS)
            self.order = epoch, torch.randperm(len(self.images), generator=shuffle)
        return self.order[1]

    def draw(self, indices: Tensor, generator: torch.Generator) -> Tensor:
        """Images (B, C, H, W) in [0, 1], of zeros and ones where the model wants them."""
        x = self.images[indices].float() / 255
        if self.model.binarize:
            x = torch.bernoulli(x, generator=generator)
        return x.to(self.device)

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


def save_torch_file(path: Path, data: Mapping[str, Any] | str) -> None:
    """`torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write_bytes(path, buffer.getvalue())
