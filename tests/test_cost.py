"""What a Langevin step costs, in operations and bytes: gates that no busy machine can blur."""

import copy
from collections import Counter
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from backbones.biva import load as load_biva
from backbones.hvae import load as load_hvae
from backbones.nvae import load as load_nvae
from benchmarks.cost import flops, needed_flops, peak_bytes, saved_bytes
from benchmarks.fast_form import differences
from benchmarks.models import configuration, nvae
from benchmarks.published import Published
from ebm_prior import EnergyPrior
from ebm_prior.langevin import flatten, value_and_grad

FIXTURES = Path(__file__).parent / "fixtures"
LOADERS = {"biva": load_biva, "hvae": load_hvae, "nvae": load_nvae}
TINY = {
    "A": dict(num_groups_per_scale=3, num_channels_enc=8, num_channels_dec=8),
    "B": dict(num_groups_per_scale=4, num_channels_enc=4, num_channels_dec=4),
}


@pytest.fixture(scope="module", params=["A", "B"])
def tiny(request):
    backbone = nvae(request.param, passes=1, **TINY[request.param])
    _ = backbone.fast  # folding is paid for once, not by a step
    return EnergyPrior.for_backbone(backbone, "both", nef=4, ndf=6)


# The published step also decodes the image (forward only: nothing depends on it), convolves
# the constant state in the first combiner (forward and backward), runs a last combiner that
# no latent depends on, and at the doublings of B convolves 1x1 on four times the pixels.
# Bytes: of a mobile cell, in units of its input, the plain form keeps 39 (the inputs of four
# batch norms, three convolutions and two activations, six of which are six wide) and the
# folded one 13 (of its convolutions and activations each input once); the rest of the
# difference is the decoder.
@pytest.mark.parametrize("model, operations, kept", [("A", 0.92, 0.33), ("B", 0.87, 0.33)])
def test_a_step_costs_a_stated_share_of_the_published_one(model, operations, kept):
    prior = EnergyPrior.for_backbone(nvae(model, passes=0)).requires_grad_(False)
    backbone, fast = prior.backbone, prior.backbone.fast
    prior.to("meta")  # shapes are enough for both
    backbone._fast = (fast.to("meta"),)
    flat, unflatten = flatten(prior.noise(2))
    published = Published(prior)
    theirs = flops(lambda: value_and_grad(published, flat[:1], unflatten))
    ours = flops(lambda: value_and_grad(prior.log_density, flat[:1], unflatten))
    assert ours == needed_flops(prior)
    features = torch.zeros(1, *backbone.feature_shape, device="meta")
    assert theirs > ours + flops(lambda: backbone.network.decode(features))
    assert ours < operations * theirs
    bytes_of = [saved_bytes(f, flat, unflatten) for f in (prior.log_density, published)]
    assert bytes_of[0] < kept * bytes_of[1]
    # Micro-batches rely on this: what is kept is nearly all that a step takes at one time.
    step = peak_bytes(lambda: value_and_grad(prior.log_density, flat, unflatten))
    assert step == pytest.approx(2 * bytes_of[0], rel=0.04)
    backbone.checkpointing = True
    assert saved_bytes(prior.log_density, flat, unflatten) < bytes_of[0] / 8
    again = peak_bytes(lambda: value_and_grad(prior.log_density, flat, unflatten))
    assert again < step / 5


def test_the_published_form_is_what_it_says(tiny):
    """Value log p(z) - E(z), and the plain network's activation differentiated right."""
    backbone = copy.deepcopy(tiny.backbone).double()
    prior = EnergyPrior.for_backbone(backbone, "both", nef=4, ndf=6)
    flat, unflatten = flatten(prior.noise(2))

    def expected(eps):
        z = backbone.transform(eps)
        return backbone.log_prior(z).sum(1) - prior.energy(z)

    pairs = [value_and_grad(f, flat, unflatten) for f in (Published(prior), expected)]
    torch.testing.assert_close(*pairs)


def test_work_is_the_gradient_alone_and_does_not_grow(tiny):
    """Equality also says that no gradient of a parameter is computed."""
    assert all(p.requires_grad for p in tiny.heads.parameters())
    tiny.sample_eps(1, 1, 0.1, transition="langevin")  # estimates its memory, once
    done = [0]
    with FlopCounterMode(display=False) as counter:
        tiny.sample_eps(
            1,
            3,
            0.1,
            transition="langevin",
            callback=lambda _: done.append(counter.get_total_flops()),
        )
    assert [b - a for a, b in zip(done, done[1:], strict=False)] == [needed_flops(tiny)] * 3
    assert all(p.grad is None for p in tiny.parameters())


@pytest.mark.parametrize("kind", ["factorized", "joint", "both"])
def test_no_step_runs_the_image_decoder(tiny, kind):
    ran = []
    network = tiny.backbone.network
    hooks = [
        part.register_forward_hook(lambda *_: ran.append(1))
        for form in (network, tiny.backbone.fast)
        for part in (*form.post_process, form.image_conditional)
    ]
    prior = EnergyPrior.for_backbone(tiny.backbone, kind, nef=4, ndf=6)
    eps = prior.sample_eps(2, 2, 0.1, transition="pcnl")
    assert not ran
    prior.images(eps)
    assert len(ran) == len(network.post_process) + 1
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize(
    "folder", sorted(FIXTURES.glob("*/*")), ids=lambda p: f"{p.parent.name}-{p.name}"
)
def test_the_fast_form_is_the_plain_one(folder):
    (checkpoint,) = folder.glob("c*k*pt*")
    backbone = LOADERS[folder.parent.name](checkpoint).double()
    found = differences(backbone)
    assert max(found.values()) < 1e-13
    if folder.parent.name == "nvae":  # two ways of computing, not one
        assert max(found.values()) > 0


@pytest.mark.parametrize(
    "model, groups",
    [
        ("A", {16: 10}),
        ("B", {8: 2, 16: 4, 32: 8}),
        ("cifar10", {16: 30}),
        ("celeba_256", {8: 4, 16: 4, 32: 4, 64: 8, 128: 16}),
    ],
)
def test_random_models_are_of_the_public_sizes(model, groups):
    _, config, likelihood = configuration(model)
    assert Counter(config.group_sizes) == groups and likelihood == "mixture"


def test_random_activations_are_well_scaled(tiny):
    """Calibrated statistics keep what a group reads of order one, however deep the network."""
    z = tiny.backbone.transform(tiny.noise(4))
    assert all(0.3 < v.std() < 10 for v in z)
    norms = [m for m in tiny.backbone.modules() if isinstance(m, torch.nn.BatchNorm2d)]
    assert any((m.running_var - 1).abs().max() > 0.1 for m in norms)
