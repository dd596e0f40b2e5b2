"""The paper's multi-layer generator (Table 12) as a backbone, and its file.

The file is one safetensors file, our own format, that `ebm_prior.convert` describes: the
sizes as JSON beside the weights. Nothing in it can run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.distributions import Normal

from backbones.generator.network import (
    POSTERIOR_BOUND,
    PRIOR_BOUND,
    GeneratorConfig,
    gaussian,
    image_decoder,
    image_encoder,
    mlp,
)
from ebm_prior.backbone import Backbone, LatentGroup, Latents, Posterior
from ebm_prior.convert import encode
from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import randn
from ebm_prior.likelihoods import GaussianLikelihood
from ebm_prior.safe_load import load_torch_file, mentions, plain_state

__all__ = ["Generator", "GeneratorConfig", "checkpoint_bytes", "load", "recognises"]

FAMILY = "generator"
MARK = "p_x.0.weight"  # a weight that no other family has


class Generator(Backbone):
    """p(z_L) prod p(z_i|z_{i+1}) p(x|z_1), with q(z_1|x) prod q(z_{i+1}|z_i).

    Groups are named as in the paper, z_L (the top, group 0) to z_1. `features`, what a joint
    head reads, is all of them side by side: the image depends on z_1 alone, so a state after
    the last group would hide the upper layers from the head, and with one layer both are the
    same.

    Args:
        config: Sizes; the weights are PyTorch's random ones.
    """

    def __init__(self, config: GeneratorConfig) -> None:
        super().__init__()
        self.config = config
        sizes, hidden = config.latents, config.hidden
        top = len(sizes)
        self.groups = tuple(LatentGroup(f"z{top - i}", (n,)) for i, n in enumerate(sizes))
        self.image_shape, self.dataset = config.image_shape, config.dataset
        self.feature_shape = (sum(sizes),)
        pairs = list(zip(sizes, sizes[1:], strict=False))  # (upper, lower), top first
        self.p_z = nn.ModuleList(mlp(upper, hidden, 2 * lower) for upper, lower in pairs)
        self.p_x = image_decoder(config)
        self.q_z = nn.ModuleList(mlp(lower, hidden, 2 * upper) for upper, lower in pairs)
        self.q_x = image_encoder(config)

    # -- the generator --------------------------------------------------------------------

    def prior(self, i: int, above: Tensor) -> Normal:
        """p(z_i | z of the group above); of the top group N(0, I), shaped as `above`."""
        if i == 0:
            zero = torch.zeros_like(above)
            return Normal(zero, zero + 1, validate_args=False)
        return gaussian(self.p_z[i - 1], above, PRIOR_BOUND)

    def transform(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Latents:
        """z_i = mu_i + temperature * sigma_i * eps_i, from the top (Eq. 28-29)."""
        self.check_latents(eps, "eps")
        z: list[Tensor] = []
        for i, noise in enumerate(eps):
            p = self.prior(i, z[-1] if z else noise)
            z.append(p.loc + temperature * p.scale * noise)
        return tuple(z)

    def inverse(self, z: Sequence[Tensor]) -> Latents:
        """eps_i = (z_i - mu_i) / sigma_i."""
        return tuple((value - p.loc) / p.scale for value, p in self._priors(z))

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """Log p(z_i | z_{i+1}): (B, L), nats; differentiable, in the weights too."""
        return torch.stack([p.log_prob(value).sum(1) for value, p in self._priors(z)], 1)

    def _priors(self, z: Sequence[Tensor]) -> list[tuple[Tensor, Normal]]:
        self.check_latents(z, "z")
        above = [z[0], *z[:-1]]
        return [(value, self.prior(i, above[i])) for i, value in enumerate(z)]

    def features(self, z: Sequence[Tensor]) -> Tensor:
        """All layers side by side, (B, sum of their units)."""
        self.check_latents(z, "z")
        return torch.cat([*z], 1)

    def decode(self, z: Sequence[Tensor]) -> GaussianLikelihood:
        """N(g(z_1), sigma^2 I) on pixels in [-1, 1], as the density over [0, 1] that it is.

        With y = 2x - 1, log p(x) = log p(y) + log 2 per pixel: mean (g + 1) / 2 and standard
        deviation sigma / 2.
        """
        self.check_latents(z, "z")
        g = torch.tanh(self.p_x(z[-1][:, :, None, None]))
        return GaussianLikelihood(0.5 * g + 0.5, self.config.sigma / 2)

    # -- the inference network ------------------------------------------------------------

    def inference(self, i: int, x: Tensor, z: Sequence[Tensor]) -> Normal:
        """q(z_i | what is below it): of the bottom group the image, else z[i + 1]."""
        if i == len(self.groups) - 1:
            return gaussian(self.q_x, 2 * x.to(self.dtype) - 1, POSTERIOR_BOUND)
        return gaussian(self.q_z[i], z[i + 1], POSTERIOR_BOUND)

    def posterior(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """Draw z_1 ~ q(z_1|x), then upwards; differentiable in all weights (Eq. 4).

        Column i of `log_q` is log q(z_i | what is below it).
        """
        self.check_images(x)
        if noise is None:
            like = torch.empty(0, dtype=self.dtype, device=self.device)
            noise = [randn(like.new_empty(len(x), *g.shape), generator) for g in self.groups]
        self.check_latents(noise, "noise")
        z, log_q = [*noise], [*noise]
        for i in reversed(range(len(z))):
            q = self.inference(i, x, z)
            z[i] = q.loc + q.scale * noise[i]
            log_q[i] = q.log_prob(z[i]).sum(1)
        return Posterior(tuple(z), torch.stack(log_q, 1), self.log_prior(z))

    def log_posterior(self, x: Tensor, z: Sequence[Tensor]) -> Tensor:
        """Log q(z_i | what is below it) of given latents: (B, L), nats."""
        self.check_images(x)
        self.check_latents(z, "z")
        terms = [self.inference(i, x, z).log_prob(value).sum(1) for i, value in enumerate(z)]
        return torch.stack(terms, 1)


def checkpoint_bytes(backbone: Generator) -> bytes:
    """A generator as one safetensors file; `load` reads it."""
    state = {name: value.detach().cpu() for name, value in backbone.state_dict().items()}
    config = backbone.config.to_dict()
    return encode({"family": FAMILY, "config": config, "state_dict": state}, "the generator")


def recognises(path: Path) -> bool:
    """A `.safetensors` file with a generator's weights."""
    return path.suffix == ".safetensors" and mentions(path, MARK)


