"""A fit iteration and sampling on a frozen NVAE: this package against the form as published.

    python -m benchmarks.throughput [--model A] [--batch 8] [--steps 5] [--device cpu]

Forms are those of `benchmarks.langevin_step`. An iteration is the paper's (Eq. 17): encode a
batch, run chains from noise, contrast the two, update the heads; latents at the chains' ends are
made by ours in every form. Samples are chains and the images at their ends. Time is that of the
process's processors, on another device wall time; forms interleaved, medians of the rounds'
ratios. The floor, on the CPU, is of the operations that the chains alone need, at the measured
rate of a large matrix product.
"""

from __future__ import annotations

import json
import time
from pathlib import Path
from unittest.mock import patch

import click
import torch
import torch.nn.functional as F

from benchmarks.cost import needed_flops
from benchmarks.langevin_step import log_density, matrix_rate
from benchmarks.models import MODELS, nvae
from benchmarks.published import Swish
from benchmarks.timing import cpu_model, interleaved, median, ratios, synchronised
from ebm_prior import EnergyPrior, langevin
from ebm_prior.backbone import Latents
from ebm_prior.cpu import keep_freed_memory
from ebm_prior.losses import contrastive_loss
from ebm_prior.prior import frozen

FORMS = ("published", "ours", "bf16")
STEP_SIZE = 1e-5  # the public setting; it costs what any other does
MANY = 50_000  # images of the usual protocol


class Work:
    """What is timed, in one form.

    Args:
        prior: Heads on an NVAE.
        form: A name in `FORMS`.
        batch: Chains, and images that are encoded.
        steps: Langevin steps.
    """

    def __init__(self, prior: EnergyPrior, form: str, batch: int, steps: int) -> None:
        self.prior, self.batch, self.steps = prior, batch, steps
        self.published = form == "published"
        self.density = log_density(prior, form, batch)
        self.optimizer = torch.optim.Adam(prior.heads.parameters(), lr=2e-5)
        # ours has a generator of the CPU, as `fit` and `sample` have
        self.generator = None if self.published else torch.default_generator
        backbone = prior.backbone
        self.x = torch.rand(batch, *backbone.image_shape, device=backbone.device)

    def chains(self) -> Latents:
        """Noise at the chains' ends."""
        start = self.prior.noise(self.batch, self.generator)
        with frozen(self.prior.heads):
            return langevin(
                self.density,
                start,
                steps=self.steps,
                step_size=STEP_SIZE,
                generator=self.generator,
            )

    @torch.no_grad()
    def posterior(self) -> Latents:
        """Posterior samples of the images."""
        backbone, noise = self.prior.backbone, self.prior.noise(self.batch, self.generator)
        if not self.published:
            return backbone.posterior(self.x, noise).z
        with patch.object(F, "silu", lambda x: Swish.apply(x)):
            groups, _ = backbone.network.infer(backbone._prepare(self.x), noise)
        return tuple(group.z for group in groups)

    def iteration(self) -> None:
        """One update of the heads."""
        positives, eps = self.posterior(), self.chains()
        with torch.no_grad():
            negatives = self.prior.backbone.transform(eps)
        loss = contrastive_loss(*map(self.prior.energies_of, (positives, negatives)))
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()

    @torch.no_grad()
    def samples(self) -> None:
        """A batch of images."""
        eps = self.chains()
        if self.published:
            self.density(eps)  # decodes them on the way
        else:
            self.prior.images(eps)


def measure(model: str, batch: int, steps: int, repeats: int, device: str) -> list[dict]:
    """Iterations and samples of all forms."""
    torch.manual_seed(0)
    backbone = nvae(model, device)
    _ = backbone.fast
    prior = EnergyPrior.for_backbone(backbone)
    works = {form: Work(prior, form, batch, steps) for form in FORMS}
    clock = time.process_time if device == "cpu" else synchronised
    # elsewhere the rate is another for every precision; `benchmarks.gpu` has the share
    floor = steps * batch * needed_flops(prior) / matrix_rate(repeats) if device == "cpu" else None
    rows = []
    for what in ("iteration", "samples"):
        calls = {form: getattr(work, what) for form, work in works.items()}
        times = interleaved(calls, repeats, clock)
        seconds, gains = median(times, 1), ratios(times, "published")
        rows += [
            {
                "model": model,
                "what": what,
                "form": form,
                "seconds": seconds[form],
                "speed_up": gains[form],
                "images_per_second": batch / seconds[form],
                "floor_share": floor and floor / seconds[form],
            }
            for form in FORMS
        ]
    return rows


@click.command()
@click.option("--model", "models", multiple=True, type=click.Choice(list(MODELS)), default=["A"])
@click.option("--batch", default=8, show_default=True)
@click.option("--steps", default=5, show_default=True, help="Langevin steps; 40 are usual.")
@click.option("--repeats", default=5, show_default=True)
@click.option("--device", default="cpu", show_default=True)
@click.option("--json", "out", type=click.Path(), help="Also write all numbers to this file.")
def main(
    models: tuple[str, ...], batch: int, steps: int, repeats: int, device: str, out: str | None
) -> None:
    """Compare the forms of a fit iteration and of sampling."""
    keep_freed_memory()
    name = cpu_model() if device == "cpu" else torch.cuda.get_device_name(device)
    click.echo(f"{name}; batch {batch}, {steps} steps, median of {repeats} rounds")
    click.echo(
        f"{'model':<12}{'':<11}{'form':<10}{'seconds':>9}{'speed':>9}{'images/s':>10}"
        f"{'of floor':>10}{'50 000':>11}"
    )
    rows = []
    for model in models:
        for row in measure(model, batch, steps, repeats, device):
            rows.append(row)
            hours = f"{MANY / row['images_per_second'] / 3600:.2f} h"
            share = "-" if row["floor_share"] is None else f"{row['floor_share']:.0%}"
            click.echo(
                f"{model:<12}{row['what']:<11}{row['form']:<10}{row['seconds']:>9.3f}"
                f"{row['speed_up']:>8.2f}x{row['images_per_second']:>10.2f}"
                f"{share:>10}{hours if row['what'] == 'samples' else '-':>11}"
            )
    if out is not None:
        found = {"machine": name, "batch": batch, "steps": steps, "rows": rows}
        Path(out).write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
