import json
import math

import pytest
import torch
from torch import nn

import ebm_prior
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.testing import check_backbone
from ebm_prior.transitions import TRANSITIONS


class Quadratic(nn.Module):
    """E(z) = kappa/2 |z - center|^2, so the tilted prior of a linear backbone is Gaussian."""

    def __init__(self, kappa, center):
        super().__init__()
        self.kappa, self.center = kappa, center

    def forward(self, z):
        return self.kappa / 2 * (z - self.center).square().flatten(1).sum(1)


def quadratic_prior(toy, step_size=0.4):
    prior = EnergyPrior.for_backbone(
        toy, heads="factorized", sampler=SamplerConfig("pcnl", 60, step_size)
    )
    prior.heads = nn.ModuleList([Quadratic(1.5, 0.8), Quadratic(3.0, -0.5)])
    return prior


def gaussian_of_quadratic_heads(toy):
    """Exact moments of p(z) exp(-E_2(z_2) - E_1(z_1)) over (z_2, z_1)."""
    mean, covariance = toy.prior_moments()
    top, bottom = toy.groups[0].numel, toy.groups[1].numel
    kappa = torch.cat([torch.full((top,), 1.5), torch.full((bottom,), 3.0)]).double()
    center = torch.cat([torch.full((top,), 0.8), torch.full((bottom,), -0.5)]).double()
    precision = covariance.inverse()
    posterior = (precision + kappa.diag()).inverse()
    return posterior @ (precision @ mean + kappa * center), posterior


def test_toy_backbone_keeps_the_contract(toy):
    check_backbone(toy, 1e-9)
    check_backbone(ToyBackbone(top=3, bottom=5, size=3, seed=4), 1e-5)


def test_the_contract_catches_a_wrong_transform(toy):
    toy.transform = lambda eps, temperature=1.0: (eps[0], eps[1] + eps[0].sum(1, keepdim=True))
    with pytest.raises(AssertionError, match="inverts"):
        check_backbone(toy)


def test_toy_posterior_is_exact(toy):
    """log p(x) = log p(x|z) + log p(z) - log q(z|x) is the same for every z."""
    x = torch.rand(3, 1, 4, 4, dtype=torch.float64)
    evidence = []
    for seed in (0, 1):
        post = toy.posterior(x, generator=torch.Generator().manual_seed(seed))
        evidence.append(toy.decode(post.z).log_prob(x) + post.log_p.sum(1) - post.log_q.sum(1))
    torch.testing.assert_close(*evidence)


@pytest.mark.parametrize("kind, heads", [("factorized", 2), ("joint", 1), ("both", 3)])
def test_energies_sum_over_heads(toy, kind, heads):
    prior = EnergyPrior.for_backbone(toy, heads=kind, nef=4, ndf=6)
    z = toy.transform(prior.noise(5))
    assert prior.energies(z).shape == (5, heads) == (5, len(prior.head_names))
    torch.testing.assert_close(prior.energy(z), prior.energies(z).sum(1))
    torch.testing.assert_close(prior.energy_of_noise(toy.inverse(z)), prior.energy(z))


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_density_gradient_matches_finite_differences(toy, temperature):
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=8)
    eps = prior.noise(2, torch.Generator().manual_seed(2))
    inputs = tuple(e.requires_grad_() for e in eps)
    assert torch.autograd.gradcheck(
        lambda *e: prior.log_density(e, temperature), inputs, eps=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(
    "transition, step, steps",
    # small enough that Langevin's bias is < noise
    [("pcnl", 0.15, 150), ("mala", 0.15, 150), ("hmc", 0.15, 20), ("langevin", 0.02, 400)],
)
def test_quadratic_heads_are_sampled_from_their_known_gaussian(toy, transition, step, steps):
    prior = quadratic_prior(toy)
    n = 4000
    eps = prior.sample_eps(
        n, steps, step, generator=torch.Generator().manual_seed(0), transition=transition
    )
    z = torch.cat(toy.transform(eps), 1)
    mean, covariance = gaussian_of_quadratic_heads(toy)
    sd = covariance.diagonal().sqrt()
    assert ((z.mean(0) - mean) / sd).abs().max() < 5 / math.sqrt(n) + 0.01
    error = (z.T.cov() - covariance) / (sd[:, None] * sd)
    bias = 0.03 if transition == "langevin" else 0
    assert error.abs().max() < 5 * math.sqrt(2 / n) + bias


def test_stored_heads_keep_any_transition(toy, tmp_path):
    for transition in TRANSITIONS:
        sampler = SamplerConfig(transition, 7, 0.05)
        prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6, sampler=sampler)
        prior.save_pretrained(tmp_path / transition)
        again = EnergyPrior.from_pretrained(
            tmp_path / transition, backbone=toy, check_backbone=False
        )
        assert again.sampler == sampler


