"""Memory of one Langevin step: what is estimated, what tensors take, what the process takes.

    python -m benchmarks.memory [--batch 16] [--no-measure] MODEL ...

MODELs are those of `benchmarks.models`, with random weights; `celeba_256` is the 36-group NVAE
of 256x256 images. Columns, in MiB but for the ratio:
    estimate    what `ebm_prior.memory.saved_bytes` says of one chain, times the batch
    tensors     peak of all tensors of the step, counted on the meta device: no noise, no work
    ratio       of these two
    again       the same peak with `Backbone.checkpointing`, computing again
    weights     of the network as loaded and in the form that chains evaluate, with the heads
    process     what a step adds to a process of its own on this CPU (Linux; not of big models)
"""

from __future__ import annotations

import click
import torch

from benchmarks.cost import peak_bytes, saved_bytes
from benchmarks.langevin_step import open_prior, peak_memory
from benchmarks.models import MODELS
from ebm_prior.langevin import flatten, value_and_grad

MIB = 2**20


def count(model: str, heads: str, batch: int) -> dict[str, float]:
    """All columns but the last, MiB."""
    prior = open_prior(model, heads)
    backbone, fast = prior.backbone, prior.backbone.fast
    prior.to("meta")
    backbone._fast = (fast.to("meta"),)
    flat, unflatten = flatten(prior.noise(batch))
    tensors = [t for m in (prior, fast) for t in (*m.parameters(), *m.buffers())]

    def peak() -> float:
        return peak_bytes(lambda: value_and_grad(prior.log_density, flat, unflatten)) / MIB

    row = {"estimate": batch * saved_bytes(prior.log_density, flat, unflatten) / MIB}
    row["tensors"] = peak()
    row["ratio"] = row["tensors"] / row["estimate"]
    backbone.checkpointing = True
    return row | {"again": peak(), "weights": sum(t.nbytes for t in tensors) / MIB}


@click.command()
@click.argument("models", nargs=-1, required=True, type=click.Choice(sorted(MODELS)))
@click.option("--batch", default=16, show_default=True)
@click.option("--heads", default="both", show_default=True)
@click.option("--measure/--no-measure", default=True, help="Run a step, too.")
def main(models: tuple[str, ...], batch: int, heads: str, measure: bool) -> None:
    """Print the table."""
    torch.set_num_threads(1)
    click.echo(
        f"batch {batch}, {heads} heads (MiB)\n"
        f"{'model':<12}{'estimate':>10}{'tensors':>10}{'ratio':>7}"
        f"{'again':>9}{'weights':>9}{'process':>9}"
    )
    for model in models:
        row = count(model, heads, batch)
        peak = peak_memory(model, heads, None, "ours", batch) if measure else None
        measured = "-" if peak is None else f"{peak:.0f}"
        click.echo(
            f"{model:<12}{row['estimate']:>10.0f}{row['tensors']:>10.0f}{row['ratio']:>7.2f}"
            f"{row['again']:>9.0f}{row['weights']:>9.0f}{measured:>9}"
        )


if __name__ == "__main__":
    main()
