"""Decision functions against closed forms and the public code; metrics; the command."""

import importlib
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch.distributions import MultivariateNormal

import ebm_prior
from backbones.toy import ToyBackbone
from benchmarks.parity import rounding
from ebm_prior import Backbone, EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.decision import (
    METHODS,
    combine,
    compute_terms,
    default_k,
    infer_upper,
    parse_k,
    score_images,
)
from ebm_prior.outliers import Outliers, detect_outliers, metrics
from ebm_prior.testing import check_backbone, noise
from tests.sessions import write_hvae
from tests.test_cli import run
from tests.test_hierarchy import zero_heads
from tests.test_prior import gaussian_of_quadratic_heads, quadratic_prior

FIXTURES = Path(__file__).parent / "fixtures"
FOLDERS = sorted(FIXTURES.glob("*/*/"))
CHAIN = SamplerConfig("pcnl", 40, 0.4)
N = 3000


def load(folder):
    family = folder.parent.name
    return importlib.import_module(f"backbones.{family}").load(next(folder.glob("c*k*")))


# --- log p(z) of any latents -----------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_log_prior_is_the_posteriors_log_p(folder):
    """Of the adapter, and of the default that a third party's gets."""
    backbone = load(folder)
    x = torch.rand(2, *backbone.image_shape)
    post = backbone.posterior(x, generator=torch.Generator().manual_seed(0))
    for values in (backbone.log_prior(post.z), Backbone.log_prior(backbone, post.z)):
        assert values.shape == (2, len(backbone.groups)) and not values.requires_grad
        torch.testing.assert_close(values, post.log_p, rtol=1e-4, atol=1e-3)


def test_log_prior_of_any_latents_is_that_of_the_joint_gaussian(toy):
    z = [torch.randn(5, 2).double() * 3, torch.randn(5, 3).double() * 3]
    expected = MultivariateNormal(*toy.prior_moments()).log_prob(torch.cat(z, 1))
    for method in (ToyBackbone.log_prior, Backbone.log_prior):
        torch.testing.assert_close(method(toy, z).sum(1), expected)
        with torch.inference_mode():
            torch.testing.assert_close(method(toy, z).sum(1), expected)


def test_the_contract_catches_a_wrong_log_prior(toy):
    right, posterior = toy.log_prior, toy.posterior

    def with_right_log_p(x, noise=None, generator=None):
        post = posterior(x, noise, generator)
        return post._replace(log_p=right(post.z))

    toy.log_prior, toy.posterior = (lambda z: right(z) + 0.5), with_right_log_p
    with pytest.raises(AssertionError, match="has_gaussian_prior: log_prior"):
        check_backbone(toy)


# --- agreement with the public code ----------------------------------------------------


@pytest.mark.parametrize("name", ["fmnist_vae", "fmnist_biva"])
@pytest.mark.parametrize("stages", [1, 2])
def test_bounds_and_ratios_are_those_of_the_public_code(name, stages):
    folder = FIXTURES / "hvae" / name
    backbone, given = load(folder), load_file(folder / "expected.safetensors")
    exact = rounding(json.loads((folder / "meta.json").read_text()))
    count = len(backbone.groups)
    draws = [given[f"eps_q.{i}"] for i in reversed(range(count))]
    prior = zero_heads(backbone)
    k = sum(int(group.name[1]) <= stages for group in backbone.groups)
    assert k == (stages if name == "fmnist_vae" else 2 * stages)
    terms = {
        n: compute_terms(prior, given["x"], infer_upper(backbone, given["x"], draws, n))
        for n in (0, k)
    }
    found = {
        f"elbo_k{stages}": terms[k].elbo,
        f"log_px_k{stages}": terms[k].log_px,
        f"llr_k{stages}": terms[0].elbo - terms[k].elbo,
        "elbo": terms[0].elbo,
    }
    for key, value in found.items():
        allowed = max(1e-5 * given[key].abs().max().item(), 5 * (exact.get(key) or 0))
        if key.startswith("llr"):  # a difference of two that are each so exact
            allowed = max(allowed, 2e-5 * given["elbo"].abs().max().item())
        assert (value - given[key]).abs().max() <= allowed, key
    assert (found[f"llr_k{stages}"].abs() > 1e-3).all()


# --- closed forms ----------------------------------------------------------------------


def expected_log_normal(mean, cov, mu, sigma):
    """E of log N(v; mu, sigma) under v ~ N(mean, cov)."""
    precision, d = sigma.inverse(), mean - mu
    trace = (precision @ cov).trace() + d @ precision @ d
    return -0.5 * (trace + sigma.logdet() + len(mu) * math.log(2 * math.pi))