def test_sampling_is_reproducible_from_a_generator(toy):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)

    def draw(seed):
        return prior.sample(3, steps=4, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(draw(1), draw(1)) and not torch.equal(draw(1), draw(2))
    assert draw(1).shape == (3, 1, 4, 4) and 0 <= draw(1).min() and draw(1).max() <= 1


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_sampling_works_in_inference_mode(toy, transition):
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=6)

    def draw():
        generator = torch.Generator().manual_seed(0)
        return prior.sample(3, 4, 0.1, generator=generator, transition=transition)

    want = draw()
    with torch.inference_mode():
        assert torch.equal(draw(), want)


def test_loading_works_in_inference_mode(tmp_path):
    (tmp_path / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 4}')
    toy = ebm_prior.load_backbone("toy", tmp_path / "toy.json")
    EnergyPrior.for_backbone(toy, nef=4, ndf=6).save_pretrained(tmp_path)
    with torch.inference_mode():
        toy = ebm_prior.load_backbone("toy", tmp_path / "toy.json")
        EnergyPrior.from_pretrained(tmp_path, backbone=toy).sample(2, steps=1)


def test_backbone_stays_frozen_and_in_eval_mode(toy):
    prior = EnergyPrior.for_backbone(toy).train()
    assert not any(m.training for m in toy.modules()) and prior.heads.training
    prior.sample_eps(2, steps=1, step_size=0.1)
    assert all(p.requires_grad for p in prior.heads.parameters())


def test_saved_heads_come_back_exactly(toy, tmp_path):
    prior = EnergyPrior.for_backbone(
        toy, heads="both", nef=4, ndf=6, sampler=SamplerConfig("langevin", 7, 0.05)
    )
    prior.save_pretrained(tmp_path)
    assert {p.name for p in tmp_path.iterdir()} == {
        "heads.safetensors",
        "config.json",
        "README.md",
    }
    again = EnergyPrior.from_pretrained(tmp_path, backbone=toy)
    z = toy.transform(prior.noise(3))
    assert torch.equal(prior.energies(z), again.energies(z))
    assert again.sampler == prior.sampler


def test_heads_with_listed_layers_come_back_exactly(toy, tmp_path):
    layers = ((3, 2), (5,), (4, 4, 4))
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, layers=layers)
    prior.save_pretrained(tmp_path / "listed")
    stored = json.loads((tmp_path / "listed/config.json").read_text())["heads"]
    assert stored == {"kind": "both", "nef": 4, "ndf": 200, "layers": [list(r) for r in layers]}
    assert "linear layers 3-2, 5, 4-4-4" in (tmp_path / "listed/README.md").read_text()
    again = EnergyPrior.from_pretrained(tmp_path / "listed", backbone=toy)
    z = toy.transform(prior.noise(3))
    assert torch.equal(prior.energies(z), again.energies(z)) and again.layers == layers
    assert again.config() == prior.config() and "layers=((3, 2)" in repr(again)
    # without them nothing is stored about them, as before there were any
    assert prior.for_backbone(toy).config()["heads"] == {
        "kind": "factorized", "nef": 64, "ndf": 200}  # fmt: skip


def test_listed_layers_must_fit_the_heads(toy):
    with pytest.raises(EbmPriorError, match="for each of 1 heads .'joint'.*got"):
        EnergyPrior.for_backbone(toy, heads="joint", layers=((3, 2), (5,)))


