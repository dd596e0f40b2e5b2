import json
import math
import shutil

import numpy as np
import pytest
import torch
from torch import nn

import ebm_prior
from backbones.hvae.likelihoods import DiscretizedLogistic
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.bounds import Likelihoods, Weights, bounds, compare, log_weights
from ebm_prior.likelihoods import (
    BernoulliLikelihood,
    BinomialLikelihood,
    DiscretizedLogisticMixture,
    GaussianLikelihood,
)
from ebm_prior.partition import log_partition
from ebm_prior.record import recorded
from ebm_prior.saved import read_config
from ebm_prior.tables import Table
from tests.test_cli import run
from tests.test_hierarchy import zero_heads
from tests.test_prior import Quadratic, gaussian_of_quadratic_heads, quadratic_prior


def log_z_of(toy, kappa, center):
    """ln of the integral of N(z; m, C) exp(-sum kappa/2 (z - c)^2), a Gaussian one."""
    mean, covariance = toy.prior_moments()
    sizes = [group.numel for group in toy.groups]
    kappa, center = (
        torch.cat([torch.full((n,), v) for n, v in zip(sizes, values, strict=True)]).double()
        for values in (kappa, center)
    )
    eye = torch.eye(len(mean)).double()
    gap = mean - center
    quadratic = gap @ torch.linalg.solve(covariance + (1 / kappa).diag(), gap)
    return (-0.5 * (torch.logdet(eye + covariance @ kappa.diag()) + quadratic)).item()


EXACT = dict(kappa=(1.5, 3.0), center=(0.8, -0.5))  # of `quadratic_prior`


def strong_prior(toy):
    """Energies far from flat: exp(-E) is concentrated where N(0, I) hardly goes."""
    prior = quadratic_prior(toy)
    prior.heads = nn.ModuleList([Quadratic(6.0, 2.0), Quadratic(4.0, -1.0)])
    return prior


def images(n=8, size=4):
    generator = torch.Generator().manual_seed(1)
    return torch.randint(90, 166, (n, 1, size, size), generator=generator, dtype=torch.uint8)


# ln Z


@pytest.mark.parametrize("temperatures, chains", [(1, 400), (4, 200), (30, 50)])
def test_log_z_is_the_gaussian_integral_within_calibrated_errors(toy, temperatures, chains):
    prior, exact = quadratic_prior(toy), log_z_of(toy, **EXACT)
    found = [
        log_partition(prior, chains=chains, temperatures=temperatures, seed=s, batch_size=chains)
        for s in range(20)
    ]
    errors = torch.tensor([(p.log_z - exact) / p.standard_error for p in found])
    assert errors.abs().max() < 4
    assert 0.65 < errors.square().mean().sqrt() < 1.4
    mean = sum(p.log_z for p in found) / len(found)  # and no bias hidden in single errors
    spread = sum(p.standard_error for p in found) / len(found)
    assert abs(mean - exact) < 4 * spread / math.sqrt(len(found)) + spread**2


def test_more_temperatures_make_more_chains_count_even_far_from_the_prior(toy):
    prior = strong_prior(toy)
    exact = log_z_of(toy, (6.0, 4.0), (2.0, -1.0))
    found = [log_partition(prior, chains=100, temperatures=t) for t in (1, 10, 200)]
    shares = [p.effective_share for p in found]
    assert shares[0] < shares[1] < shares[2]
    assert "not reliable" in found[0].warning and "--temperatures" in found[0].warning
    assert found[2].warning is None
    weights = Weights(torch.zeros(2, 1).double(), torch.zeros(2, 1).double(), False, "x")
    for p in (found[0], found[2]):  # a card must not hide it
        result = Likelihoods(*bounds(weights, p.log_z), p, 2, 1, 16, "x", False, 0)
        table = Table.from_dict(json.loads(json.dumps(result.table("name" * 60).to_dict())))
        assert ("Caution: ln Z is not reliable" in table.note) == bool(p.warning)
    assert abs(found[2].log_z - exact) < 4 * found[2].standard_error < 0.6
    assert found[0].acceptance is None and 0.4 < found[2].acceptance < 0.8


