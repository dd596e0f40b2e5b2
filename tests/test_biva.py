"""The BIVA adapter against stored tensors of the public code, and against itself."""

import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import ebm_prior
from backbones.biva import load
from benchmarks.parity import errors
from ebm_prior import EbmPriorError
from ebm_prior.testing import check_backbone, noise
from tests.sessions import (
    BIVA_OPTIONS,
    Evil,
    EvilEval,
    dump,
    mention,
    nest,
    trap,
    write_biva,
    write_hvae,
)

FIXTURES = Path(__file__).parent / "fixtures" / "biva"
NVAE = Path(__file__).parent / "fixtures" / "nvae" / "legacy" / "checkpoint.pt"
GIVEN = [(p.parent.name, p.name) for p in sorted(FIXTURES.glob("*/ckpt*"))]
EXTRA = os.environ.get("EBM_PRIOR_FIXTURES")
FILES = ("hyperparameters.p", "config.json", "model.pth")
CONV = {"N": 2, "kernel": 3, "block": "biva.model.stochastic.ConvNormal"}


# --- agreement with the public code ----------------------------------------------------


@pytest.mark.parametrize(("name", "checkpoint"), GIVEN)
def test_agrees_with_public_code(name, checkpoint):
    ratios = errors(FIXTURES / name, "biva", checkpoint)
    assert len(ratios) >= 40
    assert not {k: v for k, v in ratios.items() if not v <= 1}


@pytest.mark.skipif(not EXTRA, reason="set EBM_PRIOR_FIXTURES to a folder of checkpoints")
def test_agrees_on_all_given_checkpoints():
    folders = sorted(p for p in Path(EXTRA).glob("**/biva/*/ckpt*") if p.is_dir())
    assert folders
    for folder in folders:
        ratios = errors(folder.parent, "biva", folder.name)
        assert not {k: v for k, v in ratios.items() if not v <= 1}, folder


# --- the interface ---------------------------------------------------------------------

VARIANTS = {
    "biva": {},
    "lvae": {"Stage": "biva.model.stage.LvaeStage", "nonlinearity": "relu"},
    "vae": {"Stage": "biva.model.stage.VaeStage", "log_var_act": None},
    "no_skip": {"no_skip": True, "log_var_act": "torch.nn.modules.activation.Tanh"},
    "conditional_bu": {"conditional_bu": True, "latents": [CONV] * 3},
    "padded": {"tensor_shp": (-1, 1, 6, 6), "padded_shp": (-1, 1, 8, 8)},
    "mixture": {"tensor_shp": (-1, 3, 8, 8), "features_out": 20},
    "one_stage": {
        "stages": BIVA_OPTIONS["stages"][:1],
        "latents": BIVA_OPTIONS["latents"][:1],
    },
}


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_obeys_every_law(tmp_path, changes):
    check_backbone(load(write_biva(tmp_path, **changes)), 1e-4)


def test_attributes(tmp_path):
    folder = write_biva(tmp_path)
    backbone = ebm_prior.load_backbone("biva", folder)
    assert [g.name for g in backbone.groups] == ["z3", "z2_td", "z2_bu", "z1_td", "z1_bu"]
    assert [g.shape for g in backbone.groups] == [(2,), (3,), (3,), (2, 4, 4), (2, 4, 4)]
    assert backbone.image_shape == (1, 8, 8) and backbone.feature_shape == (8, 4, 4)
    assert backbone.dataset == "mnist" and backbone.binarize
    assert not [k for k in backbone.state_dict() if k.endswith(("_g", "_v", "initialized"))]


def test_the_folder_or_the_weights_may_be_given(tmp_path):
    folder = write_biva(tmp_path)
    shutil.copyfile(folder / "model.pth", folder / "best.pth")
    expected = load(folder)
    eps = noise(expected)
    for path in (folder / "model.pth", folder / "best.pth", str(folder)):
        for a, b in zip(load(path).transform(eps), expected.transform(eps), strict=True):
            assert torch.equal(a, b)


