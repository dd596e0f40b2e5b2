"""The HVAE adapter against stored tensors of the public code, and against itself."""

import math
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

import ebm_prior
from backbones.hvae import load
from backbones.hvae.likelihoods import DiscretizedLogistic
from benchmarks.parity import errors
from ebm_prior import EbmPriorError
from ebm_prior.testing import check_backbone, noise
from tests.sessions import (
    HVAE_OPTIONS,
    Evil,
    EvilEval,
    hvae_block,
    nest,
    trap,
    write_biva,
    write_hvae,
)

FIXTURES = Path(__file__).parent / "fixtures" / "hvae"
NVAE = Path(__file__).parent / "fixtures" / "nvae" / "legacy" / "checkpoint.pt"
NAMES = sorted(p.name for p in FIXTURES.iterdir())
EXTRA = os.environ.get("EBM_PRIOR_FIXTURES")
FILES = ("model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt", "datamodule_config.pt")
STAGES = HVAE_OPTIONS["config_deterministic"]
LATENTS = HVAE_OPTIONS["config_stochastic"]


# --- agreement with the public code ----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_public_code(name):
    ratios = errors(FIXTURES / name, "hvae")
    assert len(ratios) >= 40
    assert not {k: v for k, v in ratios.items() if not v <= 1}


@pytest.mark.skipif(not EXTRA, reason="set EBM_PRIOR_FIXTURES to a folder of checkpoints")
def test_agrees_on_all_given_checkpoints():
    folders = sorted(p for p in Path(EXTRA).glob("**/hvae/*/ckpt*") if p.is_dir())
    assert folders
    for folder in folders:
        ratios = errors(folder.parent, "hvae", folder.name)
        assert not {k: v for k, v in ratios.items() if not v <= 1}, folder


# --- the interface ---------------------------------------------------------------------


def blocks(**changes):
    return [[block | changes for block in stage] for stage in STAGES]


VARIANTS = {
    "vae": {},
    "lvae": {"name": "LVAE", "activation": "LeakyReLU"},
    # strides in the last block, generative stacks not reversed
    "biva": {"name": "BIVA"},
    "biva_no_skip": {
        "name": "BIVA", "skip_stochastic": False, "config_deterministic": STAGES[:2],
        "config_stochastic": LATENTS[:2],
    },
    "no_skip": {"skip_stochastic": False, "activation": "Swish"},
    "gated": {"config_deterministic": blocks(gated=True), "activation": "ELU"},
    "plain_weights": {
        "config_deterministic": blocks(weightnorm=False),
        "config_stochastic": [c | {"weightnorm": False} for c in LATENTS],
    },
    "pswish": {"activation": "PSwish"},
    "resized": {
        "config_deterministic": blocks(upsampling_mode="nearest", downsampling_mode="bilinear")
    },
    "padded": {"input_shape": torch.Size([1, 6, 6]), "padded_shape": [8, 8]},
    "logistic": {
        "input_shape": torch.Size([3, 8, 8]),
        "likelihood_module": "DiscretizedLogisticLikelihoodConv2d",
    },
    "mixture": {
        "input_shape": torch.Size([3, 8, 8]), "activation": "PSwish",
        "likelihood_module": "DiscretizedLogisticMixLikelihoodConv2d",
    },
    "one_stage": {"config_deterministic": STAGES[:1], "config_stochastic": LATENTS[:1]},
}  # fmt: skip


@pytest.mark.parametrize("changes", VARIANTS.values(), ids=VARIANTS)
def test_obeys_every_law(tmp_path, changes):
    check_backbone(load(write_hvae(tmp_path, **changes)), 1e-4)


def test_attributes(tmp_path):
    backbone = ebm_prior.load_backbone("hvae", write_hvae(tmp_path, name="BIVA"))
    assert [g.name for g in backbone.groups] == ["z3", "z2_td", "z2_bu", "z1_td", "z1_bu"]
    assert backbone.dataset == "mnist" and backbone.binarize
    backbone = load(write_hvae(tmp_path, dataset="FashionMNISTBinarized"))
    assert [g.name for g in backbone.groups] == ["z3", "z2", "z1"]
    assert [g.shape for g in backbone.groups] == [(2,), (3,), (2, 4, 4)]
    assert backbone.dataset == "fashion_mnist" and backbone.feature_shape == (6, 4, 4)


def test_the_folder_or_the_weights_may_be_given(tmp_path):
    folder = write_hvae(tmp_path)
    expected = load(folder)
    eps = noise(expected)
    for path in (folder / "model_state_dict.pt", folder / "model_kwargs.pt", str(folder)):
        for a, b in zip(load(path).transform(eps), expected.transform(eps), strict=True):
            assert torch.equal(a, b)


