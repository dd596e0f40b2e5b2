"""One Langevin step through a frozen NVAE: this package against the form as published.

    python benchmarks/langevin_step.py [--ckpt FILE] [--batch 32] [--repeats 9] [--json]

`published` runs the whole network with its batch norms and normalised weights, decodes the
image at every step and differentiates log p(z) along with the energy, as the public trainer
does. `plain` leaves the decoder out and uses the paper's score, -eps. `ours` is
`EnergyPrior.energy_of_noise` on the folded network. All three read the same joint head.
Interleaved, process CPU time, median of the per-repeat ratios.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable

import click
import torch

from backbones.nvae.network import TOP_SIGMA, log_normal
from ebm_prior import EnergyPrior, load_backbone
from ebm_prior.langevin import flatten, value_and_grad


def published(prior: EnergyPrior, eps: tuple, decode: bool, z_space: bool) -> torch.Tensor:
    """Log-density through the unfolded network: (B,)."""
    network = prior.backbone.network
    z, log_p = [], []

    def draw(index: int, state: torch.Tensor) -> torch.Tensor:
        if index == 0:
            mu, sigma = torch.zeros_like(eps[0]), torch.full_like(eps[0], TOP_SIGMA)
        else:
            mu, sigma = network.prior_params(index, state)
        z.append(mu + sigma * eps[index])
        if z_space:
            log_p.append(log_normal(z[-1], mu, sigma))
        return z[-1]

    features = network.descend(draw)
    if decode:
        network.decode(features)
    gaussian = sum(log_p) if z_space else -sum(e.square().flatten(1).sum(1) for e in eps) / 2
    return gaussian - prior.energies_of(prior.head_inputs(z, features)).sum(1)


@click.command()
@click.option("--ckpt", default="checkpoints/nvae_mnist/checkpoint.pt", show_default=True)
@click.option("--batch", default=32, show_default=True)
@click.option("--repeats", default=9, show_default=True)
@click.option("--json", "as_json", is_flag=True)
def main(ckpt: str, batch: int, repeats: int, as_json: bool) -> None:
    """Time one step of each form."""
    prior = EnergyPrior.for_backbone(load_backbone("nvae", ckpt), heads="joint")
    prior.heads.requires_grad_(False)
    flat, unflatten = flatten(prior.noise(batch))
    forms: dict[str, Callable] = {
        "published": lambda eps: published(prior, eps, decode=True, z_space=True),
        "plain": lambda eps: published(prior, eps, decode=False, z_space=False),
        "ours": prior.log_density,
    }
    difference = (
        (
            value_and_grad(forms["plain"], flat, unflatten)[1]
            - value_and_grad(forms["ours"], flat, unflatten)[1]
        )
        .abs()
        .max()
        .item()
    )
    times: dict[str, list[float]] = {name: [] for name in forms}
    for repeat in range(repeats + 1):
        for name, form in forms.items():
            began = time.process_time()
            value_and_grad(form, flat, unflatten)
            if repeat:  # the first round warms up
                times[name].append(time.process_time() - began)
    ratios = {
        name: statistics.median(
            a / b for a, b in zip(times["published"], times[name], strict=True)
        )
        for name in forms
    }
    result = {
        "batch": batch,
        "threads": torch.get_num_threads(),
        "median_cpu_ms": {n: 1e3 * statistics.median(t) for n, t in times.items()},
        "speed_up_over_published": ratios,
        "largest_gradient_difference": difference,
    }
    if as_json:
        click.echo(json.dumps(result))
        return
    for name, ratio in ratios.items():
        click.echo(f"{name:10} {result['median_cpu_ms'][name]:8.1f} ms CPU   {ratio:5.2f}x")
    click.echo(f"gradients of plain and ours differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
