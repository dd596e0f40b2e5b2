"""How the cost of sampling grows with steps K, latent groups and batch.

    python -m benchmarks.scaling [--repeats 5] [--json FILE]

A small relative of model A, one variable at a time; process CPU time, and operations counted.
The exponents are slopes of straight lines through the logarithms: 1 is proportional.
"""

from __future__ import annotations

import json
from pathlib import Path

import click
import numpy as np
import torch

from benchmarks.cost import flops
from benchmarks.models import nvae
from benchmarks.timing import cpu_model, interleaved, median
from ebm_prior import EnergyPrior, SamplerConfig
from ebm_prior.cpu import keep_freed_memory

BASE = {"steps": 4, "groups": 4, "batch": 8}
SWEEPS = {"steps": (2, 4, 8, 16), "groups": (2, 4, 8, 16), "batch": (4, 8, 16, 32)}


def sweep(variable: str, values: tuple[int, ...], width: int, repeats: int) -> dict:
    """CPU time and operations of chains at several values of one variable."""
    calls, priors = {}, {}
    for value in values:
        at = BASE | {variable: value}
        groups = at["groups"]
        if groups not in priors:
            torch.manual_seed(0)
            backbone = nvae(
                "A", num_groups_per_scale=groups, num_channels_enc=width, num_channels_dec=width
            )
            _ = backbone.fast
            priors[groups] = EnergyPrior.for_backbone(backbone)
        prior, start = priors[groups], priors[groups].noise(at["batch"])
        config = SamplerConfig("langevin", at["steps"], 0.01)
        calls[str(value)] = lambda p=prior, s=start, c=config: p.run_chain(s, c)
    times = median(interleaved(calls, repeats))
    counted = {name: flops(call) for name, call in calls.items()}
    return {
        "variable": variable,
        "values": values,
        "cpu_ms": list(times.values()),
        "gflop": [n / 1e9 for n in counted.values()],
        "time_exponent": exponent(values, list(times.values())),
        "flop_exponent": exponent(values, list(counted.values())),
    }


def exponent(x: tuple[int, ...], y: list[float]) -> float:
    """The p of the power law y = c x^p that fits best, in logarithms."""
    return float(np.polyfit(np.log(x), np.log(y), 1)[0])


@click.command()
@click.option("--width", default=32, show_default=True, help="Channels at full resolution.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--threads", default=1, show_default=True)
@click.option("--json", "out", type=click.Path(), help="Also write all numbers to this file.")
def main(width: int, repeats: int, threads: int, out: str | None) -> None:
    """Sweep steps, groups and batch."""
    keep_freed_memory()
    torch.set_num_threads(threads)
    base = ", ".join(f"{value} {name}" for name, value in BASE.items())
    click.echo(f"{cpu_model()}; else {base}; CPU ms of a whole chain")
    found = [sweep(variable, values, width, repeats) for variable, values in SWEEPS.items()]
    for row in found:
        cells = zip(row["values"], row["cpu_ms"], strict=True)
        click.echo(
            f"{row['variable']:<8}"
            + "".join(f"{f'{value}: {ms:.0f}':>12}" for value, ms in cells)
            + f"   time ~ {row['variable']}^{row['time_exponent']:.2f}, "
            f"operations ~ {row['variable']}^{row['flop_exponent']:.2f}"
        )
    if out is not None:
        result = {"machine": cpu_model(), "base": BASE, "sweeps": found}
        Path(out).write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
