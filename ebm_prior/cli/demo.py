"""`ebm-prior demo`: a web page for trying heads."""

from __future__ import annotations

from pathlib import Path

import click

from ebm_prior.cli.options import device_option
from ebm_prior.errors import EbmPriorError


@click.command()
@click.argument("sources", metavar="[HEADS]...", nargs=-1)
@click.option(
    "--ckpt",
    metavar="PATH",
    help="Their backbone [default: stored with the heads or beside them].",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="0.0.0.0: every network.")
@click.option("--port", type=click.IntRange(1, 65535), default=7860, show_default=True)
@device_option
def demo(sources: tuple[str, ...], ckpt: str | None, host: str, port: int, device: str) -> None:
    """Open a web page on which to choose heads, steps, temperature and seed.

    \b
    ebm-prior demo                        (from a clone: the shipped heads)
    ebm-prior demo runs/mine user/name --ckpt nvae_cifar.pt

    Needs Gradio: pip install 'ebm-prior[demo]'
    """
    from ebm_prior.demo import load, page

    chosen = sources or sorted(
        str(path.parent) for path in Path().glob("checkpoints/*/heads/*.json")
    )
    if not chosen:
        raise EbmPriorError("there are no heads under checkpoints/ here; name some")
    blocks = page({source: load(source, ckpt, device) for source in chosen})
    try:
        blocks.launch(server_name=host, server_port=port, share=False)
    except OSError as error:
        raise EbmPriorError(
            f"cannot listen on {host}:{port}, which may be taken; choose another --port"
        ) from error
