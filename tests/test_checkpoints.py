"""What `checkpoints/` ships works as its README says."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from ebm_prior import EnergyPrior, load_backbone
from ebm_prior.data import load_images
from ebm_prior.evaluate import evaluate
from ebm_prior.metrics import load_features
from ebm_prior.testing import check_backbone

ROOT = Path(__file__).parent.parent / "checkpoints"
FOLDERS = sorted(path.parent for path in ROOT.glob("*/card.json"))
FITTED = [folder for folder in FOLDERS if (folder / "heads").exists()]
WEIGHTS = {"biva": "model.pth", "hvae": "model_state_dict.pt", "nvae": "checkpoint.pt"}


def weights(folder):
    """Family of a shipped backbone, and the file with its weights."""
    family = folder.name.partition("_")[0]
    return family, folder / WEIGHTS[family]


def load(folder):
    backbone = load_backbone(*weights(folder))
    return backbone, EnergyPrior.from_pretrained(folder / "heads", backbone=backbone)


def test_sums_are_those_written_down():
    listed = dict(line.split()[::-1] for line in (ROOT / "SHA256SUMS").read_text().splitlines())
    shipped = {
        str(p.relative_to(ROOT)): hashlib.sha256(p.read_bytes()).hexdigest()
        for p in ROOT.glob("*/**/*")
        if p.is_file()
    }
    assert listed == shipped
    for folder in FOLDERS:
        card = json.loads((folder / "card.json").read_text())
        assert card["sha256"] == shipped[str(weights(folder)[1].relative_to(ROOT))]


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: p.name)
def test_backbone_loads(folder):
    family, path = weights(folder)
    backbone = load_backbone(family, path)
    check_backbone(backbone)
    if family != "nvae":  # a folder may be given too, and is the same checkpoint
        assert load_backbone(family, folder).sha256 == backbone.sha256
    else:
        assert backbone.sha256 == json.loads((folder / "card.json").read_text())["sha256"]
    card = json.loads((folder / "card.json").read_text())
    assert sum(p.numel() for p in backbone.network.parameters()) == card["parameters"]
    assert backbone.dataset == folder.name.partition("_")[2]


@pytest.mark.parametrize("folder", FITTED, ids=lambda p: p.name)
def test_heads_load_and_sample(folder):
    backbone, prior = load(folder)
    x = prior.sample(2, steps=2, generator=torch.Generator().manual_seed(0))
    assert x.shape == (2, *backbone.image_shape) and 0 <= x.min() and x.max() <= 1


def test_other_arguments_make_another_checkpoint(tmp_path):
    folder = tmp_path / "hvae"
    shutil.copytree(ROOT / "hvae_mnist", folder)
    kwargs = torch.load(folder / "model_kwargs.pt", weights_only=False)
    kwargs["kwargs"]["activation"] = "ReLU"
    torch.save(kwargs, folder / "model_kwargs.pt")
    with pytest.raises(ValueError, match="SHA-256"):
        backbone = load_backbone("hvae", folder)
        EnergyPrior.from_pretrained(ROOT / "hvae_mnist" / "heads", backbone=backbone)


def test_heads_of_one_are_refused_on_another():
    backbone, _ = load(FITTED[0])
    with pytest.raises(ValueError, match="another backbone"):
        EnergyPrior.from_pretrained(FITTED[-1] / "heads", backbone=backbone)


def test_the_digits_heads_improve_on_the_gaussian_prior():
    backbone, prior = load(ROOT / "nvae_digits")
    result = evaluate(
        prior,
        load_images("digits", split="test").images,
        load_images("digits", split="train").images,
        load_features("digits"),
        n=400,
    )
    assert result.gap_closed > 0.4
    assert result.energy.precision > result.gaussian.precision
    assert result.energy.entropy > result.gaussian.entropy - 0.05
