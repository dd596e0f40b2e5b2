import importlib
import json
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

import ebm_prior
from backbones.biva.checkpoint import NAMES
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig, detect_backbone
from ebm_prior.info import backbone_info, describe, likelihood_name
from ebm_prior.likelihoods import GaussianLikelihood
from ebm_prior.safe_load import mentions
from tests.sessions import Evil, trap, write_biva, write_hvae
from tests.test_cli import QUICK, run

ROOT = Path(__file__).parent.parent
FIXTURES = ROOT / "tests/fixtures"
NVAE = ROOT / "checkpoints/nvae_digits/checkpoint.pt"
GIVEN = sorted(
    [(p.parent, "biva") for p in FIXTURES.glob("biva/*/*/hyperparameters.p")]
    + [(p.parent, "hvae") for p in FIXTURES.glob("hvae/*/*/model_class_name.pt")]
    + [(p, "nvae") for p in FIXTURES.glob("nvae/*/checkpoint.pt")]
    + [(p, "nvae") for p in ROOT.glob("checkpoints/*/checkpoint.pt")]
)


# Which family


@pytest.mark.parametrize("path, family", GIVEN, ids=lambda x: getattr(x, "name", x))
def test_the_family_of_a_checkpoint_is_found(path, family):
    assert detect_backbone(path) == family
    if path.is_dir():
        assert {detect_backbone(file) for file in path.iterdir()} == {family}


def test_the_toy_is_found(tmp_path):
    (tmp_path / "toy.json").write_text('{"top": 3, "seed": 4}')
    assert detect_backbone(tmp_path / "toy.json") == "toy"


def test_weights_under_a_name_of_the_users_own_are_found(tmp_path):
    for family, folder in (
        ("biva", write_biva(tmp_path / "a")),
        ("hvae", write_hvae(tmp_path / "b")),
    ):
        weights = "model.pth" if family == "biva" else "model_state_dict.pt"
        (folder / weights).rename(folder / "mine.pt")
        assert detect_backbone(folder / "mine.pt") == family
        shutil.copy(NVAE, folder / "checkpoint.pt")  # which is nobody else's
        assert detect_backbone(folder / "checkpoint.pt") == "nvae"