class Linear:
    """Closed forms of the linear-Gaussian toy for one image, repeated N times."""

    def __init__(self, sigma=0.1):
        self.toy = ToyBackbone(sigma=sigma).double().freeze()
        g = torch.Generator().manual_seed(5)
        z = self.toy.transform([torch.randn(1, *s.shape, generator=g).double()
                                for s in self.toy.groups])  # fmt: skip
        self.image = (self.toy.decode(z).mean * 255).round().to(torch.uint8)
        x = self.image.double() / 255
        self.x = x.flatten()
        mean, self.cov = self.toy.posterior_moments(x)
        self.mean = mean[0]
        m, c = self.toy.prior_moments()
        cov = self.toy.W @ c[2:, 2:] @ self.toy.W.T + sigma**2 * torch.eye(16).double()
        self.evidence = MultivariateNormal(self.toy.W @ m[2:] + 0.5, cov).log_prob(self.x)

    def log_px(self, mean, cov):
        """E of log p(x|z_1) under z_1 ~ N(mean, cov)."""
        w, noise = self.toy.W, self.toy.sigma**2 * torch.eye(16).double()
        return expected_log_normal(w @ mean + 0.5, w @ cov @ w.T, self.x, noise)

    def lower(self, gain, offset, cov):
        """Moments of (z_2, z_1) with z_2 ~ q and z_1 | z_2 ~ N(gain z_2 + offset, cov)."""
        m, c = self.mean[:2], self.cov[:2, :2]
        cross = gain @ c
        top, bottom = torch.cat([c, cross.T], 1), torch.cat([cross, gain @ cross.T + cov], 1)
        return torch.cat([m, gain @ m + offset]), torch.cat([top, bottom])

    def kl(self):
        """KL(q(z_2|x) || p(z_2))."""
        m, c = self.mean[:2], self.cov[:2, :2]
        return 0.5 * (c.trace() + m @ m - 2 - c.logdet())

    def scores(self, prior, config=CHAIN):
        return score_images(
            prior, self.image.expand(N, -1, -1, -1), range(N), [0, 1],
            config=config, batch_size=N,
        )  # fmt: skip


def assert_mean(values, expected):
    error = (values.mean() - expected).abs()
    assert error < 5 * values.std() / math.sqrt(len(values)), (values.mean(), expected)


def test_backbone_bounds_in_closed_form():
    case = Linear()
    toy = case.toy
    found = case.scores(zero_heads(toy), SamplerConfig("pcnl", 1, 0.3))
    # the toy's q is its exact posterior: every single draw of L>0 is log p(x)
    for method in ("mode", "sample", "energy_elbo"):
        torch.testing.assert_close(found[method][0], case.evidence.expand(N))
    s2 = toy.s.square().diag()
    for method, lower in (("mode", 0 * s2), ("sample", s2), ("energy_elbo", s2)):
        mean, cov = case.lower(toy.A, toy.a, lower)
        expected = case.log_px(mean[2:], cov[2:, 2:]) - case.kl()
        assert_mean(found[method][1], expected)
    # Eq. 20 without energies: log p(x) less the entropy of q, then E[log p(x|z) + log p(z)]
    assert_mean(found["log_posterior"][0], case.evidence + MultivariateNormal(
        case.mean, case.cov).entropy().neg())  # fmt: skip
    mean, cov = case.lower(toy.A, toy.a, s2)
    expected = case.log_px(mean[2:], cov[2:, 2:])
    expected += expected_log_normal(mean, cov, *toy.prior_moments())
    assert_mean(found["log_posterior"][1], expected)


def test_energy_prior_in_closed_form():
    """Quadratic heads tilt the toy's prior to a Gaussian, which the chains must follow."""
    case = Linear()
    prior = quadratic_prior(case.toy)
    found = case.scores(prior)
    m, c = gaussian_of_quadratic_heads(case.toy)
    gain = c[2:, :2] @ c[:2, :2].inverse()
    below = case.lower(gain, m[2:] - gain @ m[:2], c[2:, 2:] - gain @ c[:2, 2:])
    kappa = torch.tensor([1.5, 1.5, 3, 3, 3]).double()
    center = torch.tensor([0.8, 0.8, -0.5, -0.5, -0.5]).double()
    for k, (mean, cov) in enumerate([(case.mean, case.cov), below]):
        energy = 0.5 * (kappa * ((mean - center).square() + cov.diagonal())).sum()
        log_px = case.log_px(mean[2:], cov[2:, 2:])
        log_prior = expected_log_normal(mean, cov, *case.toy.prior_moments())
        assert_mean(found["log_posterior"][k], log_px + log_prior - energy)
        bound = log_px - case.kl() if k else case.evidence
        assert_mean(found["energy_elbo"][k], bound - energy)
    # the heads do not touch the backbone's scores
    plain = case.scores(zero_heads(case.toy), CHAIN)
    for method in ("mode", "sample"):
        torch.testing.assert_close(found[method], plain[method])


