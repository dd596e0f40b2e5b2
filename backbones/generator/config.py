"""Settings of joint training, and the paper's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from backbones.loop import LoopConfig
from ebm_prior.errors import EbmPriorError
from ebm_prior.prior import HEAD_KINDS

__all__ = ["PRESETS", "TrainConfig"]

METHODS = ("mle", "variational")
PRIORS = ("ebm", "gaussian")

TABLE_12 = {"latents": (100, 100), "hidden": (200, 200), "ngf": 128, "prior_steps": 40}
PRESETS: dict[str, dict[str, Any]] = {
    "table1": {**TABLE_12, "method": "mle"},
    "table7": {**TABLE_12, "method": "variational"},
    "figure2": {"latents": (2, 2), "prior_steps": 40, "method": "variational"},
}
"""The paper's settings, by table or figure. Table 12's are generator and inference network for
64x64 pixels; its heads, four layers of 200 on z_1 and two of 100 on z_2, are two of `ndf` here."""


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
        sigma: Standard deviation of p(x|z_1), on pixels scaled to [-1, 1].
        heads: `factorized` (the paper's), `joint` or `both`.
        ndf: Units of the heads' linear layers.
        prior_steps: Langevin steps of the negative samples, and of sampling.
        prior_step_size: Their s of `langevin`.
        posterior_steps: Langevin steps of the positive samples (`mle`).
        posterior_step_size: Their s.
        heads_lr: Adam's learning rate of the heads.
        generator_lr: That of generator and inference network.
        ema: Decay of the averaged heads, which are the ones kept.
        energy_limit: Largest |mean energy gap| of one head, nats, before it counts as
            diverged.
        rollbacks: Rollbacks permitted before giving up.
        log_every: Iterations between log lines.
        sample_every: Iterations between sample grids; 0 for none.
    """

    verb: ClassVar[str] = "train"
    method: str = "mle"
    prior: str = "ebm"
    iterations: int = 50_000
    batch_size: int = 100
    latents: tuple[int, ...] = (100, 100)
    hidden: tuple[int, ...] = (200, 200)
    ngf: int = 64
    sigma: float = 0.3
    heads: str = "factorized"
    ndf: int = 200
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
