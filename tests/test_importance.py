"""Sampling importance resampling: its law after any number of draws, and its limits."""

import math

import pytest
import torch

from ebm_prior import EbmPriorError, EnergyPrior, FitConfig, SamplerConfig, fit
from ebm_prior.importance import sir
from ebm_prior.langevin import flatten
from tests.test_langevin import energy, start
from tests.test_prior import gaussian_of_quadratic_heads, quadratic_prior


def test_every_draw_is_kept_by_its_share_of_the_weights():
    """The law itself: after n steps draw j is the kept one with probability w_j / sum w."""
    chains, steps = 40_000, 4
    eps = (torch.zeros(chains, 1, dtype=torch.float64),)
    logs = torch.tensor([0.3, -1.0, 1.2, 0.0, 0.7], dtype=torch.float64)
    asked = []

    def weights_in_turn(e):
        asked.append(e[0])
        return (-logs[len(asked) - 1]).expand(chains)

    kept = []
    end = sir(weights_in_turn, eps, steps=steps, step_size=1.0, callback=kept.append,
              generator=torch.Generator().manual_seed(0))[0]  # fmt: skip
    for k in range(1, steps + 1):
        (state,) = kept[k - 1].eps
        shares = torch.stack([(state == e).all(1).double().mean() for e in asked[: k + 1]])
        want = logs[: k + 1].softmax(0)
        assert ((shares - want).abs() < 5 * (want * (1 - want) / chains).sqrt()).all()
        assert kept[k - 1].accepted.double().mean() == shares[k]
    assert torch.equal(end, kept[-1].eps[0])


def test_the_exact_gaussian_is_reached_as_the_draws_grow(toy):
    """With quadratic heads on a linear backbone: closed form, and a bias that falls."""
    prior, n = quadratic_prior(toy), 4000
    mean, covariance = gaussian_of_quadratic_heads(toy)
    sd, errors = covariance.diagonal().sqrt(), []
    for steps in (2, 20, 1000):
        eps = prior.sample_eps(
            n, steps, generator=torch.Generator().manual_seed(0), transition="sir"
        )
        z = torch.cat(toy.transform(eps), 1)
        off = ((z.mean(0) - mean) / sd).abs().max().item()
        wide = ((z.T.cov() - covariance) / (sd[:, None] * sd)).abs().max().item()
        errors.append((off, wide))
    assert errors[0] > errors[1] > errors[2]
    assert errors[0][0] > 0.3 and errors[0][1] > 0.5  # far off before
    assert errors[2][0] < 5 / math.sqrt(n) + 0.01 and errors[2][1] < 5 * math.sqrt(2 / n) + 0.03


def test_without_energy_the_prior_stays_and_draw_k_is_taken_once_in_k_plus_1():
    eps, g = start(6000)
    rates = []
    flat = flatten(
        sir(lambda e: 0 * energy(e), eps, steps=6, step_size=1.0, generator=g,
            callback=lambda info: rates.append(info.accepted.double().mean().item()))
    )[0]  # fmt: skip
    assert abs(flat.var().item() - 1) < 5 * math.sqrt(2 / flat.numel())
    assert abs(flat.mean().item()) < 5 / math.sqrt(flat.numel())
    assert rates == pytest.approx([1 / (k + 1) for k in range(1, 7)], abs=5 * 0.5 / 6000**0.5)


@pytest.mark.parametrize("scale", [1e4, 1e30, math.inf])
def test_extreme_weights_stay_finite_and_pick_the_least_energy(scale):
    eps, g = start(200)
    seen, infos = [], []

    def steep(e):
        seen.append(energy(e))
        value = scale * seen[-1]
        return value if math.isfinite(scale) else torch.full_like(value, -math.inf)

    end = sir(steep, eps, steps=20, step_size=1.0, generator=g, callback=infos.append)
    assert flatten(end)[0].isfinite().all()
    if math.isfinite(scale):
        torch.testing.assert_close(energy(end), torch.stack(seen).min(0).values)
        torch.testing.assert_close(infos[-1].energy, scale * energy(end))
    else:  # no weight at all: nothing is better than the start
        assert torch.equal(flatten(end)[0], flatten(eps)[0])


def test_a_start_without_an_energy_is_left_at_once_and_none_is_entered():
    eps, g = start(300)
    energies = []

    def half(e):
        value = torch.where(e[0][:, 0] > 0, math.nan, energy(e))
        energies.append(value)
        return value

    end = sir(half, tuple(e.abs() for e in eps), steps=40, step_size=1.0, generator=g)
    assert energies[0].isnan().all() and (end[0][:, 0] <= 0).all()


def test_chains_depend_on_their_own_generator_and_on_no_step_size():
    eps, _ = start(4)

    def run(rows, step_size=1.0):
        generators = [torch.Generator().manual_seed(100 + i) for i in rows]
        own = tuple(e[rows] for e in eps)
        return flatten(sir(energy, own, steps=9, step_size=step_size, generator=generators))[0]

    whole = run([0, 1, 2, 3])
    torch.testing.assert_close(whole[[2, 0]], run([2, 0]), rtol=0, atol=0)
    torch.testing.assert_close(whole, run([0, 1, 2, 3], 1e-6), rtol=0, atol=0)
    assert not torch.equal(whole, flatten(eps)[0])


def test_no_gradient_is_recorded(toy):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    whole, recorded = prior.energy_of_noise, []

    def energy_of_noise(*args):
        value = whole(*args)
        recorded.append(value.requires_grad)
        return value

    prior.energy_of_noise = energy_of_noise
    eps = tuple(e.requires_grad_() for e in prior.noise(3))
    config = SamplerConfig("sir", 4, 0.1)
    end = prior.run_chain(eps, config)
    assert recorded == [False] * 5 and not any(e.requires_grad for e in end)


def test_bad_settings_and_energies_are_refused(toy, tmp_path):
    eps, _ = start(2)
    with pytest.raises(EbmPriorError, match="steps"):
        sir(energy, eps, steps=0, step_size=0.1)
    with pytest.raises(EbmPriorError, match=r"must have shape \(2,\)"):
        sir(lambda e: e[0], eps, steps=1, step_size=0.1)
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6, sampler=SamplerConfig("sir", 4, 0.1))
    images = torch.zeros(20, *toy.image_shape, dtype=torch.uint8)
    with pytest.raises(EbmPriorError, match="fitted with langevin or pcnl, not sir"):
        fit(prior, images, FitConfig(), run_dir=tmp_path)
