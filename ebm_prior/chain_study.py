"""Long chains measured: does the energy settle, do images stay images, how fast do chains mix?

A prior that is well learned has, long after the steps it was trained on, a steady energy and
images that are neither saturated nor all alike (Sec. 5.4, Fig. 8). The same runs tell what a
transition is worth: effective samples per gradient.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass

from torch import Tensor

from ebm_prior.chains import LongChains, long_chains
from ebm_prior.diagnostics import Mixing
from ebm_prior.files import finite
from ebm_prior.memory import rows_in_memory
from ebm_prior.metrics import FeatureNetwork, FeatureStatistics, frechet_distance
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.tables import Table
from ebm_prior.two_sample import AggregatePosterior, TwoSample

__all__ = ["AT", "ChainStudy", "Pixels", "study"]

AT = (0, 40, 100, 500, 2500)
MAX_TESTED = 2000  # chains whose latents are tested: the cost is quadratic


@dataclass(frozen=True)
class Pixels:
    """What saturation looks like in numbers; 0 is black and 1 white.

    Attributes:
        extreme: Share of pixels that are black or white to 8 bits.
        mean: Of all pixels.
        std: Of all pixels.
    """

    extreme: float
    mean: float
    std: float

    @classmethod
    def of(cls, images: Tensor) -> Pixels:
        """Of uint8 images."""
        x = images.double() / 255
        extreme = ((images == 0) | (images == 255)).double().mean().item()
        return cls(extreme, x.mean().item(), x.std().item())


@dataclass(frozen=True, eq=False)
class ChainStudy:
    """Long chains of one or more transitions, measured.

    Attributes:
        runs: One per transition, all from the same noise.
        frechet: Distance to the held-out images by step, one dictionary per run; empty
            where there are none.
        data: Pixels of the held-out images, where there are any.
        reference_images: Their number.
        features: Name of the feature network behind the distances.
        two_sample: Latents at each step against draws of the aggregate posterior of the
            held-out images, as `frechet`.
        posterior_draws: Number of these draws.
    """

    runs: tuple[LongChains, ...]
    frechet: tuple[dict[int, float], ...]
    data: Pixels | None = None
    reference_images: int = 0
    features: str = ""
    two_sample: tuple[dict[int, TwoSample], ...] = ()
    posterior_draws: int = 0

    def to_dict(self) -> dict:
        """Plain values for JSON, a few kilobytes; None where a number does not exist."""
        runs = []
        for run, rows in zip(self.runs, self.along_the_way(), strict=True):
            found, (cost, unit) = run.mixing(), run.cost
            runs.append(
                {
                    "sampler": asdict(run.config),
                    "acceptance": run.acceptance,
                    "settled_after": run.settled,
                    "energy": run.energy_band(),
                    f"{unit}_per_chain": cost,
                    "ess": {name: finite(m.ess) for name, m in found.items()},
                    f"ess_per_1000_{unit}": {
                        name: finite(rate) for name, rate in ess_rates(run, found).items()
                    },
                    "rhat": {name: finite(m.rhat) for name, m in found.items()},
                    "at": [
                        {
                            "step": step,
                            "frechet": distance,
                            "energy_distance": test and test.distance,
                            "p_value": test and test.p_value,
                            **asdict(pixels),
                        }
                        for step, distance, test, pixels in rows
                    ],
                    "curve": run.curve(),
                }
            )
        return {
            "chains": self.runs[0].energy.shape[1],
            "features": self.features or None,
            "reference_images": self.reference_images,
            "posterior_draws": self.posterior_draws,
            "data": self.data and asdict(self.data),
            "runs": runs,
        }

    def along_the_way(self) -> list[list[tuple[int, float | None, TwoSample | None, Pixels]]]:
        """What is known of every step that is looked at, a list per run."""
        tests = self.two_sample or ({},) * len(self.runs)
        return [
            [(step, frechet.get(step), test.get(step), Pixels.of(x)) for step, x in images.items()]
            for images, frechet, test in zip(
                (run.images for run in self.runs), self.frechet, tests, strict=True
            )
        ]

    def tables(self) -> tuple[Table, ...]:
        """The transitions, and the images by step."""
        n, first = self.runs[0].energy.shape[1], self.runs[0]
        rows = []
        for run in self.runs:
            found = run.mixing()
            rates, band = ess_rates(run, found), run.energy_band()
            rows.append(
                (
                    run.config.transition,
                    f"{run.config.step_size:.3g}" if run.config.sized else "-",
                    f"{run.acceptance:.3f}",
                    f"{band['low']:.2f} .. {band['high']:.2f}",
                    f"{band['drift']:.2f}",
                    f"{known(max, (m.rhat for m in found.values())):.3f}",
                    f"{rates['energy']:.2f}",
                    f"{rates['half norm']:.2f}",
                    f"{known(min, rates.values()):.2f}",
                )
            )
        note = (
            "Mean energy: its range over the steps, nats; drift: its last quarter minus its "
            "first, in standard deviations of E; R-hat: the largest of all summaries; ESS per "
            "1000 gradients, slowest: the least of all summaries."
        )
        if any(run.cost[1] == "energies" for run in self.runs):
            note += (
                " sir: ESS per 1000 energies, which cost less than gradients; each chain is one "
                "sample, the better the longer, and no two halves of it have to agree."
            )
        transitions = Table(
            f"{n} chains of {first.config.steps} steps, judged after step {first.settled}",
            ("transition", "step size", "accepted", "mean energy", "drift", "R-hat", "ESS of E",
             "of |eps|^2", "slowest"),
            rows,
            note,
        )  # fmt: skip
        if not first.images:
            return (transitions,)
        shown = [
            (f"{run.config.transition}, step {step}", *rest)
            for run, rows in zip(self.runs, self.along_the_way(), strict=True)
            for step, *rest in rows
        ]
        if self.data is not None:
            shown.append(("held-out images", None, None, self.data))
        note = "Extreme: share of pixels that are black or white to 8 bits."
        if self.features:
            note += (
                f" Fréchet distance to {self.reference_images} held-out images; features: "
                f"{self.features}."
            )
        if self.posterior_draws:
            note += (
                f" Latents: energy distance D² of {len(first.z[min(first.z)])} chains to "
                f"{self.posterior_draws} draws of the aggregate posterior of held-out images, 0 "
                "where they are alike, each unit in its standard deviations; p by permutation."
            )
        images = Table(
            "Images and latents along the way",
            ("", "Fréchet", "latents D²", "p", "extreme", "mean", "std"),
            [
                (
                    label,
                    "-" if distance is None else f"{distance:.2f}",
                    *(
                        ("-", "-")
                        if test is None
                        else (f"{test.distance:.3f}", f"{test.p_value:.3f}")
                    ),
                    *(f"{value:.3f}" for value in (pixels.extreme, pixels.mean, pixels.std)),
                )
                for label, distance, test, pixels in shown
            ],
            note,
        )
        return transitions, images

    def table(self) -> str:
        """Small tables for the terminal."""
        return "\n\n".join(table.text() for table in self.tables())


def ess_rates(run: LongChains, found: dict[str, Mixing]) -> dict[str, float]:
    """Effective samples of each summary per 1000 gradients, or energies (`LongChains.cost`)."""
    total = run.cost[0] * run.energy.shape[1]
    return {name: 1000 * m.ess / total for name, m in found.items()}


def known(choose: Callable, values: Iterable[float]) -> float:
    """The least or largest of the values that exist, or NaN."""
    return choose((value for value in values if not math.isnan(value)), default=math.nan)


def study(
    prior: EnergyPrior,
    seeds: Sequence[int],
    configs: Sequence[SamplerConfig],
    *,
    at: Sequence[int] = AT,
    reference: Tensor | None = None,
    network: FeatureNetwork | None = None,
    temperature: float = 1.0,
    batch_size: int = 100,
) -> ChainStudy:
    """Run long chains of each sampler from the same noise and measure them.

    With held-out images, latents are compared with their aggregate posterior at every step.

    Args:
        prior: Fitted heads.
        seeds: One per chain.
        configs: Samplers to compare; their steps may differ.
        at: Steps whose images are kept and measured, as far as a chain goes.
        reference: Held-out images, uint8, (M, C, H, W).
        network: Feature network for Fréchet distances to these; needs two chains or more.
        temperature: Multiplies every prior sigma.
        batch_size: Chains run together; changes results by rounding only.
    """
    posterior, keep_z = None, 0
    if reference is not None and len(reference) > 3 and len(seeds) > 1:
        posterior = AggregatePosterior.of(prior, reference)
        sets = max(len(at), 1) * len(configs)
        keep_z = min(len(seeds), MAX_TESTED, rows_in_memory(posterior.draws.shape[1], sets))
    runs = tuple(
        long_chains(
            prior,
            seeds,
            config,
            at=[step for step in at if step <= config.steps],
            temperature=temperature,
            batch_size=batch_size,
            keep_z=keep_z,
        )
        for config in configs
    )
    nothing: tuple[dict, ...] = ({},) * len(runs)
    if reference is None:
        return ChainStudy(runs, nothing)
    return ChainStudy(
        runs,
        nothing if network is None else frechet_on_the_way(runs, reference, network),
        Pixels.of(reference),
        len(reference),
        "" if network is None else network.name,
        tuple({step: posterior.test(z) for step, z in run.z.items()} for run in runs),
        0 if posterior is None else len(posterior.draws),
    )


def frechet_on_the_way(
    runs: Sequence[LongChains], reference: Tensor, network: FeatureNetwork
) -> tuple[dict[int, float], ...]:
    """Distances of each run's images to the reference, by step."""
    want = FeatureStatistics.from_features(network(reference), network.name)
    found: list[dict[int, float]] = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for run in runs:
            features = {step: network(x) for step, x in run.images.items()}
            found.append(
                {
                    step: frechet_distance(want, FeatureStatistics.from_features(x, network.name))
                    for step, x in features.items()
                }
            )
    for message in sorted({str(warning.message) for warning in caught}):
        warnings.warn(message, stacklevel=3)  # once, not for every step of every run
    return tuple(found)
