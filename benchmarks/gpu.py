"""One Langevin step of the public GPU configurations on a CUDA device.

    python -m benchmarks.gpu [--model cifar10] [--batch 16] [--json FILE]

The forms of `benchmarks.langevin_step`, and `compiled`: ours with `prior.compiled`. Wall time
with the device synchronised, peak memory as CUDA's allocator counts it. Without a
CUDA device it says so and measures nothing.
"""

from __future__ import annotations

import json
import time
from pathlib import Path

import click
import torch

from benchmarks import langevin_step
from benchmarks.langevin_step import log_density
from benchmarks.models import MODELS, nvae
from benchmarks.timing import interleaved, median, ratios
from ebm_prior import EnergyPrior
from ebm_prior.langevin import flatten, value_and_grad

FORMS = (*langevin_step.FORMS, "compiled")


def synchronised() -> float:
    """Seconds, once the device has done all it was asked to."""
    torch.cuda.synchronize()
    return time.perf_counter()


def measure(model: str, batch: int, repeats: int) -> list[dict]:
    """Time and peak memory of one step of each form."""
    torch.manual_seed(0)
    backbone = nvae(model, "cuda")
    _ = backbone.fast
    prior = EnergyPrior.for_backbone(backbone)
    prior.heads.requires_grad_(False)
    flat, unflatten = flatten(prior.noise(batch))
    functions = {form: log_density(prior, form, batch) for form in FORMS}
    calls = {
        form: lambda function=function: value_and_grad(function, flat, unflatten)
        for form, function in functions.items()
    }
    times = interleaved(calls, repeats, synchronised)
    milliseconds, gains = median(times), ratios(times, "published")
    rows = []
    for form in FORMS:
        function = log_density(prior, form, batch)  # anew: the old one holds its last image
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        value_and_grad(function, flat, unflatten)
        rows.append(
            {
                "model": model,
                "batch": batch,
                "form": form,
                "ms": milliseconds[form],
                "speed_up": gains[form],
                "peak_mib": (torch.cuda.max_memory_allocated() - before) / 2**20,
            }
        )
    return rows


@click.command()
@click.option(
    "--model", "models", multiple=True, type=click.Choice(list(MODELS)),
    default=["cifar10", "celeba_256"], show_default=True,
)  # fmt: skip
@click.option("--batch", "batches", multiple=True, type=int, default=[4, 16], show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--json", "out", type=click.Path(), help="Also write all numbers to this file.")
def main(models: tuple[str, ...], batches: tuple[int, ...], repeats: int, out: str | None) -> None:
    """Compare the forms of one Langevin step on a CUDA device."""
    if not torch.cuda.is_available():
        click.echo("no CUDA device: nothing measured")
        return
    device = torch.cuda.get_device_name()
    click.echo(f"{device}, torch {torch.__version__}; median of {repeats} rounds")
    click.echo(f"{'model':<12}{'batch':>6}  {'form':<10}{'ms':>9}{'speed':>9}{'peak MiB':>10}")
    rows = []
    for model in models:
        for batch in batches:
            for row in measure(model, batch, repeats):
                rows.append(row)
                click.echo(
                    f"{model:<12}{batch:>6}  {row['form']:<10}{row['ms']:>9.1f}"
                    f"{row['speed_up']:>8.2f}x{row['peak_mib']:>10.0f}"
                )
    if out is not None:
        Path(out).write_text(json.dumps({"device": device, "forms": rows}, indent=1))


if __name__ == "__main__":
    main()
