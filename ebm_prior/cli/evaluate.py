"""`ebm-prior evaluate`: before and after, in numbers; of pictures; reference statistics."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click.core import ParameterSource

from ebm_prior.cli.options import (
    ChainChoice,
    DataChoice,
    HeadsChoice,
    chain_options,
    compile_option,
    data_options,
    device_option,
    gathered,
    heads_options,
    json_option,
    positive,
    precision_option,
    record_option,
    seed_type,
)

if TYPE_CHECKING:
    from ebm_prior.metrics import FeatureNetwork, FeatureStatistics


@dataclass(frozen=True)
class FeaturesChoice:
    """Which feature network."""

    features: str | None
    inception_weights: str | None

    def open(self, image_shape: tuple[int, int, int], device: str) -> FeatureNetwork:
        """The named network, or the one for images of this shape."""
        from ebm_prior.metrics import load_features

        return load_features(
            self.features, image_shape, inception_weights=self.inception_weights, device=device
        )


features_options = gathered(
    "features",
    FeaturesChoice,
    click.option(
        "--features",
        metavar="NAME|FILE",
        help="inception, mnist, digits or a trained classifier [default: by image size].",
    ),
    click.option(
        "--inception-weights",
        metavar="FILE",
        type=click.Path(),
        help="pytorch-fid's weights file, in place of its download.",
    ),
)
split_option = click.option(
    "--split",
    type=click.Choice(["train", "test"]),
    help="[default: the test images; all images of a folder or file that has no test part]",
)
resize_option = click.option(
    "--resize", is_flag=True, help="Resize, crop or convert images that do not fit."
)


@click.group(invoke_without_command=True)
@heads_options
@chain_options
@precision_option
@compile_option
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
    "--repeats",
    type=positive,
    default=1,
    show_default=True,
    help="Measure again with the next n seeds; mean and standard deviation are shown.",
)
@click.option(
    "--baselines",
    is_flag=True,
    help="Also a Gaussian fitted to the posterior's draws, and importance resampling.",
)
@features_options
@click.option(
    "--reference",
    metavar="FILE",
    help="Statistics by evaluate stats or pytorch-fid, in place of the test images.",
)
@record_option
@json_option
@click.pass_context
def evaluate(
    ctx: click.Context,
    heads: HeadsChoice,
    chain: ChainChoice,
    precision: str,
    compiled: bool,
    data: DataChoice,
    n: int,
    seed: int,
    repeats: int,
    baselines: bool,
    features: FeaturesChoice,
    reference: str | None,
    record: bool,
    as_json: bool,
) -> None:
    """Compare Gaussian prior, energy prior and reconstructions with held-out images.

    Published FIDs are of 50 000 samples. Interrupted, the same command goes on where it was.

    \b
    ebm-prior evaluate
    ebm-prior evaluate --heads runs/mine --data cifar10 -n 50000 --json
    ebm-prior evaluate --heads runs/mine --repeats 3 --baselines --record
    ebm-prior evaluate stats --data cifar10 --out cifar10.npz
    ebm-prior evaluate --heads runs/mine --reference cifar10.npz
    ebm-prior evaluate images samples.zip --reference cifar10.npz
    """
    from ebm_prior.ranks import is_main

    if ctx.invoked_subcommand is not None:
        if not is_main():
            ctx.exit()
        given = [
            parameter.opts[0]
            for parameter in ctx.command.params
            if ctx.get_parameter_source(parameter.name) is not ParameterSource.DEFAULT
        ]
        if given:
            raise click.UsageError(f"{given[0]} goes after {ctx.invoked_subcommand}, if at all")
        return
    from ebm_prior.errors import EbmPriorError
    from ebm_prior.evaluate import Repeated
    from ebm_prior.evaluate import evaluate as measure
    from ebm_prior.feature_cache import FeatureCache
    from ebm_prior.metrics import FeatureStatistics

    heads.check_record(record)
    prior, folder, config = heads.open()
    prior.precision, prior.compiled = precision, compiled
    backbone, sampler = prior.backbone, chain.config(prior)
    network = features.open(backbone.image_shape, backbone.device)
    data = data.or_recorded(config)
    if reference is not None:  # refused before the images are read, if it is
        known = FeatureStatistics.load(reference).of(network, backbone.image_shape)
        if record and known.rows is None:
            raise EbmPriorError(
                f"{reference} gives no precision and recall, so there is nothing whole to "
                "record; make one with ebm-prior evaluate stats"
            )
    train = data.open(backbone, "train")
    if reference is None:
        known = FeatureStatistics.from_images(data.open(backbone, "test").images, network)
    chain.readjust(backbone)
    # A folder of the user's may hold it; the Hub's cache is no place for anything else.
    root = folder / "state" if heads.local else Path("~/.cache/ebm_prior/state").expanduser()
    with FeatureCache(root, prior, sampler, chain.temperature, network) as cache:
        runs = [
            measure(
                prior,
                known,
                train.images,
                network,
                n=n,
                config=sampler,
                temperature=chain.temperature,
                seed=seed + r * n,
                batch_size=chain.batch_size,
                cache=cache,
                baselines=baselines,
            )
            for r in range(repeats)
        ]
    if not is_main():
        return
    result = runs[0] if repeats == 1 else Repeated(tuple(runs))
    click.echo(json.dumps(result.to_dict()) if as_json else result.table().text())
    if record:  # after the result is shown: it must not be lost to a full disk
        found = {
            "data": Path(data.source(backbone)).name,
            "chain_precision": precision,
            "features_option": features.features and Path(features.features).name,
        }
        if reference is not None:
            found["reference"] = Path(reference).name
        store(folder, result.to_dict() | found)


def store(folder: Path, result: dict) -> None:
    """Keep a result with the heads."""
    from ebm_prior.record import record

    record(folder, "evaluation", result, tables=[])  # card and report make their own


@evaluate.command()
@click.option(
    "--data",
    required=True,
    metavar="DATA",
    help="Data set name, or image folder, zip, .npz or LMDB.",
)
@click.option("--out", required=True, metavar="NPZ", help="File to write.")
@features_options
@split_option
@device_option
def stats(data: str, out: str, features: FeaturesChoice, split: str | None, device: str) -> None:
    """Store reference statistics, for --reference here and for pytorch-fid.

    \b
    ebm-prior evaluate stats --data cifar10 --out cifar10.npz
    ebm-prior evaluate stats --data photos/ --out photos.npz --inception-weights FILE
    """
    from ebm_prior.data import load_images
    from ebm_prior.errors import EbmPriorError
    from ebm_prior.files import check_writable
    from ebm_prior.metrics import FeatureStatistics

    if Path(out).suffix != ".npz":
        raise EbmPriorError(f"cannot write {out}: statistics go to an .npz")
    check_writable(out)
    images = load_images(data, split=split).images
    network = features.open(tuple(images.shape[1:]), device)
    found = FeatureStatistics.from_images(images, network)
    found.save(out)
    click.echo(f"{found.n} images, features: {found.features} -> {out}")


@evaluate.command()
@click.argument("path", metavar="PATH")
@click.option(
    "--reference",
    required=True,
    metavar="FILE|DATA",
    help="Statistics by evaluate stats or pytorch-fid; or images, as --data takes them.",
)
@features_options
@split_option
@resize_option
@device_option
@json_option
def images(
    path: str,
    reference: str,
    features: FeaturesChoice,
    split: str | None,
    resize: bool,
    device: str,
    as_json: bool,
) -> None:
    """Measure pictures that exist already: a folder, a zip or an .npz.

    The Fréchet distance is that of: python -m pytorch_fid PATH REFERENCE. --split and
    --resize are about the reference's images.

    \b
    ebm-prior evaluate images samples/ --reference cifar10.npz
    ebm-prior evaluate images samples.zip --reference photos/
    ebm-prior evaluate images samples.npz --reference mnist.npz --json
    """
    from ebm_prior.data import load_images
    from ebm_prior.evaluate import evaluate_images, quality_table

    samples = load_images(path, split=None).images
    network = features.open(tuple(samples.shape[1:]), device)
    known = reference_statistics(reference, network, tuple(samples.shape[1:]), split, resize)
    quality = evaluate_images(samples, known, network)
    if as_json:
        click.echo(json.dumps(asdict(quality) | {"reference_images": known.n}))
        return
    count = "" if known.n is None else f"{known.n} "
    note = f"({quality.n} images against {count}reference images; features: {quality.features})"
    click.echo(quality_table({Path(path).name: (quality,)}, note).text())


def reference_statistics(
    source: str,
    network: FeatureNetwork,
    shape: tuple[int, int, int],
    split: str | None,
    resize: bool,
) -> FeatureStatistics:
    """Statistics from their file, or of images."""
    from ebm_prior.data import load_images
    from ebm_prior.metrics import FeatureStatistics

    if is_statistics(source):
        if split is not None or resize:
            raise click.UsageError("--split and --resize go with images, not with statistics")
        return FeatureStatistics.load(source).of(network, shape)
    found = load_images(source, split=split, shape=shape, resize=resize)
    return FeatureStatistics.from_images(found.images, network)


def is_statistics(path: str) -> bool:
    """Whether an .npz holds statistics, not images."""
    import zipfile

    try:
        with zipfile.ZipFile(path) as archive:
            return {"mu.npy", "sigma.npy"} <= set(archive.namelist())
    except (OSError, zipfile.BadZipFile):
        return False
