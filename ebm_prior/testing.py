"""Laws that every backbone adapter must obey, as functions any test suite can call.

Call it from a test, with a backbone of any weights:

    check_backbone(MyBackbone(...))
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ebm_prior.backbone import Backbone, Latents
from ebm_prior.langevin import flatten
from ebm_prior.memory import saved_bytes
from ebm_prior.prior import EnergyPrior

__all__ = ["LAWS", "check_backbone"]

BATCH = 3


def check_backbone(backbone: Backbone, tolerance: float = 1e-4) -> None:
    """Check every law in `LAWS`.

    Args:
        backbone: Adapter with any weights; small and random ones are enough.
        tolerance: Largest relative error; the default suits float32.

    Raises:
        AssertionError: Naming the law that is broken.
    """
    for law in LAWS:
        try:
            law(backbone, tolerance)
        except AssertionError as error:
            raise AssertionError(f"{law.__name__}: {error}") from error


def noise(backbone: Backbone, seed: int = 0) -> Latents:
    """Fixed standard-normal noise for a small batch."""
    generator = torch.Generator().manual_seed(seed)
    return tuple(
        torch.randn((BATCH, *g.shape), generator=generator, dtype=backbone.dtype).to(
            backbone.device
        )
        for g in backbone.groups
    )


def images(backbone: Backbone) -> Tensor:
    """Fixed random images for a small batch."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand((BATCH, *backbone.image_shape), generator=generator, dtype=backbone.dtype)
    return x.to(backbone.device)


def close(a: Tensor, b: Tensor, tolerance: float, what: str) -> None:
    """Assert |a - b| <= tolerance * max|b|."""
    assert a.shape == b.shape, f"{what}: shapes {tuple(a.shape)} and {tuple(b.shape)}"
    error = (a - b).abs().max().item()
    bound = tolerance * max(b.abs().max().item(), 1.0)
    assert error <= bound, f"{what}: differ by {error:.3g}, more than {bound:.3g}"


def all_close(a: Sequence[Tensor], b: Sequence[Tensor], tolerance: float, what: str) -> None:
    """`close`, group by group."""
    assert len(a) == len(b), f"{what}: {len(a)} and {len(b)} groups"
    for i, (x, y) in enumerate(zip(a, b, strict=True)):
        close(x, y, tolerance, f"{what}, group {i}")


def is_frozen(backbone: Backbone, tolerance: float) -> None:
    """No parameter takes gradients; `train()` leaves every module in evaluation mode."""
    assert not any(p.requires_grad for p in backbone.parameters()), "parameters need gradients"
    backbone.train()
    assert not any(m.training for m in backbone.modules()), "train() left evaluation mode"


def has_declared_shapes(backbone: Backbone, tolerance: float) -> None:
    """Latents, features and images have the shapes and type the backbone declares."""
    eps = noise(backbone)
    z = backbone.transform(eps)
    backbone.check_latents(z, "transform")
    assert isinstance(z, tuple), "transform must return a tuple"
    assert all(t.dtype == backbone.dtype for t in z), "transform changed the dtype"
    features = backbone.features(z)
    assert tuple(features.shape) == (BATCH, *backbone.feature_shape), "feature_shape is wrong"
    px = backbone.decode(z)
    for what, x in (("mean", px.mean), ("sample", px.sample())):
        assert tuple(x.shape) == (BATCH, *backbone.image_shape), f"{what} has another shape"
        assert x.min() >= 0 and x.max() <= 1, f"{what} leaves [0, 1]"
    log_prob = px.log_prob(images(backbone))
    assert log_prob.shape == (BATCH,) and log_prob.isfinite().all(), "log_prob is not (B,)"
    post = backbone.posterior(images(backbone))
    backbone.check_latents(post.z, "posterior")
    for what, value in (("log_q", post.log_q), ("log_p", post.log_p)):
        assert value.shape == (BATCH, len(backbone.groups)), f"{what} is not (B, L)"


def inverts(backbone: Backbone, tolerance: float) -> None:
    """inverse(transform(eps)) == eps, and transform(inverse(z)) == z on posterior samples."""
    eps = noise(backbone)
    all_close(backbone.inverse(backbone.transform(eps)), eps, 10 * tolerance, "T^-1(T(eps))")
    z = backbone.posterior(images(backbone), noise=eps).z
    all_close(backbone.transform(backbone.inverse(z)), z, 10 * tolerance, "T(T^-1(z))")


def is_ancestral(backbone: Backbone, tolerance: float) -> None:
    """z_i depends on eps_0 .. eps_i only, affinely on eps_i."""
    eps = noise(backbone)
    z = backbone.transform(eps)
    for i in range(len(eps)):
        later = tuple(e if j <= i else -e for j, e in enumerate(eps))
        all_close(backbone.transform(later)[: i + 1], z[: i + 1], tolerance, "z from later eps")
        zero, double = (
            backbone.transform([*eps[:i], factor * eps[i], *eps[i + 1 :]])[i] for factor in (0, 2)
        )
        close(double - zero, 2 * (z[i] - zero), 10 * tolerance, f"group {i} is not affine")


