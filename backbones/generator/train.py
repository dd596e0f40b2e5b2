"""Joint training of a generator, its heads and its inference network (Sec. 3.2 and 3.3).

`ebm_prior.joint` holds the loss. By the method:

* `mle`: positive samples are Langevin chains of p(z|x). A backbone needs q(z|x) all the same,
  to encode, to score and to be evaluated: it is fitted to the chains' last states by maximum
  likelihood, as in the wake phase of wake-sleep, and has no influence on the generator.
* `variational`: positive samples are drawn from q(z|x).

Negative samples are Langevin chains of the tilted prior from fresh noise, in eps-space, where
`ebm_prior.langevin` is exact. The authors' code for the two-layer model moves z by
(a^2 / 2) grad log p(z) + a n with a = 0.4 for the prior and 0.1 for the posterior
(joint-training/train_cifar10.py of github.com/jcui1224/hierarchical-joint-ebm), so that
`langevin`'s step size is a^2, and Eq. 12's s is a^2 / 2.
"""

from __future__ import annotations

import hashlib
import math
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from backbones.generator import Generator, checkpoint_bytes
from backbones.generator.config import PRESETS, TrainConfig
from backbones.loop import (
    Loop,
    Progress,
    State,
    configure,
    entries,
    load_optimizer,
    optimizer_tensors,
    state_exists,
)
from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import write_bytes
from ebm_prior.fit import DivergenceError
from ebm_prior.images import grid, save_png
from ebm_prior.joint import JointTerms, joint_loss, posterior_chains
from ebm_prior.langevin import flatten
from ebm_prior.prior import EnergyPrior, SamplerConfig, frozen
from ebm_prior.registry import check_device
from ebm_prior.run import STATE, RunFolder, environment
from ebm_prior.saved import BACKBONE, CONFIG, heads_bytes, prior_config, read_config

__all__ = ["PRESETS", "TrainConfig", "TrainResult", "train"]

CHAIN_LIMIT = 1e3  # mean square of a chain's eps per unit, 1 under N(0, I)
SOUND = 0.01
"""Of `energy_limit`: energies further apart have begun to run away. From such a state a run is
resumed, but no rollback goes there, as from it the energies would run away again."""
SCALARS = ("step", "rate_scale", "step_scale", "rollbacks")  # of the state
GRID = 36  # samples in a picture


@dataclass(frozen=True)
class TrainResult:
    """What a finished training measured.

    Attributes:
        iterations: Iterations done.
        seconds: Wall time of this process.
        rollbacks: Times it diverged and went back.
        step_size: Of the prior's chains, stored with the heads.
    """

    iterations: int
    seconds: float
    rollbacks: int
    step_size: float


def train(
    images: Tensor,
    *,
    out: str | Path,
    dataset: str,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    record: dict | None = None,
    preset: str | None = None,
    **settings: Any,  # noqa: ANN401
) -> TrainResult:
    """Train a generator with its energy prior from images and keep a run folder.

    The folder is as `fit` writes it, with the generator beside the heads
    (`backbone.safetensors`), so that it can be moved, sampled, evaluated and pushed. With the
    Gaussian prior its heads are zero.

    Args:
        images: Training images, uint8, (N, C, H, W).
        out: Run folder to create, or to continue with `resume`.
        dataset: Name stored in the generator's file.
        resume: Continue an interrupted run of the same settings, on the CPU to the
            bit-identical result.
        device: Where to train.
        progress: Called after every step with steps done, steps in all, and `loss` and
            `log_px` in nats per image; None: a progress bar, on a terminal.
        record: More values for `config.json` (data set, ...).
        preset: A name in `PRESETS`, whose settings fill those that are not given.
        settings: Fields of `TrainConfig`.

    Raises:
        DivergenceError: If energies or chains run away after every permitted rollback. The
            last good generator and heads are in the run folder.
        EbmPriorError: On unusable images or settings, or an `out` that holds another run or
            cannot be written.
        Interrupted: On Ctrl-C, after saving.
    """
    if preset is not None and preset not in PRESETS:
        raise EbmPriorError(f"unknown preset {preset!r}; known are {', '.join(PRESETS)}")
    config = configure(TrainConfig, {**PRESETS.get(preset or "", {}), **settings}, images)
    began, out = time.monotonic(), Path(out)
    if resume:
        if not (out / CONFIG).exists():
            raise EbmPriorError(f"{out} holds no run to resume; start without --resume")
        training = read_config(out).get("training", {})
        if training.get("status") == "finished" or "train" not in training:
            raise EbmPriorError(f"{out} holds no unfinished training; choose another --out")
    loop = _Joint(images, out, dataset, config, check_device(device), record or {})
    if not resume:
        loop.run_folder.start(loop.describe("running"))
    with loop.run_folder.alone():
        # a run killed before its first save begins again
        loop.prepare(resume and state_exists(out / STATE))
        loop.run_folder.rewind_log(loop.step)
        if not loop.step:
            loop.write("running")
        loop.run(progress)
        return loop.finish(time.monotonic() - began)


