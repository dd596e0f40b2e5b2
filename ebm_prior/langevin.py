"""Langevin transitions in eps-space, as pure functions of an energy or log-density.

In eps-space the tilted prior is (App. A.3, with E = -f)

    log p(eps) = -E(T(eps)) - |eps|^2 / 2 + const.

The change of variables is already in it: the Gaussian's log-sigma terms cancel against
the Jacobian of T, so nothing else is added to the drift.

`langevin` is the paper's unadjusted step. `pcnl` is the Metropolis-adjusted,
preconditioned Crank-Nicolson Langevin step, whose proposal leaves N(0, I) exactly
invariant; its acceptance rate tells whether the step size is right. `ebm_prior.hmc` has
two more exact ones, `ebm_prior.importance` one without gradients; `ebm_prior.transitions` lists
all by name.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ebm_prior.backbone import Latents
from ebm_prior.errors import EbmPriorError
from ebm_prior.micro_batch import MicroBatched
from ebm_prior.ranks import Share

__all__ = [
    "ChainState", "StepInfo", "keyed_generator", "langevin", "metropolis", "metropolis_chain",
    "pcnl", "pcnl_step", "rand", "randn", "start_chain", "value_alone",
]  # fmt: skip

FEW = 1 << 16  # numbers, 256 KiB in float32
MANY = 1 << 13  # numbers of one sample, 30 microseconds of a CPU's time

Generators = torch.Generator | Sequence[torch.Generator] | Share | None
"""One generator for the batch, or one per sample (each sample then has its own stream).

