"""Fréchet distance between two sets of features (Heusel et al., 2017, arXiv:1706.08500).

    d^2 = ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

The distance is pytorch-fid's own function; here are the statistics it takes.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import zipfile
import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.metrics.features import INCEPTION_NAME, FeatureNetwork

__all__ = ["FeatureStatistics", "StatisticsBuilder", "compact", "frechet_distance"]

MAX_ROWS = 10_000  # features kept of a set, for its manifold


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images, and some of the features.

    Attributes:
        mean: (dim,), float64.
        cov: Unbiased covariance, (dim, dim), float64.
        features: Name of the network they come from.
        n: Number of images; None where the file does not say (pytorch-fid's do not).
        rows: Features of all images, or of a random choice of 10 000, (M, dim); None where
            the file holds none: distances can be measured then, manifolds cannot.
        image_shape: (C, H, W) of the images, where known.
    """

    mean: np.ndarray
    cov: np.ndarray
    features: str
    n: int | None = None
    rows: np.ndarray | None = None
    image_shape: tuple[int, int, int] | None = None

    @classmethod
    def from_batches(
        cls, batches: Iterable[Tensor], features: str, total: int | None = None
    ) -> FeatureStatistics:
        """Statistics of features that arrive in batches.

        Args:
            batches: Features, each (B, dim); sizes may differ.
            features: Name of the network.
            total: Number of images to come, for `rows`; without it there are none.

        Raises:
            EbmPriorError: If features are NaN or infinite, or of fewer than two images.
        """
        builder = StatisticsBuilder(features, total)
        for batch in batches:
            builder.add(batch)
        return builder.finish()

    @classmethod
    def from_features(cls, x: Tensor, features: str) -> FeatureStatistics:
        """Statistics of features x (N, dim); `features` names the network."""
        return cls.from_batches([x], features, len(x))

    @classmethod
    def from_images(cls, images: Tensor, network: FeatureNetwork) -> FeatureStatistics:
        """Statistics of images (N, C, H, W), uint8 or floats in [0, 1]."""
        found = cls.from_batches(network.batches(images), network.name, len(images))
        return replace(found, image_shape=tuple(images.shape[1:]))

    def save(self, path: str | Path) -> None:
        """Write an .npz file, which pytorch-fid reads too (`mu` and `sigma`)."""
        from ebm_prior.files import atomic_write

        entries = {"mu": self.mean, "sigma": self.cov, "features": np.array(self.features)}
        for name in ("n", "rows", "image_shape"):
            if getattr(self, name) is not None:
                entries[name] = np.asarray(getattr(self, name))
        with atomic_write(path) as file:
            np.savez_compressed(file, **entries)

    @classmethod
    def load(cls, path: str | Path) -> FeatureStatistics:
        """Read a file written by `save` or by `pytorch_fid --save-stats`.

        Raises:
            EbmPriorError: If the file is missing or holds no such statistics.
        """
        wrong = f"{path} holds no feature statistics (mu and sigma in an .npz file)"
        try:
            with np.load(path, allow_pickle=False) as file:
                entries = dict(file)
            mean = np.asarray(entries["mu"], dtype=np.float64)
            cov = np.asarray(entries["sigma"], dtype=np.float64)
            n = int(entries["n"]) if "n" in entries else None
            # pytorch-fid's files name no network: it has only the one.
            features = str(entries.get("features", _pytorch_fid_name(mean.size)))
            rows, shape = entries.get("rows"), None
            if "image_shape" in entries:
                shape = tuple(int(side) for side in entries["image_shape"])
        except FileNotFoundError as error:
            raise EbmPriorError(f"no such file of statistics: {path}") from error
        except (
            OSError, KeyError, ValueError, TypeError, EOFError, AttributeError, MemoryError,
            zipfile.BadZipFile, zlib.error,
        ) as error:  # fmt: skip
            raise EbmPriorError(wrong) from error
        if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
            raise EbmPriorError(f"{wrong}: shapes {mean.shape} and {cov.shape}")
        if rows is not None and not (
            np.issubdtype(rows.dtype, np.floating) and rows.shape[1:] == mean.shape
        ):
            raise EbmPriorError(f"{wrong}: rows are {rows.dtype} of shape {rows.shape}")
        parts = [mean, cov] if rows is None else [mean, cov, rows]
        if not all(np.isfinite(part).all() for part in parts):
            raise EbmPriorError(f"{path} holds NaN or infinite statistics; compute them again")
        return cls(mean, cov, features, n, rows, shape)

    def of(self, network: FeatureNetwork, image_shape: Sequence[int]) -> FeatureStatistics:
        """These statistics, if they compare with this network's features of such images.

        A plain file of pytorch-fid's says neither which weights it used nor which images:
        it is taken to go with whatever Inception it is compared with.

        Raises:
            EbmPriorError: If they are of other features, or of images of another size.
        """
        if self.n is None and network.name.startswith(self.features):
            return replace(self, features=network.name)
        if (self.features, self.mean.size) != (network.name, network.dim):
            raise EbmPriorError(
                f"the reference statistics are of {self.features!r}, not of {network.name!r}; "
                "choose their features with --features or --inception-weights, or make them "
                "again with ebm-prior evaluate stats"
            )
        if self.image_shape not in (None, tuple(image_shape)):
            raise EbmPriorError(
                f"the reference statistics are of {_times(self.image_shape)} images, these are "
                f"{_times(image_shape)}; make them of images of this size"
            )
        return self