def test_zero_heads_change_nothing_exactly(toy):
    result = compare(zero_heads(toy), images(), samples=3, chains=5, temperatures=6)
    p = result.partition
    assert (p.log_z, p.standard_error, p.acceptance) == (0, 0, 1)
    assert p.effective_share == pytest.approx(1)
    for bound in (result.elbo, result.iw):
        assert bound.energy == bound.gaussian and bound.gain == (0, 0)


def test_a_chain_depends_on_seed_and_number_alone(toy):
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=6)
    with torch.no_grad():
        prior.heads[-1].layers[-1].weight.mul_(20)

    def measure(**settings):
        return log_partition(prior, **dict(chains=9, temperatures=5, seed=3) | settings)

    one = measure()
    assert measure() == one
    assert measure(batch_size=2).log_z == pytest.approx(one.log_z, abs=1e-9)
    assert measure(seed=4).log_z != pytest.approx(one.log_z, abs=1e-6)
    with torch.inference_mode():
        assert measure() == one


# Bounds


class Inexact(ToyBackbone):
    """A posterior wider than the true one, as every encoder's differs from it."""

    def posterior_moments(self, x):
        mean, covariance = super().posterior_moments(x)
        return mean, 1.6 * covariance


def log_evidence(toy, x, mean, covariance):
    """Log p(x) where z has these moments: x is Gaussian too."""
    top = toy.groups[0].numel
    noise = toy.sigma**2 * torch.eye(len(toy.W)).double()
    marginal = torch.distributions.MultivariateNormal(
        mean[top:] @ toy.W.T + 0.5, toy.W @ covariance[top:, top:] @ toy.W.T + noise
    )
    return marginal.log_prob((x.double() / 255).flatten(1))


def test_bounds_rise_with_the_samples_to_the_exact_log_likelihood(toy):
    inexact = Inexact().double().freeze()
    prior, x = quadratic_prior(inexact), images(40)
    exact_z = log_z_of(toy, **EXACT)
    exact = [
        log_evidence(toy, x, *moments)
        for moments in (toy.prior_moments(), gaussian_of_quadratic_heads(toy))
    ]
    found = []
    for samples in (1, 3, 10, 300):
        elbo, iw = bounds(log_weights(prior, x, samples=samples), exact_z)
        found.append([iw.gaussian.mean, iw.energy.mean])
        if samples == 1:
            assert elbo == iw
    means = torch.tensor([e.mean() for e in exact])
    assert (torch.tensor(found).diff(dim=0) > 0).all()
    assert (elbo.gaussian.mean, elbo.energy.mean) < tuple(means)  # of 300 samples
    assert (means - torch.tensor(found[-1])).abs().max() < 0.05
    gain = exact[1] - exact[0]
    assert iw.gain.mean == pytest.approx(gain.mean().item(), abs=0.05)
    paired = gain.std().item() / math.sqrt(len(gain))
    assert iw.gain.standard_error == pytest.approx(paired, rel=0.1)
    assert iw.gaussian.standard_error == pytest.approx(
        exact[0].std().item() / math.sqrt(len(gain)), rel=0.1
    )


def test_the_exact_posterior_makes_both_bounds_exact(toy):
    x = images(6)
    elbo, iw = bounds(log_weights(quadratic_prior(toy), x, samples=2), 0.0)
    exact = log_evidence(toy, x, *toy.prior_moments()).mean().item()
    assert elbo.gaussian.mean == pytest.approx(exact) and iw.gaussian.mean == pytest.approx(exact)


def test_an_image_depends_on_seed_and_number_alone(toy):
    toy.binarize = True
    prior = quadratic_prior(toy)
    all_ = log_weights(prior, images(7), samples=4)
    few = log_weights(prior, images(7)[:5], samples=2, batch_size=3)
    other = log_weights(prior, images(7), samples=4, seed=1)
    for name in ("gaussian", "energy"):
        whole = getattr(all_, name)
        torch.testing.assert_close(getattr(few, name), whole[:5, :2])
        assert (getattr(other, name) != whole).any(1).all()
        assert whole[:, 0].unique().numel() == 7


