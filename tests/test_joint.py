"""The estimators of joint training against closed forms.

Generator, heads and inference network are linear-Gaussian and quadratic, so posterior, tilted
prior and log Z are Gaussian and known. All integrands are quadratic in z, and expectations
are taken with 2 d points that match mean and covariance: exact up to the third degree.
"""

import math

import pytest
import torch
from torch import nn
from torch.distributions import Normal

from backbones.toy import ToyBackbone
from ebm_prior import EnergyPrior, Posterior
from ebm_prior.joint import joint_loss, posterior_chains, posterior_log_density
from ebm_prior.langevin import langevin

TOP, BOTTOM, SIZE = 2, 3, 2
D = TOP + BOTTOM
LN_2PI = math.log(2 * math.pi)


class Linear(ToyBackbone):
    """The toy with trainable weights and a linear q(z_1|x) q(z_2|z_1)."""

    def __init__(self):
        super().__init__(TOP, BOTTOM, SIZE, sigma=0.4)
        for name in ("A", "a", "s", "W"):
            value = getattr(self, name)
            delattr(self, name)
            setattr(self, name, nn.Parameter(value))
        pixels = SIZE * SIZE
        self.q1 = nn.Linear(pixels, BOTTOM)
        self.q2 = nn.Linear(BOTTOM, TOP)
        self.q1_sigma = nn.Parameter(torch.tensor([0.5, 0.7, 0.4]))
        self.q2_sigma = nn.Parameter(torch.tensor([0.8, 0.3]))

    def posterior(self, x, noise=None, generator=None):
        q1 = Normal(self.q1(x.flatten(1)), self.q1_sigma)
        z1 = q1.loc + q1.scale * noise[1]
        q2 = Normal(self.q2(z1), self.q2_sigma)
        z2 = q2.loc + q2.scale * noise[0]
        log_q = torch.stack([q2.log_prob(z2).sum(1), q1.log_prob(z1).sum(1)], 1)
        return Posterior((z2, z1), log_q, self.log_prior((z2, z1)))

    def q_moments(self, x):
        """Mean (B, D) and covariance (D, D) of (z_2, z_1) under q."""
        v = self.q2.weight
        mean1, cov1 = self.q1(x.flatten(1)), self.q1_sigma.square().diag()
        cross = v @ cov1
        cov2 = cross @ v.T + self.q2_sigma.square().diag()
        cov = torch.cat([torch.cat([cov2, cross], 1), torch.cat([cross.T, cov1], 1)])
        return torch.cat([self.q2(mean1), mean1], 1), cov


class Quadratic(nn.Module):
    """E(z) = z'M'Mz / 2 + b'z."""

    def __init__(self, units):
        super().__init__()
        self.m, self.b = nn.Parameter(torch.randn(units, units)), nn.Parameter(torch.randn(units))

    def forward(self, z):
        return 0.5 * (z @ self.m.T).square().sum(1) + z @ self.b


@pytest.fixture
def prior():
    torch.manual_seed(3)
    prior = EnergyPrior.for_backbone(Linear(), "factorized")
    prior.heads = nn.ModuleList([Quadratic(TOP), Quadratic(BOTTOM)])
    return prior.double().requires_grad_(True)


@pytest.fixture
def x():
    return torch.rand(4, 1, SIZE, SIZE, dtype=torch.float64)


def quadratic_of_prior(prior):
    """P, h, c with log p(z) - E(z) = -z'Pz/2 + h'z + c."""
    mean, cov = prior.backbone.prior_moments()
    precision = cov.inverse()
    p = precision + torch.block_diag(*(h.m.T @ h.m for h in prior.heads))
    h = precision @ mean - torch.cat([h.b for h in prior.heads])
    c = -0.5 * (mean @ precision @ mean + cov.logdet() + D * LN_2PI)
    return p, h, c


