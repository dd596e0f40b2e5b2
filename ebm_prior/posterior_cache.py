"""Posterior samples, drawn once: what the heads read of z ~ q(z|x), row by row."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import write_json
from ebm_prior.langevin import Generators, rand
from ebm_prior.prior import EnergyPrior
from ebm_prior.ranks import Ranks

__all__ = ["PosteriorCache", "PosteriorStream", "posterior_source"]

ENCODE_BATCH = 100


class PosteriorStream:
    """Draws q(z|x) anew for every batch: for sets too large to keep.

    Args:
        prior: Supplies backbone and head inputs.
        images: uint8, (N, C, H, W).
        draws: Samples per image: row i belongs to image i modulo N.
    """

    def __init__(self, prior: EnergyPrior, images: Tensor, draws: int = 1) -> None:
        self.prior, self.images, self.draws = prior, images, draws

    def __len__(self) -> int:
        return len(self.images) * self.draws

    @torch.no_grad()
    def latents(self, index: Tensor, generator: Generators) -> Latents:
        """Latents z ~ q(z|x) of the rows at `index` (B,), by one generator or one per row."""
        x = self.pictures(index, generator)
        return self.prior.backbone.posterior(x, noise=self.prior.noise(len(x), generator)).z

    def picked(self, n: int, seed: int) -> Iterator[Latents]:
        """Latents of n rows, or of all if there are fewer, none twice, batch by batch."""
        generator = torch.Generator().manual_seed(seed)
        rows = torch.randperm(len(self), generator=generator)[:n]
        with tqdm(total=len(rows), desc="encoding", leave=False, disable=None, delay=1) as bar:
            for index in rows.split(ENCODE_BATCH):  # of no other size: they share a generator
                yield self.latents(index, generator)
                bar.update(len(index))

    @torch.no_grad()
    def __call__(self, index: Tensor, generator: torch.Generator) -> Latents:
        """Head inputs of the rows at `index` (B,)."""
        if not self.prior.reads_features:
            return self.prior.head_inputs(self.latents(index, generator))
        x = self.pictures(index, generator)
        noise = self.prior.noise(len(x), generator)
        return self.prior.head_inputs(*self.prior.backbone.encode(x, noise))

    def pictures(self, index: Tensor, generator: Generators) -> Tensor:
        """Images of the rows at `index` as the backbone was trained on them."""
        backbone = self.prior.backbone
        x = self.images[index % len(self.images)].to(backbone.device, backbone.dtype) / 255
        if backbone.binarize:  # x ~ Bernoulli(image)
            x = (rand(x, generator) < x).to(x.dtype)
        return x


class PosteriorCache:
    """Head inputs of every row as one memory-mapped float32 array on disk.

    An interrupted encoding goes on where it stopped: chunk i depends on the seed and i only.

    Args:
        stream: Where the rows come from.
        path: Array file; a `.json` beside it says how far it is filled.
        seed: Seed of the draws.
        on_chunk: Called after every chunk; may raise to stop.
        ranks: Processes that share the chunks; the folder must be one that all reach.
    """

    def __init__(
        self,
        stream: PosteriorStream,
        path: Path,
        seed: int,
        on_chunk: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.prior = stream.prior
        ranks = ranks or Ranks(self.prior.backbone.device)
        path.parent.mkdir(parents=True, exist_ok=True)
        shape = (len(stream), row_size(self.prior))
        progress_path = path.with_suffix(".json")
        done = 0
        if path.exists() and progress_path.exists():
            progress = json.loads(progress_path.read_text())
            if progress["shape"] == list(shape) and progress["seed"] == seed:
                done = progress["done"]
        ranks.wait()  # all have seen what there is
        if not done and ranks.is_main:
            _reserve(path, shape)
        ranks.wait()
        self.rows = np.memmap(path, np.float32, "r+", shape=shape)
        chunks = range(done, len(stream), ENCODE_BATCH)
        if chunks:
            size = self.rows.nbytes / 2**20
            bar = tqdm(
                chunks, f"encoding {len(stream.images)} images ({size:.0f} MiB)", disable=None
            )
            for number, start in enumerate(bar):
                end = min(start + ENCODE_BATCH, len(stream))
                if number % ranks.size == ranks.rank:
                    index = torch.arange(start, end)
                    generator = torch.Generator().manual_seed((seed * 1_000_003 + start) % 2**63)
                    inputs = stream(index, generator)
                    flat = torch.cat([t.flatten(1) for t in inputs], 1)
                    self.rows[start:end] = flat.float().cpu().numpy()
                if start // ENCODE_BATCH % 20 == 19 or start == chunks[-1]:
                    if ranks.size > 1:
                        self.rows.flush()  # for processes that read it over a network
                        ranks.wait()
                    if ranks.is_main:
                        done = {"shape": shape, "seed": seed, "done": end}
                        write_json(progress_path, done)
                on_chunk()

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, index: Tensor, generator: torch.Generator | None = None) -> Latents:
        """Head inputs of the rows at `index` (B,)."""
        backbone = self.prior.backbone
        flat = torch.from_numpy(self.rows[index.numpy()]).to(backbone.device, backbone.dtype)
        return split_inputs(flat, self.prior)


def split_inputs(flat: Tensor, prior: EnergyPrior) -> Latents:
    """Rows (B, D) of flattened head inputs as one tensor per head."""
    shapes = [head.shape for head in prior.heads]
    parts = flat.split([math.prod(shape) for shape in shapes], 1)
    return tuple(p.reshape(-1, *s) for p, s in zip(parts, shapes, strict=True))


def row_size(prior: EnergyPrior) -> int:
    """Numbers that all heads together read per sample."""
    return sum(math.prod(head.shape) for head in prior.heads)


def _reserve(path: Path, shape: tuple[int, int]) -> None:
    """Create the array file with its blocks allocated, so that a full disk shows now."""
    import os

    size = shape[0] * shape[1] * 4
    try:
        with path.open("wb") as file:
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, size)
            else:
                file.truncate(size)
    except OSError as error:
        path.unlink(missing_ok=True)
        raise EbmPriorError(
            f"cannot reserve {size / 2**20:.0f} MiB for posterior samples at {path} "
            f"({error.strerror}); free some space or lower --cache-gb"
        ) from error


def posterior_source(
    prior: EnergyPrior,
    images: Tensor,
    draws: int,
    path: Path,
    seed: int,
    cache_gb: float,
    on_chunk: Callable[[], None] = lambda: None,
    ranks: Ranks | None = None,
) -> PosteriorCache | PosteriorStream:
    """A cache if it fits into `cache_gb` GiB of disk, otherwise fresh draws per batch."""
    stream = PosteriorStream(prior, images, draws)
    if len(stream) * row_size(prior) * 4 > cache_gb * 2**30:
        return stream
    return PosteriorCache(stream, path, seed, on_chunk, ranks)
