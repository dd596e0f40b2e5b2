"""Does the form that chains evaluate agree with the plain one?

    python -m benchmarks.fast_form FOLDER [FOLDER ...]

FOLDERs as for `benchmarks.parity`. An NVAE's fast form is its network as plain convolutions;
BIVA's and HVAE's weights are plain from loading on, so that there it is only the single
top-down pass that serves latents and features. Prints, per checkpoint and type, the largest
difference of latents, energies and the energy's gradient, as a share of the largest value.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import torch
from torch import Tensor

from ebm_prior import Backbone, EnergyPrior
from ebm_prior.langevin import flatten, value_and_grad


def differences(backbone: Backbone, batch: int = 3, seed: int = 0) -> dict[str, float]:
    """Largest difference of each result between the two forms, as a share of its largest value.

    Args:
        backbone: With heads of its own, random, on every group and on the features.
        batch: Samples.
        seed: Of heads and samples.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        prior = EnergyPrior.for_backbone(backbone, heads="both", nef=8, ndf=16)
    prior.heads.requires_grad_(False)
    flat, unflatten = flatten(prior.noise(batch, torch.Generator().manual_seed(seed)))

    def results(energy) -> dict[str, Tensor]:
        value, gradient = value_and_grad(energy, flat, unflatten)
        with torch.no_grad():
            z = flatten(backbone.transform(unflatten(flat)))[0]
        return {"latents": z, "energies": value, "gradient": gradient}

    fast = results(prior.energy_of_noise)
    if hasattr(backbone, "network") and hasattr(backbone.network, "folded"):
        backbone._fast = (backbone.network,)
    plain = results(lambda eps: prior.energy(backbone.transform(eps)))
    if hasattr(backbone, "refold"):
        backbone.refold()
    return {
        name: ((fast[name] - value).abs().max() / value.abs().max()).item()
        for name, value in plain.items()
    }


def main() -> int:
    """Print the table."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    print(f"{'checkpoint':<44}{'type':>9}{'latents':>10}{'energies':>10}{'gradient':>10}")
    for folder in map(Path, sys.argv[1:]):
        family = folder.resolve().parent.name
        load = importlib.import_module(f"backbones.{family}").load
        for checkpoint in sorted(folder.glob("c*k*pt*")):
            for dtype in (torch.float32, torch.float64):
                found = differences(load(checkpoint).to(dtype))
                label = f"{family}/{folder.name}/{checkpoint.name}"
                cells = "".join(f"{value:>10.1e}" for value in found.values())
                print(f"{label:<44}{str(dtype).removeprefix('torch.'):>9}{cells}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