class _Joint(Loop):
    """State of one run; `here` and `go_to` hold all of it that changes."""

    family = "generator"
    state_name = STATE
    shown = "loss"
    config: TrainConfig
    model: Generator

    def __init__(
        self, images: Tensor, out: Path, dataset: str, config: TrainConfig,
        device: torch.device, record: dict,
    ) -> None:  # fmt: skip
        self.rate_scale, self.step_scale, self.rollbacks, self.sound = 1.0, 1.0, 0, True
        self.tilted = config.prior == "ebm"
        with torch.random.fork_rng(devices=[]):  # leave the caller's generator alone
            torch.manual_seed(config.seed)
            model = Generator(config.generator(tuple(images.shape[1:]), dataset)).to(device)
            super().__init__(images, out, dataset, config, model)
            # what learns, and the same generator with the averaged heads, which is kept
            self.prior, self.kept = (
                EnergyPrior.for_backbone(
                    model, config.heads, ndf=config.ndf, layers=config.head_layers or None
                )
                for _ in range(2)
            )
        model.name, model.checkpoint = self.family, str(out / BACKBONE)
        model.requires_grad_(True)
        groups = [{"params": list(model.parameters()), "lr": config.generator_lr}]
        if self.tilted:
            groups.append({"params": list(self.prior.heads.parameters()), "lr": config.heads_lr})
        else:
            for head in self.prior.heads.requires_grad_(False):
                torch.nn.init.zeros_(head.layers[-1].weight)
        self.kept.heads.load_state_dict(self.prior.heads.state_dict())
        self.kept.heads.requires_grad_(False)
        self.optimizer = torch.optim.Adam(groups)
        self.run_folder, self.record, self.began = RunFolder(out), record, time.monotonic()
        self.environment = environment()
        self.pack()
        self.good = self.here()

    @property
    def sampler(self) -> SamplerConfig:
        """How the prior is sampled; without a tilt one step that leaves N(0, I) as it is."""
        if not self.tilted:
            return SamplerConfig("pcnl", 1)
        config = self.config
        return SamplerConfig(
            "langevin", config.prior_steps, config.prior_step_size * self.step_scale
        )

    # -- one step -------------------------------------------------------------------------

    def one_step(self) -> dict[str, float] | None:
        """Draw samples, and follow the gradient of Eq. 9-11 or 16-19 with Adam."""
        generator = self.generator()
        x = self.batch(generator)
        norms: dict[str, float] = {}
        z_pos, log_q, log_p = self.positives(x, generator, norms)
        z_neg = self.negatives(len(x), generator, norms) if self.tilted else None
        terms = self.terms(x, z_pos, z_neg, log_q, log_p)
        if trouble := self.trouble(terms, norms):
            return self.roll_back(trouble)
        self.optimizer.zero_grad(set_to_none=True)
        terms.loss.backward()
        grads = [p.grad for g in self.optimizer.param_groups for p in g["params"]]
        if not torch.nn.utils.get_total_norm([g for g in grads if g is not None]).isfinite():
            return self.roll_back("the gradient")
        rates = (self.config.generator_lr, self.config.heads_lr)
        for group, rate in zip(self.optimizer.param_groups, rates, strict=False):
            group["lr"] = rate * self.rate_scale
        self.optimizer.step()
        if self.tilted:
            decay = min(self.config.ema, (1 + self.step) / (10 + self.step))
            average, now = ([*p.heads.parameters()] for p in (self.kept, self.prior))
            torch._foreach_lerp_(average, [p.detach() for p in now], 1 - decay)
        done = self.step + 1
        if done % self.config.save_every == 0 or done == self.config.iterations:
            with torch.no_grad():  # never keep as good what the last update spoilt
                z_pos = tuple(z.detach() for z in z_pos)
                after = self.terms(x, z_pos, z_neg, None if log_q is None else log_q.detach())
            if trouble := self.trouble(after, {}):
                return self.roll_back(trouble)
            self.sound = max(self.gaps(after), default=0) < SOUND * self.config.energy_limit
        metrics = {"loss": terms.loss.item(), "log_px": terms.log_px.mean().item()}
        if done % self.config.log_every == 0:
            self.log(done, metrics, terms, norms)
        if self.config.sample_every and done % self.config.sample_every == 0:
            self.sample_grid(done)
        return metrics

    def positives(
        self, x: Tensor, generator: torch.Generator, norms: dict[str, float]
    ) -> tuple[Latents, Tensor | None, Tensor | None]:
        """Samples of q(z|x) with gradient, log q and log p; or detached chains of p(z|x)."""
        if self.config.method == "variational":
            post = self.model.posterior(x, noise=self.prior.noise(len(x), generator))
            return post
        eps = posterior_chains(
            self.prior,
            x,
            steps=self.config.posterior_steps,
            step_size=self.config.posterior_step_size * self.step_scale,
            generator=generator,
        )
        norms["posterior chains"] = _norm(eps)
        with torch.no_grad():
            return self.model.transform(eps), None, None

    def negatives(self, n: int, generator: torch.Generator, norms: dict[str, float]) -> Latents:
        """Detached chains of the tilted prior."""
        start = self.prior.noise(n, generator)
        with frozen(self.prior):  # a chain needs the gradient of eps alone
            eps = self.prior.run_chain(start, self.sampler, generator=generator)
        norms["prior chains"] = _norm(eps)
        with torch.no_grad():
            return self.model.transform(eps)

    def terms(
        self, x: Tensor, z_pos: Latents, z_neg: Latents | None, log_q: Tensor | None,
        log_p: Tensor | None = None,
    ) -> JointTerms:  # fmt: skip
        """The joint loss; with `mle` also minus log q of the chains, for q's weights alone."""
        terms = joint_loss(self.prior, x, z_pos, z_neg, log_q, log_p)
        if log_q is None:
            wake = -self.model.log_posterior(x, z_pos).sum(1).mean()
            terms = terms._replace(loss=terms.loss + wake)
        return terms

    # -- divergence -----------------------------------------------------------------------

    def trouble(self, terms: JointTerms, norms: dict[str, float]) -> str:
        """What ran away: chains, or energies by their heads; empty if nothing did."""
        found = [name for name, norm in norms.items() if not norm < CHAIN_LIMIT]
        if not found and terms.e_pos is not None:
            names = zip(self.prior.head_names, self.gaps(terms), strict=True)
            guilty = [name for name, gap in names if not gap < self.config.energy_limit]
            found = [f"energies in {', '.join(guilty)}"] if guilty else []
        if not found and not terms.loss.isfinite():
            found = ["the loss"]
        return " and ".join(found)

    def gaps(self, terms: JointTerms) -> list[float]:
        """Mean energies of positive and negative samples apart, nats, head by head."""
        if terms.e_pos is None:
            return []
        return (terms.e_pos.mean(0) - terms.e_neg.mean(0)).abs().tolist()

    def roll_back(self, trouble: str) -> None:
        """Return to the last sound save with half the learning rates.

        Where chains ran away, half the step sizes too. Energies run away where chains do not
        keep up with them, so that shorter ones would not help.
        """
        at, rollbacks, rate_scale = self.step + 1, self.rollbacks + 1, self.rate_scale / 2
        chains = "chains" in trouble
        step_scale = self.step_scale / 2 if chains else self.step_scale
        self.go_to(self.good)
        if rollbacks > self.config.rollbacks:
            self.save()  # so that it is on disk even before the first save
            self.write("diverged")
            raise DivergenceError(
                f"{trouble} diverged at iteration {at} after {self.rollbacks} rollbacks; the "
                f"last good generator and heads are in {self.out}; try smaller heads_lr, "
                "prior_step_size or posterior_step_size"
            )
        self.rate_scale, self.step_scale, self.rollbacks = rate_scale, step_scale, rollbacks
        self.good = self.here()
        tqdm.write(
            f"{trouble} diverged at iteration {at}: back to {self.step} with half the learning "
            f"rates{' and step sizes' if chains else ''}",
            file=sys.stderr,
        )
        self.run_folder.rewind_log(self.step)
        self.run_folder.log({"iteration": self.step, "rollback": rollbacks, "diverged": trouble})

    # -- state ----------------------------------------------------------------------------

    @property
    def modules(self) -> dict[str, torch.nn.Module]:
        """What has weights that change, by its name in the state."""
        return {"model": self.model, "heads": self.prior.heads, "average": self.kept.heads}

    def here(self) -> State:
        """Copies of everything that changes."""
        parts = {name: module.state_dict() for name, module in self.modules.items()}
        parts["optimizer"] = optimizer_tensors(self.optimizer)
        tensors = {
            f"{of}.{k}": v.detach().clone() for of, part in parts.items() for k, v in part.items()
        }
        return tensors, {name: getattr(self, name) for name in SCALARS}

    def go_to(self, state: State) -> None:
        """Undo everything since `here`."""
        tensors, values = state
        for name, module in self.modules.items():
            module.load_state_dict(entries(tensors, name))
        load_optimizer(self.optimizer, entries(tensors, "optimizer"))
        for name, value in values.items():
            setattr(self, name, value)

    def capture(self) -> State:
        """The state, and beside it the one to roll back to, where that is another."""
        good, good_values = self.good
        if good_values["step"] == self.step:
            return self.good
        tensors, values = self.here()
        return tensors | {f"good.{k}": v for k, v in good.items()}, values | {"good": good_values}

    def restore(self, state: State) -> None:
        """Go on where `capture` was called."""
        tensors, values = state
        good_values = values.pop("good", None)
        now = {k: v for k, v in tensors.items() if not k.startswith("good.")}, values
        self.good = now if good_values is None else (entries(tensors, "good"), good_values)
        self.go_to(now)

    def save(self, interrupted: bool = False) -> None:
        """Write the state, and the generator and heads one would sample with now."""
        if not interrupted and self.sound:
            self.good = self.here()
        super().save(interrupted)
        self.write("running")

    # -- output ---------------------------------------------------------------------------

    def pack(self) -> bytes:
        """The generator's file, whose hash and size the heads' configuration states."""
        data = checkpoint_bytes(self.model)
        self.model.sha256, self.size = hashlib.sha256(data).hexdigest(), len(data)
        return data

    def write(self, status: str, result: TrainResult | None = None) -> None:
        """Generator, averaged heads and configuration."""
        write_bytes(self.out / BACKBONE, self.pack())
        self.run_folder.save_heads(heads_bytes(self.kept))
        self.run_folder.write_config(self.describe(status, result))

    def describe(self, status: str, result: TrainResult | None = None) -> dict:
        """Contents of `config.json`."""
        self.kept.sampler = self.sampler
        config = prior_config(self.kept)
        config["backbone"]["converted"] = {"sha256": self.model.sha256, "size": self.size}
        training = {
            "status": status,
            "train": asdict(self.config),
            "environment": self.environment,
            **self.record,
        }
        return config | {"training": training | ({"result": asdict(result)} if result else {})}

    def finish(self, seconds: float) -> TrainResult:
        """Write the result and drop the state."""
        self.model.freeze()
        result = TrainResult(self.step, seconds, self.rollbacks, self.sampler.step_size)
        self.sample_grid(self.step)
        self.write("finished", result)  # last: a run killed before it can be resumed
        self.run_folder.finish()
        return result

    def log(
        self, step: int, metrics: dict[str, float], terms: JointTerms, norms: dict[str, float]
    ) -> None:
        """One line of `log.jsonl`."""
        images = self.config.log_every * len(terms.log_px)
        speed, self.began = images / (time.monotonic() - self.began), time.monotonic()
        found = {"iteration": step, **metrics, "images_per_second": speed}
        found |= {f"eps_norm_{name.split()[0]}": norm for name, norm in norms.items()}
        if terms.e_pos is not None:
            for name, energies in (("posterior", terms.e_pos), ("prior", terms.e_neg)):
                means = energies.detach().mean(0).tolist()
                found[f"energy_{name}"] = dict(zip(self.prior.head_names, means, strict=True))
        self.run_folder.log(found)

    def sample_grid(self, step: int) -> None:
        """Samples of what is kept, always from the same noise."""
        self.kept.sampler = self.sampler
        with frozen(self.model):
            images = self.kept.sample(GRID, generator=torch.Generator().manual_seed(0))
        if images.isfinite().all():  # a picture must never cost a training
            save_png(self.out / "samples" / f"{step:06d}.png", grid(images))


def _norm(eps: Latents) -> float:
    """Largest mean square of a chain's noise, per unit; NaN where one is not finite."""
    squares = flatten(eps)[0].square().mean(1)
    return squares.max().item() if squares.isfinite().all() else math.nan
