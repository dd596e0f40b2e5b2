"""The NVAE adapter against stored tensors of the public code, and against itself."""

import argparse
import copy
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import ebm_prior
from backbones.nvae import NVAEBackbone, load
from backbones.nvae.checkpoint import (
    ARCHITECTURES,
    DEFAULTS,
    checkpoint_dict,
    groups_per_scale,
    image_format,
    network_config,
    read_checkpoint,
)
from backbones.nvae.likelihoods import NvaeGaussian, NvaeLogisticMixture, reduce_bits
from backbones.nvae.network import Cell, Network
from backbones.nvae.pretrain import elbo
from benchmarks.parity import errors
from ebm_prior import EbmPriorError
from ebm_prior.data import load_images
from ebm_prior.testing import check_backbone
from tests.sessions import nest

FIXTURES = Path(__file__).parent / "fixtures" / "nvae"
NAMES = sorted(p.name for p in FIXTURES.iterdir())
SHIPPED = sorted((Path(__file__).parents[1] / "checkpoints").glob("nvae_*/card.json"))
EXTRA = os.environ.get("EBM_PRIOR_FIXTURES")

SMALL = {
    "dataset": "mnist", "num_latent_scales": 2, "num_groups_per_scale": 2, "ada_groups": True,
    "num_latent_per_group": 2, "num_channels_enc": 4, "num_channels_dec": 4,
    "num_preprocess_blocks": 1, "num_postprocess_blocks": 1, "num_preprocess_cells": 2,
    "num_postprocess_cells": 2, "use_se": True, "res_dist": True,
}  # fmt: skip


def make(**changes):
    """A plain network with random weights and statistics, and its arguments."""
    args = DEFAULTS | SMALL | changes
    channels, size = image_format(args["dataset"])
    cells = ARCHITECTURES[args["arch_instance"]]
    config, _ = network_config(args, cells, channels, size)
    network = Network(config)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, 0.5, 1.5)
            nn.init.normal_(module.bias, std=0.2)
            nn.init.normal_(module.running_mean, std=0.2)
            nn.init.uniform_(module.running_var, 0.5, 2.0)
    return network.eval(), args


def write(folder, data=None, **changes):
    """A checkpoint file in the public format; `data` replaces entries (None: drops them)."""
    network, args = make(**changes)
    whole = checkpoint_dict(network, args, epoch=1, global_step=2) | (data or {})
    path = Path(folder) / "checkpoint.pt"
    torch.save({k: v for k, v in whole.items() if v is not None}, path)
    return path


def eps_for(backbone, batch=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [
        torch.randn(batch, *group.shape, generator=g).to(backbone.dtype)
        for group in backbone.groups
    ]


# --- agreement with the public code ----------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_agrees_with_public_code(name):
    ratios = errors(FIXTURES / name, "nvae")
    assert len(ratios) >= 20
    bad = {k: v for k, v in ratios.items() if not v <= 1}
    assert not bad


@pytest.mark.skipif(not EXTRA, reason="set EBM_PRIOR_FIXTURES to a folder of checkpoints")
def test_agrees_on_all_given_checkpoints():
    folders = [p.parent for p in sorted(Path(EXTRA).glob("**/nvae/*/checkpoint.pt"))]
    assert folders
    for folder in folders:
        ratios = errors(folder, "nvae")
        assert not {k: v for k, v in ratios.items() if not v <= 1}, folder.name


def test_unfolded_form_agrees_too(monkeypatch):
    """The stored tensors pin the plain network, not only its folded form."""
    monkeypatch.setattr(Network, "folded", lambda self: self)
    ratios = errors(FIXTURES / "legacy", "nvae")
    assert max(ratios.values()) <= 1


@pytest.mark.parametrize("name", NAMES)
def test_writes_the_keys_that_the_public_code_writes(name):
    path = FIXTURES / name / "checkpoint.pt"
    checkpoint = read_checkpoint(path)
    written = checkpoint_dict(checkpoint.network, checkpoint.args, epoch=1, global_step=1)
    with torch.serialization.safe_globals([argparse.Namespace]):
        public = torch.load(path, map_location="cpu", weights_only=True)
    assert written.keys() == public.keys()
    assert written["arch_instance"] == public["arch_instance"]
    ours, theirs = written["state_dict"], public["state_dict"]
    if name == "legacy":  # from before the aliases
        ours = {k: v for k, v in ours.items() if not k.endswith(".weight_normalized")}
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in theirs)


