"""What a checkpoint or a folder of heads is, as plain values for a terminal or for JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError
from ebm_prior.hub import is_hub_id, open_source
from ebm_prior.registry import detect_backbone, load_backbone
from ebm_prior.saved import CONFIG, WEIGHTS, count_weights, fitted_on

__all__ = ["backbone_info", "describe", "heads_info", "likelihood_name"]


def describe(source: str | Path, *, backbone: str | None = None, ckpt: str | None = None) -> dict:
    """Describe whatever a path or Hub id is: heads or a backbone's checkpoint.

    Args:
        source: Checkpoint of any installed family; run folder, saved folder or Hub id of heads.
        backbone: Family, for a checkpoint that its adapter does not recognise.
        ckpt: For heads: their backbone's checkpoint, where they do not say where it is.

    Returns:
        `backbone_info` or `heads_info`, told apart by their key "what".

    Raises:
        EbmPriorError: If it is neither, cannot be read, or does not fit itself.
    """
    path = Path(source)
    if path.exists() and not _holds_heads(path):
        if ckpt is not None:
            raise EbmPriorError(f"{source} is no folder of heads, so --ckpt has no meaning")
        return backbone_info(load_backbone(backbone or detect_backbone(path), path))
    if not path.exists() and not is_hub_id(str(source)):
        raise EbmPriorError(
            f"no {source}: expected a checkpoint, a folder of heads or a Hub id user/name"
        )
    return heads_info(source, backbone=backbone, ckpt=ckpt)


def _holds_heads(path: Path) -> bool:
    if (path / WEIGHTS).is_file():
        return True
    try:  # a run before its first save
        return "format_version" in json.loads((path / CONFIG).read_text())
    except (OSError, ValueError, TypeError, RecursionError):
        return False


def backbone_info(backbone: Backbone) -> dict:
    """Everything an adapter says about its checkpoint.

    Returns:
        `groups` as [name, shape] pairs in ancestral order; shapes without the batch;
        `parameters` of encoder and decoder together; `sha256` of the file or folder.
    """
    return {
        "what": "backbone",
        "family": backbone.name,
        "checkpoint": backbone.checkpoint,
        "sha256": backbone.sha256,
        "dataset": backbone.dataset,
        "binarize": backbone.binarize,
        "image_shape": list(backbone.image_shape),
        "likelihood": likelihood_name(backbone),
        "groups": [[group.name, list(group.shape)] for group in backbone.groups],
        "latents": sum(group.numel for group in backbone.groups),
        "feature_shape": list(backbone.feature_shape),
        "parameters": sum(p.numel() for p in backbone.parameters()),
    }


@torch.no_grad()
def likelihood_name(backbone: Backbone) -> str:
    """Name of p(x|z), or of its class where an adapter gives it none."""
    eps = [
        torch.zeros((1, *group.shape), device=backbone.device, dtype=backbone.dtype)
        for group in backbone.groups
    ]
    px = backbone.decode(backbone.transform(eps))
    return px.name or type(px).__name__


def heads_info(
    source: str | Path, *, backbone: str | None = None, ckpt: str | None = None
) -> dict:
    """What heads are, how they are sampled, and which backbone they need.

    The backbone's file is optional: it is looked for at `ckpt`, then where a local folder
    recorded it, then for the one that came with the heads. A Hub repository does not choose
    which local files are read.

    Returns:
        `share` is the heads' parameters over the backbone's (the paper's Table 9), None where
        the backbone's are unknown. Under `backbone` the recorded facts, or those of the file
        where it was found; its `checkpoint` is then its path. `note` says what is missing.

    Raises:
        EbmPriorError: If there are no heads, or `ckpt` is given and is not their backbone.
    """
    found = open_source(source)
    config = found.config
    stored = config["backbone"]
    parameters = count_weights(found.weights())
    path = ckpt
    if ckpt is None and Path(source).is_dir():
        path = stored.get("path") or (found.backbone() if "converted" in stored else None)
    described, note = _backbone_of_heads(
        stored, backbone or stored["name"], path, given=ckpt is not None
    )
    total = described["parameters"]
    return {
        "what": "heads",
        "source": str(source),
        "heads": {**config["heads"], "parameters": parameters},
        "share": parameters / total if total else None,
        "sampler": config["sampler"],
        "backbone": described,
        "note": note,
    }


def _backbone_of_heads(
    stored: dict, family: str, path: str | Path | None, given: bool
) -> tuple[dict, str | None]:
    """Facts about the backbone of heads, and what is missing from them."""

    def optional(key: str, kind: type) -> Any:
        value = stored.get(key)
        return value if isinstance(value, kind) and value else None

    recorded = {
        "family": stored["name"],
        "checkpoint": optional("path", str) or optional("checkpoint", str),
        "sha256": stored["sha256"],
        "dataset": optional("dataset", str),
        "image_shape": optional("image_shape", list),
        "groups": stored["groups"],
        "feature_shape": stored["feature_shape"],
        "parameters": optional("parameters", int),
    }
    if path is None:
        return recorded, "where its checkpoint lies is not recorded; name it with --ckpt"
    if not given and not Path(path).exists():
        return recorded, "its checkpoint is no longer there; name it with --ckpt"
    try:
        backbone = load_backbone(family, path)
    except EbmPriorError as error:
        if given:
            raise
        return recorded, f"its checkpoint cannot be loaded: {error}"
    if not fitted_on(stored, backbone):
        what = f"the file at {path} has SHA-256 {backbone.sha256[:12]}..., so it is another one"
        if given:
            raise EbmPriorError(f"{what}; the heads need {stored['sha256'][:12]}...")
        return recorded, what
    return {k: v for k, v in backbone_info(backbone).items() if k != "what"}, None
