"""One Langevin step of the public GPU configurations on a CUDA device.

    python -m benchmarks.gpu [--model cifar10] [--batch 16] [--json FILE]

The forms of `benchmarks.langevin_step`, and `compiled`: ours with `prior.compiled`. Wall time
with the device synchronised, peak memory as CUDA's allocator counts it, with what CUDA graphs keep
for themselves, and the needed operations as a share of what one large convolution reaches, in bf16
for the form `bf16`, else in TF32. A form that does not fit into the memory, or does not compile,
has no numbers. Without a CUDA device it says so and measures nothing. Fit iterations and samples
per second: `python -m benchmarks.throughput --device cuda`.
"""

from __future__ import annotations

import gc
import json
from collections.abc import Callable
from pathlib import Path

import click
import torch
from torch import Tensor

from benchmarks import langevin_step
from benchmarks.cost import needed_flops
from benchmarks.langevin_step import best, log_density
from benchmarks.models import MODELS, nvae
from benchmarks.published import Published
from benchmarks.timing import interleaved, median, ratios, synchronised
from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.langevin import flatten, value_and_grad
from ebm_prior.micro_batch import out_of_memory

FORMS = (*langevin_step.FORMS, "compiled")


def fits(call: Callable) -> bool:
    """Whether there is memory for a call."""
    try:
        call()
        return True
    except EbmPriorError:  # of a single chain
        return False
    except RuntimeError as error:
        if not out_of_memory(error):
            raise
        return False
    finally:
        torch.cuda.empty_cache()


def convolution_rate(dtype: torch.dtype, repeats: int) -> float:
    """Operations per second of a large 3x3 convolution."""
    shapes = (64, 256, 64, 64), (256, 256, 3, 3)
    x, weight = (
        torch.randn(s, device="cuda", dtype=dtype).to(memory_format=torch.channels_last)
        for s in shapes
    )
    each = best(lambda: torch.conv2d(x, weight, padding=1), repeats, synchronised)
    return 2 * x.numel() * weight[0].numel() / each  # as many outputs as inputs


def step_of(function: Callable, flat: Tensor, unflatten: Callable) -> Callable[[], None]:
    """A call that takes the gradient and leaves nothing behind for others to do without."""

    def call() -> None:
        value_and_grad(function, flat, unflatten)
        if isinstance(function, Published):
            function.logits = None  # which hold the decoder's activations

    return call


def graph_memory() -> int:
    """Bytes that CUDA graphs keep for themselves: a replay allocates nothing."""
    segments = torch.cuda.memory_snapshot()
    return sum(s["total_size"] for s in segments if tuple(s["segment_pool_id"]) != (0, 0))


def measure(model: str, batch: int, repeats: int) -> list[dict]:
    """Time and peak memory of one step of each form that fits."""
    torch.compiler.reset()  # the graphs of earlier models and batches, and their memory
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)
    backbone = nvae(model, "cuda")
    _ = backbone.fast
    prior = EnergyPrior.for_backbone(backbone)
    prior.heads.requires_grad_(False)
    flat, unflatten = flatten(prior.noise(batch))
    calls = {form: step_of(log_density(prior, form, batch), flat, unflatten) for form in FORMS}
    calls = {form: call for form, call in calls.items() if fits(call)}
    if not prior._compiled_energy.works:  # it has said why
        calls.pop("compiled", None)
    times = interleaved(calls, repeats, synchronised)
    milliseconds = median(times)
    gains = ratios(times, "published") if "published" in times else {}
    rates = {dtype: convolution_rate(dtype, repeats) for dtype in (torch.float32, torch.bfloat16)}
    needed, rows = needed_flops(prior) * batch, []
    for form, call in calls.items():
        rate = rates[torch.bfloat16 if form == "bf16" else torch.float32]
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        peak = torch.cuda.max_memory_allocated() - before
        peak += graph_memory() if form == "compiled" else 0
        rows.append(
            {
                "model": model,
                "batch": batch,
                "form": form,
                "ms": milliseconds[form],
                "speed_up": gains.get(form),
                "peak_share": needed / (milliseconds[form] / 1e3) / rate,
                "peak_mib": peak / 2**20,
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
    columns = f"{'ms':>9}{'speed':>9}{'of peak':>9}{'peak MiB':>10}"
    click.echo(f"{'model':<12}{'batch':>6}  {'form':<10}{columns}")
    rows = []
    for model in models:
        for batch in batches:
            for row in measure(model, batch, repeats):
                rows.append(row)
                speed = "-" if row["speed_up"] is None else f"{row['speed_up']:.2f}x"
                click.echo(
                    f"{model:<12}{batch:>6}  {row['form']:<10}{row['ms']:>9.1f}{speed:>9}"
                    f"{row['peak_share']:>9.1%}{row['peak_mib']:>10.0f}"
                )
    if out is not None:
        Path(out).write_text(json.dumps({"device": device, "forms": rows}, indent=1))


if __name__ == "__main__":
    main()
