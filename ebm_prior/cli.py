"""The `ebm-prior` command: parsing and printing over the public functions."""

from __future__ import annotations

import json
import re
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click
from click.core import ParameterSource

from ebm_prior._version import __version__
from ebm_prior.cpu import keep_freed_memory
from ebm_prior.errors import EbmPriorError

if TYPE_CHECKING:
    from ebm_prior.data import ImageSet
    from ebm_prior.prior import EnergyPrior, SamplerConfig

__all__ = ["main"]


class Cli(click.Group):
    """A group whose every failure is one line, `Error: ...`, and an exit code.

    0 done, 2 wrong usage, 1 anything else; a traceback only with `--debug`.
    """

    def main(  # noqa: D102
        self,
        args: Any = None,
        standalone_mode: bool = True,
        **extra: Any,
    ) -> Any:
        if not standalone_mode:
            return super().main(args, standalone_mode=False, **extra)
        keep_freed_memory()
        debug = "--debug" in (sys.argv if args is None else args)
        try:
            code = super().main(args, standalone_mode=False, **extra)
            sys.exit(code if isinstance(code, int) else 0)
        except click.ClickException as error:
            message, code = error.format_message(), error.exit_code
            if isinstance(error, click.UsageError) and error.ctx is not None:
                message += f" (see {error.ctx.command_path} --help)"
        except (click.Abort, KeyboardInterrupt):
            message, code = "interrupted", 1
        except EbmPriorError as error:
            if debug:
                raise
            message, code = str(error), 1
        except OSError as error:
            if debug:
                raise
            message, code = f"{error.strerror or error}: {error.filename or ''}".rstrip(": "), 1
        except Exception as error:
            if debug:
                raise
            text = str(error).strip().splitlines()
            message = (
                f"unexpected {type(error).__name__}: {text[0] if text else ''}; "
                "run again with --debug for the traceback"
            )
            code = 1
        click.echo(f"Error: {' '.join(message.split())}", err=True)
        sys.exit(code)


@click.group(cls=Cli, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="ebm-prior")
@click.option("--debug", is_flag=True, help="Show a traceback on errors.")
def main(debug: bool) -> None:
    """Energy priors for pretrained hierarchical VAEs.

    \b
    ebm-prior fit --backbone nvae --ckpt nvae_cifar.pt
    ebm-prior sample --steps 40
    """


# -- options shared by several commands ---------------------------------------------------


def options(*decorators: Callable) -> Callable:
    """One decorator out of several."""

    def apply(command: Callable) -> Callable:
        for decorator in reversed(decorators):
            command = decorator(command)
        return command

    return apply


