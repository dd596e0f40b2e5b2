"""Stage two: fit the energy heads on a frozen backbone.

Two objectives, alone or one after the other (`nce+mle`):

* `nce`: classify posterior samples against Gaussian-prior samples, the summed head output
  as logit. No chains; a held-out split says when to stop.
* `mle`: the paper's estimator (Eq. 10/17): posterior samples against Langevin samples of
  the tilted prior, from fresh noise or from persistent chains.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ebm_prior import hub
from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.images import grid, save_png
from ebm_prior.interrupt import CtrlC, Interrupted
from ebm_prior.langevin import ChainState, flatten, keyed_generator, pcnl_step, start_chain
from ebm_prior.losses import contrastive_loss, nce_loss
from ebm_prior.micro_batch import MicroBatched, out_of_memory
from ebm_prior.posterior_cache import PosteriorStream, posterior_source, row_size, split_inputs
from ebm_prior.precision import PRECISIONS
from ebm_prior.prefetch import Prefetch
from ebm_prior.prior import EnergyPrior, SamplerConfig, frozen
from ebm_prior.ranks import Ranks, Share
from ebm_prior.run import CACHE, STATE, Onlooker, RunFolder, environment
from ebm_prior.saved import CONFIG
from ebm_prior.transitions import FITTED, MAX_STEP_SIZE

__all__ = ["DivergenceError", "FitConfig", "FitResult", "fit"]

OBJECTIVES = {"nce": ("nce",), "mle": ("mle",), "nce+mle": ("nce", "mle")}
POOL_BATCHES = 8
MIN_ROWS = 20_000  # posterior samples, all draws of all images together
SCALARS = (
    "phase", "iteration", "total", "lr_scale", "rollbacks", "best_loss", "since_best",
    "step_size", "held_out_loss", "chain_rows",
)  # fmt: skip
HELD_OUT = 2000  # rows that judge, and as many prior samples
HELD_OUT_KEPT = 1 << 30  # numbers of either, 4 GiB in float32; 256x256 images have millions a row
GOOD = "good."  # prefix of the state to roll back to, where it is not the saved one


class DivergenceError(EbmPriorError):
    """Energies ran away again after every permitted rollback."""


@dataclass(frozen=True)
class FitConfig:
    """Settings of stage two.

    Attributes:
        objective: `nce`, `mle` or `nce+mle`.
        nce_iterations: Iterations of the `nce` phase, an upper bound: see `patience`.
        mle_iterations: Iterations of the `mle` phase.
        batch_size: Posterior samples per iteration, and as many prior samples.
        nce_lr: Adam's learning rate in the `nce` phase.
        mle_lr: Adam's learning rate in the `mle` phase.
        reuse: Times each Gaussian-prior sample serves in the `nce` phase, on average: drawing
            them is most of an iteration's cost.
        warmup: Iterations over which the rate rises; it then falls linearly to a tenth.
        beta1: Adam's first moment decay.
        beta2: Adam's second moment decay.
        weight_decay: Adam's L2 penalty.
        ema: Decay of the averaged heads, which are the ones kept.
        regularizer: Weight of the squared energies in the loss.
        chains: `persistent` or `fresh`, how `mle` starts its chains.
        pool: Persistent chains; 0 means two batches.
        refresh: Share of chains restarted from N(0, I) at every use.
        steps: Transitions per `mle` iteration.
        acceptance: Target of the step-size tuning (`pcnl` only).
        precision: `fp32` or `bf16`, of the backbone's pass inside chains; what heads learn
            from is always computed in float32, so that rounding tells them nothing.
        compiled: Whether chains run compiled; see `EnergyPrior.compiled`.
        draws: Posterior samples per image; 0 means one, or more where images are few.
        held_out: Share of images kept aside to judge the `nce` phase.
        patience: `nce` stops after this many judgements without improvement.
        judge_every: Iterations between judgements.
        energy_limit: Largest |mean energy gap| of one head, nats, before it counts as
            diverged.
        rollbacks: Rollbacks permitted before giving up.
        cache_gb: Largest posterior cache on disk, GiB; larger sets are encoded batch by batch,
            the next one while this one's chains run.
        save_every: Iterations between saves.
        log_every: Iterations between log lines.
        sample_every: Iterations between sample grids; 0 for none.
        seed: Seed of everything random.
    """

    objective: str = "nce"
    nce_iterations: int = 6000
    mle_iterations: int = 1000
    batch_size: int = 128
    nce_lr: float = 2e-3
    mle_lr: float = 1e-4
    reuse: int = 4
    warmup: int = 100
    beta1: float = 0.9
    beta2: float = 0.999
    weight_decay: float = 3e-5
    ema: float = 0.99
    regularizer: float = 0.0
    chains: str = "persistent"
    pool: int = 0
    refresh: float = 0.02
    steps: int = 2
    acceptance: float = 0.7
    precision: str = "fp32"
    compiled: bool = False
    draws: int = 0
    held_out: float = 0.05
    patience: int = 20
    judge_every: int = 50
    energy_limit: float = 1e4
    rollbacks: int = 3
    cache_gb: float = 8.0
    save_every: int = 100
    log_every: int = 10
    sample_every: int = 2000
    seed: int = 0

    def __post_init__(self) -> None:
        if self.objective not in OBJECTIVES:
            raise EbmPriorError(
                f"objective must be one of {', '.join(OBJECTIVES)}, got {self.objective!r}"
            )
        if self.chains not in ("persistent", "fresh"):
            raise EbmPriorError(f"chains must be persistent or fresh, got {self.chains!r}")
        if self.precision not in PRECISIONS:
            raise EbmPriorError(
                f"precision must be one of {', '.join(PRECISIONS)}, got {self.precision!r}"
            )
        for name in (
            "batch_size",
            "reuse",
            "steps",
            "judge_every",
            "save_every",
            "log_every",
            "patience",
        ):
            if getattr(self, name) < 1:
                raise EbmPriorError(f"{name} must be at least 1, got {getattr(self, name)}")
        for name in ("nce_lr", "mle_lr", "energy_limit"):
            if not 0 < getattr(self, name) < math.inf:
                raise EbmPriorError(f"{name} must be positive, got {getattr(self, name)}")
        for name in ("weight_decay", "regularizer", "cache_gb"):
            if not 0 <= getattr(self, name) < math.inf:
                raise EbmPriorError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("nce_iterations", "mle_iterations", "warmup", "pool", "draws", "rollbacks",
                     "sample_every", "seed"):  # fmt: skip
            if getattr(self, name) < 0:
                raise EbmPriorError(f"{name} must be 0 or more, got {getattr(self, name)}")
        for name in ("beta1", "beta2", "ema", "refresh", "held_out", "acceptance"):
            if not 0 <= getattr(self, name) < 1:
                raise EbmPriorError(f"{name} must lie in [0, 1), got {getattr(self, name)}")

    @classmethod
    def from_dict(cls, values: dict) -> FitConfig:
        """Rebuild from `asdict`; unknown keys and values of another kind raise."""
        kinds = {field.name: type(field.default) for field in fields(cls)}
        unknown = values.keys() - kinds.keys()
        if unknown:
            raise EbmPriorError(f"unknown fit settings: {', '.join(sorted(unknown))}")
        for name, value in values.items():
            kind = (int, float) if kinds[name] in (int, float) else kinds[name]
            if not isinstance(value, kind):
                raise EbmPriorError(f"the fit setting {name} cannot be {value!r}")
        return cls(**values)


@dataclass(frozen=True)
class FitResult:
    """What a finished fit measured.

    Attributes:
        iterations: Iterations done over all phases.
        seconds: Wall time of this process, encoding included.
        held_out_loss: Best held-out NCE loss, nats (chance: 1.386), or None.
        acceptance: Acceptance rate of the frozen step size, or None for `langevin`.
        step_size: The step size stored with the heads.
        rollbacks: Times the fit diverged and went back.
    """

    iterations: int
    seconds: float
    held_out_loss: float | None
    acceptance: float | None
    step_size: float
    rollbacks: int


def fit(
    prior: EnergyPrior,
    images: Tensor,
    config: FitConfig,
    *,
    run_dir: str | Path,
    resume: bool = False,
    record: dict | None = None,
    on_save: Callable[[int], None] | None = None,
) -> FitResult:
    """Fit the heads of `prior` in place and keep a run folder.

    Args:
        prior: Heads on a frozen backbone; `prior.sampler` says which transition to use
            (`langevin`, or `pcnl` with tuned step size) and where its step size starts.
        images: Training images, uint8, (N, C, H, W) of the backbone's image shape.
        config: Settings.
        run_dir: Run folder to create, or to continue with `resume`.
        resume: Continue an interrupted run of the same settings; on the CPU to the
            bit-identical result.
        record: More values for `config.json` (command, data set, ...).
        on_save: Called every `save_every` iterations with the iterations done; `prior` then
            holds the averaged heads.

    Returns:
        What was measured; `prior` then holds the kept heads and the tuned sampler.

    Raises:
        DivergenceError: If energies run away after every permitted rollback. The last
            good heads are in the run folder.
        Interrupted: On Ctrl-C, after saving.
    """
    if tuple(images.shape[1:]) != tuple(prior.backbone.image_shape):
        raise EbmPriorError(
            f"images are {tuple(images.shape[1:])}, the backbone's are "
            f"{tuple(prior.backbone.image_shape)}"
        )
    if prior.sampler.transition not in FITTED:
        raise EbmPriorError(
            f"heads are fitted with {' or '.join(FITTED)}, not {prior.sampler.transition}; "
            "once fitted they can be sampled with any transition"
        )
    if len(images) < 10:
        raise EbmPriorError(f"{len(images)} images are too few to fit on; give at least 10")
    ranks = Ranks(prior.backbone.device)
    if config.batch_size % ranks.size:
        raise EbmPriorError(
            f"a batch of {config.batch_size} cannot be shared by {ranks.size} processes; "
            "choose a multiple of their number"
        )
    run = RunFolder(run_dir) if ranks.is_main else Onlooker(run_dir)
    fitting = _Fit(prior, config, run, record or {}, on_save, ranks)
    if not resume:
        run.start(fitting.describe("running"))
    elif (run.path / CONFIG).exists():
        refuse_other(config, run)
    ranks.wait()
    before = prior.precision, prior.compiled, prior.backbone.checkpointing
    prior.precision, prior.compiled = config.precision, config.compiled
    try:
        with run.alone(), CtrlC() as ctrl_c:
            return fitting.run_all(images, ctrl_c, resume)
    finally:
        prior.precision, prior.compiled, prior.backbone.checkpointing = before


def refuse_other(config: FitConfig, run: RunFolder) -> None:
    """Raise `EbmPriorError` unless a run was started with these settings."""
    stored = asdict(FitConfig.from_dict(run.config()["training"]["fit"]))
    for name, value in asdict(config).items():
        if value != stored[name]:
            raise EbmPriorError(
                f"{name} {value} differs from the {stored[name]} of {run.path}; a resumed run "
                "keeps its settings"
            )


class _Fit:
    """State of one fit; `capture` and `restore` hold all of it that changes."""

    def __init__(
        self, prior: EnergyPrior, config: FitConfig, run: RunFolder, record: dict,
        on_save: Callable[[int], None] | None = None, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.prior, self.config, self.run, self.record = prior, config, run, record
        self.on_save, self.ranks = on_save, ranks or Ranks(prior.backbone.device)
        self.phases = OBJECTIVES[config.objective]
        self.parameters = list(prior.heads.parameters())
        self.generator = torch.Generator().manual_seed(config.seed)
        self.own_rows = self.ranks.share(self.generator)
        self.step_size = prior.sampler.step_size
        self.acceptance: float | None = None
        self.phase, self.iteration, self.total = 0, 0, 0
        self.lr_scale, self.rollbacks = 1.0, 0
        self.held_out_loss: float | None = None
        self.prefetched: Prefetch | None = None
        self.unflatten: Callable = flatten(prior.noise(1, torch.Generator().manual_seed(0)))[1]
        self.start_phase()

    # -- phases ---------------------------------------------------------------------------

    def run_all(self, images: Tensor, ctrl_c: CtrlC, resume: bool) -> FitResult:
        """Encode, run every phase, tune the step size, store."""
        began = time.monotonic()
        self.last_good = self.capture()
        if resume and (state := self.run.load_state()) is not None:
            self.reopen(*state)
        self.ranks.wait()  # all have read it
        self.run.rewind_log(self.total)

        def stop_if_asked() -> None:
            if ctrl_c.pressed:
                raise Interrupted(f"interrupted; continue with: {self.resume_command()}")

        if self.phase < len(self.phases):
            self.open_source(images, stop_if_asked)
        while self.phase < len(self.phases):
            self.run_phase(ctrl_c)
            self.phase += 1
            self.iteration = 0
            if self.phase < len(self.phases):
                self.start_phase()
            self.save()
        self.tune_step_size()
        self.prior.sampler = replace(self.prior.sampler, step_size=self.step_size)
        result = FitResult(
            self.total,
            time.monotonic() - began,
            self.held_out_loss,
            self.acceptance,
            self.step_size,
            self.rollbacks,
        )
        self.run.drop_cache()
        self.run.save_heads(hub.heads_bytes(self.prior))
        self.run.write_config(self.describe("finished", asdict(result)))
        self.sample_grid()
        self.run.finish()
        return result

    def open_source(self, images: Tensor, on_chunk: Callable[[], None]) -> None:
        """Split the images and draw their posterior samples."""
        order = torch.randperm(
            len(images), generator=torch.Generator().manual_seed(self.config.seed)
        )
        # Few images get several posterior draws each, or the heads learn them by heart.
        draws = self.config.draws or math.ceil(MIN_ROWS / len(images))
        held_out = int(len(images) * self.config.held_out)
        shift = len(images) * torch.arange(draws)[:, None]
        self.held_out = (order[:held_out] + shift).flatten()
        self.train = (order[held_out:] + shift).flatten()
        source = posterior_source(
            self.prior,
            images,
            draws,
            self.run.path / CACHE,
            self.config.seed,
            self.config.cache_gb,
            on_chunk,
            self.ranks,
        )
        if isinstance(source, PosteriorStream):
            tqdm.write(
                f"posterior samples exceed {self.config.cache_gb} GiB: drawn per batch",
                file=sys.stderr,
            )
        self.source = source
        self.prepare_held_out()

    def start_phase(self) -> None:
        """Fresh optimizer, averages and judgements."""
        self.optimizer = torch.optim.Adam(
            self.parameters,
            lr=1.0,
            betas=(self.config.beta1, self.config.beta2),
            weight_decay=self.config.weight_decay,
        )
        self.pool: Tensor | None = None  # nce: head inputs; mle: chain states
        self.average = [p.detach().clone() for p in self.parameters]
        self.best = [p.detach().clone() for p in self.parameters]
        self.best_loss, self.since_best = math.inf, 0

    def run_phase(self, ctrl_c: CtrlC) -> None:
        """All iterations of the current phase; leaves the kept heads in `prior`."""
        name = self.phases[self.phase]
        length = getattr(self.config, f"{name}_iterations")
        iterate = self.nce_iteration if name == "nce" else self.mle_iteration
        began = time.monotonic()
        bar = tqdm(total=length, desc=name, initial=self.iteration, disable=None)
        with bar, self.prefetch(length) as self.prefetched:
            while self.iteration < length and not self.out_of_patience(name):
                self.set_lr(name, length)
                step = iterate()
                guilty = self.diverged(step)
                if guilty:
                    self.roll_back(guilty)
                    bar.n = self.iteration
                    began = time.monotonic()
                    continue
                self.iteration += 1
                self.total += 1
                saving = self.iteration % self.config.save_every == 0
                if (saving or self.iteration == length) and (guilty := self.spoilt()):
                    self.roll_back(guilty)
                    bar.n = self.iteration
                    began = time.monotonic()
                    continue
                bar.update()
                if self.iteration % self.config.log_every == 0:
                    speed = (
                        self.config.log_every * self.config.batch_size / (time.monotonic() - began)
                    )
                    began = time.monotonic()
                    bar.set_postfix(self.log(name, step, speed))
                if name == "nce":
                    self.judge()
                if saving:
                    # first, so that a fit killed in between shows it again when it resumes
                    self.show_average()
                    self.save()
                if self.config.sample_every and self.total % self.config.sample_every == 0:
                    self.sample_grid()
                    began = time.monotonic()
                if self.ranks.any(ctrl_c.pressed):
                    self.save(interrupted=True)
                    raise Interrupted(f"interrupted; continue with: {self.resume_command()}")
        kept = self.average
        if name == "nce" and math.isfinite(self.best_loss):
            kept, self.held_out_loss = self.best, self.best_loss
        self.load_parameters(kept)

    # -- one iteration --------------------------------------------------------------------

    def positives(self) -> Latents:
        """Head inputs of this process's rows of a random batch of posterior samples."""
        if self.prefetched is None:
            return self.random_batch(self.generator)
        return self.prefetched(self.iteration)

    def random_batch(self, generator: torch.Generator) -> Latents:
        """`positives`, picked and drawn by this generator, the same in every process."""
        pick = torch.randint(len(self.train), (self.config.batch_size,), generator=generator)
        return self.source(self.train[self.ranks.rows(pick)], self.ranks.share(generator))

    def prefetch(self, length: int) -> Prefetch | nullcontext:
        """The next batch meanwhile, where it is encoded or goes from the disk to a GPU.

        It is then a function of the iteration alone.
        """
        device = self.prior.backbone.device
        if not isinstance(self.source, PosteriorStream) and device.type != "cuda":
            return nullcontext()  # memory already holds the mapped file, or the disk is the limit
        key = self.config.seed, self.phase
        return Prefetch(
            lambda iteration: self.random_batch(keyed_generator(*key, iteration)), length, device
        )

    @torch.no_grad()
    def gaussian_inputs(self, n: int, generator: torch.Generator | Share) -> Latents:
        """Head inputs of n samples of the backbone's own prior."""
        return self.inputs_of(self.prior.noise(n, generator))

    @torch.no_grad()
    def inputs_of(self, eps: Latents) -> Latents:
        """Head inputs at T(eps)."""
        if self.prior.reads_features:
            return self.prior.head_inputs(*self.prior.backbone.top_down(eps))
        return self.prior.head_inputs(self.prior.backbone.transform(eps))

    def nce_iteration(self) -> dict:
        """Posterior samples against Gaussian-prior samples."""
        positives = self.positives()
        return self.update(nce_loss, positives, self.gaussian_negatives())

    def gaussian_negatives(self) -> Latents:
        """A batch from a pool of Gaussian-prior samples whose oldest rows are redrawn."""
        n, size = self.config.batch_size, POOL_BATCHES * self.config.batch_size
        fresh = max(n // self.config.reuse, 1)
        if self.pool is None:
            self.pool = torch.cat([self.flat_gaussian_inputs(n) for _ in range(POOL_BATCHES)])
        rows = (self.iteration * fresh + torch.arange(fresh)) % size
        self.pool[rows] = self.flat_gaussian_inputs(fresh)
        pick = torch.randperm(size, generator=self.generator)[:n]
        return split_inputs(self.pool[self.ranks.rows(pick)], self.prior)

    def flat_gaussian_inputs(self, n: int) -> Tensor:
        """`gaussian_inputs` as rows (n, D), a share of them from every process."""
        if n % self.ranks.size:  # too few to share: every process makes them all
            return _rows_of(self.gaussian_inputs(n, self.generator))
        own = self.gaussian_inputs(n // self.ranks.size, self.own_rows)
        return self.ranks.gather(_rows_of(own))

    def mle_iteration(self) -> dict:
        """Posterior samples against samples of the tilted prior (Eq. 10/17)."""
        positives = self.positives()
        with frozen(self.prior.heads):
            eps, rates = self.transitions(self.chain_starts(), self.config.steps)
        if self.config.chains == "persistent":
            self.pool[self.picked] = eps
        negatives = self.inputs_of(self.unflatten(self.ranks.rows(eps)))
        step = self.update(contrastive_loss, positives, negatives)
        step["norm"] = eps.square().mean().item()
        if rates:
            step["acceptance"] = sum(rates) / len(rates)
        return step

    def chain_starts(self) -> Tensor:
        """Flattened starts of this iteration's chains, (B, D)."""
        n = self.config.batch_size
        if self.config.chains == "fresh":
            return flatten(self.prior.noise(n, self.generator))[0]
        if self.pool is None:
            self.pool = self.burnt_in_pool(max(self.config.pool or 2 * n, n))
        self.picked = torch.randperm(len(self.pool), generator=self.generator)[:n]
        eps = self.pool[self.picked]
        restart = torch.rand(n, generator=self.generator) < self.config.refresh
        fresh = flatten(self.prior.noise(n, self.generator))[0]
        return torch.where(restart.to(eps.device)[:, None], fresh, eps)

    def burnt_in_pool(self, size: int) -> Tensor:
        """Persistent chains, each run from N(0, I) for as long as sampling will run it.

        Chains that are still on their way from the Gaussian prior would teach the heads to
        tilt further than they should.
        """
        chains = []
        with frozen(self.prior.heads):
            for _ in range(0, size, self.config.batch_size):
                eps = flatten(self.prior.noise(self.config.batch_size, self.generator))[0]
                chains.append(self.transitions(eps, self.prior.sampler.steps)[0])
        return torch.cat(chains)[:size]

    def transitions(self, eps: Tensor, steps: int) -> tuple[Tensor, list[float]]:
        """Move chains (B, D) by the sampler's transition, a share of them in every process.

        Returns:
            All chains (B, D), and the acceptance rate of every step.
        """
        eps = self.ranks.rows(eps)
        if self.prior.sampler.transition == "langevin":
            sampler = SamplerConfig("langevin", steps, self.step_size)
            moved = self.prior.run_chain(self.unflatten(eps), sampler, generator=self.own_rows)
            return self.ranks.gather(flatten(moved)[0]), []
        energy, rates = MicroBatched(self.prior.energy_of_noise, self.prior), []
        state = start_chain(energy, eps, self.unflatten)
        for _ in range(steps):
            state, rate = self.tuned_step(energy, state, self.own_rows)
            rates.append(rate)
        return self.ranks.gather(state.eps), rates

    def tuned_step(
        self, energy: Callable, state: ChainState, generator: torch.Generator | Share
    ) -> tuple[ChainState, float]:
        """One Metropolis step; its acceptance rate moves the step size."""
        state, _, probability = pcnl_step(energy, state, self.unflatten, self.step_size, generator)
        rate = self.ranks.mean(probability.mean()).item()
        self.step_size *= math.exp(0.1 * (rate - self.config.acceptance))
        self.step_size = min(max(self.step_size, 1e-6), MAX_STEP_SIZE)
        return state, rate

    def update(self, loss_of: Callable, positives: Latents, negatives: Latents) -> dict:
        """One optimizer step and one step of the average."""
        # one pass over both halves: half the kernel launches of two
        both = [torch.cat(pair) for pair in zip(positives, negatives, strict=True)]
        self.recent = both
        e_pos, e_neg = self.prior.energies_of(both).chunk(2)
        loss = loss_of(e_pos, e_neg, self.config.regularizer)
        step = {"loss": self.ranks.mean(loss.detach()).item(), **self.means(e_pos, e_neg)}
        if self.diverged(step):
            return step  # never let bad numbers into the weights
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.ranks.average_gradients(self.parameters)
        grads = [p.grad for p in self.parameters]
        step["grad_norm"] = torch.nn.utils.get_total_norm(grads).item()
        if not math.isfinite(step["grad_norm"]):
            step["loss"] = math.nan
            return step
        self.optimizer.step()
        decay = min(self.config.ema, (1 + self.iteration) / (10 + self.iteration))
        torch._foreach_lerp_(self.average, [p.detach() for p in self.parameters], 1 - decay)
        return step

    def set_lr(self, name: str, length: int) -> None:
        """Linear warm-up, then linear decay to a tenth."""
        peak = getattr(self.config, f"{name}_lr") * self.lr_scale
        warm = min(1.0, (self.iteration + 1) / max(self.config.warmup, 1))
        decay = 1 - 0.9 * self.iteration / length
        for group in self.optimizer.param_groups:
            group["lr"] = peak * warm * decay

    # -- held-out judgement ---------------------------------------------------------------

    def prepare_held_out(self) -> None:
        """Fixed batches of held-out posterior samples and of prior samples."""
        self.judged = []
        if "nce" not in self.phases:
            return
        generator = torch.Generator().manual_seed(self.config.seed + 1)
        most = max(HELD_OUT_KEPT // row_size(self.prior), 2)
        rows = min(len(self.held_out), HELD_OUT, most)
        for start in range(0, rows, 200):
            index = self.held_out[start : min(start + 200, rows)]
            self.judged.append(
                (self.source(index, generator), self.gaussian_inputs(len(index), generator))
            )

    @torch.no_grad()
    def judge(self) -> None:
        """Held-out loss of the average heads, now and then; the best heads are kept."""
        if self.iteration % self.config.judge_every or not self.judged:
            return
        own = [p.detach().clone() for p in self.parameters]
        self.load_parameters(self.average)
        losses = [
            nce_loss(self.prior.energies_of(pos), self.prior.energies_of(neg)).item()
            for pos, neg in self.judged
        ]
        loss = self.ranks.agree(sum(losses) / len(losses))
        self.run.log({"iteration": self.total, "held_out_loss": loss})
        if loss < self.best_loss:
            self.best_loss, self.since_best = loss, 0
            self.best = [p.detach().clone() for p in self.parameters]
        else:
            self.since_best += 1
        self.load_parameters(own)

    def out_of_patience(self, name: str) -> bool:
        """Whether the held-out loss has stopped improving; only `nce` is judged."""
        return name == "nce" and self.since_best >= self.config.patience

    # -- divergence -----------------------------------------------------------------------

    def diverged(self, step: dict) -> str:
        """Names of the heads whose energies are not finite or run away; empty if none."""
        limit = self.config.energy_limit
        guilty = [
            name
            for name, pos, neg in zip(
                self.prior.head_names, step["positive"], step["negative"], strict=True
            )
            if not abs(pos - neg) < limit  # also true for nan
        ]
        if not guilty and not math.isfinite(step["loss"]):
            guilty = ["all heads (gradient)"]
        return ", ".join(guilty)

    @torch.no_grad()
    def spoilt(self) -> str:
        """`diverged` with the weights of the last update, before they are kept as good."""
        e_pos, e_neg = self.prior.energies_of(self.recent).chunk(2)
        return self.diverged(self.means(e_pos, e_neg) | {"loss": 0.0})

    def means(self, e_pos: Tensor, e_neg: Tensor) -> dict[str, list[float]]:
        """Mean energy of every head, over the rows of all processes, nats."""
        means = self.ranks.mean(torch.stack([e_pos.detach().mean(0), e_neg.detach().mean(0)]))
        return dict(zip(("positive", "negative"), means.tolist(), strict=True))

    def roll_back(self, guilty: str) -> None:
        """Return to the last good state with half the learning rate and step size."""
        rollbacks, lr_scale = self.rollbacks + 1, self.lr_scale / 2
        at = self.total
        if rollbacks > self.config.rollbacks:
            self.restore(*self.last_good)
            self.save()  # so that the last good heads are on disk even before the first save
            self.run.write_config(self.describe("diverged"))
            raise DivergenceError(
                f"energies diverged in {guilty} at iteration {at} after {self.rollbacks} "
                f"rollbacks; the last good heads are in {self.run.path}; try a smaller "
                "learning rate"
            )
        self.restore(*self.last_good)
        self.rollbacks, self.lr_scale = rollbacks, lr_scale
        self.step_size /= 2
        self.last_good = self.capture()
        tqdm.write(
            f"energies diverged in {guilty} at iteration {at}: back to {self.total} with half "
            "the learning rate and step size",
            file=sys.stderr,
        )
        self.run.rewind_log(self.total)
        self.run.log({"iteration": self.total, "rollback": self.rollbacks, "diverged": guilty})

    # -- state ----------------------------------------------------------------------------

    def capture(self) -> tuple[dict[str, Tensor], dict]:
        """Copies of everything that changes: tensors, in the host's memory, and plain values."""
        tensors = {"generator": self.generator.get_state()}
        for kind in ("parameters", "average", "best"):
            for i, tensor in enumerate(getattr(self, kind)):
                tensors[f"{kind}.{i}"] = tensor.detach()
        for i, parameter in enumerate(self.parameters):
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{i}.{key}"] = value.detach()
        if self.pool is not None:
            tensors["pool"] = self.pool
        tensors = {name: tensor.to("cpu", copy=True) for name, tensor in tensors.items()}
        return tensors, {name: getattr(self, name) for name in SCALARS}

    @property
    def chain_rows(self) -> dict:
        """How many chains at a time, which decides how gradients are rounded."""
        prior = self.prior
        return {
            "at_a_time": prior.chain_memory.rows.copy(),
            "micro_batch": prior.micro_batch,
            "checkpointing": prior.backbone.checkpointing,
        }

    @chain_rows.setter
    def chain_rows(self, values: dict) -> None:
        self.prior.chain_memory.rows |= values["at_a_time"]
        if self.prior.micro_batch is None:  # else it was set, or halved, since
            self.prior.micro_batch = values["micro_batch"]
        self.prior.backbone.checkpointing = values["checkpointing"]

    def reopen(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Restore what `save` wrote, and where a rollback goes.

        Raises:
            EbmPriorError: If it is damaged, or of other heads.
        """
        try:
            good_meta = meta.pop(GOOD, None)
            good = {k.removeprefix(GOOD): v for k, v in tensors.items() if k.startswith(GOOD)}
            own = {k: v for k, v in tensors.items() if not k.startswith(GOOD)}
            if good_meta is not None:
                self.check(good, good_meta)
            self.check(own, meta)
            self.restore(own, meta)
        except Exception as error:  # whatever fails, it is of no use
            if isinstance(error, RuntimeError) and out_of_memory(error):
                raise
            raise EbmPriorError(
                f"{self.run.path / STATE} is damaged or of other heads; start anew with another "
                "--out"
            ) from error
        self.last_good = (good, good_meta) if good_meta is not None else self.capture()

    def check(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Raise `ValueError` on a state that `restore` would take, but no fit has written."""
        for kind in ("parameters", "average", "best"):
            for i, parameter in enumerate(self.parameters):
                if tensors[f"{kind}.{i}"].shape != parameter.shape:  # else it is broadcast
                    raise ValueError(f"shape of {kind}.{i}")
        if not meta.keys() <= set(SCALARS) or not 0 <= meta["phase"] <= len(self.phases):
            raise ValueError("values")
        if not all(isinstance(meta[name], int) for name in ("phase", "iteration", "total")):
            raise ValueError("counts")

    def restore(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Undo everything since `capture`."""
        for name, value in meta.items():
            setattr(self, name, value)
        device = self.prior.backbone.device
        self.generator.set_state(tensors["generator"].cpu())
        if self.phase < len(self.phases):
            best_loss, since_best = self.best_loss, self.since_best
            self.start_phase()
            self.best_loss, self.since_best = best_loss, since_best
        self.load_parameters([tensors[f"parameters.{i}"] for i in range(len(self.parameters))])
        for kind in ("average", "best"):
            copies = [tensors[f"{kind}.{i}"].to(device) for i in range(len(self.parameters))]
            setattr(self, kind, [c.clone() for c in copies])
        for key, value in tensors.items():
            if key.startswith("optimizer."):
                _, i, name = key.split(".")
                state = self.optimizer.state[self.parameters[int(i)]]
                state[name] = value.clone() if name == "step" else value.to(device).clone()
        self.pool = tensors["pool"].to(device).clone() if "pool" in tensors else None

    def save(self, interrupted: bool = False) -> None:
        """Write state and the heads one would sample with now.

        An interrupted run keeps its last regular save beside the state: a rollback must go
        there, as it would have without the interruption.
        """
        tensors, meta = self.capture()
        if interrupted:
            good, good_meta = self.last_good
            tensors |= {f"{GOOD}{name}": tensor for name, tensor in good.items()}
            meta |= {GOOD: good_meta}
        else:
            self.last_good = tensors, meta
        self.run.save_state(tensors, meta)
        kept = self.best if math.isfinite(self.best_loss) else self.average
        own = [p.detach().clone() for p in self.parameters]
        if self.phase < len(self.phases):
            self.load_parameters(kept)
        self.run.save_heads(hub.heads_bytes(self.prior))
        self.load_parameters(own)

    def show_average(self) -> None:
        """Call `on_save` with the averaged heads in place."""
        if self.on_save is not None and self.ranks.is_main:
            own = [p.detach().clone() for p in self.parameters]
            self.load_parameters(self.average)
            self.on_save(self.total)
            self.load_parameters(own)

    @torch.no_grad()
    def load_parameters(self, values: list[Tensor]) -> None:
        """Copy values into the heads."""
        for parameter, value in zip(self.parameters, values, strict=True):
            parameter.copy_(value)

    def describe(self, status: str, result: dict | None = None) -> dict:
        """Contents of `config.json`."""
        training = {
            "status": status,
            "fit": asdict(self.config),
            "environment": getattr(self, "environment", None) or environment(),
            **self.record,
        }
        self.environment = training["environment"]
        if result:
            training["result"] = result
        config = hub.prior_config(self.prior)
        config["backbone"]["path"] = str(Path(self.prior.backbone.checkpoint).absolute())
        return config | {"training": training}

    def resume_command(self) -> str:
        """What to type to go on."""
        return f"ebm-prior fit --resume {self.run.path}"

    # -- output ---------------------------------------------------------------------------

    def log(self, name: str, step: dict, speed: float) -> dict:
        """Write one log record; returns what the progress bar shows."""
        heads = self.prior.head_names
        record = {
            "iteration": self.total,
            "phase": name,
            "loss": step["loss"],
            "lr": self.optimizer.param_groups[0]["lr"],
            "grad_norm": step["grad_norm"],
            "images_per_second": speed,
            "energy_posterior": dict(zip(heads, step["positive"], strict=True)),
            "energy_prior": dict(zip(heads, step["negative"], strict=True)),
        }
        if name == "mle":
            record |= {"step_size": self.step_size, "eps_norm": step["norm"]}
            if "acceptance" in step:
                record["acceptance"] = step["acceptance"]
        self.run.log(record)
        gap = sum(step["negative"]) - sum(step["positive"])
        shown = {"loss": f"{step['loss']:.3f}", "gap": f"{gap:.2f}", "img/s": f"{speed:.0f}"}
        if "acceptance" in step:
            shown |= {"acc": f"{step['acceptance']:.2f}", "s": f"{self.step_size:.2g}"}
        elif math.isfinite(self.best_loss):
            shown["held-out"] = f"{self.best_loss:.3f}"
        return shown

    def tune_step_size(self, chains: int = 64, rounds: int = 3) -> None:
        """Freeze the step size at which short chains of the kept heads meet the target.

        Chains restart from N(0, I) each round, because that is how sampling will use it;
        the acceptance reported is that of a last round with the step size fixed.
        """
        if self.prior.sampler.transition != "pcnl":
            return
        generator = torch.Generator().manual_seed(self.config.seed + 2)
        energy = MicroBatched(self.prior.energy_of_noise, self.prior)
        steps = self.prior.sampler.steps
        with frozen(self.prior.heads):
            for last in [False] * rounds + [True]:
                start = flatten(self.prior.noise(chains, generator))[0]
                state, rates = start_chain(energy, start, self.unflatten), []
                for _ in range(steps):
                    size = self.step_size
                    state, rate = self.tuned_step(energy, state, self.generator)
                    rates.append(rate)
                    if last:
                        self.step_size = size
        self.acceptance = sum(rates) / len(rates)

    def sample_grid(self) -> None:
        """36 samples of the heads one would keep now, always from the same noise."""
        if not self.ranks.is_main:
            return
        own = [p.detach().clone() for p in self.parameters]
        if self.phase < len(self.phases):
            self.load_parameters(self.average)
        sampler = replace(self.prior.sampler, step_size=self.step_size)
        generator = torch.Generator().manual_seed(0)
        eps = self.prior.run_chain(self.prior.noise(36, generator), sampler, generator=generator)
        self.load_parameters(own)
        images = self.prior.images(eps)
        if images.isfinite().all():  # a picture must never cost a fit
            save_png(self.run.path / "samples" / f"{self.total:06d}.png", grid(images))


def _rows_of(inputs: Latents) -> Tensor:
    """Head inputs, one (B, *shape) per head, as rows (B, D): undoes `split_inputs`."""
    return torch.cat([tensor.flatten(1) for tensor in inputs], 1)
