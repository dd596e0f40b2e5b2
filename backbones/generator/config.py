"""Settings of joint training, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import Any, ClassVar

from backbones.generator.network import GeneratorConfig
from backbones.loop import LoopConfig
from ebm_prior.errors import EbmPriorError
from ebm_prior.heads import check_layers
from ebm_prior.prior import HEAD_KINDS, head_shapes

__all__ = ["PRESETS", "TrainConfig"]

METHODS = ("mle", "variational")
PRIORS = ("ebm", "gaussian")

TABLE_12 = {
    "latents": (100, 100), "hidden": (200, 200), "ngf": 128, "prior_steps": 40,
    "head_layers": ((100, 100), (200, 200, 200, 200)),
}  # fmt: skip
CIFAR_10 = {
    "latents": (100, 128), "hidden": (200, 200, 200, 200), "ngf": 256, "start": 8,
    "image_stride": 1, "prior_steps": 40, "head_layers": ((100, 100), (200, 200, 200)),
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "table1": {**TABLE_12, "method": "mle"},
    "table1-cifar10": {**CIFAR_10, "method": "mle"},
    "table5": {**TABLE_12, "method": "variational", "prior": "gaussian"},
    "table7": {**TABLE_12, "method": "variational"},
    "figure2": {"latents": (2, 2), "prior_steps": 40, "method": "variational"},
}
"""The paper's settings, by table or figure; what is not in them is at its default.

* Table 12 is for CelebA at 64x64 pixels. At 32x32 it lacks the first, largest layer and is the
  network of the single-layer model's public code for SVHN (train_svhn.py of
  github.com/bpucla/latent-space-EBM-prior: 512, 256, 128 channels from 4x4).
* CIFAR-10's is that of the authors' public code (joint-training/nets.py and train_cifar10.py of
  github.com/jcui1224/hierarchical-joint-ebm). That code takes 60 prior steps, Table 1 is k = 40.
* Table 5 is on SVHN with variational learning: its "ours" repeats Table 7's FID. For twice, four
  and eight times the generator's parameters `ngf` is 190, 277 and 401.
* Table 6 sets the width of all of CIFAR-10's `head_layers`, Table 8 `prior_steps`, both one
  setting away from `table1-cifar10`; for Table 7 add `method=variational` to those of Table 1.
  Table 6 reports Table 1's FID for a width of 100, where the public code has 200 on z_1.
* The single-layer model is `latents=(100,)` with `head_layers=((200, 200),)`.
"""


@dataclass(frozen=True)
class TrainConfig(LoopConfig):
    """Settings of joint training.

    Attributes:
        method: `mle` (Eq. 8-14) or `variational` (Eq. 15-19).
        prior: `ebm`, or `gaussian` for the same generator without heads: a VAE, or with `mle`
            alternating back-propagation.
        latents: Units of every layer, the top one first.
        hidden: Units of the conditionals' hidden layers (Table 12).
        ngf: Channels of the largest feature map.
        start: Side of the first feature map, 0 for the smallest; `GeneratorConfig`.
        image_stride: Stride of the layer that makes the image; `GeneratorConfig`.
        sigma: Standard deviation of p(x|z_1), on pixels scaled to [-1, 1].
        heads: `factorized` (the paper's), `joint` or `both`.
        ndf: Units of the heads' linear layers, two for each head.
        head_layers: For each head, the top layer's first, the units of its linear layers in
            place of two of `ndf`; empty for those.
        prior_steps: Langevin steps of the negative samples, and of sampling.
        prior_step_size: Their s of `langevin`.
        posterior_steps: Langevin steps of the positive samples (`mle`).
        posterior_step_size: Their s.
        heads_lr: Adam's learning rate of the heads.
        generator_lr: That of generator and inference network.
        ema: Decay of the averaged heads, which are the ones kept.
        energy_limit: Largest |mean energy gap| of one head, nats, before it counts as
            diverged; up to a hundredth of it a saved state may be rolled back to.
        rollbacks: Rollbacks permitted before giving up.
        log_every: Iterations between log lines.
        sample_every: Iterations between sample grids; 0 for none.
    """

    verb: ClassVar[str] = "train"
    nested: ClassVar[tuple[str, ...]] = ("head_layers",)
    method: str = "mle"
    prior: str = "ebm"
    iterations: int = 50_000
    batch_size: int = 100
    latents: tuple[int, ...] = (100, 100)
    hidden: tuple[int, ...] = (200, 200)
    ngf: int = 64
    start: int = 0
    image_stride: int = 2
    sigma: float = 0.3
    heads: str = "factorized"
    ndf: int = 200
    head_layers: tuple[tuple[int, ...], ...] = ()
    prior_steps: int = 40
    prior_step_size: float = 0.16  # 0.4^2
    posterior_steps: int = 40
    posterior_step_size: float = 0.01  # 0.1^2
    heads_lr: float = 2e-5
    generator_lr: float = 1e-4
    ema: float = 0.99
    energy_limit: float = 1e4
    rollbacks: int = 3
    log_every: int = 50
    sample_every: int = 1000

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, known in (("method", METHODS), ("prior", PRIORS), ("heads", HEAD_KINDS)):
            if getattr(self, name) not in known:
                raise EbmPriorError(
                    f"{name} must be one of {', '.join(known)}, got {getattr(self, name)!r}"
                )
        self.require_positive(
            "sigma", "ngf", "ndf", "prior_steps", "prior_step_size", "posterior_steps",
            "posterior_step_size", "heads_lr", "generator_lr", "energy_limit", "log_every",
        )  # fmt: skip
        if self.ema >= 1:
            raise EbmPriorError(f"ema must be below 1, got {self.ema}")
        if self.head_layers:
            self.check_head_layers()

    def generator(
        self, image_shape: tuple[int, ...], dataset: str | None = None
    ) -> GeneratorConfig:
        """Sizes of the generator for images of this shape, (C, H, W)."""
        own = {field.name for field in fields(self)}
        sizes = {f.name: getattr(self, f.name) for f in fields(GeneratorConfig) if f.name in own}
        return GeneratorConfig(image_shape, dataset=dataset, **sizes)

    def check_head_layers(self) -> None:
        """Do they fit the heads, and is `ndf` left alone?"""
        top = len(self.latents)
        groups = [(f"z{top - i}", (n,)) for i, n in enumerate(self.latents)]
        try:
            check_layers(
                self.head_layers, [*head_shapes(groups, (sum(self.latents),), self.heads)]
            )
        except EbmPriorError as error:
            raise EbmPriorError(f"head_layers: {error}") from error
        if self.ndf != TrainConfig.ndf:
            raise EbmPriorError(
                "ndf has no effect beside head_layers; change the widths there, or set "
                "head_layers=[] for two layers of ndf"
            )
        object.__setattr__(self, "head_layers", tuple(map(tuple, self.head_layers)))
