"""Stage one on tiny networks: it learns, resumes bit for bit and writes the public format."""

import argparse
import os
import signal
from importlib.metadata import entry_points

import pytest
import torch

from backbones.nvae import load
from backbones.nvae.pretrain import PretrainConfig, elbo, pretrain
from ebm_prior import EbmPriorError, load_backbone
from ebm_prior.interrupt import Interrupted
from ebm_prior.likelihoods import BinomialLikelihood
from ebm_prior.run import read_state
from ebm_prior.testing import check_backbone

TINY = {
    "channels_enc": 4, "channels_dec": 4, "halvings": 1, "scales": 2, "groups": 2, "latents": 2,
    "iterations": 30, "batch_size": 16, "save_every": 10,
}  # fmt: skip


def blobs(n=64, channels=1, size=8):
    """Images with a bright square at one of four places."""
    g = torch.Generator().manual_seed(0)
    x = torch.randint(0, 40, (n, channels, size, size), generator=g)
    half = size // 2
    for i in range(n):
        row, column = divmod(i % 4, 2)
        x[i, :, row * half : (row + 1) * half, column * half : (column + 1) * half] += 200
    return x.to(torch.uint8)


def weights(path):
    return torch.load(path, weights_only=False)["state_dict"]


def test_loss_falls_and_the_checkpoint_loads(tmp_path):
    seen = []
    path = pretrain(
        blobs(), out=tmp_path / "run", dataset="digits",
        progress=lambda step, total, metrics: seen.append((step, total, metrics)), **TINY,
    )  # fmt: skip
    assert [s for s, _, _ in seen] == list(range(1, 31)) and seen[0][1] == 30
    first, last = (sum(m["elbo"] for _, _, m in part) / 5 for part in (seen[:5], seen[-5:]))
    assert last > first + 5
    assert sorted(p.name for p in (tmp_path / "run").iterdir()) == ["checkpoint.pt"]
    backbone = load_backbone("nvae", path)
    assert backbone.dataset == "digits" and backbone.image_shape == (1, 8, 8)
    assert [g.shape for g in backbone.groups] == [(2, 2, 2), (2, 4, 4), (2, 4, 4)]
    check_backbone(backbone, 1e-3)
    values = elbo(backbone, blobs())
    assert values.shape == (64,) and values.isfinite().all()


def test_format_is_the_public_one(tmp_path):
    path = pretrain(blobs(), out=tmp_path, dataset="digits", **TINY)
    data = torch.load(path, weights_only=False)
    assert set(data) == {
        "epoch", "state_dict", "optimizer", "global_step", "args", "arch_instance",
        "scheduler", "grad_scalar",
    }  # fmt: skip
    assert isinstance(data["args"], argparse.Namespace)
    assert data["args"].num_total_iter == data["global_step"] == 30
    assert data["optimizer"]["state"] == {}
    state = data["state_dict"]
    aliases = [k for k in state if k.endswith(".weight_normalized")]
    assert aliases  # and they share storage, so the file holds the weights once
    for key in aliases:
        twin = key.removesuffix("_normalized")
        assert state[key].data_ptr() == state[twin].data_ptr()
        assert twin.removesuffix("weight") + "log_weight_norm" not in state
    assert all(v.is_contiguous() for v in state.values())


@pytest.mark.parametrize("dataset", ["mnist", "mine"])
def test_resuming_gives_identical_weights(tmp_path, dataset):
    images = blobs(size=28 if dataset == "mnist" else 8)
    settings = TINY | {"iterations": 13, "save_every": 5, "flows": 1}
    whole = pretrain(images, out=tmp_path / "whole", dataset=dataset, **settings)

    def die(step, *_):
        if step == 8:  # between saves: as if killed
            raise SystemExit

    with pytest.raises(SystemExit):
        pretrain(images, out=tmp_path / "cut", dataset=dataset, progress=die, **settings)
    torch.rand(7)  # the caller's generator plays no part
    cut = pretrain(images, out=tmp_path / "cut", dataset=dataset, resume=True, **settings)
    a, b = weights(whole), weights(cut)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)
    assert load(whole).binarize == (dataset == "mnist")


