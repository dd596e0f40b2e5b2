"""`ebm-prior chains`: long chains of the energy prior."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ebm_prior.cli.options import (
    ChainChoice,
    DataChoice,
    HeadsChoice,
    data_options,
    gathered,
    heads_options,
    json_option,
    positive_float,
    record_option,
    sampling_options,
    seed_type,
)
from ebm_prior.errors import EbmPriorError
from ebm_prior.transitions import TRANSITIONS

if TYPE_CHECKING:
    from torch import Tensor

    from ebm_prior.backbone import Backbone
    from ebm_prior.prior import EnergyPrior, SamplerConfig

IMAGES, PROFILE, LATENTS = "chains.png", "chains-energy.png", "chains-latents.png"
MAX_AT = 40  # a row of images and of a table for each, with every transition
CAPTIONS = {
    IMAGES: "The same chains along their way: each column is one.",
    PROFILE: "Energy along the chains: median and 5-95 % band.",
    LATENTS: "Groups of two units: posterior of held-out images, and chains along their way.",
}


@click.command()
@heads_options
@gathered(
    "chain",
    ChainChoice,
    click.option(
        "--steps",
        type=click.IntRange(min=16),
        default=2500,
        show_default=True,
        help="Transitions of each chain.",
    ),
    click.option(
        "--step-size",
        type=positive_float,
        help="Step size [default: stored with the heads; tuned for another transition].",
    ),
    click.option(
        "--transition",
        type=click.Choice([*TRANSITIONS, "all"]),
        help="One of them, or all side by side with tuned step sizes [default: stored].",
    ),
    *sampling_options,
)
@data_options
@click.option(
    "-n",
    "--number",
    "n",
    type=click.IntRange(min=2),
    default=64,
    show_default=True,
    help="Chains.",
)
@click.option(
    "--seed", type=seed_type, default=0, show_default=True, help="Chain i uses seed + i."
)
@click.option(
    "--at",
    metavar="STEPS",
    help="Steps to look at [default: 0,40,100,500,2500 and the last].",
)
@click.option(
    "--features",
    metavar="NAME|FILE",
    help="inception, mnist, digits or a trained classifier [default: by image size].",
)
@click.option("--out", metavar="DIR", help="Folder of the pictures [default: in the run].")
@record_option
@json_option
def chains(
    heads: HeadsChoice,
    chain: ChainChoice,
    data: DataChoice,
    n: int,
    seed: int,
    at: str | None,
    features: str | None,
    out: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Run long chains: energy, images on the way, saturation, mixing (Fig. 8).

    Chains are judged once settled, after 100 steps. Where a group of the backbone has two
    units, its latents are drawn too (Fig. 2). Held-out images give two distances at each
    step of --at: the images' Fréchet distance, and the latents' energy distance to their
    aggregate posterior, with a p-value.

    \b
    ebm-prior chains --heads runs/mine
    ebm-prior chains --heads runs/mine --transition all --steps 500 -n 32
    ebm-prior chains --heads runs/mine -n 1000 --at 40,100,500,2500 --data cifar10
    """
    from ebm_prior.chain_pictures import (
        energy_figure,
        latents_figure,
        posterior_latents,
        way_picture,
    )
    from ebm_prior.chain_study import study
    from ebm_prior.files import check_writable, write_bytes
    from ebm_prior.images import png_bytes
    from ebm_prior.metrics import load_features
    from ebm_prior.plots import png
    from ebm_prior.record import Picture
    from ebm_prior.record import record as store

    heads.check_record(record)
    if chain.transition == "all" and chain.step_size is not None:
        raise click.UsageError("--transition all tunes a step size for each; leave --step-size")
    steps = parse_at(at, chain.steps)
    prior, folder, config = heads.open()
    if out is None:
        out = folder / "samples" if heads.local and (folder / "samples").is_dir() else "."
    check_writable(Path(out) / IMAGES)
    reference = held_out(data, config, prior.backbone)
    network = None
    if reference is not None:
        network = load_features(features, prior.backbone.image_shape, device=prior.backbone.device)
    chain.readjust(prior.backbone)
    result = study(
        prior,
        range(seed, seed + n),
        samplers(prior, chain),
        at=steps,
        reference=reference,
        network=network,
        temperature=chain.temperature,
        batch_size=chain.batch_size,
    )
    pictures = {
        IMAGES: png_bytes(way_picture(result, reference)),
        PROFILE: png(energy_figure(result)),
    }
    posterior = None if reference is None else posterior_latents(prior, reference)
    if (figure := latents_figure(result, posterior)) is not None:
        pictures[LATENTS] = png(figure)
    found = result.to_dict() | {"seed": seed, "temperature": chain.temperature}
    # shown first: it must not be lost to a full disk
    paths = [str(Path(out) / name) for name in pictures]
    click.echo(json.dumps(found | {"pictures": paths}) if as_json else result.table())
    for name, content in pictures.items():
        write_bytes(Path(out) / name, content)
    if record:
        shown = {name: Picture(content, CAPTIONS[name]) for name, content in pictures.items()}
        store(folder, "chains", found, result.tables(), shown)
    if not as_json:
        click.echo(f"pictures -> {', '.join(pictures)} in {out}")


def parse_at(text: str | None, last: int) -> list[int]:
    """Steps to look at, in order; those of the paper and the last by default."""
    from ebm_prior.chain_study import AT

    if text is None:
        return sorted({step for step in AT if step < last} | {last})
    try:
        steps = sorted({int(part) for part in text.split(",")})
    except ValueError:
        raise click.UsageError(f"--at {text!r}: expected steps such as 0,40,2500") from None
    if len(steps) > MAX_AT:
        raise click.UsageError(
            f"--at: {len(steps)} steps to look at are too many; at most {MAX_AT}"
        )
    if steps[0] < 0 or steps[-1] > last:
        raise click.UsageError(f"--at {text}: the chains have {last} steps, from 0")
    return steps


def samplers(prior: EnergyPrior, chain: ChainChoice) -> list[SamplerConfig]:
    """The chosen transition with its given, stored or tuned step size, or all of them tuned."""
    from ebm_prior.tuning import tuned

    stored = prior.sampler.transition
    if chain.transition == "all":
        names = list(TRANSITIONS)
    elif chain.step_size is not None or chain.transition in (None, stored):
        return [chain.config(prior)]
    else:
        names = [chain.transition]
    return [tuned(prior, name, chain.steps, temperature=chain.temperature) for name in names]


def held_out(data: DataChoice, config: dict, backbone: Backbone) -> Tensor | None:
    """Test images: those asked for, or if they can be had those of the heads."""
    try:
        return data.or_recorded(config).open(backbone, "test").images
    except EbmPriorError as error:
        if data.data is not None:
            raise
        click.echo(f"no held-out images, hence no distance to them: {error}", err=True)
        return None
