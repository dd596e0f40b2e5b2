"""`ebm-prior ood`: outlier scores of the backbone and of the energy prior."""

from __future__ import annotations

import json
import re
from pathlib import Path

import click

from ebm_prior.cli.options import (
    DataChoice,
    HeadsChoice,
    SamplerChoice,
    heads_options,
    json_option,
    positive,
    record_option,
    sampler_options,
    seed_type,
)
from ebm_prior.errors import EbmPriorError


@click.command()
@heads_options
@sampler_options
@click.option(
    "--in",
    "inside",
    metavar="DATA",
    help="Images that are no outliers: name or path, its test split [default: as fitted on].",
)
@click.option("--out", "outside", metavar="DATA", required=True, help="Outliers, likewise.")
@click.option("--resize", is_flag=True, help="Resize, crop or convert images that do not fit.")
@click.option(
    "--k",
    metavar="K",
    help="Lowest latent groups to take from the prior, such as 0,2,4 [default: every number, or "
    "six even steps].",
)
@click.option(
    "-n",
    "--number",
    "n",
    type=positive,
    default=1000,
    show_default=True,
    help="Images of each set, at most.",
)
@click.option(
    "--samples", type=positive, default=1, show_default=True, help="Importance samples per image."
)
@click.option(
    "--batch-size", type=positive, default=100, show_default=True, help="Images at a time."
)
@click.option(
    "--seed", type=seed_type, default=0, show_default=True, help="Image i uses seed + i."
)
@click.option("--plot", metavar="PNG", help="Histograms of the scores.")
@record_option
@json_option
def ood(
    heads: HeadsChoice,
    sampler: SamplerChoice,
    inside: str | None,
    outside: str,
    resize: bool,
    k: str | None,
    n: int,
    samples: int,
    batch_size: int,
    seed: int,
    plot: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Tell outliers by how much the likelihood owes to the lowest latent groups.

    L>k takes all but the k lowest groups from q(z|x) and these from the prior; LLR>k is L>0 less
    L>k. The table says how well each score finds the images of --out among those of --in: area
    under the ROC curve, average precision, and false-positive rate at 80 % found.

    \b
    ebm-prior ood --heads runs/mine --out fashion_mnist
    ebm-prior ood --in cifar10 --out svhn --k 0,5,10 --plot histograms.png
    """
    from ebm_prior.decision import default_k, parse_k
    from ebm_prior.files import check_writable, write_bytes
    from ebm_prior.outliers import detect_outliers
    from ebm_prior.record import Picture
    from ebm_prior.record import record as store

    heads.check_record(record)
    if plot is not None:
        if Path(plot).suffix.lower() != ".png":
            raise EbmPriorError(f"cannot write {plot}: the histograms go to a .png")
        check_writable(plot)
    prior, folder, config = heads.open()
    backbone = prior.backbone
    groups = len(backbone.groups)
    ks = default_k(groups) if k is None else parse_k(k, groups)
    settings = sampler.config(prior)
    familiar = DataChoice(inside, resize).or_recorded(config).open(backbone, "test", n)
    strange = DataChoice(outside, resize).open(backbone, "test", n)
    result = detect_outliers(
        prior,
        familiar.images,
        strange.images,
        ks,
        names=(familiar.name, strange.name),
        samples=samples,
        config=settings,
        seed=seed,
        batch_size=batch_size,
    )
    # shown first: it must not be lost to a full disk
    if as_json:
        click.echo(json.dumps(result.to_dict() | {"scores": result.scores_dict()}))
    else:
        click.echo("\n".join([result.table().text(), *result.problems()]))
    picture = result.plot() if plot is not None or record else b""
    if plot is not None:
        write_bytes(plot, picture)
    if record:
        caption = f"{familiar.name} and {strange.name}: densities of the scores."
        pictures = {
            f"ood-{re.sub(r'[^A-Za-z0-9_]', '-', strange.name)}.png": Picture(picture, caption)
        }
        store(folder, f"ood: {strange.name}", result.to_dict(), [result.table()], pictures)
    if plot is not None and not as_json:
        click.echo(f"histograms -> {plot}")
