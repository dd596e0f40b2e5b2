"""`ebm-prior sample`: images of the energy prior."""

from __future__ import annotations

from pathlib import Path

import click

from ebm_prior.cli.options import (
    ChainChoice,
    HeadsChoice,
    chain_options,
    compile_option,
    heads_options,
    positive,
    precision_option,
    seed_type,
)


@click.command()
@heads_options
@chain_options
@precision_option
@compile_option
@click.option("-n", "--number", "n", type=positive, default=64, show_default=True)
@click.option(
    "--seed",
    type=seed_type,
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
    heads: HeadsChoice,
    chain: ChainChoice,
    precision: str,
    compiled: bool,
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
    from functools import partial

    from ebm_prior.files import check_writable
    from ebm_prior.images import ImageWriter, save_png, to_uint8
    from ebm_prior.pictures import Strip, before_after
    from ebm_prior.ranks import Ranks
    from ebm_prior.sampling import parse_seeds, seeded_batches

    seed_list = parse_seeds(seeds) if seeds is not None else list(range(seed, seed + n))
    prior, folder, _ = heads.open()
    config, temperature = chain.config(prior), chain.temperature
    prior.precision, prior.compiled = precision, compiled
    chain.readjust(prior.backbone)
    ranks = Ranks(prior.backbone.device)
    batches = partial(
        seeded_batches,
        prior,
        seed_list,
        config,
        batch_size=chain.batch_size,
        temperature=temperature,
        ranks=ranks,
    )
    if trajectory and ranks.size > 1:
        raise click.UsageError("--trajectory wants a single process")
    if not ranks.is_main:
        for _ in batches():  # its share of the chains; the main process shows the images
            pass
        return
    if out is None:
        kept = heads.local and (folder / "samples").is_dir()
        samples = folder / "samples" if kept else Path()
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
        for batch in batches(callback=strip):
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
        save_png(path, before_after(before, after, config.steps))
    if strip is not None:
        save_png(Path(trajectory), strip.picture())
        click.echo(f"transition strip -> {trajectory}")
    click.echo(f"{len(seed_list)} images -> {path}")