# --- the folded form -------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_folding_changes_nothing(architecture):
    # mbconv_den has 8 groups in its cells, which 3 x 4 channels are not divisible by
    width = 8 if architecture == "mbconv_den" else 4
    network, _ = make(
        arch_instance=architecture, num_nf=1, num_channels_enc=width, num_channels_dec=width
    )
    network.double()
    folded = network.folded()
    kinds = {type(m).__name__ for m in folded.modules()}
    assert "Conv2d" in kinds and not kinds & {"DecoderCombiner", "InvertedResidual"}
    if architecture.startswith(("mbconv_sep", "mbconv_den")):
        assert not any(isinstance(m, nn.BatchNorm2d) for m in folded.modules())
    x = torch.rand(2, 1, 32, 32).double()
    noise = [torch.randn(2, *shape).double() for shape in network.group_shapes]
    groups, state = network.infer(x, noise)
    folded_groups, folded_state = folded.infer(x, noise)
    for a, b in zip(groups, folded_groups, strict=True):
        for field in ("q_mu", "q_sigma", "p_mu", "p_sigma", "z_base", "z"):
            torch.testing.assert_close(getattr(b, field), getattr(a, field))
    torch.testing.assert_close(folded_state, state)
    torch.testing.assert_close(folded.decode(state), network.decode(state))


@pytest.mark.parametrize("stride", [1, 2, -1])
@pytest.mark.parametrize("operation", ["mconv_e3k1g0", "mconv_e2k1g4", "mconv_e2k3g2"])
def test_folding_cells_of_any_kernel_and_groups(operation, stride):
    cell = Cell(8, 8, stride, [operation], use_se=True).double()
    cell(torch.randn(4, 8, 4, 4).double())  # batch norms differ from identities
    folded = copy.deepcopy(cell.eval()).folded().requires_grad_(False)
    x = torch.randn(2, 8, 4, 4).double()
    torch.testing.assert_close(folded(x), cell(x))
    x.requires_grad_()
    found = ((c(x), *torch.autograd.grad(c(x).square().sum(), x)) for c in (folded, cell))
    torch.testing.assert_close(*found)


def test_the_first_cell_reads_the_latents_alone():
    network, _ = make()
    fast = network.eval().folded()
    group = fast._plan[1]
    cell = fast.dec_tower[group.cells[0]]
    assert cell.widening.in_channels == network.config.latents
    channels = []
    for module in cell.modules():
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1):
            channels.append(module.in_channels)
    assert channels.count(network.config.latents) == 2  # the skip and the widening


def test_folding_does_not_touch_the_network(tmp_path):
    network, _ = make()
    before = copy.deepcopy(network.state_dict())
    network.folded()
    for key, value in network.state_dict().items():
        assert torch.equal(value, before[key])


def test_double_is_refolded_not_cast(tmp_path):
    path = write(tmp_path)
    single, double = load(path), load(path).double()
    eps = eps_for(double)
    z = double.transform(eps)
    assert z[-1].dtype == torch.float64
    plain, double._fast = double._fast, (double.network,)
    torch.testing.assert_close(z, double.transform(eps), rtol=1e-12, atol=1e-12)
    double._fast = plain
    close = single.transform([e.float() for e in eps])
    torch.testing.assert_close([v.double() for v in close], list(z), rtol=1e-4, atol=1e-5)


# --- the interface ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"dataset": "digits"},
        {"dataset": "cifar10", "num_mixture_dec": 2, "num_nf": 2, "num_x_bits": 5},
        {"dataset": "svhn", "num_mixture_dec": 1, "res_dist": False, "use_se": False},
        {"dataset": "celeba_64", "num_latent_scales": 3, "num_cell_per_cond_dec": 2},
        {"num_latent_scales": 1, "num_groups_per_scale": 1},
    ],
    ids=["mnist", "digits", "cifar10", "svhn", "celeba_64", "vanilla"],
)
def test_obeys_every_law(tmp_path, changes):
    backbone = ebm_prior.load_backbone("nvae", write(tmp_path, **changes))
    check_backbone(backbone, 1e-3)
    with torch.no_grad():
        px = backbone.decode(backbone.transform(eps_for(backbone)))
    for image in (px.mean, px.sample(torch.Generator().manual_seed(0))):
        assert image.shape == (3, *backbone.image_shape)
        assert 0 <= image.min() and image.max() <= 1
    assert px.log_prob(px.mean.round()).isfinite().all()


