"""Features of finished batches on disk, so that an interrupted evaluation goes on."""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor

from ebm_prior._version import __version__
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import CannotWriteError, write_bytes
from ebm_prior.interrupt import Interrupted
from ebm_prior.metrics import FeatureNetwork
from ebm_prior.metrics.frechet import compact
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.ranks import Ranks
from ebm_prior.safe_load import sha256_of_weights

__all__ = ["FeatureCache"]


class FeatureCache:
    """A folder with a file per finished batch; as a context, deleted once all is done.

    The folder's name is a hash of what a batch depends on besides its seeds: weights of heads
    and backbone (readjusted batch-norm statistics too), sampler, temperature, precision,
    features, device and versions. A file's name is the batch's seeds, and the sets of samples.

    Args:
        root: Where to create the folder.
        prior: Heads and backbone as they sample.
        config: Transition, steps and step size.
        temperature: Of both priors.
        network: Feature network.
    """

    def __init__(
        self,
        root: str | Path,
        prior: EnergyPrior,
        config: SamplerConfig,
        temperature: float,
        network: FeatureNetwork,
    ) -> None:
        backbone = prior.backbone
        what = [
            sha256_of_weights(prior), backbone.name, backbone.sha256, asdict(config), temperature,
            network.name, str(network.device), str(backbone.device), __version__,
            torch.__version__, prior.precision, prior.compiled,
        ]  # fmt: skip
        key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:16]
        self.ranks = Ranks(backbone.device)
        # the main process's: the name of the device is another in each
        self.folder = Path(root) / f"evaluate-{self.ranks.agree(key)}"
        self.writable = self.ranks.is_main

    def __enter__(self) -> FeatureCache:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        if kind is None:
            self.ranks.wait()  # all have read what they want
        if not self.ranks.is_main:
            return
        if kind is None:
            shutil.rmtree(self.folder, ignore_errors=True)
            with suppress(OSError):  # the folder of others' state, too, or never created
                self.folder.parent.rmdir()
        elif kind is KeyboardInterrupt and self.folder.is_dir():
            raise Interrupted(
                "interrupted; the same command goes on from the batches that are finished "
                f"(in {self.folder})"
            )

    def _path(self, seeds: range, names: Iterable[str]) -> Path:
        return self.folder / f"{seeds[0]}-{seeds[-1]}-{'-'.join(names)}.safetensors"

    def has(self, seeds: range, names: Sequence[str]) -> bool:
        """Whether the batch with these seeds and sets of samples is finished."""
        return self._path(seeds, names).is_file()

    def load(self, seeds: range, names: Sequence[str]) -> tuple[Tensor, ...]:
        """Features of the named sets of samples, (B, dim) each, float64."""
        path = self._path(seeds, names)
        try:
            found = load_file(path)
            sets = tuple(found[name].double() for name in names)
        except (SafetensorError, OSError, KeyError) as error:
            raise EbmPriorError(f"{path} is damaged or gone; delete {self.folder}") from error
        if not all(x.ndim == 2 and len(x) == len(seeds) for x in sets):
            raise EbmPriorError(f"{path} is damaged; delete {self.folder}")
        return sets

    def save(self, seeds: range, features: Mapping[str, Tensor]) -> None:
        """Keep a finished batch; where that cannot be, warn once and go on without."""
        if not self.writable:
            return
        sets = {name: compact(tensor) for name, tensor in features.items()}
        try:
            write_bytes(self._path(seeds, features), save(sets))
        except CannotWriteError as error:
            self.writable = False
            warnings.warn(f"an interruption will lose all samples: {error}", stacklevel=2)
