"""NVAE (Vahdat and Kautz, 2020) as a backbone: loads the public code's `checkpoint.pt`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from backbones.nvae.checkpoint import PADDED, Checkpoint, read_checkpoint
from backbones.nvae.likelihoods import NvaeGaussian, NvaeLogisticMixture, reduce_bits
from backbones.nvae.network import TOP_SIGMA, GroupPosterior, Network, log_normal
from ebm_prior.backbone import Backbone, LatentGroup, Latents, Likelihood, Posterior
from ebm_prior.errors import EbmPriorError
from ebm_prior.langevin import randn
from ebm_prior.likelihoods import BernoulliLikelihood, BinomialLikelihood
from ebm_prior.safe_load import mentions

__all__ = ["NVAEBackbone", "load", "recognises"]

DIGITS_LEVELS = 16  # scikit-learn's digits hold counts of 0 to 16
PADDING = 2  # MNIST and OMNIGLOT: 28x28 images in a 32x32 network


class NVAEBackbone(Backbone):
    """A trained NVAE.

    Group names are z0 (top), z1, ...; normalizing flows, where the model has them, are
    part of `posterior` only. `features` is the decoder state after the last group's
    latents are combined in, before any further cell.

    Args:
        checkpoint: What `read_checkpoint` returned.
    """

    checkpointing = False

    def __init__(self, checkpoint: Checkpoint) -> None:
        super().__init__()
        config = checkpoint.config
        self.network = checkpoint.network
        self.bits = checkpoint.bits
        self.likelihood = checkpoint.likelihood
        self.dataset = checkpoint.dataset
        padded = checkpoint.dataset in PADDED
        self.binarize = padded
        self.padding = PADDING if padded else 0
        side = config.image_size - 2 * self.padding
        self.image_shape = (config.image_channels, side, side)
        self.groups = tuple(
            LatentGroup(f"z{i}", shape) for i, shape in enumerate(self.network.group_shapes)
        )
        self.feature_shape = self.network.feature_shape
        self.freeze()
        self.refold()
        self.register_load_state_dict_post_hook(_refold)

    def refold(self) -> None:
        """Drop the fast form; call after changing a weight of `network` in place."""
        # Kept out of the module tree: it repeats `network`'s weights, and must be built
        # from them again, not cast, when the type changes.
        self._fast: tuple[Network, ...] = ()

    @property
    def fast(self) -> Network:
        """The network as plain convolutions, which all evaluation uses."""
        if not self._fast:
            with torch.inference_mode(False), torch.no_grad():
                self._fast = (self.network.folded(),)
        return self._fast[0]

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        module = super()._apply(fn, recurse)
        self.refold()
        return module

    def transform(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Latents:
        """T: noise to latents; stops at the last group's latents."""
        return self._run(eps, temperature, features=False)[0]

    def top_down(self, eps: Sequence[Tensor], temperature: float = 1.0) -> tuple[Latents, Tensor]:
        """Latents and the state after the last group, in one pass."""
        return self._run(eps, temperature, features=True)

    def _run(
        self, eps: Sequence[Tensor], temperature: float, features: bool
    ) -> tuple[Latents, Tensor | None]:
        self.check_latents(eps, "eps")

        def draw(index: int, state: Tensor) -> Tensor:
            if index == 0:
                return (TOP_SIGMA * temperature) * eps[0]
            mu, sigma = self.fast.prior_params(index, state)
            sigma = sigma if temperature == 1 else temperature * sigma
            return torch.addcmul(mu, sigma, eps[index])

        z, state = self.fast.descend(draw, features, bool(self.checkpointing))
        return tuple(z), None if state is None else state.contiguous()

    def prior_parameters(self, z: Sequence[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Mean and deviation of p(z_i | z_>i) at temperature 1 for each group.

        Args:
            z: Latents, (B, *group.shape) per group.

        Returns:
            Pairs of tensors (B, *group.shape).
        """
        self.check_latents(z, "z")
        moments: list[tuple[Tensor, Tensor]] = []

        def draw(index: int, state: Tensor) -> Tensor:
            if index == 0:
                moments.append((torch.zeros_like(z[0]), torch.full_like(z[0], TOP_SIGMA)))
            else:
                moments.append(self.fast.prior_params(index, state))
            return z[index]

        self.fast.descend(draw, features=False)
        return moments

    def inverse(self, z: Sequence[Tensor]) -> Latents:
        """T^-1: (z_i - mu_i(z_>i)) / sigma_i(z_>i)."""
        moments = self.prior_parameters(z)
        return tuple((v - mu) / sigma for v, (mu, sigma) in zip(z, moments, strict=True))

    def log_prior(self, z: Sequence[Tensor]) -> Tensor:
        """Log p(z_i | z_>i) of any latents: (B, L), nats."""
        moments = self.prior_parameters(z)
        return torch.stack([log_normal(v, *p) for v, p in zip(z, moments, strict=True)], 1)

    def posterior(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> Posterior:
        """Draw from q(z|x), flows applied; `log_q` is that of the sample before them."""
        groups = self.infer(x, noise, generator)
        return Posterior(
            tuple(group.z.contiguous() for group in groups),
            torch.stack([group.log_q for group in groups], 1),
            torch.stack([group.log_p for group in groups], 1),
        )

    def infer(
        self,
        x: Tensor,
        noise: Sequence[Tensor] | None = None,
        generator: torch.Generator | None = None,
    ) -> list[GroupPosterior]:
        """Like `posterior`, with every distribution's parameters, one entry per group."""
        self.check_images(x)
        if noise is None:
            noise = self._noise(len(x), generator)
        self.check_latents(noise, "noise")
        return self.fast.infer(self._prepare(x), noise, features=False)[0]

    def encode(self, x: Tensor, noise: Sequence[Tensor]) -> tuple[Latents, Tensor]:
        """Posterior draw and the decoder state after it, in one pass."""
        self.check_images(x)
        self.check_latents(noise, "noise")
        groups, state = self.fast.infer(self._prepare(x), noise, features=True)
        return tuple(group.z.contiguous() for group in groups), state.contiguous()

    def features(self, z: Sequence[Tensor]) -> Tensor:
        """Decoder state after the last group's combiner, (B, *feature_shape)."""
        self.check_latents(z, "z")
        _, state = self.fast.descend(lambda index, _: z[index], True, bool(self.checkpointing))
        return state.contiguous()

    def decode(self, z: Sequence[Tensor], features: Tensor | None = None) -> Likelihood:
        """p(x|z).

        Args:
            z: Latents.
            features: `features(z)`, where already known.
        """
        if features is None:
            features = self.features(z)
        return self._likelihood(self.fast.decode(features).contiguous())

    def _likelihood(self, params: Tensor) -> Likelihood:
        if self.likelihood == "bernoulli":
            return BernoulliLikelihood(params, crop=self.padding)
        if self.likelihood == "binomial":
            return BinomialLikelihood(params, DIGITS_LEVELS)
        if self.likelihood == "gaussian":
            return NvaeGaussian(params, self.bits)
        return NvaeLogisticMixture(params, self.bits)

    def _prepare(self, x: Tensor) -> Tensor:
        """Images as the encoder takes them: fewer bits, zero border."""
        x = reduce_bits(x, self.bits)
        return nn.functional.pad(x, [self.padding] * 4) if self.padding else x

    def _noise(self, batch: int, generator: torch.Generator | None) -> list[Tensor]:
        """Standard-normal tensor (batch, *shape) per group."""
        like = torch.empty(batch, device=self.device, dtype=self.dtype)
        return [randn(like.new_empty(batch, *group.shape), generator) for group in self.groups]

    @torch.no_grad()
    def readjust_batchnorm(
        self,
        temperature: float,
        batches: int = 500,
        batch_size: int = 16,
        generator: torch.Generator | None = None,
    ) -> NVAEBackbone:
        """Replace the decoder's batch-norm statistics by those of prior samples.

        NVAE's procedure for sampling below temperature 1, where activations drift from
        the statistics gathered in training: decode prior samples at `temperature` with
        batch norm in training mode, average the batch statistics, then go back to
        evaluation mode. The encoder is left alone. In place, and it changes T: call it
        before fitting heads, and the same way before using them.

        Args:
            temperature: Temperature of the prior samples.
            batches: Number of batches to average over.
            batch_size: Samples per batch.
            generator: Source of the noise.

        Returns:
            self.
        """
        if batches < 1 or batch_size < 2:
            raise EbmPriorError("readjust_batchnorm needs batches >= 1 and batch_size >= 2")
        norms = [
            module
            for part in (self.network.dec_tower, self.network.post_process)
            for module in part.modules()
            if isinstance(module, nn.BatchNorm2d)
        ]
        momenta = [norm.momentum for norm in norms]
        for norm in norms:
            norm.reset_running_stats()
            norm.momentum = None  # cumulative average
            norm.train()
        try:
            for _ in range(batches):
                eps = self._noise(batch_size, generator)

                def draw(index: int, state: Tensor, eps: Sequence[Tensor] = eps) -> Tensor:
                    if index == 0:
                        return (TOP_SIGMA * temperature) * eps[0]
                    mu, sigma = self.network.prior_params(index, state)
                    return mu + temperature * sigma * eps[index]

                self.network.decode(self.network.descend(draw)[1])
        finally:
            for norm, momentum in zip(norms, momenta, strict=True):
                norm.momentum = momentum
                norm.eval()
        self.refold()
        return self


def _refold(module: NVAEBackbone, _: object) -> None:
    module.refold()


def recognises(path: Path) -> bool:
    """A `checkpoint.pt` with the weights of an NVAE, or a folder that holds one."""
    # the learned start of the top-down path, which every NVAE has
    return mentions(path / "checkpoint.pt" if path.is_dir() else path, "prior_ftr0")


def load(path: str | Path, device: str | torch.device = "cpu") -> NVAEBackbone:
    """Load NVAE's `checkpoint.pt`, frozen, in evaluation mode.

    Raises:
        EbmPriorError: If the file is no NVAE checkpoint, does not fit its own arguments or
            needs an option that is not supported; see `read_checkpoint`.
    """
    backbone = NVAEBackbone(read_checkpoint(path)).to(device)
    _ = backbone.fast  # fold now rather than in the first call
    return backbone