A generator draws on its own device. Where one of the CPU serves chains on a GPU, samples of more
than `MANY` numbers take a seed from it alone, and a generator of the GPU draws them: the CPU
would need longer than the GPU for the gradient. They are then not the numbers of a CPU's chain.
"""


class StepInfo(NamedTuple):
    """What a callback sees after each step.

    Attributes:
        step: Steps done, from 1.
        eps: Chain state after the step.
        accepted: Which proposals were taken, (B,) bool; all of them for `langevin`.
        energy: E(T(eps)) after the step, (B,), nats; None for `langevin`, which evaluates
            before it moves.
    """

    step: int
    eps: Latents
    accepted: Tensor
    energy: Tensor | None = None


class ChainState(NamedTuple):
    """Flattened chain state with what the next step needs.

    Attributes:
        eps: (B, D).
        energy: E(T(eps)), (B,), nats.
        grad: -dE/deps, (B, D).
    """

    eps: Tensor
    energy: Tensor
    grad: Tensor


def langevin(
    log_density: Callable[[Latents], Tensor],
    eps: Latents,
    *,
    steps: int,
    step_size: float,
    noise_scale: float = 1.0,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Latents:
    """Unadjusted Langevin dynamics (Eq. 12, with s_here = 2 s_paper).

        eps <- eps + (s/2) grad log p(eps) + noise_scale * sqrt(s) * n,   n ~ N(0, I)

    Args:
        log_density: Maps latents of batch B to (B,), nats; need not be normalised.
        eps: Start, one tensor per group, (B, *shape).
        steps: Number of steps, at least 1.
        step_size: s > 0, the variance of the injected noise.
        noise_scale: Multiplies the noise; 0 gives gradient ascent.
        generator: One generator, or one per sample.
        callback: Called with a `StepInfo` after every step.

    Returns:
        New detached tensors; `eps` is not changed.

    Raises:
        EbmPriorError: If `steps`, `step_size` or the shape of the log-density is wrong.
    """
    check_settings(steps, step_size)
    flat, unflatten = flatten(eps)
    every = torch.ones(len(flat), dtype=torch.bool, device=flat.device)
    for step in range(1, steps + 1):
        _, grad = value_and_grad(log_density, flat, unflatten)
        noise = randn(flat, generator)
        flat = flat + (step_size / 2) * grad + (noise_scale * step_size**0.5) * noise
        if callback is not None:
            callback(StepInfo(step, unflatten(flat), every))
    return unflatten(flat)


def pcnl(
    energy: Callable[[Latents], Tensor],
    eps: Latents,
    *,
    steps: int,
    step_size: float,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Latents:
    """Metropolis-adjusted Crank-Nicolson Langevin chain on exp(-E(eps)) N(eps; 0, I).

    Exact for any step size; with E = 0 every proposal is accepted and N(0, I)
    is invariant. For small s the proposal equals `langevin`'s step to first order.

    Reference: Cotter, Roberts, Stuart and White, "MCMC methods for functions: modifying
    old algorithms to make them faster", Statistical Science 28(3), 2013, Sec. 4.3
    (their Phi is E, their delta is step_size / 2). https://arxiv.org/abs/1202.0709

    Args:
        energy: Maps latents of batch B to (B,), nats: E alone, without |eps|^2 / 2.
        eps: Start, one tensor per group, (B, *shape).
        steps: Number of steps, at least 1.
        step_size: s > 0; from 4 on a proposal no longer stays near its start.
        generator: One generator, or one per sample.
        callback: Called with a `StepInfo` after every step.

    Returns:
        New detached tensors; `eps` is not changed.
    """
    return metropolis_chain(pcnl_step, energy, eps, steps, step_size, generator, callback)


def metropolis_chain(
    transition: Callable[..., tuple[ChainState, Tensor, Tensor]],
    energy: Callable[[Latents], Tensor],
    eps: Latents,
    steps: int,
    step_size: float,
    generator: Generators = None,
    callback: Callable[[StepInfo], None] | None = None,
) -> Latents:
    """Repeat a transition with the signature of `pcnl_step`; otherwise as `pcnl`."""
    check_settings(steps, step_size)
    flat, unflatten = flatten(eps)
    state = start_chain(energy, flat, unflatten)
    for step in range(1, steps + 1):
        state, accepted, _ = transition(energy, state, unflatten, step_size, generator)
        if callback is not None:
            callback(StepInfo(step, unflatten(state.eps), accepted, state.energy))
    return unflatten(state.eps)


def start_chain(energy: Callable, eps: Tensor, unflatten: Callable) -> ChainState:
    """Energy and gradient at eps (B, D), where a chain begins or a proposal lands."""
    value, grad = value_and_grad(energy, eps, unflatten)
    return ChainState(eps, value, -grad)


def pcnl_step(
    energy: Callable,
    state: ChainState,
    unflatten: Callable,
    step_size: float,
    generator: Generators = None,
) -> tuple[ChainState, Tensor, Tensor]:
    """One transition; costs one gradient.

    Returns:
        The new state, which samples moved (B,) bool, and their acceptance
        probabilities (B,).
    """
    delta = step_size / 2
    noise = randn(state.eps, generator)
    proposal = ((2 - delta) * state.eps + 2 * delta * state.grad + (8 * delta) ** 0.5 * noise) / (
        2 + delta
    )
    new = start_chain(energy, proposal, unflatten)
    log_ratio = _rho(state, new, delta) - _rho(new, state, delta)
    return metropolis(state, new, log_ratio, generator)


def metropolis(
    state: ChainState, new: ChainState, log_ratio: Tensor, generator: Generators = None
) -> tuple[ChainState, Tensor, Tensor]:
    """Take each sample's proposal with probability min(1, exp(log_ratio)).

    Args:
        state: Where the chains are.
        new: Their proposals.
        log_ratio: Logarithm of the Metropolis-Hastings ratio, (B,).
        generator: One generator, or one per sample.

    Returns:
        As `pcnl_step`.
    """
    # A non-finite proposal is a rejection, never a crash: exp(nan) compares false.
    probability = log_ratio.clamp(max=0).exp().nan_to_num(0.0) * new.energy.isfinite()
    accepted = rand(probability, generator) < probability
    keep = accepted[:, None]
    return (
        ChainState(
            torch.where(keep, new.eps, state.eps),
            torch.where(accepted, new.energy, state.energy),
            torch.where(keep, new.grad, state.grad),
        ),
        accepted,
        probability,
    )


def _rho(u: ChainState, v: ChainState, delta: float) -> Tensor:
    """rho(u, v) of Cotter et al., Sec. 4.3, with D Phi(u) = -u.grad: (B,)."""
    return (
        u.energy
        - 0.5 * ((v.eps - u.eps) * u.grad).sum(1)
        - delta / 4 * ((u.eps + v.eps) * u.grad).sum(1)
        + delta / 4 * u.grad.square().sum(1)
    )


def check_settings(steps: int, step_size: float) -> None:
    """Raise `EbmPriorError` unless a chain can run with these settings."""
    if steps < 1:
        raise EbmPriorError(f"steps must be at least 1, got {steps}")
    if not step_size > 0 or step_size == float("inf"):
        raise EbmPriorError(f"step size must be positive and finite, got {step_size}")


def flatten(eps: Sequence[Tensor]) -> tuple[Tensor, Callable[[Tensor], Latents]]:
    """Join the groups into one (B, D) tensor; also return the way back."""
    shapes = [tensor.shape[1:] for tensor in eps]
    sizes = [shape.numel() for shape in shapes]

    def unflatten(flat: Tensor) -> Latents:
        parts = flat.split(sizes, 1)
        return tuple(p.reshape(-1, *s) for p, s in zip(parts, shapes, strict=True))

    return torch.cat([tensor.detach().flatten(1) for tensor in eps], 1), unflatten


def value_and_grad(
    function: Callable[[Latents], Tensor], flat: Tensor, unflatten: Callable
) -> tuple[Tensor, Tensor]:
    """Values (B,) of a per-sample function and their gradients (B, D).

    Samples are independent, so the gradient of the sum holds each sample's own.
    """

    def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
        # also where the caller is in inference mode, whose tensors know no gradient
        with torch.inference_mode(False), torch.enable_grad():
            point = rows.clone() if rows.is_inference() else rows.detach()
            point.requires_grad_()
            value = checked(function(unflatten(point)), rows)
            (grad,) = torch.autograd.grad(value.sum(), point)
        return value.detach(), grad

    if isinstance(function, MicroBatched):
        return function.in_parts(evaluate, flat, unflatten)
    return evaluate(flat)


def value_alone(
    function: Callable[[Latents], Tensor], flat: Tensor, unflatten: Callable
) -> Tensor:
    """`value_and_grad` without the gradient: (B,)."""

    @torch.no_grad()
    def evaluate(rows: Tensor) -> tuple[Tensor, Tensor]:
        return checked(function(unflatten(rows)), rows), rows[:, :0]

    if isinstance(function, MicroBatched):
        return function.in_parts(evaluate, flat)[0]  # nothing is kept
    return evaluate(flat)[0]


def checked(value: Tensor, rows: Tensor) -> Tensor:
    """The values of rows (B, D), which must be (B,)."""
    if value.shape != rows.shape[:1]:
        raise EbmPriorError(
            f"a density or energy of {len(rows)} samples must have shape "
            f"({len(rows)},), got {tuple(value.shape)}"
        )
    return value


def keyed_generator(*key: int) -> torch.Generator:
    """A generator of its own for every key, such as (seed, purpose, index), none negative.

    Keys are zero-padded: (1, 2) and (1, 2, 0) are the same.
    """
    state = np.random.SeedSequence(key).generate_state(1, np.uint64)
    return torch.Generator().manual_seed(int(state[0]))


def randn(like: Tensor, generator: Generators = None) -> Tensor:
    """Standard-normal tensor of the shape, type and device of `like` (B, D)."""
    return _draw(torch.randn, like, generator)


def rand(like: Tensor, generator: Generators = None) -> Tensor:
    """Uniform tensor on [0, 1) of the shape, type and device of `like`."""
    return _draw(torch.rand, like, generator)


def _draw(sampler: Callable, like: Tensor, generator: Generators) -> Tensor:
    if generator is None or not len(like):
        return sampler(like.shape, dtype=like.dtype, device=like.device)
    several = isinstance(generator, Sequence)
    if several and len(generator) != len(like):
        raise EbmPriorError(f"{len(generator)} generators for a batch of {len(like)}")
    device = generator[0].device if several else generator.device
    if device.type == "cpu" and draws_itself(like):
        return _draw_from_seeds(sampler, like, generator)
    shape, options = like.shape, {"dtype": like.dtype, "device": device}
    if several:
        drawn = torch.stack([sampler(shape[1:], generator=g, **options) for g in generator])
    elif isinstance(generator, Share):
        drawn = generator.draw(sampler, shape, like.dtype)
    else:
        drawn = sampler(shape, generator=generator, **options)
    return moved(drawn, like.device)


def draws_itself(like: Tensor) -> bool:
    """Whether the samples' device, a GPU, draws their numbers from seeds."""
    return like.device.type == "cuda" and like.shape[1:].numel() > MANY


def _draw_from_seeds(sampler: Callable, like: Tensor, generator: Generators) -> Tensor:
    """Each sample from a seed of its own, so that neither batch nor processes matter to it."""
    seeds = _draw(partial(torch.randint, 2**63 - 1), torch.empty(len(like)).long(), generator)
    own, drawn = torch.Generator(like.device), torch.empty_like(like)
    for seed, sample in zip(seeds.tolist(), drawn, strict=True):
        sampler(sample.shape, generator=own.manual_seed(seed), out=sample)
    return drawn


def moved(drawn: Tensor, device: torch.device) -> Tensor:
    """Random numbers on the chain's device.

    A copy from pageable memory waits for all that a GPU was asked to do before it. A few, such
    as one per chain for the Metropolis test, need not: the next step is then prepared while the
    GPU is at this step's gradient.
    """
    if device.type == "cuda" and drawn.device.type == "cpu" and drawn.numel() <= FEW:
        return drawn.pin_memory().to(device, non_blocking=True)
    return drawn.to(device)