def test_attributes(tmp_path):
    backbone = ebm_prior.load_backbone("nvae", write(tmp_path))
    assert backbone.dataset == "mnist" and backbone.binarize
    assert backbone.image_shape == (1, 28, 28)
    assert [g.name for g in backbone.groups] == ["z0", "z1", "z2"]
    assert [g.shape for g in backbone.groups] == [(2, 8, 8), (2, 16, 16), (2, 16, 16)]
    assert backbone.feature_shape == (8, 16, 16)
    # the folded copy is no part of the model's size or state
    assert sum(p.numel() for p in backbone.parameters()) == sum(
        p.numel() for p in backbone.network.parameters()
    )


def test_transform_stops_at_the_last_latent(tmp_path):
    backbone = load(write(tmp_path))
    expected = backbone.transform(eps_for(backbone))
    backbone.fast.post_process = backbone.fast.image_conditional = None
    last = backbone.fast._plan[-1].combiner
    calls = []
    backbone.fast.dec_tower[last].register_forward_hook(lambda *_: calls.append(1))
    for a, b in zip(backbone.transform(eps_for(backbone)), expected, strict=True):
        assert torch.equal(a, b)
    assert not calls
    z, h = backbone.top_down(eps_for(backbone))
    assert calls == [1]
    torch.testing.assert_close(h, backbone.features(z))


def test_mnist_is_padded_with_zeros_and_cropped(tmp_path):
    backbone = load(write(tmp_path))
    x = torch.rand(2, 1, 28, 28).round()
    seen = []
    backbone.fast.stem.register_forward_pre_hook(lambda _, a: seen.append(a[0]))
    z = backbone.posterior(x, generator=torch.Generator().manual_seed(0)).z
    assert seen[0].shape == (2, 1, 32, 32) and (seen[0][:, :, 0] == -1).all()
    px = backbone.decode(z)
    assert px.params.shape == (2, 1, 32, 32) and px.mean.shape == (2, 1, 28, 28)
    p = torch.sigmoid(px.params[:, :, 2:30, 2:30])
    expected = torch.where(x > 0, p, 1 - p).log().flatten(1).sum(1)
    torch.testing.assert_close(px.log_prob(x), expected)
    with pytest.raises(EbmPriorError, match="28, 28"):
        backbone.posterior(torch.rand(2, 1, 32, 32))