def test_binary_images_are_drawn_once_and_not_per_sample(toy):
    toy.binarize, seen = True, []
    inner = toy.posterior
    toy.posterior = lambda x, **options: seen.append(x) or inner(x, **options)
    log_weights(quadratic_prior(toy), images(20), samples=3)
    assert len(seen) == 3 and ((seen[0] == 0) | (seen[0] == 1)).all()
    assert all(torch.equal(x, seen[0]) for x in seen)
    assert 0.3 < seen[0].mean() < 0.7


# Bits per dimension


def total_mass(make, levels):
    """Sum of p over every image of `levels` per channel; one pixel."""
    channels = make(1).mean.shape[1]
    grid = torch.cartesian_prod(*[levels] * channels).reshape(-1, channels, 1, 1)
    px = make(len(grid))
    assert px.is_mass(grid)
    return px.log_prob(grid).exp().sum().item()


def test_likelihoods_called_masses_sum_to_one():
    def parameters(channels):
        own = torch.randn(1, channels, 1, 1, generator=torch.Generator().manual_seed(5)).double()
        return lambda n: own.expand(n, -1, -1, -1)

    def levels(n):
        return torch.arange(n).double() / (n - 1)

    one, two, mixture = parameters(1), parameters(2), parameters(20)
    for make, n in (
        (lambda b: BernoulliLikelihood(one(b)), 2),
        (lambda b: BinomialLikelihood(one(b), 16), 17),
        (lambda b: DiscretizedLogistic(two(b)), 256),
        (lambda b: DiscretizedLogisticMixture(mixture(b), bits=3), 8),
    ):
        assert total_mass(make, levels(n)) == pytest.approx(1, abs=1e-4)


def test_densities_and_grey_bernoullis_are_not_called_masses():
    grey = torch.full((2, 1, 3, 3), 0.5)
    assert not BernoulliLikelihood(grey).is_mass(grey)
    assert not GaussianLikelihood(grey, 0.1).is_mass(grey)


def test_bits_per_dimension_only_for_masses(toy):
    result = compare(quadratic_prior(toy), images(), samples=2, chains=5, temperatures=2)
    assert result.bits_per_dimension is None and result.to_dict()["bits_per_dimension"] is None
    assert "No bits per dimension: Gaussian gives no probabilities" in result.table().text()


# Bad input


def test_bad_settings_are_refused(toy):
    prior = quadratic_prior(toy)
    for message, settings in (
        ("at least 2 chains", dict(chains=1)),
        ("temperatures must be at least 1", dict(temperatures=0)),
        ("samples per image must be at least 1", dict(samples=0)),
        ("two held-out images, got 0", dict(images=images()[:0])),
        ("two held-out images, got 1", dict(images=images()[:1])),
    ):
        with pytest.raises(EbmPriorError, match=message):
            compare(prior, settings.pop("images", images()), **settings)


