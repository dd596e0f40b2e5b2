"""Posterior samples, drawn once: what the heads read of z ~ q(z|x), row by row."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import sys
from collections.abc import Callable, Iterator
from io import FileIO
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
from ebm_prior.safe_load import sha256_of_weights

__all__ = ["PosteriorCache", "PosteriorStream", "posterior_source"]

ENCODE_BATCH = 100
HASH_BATCH = 1024  # images
CANNOT_RESERVE = (errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL)  # some file systems, some libcs
OTHERS = {
    "backbone": "another backbone",
    "images": "another data set",
    "inputs": "other head inputs",
    "draws": "another number of draws",
    "seed": "another seed",
}


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
        path: Array file; a `.json` beside it says what it was made of and how far it is filled.
        seed: Seed of the draws.
        on_chunk: Called after every chunk; may raise to stop.
        ranks: Processes that share the chunks; the folder must be one that all reach.

    Raises:
        EbmPriorError: If the file holds samples of something else, or the disk is full.
    """

    def __init__(
        self,
        stream: PosteriorStream,
        path: Path,
        seed: int,
        on_chunk: Callable[[], None] = lambda: None,
        ranks: Ranks | None = None,
    ) -> None:
        self.prior, self.path = stream.prior, path
        self.progress = path.with_suffix(".json")
        ranks = ranks or Ranks(self.prior.backbone.device)
        shape = (len(stream), row_size(self.prior))
        size = math.prod(shape) * 4
        made_of = _made_of(stream, seed)
        done = self._done(made_of, size, ranks.is_main)
        ranks.wait()  # all have seen what there is
        if done < len(stream):
            if ranks.is_main:
                self._announce(stream, size, done / len(stream))
                if not done:  # first: it must never speak of another array
                    self.progress.unlink(missing_ok=True)
                _reserve(path, size, keep=done > 0)
            ranks.wait()
            self._encode(stream, made_of, done, on_chunk, ranks)
        self.rows = np.memmap(path, np.float32, "r", shape=shape)

    def __len__(self) -> int:
        return len(self.rows)

    def __call__(self, index: Tensor, generator: torch.Generator | None = None) -> Latents:
        """Head inputs of the rows at `index` (B,)."""
        backbone = self.prior.backbone
        flat = torch.from_numpy(self.rows[index.numpy()]).to(backbone.device, backbone.dtype)
        return split_inputs(flat, self.prior)

    def _done(self, made_of: dict, size: int, speaks: bool) -> int:
        """Rows that are on disk already; an error if they were made of something else."""
        if not (self.path.exists() and self.progress.exists()):
            return 0
        try:
            progress = json.loads(self.progress.read_bytes())
            recorded, done = progress["made_of"], progress["done"]
            known = isinstance(recorded, dict) and type(done) is int and done >= 0
        except (ValueError, TypeError, KeyError):
            known = False
        if not known:
            if speaks:
                tqdm.write(
                    f"{self.path}: a damaged file or an earlier version does not say what these "
                    "posterior samples were made of; they are drawn again",
                    file=sys.stderr,
                )
            return 0
        others = [other for key, other in OTHERS.items() if recorded.get(key) != made_of[key]]
        if others:
            raise EbmPriorError(
                f"{self.path} holds posterior samples of {' and '.join(others)}; go on with what "
                "they were made of, or delete this file to draw them anew"
            )
        # a shorter file has lost what it held
        return done if self.path.stat().st_size == size else 0

    def _announce(self, stream: PosteriorStream, size: int, share: float) -> None:
        times = f", {stream.draws} times each" if stream.draws > 1 else ""
        tqdm.write(
            f"encoding {len(stream.images)} images{times}: {_amount(size)} of posterior samples "
            f"at {self.path}" + (f", {share:.0%} of them done" if share else ""),
            file=sys.stderr,
        )

    def _encode(
        self,
        stream: PosteriorStream,
        made_of: dict,
        done: int,
        on_chunk: Callable[[], None],
        ranks: Ranks,
    ) -> None:
        """Write rows from `done` on, and now and then how far that is."""
        row, seed = 4 * row_size(self.prior), made_of["seed"]
        chunks = range(done, len(stream), ENCODE_BATCH)
        # A full disk is an error of `write`; of a store to a mapped file it would be a SIGBUS.
        with self.path.open("r+b", buffering=0) as file:
            for number, start in enumerate(tqdm(chunks, "encoding", disable=None)):
                end = min(start + ENCODE_BATCH, len(stream))
                if number % ranks.size == ranks.rank:
                    index = torch.arange(start, end)
                    generator = torch.Generator().manual_seed((seed * 1_000_003 + start) % 2**63)
                    inputs = stream(index, generator)
                    flat = torch.cat([t.flatten(1) for t in inputs], 1)
                    _write(file, start * row, flat.float().cpu().numpy())
                if start // ENCODE_BATCH % 20 == 19 or start == chunks[-1]:
                    _write(file)  # before anything says so
                    ranks.wait()
                    if ranks.is_main:
                        write_json(self.progress, {"made_of": made_of, "done": end})
                on_chunk()


