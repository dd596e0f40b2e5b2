import importlib.util
import runpy
import sys
from pathlib import Path

import pytest
import torch
from huggingface_hub import SpaceCard

from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.demo import draw, load, page
from tests.test_cli import run
from tests.test_hub import REPO, SHIPPED

ROOT = Path(__file__).parent.parent
SPACE = ROOT / "examples" / "space"
needs_gradio = pytest.mark.skipif(
    importlib.util.find_spec("gradio") is None, reason="needs Gradio"
)


@pytest.fixture
def prior(toy):
    return EnergyPrior.for_backbone(toy, nef=4, ndf=6)


def test_the_pictures_depend_on_every_setting(prior):
    first = draw(prior, 3, 1.0, 0)
    assert all(a == b for a, b in zip(first, draw(prior, 3, 1.0, 0), strict=True))
    before, after, strip = first
    assert before.size == after.size and before != after and strip.size[1] > before.size[1] / 4
    for other in (draw(prior, 4, 1.0, 0), draw(prior, 3, 0.5, 0), draw(prior, 3, 1.0, 1)):
        assert other[1] != after
    assert draw(prior, 4, 1.0, 0)[0] == before  # the Gaussian prior knows no steps


@pytest.mark.parametrize(
    "settings", [(0, 1.0, 0), (201, 1.0, 0), (3, 0.0, 0), (3, 9.0, 0), (3, 1.0, -1), (3, None, 0)]
)
def test_settings_out_of_range_are_refused(prior, settings):
    with pytest.raises(EbmPriorError, match="must lie between"):
        draw(prior, *settings)


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_shipped_heads_find_their_backbone(folder):
    prior = load(str(folder / "heads"))
    assert prior.backbone.sha256 and isinstance(prior.heads, torch.nn.ModuleList)


def test_without_gradio_or_heads_it_says_so(prior, monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(EbmPriorError, match="pip install 'ebm-prior\\[demo\\]'"):
        page({"toy": prior})
    monkeypatch.chdir(tmp_path)
    assert "no heads under checkpoints/" in run("demo", code=1)


@needs_gradio
def test_the_page_is_built(prior):
    blocks = page({"toy": prior})
    labels = {c["props"].get("label") for c in blocks.get_config_file()["components"]}
    assert {"Heads", "Steps", "Temperature", "Seed"} <= labels
    with pytest.raises(EbmPriorError, match="no heads to show"):
        page({})


def test_a_space_shows_heads_and_backbone_from_the_hub(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shipped = ROOT / "checkpoints" / "nvae_digits" / "heads"
    run("push", shipped, REPO, "--no-pictures", "--with-backbone")
    monkeypatch.setenv("HEADS", REPO)
    monkeypatch.setattr("ebm_prior.demo.page", dict)
    shown = runpy.run_path(str(SPACE / "app.py"))["demo"]
    assert list(shown) == [REPO]
    here, there = (draw(prior, 2, 1.0, 0) for prior in (load(shipped), shown[REPO]))
    assert all(a == b for a, b in zip(here, there, strict=True))


@needs_gradio
def test_the_space_is_built(monkeypatch):
    monkeypatch.setenv("HEADS", str(ROOT / "checkpoints" / "nvae_digits" / "heads"))
    labels = [
        component["props"].get("label")
        for component in runpy.run_path(str(SPACE / "app.py"))["demo"].config["components"]
    ]
    assert "Heads" in labels


def test_the_space_says_what_it_needs(hub):
    card = SpaceCard((SPACE / "README.md").read_text())
    card.validate(repo_type="space")
    assert (SPACE / card.data.app_file).is_file() and card.data.sdk == "gradio"
    pins = (ROOT / "constraints.txt").read_text().split()
    assert f"gradio=={card.data.to_dict()['sdk_version']}" in pins
    assert "ebm-prior[demo]" in (SPACE / "requirements.txt").read_text().split()
