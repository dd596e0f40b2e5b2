"""`ebm-prior evaluate`: before and after, in numbers."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ebm_prior.cli.options import (
    ChainChoice,
    DataChoice,
    HeadsChoice,
    chain_options,
    data_options,
    heads_options,
    json_option,
    record_option,
    seed_type,
)


@click.command()
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
    "--seed", type=seed_type, default=0, show_default=True, help="Sample i uses seed + i."
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
@record_option
@json_option
def evaluate(
    heads: HeadsChoice,
    chain: ChainChoice,
    data: DataChoice,
    n: int,
    seed: int,
    features: str | None,
    inception_weights: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Compare Gaussian prior, energy prior and reconstructions with held-out images.

    \b
    ebm-prior evaluate
    ebm-prior evaluate --heads runs/mine --data cifar10 -n 50000 --json
    ebm-prior evaluate --heads runs/mine --record
    """
    from ebm_prior.evaluate import evaluate as measure
    from ebm_prior.metrics import load_features
    from ebm_prior.record import record as store

    heads.check_record(record)
    prior, folder, config = heads.open()
    backbone, sampler = prior.backbone, chain.config(prior)
    network = load_features(
        features,
        backbone.image_shape,
        inception_weights=inception_weights,
        device=heads.device,
    )
    data = data.or_recorded(config)
    train, reference = data.open(backbone, "train"), data.open(backbone, "test")
    chain.readjust(backbone)
    result = measure(
        prior,
        reference.images,
        train.images,
        network,
        n=n,
        config=sampler,
        temperature=chain.temperature,
        seed=seed,
        batch_size=chain.batch_size,
    )
    if record:
        found = {"data": Path(data.source(backbone)).name, "features_option": features}
        store(folder, "evaluation", result.to_dict() | found, tables=[])  # the card makes its own
    click.echo(json.dumps(result.to_dict()) if as_json else result.table())