def scales_with_temperature(backbone: Backbone, tolerance: float) -> None:
    """Temperature multiplies every sigma: t * eps at 1 is eps at t, group by group."""
    eps = noise(backbone)
    z = backbone.transform(eps, temperature=0.5)
    all_close(z, backbone.transform([0.5 * e for e in eps]), tolerance, "temperature 0.5")


def keeps_samples_apart(backbone: Backbone, tolerance: float) -> None:
    """A sample's latents do not depend on the others in its batch."""
    eps = noise(backbone)
    one = tuple(e[1:2] for e in eps)
    together = backbone.transform(eps)
    all_close([t[1:2] for t in together], backbone.transform(one), tolerance, "transform")
    x = images(backbone)
    many = backbone.posterior(x, noise=eps).z
    single = backbone.posterior(x[1:2], noise=one).z
    all_close([t[1:2] for t in many], single, tolerance, "posterior")


def is_reproducible(backbone: Backbone, tolerance: float) -> None:
    """The same noise or the same generator seed gives the same posterior draw."""
    x = images(backbone)
    draws = [
        backbone.posterior(x, generator=torch.Generator(backbone.device).manual_seed(3)).z
        for _ in range(2)
    ]
    all_close(*draws, 0.0, "posterior with a generator")
    other = backbone.posterior(x, generator=torch.Generator(backbone.device).manual_seed(4)).z
    assert any(not torch.equal(a, b) for a, b in zip(draws[0], other, strict=True)), (
        "posterior ignores its generator"
    )
    draws = [backbone.posterior(x, noise=noise(backbone)).z for _ in range(2)]
    all_close(*draws, 0.0, "posterior with given noise")


def agrees_with_itself(backbone: Backbone, tolerance: float) -> None:
    """`top_down` and `encode` are `transform` and `posterior` with `features`."""
    eps = noise(backbone)
    for temperature in (1.0, 0.7):
        z = backbone.transform(eps, temperature)
        both = backbone.top_down(eps, temperature)
        all_close(both[0], z, tolerance, "top_down latents")
        close(both[1], backbone.features(z), tolerance, "top_down features")
    z = backbone.posterior(images(backbone), noise=eps).z
    both = backbone.encode(images(backbone), eps)
    all_close(both[0], z, tolerance, "encode latents")
    close(both[1], backbone.features(z), tolerance, "encode features")


def has_gaussian_prior(backbone: Backbone, tolerance: float) -> None:
    """log_p and log_prior are the Gaussian whose mean and sigma T itself applies (Eq. 2, 29)."""
    post = backbone.posterior(images(backbone), noise=noise(backbone))
    eps = backbone.inverse(post.z)
    for i, e in enumerate(eps):
        one, zero = (
            backbone.transform([*eps[:i], torch.full_like(e, v), *eps[i + 1 :]])[i]
            for v in (1.0, 0.0)
        )
        sigma = one - zero
        expected = (
            (-0.5 * e.square() - sigma.log() - 0.5 * math.log(2 * math.pi)).flatten(1).sum(1)
        )
        close(post.log_p[:, i], expected, 10 * tolerance, f"log_p of group {i}")
    close(backbone.log_prior(post.z), post.log_p, 10 * tolerance, "log_prior")


def has_exact_score(backbone: Backbone, tolerance: float) -> None:
    """With heads set to zero the gradient of the log-density is exactly -eps."""
    for kind in ("factorized", "joint"):
        prior = EnergyPrior.for_backbone(backbone, heads=kind, nef=2, ndf=3)
        with torch.no_grad():
            for p in prior.heads.parameters():
                p.zero_()
        eps = tuple(e.requires_grad_() for e in noise(backbone))
        grads = torch.autograd.grad(prior.log_density(eps).sum(), eps)
        for grad, e in zip(grads, eps, strict=True):
            assert torch.equal(grad, -e), f"{kind}: the score of zero heads is not -eps"


def recomputes_the_same(backbone: Backbone, tolerance: float) -> None:
    """With `checkpointing`, where an adapter has it, gradients keep less, and are the same."""
    if backbone.checkpointing is None:
        return

    def loss(eps: Latents) -> Tensor:
        z, features = backbone.top_down(eps)
        return sum(tensor.square().sum() for tensor in (*z, features))

    before, found, kept = backbone.checkpointing, [], []
    try:
        for backbone.checkpointing in (False, True):
            eps = tuple(e.requires_grad_() for e in noise(backbone))
            found.append(torch.autograd.grad(loss(eps), eps))
            kept.append(saved_bytes(loss, *flatten(eps)))
    finally:
        backbone.checkpointing = before
    all_close(found[1], found[0], tolerance, "gradients with checkpointing")
    if len(backbone.groups) > 1:  # of a single one there may be nothing to compute again
        assert kept[1] < kept[0], "a gradient with checkpointing keeps as much as one without"


LAWS: tuple[Callable[[Backbone, float], None], ...] = (
    is_frozen,
    has_declared_shapes,
    inverts,
    is_ancestral,
    scales_with_temperature,
    keeps_samples_apart,
    is_reproducible,
    agrees_with_itself,
    has_gaussian_prior,
    has_exact_score,
    recomputes_the_same,
)
"""Each takes a backbone and a relative tolerance, and raises AssertionError."""