def test_another_backbone_is_refused(toy, tmp_path):
    EnergyPrior.for_backbone(toy).save_pretrained(tmp_path)
    with pytest.raises(EbmPriorError, match="features are 2 3 [0-9]+, this backbone's are 2 4 "):
        EnergyPrior.from_pretrained(tmp_path, backbone=ToyBackbone(bottom=4))
    twin = ToyBackbone(seed=9).double()
    with pytest.raises(EbmPriorError, match="SHA-256"):
        EnergyPrior.from_pretrained(tmp_path, backbone=twin)
    EnergyPrior.from_pretrained(tmp_path, backbone=twin, check_backbone=False)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda c: c.update(format_version=99), "format version 99"),
        (lambda c: c["heads"].update(nef="64"), "heads.nef"),
        (lambda c: c.pop("sampler"), "sampler.transition"),
        (lambda c: c["heads"].update(nef=8, kind="both"), "does not fit|do not belong"),
        (lambda c: c["heads"].update(ndf=10**9), "heads.ndf must lie in"),
        (lambda c: c["heads"].update(ndf=0), "heads.ndf must lie in"),
        (lambda c: c["heads"].update(ndf=6_000), "do not belong"),
        (lambda c: c["heads"].update(layers=5), "heads.layers is missing or of a wrong type"),
        (lambda c: c["heads"].update(layers=[[6], [6]]), "layers is wrong: .* of 1 heads"),
        (lambda c: c["heads"].update(layers=[[6, -1]]), "layers is wrong: .* whole numbers"),
        (lambda c: c["heads"].update(layers=[[6, 6, 6]]), "does not fit|do not belong"),
        (lambda c: c["heads"].update(layers=[[65536] * 16]), "describe 64425951233 parameters"),
        (lambda c: c["heads"].update(ndf=60_000), "describe 3600480001 parameters"),
        (lambda c: c["sampler"].update(steps=-1), "sampler.steps must lie in"),
        (lambda c: c["sampler"].update(step_size=math.nan), "step_size must be positive"),
        (lambda c: c["backbone"].update(groups=[1, 2]), "groups must list"),
    ],
)
def test_a_damaged_configuration_is_named(toy, tmp_path, change, message):
    EnergyPrior.for_backbone(toy, heads="joint", nef=4, ndf=6).save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    change(config)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(EbmPriorError, match=message):
        EnergyPrior.from_pretrained(tmp_path, backbone=toy)


def test_damaged_weights_are_refused(toy, tmp_path):
    prior = EnergyPrior.for_backbone(toy, heads="joint", nef=4, ndf=6)
    with torch.no_grad():
        next(prior.heads.parameters())[0] = math.nan
    prior.save_pretrained(tmp_path)
    with pytest.raises(EbmPriorError, match="finite"):
        EnergyPrior.from_pretrained(tmp_path, backbone=toy)
    weights = tmp_path / "heads.safetensors"
    weights.write_bytes(weights.read_bytes()[:-20])
    with pytest.raises(EbmPriorError, match="safetensors"):
        EnergyPrior.from_pretrained(tmp_path, backbone=toy)


def test_sources_that_are_not_heads_are_refused(toy, tmp_path):
    with pytest.raises(EbmPriorError, match="no heads at"):
        EnergyPrior.from_pretrained(tmp_path / "missing" / "folder", backbone=toy)
    with pytest.raises(EbmPriorError, match="holds no config.json"):
        EnergyPrior.from_pretrained(tmp_path, backbone=toy)


@pytest.mark.parametrize("settings", [("pcnl", 0, 0.1), ("pcnl", 1, -1.0), ("nuts", 1, 0.1)])
def test_wrong_sampler_settings_are_refused(settings):
    with pytest.raises(EbmPriorError):
        SamplerConfig(*settings)


@pytest.mark.parametrize("settings", [dict(heads="lots"), dict(nef=0), dict(ndf=-1)])
def test_wrong_head_settings_are_refused(toy, settings):
    with pytest.raises(EbmPriorError):
        EnergyPrior.for_backbone(toy, **settings)


def test_backbones_are_found_by_entry_point(tmp_path):
    assert {"nvae", "toy"} <= set(ebm_prior.list_backbones())
    (tmp_path / "toy.json").write_text('{"top": 3, "bottom": 2}')
    backbone = ebm_prior.load_backbone("toy", tmp_path / "toy.json")
    assert [g.shape for g in backbone.groups] == [(3,), (2,)] and len(backbone.sha256) == 64
    with pytest.raises(EbmPriorError, match="unknown backbone 'x'; installed: .*nvae"):
        ebm_prior.load_backbone("x", tmp_path / "toy.json")
    with pytest.raises(EbmPriorError, match="no such checkpoint"):
        ebm_prior.load_backbone("toy", tmp_path / "nothing.json")
    if not torch.cuda.is_available():
        with pytest.raises(EbmPriorError, match="--device cpu"):
            ebm_prior.load_backbone("toy", tmp_path / "toy.json", device="cuda")


def test_the_toy_runs_where_its_weights_are():
    toy = ToyBackbone().to("meta")
    x = torch.empty(2, *toy.image_shape, device="meta")
    assert all(tensor.is_meta for tensor in toy.posterior_moments(x))


def test_the_core_never_imports_the_adapters():
    import subprocess
    import sys

    code = (
        "import sys, ebm_prior, ebm_prior.testing, ebm_prior.evaluate, ebm_prior.cli;"
        "print([m for m in sys.modules if m.split('.')[0] in ('backbones', 'torchvision')])"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"
