"""HVAE (Havtorn et al., 2021) as a backbone: loads the public code's model folder."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch

from backbones.hvae.checkpoint import Checkpoint, contents, read_checkpoint
from backbones.hvae.likelihoods import DiscretizedLogistic
from backbones.stages import StagedBackbone
from backbones.stages.checkpoint import is_session, network_files
from ebm_prior.likelihoods import BernoulliLikelihood, DiscretizedLogisticMixture

__all__ = ["contents", "load", "recognises"]

LIKELIHOODS = {
    "bernoulli": BernoulliLikelihood,
    "logistic": DiscretizedLogistic,
    # From 0.999 on a pixel in [-1, 1] belongs to the outermost bin.
    "mixture": partial(DiscretizedLogisticMixture, edge=0.999),
}


def recognises(path: Path) -> bool:
    """A model folder with `model_class_name.pt`, or a file of it."""
    return is_session(path, "hvae")


def load(path: str | Path, device: str | torch.device = "cpu") -> StagedBackbone:
    """Load an HVAE model (VAE, LVAE or BIVA), frozen, in evaluation mode.

    Args:
        path: Model folder, the weights inside it, or all of it as `.safetensors`.
        device: Where the weights go.

    Raises:
        EbmPriorError: If the folder is no complete HVAE model, does not fit itself or needs
            an option that is not supported; see `read_checkpoint`.
    """
    backbone = make_backbone(read_checkpoint(path)).to(device)
    backbone.files = network_files(path, "hvae")
    return backbone


def make_backbone(checkpoint: Checkpoint) -> StagedBackbone:
    """The interface around a model's network."""
    return StagedBackbone(
        checkpoint.network,
        LIKELIHOODS[checkpoint.likelihood],
        checkpoint.image_shape,
        checkpoint.padding,
        dataset=checkpoint.dataset,
        binarize=checkpoint.likelihood == "bernoulli",
    )
