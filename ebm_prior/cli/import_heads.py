"""`ebm-prior import`: heads of the paper authors' public training code."""

from __future__ import annotations

from pathlib import Path

import click

from ebm_prior.cli.options import device_option, positive, positive_float
from ebm_prior.errors import EbmPriorError


@click.command("import")
@click.argument("file", metavar="FILE.pth")
@click.option("--backbone", required=True, help="Backbone family, such as nvae.")
@click.option("--ckpt", metavar="PATH", required=True, help="The backbone they were trained on.")
@click.option("--out", metavar="DIR", required=True, help="New folder for the heads.")
@click.option(
    "--steps", type=positive, default=10, show_default=True, help="Langevin steps to store."
)
@click.option(
    "--step-size", type=positive_float, default=1e-5, show_default=True, help="Their size s."
)
@device_option
def import_heads(
    file: str, backbone: str, ckpt: str, out: str, steps: int, step_size: float, device: str
) -> None:
    """Import heads that the paper authors' public code has trained.

    \b
    ebm-prior import 30000.pth --backbone nvae --ckpt checkpoint.pt --out heads

    The file is read without running anything in it. It does not say which backbone it belongs
    to, nor how to sample; the defaults are the authors' public settings for CelebA-HQ-256.
    """
    from ebm_prior.convert import import_heads as read
    from ebm_prior.prior import SamplerConfig
    from ebm_prior.registry import load_backbone
    from ebm_prior.saved import CONFIG

    if (Path(out) / CONFIG).exists():
        raise EbmPriorError(f"{out} already holds heads; choose another --out")
    prior = read(
        file, load_backbone(backbone, ckpt, device), SamplerConfig("langevin", steps, step_size)
    )
    prior.save_pretrained(out, training={"imported": Path(file).name})
    click.echo(f"{len(prior.heads)} heads, nef {prior.nef}, ndf {prior.ndf} -> {out}")
    click.echo(f"next: ebm-prior sample --heads {out} --ckpt {ckpt}")