def load(path: str | Path, device: str | torch.device = "cpu") -> Generator:
    """Load a file of `checkpoint_bytes`, frozen, in evaluation mode.

    Raises:
        EbmPriorError: If it is no generator's, damaged, or its weights do not fit its sizes.
    """
    path = Path(path)
    data = load_torch_file(path)
    keys = {"family", "config", "state_dict"}
    if not isinstance(data, Mapping) or data.keys() != keys or data["family"] != FAMILY:
        raise EbmPriorError(f"{path} is no generator's file")
    if not isinstance(data["config"], Mapping) or not isinstance(data["state_dict"], Mapping):
        raise EbmPriorError(f"{path} is damaged: no tables of sizes and weights; fetch it again")
    try:
        config = GeneratorConfig.from_dict(data["config"])
    except EbmPriorError as error:
        raise EbmPriorError(f"{path}: {error}") from error
    state = plain_state(data["state_dict"], path)
    with torch.device("meta"):  # sizes are a stranger's: no memory before they are compared
        backbone = Generator(config)
    expected = backbone.state_dict()
    if wrong := sorted(expected.keys() ^ state.keys()):
        raise EbmPriorError(f"{path} does not fit its sizes: weight {wrong[0]}")
    for name, value in expected.items():
        if value.shape != state[name].shape:
            raise EbmPriorError(
                f"{path}: layer sizes do not chain: weight {name} is "
                f"{tuple(state[name].shape)}, the sizes need {tuple(value.shape)}"
            )
        if not state[name].is_floating_point():
            raise EbmPriorError(f"{path}: weight {name} holds no floating-point numbers")
    backbone.load_state_dict(state, assign=True)
    return backbone.to(device).freeze()
