"""Energy priors for pretrained hierarchical VAEs.

backbone = ebm_prior.load_backbone("nvae", "checkpoint.pt")
prior = ebm_prior.EnergyPrior.from_pretrained("runs/mine", backbone=backbone)
images = prior.sample(16, steps=40)
"""

import os

# OpenMP threads that spin while they wait make torch ten times slower as soon as another
# process wants a core. This has an effect only where torch is not imported yet.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from ebm_prior._version import __version__
from ebm_prior.backbone import Backbone, LatentGroup, Likelihood, Posterior
from ebm_prior.errors import EbmPriorError
from ebm_prior.fit import FitConfig, FitResult, fit
from ebm_prior.hmc import hmc, mala
from ebm_prior.langevin import langevin, pcnl
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.registry import detect_backbone, list_backbones, load_backbone

__all__ = [
    "Backbone",
    "EbmPriorError",
    "EnergyPrior",
    "FitConfig",
    "FitResult",
    "LatentGroup",
    "Likelihood",
    "Posterior",
    "SamplerConfig",
    "__version__",
    "detect_backbone",
    "fit",
    "hmc",
    "langevin",
    "list_backbones",
    "load_backbone",
    "mala",
    "pcnl",
]
