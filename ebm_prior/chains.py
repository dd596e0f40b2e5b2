"""Long chains: scalars of every step, images and latents of a few.

Sec. 5.4 and Fig. 8 of the paper run 2500 steps with heads that were trained on 40.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.diagnostics import MIN_DRAWS, Mixing, directions, mixing
from ebm_prior.errors import EbmPriorError
from ebm_prior.images import to_uint8
from ebm_prior.langevin import StepInfo, flatten
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.sampling import seeded_batches
from ebm_prior.transitions import TRANSITIONS

__all__ = ["LongChains", "long_chains"]

LATENTS_AT = (0, 10, 20, 40)  # Fig. 2
SETTLED = 100  # steps; the energy is judged after these, or after half of fewer than 200
PROJECTIONS = 4
CURVE = 100  # points of a stored curve, evenly spaced, and as many again that crowd early


@dataclass(frozen=True, eq=False)
class LongChains:
    """What is kept of chains: scalars of every step, pictures of a few.

    Attributes:
        config: Transition, steps and step size.
        energy: E at every step, the start first, (steps + 1, N), nats.
        half_norm: |eps|^2 / 2 likewise.
        projections: <u, eps> likewise, (steps + 1, N, directions).
        accepted: Share of chains that moved at each step, (steps,).
        images: Decoder means at the chosen steps, (N, C, H, W), uint8.
        latents: z of every group of two units at the steps of Fig. 2, (N, 2), by step and
            by group.
        z: Latents of all groups side by side at the chosen steps, (M, D), where they were
            asked for; of the first chains only where memory is short.
    """

    config: SamplerConfig
    energy: np.ndarray
    half_norm: np.ndarray
    projections: np.ndarray
    accepted: np.ndarray
    images: dict[int, Tensor]
    latents: dict[int, dict[str, np.ndarray]]
    z: dict[int, Tensor] = field(default_factory=dict)

    @property
    def settled(self) -> int:
        """Steps that count as the way there."""
        return min(SETTLED, self.config.steps // 2)

    @property
    def acceptance(self) -> float:
        """Share of accepted proposals once settled."""
        return float(self.accepted[self.settled :].mean())

    @property
    def cost(self) -> tuple[int, str]:
        """Gradients of one chain's energy, once settled, or energies where it takes none."""
        steps, each = self.config.steps - self.settled, TRANSITIONS[self.config.transition]
        return (steps * each.gradients, "gradients") if each.gradients else (steps, "energies")

    def energy_band(self) -> dict[str, float]:
        """Least and largest mean energy of the chains once settled, nats, and its drift.

        The drift is the mean over the last quarter of these steps minus that over the first,
        in standard deviations of E over chains and steps: E has no zero to compare with.
        """
        rest = self.energy[self.settled + 1 :]
        mean, quarter = rest.mean(1), max(len(rest) // 4, 1)
        change = mean[-quarter:].mean() - mean[:quarter].mean()
        return {
            "low": float(mean.min()),
            "high": float(mean.max()),
            "drift": float(change / max(rest.std(), 1e-12)),
        }

    def mixing(self) -> dict[str, Mixing]:
        """Diagnostics of each summary once settled."""
        traces = {"energy": self.energy, "half norm": self.half_norm}
        for i in range(self.projections.shape[2]):
            traces[f"projection {i + 1}"] = self.projections[..., i]
        return mixing({name: trace[self.settled + 1 :] for name, trace in traces.items()})

    def curve(self) -> dict[str, list[float]]:
        """Median and 5-95 % band of the energy over the chains, thinned to some 200 steps."""
        last = self.config.steps
        steps = np.concatenate(
            [[0], np.geomspace(1, last, CURVE), np.linspace(0, last, CURVE)]
        ).round()
        steps = np.unique(steps.astype(int))
        low, median, high = np.quantile(self.energy[steps], [0.05, 0.5, 0.95], axis=1)
        named = {"step": steps, "low": low, "median": median, "high": high}
        return {name: np.round(values, 4).tolist() for name, values in named.items()}


class _Recorder:
    """Callback of `seeded_batches` that keeps what `LongChains` is made of.

    Args:
        prior: Prior that is sampled.
        config: Of the chains.
        at: Steps whose images are kept.
        temperature: Of the prior.
        keep_z: Of how many chains all latents are kept at these steps.
    """

    def __init__(
        self,
        prior: EnergyPrior,
        config: SamplerConfig,
        at: Sequence[int],
        temperature: float,
        keep_z: int,
    ) -> None:
        self.prior, self.config, self.at, self.temperature = prior, config, set(at), temperature
        groups = enumerate(prior.backbone.groups)
        self.planar = [(i, g.name) for i, g in groups if g.numel == 2]
        units = sum(group.numel for group in prior.backbone.groups)
        self.directions = directions(units, PROJECTIONS).to(
            prior.backbone.device, prior.backbone.dtype
        )
        self.rows: list[np.ndarray] = []  # of the batch that runs
        self.scalars: list[np.ndarray] = []  # of the batches that are done
        self.accepted = np.zeros(config.steps)
        self.images: dict[int, list[Tensor]] = {}
        self.latents: dict[int, dict[str, list[Tensor]]] = {}
        self.keep_z, self.z = keep_z, dict[int, list[Tensor]]()

    def __call__(self, info: StepInfo) -> None:
        self.accepted[info.step - 1] += info.accepted.sum().item()
        self.rows.append(self.measure(info.step, info.eps, info.energy))

    def close(self, start: Latents) -> None:
        """Add the start, once a batch is done."""
        rows = [self.measure(0, start, None), *self.rows]
        self.scalars.append(np.stack(rows))
        self.rows = []

    @torch.no_grad()
    def measure(self, step: int, eps: Latents, energy: Tensor | None) -> np.ndarray:
        """Scalars of the batch, (B, 2 + directions), and its pictures if they are wanted."""
        if energy is None:
            energy = self.prior.energy_of_noise(eps, self.temperature)
        flat = flatten(eps)[0]
        half_norm = flat.square().sum(1) / 2
        scalars = torch.cat([torch.stack([energy, half_norm], 1), flat @ self.directions], 1)
        if not scalars.isfinite().all():
            raise EbmPriorError(
                f"{self.config.transition} chains diverged at step {step}: take a step size "
                f"below {self.config.step_size:.3g}"
            )
        if step in self.at:
            images = to_uint8(self.prior.images(eps, self.temperature)).cpu()
            self.images.setdefault(step, []).append(images)
            kept = self.z.setdefault(step, [])
            if (missing := self.keep_z - sum(map(len, kept))) > 0:
                z = self.prior.backbone.transform([e[:missing] for e in eps], self.temperature)
                kept.append(flatten(z)[0].cpu())
        if step in LATENTS_AT and self.planar:
            z = self.prior.backbone.transform(eps, self.temperature)
            found = self.latents.setdefault(step, {name: [] for _, name in self.planar})
            for i, name in self.planar:
                found[name].append(z[i].flatten(1).cpu())
        return scalars.cpu().double().numpy()

    def result(self) -> LongChains:
        """All batches, side by side."""
        scalars = np.concatenate(self.scalars, 1)
        return LongChains(
            self.config,
            scalars[..., 0],
            scalars[..., 1],
            scalars[..., 2:],
            self.accepted / scalars.shape[1],
            {step: torch.cat(self.images[step]) for step in sorted(self.images)},
            {
                step: {name: torch.cat(z).numpy() for name, z in self.latents[step].items()}
                for step in sorted(self.latents)
            },
            {step: torch.cat(self.z[step]) for step in sorted(self.z)} if self.keep_z else {},
        )


def long_chains(
    prior: EnergyPrior,
    seeds: Sequence[int],
    config: SamplerConfig,
    *,
    at: Sequence[int] = (),
    temperature: float = 1.0,
    batch_size: int = 100,
    keep_z: int = 0,
) -> LongChains:
    """Run one chain per seed and keep its scalars at every step, images at a few.

    Args:
        prior: Energy prior to sample.
        seeds: One per chain, which depends on its own seed alone.
        config: Transition, steps and step size.
        at: Steps whose images are kept; 0 is the start, a sample of the Gaussian prior.
        temperature: Multiplies every prior sigma.
        batch_size: Chains run together; changes results by rounding only.
        keep_z: Of how many chains, the first ones, all latents are kept at these steps.

    Raises:
        EbmPriorError: If the chains are too short to be judged, or diverge.
    """
    if config.steps < 2 * MIN_DRAWS:
        raise EbmPriorError(f"long chains have at least {2 * MIN_DRAWS} steps")
    if wrong := [step for step in at if not 0 <= step <= config.steps]:
        raise EbmPriorError(f"no step {wrong[0]}: the chains have {config.steps}, from 0")
    recorder = _Recorder(prior, config, at, temperature, keep_z)
    for batch in seeded_batches(
        prior, seeds, config, batch_size=batch_size, temperature=temperature, callback=recorder
    ):
        recorder.close(batch.start)
    return recorder.result()
