"""A new backbone family, end to end: `python examples/new_backbone.py [FOLDER]`.

A family is one subclass of `Backbone` with a `load` function and, so that users need not name
it, `recognises`; `check_backbone` tests its laws. A package registers it in pyproject.toml:

    [project.entry-points."ebm_prior.backbones"]
    tiny = "new_backbone:load"
"""

import os
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributions import Normal

import ebm_prior
from ebm_prior.data import load_images
from ebm_prior.likelihoods import BinomialLikelihood
from ebm_prior.testing import check_backbone


def mlp(inputs, outputs):
    return nn.Sequential(nn.Linear(inputs, 128), nn.SiLU(), nn.Linear(128, outputs))


def gaussian(net, *inputs):
    mu, raw = net(torch.cat(inputs, 1)).chunk(2, 1)
    return Normal(mu, 0.05 + nn.functional.softplus(raw))


class TinyVAE(ebm_prior.Backbone):
    groups = (ebm_prior.LatentGroup("z2", (8,)), ebm_prior.LatentGroup("z1", (16,)))  # top first
    image_shape, feature_shape, dataset = (1, 8, 8), (24,), "digits"

    def __init__(self):
        super().__init__()
        self.p1, self.q2, self.q1 = mlp(8, 32), mlp(64, 16), mlp(72, 32)
        self.decoder = mlp(24, 64)

    def transform(self, eps, temperature=1.0):  # T; the top group is N(0, I)
        p1 = gaussian(self.p1, temperature * eps[0])
        return temperature * eps[0], p1.mean + temperature * p1.stddev * eps[1]

    def inverse(self, z):
        p1 = gaussian(self.p1, z[0])
        return z[0], (z[1] - p1.mean) / p1.stddev

    def posterior(self, x, noise=None, generator=None):
        noise = noise or [torch.randn(len(x), n, generator=generator) for n in (8, 16)]
        q2 = gaussian(self.q2, x.flatten(1))
        z2 = q2.mean + q2.stddev * noise[0]
        q1 = gaussian(self.q1, x.flatten(1), z2)
        z1 = q1.mean + q1.stddev * noise[1]
        q = [q2.log_prob(z2).sum(1), q1.log_prob(z1).sum(1)]
        p = [Normal(0, 1).log_prob(z2).sum(1), gaussian(self.p1, z2).log_prob(z1).sum(1)]
        return ebm_prior.Posterior((z2, z1), torch.stack(q, 1), torch.stack(p, 1))

    def features(self, z):  # what a joint head reads
        return torch.cat(list(z), 1)

    def decode(self, z):  # a pixel of these digits counts 0 to 16 inked points
        return BinomialLikelihood(self.decoder(self.features(z)).reshape(-1, 1, 8, 8), 16)


def load(path, device="cpu"):
    backbone = TinyVAE()
    backbone.load_state_dict(load_file(path))
    return backbone.to(device)


def recognises(path):
    """A `.safetensors` file with the weights of a tiny VAE."""
    with path.open("rb") as file:
        return b'"decoder.2.weight"' in file.read(4096)


if __name__ == "__main__":
    quick = "SMOKE" in os.environ
    out = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/new-backbone")
    out.mkdir(parents=True)
    torch.manual_seed(0)
    images, network = load_images("digits").images, TinyVAE()
    optimizer = torch.optim.Adam(network.parameters(), 2e-3)  # 1. somebody trains it by its ELBO
    for _ in range(50 if quick else 6000):
        x = images[torch.randint(len(images), (128,))] / 255
        z, log_q, log_p = network.posterior(x)
        optimizer.zero_grad()
        ((log_q - log_p).sum(1) - network.decode(z).log_prob(x)).mean().backward()
        optimizer.step()
    save_file(network.state_dict(), out / "tiny.safetensors")
    backbone = load(out / "tiny.safetensors").freeze()  # 2. once registered: load_backbone
    check_backbone(backbone)
    prior = ebm_prior.EnergyPrior.for_backbone(backbone, heads="joint")  # 3. as on any family
    config = ebm_prior.FitConfig(nce_iterations=50 if quick else 3000)
    print(ebm_prior.fit(prior, images, config, run_dir=out / "run"))
