"""Heads on the Hub: the real client against a server of its interface on loopback."""

import json
import os
import pickle
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from huggingface_hub import HfApi, ModelCard, constants, snapshot_download
from safetensors.torch import load_file, save

import ebm_prior
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.cli import main
from ebm_prior.hub import open_source, pull
from tests.hub_server import Fault, File
from tests.test_cli import run

CHECKPOINTS = Path(__file__).parent.parent / "checkpoints"
SHIPPED = sorted(path.parent for path in CHECKPOINTS.glob("*/heads"))
REPO = "user/heads"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A toy checkpoint and heads on it, in the working directory."""
    (tmp_path / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    monkeypatch.chdir(tmp_path)
    backbone = ebm_prior.load_backbone("toy", "toy.json")
    prior = EnergyPrior.for_backbone(backbone, heads="both", nef=4, ndf=8)
    prior.save_pretrained("heads")
    return prior


def heads_files():
    return {p.name: p.read_bytes() for p in Path("heads").iterdir()}


def changed_config(**changes):
    """`config.json` of the heads with dotted fields replaced."""
    config = json.loads(Path("heads/config.json").read_text())
    for name, value in changes.items():
        *sections, key = name.split("__")
        place = config
        for section in sections:
            place = place[section]
        place[key] = value
    return json.dumps(config).encode()


def fresh_cache(monkeypatch, tmp_path, name="other"):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / name))


def pixels(path):
    return np.load(path)["images"]


# -- push, pull, sample ---------------------------------------------------------------------------


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda p: p.name)
def test_pixels_from_the_hub_are_those_from_the_folder(hub, folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = json.loads((folder / "heads" / "config.json").read_text())
    ckpt = next(p for p in (folder / config["backbone"]["checkpoint"], folder) if p.exists())
    sample = ["sample", "--ckpt", ckpt, "--seeds", "0-3", "--steps", 3]
    run(*sample, "--heads", folder / "heads", "--out", "before.npz")
    out = run("push", folder / "heads", REPO, "--no-pictures", "--license", "mit")
    assert f"{hub.url}/{REPO}/commit/" in out
    assert (
        hub.files(REPO)["heads.safetensors"] == (folder / "heads/heads.safetensors").read_bytes()
    )
    run(*sample, "--heads", REPO, "--out", "after.npz")
    run("pull", REPO, "--out", "pulled")
    run(*sample, "--heads", "pulled", "--out", "pulled.npz")
    for other in ("after.npz", "pulled.npz"):
        np.testing.assert_array_equal(pixels("before.npz"), pixels(other))


def test_another_process_finds_the_hub_by_its_environment(hub, world, tmp_path, monkeypatch):
    """`HF_ENDPOINT`, `HF_TOKEN` and `HF_HUB_CACHE`; then offline, from the same cache."""
    hub.put(REPO, heads_files(), private=True)
    sample = ["sample", "--heads", REPO, "--ckpt", "toy.json", "-n", "2", "--out"]
    subprocess.run(
        [sys.executable, "-m", "ebm_prior", *sample, "1.npz"],
        env=os.environ | {"HF_HUB_CACHE": str(tmp_path / "process")},
        capture_output=True,
        check=True,
    )
    asked = len(hub.requests)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "process"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    run(*sample, "2.npz")
    assert asked and len(hub.requests) == asked
    np.testing.assert_array_equal(pixels("1.npz"), pixels("2.npz"))


def test_from_python_with_revisions(hub, world, tmp_path, monkeypatch):
    url = world.push_to_hub(REPO, private=True, license="mit", pictures=False)
    assert url.startswith(f"{hub.url}/{REPO}/commit/") and hub.repos[REPO].private
    first = url.rsplit("/", 1)[1]
    changed = EnergyPrior.for_backbone(world.backbone, heads="joint", nef=4, ndf=8)
    changed.push_to_hub(REPO, branch="small", commit_message="Smaller", pictures=False)
    pull_request = changed.push_to_hub(REPO, create_pr=True, pictures=False)
    assert pull_request == f"{hub.url}/{REPO}/discussions/1"

    def kind(source, **options):
        return EnergyPrior.from_pretrained(source, backbone=world.backbone, **options).kind

    assert kind(REPO) == kind(f"{REPO}@{first}") == kind(REPO, revision="main") == "both"
    assert kind(f"{REPO}@small") == kind(REPO, revision="small") == "joint"
    assert kind(f"{REPO}@refs/pr/1") == "joint"
    assert kind(REPO, cache_dir=tmp_path / "c", token="hf_read") == "both"
    assert kind(REPO, cache_dir=tmp_path / "c", local_files_only=True) == "both"
    with pytest.raises(EbmPriorError, match="contradict"):
        kind(f"{REPO}@small", revision="main")
    with pytest.raises(EbmPriorError, match="no such revision"):
        kind(f"{REPO}@tiny")
    with pytest.raises(EbmPriorError, match="local_files_only is set"):
        kind(REPO, cache_dir=tmp_path / "d", local_files_only=True)
    with pytest.raises(TypeError, match="unknown options: colour"):
        kind(REPO, colour=1)


def test_save_pretrained_pushes_as_the_ecosystem_does(hub, world):
    options = {"push_to_hub": True, "pictures": False}
    url = world.save_pretrained("saved", training={"result": {}}, repo_id=REPO, **options)
    assert url and json.loads(hub.files(REPO)["config.json"])["training"] == {"result": {}}
    assert (Path("saved") / "config.json").is_file()
    # the folder's name, in the name space of the token's owner
    assert "/user/saved/commit/" in world.save_pretrained("saved", **options)
    with pytest.raises(EbmPriorError, match="refused the token"):
        world.save_pretrained("saved", token="hf_wrong", **options)


def test_what_a_push_publishes(hub, world):
    """Pictures, a valid card, and nothing of the machine it was made on."""
    config = json.loads(Path("heads/config.json").read_text())
    config["backbone"]["path"] = str(Path("toy.json").absolute())
    config["training"] = {"data": {"source": str(Path("x.npz").absolute())}, "fit": {"seed": 3}}
    Path("heads/config.json").write_text(json.dumps(config))
    Path("heads/secret.txt").write_text("mine")
    run("push", "heads", REPO, "--license", "mit", "--backbone-source", "them/toy")
    files = hub.files(REPO)
    assert set(files) == {
        ".gitattributes", "README.md", "config.json", "heads.safetensors",
        "samples/before-after.png", "samples/transition.png",
    }  # fmt: skip
    assert not any(os.getcwd().encode() in data for data in files.values())
    assert json.loads(files["config.json"])["backbone"]["source"] == "them/toy"
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert card.data.library_name == "ebm-prior" and card.data.license == "mit"
    assert card.data.base_model == "them/toy" and "vae" in card.data.tags
    assert "model-index" not in card.data.to_dict()  # nothing was measured
    assert "--seed 3" in card.text and "No evaluation is recorded" in card.text
    run("sample", "--heads", REPO, "--ckpt", "toy.json", "--seeds", "0-31", "--compare",
        "--out", "again.png", "--trajectory", "strip.png")  # fmt: skip
    assert Path("again.png").read_bytes() == files["samples/before-after.png"]
    assert Path("strip.png").read_bytes() == files["samples/transition.png"]


def test_the_card_shows_what_was_measured():
    from ebm_prior.card import model_card

    config = json.loads((CHECKPOINTS / "nvae_mnist/heads/config.json").read_text())
    card = ModelCard(model_card(config, REPO, ["samples/before-after.png"]))
    (index,) = card.data.to_dict()["model-index"]
    values = {m["type"]: m["value"] for m in index["results"][0]["metrics"]}
    assert values["frechet-distance"] == 5.3253 and index["name"] == "heads"
    assert "MNIST classifier (64) features, 2000 samples" in card.content
    assert card.data.datasets == ["ylecun/mnist"]
    assert "| Gaussian prior | 25.83 | 0.752 | 0.861 | 2000 |" in card.text
    assert f"ebm-prior evaluate --heads {REPO} --ckpt checkpoint.pt -n 2000\n" in card.text
    for lost in ("energy", "gap_closed"):
        del config["training"]["evaluation"][lost]
        assert "model-index" not in model_card(config, REPO)


def test_a_measured_evaluation_is_recorded(hub, world):
    x = torch.rand(120, 8, 8).mul(255).byte().numpy()
    np.savez("x.npz", x_train=x[:60], x_test=x[60:])
    run("evaluate", "--heads", "heads", "--ckpt", "toy.json", "--data", "x.npz", "-n", 40,
        "--steps", 2, "--record")  # fmt: skip
    run("push", "heads", REPO, "--no-pictures")
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    card.validate()
    found = json.loads(Path("heads/config.json").read_text())["training"]["evaluation"]
    assert found["gap_closed"] is None  # heads and backbone are random: there is no gap
    values = {r.metric_type: r.metric_value for r in card.data.eval_results}
    assert values == {
        {"frechet": "frechet-distance"}.get(name, name): round(found["energy"][name], 4)
        for name in ("frechet", "precision", "recall")
    }
    assert "-n 40 --data x.npz --transition pcnl --steps 2 --step-size 0.3" in card.text


def test_a_card_of_ones_own(hub, world):
    Path("mine.md").write_text("# Heads without metadata\n")
    line = run("push", "heads", REPO, "--no-pictures", "--card", "mine.md", code=1)
    assert "lack library_name" in line and REPO not in hub.repos
    Path("mine.md").write_text("---\nlibrary_name: [\n---\n# Broken\n")
    assert "cannot be read" in run("push", "heads", REPO, "--card", "mine.md", code=1)
    Path("mine.md").write_text(
        "---\nlibrary_name: ebm-prior\nlicense: mit\ntags: [vae]\n---\n# My own words\n"
    )
    run("push", "heads", REPO, "--no-pictures", "--card", "mine.md")
    assert b"My own words" in hub.files(REPO)["README.md"]


def test_a_backbone_travels_where_its_licence_allows(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(CHECKPOINTS / "nvae_digits", "nvae")
    push = ["push", "nvae/heads", REPO, "--ckpt", "nvae/checkpoint.pt", "--no-pictures"]
    Path("nvae/card.json").rename("nvae/gone.json")
    config = json.loads(Path("nvae/heads/config.json").read_text())
    del config["backbone"]["license"]
    Path("nvae/heads/config.json").write_text(json.dumps(config))
    assert "licence is not known" in run(*push, "--with-backbone", code=1)
    line = run(*push, "--with-backbone", "--backbone-license", "cc-by-nc-4.0", code=1)
    assert "cc-by-nc-4.0" in line and REPO not in hub.repos
    Path("nvae/gone.json").rename("nvae/card.json")
    run(*push, "--with-backbone")
    assert "backbone.safetensors" in hub.files(REPO)
    card = ModelCard(hub.files(REPO)["README.md"].decode())
    card.validate()
    assert "ebm-prior fit --backbone nvae --ckpt heads/backbone.safetensors\n" in card.text
    sample = ["sample", "--seeds", "0-2", "--steps", 2]
    run(*sample, "--heads", "nvae/heads", "--ckpt", "nvae/checkpoint.pt", "--out", "a.npz")
    run(*sample, "--heads", REPO, "--out", "b.npz")  # no --ckpt
    run("pull", REPO, "--with-backbone", "--out", "pulled")
    run(*sample, "--heads", "pulled", "--out", "c.npz")
    np.testing.assert_array_equal(pixels("a.npz"), pixels("b.npz"))
    np.testing.assert_array_equal(pixels("a.npz"), pixels("c.npz"))
    again = ["push", "pulled", "user/again", "--no-pictures"]
    run(*again)
    assert "converted" not in json.loads(hub.files("user/again")["config.json"])["backbone"]
    run(*again, "--with-backbone")
    assert hub.files("user/again") == hub.files(REPO) | {
        "README.md": hub.files("user/again")["README.md"]
    }
    path = Path("pulled/backbone.safetensors")
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    assert "not the backbone" in run(*sample, "--heads", "pulled", code=1)
    run(*push)
    hub.put("user/bare", {k: v for k, v in hub.files(REPO).items() if "backbone" not in k})
    line = run("pull", "user/bare", "--with-backbone", code=1)
    assert "backbone" in line


@pytest.mark.parametrize("name", ["biva_mnist", "hvae_mnist"])
def test_a_backbone_in_several_files_travels_as_one(hub, tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    shipped = CHECKPOINTS / name
    run("push", shipped / "heads", REPO, "--no-pictures", "--with-backbone")
    fresh_cache(monkeypatch, tmp_path)
    run("pull", REPO, "--with-backbone", "--out", "pulled")
    sample = ["sample", "--seeds", "0-3", "--steps", 3]
    run(*sample, "--heads", shipped / "heads", "--ckpt", shipped, "--out", "a.npz")
    run(*sample, "--heads", "pulled", "--out", "b.npz")  # no --ckpt
    run(*sample, "--heads", "pulled", "--ckpt", shipped, "--out", "c.npz")
    for other in ("b.npz", "c.npz"):
        np.testing.assert_array_equal(pixels("a.npz"), pixels(other))
    found = json.loads(run("info", "pulled", "--json"))
    assert found["note"] is None and found["backbone"]["dataset"] == "mnist"
    # heads fitted on the one file fit the folder, and nothing else of the family
    backbone = ebm_prior.load_backbone(name.split("_")[0], "pulled/backbone.safetensors")
    EnergyPrior.for_backbone(backbone, heads="joint", nef=4, ndf=6).save_pretrained("own")
    run(*sample, "--heads", "own", "--ckpt", shipped, "--out", "d.npz")
    run("push", "own", "user/own", "--no-pictures", "--with-backbone",
        "--backbone-license", "mit", "--ckpt", "pulled/backbone.safetensors")  # fmt: skip
    assert hub.files("user/own")["backbone.safetensors"] == hub.files(REPO)["backbone.safetensors"]


def test_only_the_backbone_of_the_heads_is_pushed(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    push = ["push", CHECKPOINTS / "biva_mnist" / "heads", REPO, "--no-pictures", "--with-backbone"]
    other = Path(__file__).parent / "fixtures/biva/binmnist_biva/ckpt_torch13_py37_format"
    assert "is not the checkpoint" in run(*push, "--ckpt", other, code=1)
    shutil.copytree(CHECKPOINTS / "biva_mnist", "mine")
    config = json.loads(Path("mine/heads/config.json").read_text())
    del config["backbone"]["license"]
    Path("mine/heads/config.json").write_text(json.dumps(config))
    card = json.loads(Path("mine/card.json").read_text())
    Path("mine/card.json").write_text(json.dumps(card | {"sha256": "0" * 64}))
    push[1] = "mine/heads"
    assert "licence is not known" in run(*push, "--ckpt", "mine", code=1)
    Path("mine/card.json").write_text(json.dumps(card))
    run(*push, "--ckpt", "mine")
    assert json.loads(hub.files(REPO)["config.json"])["backbone"]["license"] == "Apache-2.0"


# -- the network fails ----------------------------------------------------------------------------

UPLOAD_CUTS = {
    "creating": Fault("POST /api/repos/create", cut="answer"),
    "preparing": Fault("POST .*/preupload", cut="request"),
    "listing large files": Fault("POST .*/lfs/objects/batch", cut="answer"),
    "half of a large file": Fault("PUT /lfs", cut="request"),
    "committing": Fault("POST .*/commit/", cut="request"),
    "committed, not told": Fault("POST .*/commit/", cut="answer"),
    "out of order": Fault("POST .*/commit/", status=503, times=2),
}
DOWNLOAD_CUTS = {
    "asking for the configuration": Fault("HEAD .*config.json", cut="answer"),
    "half of the configuration": Fault("GET .*config.json", cut=100),
    "asking for the weights": Fault("HEAD .*heads.safetensors", cut="answer"),
    "a tenth of the weights": Fault("GET /cdn/", cut=1000),
    "most of the weights, twice": Fault("GET /cdn/", cut=2500, times=2),
    "out of order": Fault("GET /cdn/", status=503),
}


def cases(faults):
    return [pytest.param(fault, id=name) for name, fault in faults.items()]


@pytest.mark.parametrize("fault", cases(UPLOAD_CUTS))
def test_a_connection_cut_while_pushing(hub, world, fault):
    hub.faults = [Fault(**vars(fault))]
    run("push", "heads", REPO, "--no-pictures")
    assert not hub.faults[0].times
    assert len([ref for ref, _ in hub.repos[REPO].history if ref == "main"]) == 2
    run("sample", "--heads", REPO, "--ckpt", "toy.json", "-n", 3, "--out", "a.npz")
    run("sample", "--heads", "heads", "--ckpt", "toy.json", "-n", 3, "--out", "b.npz")
    np.testing.assert_array_equal(pixels("a.npz"), pixels("b.npz"))


@pytest.mark.parametrize("fault", cases(UPLOAD_CUTS)[:5])
def test_nothing_is_half_visible_when_a_push_fails(hub, world, fault):
    hub.faults = [Fault(fault.request, fault.cut, times=1000)]
    line = run("push", "heads", REPO, "--no-pictures", code=1)
    assert f"cannot push to {REPO}: {hub.url} cannot be reached" in line
    if REPO in hub.repos:
        assert set(hub.files(REPO)) == {".gitattributes"}
    stored = len(hub.large)
    hub.faults = []
    hub.requests.clear()
    run("push", "heads", REPO, "--no-pictures")
    assert len(hub.asked("PUT /lfs")) == len(hub.large) - stored  # only what was missing


@pytest.mark.parametrize("fault", cases(DOWNLOAD_CUTS))
def test_a_connection_cut_while_pulling(hub, world, fault):
    hub.put(REPO, heads_files())
    hub.faults = [Fault(**vars(fault))]
    run("sample", "--heads", REPO, "--ckpt", "toy.json", "-n", 3, "--out", "a.npz")
    assert not hub.faults[0].times
    run("sample", "--heads", "heads", "--ckpt", "toy.json", "-n", 3, "--out", "b.npz")
    np.testing.assert_array_equal(pixels("a.npz"), pixels("b.npz"))


def test_a_download_resumes_where_it_was_cut(hub, world, monkeypatch):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 500)  # the client keeps whole chunks
    hub.put(REPO, heads_files())
    hub.faults = [Fault("GET /cdn/", cut=2100)]
    pull(REPO)
    assert hub.ranges == ["bytes=2000-"]


@pytest.mark.parametrize("fault", cases(DOWNLOAD_CUTS)[:5])
def test_nothing_is_half_visible_when_a_pull_fails(hub, world, tmp_path, fault):
    hub.put(REPO, heads_files())
    hub.faults = [Fault(fault.request, 0 if isinstance(fault.cut, int) else fault.cut, times=1000)]
    line = run("pull", REPO, "--out", "pulled", code=1)
    assert "cannot be reached; check the connection" in line
    assert not (tmp_path / "pulled" / "config.json").exists()
    assert not list((tmp_path / "cache").rglob("*.incomplete"))
    hub.faults = []
    run("pull", REPO, "--out", "pulled")
    assert (tmp_path / "pulled" / "config.json").exists()


class Shipped:
    """Shipped heads, loaded once; what they draw."""

    def __init__(self, folder):
        self.folder = folder / "heads"
        self.files = {p.name: p.read_bytes() for p in self.folder.iterdir()}
        source = open_source(self.folder)
        self.backbone = ebm_prior.load_backbone(
            source.config["backbone"]["name"], source.checkpoint()
        )
        self.pixels = self.draw(source)

    def draw(self, source):
        prior = EnergyPrior.from_pretrained(source, backbone=self.backbone)
        return prior.sample(2, steps=1, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=SHIPPED, ids=lambda p: p.name)
def shipped(request):
    return Shipped(request.param)


@pytest.mark.parametrize("fault", cases(UPLOAD_CUTS)[:5])
def test_the_line_goes_dead_while_shipped_heads_are_pushed(hub, shipped, fault):
    push = ["push", shipped.folder, REPO, "--no-pictures"]
    hub.faults = [Fault(fault.request, fault.cut, stays=True)]
    assert "cannot be reached" in run(*push, code=1)
    assert REPO not in hub.repos or set(hub.files(REPO)) == {".gitattributes"}
    hub.faults = []
    hub.requests.clear()
    stored = len(hub.large)
    run(*push)
    assert len(hub.asked("PUT /lfs")) == len(hub.large) - stored  # only what was missing
    assert len([ref for ref, _ in hub.repos[REPO].history if ref == "main"]) == 2
    assert hub.files(REPO)["heads.safetensors"] == shipped.files["heads.safetensors"]
    assert torch.equal(shipped.draw(REPO), shipped.pixels)


@pytest.mark.parametrize(
    ("request_", "cut"),
    [
        ("HEAD .*config.json", "answer"),
        ("GET .*config.json", 0.5),
        ("HEAD .*heads.safetensors", "answer"),
        ("GET /cdn/", 0.2),
        ("GET /cdn/", 0.9),
    ],
    ids=[*list(DOWNLOAD_CUTS)[:4], "most of the weights"],
)
def test_the_line_goes_dead_while_shipped_heads_are_pulled(
    hub, shipped, tmp_path, monkeypatch, request_, cut
):
    monkeypatch.setattr(constants, "DOWNLOAD_CHUNK_SIZE", 10_000)
    hub.put(REPO, shipped.files)
    if cut != "answer":
        name = "config.json" if "config" in request_ else "heads.safetensors"
        cut = int(cut * len(shipped.files[name]))
    out = tmp_path / "pulled"
    hub.faults = [Fault(request_, cut, stays=True)]
    assert "cannot be reached" in run("pull", REPO, "--out", out, code=1)
    assert not out.exists() or not list(out.iterdir())
    with pytest.raises(EbmPriorError, match="cannot be reached"):
        shipped.draw(REPO)
    # cut once and back again, the client goes on where it was
    hub.faults, hub.ranges = [Fault(request_, cut)], []
    run("pull", REPO, "--out", out)
    assert not hub.faults[0].times
    if "cdn" in request_:
        assert hub.ranges == [f"bytes={cut // 10_000 * 10_000}-"]
    for name in ("config.json", "heads.safetensors"):
        assert (out / name).read_bytes() == shipped.files[name]
    for source in (out, REPO):
        assert torch.equal(shipped.draw(source), shipped.pixels)


def test_no_network_at_all(hub, world, monkeypatch):
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE",
        "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}",
    )  # fmt: skip
    assert "http://127.0.0.1:9 cannot be reached" in run("pull", REPO, code=1)
    line = run("push", "heads", REPO, "--no-pictures", code=1)
    assert "http://127.0.0.1:9 cannot be reached" in line


def test_offline_is_said(hub, world, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE is set" in run("pull", REPO, code=1)
    assert "unset it to push" in run("push", "heads", REPO, code=1)


# -- the Hub refuses ------------------------------------------------------------------------------


def test_tokens(hub, world, monkeypatch):
    hub.put("user/private", heads_files(), private=True)
    assert "may not do that" in run(
        "push", "heads", REPO, "--no-pictures", "--token", "hf_read", code=1
    )
    assert "may not do that" in run("push", "heads", "them/x", "--no-pictures", code=1)
    assert "refused the token" in run(
        "push", "heads", REPO, "--no-pictures", "--token", "hf_wrong", code=1
    )
    assert "refused the token" in run("pull", "user/private", "--token", "hf_wrong", code=1)
    run("pull", "user/private", "--token", "hf_read")
    monkeypatch.delenv("HF_TOKEN")
    fresh_cache(monkeypatch, Path.cwd())
    line = run("push", "heads", REPO, code=1)
    assert "no Hub token; log in with: hf auth login" in line
    assert "a private one; log in with" in run("pull", "user/private", code=1)


def test_what_does_not_exist(hub, world):
    line = run("sample", "--heads", "user/nothing", "--ckpt", "toy.json", code=1)
    assert "there is no such local folder" in line and f"{hub.url} has no repository" in line
    hub.put(REPO, heads_files())
    assert "no such revision" in run("pull", f"{REPO}@v9", code=1)
    hub.put("user/empty", {"README.md": b"nothing"})
    line = run("pull", "user/empty", code=1)
    assert "fetch config.json of user/empty: the repository holds no such file" in line
    hub.put("user/pickles", {"config.json": changed_config(), "heads.pt": b"\x80\x02}q\0."})
    line = run("pull", "user/pickles", code=1)
    assert "fetch heads.safetensors" in line and "pickles least of all" in line
    assert not hub.asked("heads.pt")
    for name in ("nonsense", "a/b/c", "user/na me", "../up"):
        assert f"no heads at {name}: expected a saved folder" in run("pull", name, code=1)
    assert "is no name of a repository" in run("push", "heads", "a/b/c", code=1)
    assert "is no folder of heads" in run("push", "nowhere", REPO, code=1)
    assert "is a local folder already" in run("pull", "heads", code=1)
    Path("heads/heads.safetensors").unlink()
    assert "holds no heads.safetensors" in run("push", "heads", REPO, code=1)


@pytest.mark.parametrize(
    "request_, status, message",
    [
        ("POST .*/commit/", 409, "somebody else changed it"),
        ("POST .*/commit/", 412, "somebody else changed it"),
        ("POST .*/commit/", 500, "in trouble (HTTP 500)"),
        ("POST .*/commit/", 429, "too many requests"),
        ("POST .*/preupload/", 429, "too many requests"),
        ("POST .*/create", 503, "in trouble (HTTP 503)"),
        ("POST .*/validate-yaml", 504, "in trouble (HTTP 504)"),
    ],
)
def test_errors_of_the_hub_while_pushing(hub, world, request_, status, message):
    hub.faults = [Fault(request_, status=status, times=1000)]
    assert message in run("push", "heads", REPO, "--no-pictures", code=1)
    assert REPO not in hub.repos or set(hub.files(REPO)) == {".gitattributes"}


@pytest.mark.parametrize("status", [429, 500, 502, 503])
def test_errors_of_the_hub_while_pulling(hub, world, status):
    hub.put(REPO, heads_files())
    hub.faults = [Fault("HEAD", status=status, times=1000)]
    message = "too many requests" if status == 429 else f"in trouble (HTTP {status})"
    assert message in run("pull", REPO, code=1)


# -- hostile repositories -------------------------------------------------------------------------


class Bomb:
    """Unpickling it writes a file."""

    def __reduce__(self):
        return (os.mkdir, ("executed",))


def safetensors_of(header, body=b""):
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body


def poisoned(change):
    state = load_file("heads/heads.safetensors")
    return save(change(state))


def with_nan(state):
    next(iter(state.values())).flatten()[0] = torch.nan
    return state


def in_integers(state):
    return {key: value.int() for key, value in state.items()}


def transposed(state):
    return {k: v.flatten()[None] if v.ndim == 2 else v for k, v in state.items()}


HOSTILE = {
    "a pickle named like weights": (
        lambda: {"heads.safetensors": pickle.dumps(Bomb()) + bytes(6000)},
        "not a readable safetensors file",
    ),
    "a symbolic link": (lambda: {"config.json": b"../../../../etc/passwd"}, "not readable JSON"),
    "a link for weights": (lambda: {"heads.safetensors": b"/etc/passwd"}, "cannot be the"),
    "file names with ../": (
        lambda: {
            "../../evil.json": b"{}",
            "config.json": changed_config(backbone__sha256="0" * 64),
        },
        "SHA-256",
    ),
    "a 10 GB tensor in the header": (
        lambda: {
            "heads.safetensors": safetensors_of(
                {
                    "0.layers.0.weight": {
                        "dtype": "F32",
                        "shape": [50000, 50000],
                        "data_offsets": [0, 10**10],
                    }
                },
                bytes(6000),
            )  # fmt: skip
        },
        "not a readable safetensors file",
    ),
    "a 10 GB file": (
        lambda: {"heads.safetensors": File(b"small\0", True, 10 << 30)},
        "10737418240 bytes, which cannot be",
    ),
    "no finite numbers": (lambda: {"heads.safetensors": poisoned(with_nan)}, "no finite numbers"),
    "no floating-point numbers": (
        lambda: {"heads.safetensors": poisoned(in_integers)},
        "no floating-point numbers",
    ),
    "wrong shapes": (lambda: {"heads.safetensors": poisoned(transposed)}, "does not fit its"),
    "truncated weights": (
        lambda: {"heads.safetensors": heads_files()["heads.safetensors"][:-9]},
        "not a readable safetensors file",
    ),
    "code beside heads that do not load": (
        lambda: {
            "modeling.py": b"import os; os.mkdir('executed')",
            "__init__.py": b"import os; os.mkdir('executed')",
            "config.json": changed_config(auto_map={"AutoModel": "modeling.X"}, heads__nef="4"),
        },
        "field heads.nef is missing or of a wrong type",
    ),
    "a huge configuration": (
        lambda: {"config.json": b'{"a": "' + b"x" * (2 << 20) + b'"}'},
        "most",
    ),
    "endless nesting": (lambda: {"config.json": b"[" * 500_000}, "not readable JSON"),
    "another backbone": (
        lambda: {"config.json": changed_config(backbone__groups=[["z0", [3]], ["z1", [3]]])},
        "its groups and features are",
    ),
    "a future version": (
        lambda: {"config.json": changed_config(format_version=2)},
        "format version 2, this library reads up to 1; update with: pip install -U ebm-prior",
    ),
    "endless groups": (
        lambda: {"config.json": changed_config(backbone__groups=[["a", [1]]] * 5000)},
        "backbone.groups must list 1 to 1024",
    ),
    "huge heads": (
        lambda: {"config.json": changed_config(heads__nef=65536, heads__ndf=65536)},
        "parameters; at most",
    ),
    "huge linear layers": (
        lambda: {"config.json": changed_config(heads__layers=[[65536] * 16] * 3)},
        "parameters; at most",
    ),
    "layers without end": (
        lambda: {"config.json": changed_config(heads__layers=[[1] * 30_000] * 3)},
        "field heads.layers is wrong",
    ),
    "a control character": (
        lambda: {"config.json": changed_config(backbone__name="\x1b[2J")},
        "field backbone.name must be one printable line",
    ),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_repositories_are_refused(hub, world, tmp_path, kind):
    make, message = HOSTILE[kind]
    hub.put(REPO, heads_files() | make())
    before = {p for p in tmp_path.rglob("*")}
    line = run("sample", "--heads", REPO, "--ckpt", "toy.json", "--out", "x.npz", code=1)
    assert any(part in line for part in message.split("|")), line
    assert len(line) < 600 and line.isprintable()
    new = {p for p in tmp_path.rglob("*")} - before
    assert not (tmp_path / "executed").exists()
    assert all(p.is_relative_to(tmp_path / "cache") for p in new), new
    names = {p.name for p in new if "snapshots" in str(p) and not p.is_dir()}
    assert names <= {"config.json", "heads.safetensors"}
    assert not hub.asked("evil|modeling|__init__")
    if "bytes, which" in message or kind.startswith("huge "):
        assert not hub.asked("GET /cdn")  # refused before it was fetched
    if kind == "a huge configuration":
        assert not hub.asked("GET .*config.json")


def test_hostile_folders_are_refused_like_repositories(world, tmp_path):
    """What a clone of a repository may hold: links that lead out of it."""
    Path("heads/config.json").unlink()
    Path("heads/config.json").symlink_to("/etc/hostname")
    assert "not readable JSON" in run("sample", "--heads", "heads", code=1)
    Path("heads/config.json").unlink()
    Path("heads/config.json").symlink_to("/dev/zero")
    assert "holds no config.json" in run("sample", "--heads", "heads", code=1)


def test_a_stranger_does_not_choose_local_files(hub, world):
    """A repository's configuration names a checkpoint and data of this machine: ignored."""
    config = changed_config(
        backbone__path=str(Path("toy.json").absolute()),
        training={"data": {"source": str(Path.cwd()), "resize": False, "limit": None}},
    )
    hub.put(REPO, heads_files() | {"config.json": config})
    source = open_source(REPO)
    assert "path" not in source.config["backbone"] and "data" not in source.config["training"]
    assert "give the checkpoint with --ckpt" in run("sample", "--heads", REPO, code=1)
    run("pull", REPO, "--out", "pulled")
    assert os.getcwd() not in Path("pulled/config.json").read_text()