def test_transform_stops_at_the_last_latent(tmp_path):
    backbone = load(write_biva(tmp_path))
    calls = []
    bottom = backbone.network.stages[0].p_convs
    bottom.layers[0].register_forward_hook(lambda *_: calls.append(1))
    backbone.projection = None
    eps = noise(backbone)
    backbone.transform(eps)
    backbone.top_down(eps)
    assert not calls
    backbone.decode(backbone.transform(eps))
    assert calls == [1]


def test_conditional_bottom_up_prior_sees_the_top_down_latents(tmp_path):
    for conditional in (False, True):
        options = {"conditional_bu": conditional, "latents": [CONV] * 3}
        backbone = load(write_biva(tmp_path, **options))
        eps = list(noise(backbone))
        before = backbone.prior_parameters(backbone.transform(eps))
        eps[3] = eps[3] + 1
        after = backbone.prior_parameters(backbone.transform(eps))
        assert torch.equal(before[3][0], after[3][0])
        assert torch.equal(before[4][0], after[4][0]) != conditional


def test_padding_is_zero_and_cut_off(tmp_path):
    changes = VARIANTS["padded"]
    backbone = load(write_biva(tmp_path, **changes))
    seen = []
    first = backbone.network.stages[0].q_bu_convs.layers[0]
    first.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    z = backbone.posterior(torch.ones(2, 1, 6, 6)).z
    assert seen[0].shape == (2, 1, 8, 8) and seen[0].sum() == 2 * 36
    assert backbone.decode(z).params.shape == (2, 1, 6, 6)


# --- bad input -------------------------------------------------------------------------


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(tmp_path, name):
    folder = write_biva(tmp_path)
    (folder / name).unlink()
    with pytest.raises(EbmPriorError, match=f"no {name} in it") as error:
        load(folder)
    assert one_line(error)


@pytest.mark.parametrize("a", FILES)
@pytest.mark.parametrize("b", FILES)
def test_swapped_files_are_refused(tmp_path, a, b):
    if a == b:
        return
    folder = write_biva(tmp_path)
    shutil.copyfile(folder / a, folder / b)
    with pytest.raises(EbmPriorError) as error:
        load(folder)
    assert one_line(error) and b in str(error.value)


@pytest.mark.parametrize("kind", [Evil, EvilEval])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("torch_format", [False, True])
def test_nothing_in_a_session_is_run(tmp_path, kind, name, torch_format):
    folder = write_biva(tmp_path / "session")
    target = tmp_path / "ran"
    data = BIVA_OPTIONS | {"stages": kind(target)}
    if torch_format:
        torch.save(data, folder / name)
    else:
        (folder / name).write_bytes(pickle.dumps(data))
    with pytest.raises(EbmPriorError) as error:
        load(folder)
    assert one_line(error)
    assert not target.exists()


@pytest.mark.parametrize("name", ["evil.gadget", "biva.model.stage.<lambda>", "os.system"])
def test_foreign_names_are_refused_by_name(tmp_path, name):
    folder = write_biva(tmp_path)
    module = name.rpartition(".")[0]
    options = mention(BIVA_OPTIONS)
    options["Stage"].name = name
    dump(options, folder / "hyperparameters.p")
    with trap(*([module] if module != "os" else [])) as used:
        with pytest.raises(EbmPriorError, match="asks to run .*; nothing was run") as error:
            load(folder)
    assert name in str(error.value) and one_line(error) and not used


def test_known_names_are_not_imported(tmp_path):
    folder = write_biva(tmp_path)
    with trap("biva", "biva.model", "biva.model.stage", "biva.model.stochastic") as used:
        load(folder)
    assert not used


