"""MALA and HMC: the laws of an exact transition."""

import math
import sys

import pytest
import torch
from torch.distributions import Normal

from ebm_prior import EbmPriorError, hmc, langevin, mala
from ebm_prior.hmc import LEAPFROG, hmc_step
from ebm_prior.langevin import flatten, start_chain
from tests.test_langevin import KAPPA, SHIFT, energy, log_density, start

CHAINS = [mala, hmc]


def moments(chain, function, n=4000, **settings):
    eps, g = start(n)
    flat = flatten(chain(function, eps, generator=g, **settings))[0]
    return flat.mean().item(), flat.var().item(), flat.numel()


@pytest.mark.parametrize(
    "chain, steps, step_size", [(mala, 150, 0.1), (mala, 60, 0.4), (hmc, 20, 0.05), (hmc, 30, 0.3)]
)
def test_the_exact_gaussian_is_reached(chain, steps, step_size):
    mean, variance, n = moments(chain, energy, steps=steps, step_size=step_size)
    want = 1 / (1 + KAPPA)
    assert abs(variance - want) < 5 * want * math.sqrt(2 / n)
    assert abs(mean + SHIFT / (1 + KAPPA)) < 5 * math.sqrt(want / n)


def test_no_period_traps_the_trajectories():
    """With h = 2 sin(pi / 10) five leapfrog steps of N(0, I) are exactly half a period."""
    _, g = start(1)
    eps = (3 * torch.randn(3000, 2, generator=g, dtype=torch.float64),)
    step_size = (2 * math.sin(math.pi / (2 * LEAPFROG))) ** 2
    end = hmc(lambda e: 0 * e[0].sum(1), eps, steps=15, step_size=step_size, generator=g)[0]
    assert abs(end.var().item() - 1) < 5 * math.sqrt(2 / end.numel())


@pytest.mark.parametrize("chain", CHAINS)
def test_without_energy_the_prior_stays_and_some_proposals_are_refused(chain):
    """The proposals of neither keep N(0, I), unlike pcnl's: the test must correct them."""
    eps, g = start(6000)
    accepted = []
    flat = flatten(
        chain(lambda e: 0 * energy(e), eps, steps=6, step_size=0.6, generator=g,
              callback=lambda info: accepted.append(info.accepted))
    )[0]  # fmt: skip
    assert 0.5 < torch.stack(accepted).double().mean() < 1
    assert abs(flat.var().item() - 1) < 5 * math.sqrt(2 / flat.numel())
    assert abs(flat.mean().item()) < 5 / math.sqrt(flat.numel())


@pytest.mark.parametrize("chain", CHAINS)
def test_acceptance_goes_to_one_as_the_step_goes_to_zero(chain):
    rates = []
    for step_size in (1.2, 0.3, 0.02, 1e-4):
        eps, g = start(500)
        seen = []
        chain(energy, eps, steps=3, step_size=step_size, generator=g,
              callback=lambda info, seen=seen: seen.append(info.accepted))  # fmt: skip
        rates.append(torch.stack(seen).double().mean().item())
    assert rates == sorted(rates) and rates[0] < 0.8 and rates[-1] == 1


def test_mala_proposes_the_papers_step():
    """Where all are accepted, the chain is `langevin`'s on the same noise."""
    eps, _ = start(5)
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    infos = []
    new = mala(energy, eps, steps=1, step_size=0.01, generator=seeds, callback=infos.append)
    seeds = [torch.Generator().manual_seed(i) for i in range(5)]
    want = langevin(log_density, eps, steps=1, step_size=0.01, generator=seeds)
    assert infos[0].accepted.all()
    torch.testing.assert_close(flatten(new)[0], flatten(want)[0])
    torch.testing.assert_close(infos[0].energy, energy(new))


def cosine_energy(eps):
    return sum((3 * e.cos() + e**3 / 9).flatten(1).sum(1) for e in eps)


def transition(monkeypatch, x, noise, step_size, leapfrog):
    """One transition of `cosine_energy` with this noise, taken whatever it is."""
    # the functions of these names hide their modules
    monkeypatch.setattr(sys.modules["ebm_prior.hmc"], "randn", lambda *_: noise)
    never_refuse = lambda like, _: torch.zeros_like(like) - 1  # noqa: E731
    monkeypatch.setattr(sys.modules["ebm_prior.langevin"], "rand", never_refuse)
    state = start_chain(cosine_energy, x, lambda flat: (flat,))
    step = hmc_step(cosine_energy, state, lambda flat: (flat,), step_size, leapfrog=leapfrog)
    return state, step[0], step[2]