@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_energies_that_are_not_finite_are_refused(toy, value):
    prior = quadratic_prior(toy)
    prior.heads[1].center = value
    with pytest.raises(EbmPriorError, match="some draws from N.0, I. are not"):
        log_partition(prior, chains=2, temperatures=1)
    with pytest.raises(EbmPriorError, match="energies of 8 of 8 images are not finite"):
        log_weights(prior, images(), samples=2)


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint with heads, images beside them."""
    root = tmp_path_factory.mktemp("likelihood")
    (root / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    backbone = ebm_prior.load_backbone("toy", root / "toy.json")
    torch.manual_seed(0)
    sampler = SamplerConfig("pcnl", 5, 0.3)
    EnergyPrior.for_backbone(backbone, "both", 4, 6, sampler).save_pretrained(root / "heads")
    x = images(40, 8)[:, 0].numpy()
    np.savez(root / "x.npz", x_train=x[:20], x_test=x[20:])
    np.savez(root / "one.npz", x_train=x, x_test=x[:1])
    return root


SMALL = ["--images", 6, "--samples", 3, "--chains", 8, "--temperatures", 4]


@pytest.fixture
def measure(folder, monkeypatch):
    monkeypatch.chdir(folder)
    base = ["likelihood", "--heads", "heads", "--ckpt", "toy.json"]
    return lambda *args, code=0: run(*base, *args, code=code)


def test_command_says_what_python_says(measure, folder):
    found = json.loads(measure("--data", "x.npz", *SMALL, "--seed", 5, "--json"))
    backbone = ebm_prior.load_backbone("toy", "toy.json")
    prior = EnergyPrior.from_pretrained("heads", backbone=backbone)
    x = ebm_prior.data.load_images("x.npz", split="test", limit=6).images
    again = compare(prior, x, samples=3, chains=8, temperatures=4, seed=5)
    assert found == json.loads(json.dumps(again.to_dict()))
    assert found["iw"]["gain"]["mean"] == pytest.approx(again.iw.gain.mean)
    text = measure("--data", "x.npz", *SMALL, "--seed", 5)
    assert str(again.iw.energy) in text and "effective" in text
    assert f"{again.partition.log_z:.3f} ± {again.partition.standard_error:.3f}" in text


def test_command_records_with_the_heads(measure, folder):
    shutil.copytree("heads", "recorded")
    measure("--heads", "recorded", "--data", "x.npz", *SMALL, "--record")
    stored = json.loads((folder / "recorded/config.json").read_text())["training"]["likelihood"]
    assert stored["data"] == "x.npz" and stored["images"] == 6 and stored["samples"] == 3
    assert stored["partition"]["chains"] == 8
    (table,) = recorded(read_config(folder / "recorded"))["likelihood"].tables
    assert "6 held-out images of x.npz" in table.note


def test_command_on_a_discrete_likelihood_gives_bits(monkeypatch):
    heads = "checkpoints/nvae_digits"
    args = ["--heads", f"{heads}/heads", "--ckpt", f"{heads}/checkpoint.pt", "--data", "digits"]
    monkeypatch.chdir(ebm_prior.__path__[0] + "/..")
    found = json.loads(run("likelihood", *args, *SMALL, "--temperatures", 1, "--json"))
    bits, nats = found["bits_per_dimension"]["energy"], found["iw"]["energy"]["mean"]
    assert bits == pytest.approx(-nats / (64 * math.log(2))) and 0 < bits < 17
    assert found["likelihood"] == "binomial" and found["elbo"]["gaussian"]["mean"] > -150


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--samples", "0"], 2, "--samples"),
        (["--chains", "1"], 2, "--chains"),
        (["--images", "1"], 2, "--images"),
        (["--temperatures", "0"], 2, "--temperatures"),
        (["--data", "one.npz"], 1, "at least two held-out images, got 1"),
        ([], 1, "does not name its data set"),
    ],
)
def test_bad_input_gives_one_line(measure, args, code, message):
    assert message in measure(*args, code=code)


def test_weights_by_hand():
    """Two images, two draws: ELBO and bound worked out on paper."""
    gaussian = torch.tensor([[-1.0, -3.0], [-2.0, -2.0]]).double()
    energy = torch.tensor([[0.5, -0.5], [1.0, -1.0]]).double()
    elbo, iw = bounds(Weights(gaussian, energy, True, "x"), 0.25)
    assert elbo.gaussian == (-2, 0) and elbo.energy == (-2.25, 0) and elbo.gain == (-0.25, 0)
    by_image = [
        math.log((math.exp(-1.75) + math.exp(-2.75)) / 2),
        math.log((math.exp(-3.25) + math.exp(-1.25)) / 2),
    ]
    assert iw.energy.mean == pytest.approx(sum(by_image) / 2)
    assert iw.energy.standard_error == pytest.approx(abs(by_image[0] - by_image[1]) / 2)