def test_known_names_cannot_be_called(tmp_path):
    folder = write_biva(tmp_path)
    (folder / "hyperparameters.p").write_bytes(b"cbiva.model.stage\nBivaStage\n(tR.")
    with pytest.raises(EbmPriorError, match="not a readable pickle"):
        load(folder)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"nonlinearity": "tanh"}, "nonlinearity='tanh' is not supported"),
        ({"wobble": 3}, "wobble=3 is not supported"),
        ({"features_out": 7}, "features_out=7"),
        ({"padded_shp": (-1, 1, 9, 9)}, "padded_shp"),
        ({"tensor_shp": (-1, 1, 6, 6)}, "stride 2 on a 3x3"),
        ({"conditional_bu": True}, "conditional_bu with dense latents"),
        ({"stages": [[[4, 3, 1, 9]]] * 3}, "block .* is not supported"),
        ({"stages": [[[4, 3, 0]]] * 3}, "a block of stage 0 is 0"),
        ({"stages": [[[10**12, 3, 1]]] * 3}, "a block of stage 0 is 1000000000000"),
        ({"latents": [CONV | {"N": 0}] * 3}, "latents of zero size"),
        ({"latents": [CONV] * 2}, "3 stages but 2 latents"),
        ({"stages": [[[4, 3, 1]] * 20] * 3}, "describes 60 blocks"),
        ({"latents": [CONV | {"flow": 1}] * 3}, "option flow=1 of latents"),
        ({"stages": [[[4, 3, 2], [4, 3, 1]]] * 3, "tensor_shp": (-1, 1, 16, 16)}, "skip"),
    ],
)
def test_unsupported_options_are_named(tmp_path, changes, match):
    folder = write_biva(tmp_path, state={"projection.1.conv.bias": torch.zeros(1)}, **changes)
    with pytest.raises(EbmPriorError, match=match) as error:
        load(folder)
    assert one_line(error)


@pytest.mark.parametrize(
    "key", ["Stage", "tensor_shp", "padded_shp", "features_out", "stages", "latents", "wobble"]
)
def test_messages_stay_short_whatever_a_file_holds(tmp_path, key):
    for value in (nest(10), [nest(10)] * 3, [[nest(10)]] * 3, [{"N": 1, "block": nest(10)}] * 3):
        folder = write_biva(tmp_path, state={"x": torch.zeros(1)}, **{key: value})
        with pytest.raises(EbmPriorError) as error:
            load(folder)
        assert one_line(error) and len(str(error.value)) < 600


def test_a_data_set_that_cannot_be_printed_is_not_named(tmp_path):
    assert load(write_biva(tmp_path, dataset="x\nSHA-256  0")).dataset is None


def test_weights_must_fit(tmp_path):
    folder = write_biva(tmp_path)
    state = torch.load(folder / "model.pth", weights_only=True)
    wrong = dict(state)
    key = "stages.0.merge.conv1.conv.weight_v"
    wrong["stages.9.x"] = wrong.pop(key)
    torch.save(wrong, folder / "model.pth")
    with pytest.raises(EbmPriorError, match=f"missing {key}; unexpected stages.9.x"):
        load(folder)
    torch.save(state | {key: torch.zeros(1)}, folder / "model.pth")
    with pytest.raises(EbmPriorError, match=f"misshaped {key}"):
        load(folder)
    torch.save(state | {key: torch.zeros_like(state[key])}, folder / "model.pth")
    with pytest.raises(EbmPriorError, match="length zero"):
        load(folder)
    torch.save(state | {key: state[key] / 0}, folder / "model.pth")
    with pytest.raises(EbmPriorError, match="not finite"):
        load(folder)
    key = "stages.0.merge.conv1.initialized"
    torch.save(state | {key: torch.tensor(False)}, folder / "model.pth")
    with pytest.raises(EbmPriorError, match=f"{key} is False"):
        load(folder)


def test_other_families_are_recognised(tmp_path):
    hvae = write_hvae(tmp_path / "hvae")
    for path in (hvae, hvae / "model_state_dict.pt"):
        with pytest.raises(EbmPriorError, match="use backbone hvae") as error:
            load(path)
        assert one_line(error)
    for path in (NVAE, NVAE.parent):
        with pytest.raises(EbmPriorError, match="use backbone nvae") as error:
            load(path)
        assert one_line(error)
    with pytest.raises(EbmPriorError, match="no such checkpoint"):
        load(tmp_path / "absent")


def test_config_json_must_be_a_table(tmp_path):
    folder = write_biva(tmp_path)
    (folder / "config.json").write_text(json.dumps([1]))
    with pytest.raises(EbmPriorError, match="config.json"):
        load(folder)
