"""`ebm-prior hierarchy`: what each level of latents adds to the picture."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import click

from ebm_prior.cli.options import (
    ChainChoice,
    DataChoice,
    HeadsChoice,
    chain_options,
    data_options,
    heads_options,
    json_option,
    positive,
    seed_type,
)
from ebm_prior.errors import EbmPriorError

if TYPE_CHECKING:
    from torch import Tensor

    from ebm_prior.backbone import Backbone


@click.command()
@click.argument("images", metavar="[IMAGE]...", nargs=-1)
@heads_options
@chain_options
@data_options
@click.option(
    "--keep",
    metavar="ROWS",
    help="Rows separated by commas: how many uppermost groups to hold, or names joined by +, "
    "such as 3,2,0 or z0+z1,z0 [default: from all but the bottom group to none].",
)
@click.option(
    "-n",
    "--number",
    "n",
    type=positive,
    help="Samples to start from, where no images are given [default: 2].",
)
@click.option(
    "--redraws",
    type=click.IntRange(min=2),
    default=7,
    show_default=True,
    help="Draws per image and row.",
)
@click.option(
    "--seed", type=seed_type, default=0, show_default=True, help="Image i uses seed + i."
)
@click.option("--out", metavar="PNG", help="The picture [default: in the run].")
@json_option
def hierarchy(
    images: tuple[str, ...],
    heads: HeadsChoice,
    chain: ChainChoice,
    data: DataChoice,
    keep: str | None,
    n: int | None,
    redraws: int,
    seed: int,
    out: str | None,
    as_json: bool,
) -> None:
    """Hold the upper latent groups and redraw the lower ones, level by level.

    Without images: samples whose lower groups are drawn again. With images: reconstructions
    whose lower groups come from the prior instead of q(z|x). The Gaussian prior is on the
    left, the energy prior on the right. An IMAGE is a file, or the index of a test image.

    \b
    ebm-prior hierarchy --heads runs/mine --keep 3,2,1,0
    ebm-prior hierarchy face.png --resize
    ebm-prior hierarchy 0 7 21 --data cifar10
    """
    from ebm_prior.files import check_writable
    from ebm_prior.hierarchy import explore, levels
    from ebm_prior.images import save_png

    if images and n is not None:
        raise click.UsageError("-n counts samples; with images there is one per image")
    prior, folder, config = heads.open()
    backbone, sampler = prior.backbone, chain.config(prior)
    rows = levels(backbone.groups, keep)
    data = data.or_recorded(config)
    given = load(images, data, backbone) if images else None
    if out is None:
        samples = folder / "samples" if (folder / "samples").is_dir() else Path()
        out = str(samples / f"{'reconstruction' if images else 'hierarchy'}-seed{seed}.png")
    if Path(out).suffix.lower() != ".png":
        raise EbmPriorError(f"cannot write {out}: the picture goes to a .png")
    check_writable(out)
    chain.readjust(backbone)
    result = explore(
        prior,
        range(seed, seed + (len(images) or n or 2)),
        given,
        keep=rows,
        redraws=redraws,
        config=sampler,
        temperature=chain.temperature,
        batch_size=chain.batch_size,
    )
    save_png(out, result.picture())
    if as_json:
        found = [level.to_dict() for level in result.levels]
        click.echo(json.dumps({"picture": out, "redraws": redraws, "levels": found}))
    else:
        click.echo(f"{result.table().text()}\npicture -> {out}")


def load(images: tuple[str, ...], data: DataChoice, backbone: Backbone) -> Tensor:
    """Image files, or the test images at these indices, as (N, C, H, W), uint8."""
    from ebm_prior.data import load_files

    numbers = [text for text in images if text.isdecimal() and not Path(text).exists()]
    if not numbers:
        return load_files(images, backbone.image_shape, resize=data.resize)
    if len(numbers) < len(images):
        raise click.UsageError("give either image files or indices of test images")
    found = data.open(backbone, "test")
    if (last := max(map(int, numbers))) >= len(found):
        raise EbmPriorError(f"no test image {last}: {found.name} has {len(found)}, from 0")
    return found.images[[int(text) for text in numbers]]
