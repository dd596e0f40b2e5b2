"""Pictures of long chains: energy profiles (Fig. 8), images on the way, latents (Fig. 2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ebm_prior.chain_study import ChainStudy, ess_rates
from ebm_prior.chains import LATENTS_AT, LongChains
from ebm_prior.images import labelled_rows
from ebm_prior.plots import ENERGY, GAUSSIAN, OTHER, new_figure
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["energy_figure", "latents_figure", "posterior_latents", "way_picture"]

COLOURS = (ENERGY, OTHER, GAUSSIAN, "#e09f3e", "#7b5ea7")
COLUMNS = 12  # chains shown
EARLY = 100  # steps of the first panel


def energy_figure(study: ChainStudy) -> Figure:
    """Median energy and its 5-95 % band over the chains: the first steps, and all of them.

    With more than one transition a third panel compares their effective samples per gradient.
    """
    several = len(study.runs) > 1
    figure, ((early, whole, *more),) = new_figure(columns=2 + several, size=(4.4, 3.0))
    shade = 0.07 if several else 0.15
    for run, colour in zip(study.runs, COLOURS, strict=False):
        low, median, high = np.quantile(run.energy, [0.05, 0.5, 0.95], axis=1)
        name = run.config.transition
        if run.config.sized:
            name += f", s = {run.config.step_size:.2g}"
        for axes, last in ((early, EARLY), (whole, run.config.steps)):
            shown = slice(0, last + 1)
            steps = np.arange(len(median))[shown]
            axes.plot(steps, median[shown], color=colour, label=name)
            axes.fill_between(steps, low[shown], high[shown], color=colour, alpha=shade, lw=0)
            axes.set_xlabel("transition")
    early.set_ylabel("energy E of the chains, nats\n(median and 5-95 %)")
    whole.legend(frameon=False, fontsize=8)
    for axes in more:
        bars(axes, study.runs)
    return figure


def bars(axes: object, runs: Sequence[LongChains]) -> None:
    """Effective samples per 1000 gradients (energies of sir), a group of bars per summary."""
    labels = ("E", "|eps|²", "slowest")
    for i, (run, colour) in enumerate(zip(runs, COLOURS, strict=False)):
        rates = ess_rates(run, run.mixing())
        values = (rates["energy"], rates["half norm"], min(rates.values()))
        places = np.arange(len(values)) + (i - (len(runs) - 1) / 2) * 0.8 / len(runs)
        axes.bar(places, values, 0.75 / len(runs), color=colour)
    axes.set_axisbelow(True)
    axes.set_xticks(range(len(labels)), labels)
    axes.set_ylabel("effective samples\nper 1000 gradients or energies")


def way_picture(study: ChainStudy, reference: Tensor | None = None) -> Tensor:
    """The same chains at the chosen steps, a column each: (3, H, W), uint8.

    Args:
        study: Chains with images.
        reference: Held-out images for a last row, uint8, (M, C, H, W).
    """
    rows = []
    for run, frechet in zip(study.runs, study.frechet, strict=True):
        name = f"{run.config.transition}, " if len(study.runs) > 1 else ""
        for step, images in run.images.items():
            distance = f", FD {frechet[step]:.1f}" if step in frechet else ""
            rows.append((f"{name}step {step}{distance}", images[:COLUMNS]))
    if reference is not None:
        rows.append(("held-out images", reference[:COLUMNS]))
    return labelled_rows(rows)


def posterior_latents(prior: EnergyPrior, images: Tensor, n: int = 1000) -> dict[str, np.ndarray]:
    """Draws of q(z|x) for images, by the names of the groups that have two units: (n, 2).

    Args:
        prior: Supplies the backbone.
        images: uint8, (M, C, H, W), of which n are picked without repetition.
        n: Draws, fewer if there are fewer images.
    """
    draws = list(PosteriorStream(prior, images).picked(n, 0))
    return {
        group.name: torch.cat([z[i].flatten(1) for z in draws]).cpu().numpy()
        for i, group in enumerate(prior.backbone.groups)
        if group.numel == 2
    }


def latents_figure(
    study: ChainStudy, posterior: dict[str, np.ndarray] | None = None
) -> Figure | None:
    """How prior samples move onto the aggregate posterior (Fig. 2), a row per group.

    None where no group has two units.

    Args:
        study: Chains, whose start are samples of the Gaussian prior.
        posterior: Samples of q(z|x) by group, drawn beneath.
    """
    names = list(study.runs[0].latents.get(0, {}))
    if not names:
        return None
    rows = [(run, name) for run in study.runs for name in names]
    steps = [step for step in LATENTS_AT if all(step in run.latents for run in study.runs)]
    figure, grid = new_figure(len(rows), len(steps), size=(2.5, 2.6))
    for (run, name), line in zip(rows, grid, strict=True):
        beneath = None if posterior is None else posterior[name]
        clouds = [run.latents[step][name] for step in steps]
        every = np.concatenate(clouds if beneath is None else [*clouds, beneath])
        low, high = np.quantile(every, [0.002, 0.998], axis=0)
        margin = 0.08 * (high - low)
        for axes, step, cloud in zip(line, steps, clouds, strict=True):
            if beneath is not None:
                axes.scatter(*beneath.T, s=4, color=OTHER, alpha=0.4, lw=0, label="q(z|x)")
            colour = ENERGY if step else GAUSSIAN
            what = "energy prior" if step else "Gaussian prior"
            axes.scatter(*cloud.T, s=5, color=colour, alpha=0.7, lw=0, label=what)
            axes.set_xlim(low[0] - margin[0], high[0] + margin[0])
            axes.set_ylim(low[1] - margin[1], high[1] + margin[1])
            axes.set_title(f"{name}, {what if not step else f'step {step}'}", fontsize=9)
        own = f"{run.config.transition}\n" if len(study.runs) > 1 else ""
        line[0].set_ylabel(f"{own}second unit of {name}")
    for axes in grid[-1]:
        axes.set_xlabel("first unit")
    shown = {  # each kind of point once
        label: points
        for axes in grid[0]
        for points, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    figure.legend(
        shown.values(), shown.keys(), loc="outside upper center", ncols=3, markerscale=3,
        frameon=False,
    )  # fmt: skip
    return figure
