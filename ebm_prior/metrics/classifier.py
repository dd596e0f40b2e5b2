"""Train a small classifier on labelled images, to measure distances on its features.

For data on which Inception cannot be had, or means little. The two shipped networks come
from

    python -m ebm_prior.metrics.classifier --data mnist.npz --title MNIST --out FILE
    python -m ebm_prior.metrics.classifier --data digits --title digits --steps 1000 --out FILE
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, Protocol

import click
import torch
from torch import Tensor, nn

from ebm_prior._version import __version__
from ebm_prior.errors import EbmPriorError
from ebm_prior.metrics.features import METADATA_KEY, SmallClassifier

__all__ = ["train_classifier"]


class LabelledImages(Protocol):
    """What `ebm_prior.data.load_images` returns: uint8 (N, C, H, W) and labels (N,)."""

    images: Any
    labels: Any


def train_classifier(
    train: LabelledImages,
    test: LabelledImages,
    out: str | Path,
    *,
    title: str,
    steps: int = 3000,
    batch_size: int = 128,
    learning_rate: float = 3e-3,
    seed: int = 0,
    device: str | torch.device = "cpu",
    provenance: dict[str, Any] | None = None,
) -> float:
    """Train a `SmallClassifier` and store it as safetensors with a JSON description.

    AdamW under a one-cycle schedule, on slightly rotated, scaled and shifted images. The
    held-out images are looked at once, at the end.

    Args:
        train: Images to fit.
        test: Held-out images, for the accuracy.
        out: File to write; `load_features(out)` reads it.
        title: Short name of the data; the features are called "<title> classifier (64)".
        steps: Number of updates.
        batch_size: Images per update.
        learning_rate: Peak of the schedule.
        seed: Of the initial weights, batches and distortions.
        device: Where to train.
        provenance: Further entries of the description, e.g. the command line.

    Returns:
        Accuracy on the held-out images, between 0 and 1.

    Raises:
        EbmPriorError: If labels are missing, the two sets do not fit together, or `out`
            cannot be written.
    """
    from safetensors.torch import save

    from ebm_prior.files import check_writable, write_bytes

    check_writable(out)
    x, y = _tensors(train, "training")
    x_test, y_test = _tensors(test, "held-out")
    if x.shape[1:] != x_test.shape[1:]:
        raise EbmPriorError(
            f"training images are {tuple(x.shape[1:])}, held-out ones {tuple(x_test.shape[1:])}"
        )
    num_classes = int(max(y.max(), y_test.max())) + 1
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):  # initial weights and dropout draw globally
        torch.manual_seed(seed)
        network = SmallClassifier(x.shape[1:], num_classes).to(device)
        _fit(network, x, y, steps, batch_size, learning_rate, generator)
    accuracy = _accuracy(network, x_test, y_test)
    description = {
        "architecture": network.architecture,
        "title": title,
        "image_shape": list(x.shape[1:]),
        "num_classes": num_classes,
        "features": network.dim,
        "accuracy": accuracy,
        "train_images": len(x),
        "test_images": len(x_test),
        "train_images_sha256": hashlib.sha256(x.numpy().tobytes()).hexdigest(),
        "steps": steps,
        "batch_size": batch_size,
        "learning_rate": learning_rate,
        "seed": seed,
        "versions": {"ebm-prior": __version__, "torch": torch.__version__},
        **(provenance or {}),
    }
    state = {key: value.cpu().contiguous() for key, value in network.state_dict().items()}
    write_bytes(out, save(state, metadata={METADATA_KEY: json.dumps(description)}))
    return accuracy


def _tensors(data: LabelledImages, what: str) -> tuple[Tensor, Tensor]:
    if data.labels is None:
        raise EbmPriorError(f"the {what} images have no labels; a classifier needs them")
    return torch.as_tensor(data.images), torch.as_tensor(data.labels).long()


def _fit(
    network: SmallClassifier,
    x: Tensor,
    y: Tensor,
    steps: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    from tqdm import trange

    device = next(network.parameters()).device
    optimizer = torch.optim.AdamW(network.parameters(), lr=learning_rate, weight_decay=1e-2)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    order = torch.empty(0, dtype=torch.long)
    network.train()
    for _ in trange(steps, desc="classifier", disable=None):
        if len(order) < batch_size:
            order = torch.cat([order, torch.randperm(len(x), generator=generator)])
        index, order = order[:batch_size], order[batch_size:]
        images = _distort(x[index].float() / 255, generator).to(device)
        loss = nn.functional.cross_entropy(network(images), y[index].to(device))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        schedule.step()


def _distort(images: Tensor, generator: torch.Generator) -> Tensor:
    """Rotate by up to 10 degrees, scale by up to 8 %, shift by up to 6 % of the width."""
    uniform = torch.rand(4, len(images), generator=generator) * 2 - 1
    angle, scale = uniform[0] * torch.pi / 18, 1 + 0.08 * uniform[1]
    shift = 0.12 * uniform[2:]  # affine_grid's coordinates span [-1, 1]
    cos, sin = scale * angle.cos(), scale * angle.sin()
    matrix = torch.stack([cos, -sin, shift[0], sin, cos, shift[1]], dim=1).view(-1, 2, 3)
    grid = nn.functional.affine_grid(matrix, list(images.shape), align_corners=False)
    return nn.functional.grid_sample(images, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def _accuracy(network: SmallClassifier, x: Tensor, y: Tensor) -> float:
    network.eval()
    device = next(network.parameters()).device
    hits = [
        (network(images.float().to(device) / 255).argmax(1).cpu() == labels).sum().item()
        for images, labels in zip(x.split(500), y.split(500), strict=True)
    ]
    return sum(hits) / len(x)


@click.command()
@click.option("--data", required=True, help="Name or path, as `ebm-prior fit --data` takes.")
@click.option("--title", required=True, help="Short name of the data, shown with the numbers.")
@click.option(
    "--out",
    required=True,
    type=click.Path(dir_okay=False, path_type=Path),
    help="A .safetensors file; pass it to `ebm-prior evaluate --features`.",
)
@click.option("--steps", default=3000, show_default=True, type=click.IntRange(min=2))
@click.option("--seed", default=0, show_default=True)
@click.option("--device", default="cpu", show_default=True)
def main(data: str, title: str, out: Path, steps: int, seed: int, device: str) -> None:
    """Train a classifier whose features `ebm-prior evaluate` can measure on.

    \b
    python -m ebm_prior.metrics.classifier --data mnist.npz --title MNIST \\
        --out mnist.safetensors
    """  # noqa: D301
    from ebm_prior.data import load_images

    if out.suffix != ".safetensors":
        raise click.UsageError(f"--out must end in .safetensors, got {out}")
    command = (
        f"python -m ebm_prior.metrics.classifier --data {Path(data).name} --title {title} "
        f"--steps {steps} --seed {seed} --out {out.name}"
    )
    try:
        accuracy = train_classifier(
            load_images(data, split="train", labels=True),
            load_images(data, split="test", labels=True),
            out,
            title=title,
            steps=steps,
            seed=seed,
            device=device,
            provenance={"data": Path(data).name, "command": command},
        )
    except EbmPriorError as error:
        raise click.ClickException(str(error)) from error
    click.echo(f"{out}: held-out accuracy {accuracy:.2%}")


if __name__ == "__main__":
    main()
