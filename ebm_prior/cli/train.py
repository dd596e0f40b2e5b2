"""`ebm-prior train`: a generator and its energy prior, together."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path

import click

from ebm_prior.cli.options import device_option, json_option, seed_type
from ebm_prior.cli.pretrain import parse_setting


@click.command()
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Data set name or path; :0,1 after it keeps these classes.",
)
@click.option(
    "--method",
    type=click.Choice(["mle", "variational"]),
    help="Langevin chains of the posterior, or an inference network [default: mle].",
)
@click.option(
    "--prior",
    type=click.Choice(["ebm", "gaussian"]),
    help="The energy prior, or the same generator without heads [default: ebm].",
)
@click.option(
    "--preset",
    metavar="NAME",
    help="The paper's settings for what is not given: table1, table1-cifar10, table5, table7, "
    "figure2; see above.",
)
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="NAME=VALUE",
    help="A setting of the trainer, such as latents=[100,100] (top layer first), ngf=128, "
    "head_layers=[[100,100],[200,200,200,200]] (of each head), iterations=20000; repeatable.",
)
@click.option("--out", metavar="DIR", help="Run folder [default: runs/<family>-<data>-<time>].")
@click.option("--resume", is_flag=True, help="Continue an interrupted training in --out.")
@click.option(
    "--backbone", default="generator", show_default=True, help="Family with a joint trainer."
)
@click.option("--seed", type=seed_type, default=0, show_default=True)
@device_option
@json_option
def train(
    data: str,
    method: str | None,
    prior: str | None,
    preset: str | None,
    settings: tuple[str, ...],
    out: str | None,
    resume: bool,
    backbone: str,
    seed: int,
    device: str,
    as_json: bool,
) -> None:
    """Train a multi-layer generator and its energy prior together.

    \b
    ebm-prior train --data mnist --method variational --out runs/joint
    ebm-prior train --data mnist:0,1 --preset figure2
    ebm-prior train --data cifar10 --preset table1-cifar10 --set prior_steps=80

    \b
    The paper's tables:
    Table 1      --preset table1 (CelebA-64, SVHN) or table1-cifar10
    Table 5      --preset table5 (SVHN), with --set ngf=190, 277 or 401 for 2, 4 or
                 8 times the generator's parameters
    Table 6      --preset table1-cifar10 --set head_layers=[[10,10],[10,10,10]], ...
    Table 7      the presets of Table 1 with --method variational
    Table 8      --preset table1-cifar10 --set prior_steps=10, ...
    One layer    --preset table1 --set latents=[100] --set head_layers=[[200,200]]

    Without a pretrained backbone: Sec. 3.2 and 3.3 of the paper, with the generator and
    inference network of Table 12. The run folder holds them and the heads, for every other verb.
    """
    from ebm_prior.cli.fit import absolute
    from ebm_prior.data import load_images
    from ebm_prior.registry import JOINT_GROUP, check_device, find_trainer

    if resume and out is None:
        raise click.UsageError("--resume needs the --out of the run to continue")
    trainer = find_trainer(backbone, JOINT_GROUP)
    values = dict(parse_setting(text) for text in settings)
    for name, value in (("method", method), ("prior", prior)):
        if value is not None:
            values[name] = value
    images = load_images(data, split="train")
    stamp = time.strftime("%Y%m%d-%H%M%S")
    folder = Path(out or f"runs/{backbone}-{images.name}-{stamp}")
    result = trainer(
        images.images,
        out=folder,
        dataset=images.name,
        resume=resume,
        device=check_device(device),
        record={"data": {"source": absolute(data), "resize": False, "limit": None}},
        preset=preset,
        seed=seed,
        **values,
    )
    if as_json:
        click.echo(json.dumps({"run": str(folder), **asdict(result)}))
        return
    click.echo(
        f"done in {result.seconds:.0f} s, {result.iterations} iterations -> {folder}\n"
        f"next: ebm-prior sample --heads {folder} --compare"
    )
