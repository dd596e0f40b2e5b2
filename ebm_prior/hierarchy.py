"""The hierarchy made visible: hold some latent groups, redraw the others from the prior.

With H the held and F the free groups, the tilted prior in eps-space (App. A.3, E = -f)

    log p(eps_F | eps_H) = -E(T(eps_F, eps_H)) - |eps_F|^2 / 2 + const

is the density of the free groups' noise: before the tilt all eps are independent N(0, I),
so the held ones add a constant, and with E = 0 the free ones are N(0, I) again.

What is held is the noise. As long as the held groups are the uppermost ones, which is all
that the paper shows (Fig. 7, 11 and 12), T gives them the very same latents, so holding
eps_H is holding z_H, and nothing is missing from the density. If a held group lies below a
free one, its z moves along with the groups above it: z_i = mu_i(z_>i) + sigma_i(z_>i) eps_i.
That is on purpose. Holding its z instead would add log p(z_i | z_>i) to the density, so
that even the Gaussian prior would redraw nothing freely, and in a Markov hierarchy (Eq. 2),
where the image depends on the bottom group alone, no pixel could change.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.backbone import LatentGroup, Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.images import MAX_GRID, labelled_rows, side_by_side, to_uint8, whole_scale
from ebm_prior.langevin import Generators, StepInfo, keyed_generator
from ebm_prior.posterior_cache import PosteriorStream
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.tables import Table

__all__ = ["Hierarchy", "Level", "Redrawn", "explore", "infer", "levels", "redraw"]

PADDING = 6  # pixels around an image: lines belong to different samples
MAX_ROWS = 6  # by default; a picture with a row for each of 30 groups is no picture


class Redrawn(NamedTuple):
    """Noise whose free groups were drawn anew; the held ones are those given, bit by bit.

    Attributes:
        start: Free groups from N(0, I): a sample of the Gaussian prior given the held groups.
        end: The chains' last states: a sample of the tilted prior given the held groups.
    """

    start: Latents
    end: Latents


def redraw(
    prior: EnergyPrior,
    eps: Latents,
    keep: Collection[str],
    config: SamplerConfig | None = None,
    *,
    temperature: float = 1.0,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Redrawn:
    """Hold the noise of some groups and draw that of the others from the tilted prior.

    The density is the module's; the chain moves the free groups only and starts at N(0, I).

    Reference: Cui, Wu and Han, 2023, Sec. 5.3 (Fig. 7) and App. B.1 (Fig. 12, Eq. 20).

    Args:
        prior: Energy prior to sample.
        eps: One tensor per group, (B, *shape), of which the held ones are read.
        keep: Names of the groups to hold; none of them gives a plain chain of the prior.
        config: Transition, steps and step size; those stored with the heads by default.
        temperature: Multiplies every prior sigma.
        generator: One generator, or one per sample.
        callback: Called with a `StepInfo`, whose `eps` are the free groups alone.

    Raises:
        EbmPriorError: If a name is unknown, no group is left to redraw, or the noise or the
            temperature does not fit.
    """
    names = [group.name for group in prior.backbone.groups]
    if unknown := sorted(set(keep) - set(names)):
        raise EbmPriorError(f"no group {', '.join(unknown)}; the groups are {', '.join(names)}")
    free = [i for i, name in enumerate(names) if name not in keep]
    if not free:
        raise EbmPriorError("every group is held, so there is nothing to redraw")
    if not temperature > 0:
        raise EbmPriorError(f"temperature must be positive, got {temperature}")
    prior.backbone.check_latents(eps, "eps")
    config = config or prior.sampler

    def whole(part: Sequence[Tensor], *held: Tensor) -> Latents:
        merged = list(held)
        for i, tensor in zip(free, part, strict=True):
            merged[i] = tensor
        return tuple(merged)

    noise = prior.noise(len(eps[0]), generator)
    start = tuple(noise[i] for i in free)
    # where the norm counts, the held groups' is in it too: a constant, without a gradient
    end = prior.run_chain(
        start, config, temperature, generator, callback, whole, eps, f"groups {free}"
    )
    return Redrawn(whole(start, *eps), whole(end, *eps))


@torch.no_grad()
def infer(
    prior: EnergyPrior, images: Tensor, seeds: Sequence[int], temperature: float = 1.0
) -> Latents:
    """Noise of latents drawn from q(z|x): `transform(eps, temperature)` gives them back.

    Args:
        prior: Supplies the backbone.
        images: uint8, (N, C, H, W); drawn as x ~ Bernoulli(image) where the backbone was
            trained on such images.
        seeds: One per image; a draw depends on its own image and seed alone.
        temperature: Of the prior that the noise will be used with.

    Returns:
        One tensor per group, (N, *shape).
    """
    stream = PosteriorStream(prior, images)
    generators = [torch.Generator().manual_seed(seed) for seed in seeds]
    z = stream.latents(torch.arange(len(seeds)), generators)
    # T at temperature t is T at temperature 1 on t * eps
    return tuple(e / temperature for e in prior.backbone.inverse(z))


def levels(groups: Sequence[LatentGroup], keep: str | None = None) -> list[tuple[str, ...]]:
    """Names of the groups held in each row of a picture.

    Args:
        groups: A backbone's groups.
        keep: Rows separated by commas. A row is the number of uppermost groups to hold (0
            redraws everything), or the held groups' names joined by "+". By default from
            all but the bottom group down to none, in at most six even steps.

    Returns:
        One tuple of names per row, in ancestral order.

    Raises:
        EbmPriorError: If a row is neither, or would leave nothing to redraw.
    """
    names = [group.name for group in groups]
    count = min(len(names), MAX_ROWS)
    if keep is None:
        redrawn = [math.ceil(len(names) * i / count) for i in range(1, count + 1)]
        return [tuple(names[: len(names) - n]) for n in redrawn]
    rows = []
    for row in (part.strip() for part in keep.split(",")):
        given = row.split("+")
        if set(given) <= set(names):
            held = tuple(name for name in names if name in given)
        elif row.isdecimal() and int(row) <= len(names):
            held = tuple(names[: int(row)])
        else:
            raise EbmPriorError(
                f"cannot hold {row!r}: a row is a number of uppermost groups, 0 to "
                f"{len(names) - 1}, or names joined by +, of {', '.join(names)}"
            )
        if len(held) == len(names):
            raise EbmPriorError(f"{row!r} holds every group, so there is nothing to redraw")
        rows.append(held)
    return rows


@dataclass(frozen=True)
class Level:
    """Pictures with the same groups held.

    Attributes:
        held: Names of the held groups, top first.
        redrawn: Names of the others.
        gaussian: Images of the Gaussian prior, (N, redraws, C, H, W), uint8.
        energy: Images of the tilted prior, its chains started from the very same noise.
    """

    held: tuple[str, ...]
    redrawn: tuple[str, ...]
    gaussian: Tensor
    energy: Tensor

    @property
    def gaussian_std(self) -> float:
        """Mean over pixels of the standard deviation across redraws, of 1 (full range)."""
        return spread(self.gaussian)

    @property
    def energy_std(self) -> float:
        """The same of the tilted prior."""
        return spread(self.energy)

    def to_dict(self) -> dict:
        """What is held, and the numbers, as plain values."""
        return {
            "held": list(self.held),
            "redrawn": list(self.redrawn),
            "gaussian_std": self.gaussian_std,
            "energy_std": self.energy_std,
        }


def spread(images: Tensor) -> float:
    """Mean per-pixel standard deviation of uint8 images (N, redraws, C, H, W), in [0, 1]."""
    return (images.double() / 255).std(1).mean().item()


@dataclass(frozen=True)
class Hierarchy:
    """Redraws at every level, beside what they started from.

    Attributes:
        gaussian: What the Gaussian prior's redraws belong to, (N, K, C, H, W), uint8: its
            sample (K = 1), or an image and its reconstruction (K = 2).
        energy: The same of the tilted prior.
        levels: One per row.
    """

    gaussian: Tensor
    energy: Tensor
    levels: tuple[Level, ...]

    def picture(self) -> Tensor:
        """Gaussian prior on the left, tilted prior on the right, a block of lines per level.

        A line shows what was given, then its redraws. Returns (3, H, W), uint8.
        """
        scale = whole_scale(self.levels[0].energy.shape[1], self.energy.shape[-1], PADDING)

        def column(rows: Sequence[tuple[str, Tensor]]) -> Tensor:
            lines = [(label, images.flatten(0, 1)) for label, images in rows]
            return labelled_rows(lines, rows[0][1].shape[1], PADDING, scale)

        columns: list[Tensor] = []
        label = "sample" if self.energy.shape[1] == 1 else "image, reconstruction"
        for name, given, drawn in (
            ("Gaussian prior", self.gaussian, [(x.gaussian, x.gaussian_std) for x in self.levels]),
            ("energy prior", self.energy, [(x.energy, x.energy_std) for x in self.levels]),
        ):
            if not columns or label == "sample":  # an image is the same for both priors
                columns.append(column([(label, given)] * len(drawn)))
            labels = [
                f"{name}: {brief(level.redrawn, level.held)} redrawn, std {std:.3f}"
                for level, (_, std) in zip(self.levels, drawn, strict=True)
            ]
            columns.append(column(list(zip(labels, (x for x, _ in drawn), strict=True))))
        return side_by_side(columns)

    def table(self) -> Table:
        """A row per level."""
        rows = [
            (brief(x.redrawn, x.held), f"{x.gaussian_std:.4f}", f"{x.energy_std:.4f}")
            for x in self.levels
        ]
        redraws = self.levels[0].energy.shape[1]
        images = "1 image" if len(self.energy) == 1 else f"{len(self.energy)} images"
        return Table(
            "",
            ("redrawn", "Gaussian prior", "energy prior"),
            rows,
            f"(standard deviation across {redraws} redraws, mean over the pixels of {images}; "
            "full range 1)",
        )


def brief(redrawn: Sequence[str], held: Sequence[str]) -> str:
    """Names of the redrawn groups in a few words."""
    if not held:
        return "all groups"
    if len(redrawn) <= 4:
        return " ".join(redrawn)
    if len(held) <= 4:
        return f"all but {' '.join(held)}"
    return f"{redrawn[0]} ... {redrawn[-1]} ({len(redrawn)} groups)"


def explore(
    prior: EnergyPrior,
    seeds: Sequence[int],
    images: Tensor | None = None,
    *,
    keep: Sequence[Collection[str]] | None = None,
    redraws: int = 7,
    config: SamplerConfig | None = None,
    temperature: float = 1.0,
    batch_size: int = 100,
) -> Hierarchy:
    """Hierarchical sampling (Sec. 5.3, Fig. 7) or reconstruction (App. B.1, Fig. 12).

    Without images each prior redraws the lower groups of its own samples. With images both
    redraw the lower groups of one draw z ~ q(z|x).

    Args:
        prior: Fitted heads.
        seeds: One per sample or image. Redraw j of a sample depends on its seed and on j, and
            starts from the same noise at every level.
        images: Images to reconstruct, uint8, (N, C, H, W).
        keep: Groups held at each level; `levels(prior.backbone.groups)` by default.
        redraws: Draws per image and level, at least 2.
        config: Transition, steps and step size; those stored with the heads by default.
        temperature: Multiplies every prior sigma.
        batch_size: Chains run together; changes results by rounding only.

    Raises:
        EbmPriorError: If there is nothing to show, more than a picture can hold, or `redraw`
            refuses a level.
    """
    groups = prior.backbone.groups
    keep = levels(groups) if keep is None else keep
    config = config or prior.sampler
    n = len(seeds)
    if not keep or n < 1 or redraws < 2:
        raise EbmPriorError("a hierarchy needs at least one level, one image and two redraws")
    if images is not None and len(images) != n:
        raise EbmPriorError(f"{n} seeds for {len(images)} images")
    if (total := 2 * len(keep) * n * (redraws + 3)) > MAX_GRID:
        raise EbmPriorError(
            f"{total} images are too many for one picture (at most {MAX_GRID}): take fewer "
            "images, redraws or levels"
        )
    chains = n * redraws * len(keep) + (n if images is None else 0)
    with tqdm(total=chains * config.steps, desc="redrawing", unit="step", disable=None,
              delay=1) as bar:  # fmt: skip

        def advance(info: StepInfo) -> None:
            bar.update(len(info.accepted))

        def run(eps: Latents, held: Collection[str], generators: list) -> Redrawn:
            parts = [
                redraw(
                    prior,
                    tuple(e[i : i + batch_size] for e in eps),
                    held,
                    config,
                    temperature=temperature,
                    generator=generators[i : i + batch_size],
                    callback=advance,
                )
                for i in range(0, len(generators), batch_size)
            ]
            joined = [
                tuple(torch.cat(tensors) for tensors in zip(*sides, strict=True))
                for sides in zip(*parts, strict=True)
            ]
            return Redrawn(*joined)

        def show(eps: Latents) -> Tensor:
            parts = zip(*(e.split(batch_size) for e in eps), strict=True)
            return torch.cat([to_uint8(prior.images(p, temperature)).cpu() for p in parts])

        if images is None:
            # the samples that `ebm-prior sample` draws from these seeds
            own = [torch.Generator().manual_seed(seed) for seed in seeds]
            blank = torch.zeros((), device=prior.backbone.device, dtype=prior.backbone.dtype)
            sample = run(tuple(blank.expand(n, *g.shape) for g in groups), (), own)
        else:
            noise = infer(prior, images, seeds, temperature)
            sample = Redrawn(noise, noise)
        given = [show(eps)[:, None] for eps in sample]
        if images is not None:
            given = [torch.cat([images[:, None].cpu(), x], 1) for x in given]
        gaussian, energy = (tuple(e.repeat_interleave(redraws, 0) for e in eps) for eps in sample)
        found = []
        for held in keep:
            generators = [keyed_generator(seed, j) for seed in seeds for j in range(redraws)]
            drawn = run(energy, held, generators)
            before = tuple(
                base if group.name in held else new
                for group, base, new in zip(groups, gaussian, drawn.start, strict=True)
            )
            found.append(
                Level(
                    tuple(g.name for g in groups if g.name in held),
                    tuple(g.name for g in groups if g.name not in held),
                    show(before).unflatten(0, (n, redraws)),
                    show(drawn.end).unflatten(0, (n, redraws)),
                )
            )
    return Hierarchy(*given, tuple(found))
