"""Fréchet distance between two sets of features (Heusel et al., 2017, arXiv:1706.08500).

    d^2 = ||m_1 - m_2||^2 + tr(C_1 + C_2 - 2 (C_1 C_2)^{1/2})

The distance is pytorch-fid's own function; here are the statistics it takes.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
import zipfile
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.metrics.features import INCEPTION_NAME

__all__ = ["FeatureStatistics", "frechet_distance"]


@dataclass(frozen=True, eq=False)
class FeatureStatistics:
    """Mean and covariance of the features of a set of images.

    Attributes:
        mean: (dim,), float64.
        cov: Unbiased covariance, (dim, dim), float64.
        features: Name of the network they come from.
        n: Number of images; None where the file does not say (pytorch-fid's do not).
    """

    mean: np.ndarray
    cov: np.ndarray
    features: str
    n: int | None = None

    @classmethod
    def from_batches(cls, batches: Iterable[Tensor], features: str) -> FeatureStatistics:
        """Statistics of features that arrive in batches and are not kept.

        Moments are merged batch by batch around the batch means (Chan et al., 1979), which
        does not cancel as a sum of squares would.

        Args:
            batches: Features, each (B, dim); sizes may differ.
            features: Name of the network.

        Raises:
            EbmPriorError: If features are NaN or infinite, or of fewer than two images.
        """
        n, mean, scatter = 0, np.zeros(0), np.zeros((0, 0))
        for batch in batches:
            x = batch.detach().cpu().double().numpy()
            if not np.isfinite(x).all():
                raise EbmPriorError(
                    f"{features}: {(~np.isfinite(x)).any(axis=1).sum()} of {len(x)} images have "
                    "NaN or infinite features; check the samples (did the chain diverge?)"
                )
            if len(x) == 0:
                continue
            if n == 0:
                mean, scatter = np.zeros(x.shape[1]), np.zeros((x.shape[1], x.shape[1]))
            batch_mean = x.mean(axis=0)
            centred, delta, total = x - batch_mean, batch_mean - mean, n + len(x)
            scatter += centred.T @ centred + np.outer(delta, delta) * (n * len(x) / total)
            mean, n = mean + delta * (len(x) / total), total
        if n < 2:
            raise EbmPriorError(f"a covariance needs at least two images, got {n}")
        return cls(mean, scatter / (n - 1), features, n)

    @classmethod
    def from_features(cls, x: Tensor, features: str) -> FeatureStatistics:
        """Statistics of features x (N, dim); `features` names the network."""
        return cls.from_batches([x], features)

    def save(self, path: str | Path) -> None:
        """Write an .npz file, which pytorch-fid reads too (`mu` and `sigma`)."""
        from ebm_prior.files import atomic_write

        entries = {"mu": self.mean, "sigma": self.cov, "features": np.array(self.features)}
        if self.n is not None:
            entries["n"] = np.array(self.n)
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
        except FileNotFoundError as error:
            raise EbmPriorError(f"no such file of statistics: {path}") from error
        except (OSError, KeyError, ValueError, TypeError, EOFError, zipfile.BadZipFile) as error:
            raise EbmPriorError(wrong) from error
        if mean.ndim != 1 or cov.shape != (mean.size, mean.size):
            raise EbmPriorError(f"{wrong}: shapes {mean.shape} and {cov.shape}")
        if not (np.isfinite(mean).all() and np.isfinite(cov).all()):
            raise EbmPriorError(f"{path} holds NaN or infinite statistics; compute them again")
        return cls(mean, cov, features, n)


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