def test_transform_runs_no_decoder(tmp_path):
    backbone = load(write_hvae(tmp_path))
    eps = noise(backbone)
    expected = backbone.transform(eps)
    backbone.network.likelihood = backbone.network.stages[0].p_deterministic = None
    for a, b in zip(backbone.top_down(eps)[0], expected, strict=True):
        assert torch.equal(a, b)


def test_unused_scalars_may_be_absent_or_vectors(tmp_path):
    folder = write_hvae(tmp_path, activation="PSwish")
    state = torch.load(folder / "model_state_dict.pt", weights_only=True)
    eps = noise(load(folder))
    expected = load(folder).transform(eps)
    used = "stages.0.q_deterministic.layers.1.activation_pre.beta"
    state[used] = state[used].reshape(1)
    del state["stages.0.q_deterministic.layers.0.activation_pre.beta"]
    torch.save(state, folder / "model_state_dict.pt")
    for a, b in zip(load(folder).transform(eps), expected, strict=True):
        assert torch.equal(a, b)
    del state[used]
    torch.save(state, folder / "model_state_dict.pt")
    with pytest.raises(EbmPriorError, match=f"missing {used}"):
        load(folder)


def test_dense_layers_without_weight_norm_need_no_initialisation(tmp_path):
    folder = write_hvae(tmp_path, **VARIANTS["plain_weights"])
    state = torch.load(folder / "model_state_dict.pt", weights_only=True)
    state["stages.2.stochastic.in_transform_q.initialized"] = torch.tensor(False)
    torch.save(state, folder / "model_state_dict.pt")
    load(folder)
    state["stages.0.stochastic.in_transform_q.initialized"] = torch.tensor(False)
    torch.save(state, folder / "model_state_dict.pt")
    with pytest.raises(EbmPriorError, match="in_transform_q.initialized is False"):
        load(folder)


def test_discretized_logistic_is_normalised_and_sampled_from():
    params = torch.tensor([-0.3, 1.4]).double().view(1, 2, 1, 1).repeat(256, 1, 1, 1)
    params[:, 1] -= 3
    px = DiscretizedLogistic(params)
    levels = (torch.arange(256) / 255).double().view(-1, 1, 1, 1)
    total = px.log_prob(levels).exp().sum().item()
    assert math.isclose(total, 1 + 256e-7, abs_tol=1e-9)
    draws = DiscretizedLogistic(params[:1].repeat(20000, 1, 1, 1)).sample(
        torch.Generator().manual_seed(0)
    )
    expected = (px.log_prob(levels).exp() * levels.flatten()).sum()
    assert abs(draws.mean() - expected) < 0.01
    assert torch.allclose(draws * 255, (draws * 255).round(), atol=1e-9)


# --- bad input -------------------------------------------------------------------------


def one_line(error):
    return "\n" not in str(error.value)


@pytest.mark.parametrize("name", FILES)
def test_missing_files_are_named(tmp_path, name):
    folder = write_hvae(tmp_path)
    (folder / name).unlink()
    with pytest.raises(EbmPriorError, match=f"no {name} in it") as error:
        load(folder)
    assert one_line(error)


@pytest.mark.parametrize("a", FILES)
@pytest.mark.parametrize("b", FILES)
def test_swapped_files_are_refused(tmp_path, a, b):
    if a == b:
        return
    folder = write_hvae(tmp_path)
    shutil.copyfile(folder / a, folder / b)
    with pytest.raises(EbmPriorError) as error:
        load(folder)
    assert one_line(error) and b in str(error.value)


@pytest.mark.parametrize("kind", [Evil, EvilEval])
@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("torch_format", [None, False, True])
def test_nothing_in_a_folder_is_run(tmp_path, kind, name, torch_format):
    folder = write_hvae(tmp_path / "model")
    target = tmp_path / "ran"
    data = {"kwargs": kind(target), "train_datasets": kind(target)}
    if torch_format is None:
        (folder / name).write_bytes(pickle.dumps(data))
    else:
        torch.save(data, folder / name, _use_new_zipfile_serialization=torch_format)
    with pytest.raises(EbmPriorError) as error:
        load(folder)
    assert one_line(error) and name in str(error.value)
    assert not target.exists()


def test_the_evaluator_is_never_opened(tmp_path):
    folder = write_hvae(tmp_path / "model")
    target = tmp_path / "ran"
    torch.save(Evil(target), folder / "evaluator.pt")
    load(folder)
    assert not target.exists()