class StatisticsBuilder:
    """Builds `FeatureStatistics` from batches, in bounded memory.

    Moments are merged part by part around the parts' means (Chan et al., 1979), which does
    not cancel as a sum of squares would.

    Args:
        features: Name of the network.
        total: Number of images to come, for `rows`; without it there are none.
        part: Images whose moments are computed together.
    """

    def __init__(self, features: str, total: int | None = None, part: int = MAX_ROWS) -> None:
        self.features, self.part = features, part
        self.n, self.mean, self.scatter = 0, np.zeros(0), np.zeros((0, 0))
        self.seen, self.waiting, self.rows = 0, [], None if total is None else []
        # The same choice whatever the batches; all of a set that is small enough.
        self.chosen = torch.ones(total or 0, dtype=torch.bool)
        if total is not None and total > MAX_ROWS:
            order = torch.randperm(total, generator=torch.Generator().manual_seed(0))
            self.chosen[order[MAX_ROWS:]] = False

    def add(self, batch: Tensor) -> None:
        """Take in features (B, dim).

        Raises:
            EbmPriorError: If features are NaN or infinite.
        """
        x = batch.detach().cpu().double()
        finite = x.isfinite().all(1)
        if not finite.all():
            raise EbmPriorError(
                f"{self.features}: {(~finite).sum()} of {len(x)} images have "
                "NaN or infinite features; check the samples (did the chain diverge?)"
            )
        x = compact(x)
        if self.rows is not None:
            self.rows.append(x[self.chosen[self.seen : self.seen + len(x)]].numpy())
        self.seen += len(x)
        self.waiting.append(x)
        if sum(map(len, self.waiting)) >= self.part:
            waiting = torch.cat(self.waiting)
            bounds = tuple(range(self.part, len(waiting) + 1, self.part))
            *parts, rest = waiting.tensor_split(bounds)
            self.waiting = [rest.clone()]
            for part in parts:
                self._merge(part)

    def _merge(self, part: Tensor) -> None:
        x = part.to(torch.float64, copy=True).numpy()
        if self.n == 0:
            self.mean, self.scatter = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
        part_mean, total = x.mean(axis=0), self.n + len(x)
        x -= part_mean
        delta = part_mean - self.mean
        self.scatter += x.T @ x
        self.scatter += np.outer(delta, delta) * (self.n * len(x) / total)
        self.mean, self.n = self.mean + delta * (len(x) / total), total

    def finish(self) -> FeatureStatistics:
        """The statistics of all that was added.

        Raises:
            EbmPriorError: If that is fewer than two images.
        """
        if self.seen < 2:
            raise EbmPriorError(f"a covariance needs at least two images, got {self.seen}")
        if any(map(len, self.waiting)):
            self._merge(torch.cat(self.waiting))
            self.waiting = []
        rows = None if self.rows is None else np.concatenate(self.rows)
        return FeatureStatistics(
            self.mean, self.scatter / (self.n - 1), self.features, self.n, rows
        )


def compact(x: Tensor) -> Tensor:
    """Features as float32 where that loses nothing: networks run in float32."""
    half = x.float()
    return half if torch.equal(half.double(), x.double()) else x


def _times(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


def _pytorch_fid_name(dim: int) -> str:
    return INCEPTION_NAME if dim == 2048 else f"pytorch-fid InceptionV3 ({dim})"


def frechet_distance(a: FeatureStatistics, b: FeatureStatistics) -> float:
    """Fréchet distance d^2 between the Gaussians with these statistics, by pytorch-fid.

    Biased upwards for few images; compare only numbers of the same sample size.

    Raises:
        EbmPriorError: If the two come from different feature networks.
    """
    if a.features != b.features or a.mean.shape != b.mean.shape:
        raise EbmPriorError(
            f"cannot compare statistics of different features: {a.features!r} "
            f"({a.mean.size}) and {b.features!r} ({b.mean.size}); compute both with one network"
        )
    for n in (a.n, b.n):
        if n is not None and n <= a.mean.size:
            warnings.warn(
                f"{n} images for {a.mean.size} features: the covariance is singular and the "
                "Fréchet distance much too large; compare it only with one from as many images",
                stacklevel=2,
            )
    from ebm_prior.torchvision_compat import import_torchvision

    import_torchvision()  # pytorch_fid needs torchvision to import
    from pytorch_fid.fid_score import calculate_frechet_distance

    # pytorch-fid prints its remarks, which would end up inside `--json` output; scipy
    # complains of the argument that pytorch-fid 0.3 passes, and of singular products, which
    # the warning above is about.
    with contextlib.redirect_stdout(sys.stderr), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return float(calculate_frechet_distance(a.mean, a.cov, b.mean, b.cov))
        except ValueError as error:  # a complex square root
            raise EbmPriorError(
                f"the covariances have no usable square root ({error}); use more images"
            ) from error