@pytest.mark.parametrize("bits", range(1, 9))
def test_bit_reduction_is_exact(bits):
    levels = torch.arange(256)
    for dtype in (torch.float32, torch.float64):
        x = levels.to(dtype) / 255
        y = reduce_bits(x, bits)
        expected = (levels // 2 ** (8 - bits)).to(dtype) / (2**bits - 1)
        torch.testing.assert_close(y, expected, rtol=1e-7, atol=0)
        assert torch.equal(reduce_bits(y, bits), y)


@pytest.mark.parametrize("bits", [2, 8])
def test_mixture_is_normalized(bits):
    """The probabilities of all colours of one pixel sum to one."""
    params = torch.randn(1, 20, 1, 1).double()
    px = NvaeLogisticMixture(params, bits)
    if bits == 2:
        level = torch.linspace(0, 1, 4, dtype=torch.float64)
        colours = torch.cartesian_prod(level, level, level)[:, :, None, None]
        px = NvaeLogisticMixture(params.expand(len(colours), -1, -1, -1), bits)
        torch.testing.assert_close(px.log_prob(colours).exp().sum().item(), 1.0)
    else:  # reds alone: green and blue integrate out only in a sum over them
        assert px.log_prob(torch.zeros(1, 3, 1, 1).double()).item() < 0


def test_samples_follow_the_likelihood():
    g = torch.Generator().manual_seed(0)
    params = torch.tensor([0.2, -0.4, 0.6, -1.0, -1.5, -2.0]).view(1, 6, 1, 1)
    px = NvaeGaussian(params.expand(4000, -1, -1, -1))
    samples = 2 * px.sample(g) - 1
    assert abs(samples[:, 1].mean() - px.mu[0, 1]) < 0.02
    assert abs(samples[:, 2].std() - px.sigma[0, 2]) < 0.02
    mixture = NvaeLogisticMixture(torch.zeros(4000, 10, 1, 1) - 3)
    assert abs(mixture.sample(g)[:, 0].mean() - mixture.mean[:, 0].mean()) < 0.02


def test_log_p_adds_up_to_the_change_of_variables(tmp_path):
    backbone = load(write(tmp_path)).double()
    x = torch.rand(2, 1, 28, 28).round().double()
    posterior = backbone.posterior(x)
    eps = backbone.inverse(posterior.z)
    for i, (_, sigma) in enumerate(backbone.prior_parameters(posterior.z)):
        normal = torch.distributions.Normal(0.0, 1.0).log_prob(eps[i]) - sigma.log()
        torch.testing.assert_close(normal.flatten(1).sum(1), posterior.log_p[:, i])


# --- shipped checkpoints ----------------------------------------------------------------


@pytest.mark.parametrize("card", SHIPPED, ids=lambda p: p.parent.name)
def test_shipped_checkpoints_are_what_their_cards_say(card):
    facts = json.loads(card.read_text())
    backbone = ebm_prior.load_backbone("nvae", card.parent / "checkpoint.pt")
    assert backbone.sha256 == facts["sha256"]
    assert sum(p.numel() for p in backbone.parameters()) == facts["parameters"]
    assert (card.parent / "checkpoint.pt").stat().st_size < 4e6
    if backbone.dataset == "digits":
        images = load_images("digits", split="test").images
        assert abs(elbo(backbone, images).mean() - facts["metrics"]["test_elbo_nats"]) < 1


# --- batch-norm statistics ------------------------------------------------------------


def test_readjusted_statistics_are_those_of_prior_samples(tmp_path):
    backbone = load(write(tmp_path))
    encoder = copy.deepcopy(backbone.network.enc_tower.state_dict())
    before = backbone.transform(eps_for(backbone), 0.7)
    g = torch.Generator().manual_seed(0)
    assert backbone.readjust_batchnorm(0.7, batches=20, batch_size=8, generator=g) is backbone
    assert not any(m.training for m in backbone.modules())
    after = backbone.transform(eps_for(backbone), 0.7)
    assert not torch.allclose(before[-1], after[-1])
    for key, value in backbone.network.enc_tower.state_dict().items():
        assert torch.equal(value, encoder[key])
    # What enters a decoder batch norm at that temperature now has the stored moments.
    norm = backbone.network.dec_tower[1]._ops[0].conv[1].bn  # first of the up cell
    seen = []
    handle = norm.register_forward_hook(lambda _, args, __: seen.append(args[0]))
    z = backbone.transform(eps_for(backbone, 500, seed=1), 0.7)
    backbone.network.descend(lambda i, _: z[i])
    handle.remove()
    assert (seen[0].mean((0, 2, 3)) - norm.running_mean).abs().max() < 0.1
    # and T still equals the unfolded network
    backbone._fast = (backbone.network,)
    torch.testing.assert_close(after, backbone.transform(eps_for(backbone), 0.7))
    assert norm.momentum == 0.05


def test_readjusting_needs_a_batch(tmp_path):
    with pytest.raises(EbmPriorError, match="batch_size >= 2"):
        load(write(tmp_path)).readjust_batchnorm(0.7, batches=1, batch_size=1)


# --- the format ------------------------------------------------------------------------


def test_groups_per_scale():
    args = DEFAULTS | {"num_latent_scales": 3, "num_groups_per_scale": 20}
    assert groups_per_scale(args) == (20, 20, 20)
    args |= {"ada_groups": True, "min_groups_per_scale": 6}
    assert groups_per_scale(args) == (20, 10, 6)


@pytest.mark.parametrize(
    ("dataset", "expected"),
    [
        ("mnist", (1, 32)), ("cifar10", (3, 32)), ("celeba_64", (3, 64)), ("ffhq", (3, 256)),
        ("celeba_256", (3, 256)), ("lsun_church_128", (3, 128)), ("imagenet_32", (3, 32)),
        ("mine", (None, None)),
    ],
)  # fmt: skip
def test_image_format_by_name(dataset, expected):
    assert image_format(dataset) == expected


def test_unnamed_data_set_takes_its_size_from_the_weights(tmp_path):
    path = write(tmp_path, dataset="digits")
    data = torch.load(path, weights_only=False)
    data["args"].dataset = "my_own"
    torch.save(data, path)
    backbone = load(path)
    assert backbone.image_shape == (1, 8, 8) and not backbone.binarize


def test_old_arguments_are_filled_in(tmp_path):
    path = write(tmp_path, ada_groups=False)
    reference = load(path).transform(eps_for(load(path)))
    data = torch.load(path, weights_only=False)
    for key in ("num_mixture_dec", "ada_groups", "min_groups_per_scale", "num_x_bits", "num_nf"):
        delattr(data["args"], key)
    data["state_dict"] = {
        k: v for k, v in data["state_dict"].items() if not k.endswith(".weight_normalized")
    }
    del data["arch_instance"]
    torch.save(data, path)
    for a, b in zip(load(path).transform(eps_for(load(path))), reference, strict=True):
        assert torch.equal(a, b)


def test_distributed_prefix_is_dropped(tmp_path):
    path = write(tmp_path)
    data = torch.load(path, weights_only=False)
    data["state_dict"] = {f"module.{k}": v for k, v in data["state_dict"].items()}
    torch.save(data, path)
    load(path)


def test_loading_leaves_the_random_state_alone(tmp_path):
    path = write(tmp_path)
    before = torch.get_rng_state()
    load(path)
    assert torch.equal(before, torch.get_rng_state())


def drop_weight(data):
    del data["state_dict"]["stem.weight"]


def reshape_weight(data):
    data["state_dict"]["stem.weight"] = torch.zeros(4, 1, 5, 5)


def poison_weight(data):
    data["state_dict"]["stem.bias"][0] = float("nan")


def huge_weight(data):
    data["state_dict"]["stem.bias"] = torch.zeros(1).expand(10**12)


def sparse_weight(data):
    data["state_dict"]["stem.bias"] = torch.zeros(4).to_sparse()


def set_args(**values):
    def change(data):
        vars(data["args"]).update(values)

    return change


def unknown_cell(data):
    data["arch_instance"]["normal_enc"] = ["mconv_e6k9"]


def only_string(name):
    def change(data):
        data["arch_instance"] = None
        data["args"].arch_instance = name

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda d: d.pop("args"), "not an NVAE checkpoint: no 'args' in it"),
        (lambda d: d.pop("state_dict"), "no 'state_dict' in it"),
        (lambda d: d.update(args=3), "'args' is a int"),
        (drop_weight, "missing stem.weight"),
        (reshape_weight, r"misshaped stem.weight \(4, 1, 5, 5\) instead of \(4, 1, 3, 3\)"),
        (lambda d: d["state_dict"].update(extra=torch.zeros(1)), "unexpected extra"),
        (lambda d: d["state_dict"].update({"stem.bias": torch.ones(4).long()}), "mistyped"),
        (poison_weight, "stem.bias is not finite"),
        (set_args(num_groups_per_scale=5), "do not fit the checkpoint's own args"),
        (set_args(use_se=False), "unexpected pre_process.0.se"),
        (set_args(dataset="stacked_mnist"), "stacked_mnist"),
        (set_args(dataset=None), "name no data set"),
        (set_args(dataset="mnist\nSHA-256  0"), "name no data set"),
        (set_args(num_nf=nest(10)), r"num_nf=\[\[\[...\], .{,40}, which makes no NVAE"),
        (set_args(dataset="celeba_64"), "misshaped"),
        (set_args(num_latent_scales=6), "cannot be halved"),
        (set_args(num_latent_per_group=-1), "num_latent_per_group=-1"),
        (set_args(num_groups_per_scale=10**9), "num_groups_per_scale=1000000000"),
        (set_args(num_groups_per_scale=4000), "far larger network"),
        (set_args(num_nf=1, num_latent_per_group=4000), "far larger network"),
        (set_args(num_channels_enc=10**19), "num_channels_enc=10000000000000000000"),
        (huge_weight, "stem.bias is not stored in full"),
        (sparse_weight, "stem.bias is not stored in full"),
        (set_args(use_se="yes"), "use_se='yes'"),
        (set_args(num_x_bits=16), "at most 8 bits"),
        (set_args(num_postprocess_blocks=2), "post-processing"),
        (unknown_cell, "unknown cell operation 'mconv_e6k9'"),
        (lambda d: d["arch_instance"].pop("up_dec"), "lacks up_dec"),
        (lambda d: d["arch_instance"].update(up_dec=["res_bnswish"] * 1000), "lacks up_dec"),
        (lambda d: d["arch_instance"].update(up_dec=[nest(10)]), "lacks up_dec"),
        (only_string("res_mbconv9"), "'res_mbconv9' is not supported"),
        (only_string("mine"), "'mine' is not supported"),
    ],
)
def test_broken_checkpoints_say_what_is_wrong(tmp_path, change, message):
    path = write(tmp_path)
    data = torch.load(path, weights_only=False)
    change(data)
    torch.save(data, path)
    with pytest.raises(EbmPriorError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value) and str(path) in str(error.value)


