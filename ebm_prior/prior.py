"""EnergyPrior: a frozen backbone and the energy heads that tilt its prior."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ebm_prior import hub
from ebm_prior.backbone import Backbone, Latents
from ebm_prior.compiled import CompiledEnergy
from ebm_prior.errors import EbmPriorError
from ebm_prior.heads import check_layers, make_heads
from ebm_prior.langevin import Generators, StepInfo, check_settings, randn
from ebm_prior.micro_batch import ChainMemory, MicroBatched
from ebm_prior.precision import check_precision, tower_precision
from ebm_prior.transitions import TRANSITIONS

__all__ = ["EnergyPrior", "SamplerConfig"]

HEAD_KINDS = ("factorized", "joint", "both")


@dataclass(frozen=True)
class SamplerConfig:
    """How the heads were sampled while fitted, hence how to sample them now.

    Attributes:
        transition: `langevin` (the paper's step), one of the Metropolis-adjusted: `mala`,
            `hmc`, `pcnl`, or `sir`, importance resampling.
        steps: Transitions from N(0, I).
        step_size: s of any transition: the variance of `langevin`'s noise. `sir` ignores it.
    """

    transition: str = "pcnl"
    steps: int = 40
    step_size: float = 0.3

    def __post_init__(self) -> None:
        if self.transition not in TRANSITIONS:
            raise EbmPriorError(
                f"transition must be one of {', '.join(TRANSITIONS)}, got {self.transition!r}"
            )
        check_settings(self.steps, self.step_size)

    def __str__(self) -> str:
        """Such as `40 pcnl steps of size 0.3`."""
        size = f" of size {self.step_size:.3g}" if self.sized else ""
        return f"{self.steps} {self.transition} steps{size}"

    @property
    def sized(self) -> bool:
        """Whether the step size matters."""
        return TRANSITIONS[self.transition].sized


def head_shapes(
    groups: Iterable[tuple[str, Sequence[int]]], feature_shape: Sequence[int], kind: str
) -> dict[str, tuple[int, ...]]:
    """Name and input shape of every head of a kind (`factorized`, `joint` or `both`).

    Args:
        groups: Name and shape of every latent group.
        feature_shape: Shape of the backbone's features.
        kind: Which heads.
    """
    if kind not in HEAD_KINDS:
        raise EbmPriorError(f"heads must be one of {', '.join(HEAD_KINDS)}, got {kind!r}")
    shapes = {name: tuple(shape) for name, shape in groups} if kind != "joint" else {}
    return shapes if kind == "factorized" else {**shapes, "joint": tuple(feature_shape)}


class EnergyPrior(nn.Module):
    """p(z) proportional to exp(-sum_i E_i) p_backbone(z)   (Eq. 6-7, with E = -f).

    `factorized` has one head per latent group, on z_i alone (the paper's form). `joint`
    has one head on the backbone's deterministic features after the last group, hence a
    function of all groups at once. `both` sums them.

    Args:
        backbone: Frozen hierarchical VAE. It stays frozen and in evaluation mode.
        heads: `factorized`, `joint` or `both`.
        nef: Channels of the heads' convolutions (Table 12).
        ndf: Units of the heads' linear layers (Table 12).
        sampler: Default transition, steps and step size.
        layers: For every head, the top group's first, the units of each of its linear layers,
            such as ((100, 100), (200, 200, 200, 200)) of Table 12, in place of `ndf`.

    Attributes:
        micro_batch: Chains whose gradient is taken at once, None for as many as fit into the
            memory that is free when a chain of their density and number first starts: fewer
            need less, for the same result. Halves itself when memory runs out.
        chain_memory: What is known of how many fit.
        compiled: Whether gradients in eps, hence chains, run compiled (`CompiledEnergy`), for
            the same result up to rounding.
    """

    def __init__(
        self,
        backbone: Backbone,
        heads: str = "factorized",
        nef: int = 64,
        ndf: int = 200,
        sampler: SamplerConfig | None = None,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> None:
        super().__init__()
        groups = [(group.name, group.shape) for group in backbone.groups]
        inputs = head_shapes(groups, backbone.feature_shape, heads)
        if nef < 1 or ndf < 1:
            raise EbmPriorError(f"nef and ndf must be at least 1, got {nef} and {ndf}")
        if layers is not None:
            check_layers(layers, [*inputs])
            layers = tuple(map(tuple, layers))
        self.backbone = backbone.freeze()
        self.kind, self.nef, self.ndf, self.layers = heads, nef, ndf, layers
        self.sampler = sampler or SamplerConfig()
        self.micro_batch: int | None = None
        self.chain_memory = ChainMemory()
        self.compiled = False
        self._compiled_energy = CompiledEnergy(EnergyPrior._energy_of_noise)
        self._precision = "fp32"
        self.reads_groups = heads in ("factorized", "both")
        self.reads_features = heads in ("joint", "both")
        self.head_names = tuple(inputs)
        self.heads = make_heads(inputs.values(), nef, ndf, layers)
        self.heads.to(device=backbone.device, dtype=backbone.dtype)

    @classmethod
    def for_backbone(
        cls,
        backbone: Backbone,
        heads: str = "factorized",
        nef: int = 64,
        ndf: int = 200,
        sampler: SamplerConfig | None = None,
        layers: Sequence[Sequence[int]] | None = None,
    ) -> EnergyPrior:
        """New heads, barely tilting, for the groups and features of a backbone."""
        return cls(backbone, heads, nef, ndf, sampler, layers)

    def head_inputs(self, z: Sequence[Tensor], features: Tensor | None = None) -> Latents:
        """What the heads read: one tensor per head.

        Args:
            z: Latents, one (B, *shape) per group.
            features: `backbone.features(z)` where it is already known.
        """
        inputs = tuple(z) if self.reads_groups else ()
        if self.reads_features:
            inputs += (self.backbone.features(z) if features is None else features,)
        return inputs

    def energies_of(self, inputs: Sequence[Tensor]) -> Tensor:
        """Energy of every head on its own input: (B, number of heads), nats."""
        pairs = zip(self.heads, inputs, strict=True)
        return torch.stack([head(tensor) for head, tensor in pairs], 1)

    def energies(self, z: Sequence[Tensor]) -> Tensor:
        """Energy of every head: (B, number of heads), nats, in the order of `head_names`."""
        self.backbone.check_latents(z, "z")
        return self.energies_of(self.head_inputs(z))

    def energy(self, z: Sequence[Tensor]) -> Tensor:
        """Total energy of latents: (B,), nats."""
        return self.energies(z).sum(1)

    @property
    def precision(self) -> str:
        """Of the top-down pass in `energy_of_noise`, hence in chains: `fp32` or `bf16`.

        With `bf16` (autocast) noise and heads stay in float32, and so does the pass that makes
        images. How chains are run, not what they sample: it is not stored with the heads.
        """
        return self._precision

    @precision.setter
    def precision(self, value: str) -> None:
        check_precision(value, self.backbone)
        self._precision = value

    def energy_of_noise(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """E(T(eps)): (B,), nats; one top-down pass serves groups and features."""
        if self.compiled and torch.is_grad_enabled() and any(e.requires_grad for e in eps):
            return self._compiled_energy(self, tuple(eps), temperature)
        return self._energy_of_noise(eps, temperature)

    def _energy_of_noise(self, eps: Sequence[Tensor], temperature: float) -> Tensor:
        with tower_precision(self.precision, self.backbone.device):
            if self.reads_features:
                inputs = self.head_inputs(*self.backbone.top_down(eps, temperature))
            else:
                inputs = self.backbone.transform(eps, temperature)
        return self.energies_of([tensor.to(eps[0].dtype) for tensor in inputs]).sum(1)

    def log_density(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Log p(eps) = -E(T(eps)) - |eps|^2 / 2 + const (App. A.3): (B,), nats."""
        half_norm = sum(e.square().flatten(1).sum(1) for e in eps) / 2
        return -self.energy_of_noise(eps, temperature) - half_norm

    def noise(self, n: int, generator: Generators = None) -> Latents:
        """Eps ~ N(0, I) for n samples, one tensor per group."""
        sizes = [group.numel for group in self.backbone.groups]
        like = torch.empty((n, sum(sizes)), device=self.backbone.device, dtype=self.backbone.dtype)
        parts = randn(like, generator).split(sizes, 1)
        return tuple(
            part.reshape(n, *group.shape)
            for part, group in zip(parts, self.backbone.groups, strict=True)
        )

    def sample_eps(
        self,
        n: int,
        steps: int | None = None,
        step_size: float | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        transition: str | None = None,
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Latents:
        """Chains of the tilted prior, started at eps ~ N(0, I).

        Args:
            n: Number of samples.
            steps: Transitions; the stored number by default.
            step_size: s; the stored one by default.
            temperature: Multiplies every prior sigma.
            generator: One generator, or one per sample.
            transition: A name in `TRANSITIONS`; the stored one by default.
            callback: Called with a `StepInfo` after every step.

        Returns:
            One tensor per group, (n, *shape).
        """
        if n < 1:
            raise EbmPriorError(f"number of samples must be at least 1, got {n}")
        if not temperature > 0:
            raise EbmPriorError(f"temperature must be positive, got {temperature}")
        config = SamplerConfig(
            transition or self.sampler.transition,
            self.sampler.steps if steps is None else steps,
            self.sampler.step_size if step_size is None else step_size,
        )
        return self.run_chain(
            self.noise(n, generator),
            config,
            temperature=temperature,
            generator=generator,
            callback=callback,
        )

    def run_chain(
        self,
        eps: Latents,
        config: SamplerConfig,
        temperature: float = 1.0,
        generator: Generators = None,
        callback: Callable[[StepInfo], None] | None = None,
        complete: Callable[..., Latents] = tuple,
        held: Sequence[Tensor] = (),
        kind: str = "",
    ) -> Latents:
        """Chains of the tilted prior from any start.

        Args:
            eps: Start of what moves.
            config: Transition, steps and step size.
            temperature: Multiplies every prior sigma.
            generator: One generator, or one per sample.
            callback: Called with a `StepInfo` after every step.
            complete: Makes the noise of all groups of a chain's state and of the same samples'
                `held`, where only some groups move.
            held: One tensor each, (B, *).
            kind: Says which groups move, as their gradients differ in memory.

        Returns:
            The chains' last states, shaped as `eps`.
        """
        transition = TRANSITIONS[config.transition]
        density = getattr(self, transition.density)
        with frozen(self.heads):
            return transition.chain(
                MicroBatched(
                    lambda e, *h: density(complete(e, *h), temperature), self, held, kind
                ),
                eps,
                steps=config.steps,
                step_size=config.step_size,
                generator=generator,
                callback=callback,
            )

    def sample(
        self,
        n: int,
        steps: int | None = None,
        step_size: float | None = None,
        temperature: float = 1.0,
        generator: Generators = None,
        transition: str | None = None,
        callback: Callable[[StepInfo], None] | None = None,
    ) -> Tensor:
        """Images drawn from the tilted prior, (n, C, H, W) in [0, 1].

        The decoder's mean is shown, so an image is a function of its latents alone.
        Arguments as in `sample_eps`.
        """
        eps = self.sample_eps(n, steps, step_size, temperature, generator, transition, callback)
        return self.images(eps, temperature)

    @torch.no_grad()
    def images(self, eps: Sequence[Tensor], temperature: float = 1.0) -> Tensor:
        """Decoder mean at T(eps): (n, C, H, W) in [0, 1]."""
        return self.backbone.decode(self.backbone.transform(eps, temperature)).mean

    def config(self) -> dict:
        """Head and sampler settings as plain values."""
        heads: dict[str, Any] = {"kind": self.kind, "nef": self.nef, "ndf": self.ndf}
        if self.layers is not None:
            heads["layers"] = [list(widths) for widths in self.layers]
        return {"heads": heads, "sampler": asdict(self.sampler)}

    def save_pretrained(self, directory: str | Path, **options: Any) -> str | None:
        """Write `heads.safetensors`, `config.json` and, if there is none, a model card.

        Args:
            directory: Created if needed.
            options: `training`, settings and results to record in the configuration;
                `push_to_hub=True` with `repo_id` and any option of `push_to_hub`.

        Returns:
            What `push_to_hub` returns, if it was asked for.
        """
        return hub.save_pretrained(self, directory, **options)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path | hub.HeadsSource,
        *,
        backbone: Backbone,
        check_backbone: bool = True,
        **hub_options: Any,
    ) -> EnergyPrior:
        """Load heads from a saved folder, a run folder or a Hub id (`name@revision`).

        Only JSON and safetensors are read, and only after their sizes, fields, shapes and
        values have been checked.

        Args:
            source: Where the heads are.
            backbone: The backbone they were fitted on.
            check_backbone: Refuse a backbone whose SHA-256 differs from the stored one.
            hub_options: `revision`, `token`, `cache_dir`, `force_download` and
                `local_files_only`, as everywhere in `huggingface_hub`.

        Raises:
            EbmPriorError: If there are no heads, they are damaged or of a later format, or
                they were fitted on another backbone.
        """
        return hub.from_pretrained(
            cls, source, backbone=backbone, check_backbone=check_backbone, **hub_options
        )

    def push_to_hub(self, repo_id: str, **options: Any) -> str:
        """Upload heads, configuration and model card to the Hugging Face Hub, in one commit.

        Args:
            repo_id: `user/name`; created if there is none.
            options: `private`, `token`, `branch`, `create_pr`, `commit_message` as everywhere
                in `huggingface_hub`; `training` as for `save_pretrained`; for the card
                `license`, `backbone_source`, `backbone_license`, and `pictures=False` to
                leave out the sample grids, which are drawn first.

        Returns:
            URL of the commit or pull request.

        Raises:
            EbmPriorError: If the Hub cannot be reached or refuses; nothing is published then.
        """
        return hub.push_to_hub(self, repo_id, **options)

    def extra_repr(self) -> str:
        """Head kind and sampler, for `print(prior)`."""
        layers = "" if self.layers is None else f"layers={self.layers}, "
        return f"kind={self.kind}, nef={self.nef}, ndf={self.ndf}, {layers}{self.sampler!r}"


class frozen:  # noqa: N801
    """Context: parameters of a module need no gradient, so a chain saves none for them."""

    def __init__(self, module: nn.Module) -> None:
        self.parameters = [p for p in module.parameters() if p.requires_grad]

    def __enter__(self) -> None:
        for p in self.parameters:
            p.requires_grad_(False)

    def __exit__(self, *_: object) -> None:
        for p in self.parameters:
            p.requires_grad_(True)
