import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from backbones.nvae import load
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, FitConfig, SamplerConfig, fit
from ebm_prior.cli import main
from ebm_prior.feature_cache import FeatureCache
from ebm_prior.langevin import flatten, value_and_grad
from ebm_prior.metrics import load_features
from ebm_prior.transitions import TRANSITIONS

ROOT = Path(__file__).parent
FIXTURES = sorted((ROOT / "fixtures" / "nvae").iterdir())
DIGITS = ROOT.parent / "checkpoints" / "nvae_digits"


def gradients(prior, function="energy_of_noise"):
    """Of the same samples in both precisions."""
    flat, unflatten = flatten(prior.noise(8, torch.Generator().manual_seed(0)))
    found = []
    for precision in ("fp32", "bf16"):
        prior.precision = precision
        value, grad = value_and_grad(getattr(prior, function), flat, unflatten)
        assert value.dtype == grad.dtype == torch.float32
        found.append(grad)
    return flat, *found


def relative(found, exact):
    return ((found - exact).square().mean() / exact.square().mean()).sqrt().item()


# Measured: 0.005 to 0.066 with new heads on the groups, 0.098 with the fitted ones.
@pytest.mark.parametrize("folder", FIXTURES, ids=lambda p: p.name)
def test_bf16_gradients_are_off_by_a_stated_share(folder):
    prior = EnergyPrior.for_backbone(load(folder / "checkpoint.pt"), nef=8, ndf=16)
    _, exact, found = gradients(prior)
    assert 1e-4 < relative(found, exact) < 0.1


def test_so_are_those_of_fitted_heads():
    prior = EnergyPrior.from_pretrained(
        DIGITS / "heads", backbone=load(DIGITS / "checkpoint.pt"), check_backbone=False
    )
    _, exact, found = gradients(prior)
    assert 1e-4 < relative(found, exact) < 0.15


def test_without_energy_the_score_is_exactly_minus_eps():
    prior = EnergyPrior.for_backbone(load(FIXTURES[0] / "checkpoint.pt"), "both", nef=8, ndf=16)
    for head in prior.heads:
        torch.nn.init.zeros_(head.layers[-1].weight)
    flat, exact, found = gradients(prior, "log_density")
    assert torch.equal(exact, -flat) and torch.equal(found, -flat)


@pytest.fixture
def small():
    sampler = SamplerConfig("pcnl", 3, 0.1)
    return EnergyPrior.for_backbone(ToyBackbone(), "both", nef=4, ndf=6, sampler=sampler)


@pytest.fixture
def seen(monkeypatch):
    """Whether autocast was on in each pass through the backbone and in each use of the heads."""
    seen = {"tower": [], "heads": []}
    for name, owner, method in (
        ("tower", ToyBackbone, "transform"),
        ("heads", EnergyPrior, "energies_of"),
    ):
        plain = getattr(owner, method)

        def spy(self, *args, name=name, plain=plain):
            seen[name].append(torch.is_autocast_enabled("cpu"))
            return plain(self, *args)

        monkeypatch.setattr(owner, method, spy)
    return seen


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_only_the_pass_inside_a_chain_runs_in_bf16(small, seen, transition):
    small.sample_eps(2, transition=transition)
    assert not any(seen["tower"]) and len(seen["tower"]) >= 3
    seen["tower"].clear()
    small.precision = "bf16"
    eps = small.sample_eps(2, transition=transition)
    assert all(seen["tower"]) and len(seen["tower"]) >= 3
    assert not any(seen["heads"])
    assert all(e.dtype == torch.float32 for e in eps)
    small.images(eps)
    assert not seen["tower"][-1]


def test_heads_learn_from_float32_only(small, seen, tmp_path):
    images = torch.randint(0, 256, (40, *small.backbone.image_shape), dtype=torch.uint8)
    common = dict(batch_size=8, sample_every=0, draws=1, nce_iterations=3, mle_iterations=3)
    fit(small, images, FitConfig(objective="nce", **common), run_dir=tmp_path / "nce")
    assert not any(seen["tower"])  # the default
    config = FitConfig(objective="mle", precision="bf16", **common)
    fit(small, images, config, run_dir=tmp_path / "mle")
    assert any(seen["tower"]) and not any(seen["heads"])
    stored = json.loads((tmp_path / "mle" / "config.json").read_text())
    assert stored["training"]["fit"]["precision"] == "bf16"
    again = EnergyPrior.from_pretrained(
        tmp_path / "mle", backbone=small.backbone, check_backbone=False
    )
    assert again.precision == "fp32"  # of the run, not of the heads


@pytest.mark.parametrize("move", [lambda b: b.double(), lambda b: b.to("meta")])
def test_where_it_does_not_work_is_said(small, move):
    move(small.backbone)
    with pytest.raises(EbmPriorError, match="bf16 does not work for float.. weights on"):
        small.precision = "bf16"
    assert small.precision == "fp32"


def test_wrong_names_are_refused(small):
    with pytest.raises(EbmPriorError, match="precision must be one of fp32, bf16, got 'half'"):
        small.precision = "half"
    with pytest.raises(EbmPriorError, match="precision must be one of"):
        FitConfig(precision="half")


def test_the_command_samples_in_bf16(small, tmp_path, seen):
    (tmp_path / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 4}')
    EnergyPrior.for_backbone(ToyBackbone(2, 3, 4), nef=4, ndf=6).save_pretrained(tmp_path / "h")
    args = ["sample", "--heads", tmp_path / "h", "--backbone", "toy", "--any-backbone",
            "--ckpt", tmp_path / "toy.json", "-n", 4, "--steps", 2, "--out", tmp_path / "x.png",
            "--precision", "bf16"]  # fmt: skip
    result = CliRunner().invoke(main, [str(arg) for arg in args])
    assert result.exit_code == 0, result.output
    assert any(seen["tower"]) and (tmp_path / "x.png").exists()


def test_an_evaluation_goes_on_from_batches_of_its_own_precision(small, tmp_path):
    network = load_features("digits")

    def folder(precision):
        small.precision = precision
        return FeatureCache(tmp_path, small, small.sampler, 1.0, network).folder

    assert folder("fp32") == folder("fp32") != folder("bf16")