def test_a_different_checkpoint_must_be_allowed(hub, world):
    hub.put(REPO, heads_files())
    Path("other.json").write_text('{"top": 2, "bottom": 3, "size": 8, "seed": 4}')
    sample = ["sample", "--heads", REPO, "--ckpt", "other.json", "-n", 1, "--out", "x.npz"]
    assert "--any-backbone" in run(*sample, code=1)
    assert not hub.asked("GET /cdn")  # the weights are not even fetched
    run(*sample, "--any-backbone")
    with pytest.raises(EbmPriorError, match="its groups and features are 2 3"):
        EnergyPrior.from_pretrained(REPO, backbone=ToyBackbone(bottom=5))


def test_pull_does_not_overwrite(hub, world):
    hub.put(REPO, heads_files())
    assert "already holds heads" in run("pull", REPO, "--out", "heads", code=1)
    out = json.loads(run("pull", REPO, "--out", "new", "--json"))
    assert out == {"repo_id": REPO, "folder": "new"}
    assert {p.name for p in Path("new").iterdir()} == {
        "config.json", "heads.safetensors", "README.md",
    }  # fmt: skip


def test_info_describes_heads_on_the_hub(hub, world):
    hub.put(REPO, heads_files())
    found = json.loads(run("info", REPO, "--json"))
    assert found["what"] == "heads" and found["source"] == REPO
    assert found["heads"]["parameters"] == sum(p.numel() for p in world.heads.parameters())
    assert "no repository" in run("info", "user/nothing", code=1)