def test_foreign_classes_are_refused_by_name(tmp_path):
    folder = write_hvae(tmp_path)
    # protocol 2, as torch writes it: a mention of a class that exists nowhere
    mention = b"\x80\x02}X\x06\x00\x00\x00kwargscoodd.models\nGadget\ns."
    torch.save({}, folder / "model_kwargs.pt", _use_new_zipfile_serialization=False)
    old = (folder / "model_kwargs.pt").read_bytes()
    empty = pickle.dumps({}, protocol=2)
    assert empty in old
    (folder / "model_kwargs.pt").write_bytes(old.replace(empty, mention, 1))
    with trap("oodd", "oodd.models") as used:
        with pytest.raises(EbmPriorError, match="asks to run oodd.models.Gadget") as error:
            load(folder)
    assert one_line(error) and not used


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"activation": "Tanh"}, "activation='Tanh' is not supported"),
        ({"likelihood_module": "BetaLikelihoodConv2d"}, "BetaLikelihoodConv2d"),
        ({"wobble": 3}, "wobble=3 is not supported"),
        ({"name": "IWAE"}, "model class 'IWAE' is not supported"),
        ({"name": "BIVA", "skip_stochastic": False}, "skip_stochastic=False"),
        ({"padded_shape": [9, 9]}, "padded_shape"),
        ({"input_shape": torch.Size([1, 6, 6])}, "stride 2 on a 3x3"),
        ({"config_deterministic": blocks(block="Dense")}, "block='Dense'"),
        ({"config_deterministic": blocks(groups=2)}, "groups=2"),
        ({"config_deterministic": blocks(upsampling_mode="cubic")}, "upsampling_mode='cubic'"),
        ({"config_deterministic": [[hvae_block(channels=0)]] * 3}, "out_channels of stage 0"),
        ({"config_stochastic": [c | {"block": "Flow"} for c in LATENTS]}, "block='Flow'"),
        ({"config_stochastic": [c | {"latent_features": 0} for c in LATENTS]}, "zero size"),
        ({"config_stochastic": LATENTS[:2]}, "3 stages but 2 latents"),
        ({"config_deterministic": [[hvae_block()] * 20] * 3}, "describes 60 blocks"),
        ({"config_deterministic": blocks(kernel_size=[[3], [3]])}, "kernel_size of stage 0"),
    ],
)
def test_unsupported_options_are_named(tmp_path, changes, match):
    folder = write_hvae(tmp_path, state={"x": torch.zeros(1)}, **changes)
    with pytest.raises(EbmPriorError, match=match) as error:
        load(folder)
    assert one_line(error)


TANGLED = {
    **{key: {key: nest(10)} for key in HVAE_OPTIONS},
    "name": {"name": "x" * 1000},
    "wobble": {"wobble": nest(10)},
    **{
        key: {"config_deterministic": blocks(**{key: nest(10)})}
        for key in ("block", "kernel_size")
    },
    "latent": {"config_stochastic": [LATENTS[0] | {"block": nest(10)}] * 3},
}


@pytest.mark.parametrize("changes", TANGLED.values(), ids=TANGLED)
def test_messages_stay_short_whatever_a_file_holds(tmp_path, changes):
    folder = write_hvae(tmp_path, state={"x": torch.zeros(1)}, **changes)
    with pytest.raises(EbmPriorError) as error:
        load(folder)
    assert one_line(error) and len(str(error.value)) < 600


def test_a_data_set_that_cannot_be_printed_is_not_named(tmp_path):
    assert load(write_hvae(tmp_path, dataset="x\nSHA-256  0")).dataset is None


def test_weights_must_fit(tmp_path):
    folder = write_hvae(tmp_path)
    state = torch.load(folder / "model_state_dict.pt", weights_only=True)
    key = "stages.0.q_deterministic.layers.0.conv1.conv.weight_g"
    state["stages.9.x"] = state.pop(key)
    torch.save(state, folder / "model_state_dict.pt")
    with pytest.raises(EbmPriorError, match=f"missing {key}; unexpected stages.9.x") as error:
        load(folder)
    assert one_line(error)


def test_other_families_are_recognised(tmp_path):
    biva = write_biva(tmp_path / "biva")
    for path in (biva, biva / "model.pth"):
        with pytest.raises(EbmPriorError, match="use backbone biva") as error:
            load(path)
        assert one_line(error)
    for path in (NVAE, NVAE.parent):
        with pytest.raises(EbmPriorError, match="use backbone nvae") as error:
            load(path)
        assert one_line(error)
