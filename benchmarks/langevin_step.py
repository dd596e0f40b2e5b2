"""One Langevin step through a frozen NVAE: this package against the form as published.

    python -m benchmarks.langevin_step [--model A] [--batch 8] [--threads 1] [--json FILE]

Forms, all with the same heads:
    published  the whole network as the public trainer runs it (`benchmarks.published`)
    ours       `EnergyPrior.log_density`
    chunked    the same, the gradient of a quarter of the batch at a time
    bf16       the same, the top-down pass in bfloat16

Time is that of the process's processors, forms interleaved, medians of the rounds' ratios, with
freed memory kept as the command line keeps it. Peak memory is what a step adds to a process of
its own (Linux). The floors are of time that no form can go below: all operations that are
needed, at the rate of a large matrix product; and ours' convolutions alone, each timed by
itself, forward and backward.
"""

from __future__ import annotations

import copy
import ctypes
import json
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import click
import torch
from torch import Tensor, nn

from backbones.nvae.frozen import FrozenConv2d
from benchmarks.cost import flops, saved_bytes
from benchmarks.models import nvae
from benchmarks.published import Published
from benchmarks.timing import cpu_model, interleaved, median, ratios
from ebm_prior import EnergyPrior, load_backbone
from ebm_prior.cpu import keep_freed_memory
from ebm_prior.langevin import flatten, value_and_grad
from ebm_prior.micro_batch import MicroBatched

FORMS = ("published", "ours", "chunked", "bf16")


def open_prior(model: str, heads: str, ckpt: str | None = None) -> EnergyPrior:
    """Untrained heads on a random model, or on a checkpoint."""
    torch.manual_seed(0)
    backbone = load_backbone("nvae", ckpt) if ckpt else nvae(model)
    _ = backbone.fast
    prior = EnergyPrior.for_backbone(backbone, heads)
    prior.heads.requires_grad_(False)
    return prior


def log_density(prior: EnergyPrior, form: str, batch: int) -> Callable:
    """The form's log-density."""
    if form == "published":
        return Published(prior)
    if form == "chunked":
        return MicroBatched(prior.log_density, parted(batch))
    prior = copy.copy(prior)  # the same weights
    prior.precision = "bf16" if form == "bf16" else "fp32"
    prior.compiled = form == "compiled"
    return prior.log_density


def compare(prior: EnergyPrior, batch: int, repeats: int) -> list[dict]:
    """Time and operations of one step of each form."""
    flat, unflatten = flatten(prior.noise(batch))
    functions = {form: log_density(prior, form, batch) for form in FORMS}
    calls = {
        form: lambda function=function: value_and_grad(function, flat, unflatten)
        for form, function in functions.items()
    }
    times = interleaved(calls, repeats)
    milliseconds, gains = median(times), ratios(times, "published")
    two, _ = flatten(prior.noise(2))
    return [
        {
            "form": form,
            "cpu_ms": milliseconds[form],
            "speed_up": gains[form],
            "gflop": flops(call) / 1e9,
            "saved_mib": saved_bytes(functions[form], two, unflatten)
            * (part_of(batch) if form == "chunked" else batch)
            / 2**20,
        }
        for form, call in calls.items()
    ]


def parted(batch: int) -> SimpleNamespace:
    """Owner of a micro-batch, without a backbone that could save memory otherwise."""
    unable = SimpleNamespace(checkpointing=None)
    return SimpleNamespace(micro_batch=part_of(batch), backbone=unable)


