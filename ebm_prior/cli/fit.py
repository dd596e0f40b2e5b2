"""`ebm-prior fit`: energy heads for a pretrained backbone."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from ebm_prior.cli.options import (
    DataChoice,
    Finite,
    compile_option,
    data_options,
    device_option,
    json_option,
    positive,
    positive_float,
    seed_type,
)
from ebm_prior.errors import EbmPriorError
from ebm_prior.precision import PRECISIONS


def fit_settings(command: Callable) -> Callable:
    """One option per `FitConfig` field a user may want to change."""
    from ebm_prior.fit import FitConfig

    exposed = {
        "objective": (click.Choice(["nce", "mle", "nce+mle"]), "What to optimise."),
        "nce_iterations": (click.IntRange(min=0), "Upper bound of the nce phase."),
        "mle_iterations": (click.IntRange(min=0), "Length of the mle phase."),
        "batch_size": (positive, "Posterior samples, and prior samples, per iteration."),
        "nce_lr": (positive_float, "Learning rate of the nce phase."),
        "mle_lr": (positive_float, "Learning rate of the mle phase."),
        "beta1": (Finite(0, 1, max_open=True), "Adam's first moment decay."),
        "reuse": (positive, "Times each Gaussian-prior sample serves in the nce phase."),
        "weight_decay": (Finite(min=0), "Adam's L2 penalty."),
        "ema": (Finite(0, 1, max_open=True), "Decay of the averaged heads."),
        "regularizer": (Finite(min=0), "Weight of the squared energies."),
        "chains": (click.Choice(["persistent", "fresh"]), "Where mle chains start."),
        "pool": (click.IntRange(min=0), "Persistent chains; 0: two batches."),
        "steps": (positive, "Transitions per mle iteration (K)."),
        "acceptance": (Finite(0, 1, max_open=True), "Target of the step-size tuning."),
        "precision": (click.Choice(PRECISIONS), "Of the backbone's pass inside chains."),
        "draws": (click.IntRange(min=0), "Posterior samples per image; 0: by their number."),
        "cache_gb": (Finite(min=0), "Largest posterior cache on disk, GiB."),
        "save_every": (positive, "Iterations between saves."),
        "log_every": (positive, "Iterations between log lines."),
        "sample_every": (click.IntRange(min=0), "Iterations between sample grids; 0: none."),
        "seed": (seed_type, "Seed of everything random."),
    }
    for name, (kind, text) in reversed(exposed.items()):
        command = click.option(
            f"--{name.replace('_', '-')}",
            name,
            type=kind,
            default=getattr(FitConfig, name),
            show_default=True,
            help=text,
        )(command)
    return command


STEP_SIZES = {"pcnl": 0.3, "langevin": 0.1}
PRESETS = {
    # Table 12 and the authors' public settings for NVAE on CelebA-HQ-256
    "paper": dict(
        objective="mle",
        kind="factorized",
        nef=64,
        ndf=200,
        transition="langevin",
        chains="fresh",
        steps=10,
        step_size=1e-5,
        sample_steps=10,
        batch_size=2,
        mle_lr=2e-5,
        beta1=0.99,
        weight_decay=3e-5,
    ),
}


def apply_preset(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Let a preset fill the options that are not given."""
    if value is not None:
        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[value]}