def test_listed_layers_travel(hub, world):
    prior = EnergyPrior.for_backbone(world.backbone, nef=4, layers=((3, 2), (5, 4, 3)))
    prior.save_pretrained("listed")
    run("push", "listed", REPO, "--no-pictures")
    again = EnergyPrior.from_pretrained(REPO, backbone=world.backbone)
    assert again.layers == ((3, 2), (5, 4, 3))
    assert "linear layers 3-2, 5-4-3" in run("info", REPO, "--ckpt", "toy.json")
    assert json.loads(run("info", REPO, "--json"))["heads"]["layers"] == [[3, 2], [5, 4, 3]]


def test_the_cache_is_not_written_to(hub, world, tmp_path):
    """Even where another program has fetched the whole repository into it."""
    hub.put(REPO, heads_files() | {"samples/a.png": b"\x89PNG\0"})
    folder = snapshot_download(REPO)
    out = run("sample", "--heads", REPO, "--ckpt", "toy.json", "-n", 1, "--steps", 2)
    assert out.strip() == "1 images -> steps2-seed0.png" and Path("steps2-seed0.png").exists()
    assert len(list((Path(folder) / "samples").iterdir())) == 1
    record = ["evaluate", "--heads", REPO, "--ckpt", "toy.json", "--record"]
    assert "local folder" in run(*record, code=2)


