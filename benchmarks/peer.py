"""The Langevin loop beside TorchEBM's on the very same density, if that is installed.

    python -m benchmarks.peer [--ckpt FILE] [--batch 16] [--steps 10]

What a step costs is the density and its gradient; this shows what the loop around it adds.
TorchEBM's step size is half of ours: x - eta grad U + sqrt(2 eta) n.
"""

from __future__ import annotations

from importlib.util import find_spec

import click
import torch
from torch import Tensor

from benchmarks.langevin_step import open_prior
from benchmarks.timing import cpu_model, interleaved, median, ratios
from ebm_prior import langevin
from ebm_prior.cpu import keep_freed_memory
from ebm_prior.langevin import flatten

STEP_SIZE = 0.01


@click.command()
@click.option("--ckpt", default="checkpoints/nvae_digits/checkpoint.pt", show_default=True)
@click.option("--batch", default=16, show_default=True)
@click.option("--steps", default=10, show_default=True)
@click.option("--repeats", default=7, show_default=True)
def main(ckpt: str, batch: int, steps: int, repeats: int) -> None:
    """Compare the two loops."""
    if find_spec("torchebm") is None:
        click.echo("torchebm is not installed: nothing compared (pip install torchebm)")
        return
    from torchebm.core import BaseModel
    from torchebm.samplers import LangevinDynamics

    keep_freed_memory()
    prior = open_prior("", "joint", ckpt)
    eps = prior.noise(batch)
    flat, unflatten = flatten(eps)

    class Energy(BaseModel):
        def forward(self, x: Tensor) -> Tensor:
            return -prior.log_density(unflatten(x))

    theirs = LangevinDynamics(Energy(), step_size=STEP_SIZE / 2, device="cpu")

    def run_ours() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        end = langevin(
            prior.log_density, eps, steps=steps, step_size=STEP_SIZE, generator=generator
        )
        return flatten(end)[0]

    def run_theirs() -> Tensor:
        generator = torch.Generator().manual_seed(0)
        return theirs.sample(x=flat.clone(), n_steps=steps, generator=generator)

    times = interleaved({"ours": run_ours, "torchebm": run_theirs}, repeats)
    milliseconds, gains = median(times), ratios(times, "torchebm")
    click.echo(f"{cpu_model()}; {steps} steps, batch {batch}, median of {repeats} rounds")
    for name, value in milliseconds.items():
        click.echo(f"{name:<10}{value:>9.1f} ms CPU{gains[name]:>8.2f}x")
    difference = (run_ours() - run_theirs()).abs().max().item()
    click.echo(f"last states from the same noise differ by at most {difference:.1e}")


if __name__ == "__main__":
    main()
