"""BIVA (Maaloe et al., 2019) as a backbone: loads the public code's session folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from backbones.biva.checkpoint import Checkpoint, contents, read_checkpoint
from backbones.stages import StagedBackbone
from backbones.stages.checkpoint import is_session, network_files
from ebm_prior.likelihoods import BernoulliLikelihood, DiscretizedLogisticMixture

__all__ = ["contents", "load", "recognises"]

EDGE = 0.999  # from here on a pixel in [-1, 1] belongs to the outermost bin


def recognises(path: Path) -> bool:
    """A session folder with `hyperparameters.p`, or a file of it."""
    return is_session(path, "biva")


def load(path: str | Path, device: str | torch.device = "cpu") -> StagedBackbone:
    """Load a BIVA session (BIVA, LVAE or VAE stages), frozen, in evaluation mode.

    Args:
        path: Session folder, the weights inside it, or all of it as `.safetensors`.
        device: Where the weights go.

    Raises:
        EbmPriorError: If the folder is no complete BIVA session, does not fit itself or
            needs an option that is not supported; see `read_checkpoint`.
    """
    backbone = make_backbone(read_checkpoint(path)).to(device)
    backbone.files = network_files(path, "biva")
    return backbone


def make_backbone(checkpoint: Checkpoint) -> StagedBackbone:
    """The interface around a session's network."""
    mixture = checkpoint.mixture
    return StagedBackbone(
        checkpoint.network,
        partial(DiscretizedLogisticMixture, edge=EDGE) if mixture else BernoulliLikelihood,
        checkpoint.image_shape,
        checkpoint.padding,
        centred=mixture,
        dataset=checkpoint.dataset,
        binarize=not mixture,
    )
