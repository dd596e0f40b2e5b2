"""`ebm-prior report`: one page about fitted heads."""

from __future__ import annotations

from pathlib import Path

import click

from ebm_prior.cli.options import HeadsChoice, device_option
from ebm_prior.errors import EbmPriorError


@click.command()
@click.argument("run", metavar="[RUN]", required=False)
@click.option("--out", metavar="FILE", help="HTML file to write [default: report.html in RUN].")
@click.option(
    "--ckpt", metavar="PATH", help="Backbone checkpoint [default: where the run found it]."
)
@click.option(
    "--no-samples", is_flag=True, help="Do not draw samples anew; needs no backbone then."
)
@device_option
def report(
    run: str | None, out: str | None, ckpt: str | None, no_samples: bool, device: str
) -> None:
    """Write numbers, plots and grids of a run or saved folder into one HTML file.

    \b
    ebm-prior report runs/mine
    ebm-prior report --no-samples --out mine.html

    It shows what evaluate, ood, chains and likelihood stored with --record, how the fit
    went, and fresh samples. RUN is the newest finished run by default. The file holds
    everything in itself and opens without a network.
    """
    from ebm_prior.files import check_writable, write_text
    from ebm_prior.report import report as make
    from ebm_prior.run import newest_run

    folder = Path(run) if run is not None else newest_run()
    if not folder.is_dir():
        raise EbmPriorError(f"{run} is no folder of heads; fit some, or pull them with --out")
    target = Path(out) if out is not None else folder / "report.html"
    check_writable(target)
    prior = None
    if not no_samples:
        try:
            prior, _, _ = HeadsChoice(str(folder), None, ckpt, False, device).open()
        except EbmPriorError as error:
            raise EbmPriorError(f"{error} (or leave the samples out: --no-samples)") from error
    write_text(target, make(folder, prior))
    click.echo(target)