def test_importance_samples_of_the_prior_converge_to_the_evidence():
    """With z_1 sampled, exp(L>1) is an unbiased estimate of p(x): log-mean-exp gives log p(x)."""
    case = Linear(sigma=0.5)
    draws = case.scores(zero_heads(case.toy), SamplerConfig("pcnl", 1, 0.3))["sample"][1]
    assert draws.mean() < case.evidence - 0.1  # one alone is a bound
    weights = (draws - case.evidence).exp()
    assert weights.std() < 5  # else the next line would show nothing
    error = combine(draws[:, None], "sample")[0] - case.evidence
    assert error.abs() < 5 * weights.std() / math.sqrt(N)


def test_several_samples_are_combined_as_stated():
    draws = torch.tensor([[0.0, -1e4], [math.log(3.0), -1e4]]).double()
    for method in ("mode", "sample", "energy_elbo"):
        torch.testing.assert_close(
            combine(draws, method), torch.tensor([math.log(2.0), -1e4]).double()
        )
    torch.testing.assert_close(
        combine(draws, "log_posterior"), torch.tensor([math.log(3.0) / 2, -1e4]).double()
    )


# --- what a score depends on -----------------------------------------------------------


@pytest.fixture(scope="module")
def staged(tmp_path_factory):
    """Five groups on binarised images, and heads that tilt."""
    folder = write_hvae(tmp_path_factory.mktemp("staged"), name="BIVA")
    backbone = ebm_prior.load_backbone("hvae", folder)
    torch.manual_seed(0)
    prior = EnergyPrior.for_backbone(backbone, "both", 4, 6, SamplerConfig("pcnl", 3, 0.3))
    with torch.no_grad():
        for parameter in prior.heads.parameters():
            parameter.mul_(3)
    return prior, (255 * torch.rand(7, *backbone.image_shape)).to(torch.uint8)


def assert_same(a, b, ks):
    for method in METHODS:
        for k in ks:
            torch.testing.assert_close(a[method][k], b[method][k], rtol=1e-5, atol=1e-3)


def test_scores_depend_on_image_and_seed_alone(staged):
    prior, images = staged
    whole = score_images(prior, images, range(7), range(5), samples=2)
    assert_same(score_images(prior, images, range(7), range(5), samples=2, batch_size=3), whole,
                range(5))  # fmt: skip
    assert_same(score_images(prior, images, range(7), [0, 3], samples=2), whole, [0, 3])
    part = score_images(prior, images[2:4], [2, 3], [1], samples=2)
    assert_same(part, {m: {1: v[1][2:4]} for m, v in whole.items()}, [1])
    other = score_images(prior, images, range(7, 14), range(5), samples=2)
    assert all((other[m][k] != whole[m][k]).all() for m in METHODS for k in range(5))


def test_images_are_binarised_once_per_image(staged, monkeypatch):
    prior, images = staged
    seen = []
    posterior = prior.backbone.posterior
    monkeypatch.setattr(
        prior.backbone, "posterior", lambda x, **kw: seen.append(x) or posterior(x, **kw)
    )
    score_images(prior, images, range(7), [0, 2], samples=2)
    assert len(seen) == 4 and all(torch.equal(x, seen[0]) for x in seen)
    assert set(seen[0].unique().tolist()) == {0.0, 1.0}


def test_upper_groups_are_held_and_skipped_ones_hand_on_their_mean(staged):
    prior, images = staged
    backbone, x = prior.backbone, images.float() / 255
    eps = prior.noise(7, torch.Generator().manual_seed(0))
    for k in range(1, 5):
        upper, top = infer_upper(backbone, x, eps, k), 5 - k
        zeros = [e if i < top else 0 * e for i, e in enumerate(eps)]
        expected = backbone.posterior(x, noise=zeros).z
        other = infer_upper(backbone, x, [*eps[:top], *(e + 1 for e in eps[top:])], k)
        for z in (upper.complete(backbone), upper.complete(backbone, eps), other.z):
            assert all(torch.equal(a, b) for a, b in zip(z[:top], expected, strict=False))
        lower = backbone.inverse(upper.complete(backbone, eps))[top:]
        for a, b in zip(lower, eps[top:], strict=True):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