def test_interrupt_saves_and_says_how_to_go_on(tmp_path):
    def press(step, *_):
        if step == 3:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match=r"iteration 3 of 30.*--resume"):
        pretrain(blobs(), out=tmp_path, dataset="digits", progress=press, **TINY)
    assert read_state(tmp_path / "state.safetensors")[1]["step"] == 3
    with pytest.raises(EbmPriorError, match="already holds an interrupted run"):
        pretrain(blobs(), out=tmp_path, dataset="digits", **TINY)
    with pytest.raises(EbmPriorError, match="other settings \\(batch_size, lr\\)"):
        pretrain(
            blobs(), out=tmp_path, dataset="digits", resume=True,
            **TINY | {"lr": 0.1, "batch_size": 8},
        )  # fmt: skip
    with pytest.raises(EbmPriorError, match="other settings \\(sum\\)"):
        pretrain(blobs() // 2, out=tmp_path, dataset="digits", resume=True, **TINY)
    pretrain(blobs(), out=tmp_path, dataset="digits", resume=True, **TINY)


@pytest.mark.parametrize("resume", [False, True])
def test_a_state_of_an_earlier_version_is_named(tmp_path, resume):
    (tmp_path / "state.pt").touch()
    with pytest.raises(EbmPriorError, match=r"state.pt is of an earlier version .* another --out"):
        pretrain(blobs(), out=tmp_path, dataset="digits", resume=resume, **TINY)


@pytest.mark.parametrize("resume", [False, True])
def test_a_folder_with_a_model_is_refused_before_any_work(tmp_path, monkeypatch, resume):
    monkeypatch.delattr("backbones.nvae.pretrain.Network")
    (tmp_path / "model.pth").touch()
    with pytest.raises(EbmPriorError, match=r"files of a model \(model.pth\); choose another"):
        pretrain(blobs(), out=tmp_path, dataset="digits", resume=resume, **TINY)
    (tmp_path / "checkpoint.pt").touch()
    with pytest.raises(EbmPriorError, match="is finished; choose another --out"):
        pretrain(blobs(), out=tmp_path, dataset="digits", resume=resume, **TINY)


def test_an_out_that_cannot_be_written_is_found_before_the_first_step(tmp_path):
    (tmp_path / "file").touch()
    steps = []
    with pytest.raises(EbmPriorError, match="cannot write .*choose another path"):
        pretrain(
            blobs(), out=tmp_path / "file", dataset="digits",
            progress=lambda step, *_: steps.append(step), **TINY,
        )  # fmt: skip
    assert not steps


def test_the_largest_seed_of_the_command_line_trains(tmp_path):
    settings = TINY | {"iterations": 5, "seed": 2**62}
    path = pretrain(blobs(), out=tmp_path, dataset="digits", **settings)
    assert elbo(load(path), blobs()).isfinite().all()


def test_diverging_training_is_reported(tmp_path):
    with pytest.raises(EbmPriorError, match="not finite at iteration"):
        pretrain(
            blobs(), out=tmp_path, dataset="digits",
            **TINY | {"lr": 1e30, "lr_min": 1e30, "warmup": 0.0, "iterations": 200},
        )  # fmt: skip
    assert not (tmp_path / "checkpoint.pt").exists()


def test_epochs_decide_the_steps(tmp_path):
    path = pretrain(blobs(), out=tmp_path, dataset="digits", **TINY | {"epochs": 2})
    assert torch.load(path, weights_only=False)["global_step"] == 2 * (64 // 16)


def test_colour_images_have_a_mixture(tmp_path):
    settings = TINY | {"iterations": 3, "mixtures": 2, "bits": 5}
    path = pretrain(blobs(channels=3), out=tmp_path, dataset="mine", **settings)
    backbone = load(path)
    assert backbone.bits == 5 and backbone.image_shape == (3, 8, 8)
    assert elbo(backbone, blobs(channels=3)).isfinite().all()


@pytest.mark.parametrize(
    ("images", "dataset", "settings", "message"),
    [
        (blobs().float(), "digits", {}, "must be uint8"),
        (blobs(channels=2), "mine", {}, "1 or 3 channels"),
        (blobs()[:, :, :4], "mine", {}, "square"),
        (blobs(), "mnist", {}, "1 x 28 x 28"),
        (blobs(), "cifar10", {}, "cifar10 means 3 x 32 x 32"),
        (blobs(size=6), "mine", {"scales": 3}, "cannot be halved"),
        (blobs(), "digits", {"layers": 3}, "unknown pretrain settings: layers"),
        (blobs(), "digits", {"iterations": 0}, "iterations must be positive"),
        (blobs(), "digits", {"batch_size": 1}, "batch_size must be at least 2"),
        (blobs(), "digits", {"lr": float("nan")}, "lr must not be nan"),
        (blobs(), "digits", {"architecture": "resnet"}, "unknown architecture 'resnet'"),
        (blobs(), "digits", {"resume": True}, "no interrupted run"),
    ],
)
def test_bad_input_says_what_is_wrong(tmp_path, images, dataset, settings, message):
    with pytest.raises(EbmPriorError, match=message):
        pretrain(images, out=tmp_path / "run", dataset=dataset, **settings)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("channels", "size"), [(1, 8), (1, 32), (3, 32), (3, 64)])
def test_defaults_suit_the_image_size(channels, size):
    config = PretrainConfig().for_images(channels, size)
    assert all(getattr(config, k) > 0 for k in ("channels_enc", "channels_dec", "groups"))
    assert size % 2 ** (config.halvings + config.scales - 1) == 0
    assert PretrainConfig(groups=7).for_images(channels, size).groups == 7


def test_binomial_is_a_distribution():
    params = torch.tensor([-1.3]).double().view(1, 1, 1, 1)
    levels = torch.arange(17).double().view(17, 1, 1, 1) / 16
    px = BinomialLikelihood(params.expand(17, 1, 1, 1), 16)
    p = px.log_prob(levels).exp()
    torch.testing.assert_close(p.sum().item(), 1.0)
    torch.testing.assert_close((p * levels.flatten()).sum(), px.mean[0, 0, 0, 0])
    sample = BinomialLikelihood(params.expand(4000, 1, 1, 1), 16).sample(
        torch.Generator().manual_seed(0)
    )
    assert abs(sample.mean() - px.mean[0]) < 0.01
    assert torch.equal((sample * 16).round() / 16, sample)
    # 8-bit images of 17 levels are recognised as such
    eight_bit = torch.round(levels * 255) / 255
    torch.testing.assert_close(px.log_prob(eight_bit).exp(), p)


def test_registered_for_the_command_line():
    (entry,) = entry_points(group="ebm_prior.pretrain", name="nvae")
    assert entry.load() is pretrain