positive = click.IntRange(min=1)
positive_float = click.FloatRange(min=0, min_open=True)
device_option = click.option(
    "--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1, mps."
)
json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
heads_options = options(
    click.option(
        "--heads",
        "source",
        metavar="SOURCE",
        help="Run folder, saved folder or Hub id [default: newest finished run under runs/].",
    ),
    click.option("--backbone", help="Backbone family [default: what the heads say]."),
    click.option(
        "--ckpt", metavar="FILE", help="Backbone checkpoint [default: where the run found it]."
    ),
    click.option(
        "--any-backbone",
        is_flag=True,
        help="Accept a checkpoint other than the one the heads were fitted on.",
    ),
    device_option,
)
chain_options = options(
    click.option("--steps", type=positive, help="Transitions [default: stored with the heads]."),
    click.option(
        "--step-size", type=positive_float, help="Step size [default: stored with the heads]."
    ),
    click.option(
        "--transition",
        type=click.Choice(["langevin", "pcnl"]),
        help="The paper's step, or the Metropolis-adjusted one [default: stored].",
    ),
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
data_options = options(
    click.option(
        "--data",
        metavar="DATA",
        help="Data set name, or image folder, zip, .npz or LMDB [default: as the backbone].",
    ),
    click.option("--resize", is_flag=True, help="Resize, crop or convert images that do not fit."),
)


def open_prior(
    source: str | None, backbone: str | None, ckpt: str | None, any_backbone: bool, device: str
) -> tuple[EnergyPrior, Path, dict]:
    """Load heads and the backbone they name; also their folder and configuration."""
    from ebm_prior import hub
    from ebm_prior.prior import EnergyPrior
    from ebm_prior.registry import load_backbone
    from ebm_prior.run import newest_run

    folder = hub.resolve(source if source is not None else newest_run())
    config = hub.read_config(folder)
    if source is not None and not Path(source).is_dir():
        # From the Hub: a stranger does not choose which local files are read.
        config = {**config, "training": {}, "backbone": {**config["backbone"], "path": None}}
    ckpt = ckpt or config["backbone"].get("path")
    if not ckpt:
        raise EbmPriorError(
            f"{source} does not say where its backbone is; give the checkpoint with --ckpt"
        )
    loaded = load_backbone(backbone or config["backbone"]["name"], ckpt, device)
    prior = EnergyPrior.from_pretrained(folder, backbone=loaded, check_backbone=not any_backbone)
    return prior, folder, config


def open_images(
    data: str | None,
    backbone: Any,
    split: str,
    resize: bool,
    limit: int | None = None,
) -> ImageSet:
    """Images of the named source, or of the data set the backbone was trained on."""
    from ebm_prior.data import load_images

    data = data or backbone.dataset
    if not data or (data == backbone.dataset and not re.fullmatch(r"[\w-]+", data)):
        # only a name: a checkpoint does not choose which local files are read
        raise EbmPriorError("the checkpoint does not name its data set; give one with --data")
    return load_images(data, split=split, shape=backbone.image_shape, resize=resize, limit=limit)


def chain_config(
    prior: EnergyPrior, steps: int | None, step_size: float | None, transition: str | None
) -> SamplerConfig:
    """Stored sampler settings with the given ones in their place."""
    from ebm_prior.prior import SamplerConfig

    stored = prior.sampler
    if transition not in (None, stored.transition) and step_size is None:
        raise click.UsageError(
            f"the stored step size belongs to {stored.transition}; give --step-size too"
        )
    return SamplerConfig(
        transition or stored.transition, steps or stored.steps, step_size or stored.step_size
    )


def readjust(backbone: Any, temperature: float, wanted: bool) -> None:
    """Adjust batch-norm statistics where asked for and possible."""
    if not wanted:
        return
    if not hasattr(backbone, "readjust_batchnorm"):
        raise click.UsageError(f"--readjust-bn: {backbone.name} has no batch-norm statistics")
    import torch

    backbone.readjust_batchnorm(temperature, generator=torch.Generator().manual_seed(0))


# -- fit ----------------------------------------------------------------------------------


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
        "reuse": (positive, "Times each Gaussian-prior sample serves in the nce phase."),
        "weight_decay": (click.FloatRange(min=0), "Adam's L2 penalty."),
        "ema": (click.FloatRange(0, 1, max_open=True), "Decay of the averaged heads."),
        "regularizer": (click.FloatRange(min=0), "Weight of the squared energies."),
        "chains": (click.Choice(["persistent", "fresh"]), "Where mle chains start."),
        "pool": (click.IntRange(min=0), "Persistent chains; 0: two batches."),
        "steps": (positive, "Transitions per mle iteration (K)."),
        "acceptance": (click.FloatRange(0, 1, max_open=True), "Target of the step-size tuning."),
        "draws": (click.IntRange(min=0), "Posterior samples per image; 0: by their number."),
        "cache_gb": (click.FloatRange(min=0), "Largest posterior cache on disk, GiB."),
        "save_every": (positive, "Iterations between saves."),
        "log_every": (positive, "Iterations between log lines."),
        "sample_every": (click.IntRange(min=0), "Iterations between sample grids; 0: none."),
        "seed": (click.IntRange(min=0), "Seed of everything random."),
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
        weight_decay=3e-5,
    ),
}


def apply_preset(ctx: click.Context, _: click.Parameter, value: str | None) -> None:
    """Let a preset fill the options that are not given."""
    if value is not None:
        ctx.default_map = {**(ctx.default_map or {}), **PRESETS[value]}