def test_push_prints_json(hub, world):
    result = CliRunner().invoke(main, ["push", "heads", REPO, "--no-pictures", "--json"])
    assert json.loads(result.stdout)["url"].startswith(hub.url)


def test_pictures_need_a_backbone(hub, world):
    Path("toy.json").rename("elsewhere.json")  # or it is found beside the folder
    assert "--no-pictures" in run("push", "heads", REPO, code=1)


def test_the_server_is_one_the_client_knows(hub, world):
    """The parts of the interface that heads do not use but honest pushing relies on."""
    api = HfApi()
    assert api.whoami()["name"] == "user"
    run("push", "heads", REPO, "--ckpt", "toy.json", "--branch", "v1")
    assert api.repo_exists(REPO) and not api.repo_exists("user/other")
    assert {b.name for b in api.list_repo_refs(REPO).branches} == {"main", "v1"}
    tree = {f.path: f for f in api.list_repo_tree(REPO, revision="v1")}
    assert tree["heads.safetensors"].lfs.size == len(heads_files()["heads.safetensors"])
    assert tree["config.json"].lfs is None


def test_strange_records_make_no_numbers(world):
    """A configuration is free to hold anything under `training`; the card shows none of it."""
    from ebm_prior.card import model_card

    quality = {"frechet": 1.0, "precision": 1.0, "recall": 1.0, "n": 5, "features": "x\n# Title"}
    found = dict.fromkeys(("gaussian", "energy", "reconstruction"), quality) | {"gap_closed": 0.5}
    for training in (
        {"evaluation": found},
        {"evaluation": found | {"energy": None}},
        {"evaluation": [1]},
        {"fit": [], "result": 3, "evaluation": "good"},
        {"fit": {"nef": [], "seed": {"a": 1}}},
    ):
        config = json.loads(changed_config(training=training))
        card = model_card(config, REPO)
        assert "model-index" not in card and "# Title" not in card