def quadratic_of_image(backbone, x):
    """P, h (B, D), c (B,) with log p(x|z) = -z'Pz/2 + h'z + c."""
    lift = torch.cat([torch.zeros(SIZE * SIZE, TOP, dtype=x.dtype), backbone.W], 1)
    residual, variance = x.flatten(1) - 0.5, backbone.sigma**2
    c = -0.5 * (residual.square().sum(1) / variance + SIZE * SIZE * (math.log(variance) + LN_2PI))
    return lift.T @ lift / variance, residual @ lift / variance, c


def log_integral(p, h, c):
    """Log of the integral of exp(-z'Pz/2 + h'z + c)."""
    solved = torch.linalg.solve(p, h.mT).mT if h.ndim > 1 else torch.linalg.solve(p, h)
    return 0.5 * ((h * solved).sum(-1) - p.logdet() + D * LN_2PI) + c


def log_evidence(prior, x):
    """Exact log p_theta(x), (B,)."""
    p, h, c = quadratic_of_prior(prior)
    p_x, h_x, c_x = quadratic_of_image(prior.backbone, x)
    return log_integral(p + p_x, h + h_x, c + c_x) - log_integral(p, h, c)


def joint_kl(prior, x):
    """Exact KL(q(x, z) || p_theta(x, z)) without the constant -H(p_data)."""
    p, h, c = quadratic_of_prior(prior)
    p_x, h_x, c_x = quadratic_of_image(prior.backbone, x)
    mean, cov = prior.backbone.q_moments(x)
    both = p + p_x
    second = ((mean @ both) * mean).sum(1) + (both * cov).sum()
    log_joint = -0.5 * second + (mean * (h + h_x)).sum(1) + c + c_x - log_integral(p, h, c)
    entropy = 0.5 * (cov.logdet() + D * (1 + LN_2PI))
    return (-entropy - log_joint).mean()


def points(mean, cov):
    """(2 D, B, D): equally weighted, with this mean and covariance."""
    root = math.sqrt(D) * torch.linalg.cholesky(cov).T
    return torch.cat([mean + root[:, None], mean - root[:, None]])


def split(flat):
    return flat[..., :TOP].reshape(-1, TOP), flat[..., TOP:].reshape(-1, BOTTOM)


@torch.no_grad()
def tilted_points(prior):
    p, h, _ = quadratic_of_prior(prior)
    return split(points((p.inverse() @ h)[None], p.inverse()))


def gradients(prior, value):
    parameters = dict(prior.named_parameters())
    found = torch.autograd.grad(value, list(parameters.values()), allow_unused=True)
    return {
        name: torch.zeros_like(p) if g is None else g
        for (name, p), g in zip(parameters.items(), found, strict=True)
    }


def finite_differences(prior, function, delta=1e-5):
    found = {}
    for name, parameter in prior.named_parameters():
        flat, grad = parameter.detach().view(-1), torch.zeros(parameter.numel()).double()
        for i in range(len(flat)):
            old = flat[i].item()
            values = []
            for value in (old + delta, old - delta):
                flat[i] = value
                with torch.no_grad():
                    values.append(function().item())
            flat[i] = old
            grad[i] = (values[0] - values[1]) / (2 * delta)
        found[name] = grad.view(parameter.shape)
    return found


def same(found, expected):
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-6, atol=1e-6, msg=name)


def is_omega(name):
    return ".q1" in name or ".q2" in name


def test_maximum_likelihood_is_the_gradient_of_the_exact_log_likelihood(prior, x):
    """Eq. 9 (W), 10 (the heads), 11 (A, a, s); the inference network takes no part."""
    with torch.no_grad():
        p, h, _ = quadratic_of_prior(prior)
        p_x, h_x, _ = quadratic_of_image(prior.backbone, x)
        cov = (p + p_x).inverse()
        positive = points((h + h_x) @ cov, cov)
    repeated = x.repeat(len(positive), 1, 1, 1)
    terms = joint_loss(prior, repeated, split(positive), tilted_points(prior))
    found = gradients(prior, -terms.loss)
    expected = gradients(prior, log_evidence(prior, x).mean())
    same(found, expected)
    assert all((g.abs().max() > 1e-3) != is_omega(name) for name, g in expected.items())
    same(expected, finite_differences(prior, lambda: log_evidence(prior, x).mean()))