@main.command()
@click.option("--backbone", help="Backbone family, such as nvae.")
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
    help="Metropolis-adjusted step with tuned size, or the paper's Langevin step.",
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
@device_option
@json_option
@click.pass_context
def fit(
    ctx: click.Context,
    backbone: str | None,
    ckpt: str | None,
    data: str | None,
    resize: bool,
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
    ebm-prior fit --backbone nvae --ckpt nvae_cifar.pt
    ebm-prior fit --backbone nvae --ckpt checkpoint.pt --data images.zip --out runs/mine
    ebm-prior fit --resume runs/mine

    The paper's own estimator, heads and settings: --preset paper.
    """
    import torch

    from ebm_prior.fit import FitConfig
    from ebm_prior.fit import fit as fit_heads
    from ebm_prior.prior import EnergyPrior, SamplerConfig
    from ebm_prior.registry import load_backbone
    from ebm_prior.run import RunFolder

    resuming = resume is not None
    if resuming:
        folder = Path(resume or out or newest_unfinished())
        stored = RunFolder(folder).config()
        training = stored["training"]
        if training["status"] == "finished":
            raise EbmPriorError(f"{folder} is finished; nothing to resume")
        for name in settings:
            given = ctx.get_parameter_source(name) == ParameterSource.COMMANDLINE
            if given and settings[name] != training["fit"][name]:
                raise click.UsageError(
                    f"--{name.replace('_', '-')} {settings[name]} differs from the run's "
                    f"{training['fit'][name]}; a resumed run keeps its settings"
                )
        config = FitConfig.from_dict(training["fit"])
        backbone = stored["backbone"]["name"]
        ckpt = ckpt or stored["backbone"]["path"]
        data, resize, limit = (training["data"][k] for k in ("source", "resize", "limit"))
        kind, nef, ndf = (stored["heads"][k] for k in ("kind", "nef", "ndf"))
        sampler = SamplerConfig(**stored["sampler"])
    else:
        config = FitConfig(**settings)
        if ckpt is None:
            raise click.UsageError("Missing option '--ckpt'.")
        if backbone is None:
            raise click.UsageError("Missing option '--backbone'.")
        default_size = 0.3 if transition == "pcnl" else 0.1
        sampler = SamplerConfig(transition, sample_steps, step_size or default_size)
    loaded = load_backbone(backbone, ckpt, device)
    if resuming and loaded.sha256 != stored["backbone"]["sha256"]:
        raise EbmPriorError(f"{ckpt} is not the checkpoint that {folder} was started on")
    images = open_images(data, loaded, "train", resize, limit)
    if not resuming:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        folder = Path(out or f"runs/{backbone}-{Path(images.name).stem}-{stamp}")
    with torch.random.fork_rng():
        torch.manual_seed(config.seed)
        prior = EnergyPrior.for_backbone(loaded, kind, nef, ndf, sampler)
    parameters = sum(p.numel() for p in prior.heads.parameters())
    share = parameters / max(sum(p.numel() for p in loaded.parameters()), 1)
    click.echo(
        f"{backbone}: {len(loaded.groups)} groups, {len(images.images)} images; {kind} heads, "
        f"{parameters} parameters ({share:.1%} of the backbone) -> {folder}",
        err=True,
    )
    source = data or loaded.dataset
    if source is not None and Path(source).exists():
        source = str(Path(source).absolute())
    result = fit_heads(
        prior,
        images.images,
        config,
        run_dir=folder,
        resume=resuming,
        record={"data": {"source": source, "resize": resize, "limit": limit}},
    )
    if as_json:
        from dataclasses import asdict

        click.echo(json.dumps({"run": str(folder), **asdict(result)}))
        return
    click.echo(
        f"done in {result.seconds:.0f} s, {result.iterations} iterations"
        + (f", held-out loss {result.held_out_loss:.3f}" if result.held_out_loss else "")
        + (f", acceptance {result.acceptance:.2f}" if result.acceptance else "")
        + f", step size {result.step_size:.3g}\nnext: ebm-prior sample --heads {folder} "
        f"--steps {prior.sampler.steps}"
    )


def newest_unfinished() -> Path:
    """The most recently changed run under runs/ that can be resumed."""
    from ebm_prior.run import newest_run

    return newest_run(statuses=("running",))


# -- sample -------------------------------------------------------------------------------


@main.command()
@heads_options
@chain_options
@click.option("-n", "--number", "n", type=positive, default=64, show_default=True)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Image i uses seed + i.",
)
@click.option(
    "--seeds",
    metavar="LIST",
    help="Seeds such as 0-49999 or 1,5,10-12, in place of -n and --seed.",
)
@click.option(
    "--out",
    metavar="PATH",
    help="A .png grid, a folder or .zip of PNGs, or .npz [default: a grid in the run].",
)
@click.option(
    "--compare",
    is_flag=True,
    help="Also the Gaussian prior's images from the same "
    "noise: beside the grid, or in a second output.",
)
@click.option("--trajectory", metavar="PNG", help="Also write the transition strip of 8 chains.")
def sample(
    source: str | None,
    backbone: str | None,
    ckpt: str | None,
    any_backbone: bool,
    device: str,
    steps: int | None,
    step_size: float | None,
    transition: str | None,
    temperature: float,
    readjust_bn: bool,
    batch_size: int,
    n: int,
    seed: int,
    seeds: str | None,
    out: str | None,
    compare: bool,
    trajectory: str | None,
) -> None:
    """Draw images from the energy prior.

    \b
    ebm-prior sample --steps 40
    ebm-prior sample --heads runs/mine -n 50000 --out samples.zip
    ebm-prior sample --seeds 0-15 --compare --trajectory strip.png
    """
    from contextlib import ExitStack

    import torch

    from ebm_prior.files import check_writable
    from ebm_prior.images import ImageWriter, labelled_rows, save_png, to_uint8
    from ebm_prior.sampling import parse_seeds, seeded_batches

    seed_list = parse_seeds(seeds) if seeds is not None else list(range(seed, seed + n))
    prior, folder, _ = open_prior(source, backbone, ckpt, any_backbone, device)
    config = chain_config(prior, steps, step_size, transition)
    readjust(prior.backbone, temperature, readjust_bn)
    if out is None:
        samples = folder / "samples" if (folder / "samples").is_dir() else Path()
        out = str(samples / f"steps{config.steps}-seed{seed_list[0]}.png")
    path = Path(out)
    beside = compare and path.suffix == ".png"  # both in one picture
    for picture in ([path] if beside else []) + ([Path(trajectory)] if trajectory else []):
        check_writable(picture)
    before, after = [], []
    strip = Strip(prior, config.steps, temperature) if trajectory else None
    with ExitStack() as stack:
        writers = []
        if not beside:
            writers.append(stack.enter_context(ImageWriter(path, len(seed_list), seed_list)))
            if compare:
                second = path.with_name(f"{path.stem}-gaussian{path.suffix}")
                writers.append(stack.enter_context(ImageWriter(second, len(seed_list), seed_list)))
        for batch in seeded_batches(
            prior,
            seed_list,
            config,
            batch_size=batch_size,
            temperature=temperature,
            callback=strip,
        ):
            if strip is not None:
                strip.close(batch.start)
            images = to_uint8(prior.images(batch.end, temperature))
            gaussian = to_uint8(prior.images(batch.start, temperature)) if compare else None
            if beside:
                before.append(gaussian)
                after.append(images)
            else:
                for writer, pictures in zip(writers, (images, gaussian), strict=False):
                    writer.add(pictures)
    if beside:
        rows = [
            ("Gaussian prior", torch.cat(before)),
            (f"energy prior, {config.steps} steps", torch.cat(after)),
        ]
        save_png(path, labelled_rows(rows, columns=min(len(seed_list), 16)))
    if strip is not None:
        save_png(Path(trajectory), strip.picture())
        click.echo(f"transition strip -> {trajectory}")
    click.echo(f"{len(seed_list)} images -> {path}")


class Strip:
    """Collects the transition strip (Fig. 5): the first chains along their way."""

    chains, columns = 8, 9

    def __init__(self, prior: EnergyPrior, steps: int, temperature: float) -> None:
        self.prior, self.temperature = prior, temperature
        shown = min(self.columns, steps)
        self.at = {round(steps * (i + 1) / shown) for i in range(shown)}
        self.rows: dict[int, Any] = {}
        self.closed = False

    def __call__(self, info: Any) -> None:
        """Take a picture at the chosen steps of the first batch."""
        if not self.closed and info.step in self.at:
            self.rows[info.step] = self.images(info.eps)

    def close(self, start: Any) -> None:
        """Add the start, once the first batch is done."""
        if not self.closed:
            self.rows = {0: self.images(start), **self.rows}
            self.closed = True

    def images(self, eps: Any) -> Any:
        """Pictures of the first chains."""
        return self.prior.images([e[: self.chains] for e in eps], self.temperature)

    def picture(self) -> Any:
        """One labelled row per recorded step."""
        from ebm_prior.images import labelled_rows, to_uint8

        return labelled_rows([(f"step {k}", to_uint8(x)) for k, x in self.rows.items()])


# -- evaluate -----------------------------------------------------------------------------


@main.command()
@heads_options
@chain_options
@data_options
@click.option(
    "-n",
    "--number",
    "n",
    type=click.IntRange(min=2),
    default=10_000,
    show_default=True,
    help="Samples of each prior.",
)
@click.option(
    "--seed",
    type=click.IntRange(min=0),
    default=0,
    show_default=True,
    help="Sample i uses seed + i.",
)
@click.option(
    "--features",
    metavar="NAME|FILE",
    help="inception, mnist, digits or a trained classifier [default: by image size].",
)
@click.option(
    "--inception-weights",
    metavar="FILE",
    type=click.Path(),
    help="pytorch-fid's weights file, in place of its download.",
)
@json_option
def evaluate(
    source: str | None,
    backbone: str | None,
    ckpt: str | None,
    any_backbone: bool,
    device: str,
    steps: int | None,
    step_size: float | None,
    transition: str | None,
    temperature: float,
    readjust_bn: bool,
    batch_size: int,
    data: str | None,
    resize: bool,
    n: int,
    seed: int,
    features: str | None,
    inception_weights: str | None,
    as_json: bool,
) -> None:
    """Compare Gaussian prior, energy prior and reconstructions with held-out images.

    \b
    ebm-prior evaluate
    ebm-prior evaluate --heads runs/mine --data cifar10 -n 50000 --json
    """
    from ebm_prior.evaluate import evaluate as measure
    from ebm_prior.metrics import load_features

    prior, _, config = open_prior(source, backbone, ckpt, any_backbone, device)
    chain = chain_config(prior, steps, step_size, transition)
    network = load_features(
        features, prior.backbone.image_shape, inception_weights=inception_weights, device=device
    )
    recorded = config.get("training", {}).get("data", {})
    data, resize = data or recorded.get("source"), resize or recorded.get("resize", False)
    train = open_images(data, prior.backbone, "train", resize)
    reference = open_images(data, prior.backbone, "test", resize)
    readjust(prior.backbone, temperature, readjust_bn)
    result = measure(
        prior,
        reference.images,
        train.images,
        network,
        n=n,
        config=chain,
        temperature=temperature,
        seed=seed,
        batch_size=batch_size,
    )
    click.echo(json.dumps(result.to_dict()) if as_json else result.table())


# -- pretrain -----------------------------------------------------------------------------


@main.command()
@click.option("--backbone", required=True, help="Backbone family, such as nvae.")
@click.option("--data", required=True, metavar="DATA", help="Data set name or path.")
@click.option("--out", required=True, metavar="DIR", help="Folder for checkpoint.pt.")
@click.option("--resume", is_flag=True, help="Continue an interrupted training in --out.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the family's trainer, such as epochs=20; repeatable.",
)
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True)
@device_option
def pretrain(
    backbone: str,
    data: str,
    out: str,
    resume: bool,
    settings: tuple[str, ...],
    seed: int,
    device: str,
) -> None:
    """Train a small backbone by its ELBO (stage one), in its family's public format.

    \b
    ebm-prior pretrain --backbone nvae --data mnist --out checkpoints/mine
    """
    from ebm_prior.data import load_images
    from ebm_prior.registry import check_device, find_trainer

    trainer = find_trainer(backbone)
    images = load_images(data, split="train")
    values = dict(parse_setting(text) for text in settings)
    path = trainer(
        images.images,
        out=Path(out),
        dataset=images.name,
        resume=resume,
        seed=seed,
        device=check_device(device),
        **values,
    )
    click.echo(f"checkpoint -> {path}\nnext: ebm-prior fit --backbone {backbone} --ckpt {path}")


def parse_setting(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON where it is JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text!r}: expected NAME=VALUE")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
