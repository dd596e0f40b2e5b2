"""Options that several verbs share, gathered into one argument each."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ebm_prior.errors import EbmPriorError
from ebm_prior.precision import PRECISIONS
from ebm_prior.transitions import TRANSITIONS

if TYPE_CHECKING:
    from ebm_prior.backbone import Backbone
    from ebm_prior.data import ImageSet
    from ebm_prior.prior import EnergyPrior, SamplerConfig


class Finite(click.FloatRange):
    """A float range without inf and nan, which compares false with every bound."""

    def convert(  # noqa: D102
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> float:
        number = super().convert(value, param, ctx)
        if not math.isfinite(number):
            self.fail(f"{value} is no finite number.", param, ctx)
        return number


positive = click.IntRange(min=1)
positive_float = Finite(min=0, min_open=True)
seed_type = click.IntRange(0, 2**62)  # seed + i must still be a seed of torch's
device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps."
)
precision_option = click.option(
    "--precision",
    type=click.Choice(PRECISIONS),
    default="fp32",
    show_default=True,
    help="Of the backbone's pass inside chains; bf16 is inexact, and faster on recent processors. "
    "On a GPU torch rounds convolutions in fp32 to TF32.",
)
compile_option = click.option(
    "--compile",
    "compiled",
    is_flag=True,
    help="Compile the gradient that chains follow, for CUDA: on a CPU it takes a minute or two "
    "and is then no faster. Where it fails, chains run as without it.",
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
record_option = click.option(
    "--record",
    is_flag=True,
    help="Store the result with the heads, for the report and the model card.",
)


def gathered(name: str, kind: type, *options: Callable) -> Callable:
    """Decorator: these options, one per field of a dataclass, become one argument."""

    def decorate(command: Callable) -> Callable:
        @functools.wraps(command)  # hands on the options that are already attached
        def gather(*args: Any, **values: Any) -> Any:
            values[name] = kind(**{field.name: values.pop(field.name) for field in fields(kind)})
            return command(*args, **values)

        for option in reversed(options):
            gather = option(gather)
        return gather

    return decorate


@dataclass(frozen=True)
class HeadsChoice:
    """Which heads on which backbone, on which device."""

    source: str | None
    backbone: str | None
    ckpt: str | None
    any_backbone: bool
    device: str

    @property
    def local(self) -> bool:
        """Whether the heads are in a folder of the user's, not in the Hub's cache."""
        return self.source is None or Path(self.source).is_dir()

    def check_record(self, record: bool) -> None:
        """Refuse `--record` where there is no folder of the user's that can be written to."""
        if not record:
            return
        if not self.local:
            raise click.UsageError("--record needs heads in a local folder: pull them with --out")
        from ebm_prior.files import check_writable
        from ebm_prior.run import newest_run
        from ebm_prior.saved import CONFIG

        check_writable((newest_run() if self.source is None else Path(self.source)) / CONFIG)

    def open(self) -> tuple[EnergyPrior, Path, dict]:
        """Load the heads and the backbone they name; also their folder and configuration."""
        from ebm_prior import hub
        from ebm_prior.prior import EnergyPrior
        from ebm_prior.registry import load_backbone
        from ebm_prior.run import newest_run

        source = hub.open_source(self.source if self.source is not None else newest_run())
        family = self.backbone or source.config["backbone"]["name"]
        backbone = load_backbone(family, source.checkpoint(self.ckpt), self.device)
        prior = EnergyPrior.from_pretrained(
            source, backbone=backbone, check_backbone=not self.any_backbone
        )
        return prior, source.folder, source.config


heads_options = gathered(
    "heads",
    HeadsChoice,
    click.option(
        "--heads",
        "source",
        metavar="SOURCE",
        help="Run folder, saved folder or Hub id [default: newest finished run under runs/].",
    ),
    click.option("--backbone", help="Backbone family [default: what the heads say]."),
    click.option(
        "--ckpt", metavar="PATH", help="Backbone checkpoint [default: where the run found it]."
    ),
    click.option(
        "--any-backbone",
        is_flag=True,
        help="Accept a checkpoint other than the one the heads were fitted on.",
    ),
    device_option,
)


