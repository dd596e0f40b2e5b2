"""Stage one for BIVA and HVAE: it learns by its rules and writes what the public code writes."""

import json
import os
import pickle
import signal
import sys
import types
from importlib.metadata import entry_points
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch.distributions import Normal, kl_divergence

from backbones import loop
from backbones.biva import checkpoint as biva_format
from backbones.biva import pretrain as biva
from backbones.hvae import checkpoint as hvae_format
from backbones.hvae import pretrain as hvae
from backbones.stages.layers import Layer
from backbones.stages.network import normal_kl
from backbones.stages.pretrain import PretrainConfig, elbo, normalise, public_state
from backbones.training import Terms
from ebm_prior import EbmPriorError, load_backbone
from ebm_prior.cli import main
from ebm_prior.interrupt import Interrupted
from ebm_prior.likelihoods import DiscretizedLogisticMixture
from ebm_prior.safe_load import load_pickle_file
from ebm_prior.testing import check_backbone, noise
from tests.test_nvae_pretrain import blobs

FIXTURES = Path(__file__).parent / "fixtures"
TINY = {
    "channels": [4, 4], "latents": [3, 2], "blocks": 1, "iterations": 30, "batch_size": 16,
    "save_every": 10,
}  # fmt: skip
FAMILIES = {"biva": biva, "hvae": hvae}
CASES = {
    "biva": (biva, {}),
    "biva_lvae": (biva, {"stages": "lvae", "channels": [4, 6]}),
    "biva_vae": (biva, {"stages": "vae", "dropout": 0.1}),
    "biva_maps": (biva, {"maps": 1, "strides": [2, 2], "blocks": 2}),
    "hvae": (hvae, {"channels": [4, 6]}),
    "hvae_vae": (hvae, {"stages": "vae", "blocks": 2, "strides": [4, 1]}),
    "hvae_maps": (hvae, {"maps": 2, "dropout": 0.1}),
}
FILES = {
    biva: ["config.json", "hyperparameters.p", "model.pth"],
    hvae: [
        "datamodule_config.pt", "model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt",
    ],
}  # fmt: skip


def family_of(module):
    return next(name for name, m in FAMILIES.items() if m is module)


def start(module, out="unused", images=None, **settings):
    """A training that has not taken a step."""
    images = blobs() if images is None else images
    return module._Training(images, Path(out), "digits", TINY | settings, torch.device("cpu"))


def tensors(path):
    return torch.load(path, weights_only=True)


# --- the run ---------------------------------------------------------------------------


@pytest.mark.parametrize(("module", "changes"), CASES.values(), ids=CASES)
def test_it_learns_and_the_folder_is_the_network_in_memory(tmp_path, module, changes):
    training = start(module, tmp_path / "run", **changes)
    seen = []
    training.prepare(False)
    training.run(lambda step, total, metrics: seen.append((step, total, metrics["elbo"])))
    path = training.finish()
    assert [s[:2] for s in seen] == [(i, 30) for i in range(1, 31)]
    first, last = (sum(s[2] for s in part) / 5 for part in (seen[:5], seen[-5:]))
    assert last > first + 5
    assert sorted(p.name for p in path.parent.iterdir()) == FILES[module]

    loaded, model = load_backbone(family_of(module), path), training.model.eval()
    assert loaded.dataset == "digits" and loaded.binarize
    assert [(g.name, g.shape) for g in loaded.groups] == [(g.name, g.shape) for g in model.groups]
    eps, x = noise(loaded), torch.bernoulli(blobs()[:3] / 255)
    pairs = [
        *zip(loaded.transform(eps), model.transform(eps), strict=True),
        *zip(loaded.encode(x, eps)[0], model.encode(x, eps)[0], strict=True),
        (loaded.decode(loaded.transform(eps)).params, model.decode(model.transform(eps)).params),
    ]
    for a, b in pairs:
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-5)
    check_backbone(loaded, 1e-3)