def test_other_families_are_recognised(tmp_path):
    biva, hvae = tmp_path / "biva", tmp_path / "hvae"
    for folder, names in (
        (biva, ("hyperparameters.p", "config.json", "model.pth")),
        (hvae, ("model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt")),
    ):
        folder.mkdir()
        for name in names:
            torch.save({"stages.0.weight": torch.zeros(1)}, folder / name)
    for path in (biva, biva / "model.pth"):
        with pytest.raises(EbmPriorError, match="looks like a BIVA session folder"):
            load(path)
    for path in (hvae, hvae / "model_state_dict.pt"):
        with pytest.raises(EbmPriorError, match="looks like an HVAE folder"):
            load(path)
    shutil.copy(biva / "model.pth", tmp_path / "checkpoint.pt")
    with pytest.raises(EbmPriorError, match="look like a BIVA or HVAE model"):
        load(tmp_path / "checkpoint.pt")
    with pytest.raises(EbmPriorError, match=r"give the file .*checkpoint\.pt"):
        load(tmp_path)


def test_aliases_are_dropped_before_they_take_memory(tmp_path):
    path = write(tmp_path)
    data = torch.load(path, weights_only=False)
    shared = torch.zeros(1 << 17, dtype=torch.float16)
    data["state_dict"] |= {f"x{i}.weight_normalized": shared[:] for i in range(500)}
    torch.save(data, path)
    load(path)