class Large(ToyBackbone):
    """log p(x|z) that ends in 2^24 nats, where float32 knows no quarters any more."""

    def decode(self, z):
        px = super().decode(z)
        px.log_prob = lambda x: torch.full((len(x),), 2.0**24)
        return px


def test_small_terms_are_not_lost_beside_large_ones():
    backbone = Large().freeze()
    prior = EnergyPrior.for_backbone(backbone, nef=4, ndf=6)
    assert backbone.dtype == torch.float32
    x = torch.rand(3, *backbone.image_shape)
    terms = compute_terms(prior, x, infer_upper(backbone, x, noise(backbone), 0))
    torch.testing.assert_close(terms.elbo + terms.log_ratio, terms.log_px, rtol=0, atol=1e-8)
    posterior = terms.log_posterior - terms.log_px
    torch.testing.assert_close(posterior, terms.log_prior - terms.energy, rtol=0, atol=1e-8)
    assert (terms.log_ratio.abs() > 1e-3).all()


# --- metrics ---------------------------------------------------------------------------


def test_metrics_by_hand():
    inside = torch.tensor([0.0, 1, 2, 3, 4])
    outside = torch.tensor([9.0, 8, 3.5, 2.5, -1])
    auroc, auprc, fpr80 = metrics(inside, outside)
    assert auroc == pytest.approx((5 + 5 + 4 + 3 + 0) / 25)
    assert auprc == pytest.approx((1 + 1 + 3 / 4 + 4 / 6 + 5 / 10) / 5)
    assert fpr80 == pytest.approx(2 / 5)  # at 2.5, four of five outliers are found
    assert metrics(outside, inside)[0] == pytest.approx(1 - auroc)
    assert metrics(torch.zeros(4), torch.ones(3)) == (1.0, 1.0, 0.0)
    assert metrics(torch.zeros(9), torch.zeros(3)) == (0.5, 0.25, 1.0)


def made(l0, l1, out0, out1):
    inside, outside = ({m: dict(enumerate(map(torch.tensor, pair))) for m in METHODS}
                       for pair in ((l0, l1), (out0, out1)))  # fmt: skip
    return Outliers(inside, outside, ("cats", "dogs"), 1, CHAIN, 0)


def test_low_likelihoods_and_high_ratios_are_outliers():
    result = made([-10.0, -11], [-12.0, -14], [-9.0, -10.5], [-40.0, -50])
    found = {d.label: d for d in result.detections() if d.method == "mode"}
    assert found["L>0"].auroc == 0.25 and found["L>1"].auroc == 1 and found["LLR>1"].auroc == 1
    assert found["L>0"].fpr80 == 1 and found["LLR>1"].fpr80 == 0
    lines = result.table().text().splitlines()
    assert [line.split()[0] for line in lines[2:5]] == ["L>0", "L>1", "LLR>1"]
    assert "2 images of dogs among 2 of cats" in lines[0] and "0.500" in lines[5]


def test_scores_that_are_not_finite_are_named(staged):
    prior, images = staged
    result = detect_outliers(prior, images[:4], images[4:], [1], names=("cats", "dogs"))
    assert not result.problems() and all(d.auroc is not None for d in result.detections())
    result.outside["energy_elbo"][1][2] = math.nan
    result.inside["mode"][0][3] = -math.inf
    first, second = result.problems()
    assert "L>0 by Gaussian: mode is not finite for 1 of 4 images of cats" in first
    assert "L>1 by energy: ELBO" in second and "image 2" in second
    spoilt = {(d.label, d.method) for d in result.detections() if d.auroc is None}
    assert spoilt == {("L>0", "mode"), ("LLR>1", "mode"), ("L>1", "energy_elbo"),
                      ("LLR>1", "energy_elbo")}  # fmt: skip
    assert "- / - / -" in result.table().text()
    text = json.dumps(result.to_dict() | result.scores_dict(), allow_nan=False)
    assert "null" in text
    result.inside["log_posterior"][1][:] = result.outside["log_posterior"][1][:] = math.nan
    assert result.plot().startswith(b"\x89PNG")


