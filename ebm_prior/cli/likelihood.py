"""`ebm-prior likelihood`: log p(x) of held-out images, with and without the energy."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ebm_prior.cli.options import (
    DataChoice,
    HeadsChoice,
    data_options,
    heads_options,
    json_option,
    positive,
    record_option,
    seed_type,
)


@click.command()
@heads_options
@data_options
@click.option(
    "--images",
    type=click.IntRange(min=2),
    default=1000,
    show_default=True,
    help="Held-out images, or all if there are fewer.",
)
@click.option(
    "--samples",
    type=positive,
    default=50,
    show_default=True,
    help="K: draws of q(z|x) per image.",
)
@click.option(
    "--chains",
    type=click.IntRange(min=2),
    default=200,
    show_default=True,
    help="Annealed chains for ln Z.",
)
@click.option(
    "--temperatures",
    type=positive,
    default=500,
    show_default=True,
    help="Steps of each from N(0, I) to the energy prior; 1 is plain importance sampling.",
)
@click.option("--seed", type=seed_type, default=0, show_default=True, help="Of all draws.")
@click.option(
    "--batch-size",
    type=positive,
    default=100,
    show_default=True,
    help="Chains or images at a time.",
)
@record_option
@json_option
def likelihood(
    heads: HeadsChoice,
    data: DataChoice,
    images: int,
    samples: int,
    chains: int,
    temperatures: int,
    seed: int,
    batch_size: int,
    record: bool,
    as_json: bool,
) -> None:
    """Bound log p(x) of held-out images under the Gaussian and the energy prior.

    The energy prior is normalised by annealed importance sampling, whose error is stated.

    \b
    ebm-prior likelihood
    ebm-prior likelihood --heads runs/mine --images 10000 --samples 100 --record
    """
    from ebm_prior.bounds import compare
    from ebm_prior.record import record as store

    heads.check_record(record)
    prior, folder, config = heads.open()
    data = data.or_recorded(config)
    held_out = data.open(prior.backbone, "test", limit=images)
    result = compare(
        prior,
        held_out.images,
        samples=samples,
        chains=chains,
        temperatures=temperatures,
        seed=seed,
        batch_size=batch_size,
    )
    name = Path(data.source(prior.backbone)).name
    table = result.table(name)
    click.echo(json.dumps(result.to_dict()) if as_json else table.text())
    if record:  # after the result is shown: it must not be lost to a full disk
        store(folder, "likelihood", result.to_dict() | {"data": name}, tables=[table])