def test_malas_acceptance_ratio_is_metropolis_hastings(monkeypatch):
    """min(1, pi(v) q(v,u) / pi(u) q(u,v)) with the explicit Gaussian proposal."""
    s, g = 0.7, torch.Generator().manual_seed(1)
    x, noise = (torch.randn(200, 3, generator=g, dtype=torch.float64) for _ in range(2))
    u, v, probability = transition(monkeypatch, x, noise, s, 1)

    def log_q(a, b):
        mean = a.eps + s / 2 * (a.grad - a.eps)
        return Normal(mean, math.sqrt(s)).log_prob(b.eps).sum(1)

    def log_pi(a):
        return -a.energy - a.eps.square().sum(1) / 2

    ratio = log_pi(v) + log_q(v, u) - log_pi(u) - log_q(u, v)
    torch.testing.assert_close(probability, ratio.clamp(max=0).exp())
    assert (probability < 0.9).any() and (probability == 1).any()


def test_detailed_balance_holds_along_a_trajectory(monkeypatch):
    """Back from the end with the momentum turned round: the start, and the inverse ratio."""
    s, g = 0.3, torch.Generator().manual_seed(2)
    x, p = (torch.randn(200, 3, generator=g, dtype=torch.float64) for _ in range(2))
    state, new, there = transition(monkeypatch, x, p, s, LEAPFROG)
    # the end momentum, from a leapfrog written out again
    h, eps, momentum = math.sqrt(s), x, p

    def grad(e):
        return -start_chain(lambda z: -log_pi(z), e, lambda flat: (flat,)).grad

    def log_pi(z):
        return -cosine_energy(z) - z[0].square().sum(1) / 2

    for _ in range(LEAPFROG):
        momentum = momentum - h / 2 * grad(eps)
        eps = eps + h * momentum
        momentum = momentum - h / 2 * grad(eps)
    torch.testing.assert_close(new.eps, eps)
    _, again, back = transition(monkeypatch, eps, -momentum, s, LEAPFROG)
    torch.testing.assert_close(again.eps, x)
    change = log_pi((eps,)) - log_pi((x,)) + (p.square() - momentum.square()).sum(1) / 2
    torch.testing.assert_close(there, change.clamp(max=0).exp())
    torch.testing.assert_close(back, (-change).clamp(max=0).exp())
    assert (there < 0.99).any()


@pytest.mark.parametrize("chain", CHAINS)
def test_non_finite_proposals_are_rejections(chain):
    eps, g = start(50)
    wall = chain(
        lambda e: torch.where(e[0][:, 0] > 0, math.nan, 1.0) * energy(e),
        tuple(-e.abs() for e in eps), steps=20, step_size=0.5, generator=g,
    )  # fmt: skip
    assert flatten(wall)[0].isfinite().all() and (wall[0][:, 0] <= 0).all()
    trap = chain(
        lambda e: torch.where(e[0][:, 0] > 0, -math.inf, 0.0) + energy(e),
        tuple(-e.abs() for e in eps), steps=20, step_size=0.5, generator=g,
    )  # fmt: skip
    assert (trap[0][:, 0] < 0).all()
    wild = chain(energy, eps, steps=3, step_size=1e300, generator=g)  # overflows on the way
    assert torch.equal(flatten(wild)[0], flatten(eps)[0])


@pytest.mark.parametrize("chain", CHAINS)
def test_chains_depend_on_their_own_generator_only(chain):
    eps, _ = start(4)

    def run(rows):
        generators = [torch.Generator().manual_seed(100 + i) for i in rows]
        own = tuple(e[rows] for e in eps)
        return flatten(chain(energy, own, steps=5, step_size=0.3, generator=generators))[0]

    torch.testing.assert_close(run([0, 1, 2, 3])[[2, 0]], run([2, 0]), rtol=0, atol=0)


def test_a_transition_costs_the_gradients_it_says():
    from ebm_prior.transitions import TRANSITIONS

    eps, g = start(3)
    for name, entry in TRANSITIONS.items():
        function = log_density if entry.density == "log_density" else energy
        calls = []
        entry.chain(lambda e, f=function, c=calls: c.append(1) or f(e), eps,
                    steps=7, step_size=0.1, generator=g)  # fmt: skip
        first = 0 if name == "langevin" else 1  # where the chain begins
        assert len(calls) == 7 * max(entry.gradients, 1) + first, name  # sir: energies alone


def test_bad_settings_are_refused():
    eps, _ = start(2)
    for settings in (dict(steps=0, step_size=0.1), dict(steps=1, step_size=math.nan)):
        with pytest.raises(EbmPriorError, match="step"):
            mala(energy, eps, **settings)
    with pytest.raises(EbmPriorError, match="leapfrog"):
        hmc(energy, eps, steps=1, step_size=0.1, leapfrog=0)