def test_bare_weights_are_recognised(tmp_path):
    torch.save(make()[0].state_dict(), tmp_path / "w.pt")
    with pytest.raises(EbmPriorError, match="bare NVAE weights"):
        load(tmp_path / "w.pt")
    torch.save([1], tmp_path / "w.pt")
    with pytest.raises(EbmPriorError, match="holds a list"):
        load(tmp_path / "w.pt")


class Evil:
    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class Gadget(argparse.Namespace):
    """A class of its own that pretends to be the allowed one."""


@pytest.mark.parametrize("legacy", [False, True])
def test_nothing_in_a_checkpoint_is_run(tmp_path, legacy):
    target = tmp_path / "ran"
    path = tmp_path / "checkpoint.pt"
    data = {"args": argparse.Namespace(dataset=Evil(target)), "state_dict": {}}
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(EbmPriorError, match="asks to run posix.system.*nothing was run"):
        load(path)
    path.write_bytes(pickle.dumps(data))
    with pytest.raises(EbmPriorError):
        load(path)
    assert not target.exists()


def test_foreign_classes_are_refused(tmp_path):
    path = write(tmp_path, {"scheduler": Gadget(a=1)})
    with pytest.raises(EbmPriorError, match="asks to run .*Gadget.*nothing was run"):
        load(path)


@pytest.mark.parametrize("keep", [0, 10, 1000, -100])
def test_truncated_files_are_refused(tmp_path, keep):
    path = write(tmp_path)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(EbmPriorError, match="empty|not a readable PyTorch checkpoint"):
        load(path)


def test_fixture_files_hold_what_the_tests_need():
    for name in NAMES:
        tensors = load_file(FIXTURES / name / "expected.safetensors")
        assert {"z.0", "z_t07.0", "grad_eps.0", "zq.0", "log_iw", "logits_sub"} <= set(tensors)


def test_state_can_be_replaced(tmp_path):
    backbone = load(write(tmp_path))
    eps = eps_for(backbone)
    before = backbone.transform(eps)[-1]
    state = {k: v.clone() for k, v in backbone.state_dict().items()}
    state["network.dec_sampler.0.1.bias"] += 1.0
    backbone.load_state_dict(state)
    assert isinstance(backbone, NVAEBackbone)
    assert not torch.allclose(backbone.transform(eps)[-1], before)


def test_folds_once_and_outside_inference_mode(tmp_path, monkeypatch):
    folds = []
    original = Network.folded
    monkeypatch.setattr(Network, "folded", lambda self: folds.append(1) or original(self))
    backbone = load(write(tmp_path))
    assert len(folds) == 1
    with torch.inference_mode():
        backbone.double().transform(eps_for(backbone))
    eps = [e.requires_grad_() for e in eps_for(backbone)]
    torch.autograd.grad(backbone.transform(eps)[-1].sum(), eps)
    assert len(folds) == 2


def test_can_be_copied_and_pickled(tmp_path):
    backbone = load(write(tmp_path))
    expected = backbone.transform(eps_for(backbone))
    for twin in (copy.deepcopy(backbone), pickle.loads(pickle.dumps(backbone))):
        for a, b in zip(twin.transform(eps_for(backbone)), expected, strict=True):
            assert torch.equal(a, b)
