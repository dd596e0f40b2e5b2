"""Fit heads on the shipped digits NVAE and draw from them, in Python.

    python examples/quickstart.py [FOLDER]

About two minutes on two cores; with SMOKE=1 a few seconds, and worse samples.
"""

import os
import sys
from pathlib import Path

import torch

import ebm_prior
from ebm_prior.data import load_images
from ebm_prior.images import labelled_rows, save_png

SMOKE = bool(os.environ.get("SMOKE"))
out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/quickstart")
checkpoint = Path(__file__).parent.parent / "checkpoints/nvae_digits/checkpoint.pt"

# 1. a frozen backbone: latent groups, T, q(z|x), p(x|z)
backbone = ebm_prior.load_backbone("nvae", checkpoint)
print(*(f"{group.name}: {group.shape}" for group in backbone.groups), sep="\n")

# 2. heads that barely tilt the prior yet
torch.manual_seed(0)
prior = ebm_prior.EnergyPrior.for_backbone(backbone, heads="joint")

# 3. fit them on posterior samples of the training images
images = load_images("digits").images
config = ebm_prior.FitConfig(nce_iterations=50 if SMOKE else 6000)
result = ebm_prior.fit(prior, images, config, run_dir=out)
print(result)

# 4. chains in noise space, from the Gaussian prior to the tilted one
generator = torch.Generator().manual_seed(0)
start = prior.noise(64, generator)
end = prior.run_chain(start, prior.sampler, generator=generator)
rows = [("Gaussian prior", prior.images(start)), ("energy prior", prior.images(end))]
save_png(out / "before-after.png", labelled_rows(rows, columns=16))

# 5. the run folder is a source of heads for later
again = ebm_prior.EnergyPrior.from_pretrained(out, backbone=backbone)
assert torch.equal(again.energy(backbone.transform(end)), prior.energy(backbone.transform(end)))
