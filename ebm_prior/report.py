"""One self-contained HTML file about fitted heads: what they are and what was measured.

It is made from the folder alone (`config.json`, `log.jsonl`, pictures), so it says what was
recorded and nothing else; where a prior is given, it also shows its samples. The model card
has the same tables and pictures in Markdown.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ebm_prior._version import __version__
from ebm_prior.card import commands, evaluation_table, heading, picture_captions
from ebm_prior.heads import widths_of
from ebm_prior.record import RESULTS, Picture, read_png, recorded, recorded_pictures
from ebm_prior.saved import is_number, read_config, shareable
from ebm_prior.tables import Table

if TYPE_CHECKING:
    from ebm_prior.prior import EnergyPrior

__all__ = ["report"]

MAX_LOG = 256 << 20


@dataclass(frozen=True)
class Section:
    """A heading and what is under it; empty ones are left out."""

    title: str
    texts: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    commands: Sequence[str] = ()
    facts: bool = False


def report(folder: str | Path, prior: EnergyPrior | None = None) -> str:
    """The report of a run folder or saved folder, as HTML that opens without a network.

    Args:
        folder: Where the heads are.
        prior: The heads on their backbone, to draw the samples of the model card from.

    Raises:
        EbmPriorError: If the folder holds no heads, or its configuration is wrong.
    """
    from jinja2 import Environment, PackageLoader

    folder = Path(folder)
    config = shareable(read_config(folder))
    backbone, heads, sampler = config["backbone"], config["heads"], config["sampler"]
    dataset = backbone.get("dataset") or "unnamed data"
    sections = [
        _facts(config),
        _results(config),
        _samples(config, prior),
        *_recorded(config, folder),
        _fit(config, folder),
        Section("Reproduce", commands=commands(config, folder.name)),
    ]
    environment = Environment(loader=PackageLoader("ebm_prior", "assets"), autoescape=True)
    environment.filters["base64"] = lambda data: base64.b64encode(data).decode()
    return environment.get_template("report.html").render(
        title=f"Energy heads for {backbone['name']} on {dataset}",
        lead=f"{heads['kind']} heads, {widths_of(heads)}; {sampler['steps']} "
        f"{sampler['transition']} steps of size {sampler['step_size']:.4g}. "
        f"Written by ebm-prior {__version__} from what is recorded in {folder.name}.",
        sections=[s for s in sections if s.texts or s.tables or s.pictures or s.commands],
    )


def _facts(config: dict) -> Section:
    backbone, result = config["backbone"], config.get("training", {}).get("result")
    rows = [
        ("backbone", f"{backbone['name']}, {len(backbone['groups'])} latent groups"),
        ("data set", backbone.get("dataset") or "not recorded"),
        ("checkpoint", backbone.get("checkpoint") or "not recorded"),
        ("SHA-256", backbone.get("sha256") or "none"),
        ("parameters", f"{count:,}" if is_number(count := backbone.get("parameters")) else "-"),
        ("where to get it", backbone.get("source") or "not recorded"),
        ("licence of the backbone", backbone.get("license") or "not recorded"),
        ("licence of the heads", config.get("license") or "not stated"),
    ]
    if isinstance(result, dict):
        for key, name in (
            ("iterations", "iterations"), ("seconds", "seconds of fitting"),
            ("held_out_loss", "held-out loss"), ("acceptance", "acceptance rate"),
            ("rollbacks", "rollbacks"),
        ):  # fmt: skip
            value = result.get(key)
            if is_number(value):
                rows.append((name, f"{value:.4g}" if isinstance(value, float) else str(value)))
    return Section("What this is", tables=[Table("", ("", ""), rows)], facts=True)


def _samples(config: dict, prior: EnergyPrior | None) -> Section:
    if prior is None:
        return Section("Samples")
    from ebm_prior.pictures import card_pictures

    captions = picture_captions(config)
    drawn = card_pictures(prior)
    return Section("Samples", pictures=[Picture(drawn[n], captions[n]) for n in drawn])


def _results(config: dict) -> Section:
    table = evaluation_table(config)
    return Section(heading("evaluation"), tables=[table] if table else [])


def _recorded(config: dict, folder: Path) -> list[Section]:
    pictures = recorded_pictures(folder, config)
    return [
        Section(
            heading(name),
            tables=found.tables,
            pictures=[
                Picture(pictures[path], caption)
                for file_name, caption in found.captions.items()
                if (path := f"{RESULTS}/{file_name}") in pictures
            ],
        )
        for name, found in recorded(config).items()
    ]


def _fit(config: dict, folder: Path) -> Section:
    """How the fit went: its log as curves, its last sample grid."""
    pictures = []
    log = read_log(folder / "log.jsonl")
    if any("loss" in entry for entry in log):
        pictures.append(
            Picture(
                curves(log),
                "The fit: loss on the batches (smoothed) and held out; mean energy of posterior "
                "and prior samples, summed over the heads.",
            )
        )
    grids = [p for p in (folder / "samples").glob("*.png") if re.fullmatch("[0-9]{1,12}", p.stem)]
    grids.sort()
    if grids and (data := read_png(grids[-1])) is not None:
        pictures.append(Picture(data, f"Samples at iteration {int(grids[-1].stem)}."))
    return Section("The fit", pictures=pictures)


def read_log(path: Path) -> list[dict]:
    """Lines of a `log.jsonl`; none if there is no such file, without those that are no JSON."""
    entries = []
    try:
        if not path.is_file() or path.stat().st_size > MAX_LOG:
            return []
        lines = path.read_text(errors="replace").splitlines()
    except OSError:
        return []
    for line in lines:
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(entry, dict) and is_number(entry.get("iteration")):
            entries.append(entry)
    return entries


def curves(log: Sequence[Mapping]) -> bytes:
    """Loss, and energies of both sides, against iterations."""
    from ebm_prior.plots import ENERGY, GAUSSIAN, OTHER, new_figure, png

    figure, axes = new_figure(columns=2)
    loss, energy = axes[0]
    x, y = _series(log, "loss")
    loss.plot(x, _smooth(y), color=GAUSSIAN, label="batches")
    x, y = _series(log, "held_out_loss")
    if x:
        loss.plot(x, y, color=ENERGY, label="held out")
    for key, color, label in (
        ("energy_posterior", OTHER, "posterior samples"),
        ("energy_prior", ENERGY, "prior samples"),
    ):
        x, y = _series(log, key)
        energy.plot(x, _smooth(y), color=color, label=label)
    for axis, label in ((loss, "loss"), (energy, "energy, nats")):
        axis.set(xlabel="iteration", ylabel=label)
        axis.legend(frameon=False)
    return png(figure)


def _series(log: Sequence[Mapping], key: str) -> tuple[list[int], list[float]]:
    """Iterations and finite values of a logged number, or of a logged sum over heads."""
    x, y = [], []
    for entry in log:
        value = entry.get(key)
        if isinstance(value, Mapping):
            value = sum(v for v in value.values() if is_number(v))
        if is_number(value):
            x.append(entry["iteration"])
            y.append(value)
    return x, y


def _smooth(values: Sequence[float], weight: float = 0.9) -> list[float]:
    """Exponential moving average, started without bias."""
    smooth, total, norm = [], 0.0, 0.0
    for value in values:
        total = weight * total + (1 - weight) * value
        norm = weight * norm + (1 - weight)
        smooth.append(total / norm)
    return smooth
