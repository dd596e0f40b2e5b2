"""`ebm-prior anomaly`: find a class that was held out of all training."""

from __future__ import annotations

import json
from pathlib import Path

import click

from ebm_prior.cli.options import device_option, json_option, positive, seed_type
from ebm_prior.cli.pretrain import parse_setting


def parse_digits(_: click.Context, __: click.Parameter, texts: tuple[str, ...]) -> list[int]:
    """Labels such as `1,4` and `7`, each once, in the order given."""
    parts = [part.strip() for text in texts for part in text.split(",")]
    if not all(part.isdecimal() for part in parts):
        raise click.BadParameter("expected labels such as 1,4,5,7,9")
    return list(dict.fromkeys(map(int, parts)))


@click.command()
@click.option("--data", required=True, metavar="DATA", help="Labelled data set, name or path.")
@click.option("--out", required=True, metavar="DIR", help="Folder; the same one to go on.")
@click.option(
    "--digit",
    "--digits",
    "digits",
    multiple=True,
    default=("1,4,5,7,9",),
    show_default=True,
    metavar="LABELS",
    callback=parse_digits,
    help="Classes to hold out, one after the other.",
)
@click.option("--backbone", default="hvae", show_default=True, help="Family to pretrain.")
@click.option(
    "--heads",
    type=click.Choice(["factorized", "joint", "both"]),
    default="joint",
    show_default=True,
    help="The paper's one head per group, one on the joint features, or both.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the family's trainer, such as iterations=1000; repeatable.",
)
@click.option(
    "--fit-iterations",
    type=click.IntRange(min=10),
    default=6000,
    show_default=True,
    help="Iterations of the heads' fit.",
)
@click.option("-n", "--number", "n", type=positive, help="Test images, at most [default: all].")
@click.option("--seed", type=seed_type, default=0, show_default=True)
@device_option
@json_option
def anomaly(
    data: str,
    out: str,
    digits: list[int],
    backbone: str,
    heads: str,
    settings: tuple[str, ...],
    fit_iterations: int,
    n: int | None,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Hold a class out, pretrain a backbone and fit heads on the others, and find it.

    Reports AUPRC of the held-out class among unseen images, mean and standard deviation over
    ten points of the heads' fit. Finished stages are kept: the same command goes on.

    \b
    ebm-prior anomaly --data mnist --digits 1,4,5,7,9 --out runs/anomaly
    ebm-prior anomaly --data mnist.npz --digit 1 --set iterations=1000 --out runs/quick
    """
    from ebm_prior.anomaly import AnomalyConfig, check_digit, load_whole, run_digit, start, table
    from ebm_prior.cli.fit import absolute
    from ebm_prior.registry import check_device, find_trainer

    check_device(device)
    find_trainer(backbone)
    config = AnomalyConfig(
        absolute(data), backbone, heads, dict(map(parse_setting, settings)), fit_iterations,
        n or 0, seed,
    )  # fmt: skip
    whole = load_whole(data)
    for digit in digits:  # now, rather than after the classes before it
        check_digit(whole, digit)
    start(config, Path(out))
    results = [
        run_digit(whole, digit, config, Path(out) / f"digit-{digit}", device) for digit in digits
    ]
    click.echo(json.dumps(results) if as_json else table(results).text())