def test_sets_that_cannot_be_scored_are_refused(staged):
    prior, images = staged
    with pytest.raises(EbmPriorError, match="dogs holds no images"):
        detect_outliers(prior, images, images[:0], names=("cats", "dogs"))
    with pytest.raises(EbmPriorError, match="images must be"):
        detect_outliers(prior, images, images.expand(7, 3, *images.shape[2:]))
    for k in (5, -1):
        with pytest.raises(EbmPriorError, match=f"cannot skip {k} groups"):
            detect_outliers(prior, images, images, [k])


def test_values_of_k():
    assert default_k(2) == [0, 1] and default_k(6) == list(range(6))
    assert default_k(30) == [0, 5, 10, 15, 20, 25] and default_k(7) == [0, 1, 2, 3, 4, 5]
    assert parse_k("3, 1", 5) == [0, 1, 3] and parse_k("0", 5) == [0]
    for text in ("5", "-1", "", "1,x", "1.5"):
        with pytest.raises(EbmPriorError, match="from the bottom, 0 to 4"):
            parse_k(text, 5)


# --- the command -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint with heads, its own images and noise beside them."""
    root = tmp_path_factory.mktemp("ood")
    (root / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    backbone = ebm_prior.load_backbone("toy", root / "toy.json")
    torch.manual_seed(0)
    prior = EnergyPrior.for_backbone(backbone, "both", 4, 6, SamplerConfig("pcnl", 2, 0.3))
    prior.save_pretrained(root / "heads", training={"data": {"source": str(root / "own.npz")}})
    eps = noise(backbone)
    own = (backbone.decode(backbone.transform(eps)).mean * 255).to(torch.uint8).numpy()
    np.savez(root / "own.npz", x_train=own, x_test=own.repeat(4, 0))
    np.savez(root / "noise.npz", x_test=(255 * torch.rand(9, 8, 8)).to(torch.uint8).numpy())
    np.savez(root / "large.npz", x_test=(255 * torch.rand(5, 12, 12, 3)).to(torch.uint8).numpy())
    return root


@pytest.fixture
def ood(folder, monkeypatch):
    monkeypatch.chdir(folder)
    base = ["ood", "--heads", "heads", "--ckpt", "toy.json"]
    return lambda *args, code=0: run(*base, *args, code=code)


def test_command_finds_noise_and_keeps_the_result(ood, folder, tmp_path):
    text = ood("--out", "noise.npz", "--plot", tmp_path / "h.png", "--record")
    assert "LLR>1" in text and "9 images of noise among 12 of own" in text
    assert Image.open(tmp_path / "h.png").size[0] > 500
    stored = json.loads((folder / "heads" / "config.json").read_text())["training"]["ood: noise"]
    assert stored["detections"][0] | {"auprc": 0} == {
        "k": 0, "ratio": False, "method": "mode", "auroc": 1.0, "auprc": 0, "fpr80": 0.0
    }  # fmt: skip
    picture = folder / "heads" / "results" / "ood-noise.png"
    assert picture.read_bytes() == (tmp_path / "h.png").read_bytes()
    found = json.loads(ood("--out", "noise.npz", "--json"))
    assert len(stored.pop("tables")) == 1 and stored.pop("pictures").keys() == {"ood-noise.png"}
    assert {key: found[key] for key in stored} == stored
    strange, own = (found["scores"][key]["log_posterior"]["1"] for key in ("out", "in"))
    assert len(strange) == 9 and len(own) == 12 and np.mean(strange) < np.mean(own)


def test_command_takes_any_sets(ood):
    found = json.loads(
        ood("--in", "noise.npz", "--out", "large.npz", "--resize", "-n", 3, "--k", 0,
            "--samples", 2, "--json")
    )  # fmt: skip
    assert found["in"] == {"name": "noise", "images": 3}
    assert found["out"] == {"name": "large", "images": 3}
    assert {d["k"] for d in found["detections"]} == {0} and found["samples"] == 2


@pytest.mark.parametrize(
    "args, code, message",
    [
        ([], 2, "--out"),
        (["--out", "noise.npz", "--k", "2"], 1, "cannot skip 2 groups"),
        (["--out", "large.npz"], 1, "pass --resize"),
        (["--out", "missing.npz"], 1, "no such file"),
        (["--out", "noise.npz", "--samples", "0"], 2, "--samples"),
        (["--out", "noise.npz", "--plot", "h.gif"], 1, "go to a .png"),
        (["--out", "noise.npz", "--transition", "langevin"], 2, "give --step-size too"),
    ],
)
def test_bad_input_gives_one_line(ood, args, code, message):
    assert message in ood(*args, code=code)
