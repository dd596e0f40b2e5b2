"""The fitted Gaussian: its moments, on a backbone whose posterior is known."""

import math

import pytest
import torch

from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.gaussian_fit import GaussianFit
from ebm_prior.langevin import flatten
from ebm_prior.posterior_cache import PosteriorStream


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def world(toy):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    return prior, torch.randint(0, 256, (300, *toy.image_shape), dtype=torch.uint8)


def test_samples_have_exactly_the_moments_of_the_posterior_draws(world):
    prior, images = world
    fitted = GaussianFit.of(prior, images, 50, seed=3)
    rows = torch.cat(
        [
            flatten(prior.backbone.inverse(z))[0]
            for z in PosteriorStream(prior, images).picked(50, 3)
        ]
    )
    assert fitted.n == len(rows) == 50
    mean, covariance = rows.mean(0), rows.T.cov()
    # the law, not an estimate of it: the linear map from g, by its action on unit vectors
    root = fitted.deviations / 49**0.5
    torch.testing.assert_close(root.T @ root, covariance)
    torch.testing.assert_close(fitted.mean, mean)
    n = 40_000
    drawn = flatten(fitted.sample_eps(n, seeded()))[0]
    sd = covariance.diagonal().sqrt()
    assert ((drawn.mean(0) - mean) / sd).abs().max() < 5 / math.sqrt(n)
    assert ((drawn.T.cov() - covariance) / (sd[:, None] * sd)).abs().max() < 5 * math.sqrt(2 / n)


def test_it_finds_the_closed_form_of_the_aggregate_posterior(toy, monkeypatch):
    """x ~ N(m, V): z is Gaussian, with mean and covariance of `posterior_moments` over x."""
    monkeypatch.setattr(
        "ebm_prior.posterior_cache.PosteriorStream.pictures", lambda self, i, g: self.images[i]
    )
    prior, n = EnergyPrior.for_backbone(toy, nef=4, ndf=6), 20_000
    x = 1.5 + 0.4 * torch.randn(n, *toy.image_shape, generator=seeded(), dtype=torch.float64)
    fitted = GaussianFit.of(prior, x, n)
    # E[z|x] is affine in x: its matrix from images that differ by one pixel
    pixels = torch.cat([torch.zeros(1, 16), torch.eye(16)]).double().view(17, *toy.image_shape)
    means, inner = toy.posterior_moments(pixels)
    lift = (means[1:] - means[0]).T
    mean, covariance = means[0] + lift.sum(1) * 1.5, inner + 0.4**2 * lift @ lift.T
    # eps = T^-1(z), another affine map
    origin = flatten(toy.inverse([torch.zeros(1, *g.shape).double() for g in toy.groups]))[0][0]
    units = torch.eye(5).double().split([2, 3], 1)
    back = (flatten(toy.inverse(units))[0] - origin).T
    mean, covariance = origin + back @ mean, back @ covariance @ back.T
    sd = covariance.diagonal().sqrt()
    assert (sd - 1).abs().max() > 0.5 and mean.abs().max() > 0.5  # far from N(0, I)
    assert ((fitted.mean - mean) / sd).abs().max() < 5 / math.sqrt(n)
    found = fitted.deviations.T.cov()
    assert ((found - covariance) / (sd[:, None] * sd)).abs().max() < 5 * math.sqrt(2 / n)


def test_more_units_than_draws_stay_in_the_span_of_the_draws():
    toy = ToyBackbone(top=40, bottom=60).double().freeze()
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    fitted = GaussianFit.of(prior, torch.randint(0, 256, (9, 1, 4, 4), dtype=torch.uint8), 9)
    drawn = flatten(fitted.sample_eps(30, seeded()))[0] - fitted.mean
    assert torch.linalg.matrix_rank(drawn) == 8
    assert torch.linalg.matrix_rank(torch.cat([drawn, fitted.deviations])) == 8


def test_draws_are_reproducible_and_have_their_own_seeds(world, monkeypatch):
    prior, images = world
    first, again, other = (GaussianFit.of(prior, images, 20, seed=s) for s in (0, 0, 1))
    assert torch.equal(first.deviations, again.deviations)
    assert not torch.equal(first.deviations, other.deviations)
    whole = flatten(first.sample_eps(4, [seeded(i) for i in range(4)]))[0]
    part = flatten(first.sample_eps(2, [seeded(3), seeded(1)]))[0]
    torch.testing.assert_close(part, whole[[3, 1]])
    assert [e.shape[1:] for e in first.sample_eps(1)] == [(2,), (3,)]
    monkeypatch.setattr("ebm_prior.memory.LATENTS_KEPT", 5 * 7)
    assert GaussianFit.of(prior, images, 20).n == 7
    assert GaussianFit.of(prior, images[:5], 20).n == 5


def test_what_cannot_be_fitted_is_refused(world, monkeypatch):
    prior, images = world
    with pytest.raises(EbmPriorError, match="at least two images, got 1"):
        GaussianFit.of(prior, images[:1], 20)
    plain = prior.backbone.inverse
    monkeypatch.setattr(prior.backbone, "inverse", lambda z: [e / 0 for e in plain(z)])
    with pytest.raises(EbmPriorError, match="not finite"):
        GaussianFit.of(prior, images, 20)
