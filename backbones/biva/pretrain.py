"""Stage one for BIVA; `backbones.stages.pretrain` says how, here is the session folder."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.biva import make_backbone
from backbones.biva.checkpoint import DATASETS, NAMES, build
from backbones.stages import StagedBackbone
from backbones.stages.pretrain import PretrainConfig, StagedTraining, train
from backbones.training import Progress
from ebm_prior.files import write_bytes, write_json
from ebm_prior.safe_load import Named

__all__ = ["pretrain"]

MIXTURES = 10


def pretrain(
    images: Tensor,
    *,
    out: str | Path,
    dataset: str,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **settings: Any,  # noqa: ANN401
) -> Path:
    """Train a BIVA (or LVAE, or VAE) on images and write its session folder to `out`.

    The folder holds `hyperparameters.p`, `config.json` and `model.pth`. Arguments, result and
    errors are those of `backbones.stages.pretrain.train`; `settings` are the fields of its
    `PretrainConfig` and of `TrainingConfig`.
    """
    return train(
        _Training, images, out=out, dataset=dataset, resume=resume, device=device,
        progress=progress, settings=settings,
    )  # fmt: skip


class _Training(StagedTraining):
    family = "biva"
    kinds = ("biva", "lvae", "vae")
    defaults = PretrainConfig(stages="biva", channels=(8, 16, 16), latents=(16, 16, 10), blocks=2)

    def build(
        self, config: PretrainConfig, shape: tuple[int, int, int], dataset: str
    ) -> StagedBackbone:
        """Backbone of random weights."""
        latents = []
        for i, size in enumerate(config.latents):
            maps = i < config.maps
            latents.append(
                {"N": size, "block": Named("conv"), "kernel": 3}
                if maps
                else {"N": size, "block": Named("dense")}
            )
        self.hyperparameters = {
            "Stage": Named(config.stages),
            "tensor_shp": (-1, *shape),
            "stages": [
                [list(block) for block in config.blocks_of(i)] for i in range(len(latents))
            ],
            "latents": latents,
            "nonlinearity": "elu",
            "q_dropout": float(config.dropout),
            "p_dropout": float(config.dropout),
            "type": config.stages,
            "features_out": shape[0] if shape[0] == 1 else 10 * MIXTURES,
            "no_skip": False,
            "log_var_act": Named("softplus"),
        }
        return make_backbone(build(self.hyperparameters, Path("settings"), {}, dataset))

    def write_arguments(self) -> None:
        """Write `hyperparameters.p`, and `config.json` with all keys of the public parser."""
        config = self.config
        write_bytes(
            self.out / "hyperparameters.p", b"\x80\x02" + _pickled(self.hyperparameters) + b"."
        )
        names = {ours: public for public, ours in DATASETS.items()}
        write_json(
            self.out / "config.json",
            {
                "root": "", "data_root": "",
                "dataset": names.get(self.dataset, self.dataset),
                "model_type": config.stages, "device": self.device.type, "num_workers": 0,
                "bs": config.batch_size,
                "epochs": math.ceil(self.step / config.steps_per_epoch(len(self.images))),
                "lr": config.lr, "seed": config.seed, "freebits": config.free_bits,
                "nr_mix": MIXTURES, "ema": 0.0, "q_dropout": float(config.dropout),
                "p_dropout": float(config.dropout), "iw_samples": 1, "id": "", "no_skip": False,
                "log_var_act": "softplus", "beta": 1.0,
            },
        )  # fmt: skip


def _pickled(value: object) -> bytes:
    """A value in pickle's protocol 2, without header and end.

    `Named` words become mentions of the public code's classes and functions, which
    `pickle.dumps` would want to import.
    """
    if isinstance(value, Named):
        words = {word: name for name, word in NAMES.items()}
        module, _, name = words[value.name].rpartition(".")
        return pickle.GLOBAL + f"{module}\n{name}\n".encode()
    if isinstance(value, dict):
        items = b"".join(_pickled(k) + _pickled(v) for k, v in value.items())
        return pickle.EMPTY_DICT + pickle.MARK + items + pickle.SETITEMS
    if isinstance(value, (list, tuple)):
        items = b"".join(map(_pickled, value))
        if isinstance(value, tuple):
            return pickle.MARK + items + pickle.TUPLE
        return pickle.EMPTY_LIST + pickle.MARK + items + pickle.APPENDS
    return pickle.dumps(value, protocol=2)[2:-1]