@pytest.mark.parametrize("slow", [False, True])
@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_resuming_gives_identical_weights(tmp_path, monkeypatch, module, slow):
    if slow:
        monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    settings = TINY | {"iterations": 13, "save_every": 5, "dropout": 0.2}
    whole = module.pretrain(blobs(), out=tmp_path / "whole", dataset="mine", **settings)

    def die(step, *_):
        if step == 8:  # between saves: as if killed
            raise SystemExit

    cut = {"out": tmp_path / "cut", "dataset": "mine"} | settings
    with pytest.raises(SystemExit):
        module.pretrain(blobs(), progress=die, **cut)
    torch.rand(7)  # the caller's generator plays no part
    before = torch.get_rng_state()
    steps = []
    resumed = module.pretrain(
        blobs(), resume=True, progress=lambda step, *_: steps.append(step), **cut
    )
    assert steps[0] == (8 if slow else 6)  # saved after 7, or after 5
    assert torch.equal(torch.get_rng_state(), before)
    a, b = tensors(whole), tensors(resumed)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_interrupt_saves_and_says_how_to_go_on(tmp_path, module):
    def press(step, *_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    run = {"out": tmp_path, "dataset": "digits"} | TINY
    with pytest.raises(Interrupted, match=r"iteration 3 of 30.*--resume"):
        module.pretrain(blobs(), progress=press, **run)
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    with pytest.raises(EbmPriorError, match="already holds an interrupted run; .*--resume"):
        module.pretrain(blobs(), **run)
    with pytest.raises(EbmPriorError, match="other settings \\(.*backbone.*\\)"):
        {biva: hvae, hvae: biva}[module].pretrain(blobs(), resume=True, **run)
    with pytest.raises(EbmPriorError, match="other settings \\(free_bits, latents\\)"):
        changes = {"latents": [2, 2], "free_bits": 1.0}
        module.pretrain(blobs(), resume=True, **run | changes)
    module.pretrain(blobs(), resume=True, **run)
    assert sorted(p.name for p in tmp_path.iterdir()) == FILES[module]


@pytest.mark.parametrize("resume", [False, True])
@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_a_folder_with_a_model_is_refused_before_any_work(tmp_path, monkeypatch, module, resume):
    monkeypatch.delattr(module._Training, "build")
    run = {"out": tmp_path, "dataset": "digits", "resume": resume} | TINY
    for name in (*FILES[biva], *FILES[hvae], "checkpoint.pt"):  # any of them is someone's work
        (tmp_path / name).touch()
        with pytest.raises(EbmPriorError, match=f"files of a model \\({name}\\); choose another"):
            module.pretrain(blobs(), **run)
        (tmp_path / name).unlink()
    for name in FILES[module]:
        (tmp_path / name).touch()
    with pytest.raises(EbmPriorError, match="is finished; choose another --out"):
        module.pretrain(blobs(), **run)
    (tmp_path / "state.safetensors").touch()  # killed while it wrote the result
    if not resume:
        with pytest.raises(EbmPriorError, match="interrupted run; continue it with --resume"):
            module.pretrain(blobs(), **run)


@pytest.mark.parametrize("out", ["file", "file/run"])
def test_an_out_that_cannot_be_written_is_found_before_the_first_step(tmp_path, out):
    (tmp_path / "file").touch()
    steps = []
    with pytest.raises(EbmPriorError, match="cannot write .*choose another path"):
        biva.pretrain(
            blobs(), out=tmp_path / out, dataset="digits",
            progress=lambda step, *_: steps.append(step), **TINY,
        )  # fmt: skip
    assert not steps


def test_diverging_training_is_reported(tmp_path):
    """Nothing was saved: the advice holds in the same folder."""
    wild = TINY | {"lr": 1e30, "lr_min": 1e30, "warmup": 0.0}
    with pytest.raises(EbmPriorError, match=r"not finite at iteration \d; .*lr than 1e\+30$"):
        biva.pretrain(blobs(), out=tmp_path, dataset="digits", **wild)
    assert not list(tmp_path.iterdir())
    biva.pretrain(blobs(), out=tmp_path, dataset="digits", **TINY | {"iterations": 1})


def test_diverging_after_a_save_sends_to_another_folder(tmp_path):
    training = start(biva, tmp_path)
    training.step = 10
    training.save()
    training = start(biva, tmp_path)
    training.prepare(resume=True)
    training.terms = lambda x, beta, generator: Terms(
        next(training.network.parameters()).sum() * torch.nan, x, x
    )
    advice = "at iteration 11; .* and another --out .* holds the state of iteration 10"
    with pytest.raises(EbmPriorError, match=advice):
        training.run(lambda *_: None)


@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_the_largest_seed_of_the_command_line_trains(tmp_path, module):
    settings = TINY | {"iterations": 5, "seed": 2**62, "dropout": 0.1}
    path = module.pretrain(blobs(), out=tmp_path, dataset="digits", **settings)
    assert all(v.isfinite().all() for v in tensors(path).values() if v.is_floating_point())


def test_the_command_line_finds_both_trainers(tmp_path):
    found = {e.name: e.load() for e in entry_points(group="ebm_prior.pretrain")}
    assert found["biva"] is biva.pretrain and found["hvae"] is hvae.pretrain
    arguments = ["pretrain", "--backbone", "biva", "--data", "digits", "--out", str(tmp_path)]
    for setting in ("channels=[4,4]", "latents=[2,2]", "blocks=1", "iterations=3"):
        arguments += ["--set", setting]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert f"checkpoint -> {tmp_path / 'model.pth'}" in result.output


# --- the objective ---------------------------------------------------------------------


def test_divergence_in_closed_form():
    q, p = (torch.randn(2, 5, 3, 2, 2).double() for _ in range(2))
    q, p = (q[0], q[1].exp()), (p[0], p[1].exp())
    expected = kl_divergence(Normal(*q), Normal(*p)).flatten(1).sum(1)
    torch.testing.assert_close(normal_kl(q, p), expected)


def objective(training, beta=0.7):
    generator = training.generator()
    return training.terms(training.batch(generator), beta, generator)


@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_free_bits_are_free(module):
    """loss = mean(beta * sum_i max(free, KL_i) - log p(x|z)), flat below the budget."""
    free = 1.5
    training = start(module, channels=[4, 6], free_bits=free)
    terms = objective(training)
    below, above = terms.kl < free, terms.kl > free
    assert below.any() and above.any()
    paid = torch.where(below, free, terms.kl).sum(1)
    torch.testing.assert_close(terms.loss, (0.7 * paid - terms.log_px).mean())
    slope = torch.autograd.grad(terms.loss, terms.kl, retain_graph=True)[0]
    torch.testing.assert_close(slope, above * 0.7 / len(above))

    # With all of it free the priors below the top, which log p(x|z) does not use, learn nothing.
    training = start(module, channels=[4, 6], free_bits=1e9)
    objective(training).loss.backward()
    names = training.network.stages[0].family.names
    largest = {
        role: [
            weight.grad.abs().max().item()
            for name, weight in training.network.named_parameters()
            if f".{names[role]}." in name
        ]
        for role in ("p_head", "q_head")
    }
    assert largest["p_head"] and max(largest["p_head"]) == 0 < min(largest["q_head"])


def test_free_bits_end_and_the_loss_is_minus_the_elbo():
    training = start(biva, free_bits=1e3, free_share=0.5)
    training.step = 14
    assert objective(training, 1.0).loss > 1e3
    training.step = 15
    terms = objective(training, 1.0)
    torch.testing.assert_close(terms.loss, (terms.kl.sum(1) - terms.log_px).mean())


def test_beta_rises_over_its_share_of_the_steps(tmp_path):
    training = start(hvae, tmp_path, kl_anneal=0.5)
    seen = []
    terms = training.terms
    training.terms = lambda x, beta, g: seen.append(beta) or terms(x, beta, g)
    training.run(lambda *_: None)
    assert seen[0] == pytest.approx(1e-4) and seen[6] == pytest.approx(0.4)
    assert seen[15:] == [1.0] * 15


def test_elbo_is_that_of_sampled_divergences_on_average(tmp_path):
    path = biva.pretrain(blobs(), out=tmp_path, dataset="digits", **TINY)
    backbone = load_backbone("biva", path)
    images = blobs(8).repeat(64, 1, 1, 1)
    values = elbo(backbone, images, batch_size=100)
    assert values.shape == (512,) and torch.equal(values, elbo(backbone, images, batch_size=100))
    x = torch.bernoulli(images / 255)
    posterior = backbone.posterior(x)
    log_px = backbone.decode(posterior.z).log_prob(x)
    sampled = log_px - (posterior.log_q - posterior.log_p).sum(1)
    error = (values.var() / 512 + sampled.var() / 512).sqrt()
    assert (values.mean() - sampled.mean()).abs() < 4 * error


def test_dropout_acts_in_training_only():
    training = start(hvae, dropout=0.5)
    x = training.batch(training.generator())
    fixed = training.model.noise(16)
    evaluated, again = (training.model.infer(x, fixed) for _ in range(2))
    assert all(torch.equal(a.z, b.z) for a, b in zip(evaluated, again, strict=True))
    training.network.train()
    trained = training.model.infer(x, fixed)
    assert not any(torch.equal(a.z, b.z) for a, b in zip(evaluated, trained, strict=True))


# --- initialisation --------------------------------------------------------------------


@pytest.mark.parametrize(("module", "changes"), CASES.values(), ids=CASES)
def test_layers_start_with_mean_zero_and_variance_one(module, changes):
    training = start(module, **changes)
    outputs = {}
    hooks = [
        layer.register_forward_hook(lambda m, _, y, name=name: outputs.update({name: y}))
        for name, layer in training.network.named_modules()
        if isinstance(layer, Layer)
    ]
    generator = training.generator()
    training.terms(training.draw(training.initial_images, generator), 1.0, generator)
    idle = [] if changes.get("stages") != "vae" else [1]  # the top's unused way up
    assert len(outputs) == len(hooks) - len(idle) > 15
    for name, y in outputs.items():
        y = y.detach().double().transpose(0, 1).flatten(1)
        assert y.mean(1).abs().max() < 1e-4, name
        assert (y.var(1, correction=0) - 1).abs().max() < 1e-3, name


@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_small_batches_start_from_the_same_weights(module):
    """On a few images the statistics are so wrong that the first steps diverge."""
    small, usual, large = (
        start(module, images=blobs(80), batch_size=n).network.state_dict() for n in (4, 64, 80)
    )
    assert all(torch.equal(small[key], usual[key]) for key in usual)
    assert not all(torch.equal(large[key], usual[key]) for key in usual)


def test_the_first_batch_is_initialised_on():
    for size in (16, 64):
        training = start(hvae, images=blobs(80), batch_size=size)
        batch = training.batch(training.generator())
        drawn = training.draw(training.initial_images[:size], training.generator())
        assert len(training.initial_images) == 64 and torch.equal(batch, drawn)


def test_a_constant_channel_is_left_alone(tmp_path):
    path = biva.pretrain(blobs() * 0, out=tmp_path, dataset="digits", **TINY)
    assert all(v.isfinite().all() for v in tensors(path).values())


# --- the format ------------------------------------------------------------------------


def shapes(state):
    return {key: (tuple(value.shape), value.dtype) for key, value in state.items()}


@pytest.mark.parametrize("name", ["binmnist_biva", "binmnist_lvae"])
def test_weights_have_the_keys_of_the_public_biva_code(name):
    folder = next((FIXTURES / "biva" / name).glob("ckpt*"))
    data = load_pickle_file(folder / "hyperparameters.p", biva_format.NAMES)
    network = biva_format.build(data, folder, {}, None).network
    normalise(network)
    assert shapes(public_state(network)) == shapes(tensors(folder / "model.pth"))


@pytest.mark.parametrize("name", ["fmnist_biva", "fmnist_vae"])
def test_weights_have_the_keys_of_the_public_hvae_code(name):
    folder = FIXTURES / "hvae" / name / "ckpt"
    arguments = torch.load(folder / "model_kwargs.pt", weights_only=False)
    kind = tensors(folder / "model_class_name.pt")
    network = hvae_format.build(kind, arguments, folder, {}, None).network
    normalise(network)
    expected = shapes(tensors(folder / "model_state_dict.pt"))
    assert shapes(hvae.public_weights(network)) == expected


def test_biva_arguments_are_the_public_ones(tmp_path, monkeypatch):
    settings = TINY | {"iterations": 1, "maps": 1, "stages": "lvae", "dropout": 0.25}
    biva.pretrain(blobs(size=28), out=tmp_path, dataset="mnist", **settings)

    # Read as the public code does: `pickle.load` where the names can be imported.
    def module(name, **attributes):
        made = types.ModuleType(name)
        vars(made).update(attributes)
        monkeypatch.setitem(sys.modules, name, made)

    module("biva")
    module("biva.model")
    module("biva.model.stage", LvaeStage=print)
    module("biva.model.stochastic", ConvNormal=list, DenseNormal=dict)
    options = pickle.loads((tmp_path / "hyperparameters.p").read_bytes())
    assert options == {
        "Stage": print, "tensor_shp": (-1, 1, 28, 28),
        "stages": [[[4, 5, 4]], [[4, 3, 1]]],
        "latents": [{"N": 3, "block": list, "kernel": 3}, {"N": 2, "block": dict}],
        "nonlinearity": "elu", "q_dropout": 0.25, "p_dropout": 0.25, "type": "lvae",
        "features_out": 1, "no_skip": False, "log_var_act": torch.nn.Softplus,
    }  # fmt: skip
    config = json.loads((tmp_path / "config.json").read_text())
    public = json.loads(next(FIXTURES.glob("biva/*_biva/ckpt*/config.json")).read_text())
    assert config.keys() == public.keys()
    assert config["dataset"] == "binmnist" and config["model_type"] == "lvae"


def test_hvae_arguments_are_the_public_ones(tmp_path):
    settings = TINY | {"iterations": 1, "maps": 1}
    hvae.pretrain(blobs(size=28), out=tmp_path, dataset="mnist", **settings)
    public = FIXTURES / "hvae" / "fmnist_biva" / "ckpt"
    for name in ("model_kwargs.pt", "datamodule_config.pt", "model_class_name.pt"):
        ours, theirs = (torch.load(f / name, weights_only=False) for f in (tmp_path, public))
        assert type(ours) is type(theirs)
        if isinstance(ours, dict):
            assert ours.keys() == theirs.keys()
            for key in ("kwargs",) if "kwargs" in ours else ():
                assert ours[key].keys() == theirs[key].keys()
    assert tensors(tmp_path / "model_class_name.pt") == "BIVA"
    data = tensors(tmp_path / "datamodule_config.pt")
    assert list(data["train_datasets"]) == ["MNISTBinarized"]
    kwargs = torch.load(tmp_path / "model_kwargs.pt", weights_only=False)["kwargs"]
    assert kwargs["input_shape"] == torch.Size([1, 28, 28])
    assert [c["block"] for c in kwargs["config_stochastic"]] == ["GaussianConv2d", "GaussianDense"]


@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize(
    ("dataset", "channels"),
    [("mnist", 1), ("fashion_mnist", 1), ("cifar10", 3), ("celeba_64", 3)],
)
def test_data_set_and_likelihood_are_kept(tmp_path, module, dataset, channels):
    images = blobs(channels=channels)
    settings = TINY | {"iterations": 2}
    path = module.pretrain(images, out=tmp_path, dataset=dataset, **settings)
    backbone = load_backbone(family_of(module), path)
    assert backbone.dataset == dataset and backbone.image_shape == (channels, 8, 8)
    assert backbone.binarize == (channels == 1)
    mixture = isinstance(
        backbone.decode(backbone.transform(noise(backbone))), DiscretizedLogisticMixture
    )
    assert mixture == (channels == 3)
    assert elbo(backbone, images).isfinite().all()


# --- settings --------------------------------------------------------------------------


@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
@pytest.mark.parametrize("shape", [(1, 8, 8), (1, 28, 28), (3, 32, 32), (3, 64, 64), (1, 9, 12)])
def test_defaults_suit_the_image_size(module, shape):
    images = torch.randint(0, 256, (4, *shape)).to(torch.uint8)
    training = module._Training(images, Path("unused"), "mine", {}, torch.device("cpu"))
    config = training.config
    assert config.stages == "biva" and len(training.model.groups) == 5
    side = max(shape[1:]) // config.strides[0]
    assert side <= 8 or shape[1] % 2
    assert sum(p.numel() for p in training.network.parameters()) < 1_100_000


def test_blocks_share_the_stride_of_the_lowest_stage():
    config = PretrainConfig(channels=(4, 6), strides=(8, 2), latents=(1, 1), blocks=2)
    assert config.blocks_of(0) == [(4, 8, 4), (4, 8, 2)]
    assert config.blocks_of(1) == [(6, 3, 1), (6, 3, 2)]


@pytest.mark.parametrize(
    ("images", "settings", "message"),
    [
        (blobs().float(), {}, "must be uint8"),
        (blobs(channels=2), {}, "1 or 3 channels"),
        (blobs(), {"layers": 3}, "unknown pretrain settings: layers"),
        (blobs(), {"stages": "nvae"}, "unknown stages 'nvae'; known are"),
        (blobs(), {"channels": [4, 4, 4]}, "channels has 3, latents has 2"),
        (blobs(), {"channels": 4}, "channels must not be 4"),
        (blobs(), {"latents": [2, 0]}, r"latents must not be \[2, 0\]"),
        (blobs(), {"strides": [3, 1]}, "powers of two"),
        (blobs(), {"strides": [2, 8]}, "stride 8 on a 4x4 feature map"),
        (blobs(), {"dropout": 1.0}, "dropout below 1"),
        (blobs(), {"free_bits": float("nan")}, "free_bits must not be nan"),
        (blobs(), {"free_share": 1.5}, "are shares"),
        (blobs(), {"batch_size": 1}, "batch_size must be at least 2"),
        (blobs(), {"resume": True}, "no interrupted run"),
    ],
)
@pytest.mark.parametrize("module", FAMILIES.values(), ids=FAMILIES)
def test_bad_input_says_what_is_wrong(tmp_path, module, images, settings, message):
    with pytest.raises(EbmPriorError, match=message) as error:
        module.pretrain(images, out=tmp_path / "run", dataset="digits", **TINY | settings)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run").exists()