def _made_of(stream: PosteriorStream, seed: int) -> dict:
    """All that posterior samples depend on, as plain values."""
    prior = stream.prior
    backbone = prior.backbone
    return {
        # one that was not loaded from a file is known by its weights
        "backbone": backbone.sha256 or sha256_of_weights(backbone),
        "images": _sha256_of_images(stream.images),
        "inputs": {
            name: list(head.shape)
            for name, head in zip(prior.head_names, prior.heads, strict=True)
        },
        "draws": stream.draws,
        "seed": seed,
    }


def _sha256_of_images(images: Tensor) -> str:
    """Hash of uint8 images (N, C, H, W), which may be mapped from a file larger than memory."""
    digest = hashlib.sha256(str(tuple(images.shape)).encode())
    for part in images.split(HASH_BATCH):
        digest.update(part.cpu().contiguous().numpy())
    return digest.hexdigest()


def split_inputs(flat: Tensor, prior: EnergyPrior) -> Latents:
    """Rows (B, D) of flattened head inputs as one tensor per head."""
    shapes = [head.shape for head in prior.heads]
    parts = flat.split([math.prod(shape) for shape in shapes], 1)
    return tuple(p.reshape(-1, *s) for p, s in zip(parts, shapes, strict=True))


def row_size(prior: EnergyPrior) -> int:
    """Numbers that all heads together read per sample."""
    return sum(math.prod(head.shape) for head in prior.heads)


def _amount(size: int) -> str:
    """Bytes for people."""
    return f"{size / 2**30:.1f} GiB" if size >= 2**30 else f"{math.ceil(size / 2**20)} MiB"


def _reserve(path: Path, size: int, keep: bool) -> None:
    """Allocate all blocks of the array file, so that a full disk shows now.

    Args:
        path: File to create, or to complete: a copy may lack the blocks not yet written.
        size: Bytes.
        keep: Whether it holds rows already.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("r+b" if keep else "wb") as file:
            file.truncate(size)
            if hasattr(os, "posix_fallocate"):
                try:
                    os.posix_fallocate(file.fileno(), 0, size)
                except OSError as error:
                    if error.errno not in CANNOT_RESERVE:
                        raise
    except OSError as error:
        if not keep:
            path.unlink(missing_ok=True)
        raise EbmPriorError(
            f"cannot reserve {_amount(size)} for posterior samples at {path} "
            f"({error.strerror}); free some space or lower --cache-gb"
        ) from error


def _write(file: FileIO, offset: int = 0, rows: np.ndarray | None = None) -> None:
    """Write rows (B, D) at a byte; without any, see all that was written onto the disk."""
    try:
        if rows is None:
            os.fsync(file.fileno())
        else:
            file.seek(offset)
            left = memoryview(rows).cast("B")
            while left:  # a disk about to be full takes a part first
                left = left[file.write(left) :]
    except OSError as error:
        raise EbmPriorError(
            f"cannot write posterior samples to {file.name} ({error.strerror}); "
            "free some space and go on with --resume"
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