def part_of(batch: int) -> int:
    """Samples at a time of the form `chunked`."""
    return max(batch // 4, 1)


def floors(prior: EnergyPrior, batch: int, gflop: float, repeats: int) -> dict[str, float]:
    """Milliseconds: needed operations at a matrix product's rate; the convolutions alone."""
    rate = matrix_rate(repeats)
    return {
        "sgemm_gflops": rate / 1e9,
        "arithmetic_ms": 1e12 * gflop / rate,
        "convolutions_ms": 1e3 * convolution_time(prior, batch, repeats),
    }


def matrix_rate(repeats: int) -> float:
    """Operations per second of a large matrix product on the CPU."""
    square = torch.randn(1024, 1024)
    return 2 * len(square) ** 3 / best(lambda: square @ square, repeats)


def convolution_time(prior: EnergyPrior, batch: int, repeats: int) -> float:
    """Seconds of all convolutions of one step, forward and back to their inputs, as ours go."""
    uses: Counter = Counter()
    kinds: dict[tuple, tuple[nn.Conv2d, Tensor]] = {}

    def note(conv: nn.Conv2d, inputs: tuple[Tensor, ...], _: Tensor) -> None:
        x = conv.entering(*inputs) if isinstance(conv, FrozenConv2d) else inputs[0]
        shape = tuple(x.shape)
        kind = (shape, conv.out_channels, conv.kernel_size, conv.stride, conv.groups)
        uses[kind] += 1
        kinds[kind] = (conv, x.detach().clone())

    def run(conv: nn.Conv2d, x: Tensor) -> None:
        if isinstance(conv, FrozenConv2d):
            with torch.no_grad():
                y = conv.convolve(x, conv.weight, conv.bias)
                conv.adjoint(torch.ones_like(y), conv.weight, x.shape)
        else:
            y = conv(x.requires_grad_())
            torch.autograd.grad(y, x, torch.ones_like(y))

    modules = [*prior.backbone.fast.modules(), *prior.heads.modules()]
    hooks = [m.register_forward_hook(note) for m in modules if isinstance(m, nn.Conv2d)]
    with torch.no_grad():
        prior.energy_of_noise(prior.noise(batch))
    for hook in hooks:
        hook.remove()
    return sum(uses[kind] * best(lambda k=kind: run(*kinds[k]), repeats) for kind in kinds)


def best(call: Callable, repeats: int, clock: Callable[[], float] = time.process_time) -> float:
    """Shortest of several times, seconds: a floor is not of an average day."""
    return min(interleaved({"": call}, repeats, clock)[""])


def peak_memory(model: str, heads: str, ckpt: str | None, form: str, batch: int) -> float | None:
    """MiB that two steps add to a fresh process; None where the system does not tell."""
    arguments = json.dumps([model, heads, ckpt, form, batch])
    command = [sys.executable, "-m", "benchmarks.langevin_step", "--peak-of", arguments]
    root = Path(__file__).parent.parent
    out = subprocess.run(command, check=True, capture_output=True, text=True, cwd=root).stdout
    return json.loads(out)


def peak_here(model: str, heads: str, ckpt: str | None, form: str, batch: int) -> float | None:
    """The same of this process."""
    prior = open_prior(model, heads, ckpt)
    flat, unflatten = flatten(prior.noise(batch))
    function = log_density(prior, form, batch)
    value_and_grad(function, flat[:1], unflatten)  # what libraries set up once is not a step's
    try:
        ctypes.CDLL(None).malloc_trim(0)  # nor may a step live on what building has freed
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = status("VmRSS")
    except (OSError, AttributeError):
        return None
    for _ in range(2):
        value_and_grad(function, flat, unflatten)
    return status("VmHWM") - before


def status(field: str) -> float:
    """A memory field of /proc/self/status, MiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line.split()[1] for line in lines if line.startswith(field))) / 1024


def show(row: dict) -> None:
    """One line of the table."""
    peak = "-" if row["peak_mib"] is None else f"{row['peak_mib']:.0f}"
    click.echo(
        f"{row['model']:<12}{row['batch']:>6}{row['threads']:>8}  {row['form']:<10}"
        f"{row['cpu_ms']:>9.1f}{row['speed_up']:>8.2f}x{row['gflop']:>8.2f}{row['saved_mib']:>8.0f}{peak:>8}"
    )


@click.command()
@click.option(
    "--model", "models", multiple=True, type=click.Choice(["A", "B"]), default=["A", "B"]
)
@click.option("--ckpt", metavar="FILE", help="An NVAE checkpoint in place of the models.")
@click.option("--batch", "batches", multiple=True, type=int, default=[8, 16], show_default=True)
@click.option("--threads", multiple=True, type=int, default=[1, 2], show_default=True)
@click.option("--heads", default="factorized", show_default=True)
@click.option("--repeats", default=7, show_default=True)
@click.option("--json", "out", type=click.Path(), help="Also write all numbers to this file.")
@click.option("--peak-of", hidden=True)
def main(
    models: tuple[str, ...],
    ckpt: str | None,
    batches: tuple[int, ...],
    threads: tuple[int, ...],
    heads: str,
    repeats: int,
    out: str | None,
    peak_of: str | None,
) -> None:
    """Compare the forms of one Langevin step."""
    if peak_of is not None:
        click.echo(json.dumps(peak_here(*json.loads(peak_of))))
        return
    keep_freed_memory()
    result = {"machine": cpu_model(), "heads": heads, "repeats": repeats, "began": time.time()}
    rows, bounds = [], []
    click.echo(f"{cpu_model()}; {heads} heads, median of {repeats} rounds")
    click.echo(
        f"{'model':<12}{'batch':>6}{'threads':>8}  {'form':<10}{'CPU ms':>9}{'speed':>9}"
        f"{'GFLOP':>8}{'saved':>8}{'peak':>8}   (MiB)"
    )
    for model in [Path(ckpt).parent.name] if ckpt else models:
        prior = open_prior(model, heads, ckpt)
        for batch in batches:
            peaks = {form: peak_memory(model, heads, ckpt, form, batch) for form in FORMS}
            for count in threads:
                torch.set_num_threads(count)
                where = {"model": model, "batch": batch, "threads": count}
                for row in compare(prior, batch, repeats):
                    rows.append(where | row | {"peak_mib": peaks[row["form"]]})
                    show(rows[-1])
                needed = next(r["gflop"] for r in reversed(rows) if r["form"] == "ours")
                floor = where | floors(prior, batch, needed, min(repeats, 3))
                bounds.append(floor)
                click.echo(
                    f"  floors: {floor['arithmetic_ms']:.1f} ms at {floor['sgemm_gflops']:.0f} "
                    f"GFLOP/s, {floor['convolutions_ms']:.1f} ms for the convolutions alone"
                )
    if out is not None:
        Path(out).write_text(json.dumps(result | {"forms": rows, "floors": bounds}, indent=1))


if __name__ == "__main__":
    main()
