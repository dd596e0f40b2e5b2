"""The resumable loop of every trainer: settings, randomness by step, state, stopping."""

from __future__ import annotations

import abc
import io
import json
import math
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import check_writable, write_bytes
from ebm_prior.interrupt import CtrlC, Interrupted
from ebm_prior.micro_batch import out_of_memory
from ebm_prior.run import read_state, write_state

__all__ = [
    "Loop", "LoopConfig", "Progress", "State", "configure", "entries", "load_optimizer",
    "optimizer_tensors", "save_torch_file", "state_exists",
]  # fmt: skip

STATE = "state.safetensors"
SAVE_SECONDS = 300  # at the latest, so that a kill costs no more of a large model's time
SEEDS = 2**63  # seeds are taken modulo this: torch has none beyond 64 bits
Progress = Callable[[int, int, dict[str, float]], None]
State = tuple[dict[str, Tensor], dict[str, Any]]  # tensors, and plain values beside them
TAKES = {
    float: "a number, 0 or more",
    int: "a whole number, 0 or more",
    tuple: "a list of whole numbers, 1 or more",
    bool: "true or false",
    str: "a text",
}
"""What settings of a type are, for people."""


@dataclass(frozen=True)
class LoopConfig:
    """Settings of every trainer; each adds its own, whose types its defaults decide.

    Attributes:
        iterations: Optimizer steps.
        epochs: Passes over the images; where given, decides `iterations`.
        batch_size: Images per step.
        save_every: Steps between saves of the state to resume from; slow steps save more often.
        seed: Seed of everything random.
    """

    verb: ClassVar[str] = "pretrain"  # whose settings they are
    nested: ClassVar[tuple[str, ...]] = ()  # settings that list lists, which the trainer checks
    iterations: int = 6000
    epochs: int = 0
    batch_size: int = 64
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
                valid = isinstance(value, (tuple, list)) and (
                    field.name in self.nested or all(_is_whole(v, 1) for v in value)
                )
            else:
                valid = isinstance(value, kind)
            if not valid:
                raise EbmPriorError(f"{field.name} must not be {value!r}: it takes {TAKES[kind]}")
            if kind is tuple:  # a list where it came as JSON
                object.__setattr__(self, field.name, tuple(value))
        self.require_positive("iterations", "batch_size", "save_every")

    def require_positive(self, *names: str) -> None:
        """Raise `EbmPriorError` if one of these settings is zero."""
        for name in names:
            if not getattr(self, name) > 0:
                raise EbmPriorError(f"{name} must be positive, got {getattr(self, name)}")

    def steps_per_epoch(self, images: int) -> int:
        """Whole batches in a pass over so many images."""
        return max(1, images // min(self.batch_size, images))


def _is_whole(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


C = TypeVar("C", bound=LoopConfig)


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
        raise EbmPriorError(f"unknown {kind.verb} settings: {', '.join(sorted(unknown))}")
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


class Loop(abc.ABC):
    """One run. Randomness is seeded per step, so the step number is its state.

    Args:
        images: Training images, uint8, (N, C, H, W).
        out: Folder of the result and of the state to resume from.
        dataset: Name that the result is to carry.
        config: Settings, complete.
        model: Backbone to train.

    Attributes:
        family: Its family's name.
        state_name: The state's file in `out`.
        shown: Metric beside the progress bar.
    """

    family: str
    state_name: str = STATE
    shown: str = "elbo"

    def __init__(
        self, images: Tensor, out: Path, dataset: str, config: LoopConfig, model: Backbone
    ) -> None:
        self.images, self.out, self.dataset, self.config = images, out, dataset, config
        self.model, self.device = model, model.device
        self.step = 0
        self.saved: int | None = None
        self.order: tuple[int, Tensor] = (-1, torch.empty(0))

    # -- for the trainer to say -----------------------------------------------------------

    @abc.abstractmethod
    def one_step(self) -> dict[str, float] | None:
        """One gradient step; its metrics, or None where it went back to an earlier step."""

    @abc.abstractmethod
    def capture(self) -> State:
        """All that changes but the step number."""

    @abc.abstractmethod
    def restore(self, state: State) -> None:
        """Go back to what `capture` gave."""

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
        """Can files be written? Load the state of the run to continue."""
        state = self.out / self.state_name
        check_writable(state)
        if not resume:
            return
        tensors, values = read_state(state)
        if not isinstance(values, dict) or "description" not in values:
            raise EbmPriorError(f"{state} is not a state that {self.config.verb} wrote")
        description = values.pop("description")
        if description != self.description:
            old, new = json.loads(description), json.loads(self.description)
            changed = sorted(k for k in old.keys() | new.keys() if old.get(k) != new.get(k))
            raise EbmPriorError(
                f"{self.out} was started with other settings ({', '.join(changed)}); resume "
                "with the same ones, or choose another --out"
            )
        try:
            self.step = self.saved = values["step"]
            self.restore((tensors, values))
        except (KeyError, IndexError, ValueError, RuntimeError) as error:
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise EbmPriorError(f"{state} is damaged; start anew with another --out") from error

    def save(self, interrupted: bool = False) -> None:
        """Write the state to resume from, atomically.

        Args:
            interrupted: Whether this is no regular save.
        """
        tensors, values = self.capture()
        values = {"description": self.description, "step": self.step, **values}
        write_state(self.out / self.state_name, tensors, values)
        self.saved = self.step

    # -- steps ----------------------------------------------------------------------------

    def run(self, progress: Progress | None) -> None:
        """All remaining steps.

        Args:
            progress: Called after every step with steps done, steps in all, and the metrics;
                None: a progress bar, on a terminal.

        Raises:
            EbmPriorError: If a step cannot be done.
            Interrupted: On Ctrl-C, after saving.
        """
        total = self.config.iterations
        bar = tqdm(
            total=total,
            initial=self.step,
            desc=self.config.verb,
            disable=None if progress is None else True,
        )
        with bar, CtrlC() as ctrl_c:
            began = time.monotonic()
            while self.step < total:
                metrics = self.one_step()
                if metrics is None:
                    bar.n = self.step
                    continue
                self.step += 1
                if progress is not None:
                    progress(self.step, total, metrics)
                bar.set_postfix({self.shown: f"{metrics[self.shown]:.1f}"}, refresh=False)
                bar.update()
                regular = self.step % self.config.save_every == 0 or self.step == total
                if regular or time.monotonic() - began > SAVE_SECONDS:
                    self.save(interrupted=not regular)
                    began = time.monotonic()
                if ctrl_c.pressed:
                    if self.saved != self.step:
                        self.save(interrupted=True)
                    raise Interrupted(
                        f"interrupted at iteration {self.step} of {total}; the state is saved: "
                        f"run the same command with --resume --out {self.out}"
                    )

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


def state_exists(path: Path) -> bool:
    """Whether there is a state to resume from.

    Raises:
        EbmPriorError: If there is only one of an earlier version, which kept it as a pickle.
    """
    if os.path.exists(path):  # unlike Path.exists, false in a folder that may not be read
        return True
    if os.path.exists(old := path.with_suffix(".pt")):
        raise EbmPriorError(
            f"{old} is of an earlier version of ebm-prior, which alone can resume from it; "
            "start anew with another --out"
        )
    return False


def entries(tensors: Mapping[str, Tensor], of: str) -> dict[str, Tensor]:
    """The tensors whose names begin with `of.`, without it."""
    return {k.removeprefix(f"{of}."): v for k, v in tensors.items() if k.startswith(f"{of}.")}


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Moments and step counts of an optimizer, by the number of their parameter."""
    return {
        f"{i}.{name}": value
        for i, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """Undo every step since `optimizer_tensors`; rates and the like stay as they are."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        i, name = key.split(".")
        parameter = parameters[int(i)]
        if name == "step":
            value = value.clone()
        else:  # on its device and in its layout in memory, as the optimizer made it
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][name] = value


def _parameters(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


def save_torch_file(path: Path, data: Mapping[str, Any] | str) -> None:
    """`torch.save`, atomically."""
    buffer = io.BytesIO()
    torch.save(data, buffer)
    write_bytes(path, buffer.getvalue())