@dataclass(frozen=True)
class SamplerChoice:
    """Which transition, how often and how far."""

    steps: int | None
    step_size: float | None
    transition: str | None

    def config(self, prior: EnergyPrior) -> SamplerConfig:
        """The settings stored with the heads, with the given ones in their place."""
        from ebm_prior.prior import SamplerConfig

        stored = prior.sampler
        other = self.transition not in (None, stored.transition)
        if other and self.step_size is None and TRANSITIONS[self.transition].sized:
            raise click.UsageError(
                f"the stored step size belongs to {stored.transition}; give --step-size too"
            )
        return SamplerConfig(
            self.transition or stored.transition,
            self.steps or stored.steps,
            self.step_size or stored.step_size,
        )


@dataclass(frozen=True)
class ChainChoice(SamplerChoice):
    """How to run the chains."""

    temperature: float
    readjust_bn: bool
    batch_size: int

    def readjust(self, backbone: Backbone) -> None:
        """Adjust batch-norm statistics where asked for and possible."""
        if not self.readjust_bn:
            return
        if not hasattr(backbone, "readjust_batchnorm"):
            raise click.UsageError(f"--readjust-bn: {backbone.name} has no batch-norm statistics")
        import torch

        backbone.readjust_batchnorm(self.temperature, generator=torch.Generator().manual_seed(0))


SAMPLER = (
    click.option("--steps", type=positive, help="Transitions [default: stored with the heads]."),
    click.option(
        "--step-size", type=positive_float, help="Step size [default: stored with the heads]."
    ),
    click.option(
        "--transition",
        type=click.Choice(list(TRANSITIONS)),
        help="The paper's step, one that is Metropolis-adjusted, or sir, importance resampling "
        "[default: stored].",
    ),
)
sampling_options = (
    click.option(
        "--temperature",
        type=positive_float,
        default=1.0,
        show_default=True,
        help="Multiplies every prior sigma.",
    ),
    click.option(
        "--readjust-bn",
        is_flag=True,
        help="Recompute batch-norm statistics at this temperature (NVAE).",
    ),
    click.option(
        "--batch-size", type=positive, default=100, show_default=True, help="Chains at a time."
    ),
)
sampler_options = gathered("sampler", SamplerChoice, *SAMPLER)
chain_options = gathered(
    "chain",
    ChainChoice,
    *SAMPLER,
    *sampling_options,
)


@dataclass(frozen=True)
class DataChoice:
    """Which images."""

    data: str | None
    resize: bool

    def open(self, backbone: Backbone, split: str, limit: int | None = None) -> ImageSet:
        """Images of the named source, or of the data set the backbone was trained on."""
        from ebm_prior.data import load_images

        return load_images(
            self.source(backbone),
            split=split,
            shape=backbone.image_shape,
            resize=self.resize,
            limit=limit,
        )

    def or_recorded(self, config: dict) -> DataChoice:
        """This choice, or where there is none, the images that the heads were fitted on."""
        recorded = config.get("training", {}).get("data", {})
        return DataChoice(
            self.data or recorded.get("source"), self.resize or recorded.get("resize", False)
        )

    def source(self, backbone: Backbone) -> str:
        """Name or path of the images."""
        if self.data:
            return self.data
        # only a name: a checkpoint does not choose which local files are read
        if not backbone.dataset or not re.fullmatch(r"[\w-]+", backbone.dataset):
            raise EbmPriorError("the checkpoint does not name its data set; give one with --data")
        return backbone.dataset


data_options = gathered(
    "data",
    DataChoice,
    click.option(
        "--data",
        metavar="DATA",
        help="Data set name, or image folder, zip, .npz or LMDB; :0,1 after it keeps these "
        "classes [default: as the backbone].",
    ),
    click.option("--resize", is_flag=True, help="Resize, crop or convert images that do not fit."),
)
