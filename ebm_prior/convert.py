"""Checkpoints and heads of others in safetensors: the same numbers, nothing that can run."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import FORMAT_KEY, load_torch_file, sha256_of

__all__ = ["converted_backbone", "to_safetensors"]

TRAINING_ONLY = {"optimizer", "scheduler", "grad_scalar"}
OPEN = {
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "isc", "mit", "pddl",
    "unlicense", "wtfpl", "zlib",
}  # fmt: skip
"""Licences, by their Hub identifier, that let anybody pass a checkpoint on."""


def converted_backbone(config: dict, ckpt: str | Path | None = None) -> bytes:
    """The backbone of some heads as a safetensors file, noted in their configuration.

    Args:
        config: Configuration of the heads; `backbone.converted` is added.
        ckpt: The checkpoint; by default where the run found it.

    Raises:
        EbmPriorError: If it is another checkpoint, is not one file, or its licence is not
            known to allow passing it on.
    """
    import hashlib

    backbone = config["backbone"]
    path = Path(ckpt or backbone.get("path") or "")
    if ckpt is None and not backbone.get("path"):
        raise EbmPriorError("it is not known where the backbone is; give it with --ckpt")
    if not path.is_file():
        raise EbmPriorError(
            f"{path} is no single file; only backbones that are one can be pushed, such as NVAE's"
        )
    if sha256_of(path) != backbone["sha256"]:
        raise EbmPriorError(f"{path} is not the checkpoint that the heads were fitted on")
    licence = backbone.get("license") or recorded_license(path)
    if (licence or "").lower() not in OPEN:
        raise EbmPriorError(
            f"the backbone's licence is {licence or 'not known'}, which does not let anybody pass "
            "it on; state another with --backbone-license, or leave --with-backbone out"
        )
    backbone["license"] = licence
    data = to_safetensors(path)
    sha256 = hashlib.sha256(data).hexdigest()
    backbone["converted"] = {"sha256": sha256, "size": len(data)}
    return data


def recorded_license(path: Path) -> str | None:
    """What the `card.json` beside a checkpoint says, if it is about this very file."""
    try:
        card = json.loads((path.parent / "card.json").read_text())
        return card["license"] if card["sha256"] == sha256_of(path) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def to_safetensors(path: str | Path) -> bytes:
    """A PyTorch checkpoint as a safetensors file that `load_torch_file` reads as the original.

    What only resuming the training needs is left out.

    Raises:
        EbmPriorError: If it holds anything but tensors, plain values, lists, tables and
            argument lists.
    """
    data = load_torch_file(path, allowed=[argparse.Namespace])
    if isinstance(data, Mapping):
        data = {key: value for key, value in data.items() if key not in TRAINING_ONLY}
    tensors: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}

    def encode(value: Any) -> Any:
        if isinstance(value, Tensor):
            # a tensor under two names is stored once
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in names or not value.numel():
                names[key] = str(len(tensors))
                tensors[names[key]] = value.detach().contiguous().clone()
            return {"tensor": names[key]}
        if isinstance(value, argparse.Namespace):
            return {"namespace": encode(vars(value))["table"]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"table": {key: encode(entry) for key, entry in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list": [encode(entry) for entry in value]}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        raise EbmPriorError(f"{path} holds a {type(value).__name__}, which cannot be converted")

    with torch.no_grad():
        structure = json.dumps(encode(data))
    return save(tensors, {FORMAT_KEY: structure})
