"""`ebm-prior pretrain`: stage one, for those without a checkpoint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click

from ebm_prior.cli.options import device_option, seed_type


@click.command()
@click.option("--backbone", required=True, help="Backbone family, such as nvae.")
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Data set name or path; :0,1 after it keeps these classes.",
)
@click.option("--out", required=True, metavar="DIR", help="Folder for the checkpoint.")
@click.option("--resume", is_flag=True, help="Continue an interrupted training in --out.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the family's trainer, such as epochs=20; repeatable.",
)
@click.option("--seed", type=seed_type, default=0, show_default=True)
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
    values = dict(parse_setting(text) for text in settings)
    images = load_images(data, split="train")
    path = trainer(
        images.images,
        out=Path(out),
        dataset=images.name,
        resume=resume,
        seed=seed,
        device=check_device(device),
        **values,
    )
    more = f" --data {data}" if data != images.name else ""
    click.echo(
        f"checkpoint -> {path}\nnext: ebm-prior fit --backbone {backbone} --ckpt {path}{more}"
    )


RESERVED = (
    "images", "out", "dataset", "resume", "seed", "device", "progress", "record", "preset",
)  # fmt: skip


def parse_setting(text: str) -> tuple[str, Any]:
    """`name=value` with the value as JSON where it is JSON."""
    name, equals, value = text.partition("=")
    if not equals:
        raise click.UsageError(f"--set {text!r}: expected NAME=VALUE")
    if name in RESERVED:
        raise click.UsageError(f"--set {name}: not a setting of the trainer")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value