def variational_terms(prior, x):
    flat = points(torch.zeros(1, D).double(), torch.eye(D).double())
    noise = split(flat.expand(-1, len(x), -1))
    repeated = x.repeat(len(flat), 1, 1, 1)
    post = prior.backbone.posterior(repeated, noise=noise)
    return joint_loss(prior, repeated, post.z, tilted_points(prior), post.log_q)


def test_variational_is_the_gradient_of_the_exact_joint_kl(prior, x):
    """Eq. 16 (W), 17 (the heads), 18 (A, a, s), 19 (q)."""
    found = gradients(prior, variational_terms(prior, x).loss)
    expected = finite_differences(prior, lambda: joint_kl(prior, x))
    same(found, expected)
    assert all(g.abs().max() > 1e-3 for g in expected.values())


def test_the_joint_kl_is_minus_log_p_and_the_posterior_kl(prior, x):
    """E_q log q - log p(x, z) = -log p(x) + KL(q(z|x) || p(z|x)), both sides closed forms."""
    gap = joint_kl(prior, x) + log_evidence(prior, x).mean()
    with torch.no_grad():
        p, h, _ = quadratic_of_prior(prior)
        p_x, h_x, _ = quadratic_of_image(prior.backbone, x)
        precision, mean = p + p_x, (h + h_x) @ (p + p_x).inverse()
        m, cov = prior.backbone.q_moments(x)
        trace = (precision * cov).sum() - D - cov.logdet() - precision.logdet()
        moved = (((m - mean) @ precision) * (m - mean)).sum(1).mean()
    torch.testing.assert_close(gap.detach(), 0.5 * (trace + moved))


def test_without_heads_it_is_the_plain_elbo(prior, x):
    """The Gaussian prior: E = 0, no negative samples."""
    for p in prior.heads.parameters():
        p.data.zero_()
    noise = prior.noise(4)
    post = prior.backbone.posterior(x, noise=noise)
    terms = joint_loss(prior, x, post.z, None, post.log_q)
    elbo = prior.backbone.decode(post.z).log_prob(x) - (post.log_q - post.log_p).sum(1)
    torch.testing.assert_close(terms.loss, -elbo.mean())
    assert terms.e_pos is None and terms.e_neg is None


def test_posterior_chains_have_the_exact_score(prior, x):
    """In eps-space the score is linear: zero at T^-1 of the posterior mean, with the Hessian
    -(J'PJ) of z = T(eps) = J eps + const."""
    backbone = prior.backbone
    with torch.no_grad():
        p, h, _ = quadratic_of_prior(prior)
        p_x, h_x, _ = quadratic_of_image(backbone, x)
        mean = (h + h_x) @ (p + p_x).inverse()
        centre = backbone.inverse(split(mean))
        jacobian = torch.eye(D).double()
        jacobian[TOP:, :TOP], jacobian[TOP:, TOP:] = backbone.A, backbone.s.diag()
        precision = jacobian.T @ (p + p_x) @ jacobian
        offset = torch.randn(4, D).double()
    eps = [(c + o).requires_grad_() for c, o in zip(centre, split(offset), strict=True)]
    score = torch.cat(torch.autograd.grad(posterior_log_density(prior, x, eps).sum(), eps), 1)
    torch.testing.assert_close(score, -offset @ precision, rtol=1e-9, atol=1e-9)


def test_posterior_chains_are_langevin_and_leave_the_weights_alone(prior, x):
    settings = dict(steps=3, step_size=0.01)
    chains = posterior_chains(prior, x, generator=torch.Generator().manual_seed(1), **settings)
    generator = torch.Generator().manual_seed(1)
    start = prior.noise(4, generator)
    expected = langevin(
        lambda eps: posterior_log_density(prior, x, eps), start, generator=generator, **settings
    )
    for a, b in zip(chains, expected, strict=True):
        assert torch.equal(a, b) and not a.requires_grad
    assert all(p.grad is None and p.requires_grad for p in prior.parameters())