@click.command()
@click.option("--backbone", help="Backbone family, such as nvae [default: by the checkpoint].")
@click.option("--ckpt", metavar="FILE", help="Pretrained checkpoint, as its own code wrote it.")
@data_options
@click.option("--limit", type=positive, help="Use the first so many images only.")
@click.option("--out", metavar="DIR", help="Run folder [default: runs/<backbone>-<data>-<time>].")
@click.option(
    "--resume",
    metavar="[DIR]",
    is_flag=False,
    flag_value="",
    help="Continue this run [without a value: --out, or the newest unfinished run].",
)
@click.option(
    "--heads",
    "kind",
    type=click.Choice(["factorized", "joint", "both"]),
    default="joint",
    show_default=True,
    help="The paper's one head per group, one on the joint features, or both.",
)
@click.option("--nef", type=positive, default=64, show_default=True, help="Head channels.")
@click.option("--ndf", type=positive, default=200, show_default=True, help="Head linear units.")
@click.option(
    "--transition",
    type=click.Choice(["pcnl", "langevin"]),
    default="pcnl",
    show_default=True,
    help="Metropolis-adjusted step with tuned size, or the paper's Langevin step; "
    "fitted heads can be sampled with others too.",
)
@click.option(
    "--step-size",
    type=positive_float,
    help="Step size; pcnl starts its tuning there [default: 0.3 pcnl, 0.1 langevin].",
)
@click.option(
    "--sample-steps",
    type=positive,
    default=40,
    show_default=True,
    help="Transitions stored with the heads for sampling.",
)
@click.option(
    "--preset",
    type=click.Choice(list(PRESETS)),
    is_eager=True,
    expose_value=False,
    callback=apply_preset,
    help="Fill what is not given with the paper's public settings.",
)
@fit_settings
@compile_option
@device_option
@json_option
@click.pass_context
def fit(
    ctx: click.Context,
    backbone: str | None,
    ckpt: str | None,
    data: DataChoice,
    limit: int | None,
    out: str | None,
    resume: str | None,
    kind: str,
    nef: int,
    ndf: int,
    transition: str,
    step_size: float | None,
    sample_steps: int,
    device: str,
    as_json: bool,
    **settings: Any,
) -> None:
    """Fit energy heads on a frozen backbone.

    \b
    ebm-prior fit --ckpt nvae_cifar.pt
    ebm-prior fit --backbone nvae --ckpt checkpoint.pt --data images.zip --out runs/mine
    ebm-prior fit --resume runs/mine

    The paper's own estimator, heads and settings: --preset paper.
    """
    import torch

    from ebm_prior.fit import FitConfig
    from ebm_prior.fit import fit as fit_heads
    from ebm_prior.prior import EnergyPrior, SamplerConfig
    from ebm_prior.ranks import Ranks
    from ebm_prior.registry import detect_backbone, load_backbone
    from ebm_prior.run import RunFolder

    resuming = resume is not None
    if resuming:
        if resume and out and Path(resume) != Path(out):
            raise click.UsageError(
                f"--resume {resume} continues in its folder, not in --out {out}"
            )
        folder = Path(resume or out or newest_unfinished())
        stored = RunFolder(folder).config()
        training = stored["training"]
        if training["status"] == "finished":
            raise EbmPriorError(f"{folder} is finished; nothing to resume")
        refuse_changes(ctx, folder, stored)
        config = FitConfig.from_dict(training["fit"])
        backbone = stored["backbone"]["name"]
        ckpt = ckpt or stored["backbone"]["path"]
        if "data" in training:  # else it was started from Python, and --data must say
            data = DataChoice(training["data"]["source"], training["data"]["resize"])
            limit = training["data"]["limit"]
        kind, nef, ndf = (stored["heads"][k] for k in ("kind", "nef", "ndf"))
        layers = stored["heads"].get("layers")  # from Python: there is no option
        sampler = SamplerConfig(**stored["sampler"])
    else:
        config, layers = FitConfig(**settings), None
        if ckpt is None:
            raise click.UsageError("Missing option '--ckpt'.")
        backbone = backbone or detect_backbone(ckpt)
        sampler = SamplerConfig(transition, sample_steps, step_size or STEP_SIZES[transition])
    loaded = load_backbone(backbone, ckpt, device)
    if resuming and loaded.sha256 != stored["backbone"]["sha256"]:
        raise EbmPriorError(f"{ckpt} is not the checkpoint that {folder} was started on")
    images = data.open(loaded, "train", limit)
    if not resuming:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(out or f"runs/{backbone}-{Path(images.name).stem}-{stamp}")
        folder = Ranks(loaded.device).agree(folder)  # their clocks may differ
    with torch.random.fork_rng(devices=[]):  # heads are made on the CPU
        torch.manual_seed(config.seed)
        prior = EnergyPrior.for_backbone(loaded, kind, nef, ndf, sampler, layers)
    parameters = sum(p.numel() for p in prior.heads.parameters())
    share = parameters / max(sum(p.numel() for p in loaded.parameters()), 1)
    click.echo(
        f"{backbone}: {len(loaded.groups)} groups, {len(images.images)} images; {kind} heads, "
        f"{parameters} parameters ({share:.1%} of the backbone) -> {folder}",
        err=True,
    )
    source = absolute(data.source(loaded))
    result = fit_heads(
        prior,
        images.images,
        config,
        run_dir=folder,
        resume=resuming,
        record={"data": {"source": source, "resize": data.resize, "limit": limit}},
    )
    if as_json:
        click.echo(json.dumps({"run": str(folder), **asdict(result)}))
        return
    click.echo(
        f"done in {result.seconds:.0f} s, {result.iterations} iterations"
        + (f", held-out loss {result.held_out_loss:.3f}" if result.held_out_loss else "")
        + (f", acceptance {result.acceptance:.2f}" if result.acceptance else "")
        + f", step size {result.step_size:.3g}\nnext: ebm-prior sample --heads {folder} "
        f"--steps {prior.sampler.steps}"
    )


def refuse_changes(ctx: click.Context, folder: Path, stored: dict) -> None:
    """Raise a usage error if an option differs from what the run was started with."""
    from ebm_prior.fit import FitConfig

    training = stored["training"]
    recorded = {
        "backbone": stored["backbone"]["name"],
        **stored["heads"],
        "transition": stored["sampler"]["transition"],
        "step_size": stored["sampler"]["step_size"],
        "sample_steps": stored["sampler"]["steps"],
        **asdict(FitConfig.from_dict(training["fit"])),  # also what an earlier version had not
    }
    if "data" in training:
        recorded |= {
            "data": training["data"]["source"],
            "resize": training["data"]["resize"],
            "limit": training["data"]["limit"],
        }
    for parameter in ctx.command.params:
        name = parameter.name
        given = ctx.get_parameter_source(name) in (
            ParameterSource.COMMANDLINE,
            ParameterSource.DEFAULT_MAP,  # a preset
        )
        if not given or name not in recorded:
            continue
        value = ctx.params[name]
        if (absolute(value) if name == "data" else value) != recorded[name]:
            raise click.UsageError(
                f"{parameter.opts[0]} {value} differs from the {recorded[name]} of {folder}; "
                "a resumed run keeps its settings"
            )


def absolute(source: str) -> str:
    """A data set's name as it is, a path in full."""
    from ebm_prior.data import split_classes

    path, _ = split_classes(source)
    return str(Path(source).absolute()) if Path(path).exists() else source


def newest_unfinished() -> Path:
    """The most recently changed run under runs/ that can be resumed."""
    from ebm_prior.run import newest_run

    return newest_run(statuses=("running",), made_by="fit")
