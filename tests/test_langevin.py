import math
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.distributions import Normal

from ebm_prior import EbmPriorError, langevin, pcnl
from ebm_prior.langevin import (
    FEW,
    MANY,
    ChainState,
    _rho,
    draws_itself,
    flatten,
    moved,
    rand,
    randn,
)  # fmt: skip
from ebm_prior.ranks import Share

KAPPA, SHIFT = 2.0, 0.7  # E = kappa/2 eps^2 + shift * eps: p = N(-shift/(1+kappa), 1/(1+kappa))


def energy(eps):
    return sum((KAPPA / 2 * e.square() + SHIFT * e).flatten(1).sum(1) for e in eps)


def log_density(eps):
    return -energy(eps) - sum(e.square().flatten(1).sum(1) for e in eps) / 2


def start(n, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = ((2,), (1, 2, 2))
    return tuple(torch.randn(n, *s, generator=g, dtype=torch.float64) for s in shapes), g


def test_langevin_step_is_equation_12():
    eps, _ = start(5)
    (new) = langevin(
        log_density, eps, steps=1, step_size=0.2, generator=torch.Generator().manual_seed(7)
    )
    flat = flatten(eps)[0]
    noise = randn(flat, torch.Generator().manual_seed(7))
    expected = flat + 0.1 * (-(1 + KAPPA) * flat - SHIFT) + math.sqrt(0.2) * noise
    torch.testing.assert_close(flatten(new)[0], expected)


def test_noise_scale_zero_is_gradient_ascent():
    eps, _ = start(3)
    new = langevin(log_density, eps, steps=200, step_size=0.1, noise_scale=0.0)
    torch.testing.assert_close(
        flatten(new)[0], torch.full((3, 6), -SHIFT / (1 + KAPPA), dtype=torch.float64)
    )


@pytest.mark.parametrize("step_size", [0.05, 0.4, 1.0])
def test_langevin_has_its_known_biased_variance(step_size):
    """The chain is AR(1) with a = 1 - s(1+kappa)/2, so its variance is s / (1 - a^2)."""
    eps, g = start(4_000)
    steps = math.ceil(30 / step_size)
    flat = flatten(langevin(log_density, eps, steps=steps, step_size=step_size, generator=g))[0]
    a = 1 - step_size * (1 + KAPPA) / 2
    variance = step_size / (1 - a * a)
    error = 5 * variance * math.sqrt(2 / flat.numel())
    assert abs(flat.var().item() - variance) < error
    assert abs(flat.mean().item() + SHIFT / (1 + KAPPA)) < 5 * math.sqrt(variance / flat.numel())


def test_langevin_on_the_gaussian_prior_has_variance_one_over_one_minus_quarter_step():
    eps, g = start(4_000)
    flat = flatten(
        langevin(lambda e: log_density(e) + energy(e), eps, steps=60, step_size=0.8, generator=g)
    )[0]
    assert abs(flat.var().item() - 1 / (1 - 0.8 / 4)) < 5 * 1.25 * math.sqrt(2 / flat.numel())


@pytest.mark.parametrize("step_size", [0.1, 0.3, 0.8])
def test_pcnl_reaches_the_exact_gaussian(step_size):
    eps, g = start(4_000)
    steps = math.ceil(30 / step_size)
    flat = flatten(pcnl(energy, eps, steps=steps, step_size=step_size, generator=g))[0]
    variance = 1 / (1 + KAPPA)
    assert abs(flat.var().item() - variance) < 5 * variance * math.sqrt(2 / flat.numel())
    assert abs(flat.mean().item() + SHIFT / (1 + KAPPA)) < 5 * math.sqrt(variance / flat.numel())


def test_pcnl_without_energy_accepts_everything_and_keeps_the_prior():
    eps, g = start(4_000)
    infos = []
    flat = flatten(
        pcnl(
            lambda e: 0 * energy(e),
            eps,
            steps=5,
            step_size=1.0,
            generator=g,
            callback=infos.append,
        )
    )[0]
    assert all(info.accepted.all() for info in infos)
    assert [info.step for info in infos] == [1, 2, 3, 4, 5]
    assert abs(flat.var().item() - 1) < 5 * math.sqrt(2 / flat.numel())


def test_pcnl_acceptance_ratio_is_metropolis_hastings():
    """rho(u,v) - rho(v,u) equals log pi(v) q(v,u) / pi(u) q(u,v) with the explicit proposal."""
    delta = 0.3
    g = torch.Generator().manual_seed(1)
    u, v = (torch.randn(4, 3, generator=g, dtype=torch.float64) for _ in range(2))

    def cosine_energy(x):
        return (x.cos() * 3 + x**3 / 9).sum(1)

    def state(x):
        x = x.clone().requires_grad_()
        value = cosine_energy(x)
        return ChainState(x.detach(), value.detach(), -torch.autograd.grad(value.sum(), x)[0])

    def log_q(a, b):
        mean = ((2 - delta) * a.eps + 2 * delta * a.grad) / (2 + delta)
        return Normal(mean, math.sqrt(8 * delta) / (2 + delta)).log_prob(b.eps).sum(1)

    def log_pi(a):
        return -a.energy - a.eps.square().sum(1) / 2

    a, b = state(u), state(v)
    torch.testing.assert_close(
        _rho(a, b, delta) - _rho(b, a, delta),
        log_pi(b) + log_q(b, a) - log_pi(a) - log_q(a, b),
    )


def test_pcnl_agrees_with_langevin_for_small_steps():
    eps, _ = start(4)
    new = [
        flatten(
            chain(
                function, eps, steps=1, step_size=1e-6, generator=torch.Generator().manual_seed(3)
            )
        )[0]
        for chain, function in ((langevin, log_density), (pcnl, energy))
    ]
    torch.testing.assert_close(new[0], new[1], rtol=0, atol=1e-8)


def test_pcnl_rejects_non_finite_proposals():
    eps, g = start(50)
    wall = pcnl(
        lambda e: torch.where(e[0][:, 0] > 0, math.nan, 1.0) * energy(e),
        eps,
        steps=20,
        step_size=0.5,
        generator=g,
    )
    assert flatten(wall)[0].isfinite().all()
    trap = pcnl(
        lambda e: torch.where(e[0][:, 0] > 0, -math.inf, 0.0) + energy(e),
        tuple(-e.abs() for e in eps),
        steps=20,
        step_size=0.5,
        generator=g,
    )
    assert (trap[0][:, 0] < 0).all()


@pytest.mark.parametrize("chain, function", [(langevin, log_density), (pcnl, energy)])
def test_chains_depend_on_their_own_generator_only(chain, function):
    eps, _ = start(4)

    def run(rows):
        generators = [torch.Generator().manual_seed(100 + i) for i in rows]
        out = chain(
            function, tuple(e[rows] for e in eps), steps=5, step_size=0.3, generator=generators
        )
        return flatten(out)[0]

    torch.testing.assert_close(run([0, 1, 2, 3])[[2, 0]], run([2, 0]), rtol=0, atol=0)


def test_input_is_left_alone():
    eps, g = start(3)
    copies = [e.clone() for e in eps]
    out = langevin(log_density, eps, steps=2, step_size=0.1, generator=g)
    assert all(torch.equal(a, b) for a, b in zip(eps, copies, strict=True))
    assert not any(o.requires_grad for o in out)


@pytest.mark.parametrize(
    "settings",
    [
        dict(steps=0, step_size=0.1),
        dict(steps=1, step_size=-1.0),
        dict(steps=1, step_size=0.0),
        dict(steps=1, step_size=math.nan),
    ],
)
def test_wrong_settings_are_refused(settings):
    with pytest.raises(EbmPriorError, match="step"):
        langevin(log_density, start(2)[0], **settings)


def test_wrong_density_shape_is_refused():
    with pytest.raises(EbmPriorError, match="shape"):
        langevin(lambda e: log_density(e).sum(), start(2)[0], steps=1, step_size=0.1)


@pytest.mark.gpu
@pytest.mark.parametrize("n", [FEW, FEW + 1])
def test_numbers_arrive_whole_on_a_gpu_that_is_busy(n):
    like, busy = torch.empty(n, device="cuda"), torch.randn(4000, 4000, device="cuda")
    here, there = (torch.Generator().manual_seed(0) for _ in range(2))
    found = []
    for _ in range(20):
        busy = (busy @ busy).tanh()
        found.append(rand(like, there))
    for numbers in found:
        assert torch.equal(numbers.cpu(), rand(like.cpu(), here))


@pytest.mark.parametrize("n, waits", [(FEW, False), (FEW + 1, True)])
def test_few_numbers_do_not_wait_for_the_gpu(monkeypatch, n, waits):
    calls = []

    class Numbers(torch.Tensor):
        def pin_memory(self):
            calls.append("pinned")
            return self

        def to(self, device, non_blocking=False):
            calls.append((device.type, non_blocking))

    moved(torch.empty(n).as_subclass(Numbers), torch.device("cuda"))
    assert calls == ([("cuda", False)] if waits else ["pinned", ("cuda", True)])


def test_a_gpu_draws_for_itself_what_takes_the_cpu_long():
    with FakeTensorMode():
        assert draws_itself(torch.empty(2, MANY + 1, device="cuda"))
        assert draws_itself(torch.empty(2, 2, MANY, device="cuda"))
        assert not draws_itself(torch.empty(9 * MANY, device="cuda"))  # a number a sample
        assert not draws_itself(torch.empty(99, MANY, device="cuda"))
    assert not draws_itself(torch.empty(2, MANY + 1))


DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


@pytest.fixture(params=DEVICES)
def like(request, monkeypatch):
    """Samples whose device draws from seeds: a GPU, or the CPU made to."""
    if request.param == "cpu":
        module = sys.modules["ebm_prior.langevin"]  # the package has a function of this name
        monkeypatch.setattr(module, "draws_itself", lambda like: like.ndim > 1)
    return torch.empty(6, MANY + 1, device=request.param)


def seeded(*seeds):
    return [torch.Generator().manual_seed(seed) for seed in seeds]


def test_numbers_drawn_from_seeds_follow_their_law(like):
    draws = torch.cat([randn(like, generator) for generator in seeded(0, 1, 2)]).double()
    n = draws.numel()
    assert draws.device == like.device
    assert abs(draws.mean().item()) < 5 / math.sqrt(n)
    assert abs(draws.var().item() - 1) < 5 * math.sqrt(2 / n)
    between = torch.corrcoef(draws).fill_diagonal_(0)  # 18 samples: no two from the same stream
    assert between.abs().max().item() < 6 / math.sqrt(draws.shape[1])
    uniform = rand(like, seeded(0)[0])
    assert uniform.min() >= 0 and uniform.max() < 1
    assert abs(uniform.double().mean().item() - 0.5) < 5 / math.sqrt(12 * like.numel())


def test_a_sample_drawn_from_a_seed_depends_on_nothing_else(like):
    drawn = randn(like, seeded(*range(6)))
    assert torch.equal(randn(like[:2], seeded(4, 1)), drawn[[4, 1]])
    generators = seeded(*range(6))
    first, second = randn(like, generators), randn(like, generators)
    assert torch.equal(first, drawn) and not torch.isclose(second, first).all(1).any()


def test_processes_share_what_is_drawn_from_seeds(like):
    alone, *shares = seeded(7, 7, 7)
    for _ in range(2):
        whole = randn(like, alone)
        parts = [randn(like[:3], Share(own, rank, 2)) for rank, own in enumerate(shares)]
        assert torch.equal(torch.cat(parts), whole)
    assert all(torch.equal(own.get_state(), alone.get_state()) for own in shares)


def test_of_no_samples_nothing_is_drawn(like):
    assert randn(like[:0], []).shape == (0, MANY + 1)
