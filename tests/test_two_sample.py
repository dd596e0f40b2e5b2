"""The energy distance: its closed form, its law under equal distributions, its power."""

import math

import numpy as np
import pytest
import torch

from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.memory import rows_in_memory
from ebm_prior.two_sample import AggregatePosterior, energy_test


def normal(n, d=1, mean=0.0, seed=0):
    g = torch.Generator().manual_seed(seed)
    return mean + torch.randn(n, d, generator=g, dtype=torch.float64)


@pytest.mark.parametrize("mean", [0.5, 2.0])
def test_the_closed_form_of_shifted_normals(mean):
    """|N(m, 2)| is folded normal: E = 2 / sqrt(pi) exp(-m^2 / 4) + m erf(m / 2)."""
    folded = 2 / math.sqrt(math.pi) * math.exp(-(mean**2) / 4) + mean * math.erf(mean / 2)
    want = 2 * folded - 2 * 2 / math.sqrt(math.pi)
    values = [
        energy_test(normal(300, seed=2 * i), normal(200, mean=mean, seed=2 * i + 1),
                    permutations=1).distance for i in range(60)
    ]  # fmt: skip
    error = np.std(values) / math.sqrt(len(values))
    assert abs(np.mean(values) - want) < 4 * error < 0.25 * want


def test_it_is_the_sum_over_pairs_in_any_dimension():
    x, y = normal(5, 3), normal(7, 3, seed=1)
    across = np.mean([(a - b).norm() for a in x for b in y])
    within = [
        np.mean([(a - b).norm() for i, a in enumerate(s) for j, b in enumerate(s) if i != j])
        for s in (x, y)
    ]
    found = energy_test(x, y)
    assert found.distance == pytest.approx(2 * across - sum(within))
    assert energy_test(x + 9, y + 9).distance == pytest.approx(found.distance)
    assert energy_test(3 * x, 3 * y).distance == pytest.approx(3 * found.distance)
    assert energy_test(y, x).distance == pytest.approx(found.distance)


def test_equal_distributions_have_mean_zero_and_uniform_p_values():
    found = [
        energy_test(normal(20, 4, seed=2 * i), normal(15, 4, seed=2 * i + 1), permutations=99)
        for i in range(300)
    ]
    distances, p = (np.array(values) for values in zip(*found, strict=True))
    assert abs(distances.mean()) < 4 * distances.std() / math.sqrt(300)
    assert distances.min() < 0 < distances.max()
    # Kolmogorov's distance to the uniform distribution, beyond 1.95 / sqrt(n) one in 1000
    grid = np.arange(1, 101) / 100
    assert np.abs((p[:, None] <= grid + 1e-9).mean(0) - grid).max() < 1.95 / math.sqrt(300)


def test_what_differs_is_seen_in_mean_in_spread_and_in_dependence():
    x = normal(150, 6)
    assert energy_test(x, normal(150, 6, 0.4, seed=1)).p_value == 0.001
    assert energy_test(x, 1.5 * normal(150, 6, seed=1)).p_value < 0.01
    tied = normal(150, 1, seed=1) + 0.1 * normal(150, 6, seed=2)  # the same mean and variance
    assert energy_test(x, tied / 1.01**0.5).p_value == 0.001


def test_identical_points_are_no_evidence():
    same = torch.ones(9, 2)
    assert energy_test(same, same[:5]) == (0.0, 1.0)


def aggregate(toy, n=4000):
    """Images of the toy's own prior: q(z) is then p(z), a Gaussian."""
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    z = toy.transform(prior.noise(n, torch.Generator().manual_seed(5)))
    # neither rounded to 8 bits nor cut to [0, 1], as either would spoil the closed form
    noise = torch.randn(n, 16, generator=torch.Generator().manual_seed(6), dtype=torch.float64)
    return prior, (z[1] @ toy.W.T + 0.5 + toy.sigma * noise).view(n, 1, 4, 4)


def test_the_aggregate_posterior_is_standardised_by_other_images(toy, monkeypatch):
    prior, x = aggregate(toy)
    monkeypatch.setattr(
        "ebm_prior.posterior_cache.PosteriorStream.pictures", lambda self, i, g: self.images[i]
    )
    found = AggregatePosterior.of(prior, x, n=2000)
    mean, covariance = toy.prior_moments()
    sd = covariance.diagonal().sqrt()
    assert ((found.mean - mean) / sd).abs().max() < 5 / math.sqrt(2000)
    assert (found.std / sd - 1).abs().max() < 5 / math.sqrt(2 * 2000)
    assert found.draws.shape == (2000, 5)
    assert found.draws.mean(0).abs().max() > 1e-6  # not centred on itself
    few = AggregatePosterior.of(prior, x, n=200)
    z = torch.cat(toy.transform(prior.noise(200, torch.Generator().manual_seed(7))), 1)
    assert few.test(z).p_value > 0.01 and few.test(z + 0.5 * sd).p_value == 0.001
    again = AggregatePosterior.of(prior, x, n=200)
    assert torch.equal(again.draws, few.draws)


def test_constant_units_and_short_memory(toy, monkeypatch):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    images = torch.zeros(30, *toy.image_shape, dtype=torch.uint8)
    plain = toy.posterior
    monkeypatch.setattr(
        toy, "posterior", lambda x, noise: plain(x, [torch.zeros_like(e) for e in noise])
    )
    constant = AggregatePosterior.of(prior, images)
    assert (constant.std == 1).all() and (constant.draws == 0).all() and len(constant.draws) == 15
    monkeypatch.setattr("ebm_prior.memory.LATENTS_KEPT", 5 * 6)
    assert len(AggregatePosterior.of(prior, images).draws) == 6
    assert rows_in_memory(5, sets=2) == 3 and rows_in_memory(1000) == 2


def test_bad_samples_are_refused(toy):
    with pytest.raises(EbmPriorError, match="two points of each, got 1 and 3"):
        energy_test(normal(1), normal(3))
    with pytest.raises(EbmPriorError, match="finite"):
        energy_test(normal(3), normal(3) / 0)
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    with pytest.raises(EbmPriorError, match="needs 4 images, got 3"):
        AggregatePosterior.of(prior, torch.zeros(3, *toy.image_shape, dtype=torch.uint8))
