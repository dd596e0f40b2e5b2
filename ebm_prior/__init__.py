"""Energy priors for pretrained hierarchical VAEs."""

from ebm_prior._version import __version__
from ebm_prior.backbone import Backbone, LatentGroup, Likelihood, Posterior
from ebm_prior.errors import EbmPriorError
from ebm_prior.registry import list_backbones, load_backbone

__all__ = [
    "Backbone",
    "EbmPriorError",
    "LatentGroup",
    "Likelihood",
    "Posterior",
    "__version__",
    "list_backbones",
    "load_backbone",
]