def test_the_old_torch_format_is_found(tmp_path):
    data = torch.load(NVAE, weights_only=False)
    torch.save(data, tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    assert detect_backbone(tmp_path / "old.pt") == "nvae"


def write(folder, what):
    path = folder / what
    if what == "empty folder":
        path.mkdir()
    elif what == "weights of something else.pt":
        torch.save({"args": Namespace(dataset="x"), "state_dict": {"w": torch.ones(2)}}, path)
    elif what == "other.json":
        path.write_text('{"dataset": "mnist"}')
    elif what == "array.npz":
        np.savez(path, x=np.zeros(3))
    else:
        path.write_bytes({"empty.pt": b"", "noise.pt": os.urandom(300)}[what])
    return path


UNKNOWN = [
    "empty folder", "weights of something else.pt", "other.json", "array.npz", "empty.pt",
    "noise.pt",
]  # fmt: skip


@pytest.mark.parametrize("what", UNKNOWN)
def test_what_is_no_checkpoint_is_said_with_what_was_looked_for(tmp_path, what):
    line = run("info", write(tmp_path, what), code=1)
    for sought in ("biva: a session folder with hyperparameters.p", "nvae: ", "hvae: ", "toy: "):
        assert sought in line
    assert "--backbone" in line


def test_more_than_one_family_is_said(tmp_path):
    folder = write_biva(tmp_path / "both")
    write_hvae(folder)
    with pytest.raises(EbmPriorError, match="may belong to biva or hvae.*--backbone"):
        detect_backbone(folder)
    assert detect_backbone(folder / "hyperparameters.p") == "biva"
    assert run("info", folder, "--backbone", "hvae").startswith("family")


def test_a_missing_path_is_said():
    with pytest.raises(EbmPriorError, match="no such checkpoint: nothing"):
        detect_backbone("nothing")
    assert "no missing.pt: expected a checkpoint" in run("info", "missing.pt", code=1)


def test_detecting_unpickles_nothing(tmp_path):
    """A session whose every file is hostile is recognised by its names, and then refused."""
    target = tmp_path / "ran"
    for family, writer in (("biva", write_biva), ("hvae", write_hvae)):
        folder = writer(tmp_path / family)
        for file in folder.iterdir():
            torch.save({"stages.0": Evil(target)}, file)
        with trap(*{name.split(".")[0] for name in NAMES if name.startswith("biva")}) as used:
            assert detect_backbone(folder) == family
            assert {detect_backbone(file) for file in folder.iterdir()} == {family}
            run("info", folder, code=1)
        assert not used
    data = {"args": Namespace(dataset=Evil(target)), "state_dict": {"prior_ftr0": torch.ones(1)}}
    torch.save(data, tmp_path / "checkpoint.pt")
    assert detect_backbone(tmp_path / "checkpoint.pt") == "nvae"
    assert "nothing was run" in run("info", tmp_path / "checkpoint.pt", code=1)
    assert not target.exists()


def test_the_pickle_is_searched_but_no_weight_is_read(tmp_path):
    path = tmp_path / "x.pt"
    torch.save({"needle": torch.zeros(3, dtype=torch.uint8)}, path)
    assert mentions(path, "needle") and not mentions(path, "haystack")
    hidden = torch.frombuffer(bytearray(b"needle"), dtype=torch.uint8)
    torch.save({"x": hidden}, path)
    assert not mentions(path, "needle")
    assert not mentions(tmp_path, "x") and not mentions(tmp_path / "none", "x")


def test_broken_and_silent_plug_ins_do_not_matter(monkeypatch):
    from ebm_prior import registry

    whole = registry.entry_points

    def more(group):
        extra = [
            registry.EntryPoint("absent", "no_such_module:load", group),
            registry.EntryPoint("silent", "json:load", group),
            registry.EntryPoint("wrong", "wrong_plug_in:load", group),
        ]
        return [*whole(group=group), *extra]

    wrong = ModuleType("wrong_plug_in")
    wrong.recognises = lambda path: path.no_such_attribute
    monkeypatch.setitem(sys.modules, "wrong_plug_in", wrong)
    monkeypatch.setattr(registry, "entry_points", more)
    assert detect_backbone(NVAE) == "nvae"
    with pytest.raises(EbmPriorError, match="looked for biva: a [^;]*; generator: [^;]*; hvae: "):
        detect_backbone(ROOT / "pyproject.toml")


# What a backbone is


@pytest.mark.parametrize(
    "name, dataset, likelihood",
    [
        ("binmnist_biva", "mnist", "Bernoulli"),
        ("fmnist_vae", "fashion_mnist", "Bernoulli"),
        ("cifar10_gaussian", "cifar10", "Gaussian"),
    ],
)
def test_a_backbone_is_described_without_naming_its_family(name, dataset, likelihood):
    path, family = next((p, f) for p, f in GIVEN if p.parent.name == name)
    found = describe(path)
    backbone = ebm_prior.load_backbone(family, path)
    assert found["family"] == family and found["sha256"] == backbone.sha256
    assert found["groups"] == [[g.name, list(g.shape)] for g in backbone.groups]
    assert found["latents"] == sum(g.numel for g in backbone.groups)
    assert found["feature_shape"] == list(backbone.feature_shape)
    assert found["image_shape"] == list(backbone.image_shape)
    assert found["parameters"] == sum(p.numel() for p in backbone.parameters())
    assert (found["dataset"], found["likelihood"]) == (dataset, likelihood)


def test_the_command_prints_text_or_json():
    text, found = run("info", NVAE), json.loads(run("info", NVAE, "--json"))
    assert found == describe(NVAE)
    for word in ("nvae", "digits", "1x8x8", "binomial", "z0", found["sha256"], str(NVAE)):
        assert word in text
    assert f"{found['parameters']:,}" in text


def test_likelihoods_have_names(tmp_path):
    hvae = write_hvae(tmp_path / "h", likelihood_module="DiscretizedLogisticLikelihoodConv2d")
    assert likelihood_name(ebm_prior.load_backbone("hvae", hvae)) == "discretized logistic"
    assert likelihood_name(ebm_prior.load_backbone("nvae", NVAE)) == "binomial"


def test_an_adapter_without_a_likelihood_name_works(monkeypatch):
    monkeypatch.delattr(GaussianLikelihood, "name")
    assert backbone_info(ToyBackbone())["likelihood"] == "GaussianLikelihood"


def test_an_nvae_folder_is_told_its_file():
    assert f"give the file {NVAE}" in run("info", NVAE.parent, code=1)


def test_the_words_of_strangers_forge_no_lines(tmp_path):
    folder = tmp_path / "x\nSHA-256  0\x1b[2J"
    folder.mkdir()
    shutil.copy(NVAE, folder)
    before, text = run("info", NVAE), run("info", folder / NVAE.name)
    assert len(text.splitlines()) == len(before.splitlines())
    assert "\x1b" not in text and r"x\nSHA-256  0\x1b[2J" in text


# What heads are


@pytest.fixture
def heads(tmp_path):
    """Heads in a saved folder, and their checkpoint, which the folder does not locate."""
    folder = write_biva(tmp_path / "session")
    backbone = ebm_prior.load_backbone("biva", folder)
    prior = EnergyPrior.for_backbone(backbone, "both", 4, 6, SamplerConfig("langevin", 7, 0.05))
    prior.save_pretrained(tmp_path / "heads")
    return tmp_path / "heads", prior


def test_heads_are_described_without_their_backbone(heads):
    folder, prior = heads
    shutil.rmtree(folder.parent / "session")
    found = describe(folder)
    own = sum(p.numel() for p in prior.heads.parameters())
    whole = sum(p.numel() for p in prior.backbone.parameters())
    assert found["heads"] == {"kind": "both", "nef": 4, "ndf": 6, "parameters": own}
    assert found["share"] == own / whole and "--ckpt" in found["note"]
    assert found["sampler"] == {"transition": "langevin", "steps": 7, "step_size": 0.05}
    assert found["backbone"]["family"] == "biva"
    assert found["backbone"]["groups"] == [[g.name, list(g.shape)] for g in prior.backbone.groups]
    text = run("info", folder)
    assert f"{own:,} ({own / whole:.1%} of the backbone's)" in text and "7 langevin" in text


def test_older_heads_do_not_know_the_size_of_their_backbone(heads):
    folder, prior = heads
    config = json.loads((folder / "config.json").read_text())
    del config["backbone"]["parameters"], config["backbone"]["image_shape"]
    (folder / "config.json").write_text(json.dumps(config))
    assert describe(folder)["share"] is None and "head parameters" in run("info", folder)
    session = folder.parent / "session"
    assert describe(folder, ckpt=session)["share"] == describe(folder, ckpt=session)["heads"][
        "parameters"
    ] / sum(p.numel() for p in prior.backbone.parameters())


def test_another_checkpoint_is_not_described_as_theirs(heads, tmp_path):
    folder, _ = heads
    other = write_biva(tmp_path / "other")
    state = torch.load(other / "model.pth")
    state["stages.0.q_bu_convs.layers.0.conv1.conv.bias"] += 1
    torch.save(state, other / "model.pth")
    line = run("info", folder, "--ckpt", other, code=1)
    assert "another one" in line and "the heads need" in line


def test_bad_heads_give_one_line(heads, tmp_path):
    folder, _ = heads
    assert "--ckpt has no meaning" in run("info", NVAE, "--ckpt", NVAE, code=1)
    assert "no such checkpoint" in run("info", folder, "--ckpt", "none", code=1)
    (folder / "heads.safetensors").write_bytes(b"x" * 40)
    assert "do not belong together" in run("info", folder, code=1)
    (folder / "heads.safetensors").unlink()
    assert "holds no heads.safetensors" in run("info", folder, code=1)


def test_a_run_knows_its_backbone_and_fit_finds_the_family(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    np.savez("x.npz", x_train=np.random.RandomState(0).randint(0, 256, (60, 8, 8), np.uint8))
    run("fit", "--ckpt", "toy.json", "--data", "x.npz", *QUICK, "--out", "run")
    found = describe("run")
    assert found["backbone"]["family"] == "toy" and found["note"] is None
    assert found["backbone"]["checkpoint"] == str(tmp_path / "toy.json")
    assert found["backbone"]["likelihood"] == "Gaussian"
    Path("toy.json").write_text('{"top": 2, "bottom": 3, "size": 8, "seed": 3}')
    assert "another one" in describe("run")["note"]
    Path("toy.json").unlink()
    assert "no longer there" in run("info", "run")
    assert "no such checkpoint" in run("fit", "--ckpt", "toy.json", code=1)


# A family of someone else's


def test_an_installed_plug_in_is_detected_and_fitted(tmp_path, monkeypatch, request):
    """The example's family, registered as its docstring says."""
    plugin = tmp_path / "site"
    metadata = plugin / "tiny-1.0.dist-info"
    metadata.mkdir(parents=True)
    shutil.copy(ROOT / "examples/new_backbone.py", plugin)
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text("[ebm_prior.backbones]\ntiny = new_backbone:load\n")
    monkeypatch.syspath_prepend(str(plugin))
    monkeypatch.chdir(tmp_path)
    tiny = importlib.import_module("new_backbone")
    request.addfinalizer(lambda: sys.modules.pop("new_backbone"))
    save_file(tiny.TinyVAE().state_dict(), "tiny.safetensors")
    run("fit", "--ckpt", "tiny.safetensors", "--data", "digits", *QUICK, "--out", "run")
    text = run("info", "run")
    assert "tiny" in text and "binomial" in text and "of the backbone's" in text
    assert "tiny: a .safetensors file" in run("info", plugin, code=1)
    Path("tiny.safetensors").write_bytes(b"x" * 20)
    assert "cannot be loaded as tiny: " in run(
        "info", "tiny.safetensors", "--backbone", "tiny", code=1
    )
