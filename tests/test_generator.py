"""The multi-layer generator as a backbone: the contract, its density, its file."""

import math
from dataclasses import replace

import pytest
import torch
from torch import nn
from torch.distributions import Normal

import ebm_prior
from backbones.generator import Generator, GeneratorConfig, checkpoint_bytes, load
from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.convert import encode, to_safetensors
from ebm_prior.safe_load import load_torch_file
from ebm_prior.testing import check_backbone, images, noise

TINY = GeneratorConfig((1, 8, 8), latents=(2, 3), hidden=(5,), ngf=2, dataset="digits")


def tiny(**changes):
    return Generator(replace(TINY, **changes)).freeze()


@pytest.fixture
def saved(tmp_path):
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(checkpoint_bytes(tiny()))
    return path


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [8, 28, 32, 64])
@pytest.mark.parametrize("latents", [(3,), (2, 3), (2, 4, 3)], ids=["L1", "L2", "L3"])
def test_obeys_every_law(latents, side, channels):
    check_backbone(tiny(image_shape=(channels, side, side), latents=latents))


@pytest.mark.parametrize("start, stride", [(8, 1), (8, 2), (4, 1), (0, 1)])
def test_obeys_every_law_from_any_start(start, stride):
    check_backbone(tiny(image_shape=(3, 16, 24), start=start, image_stride=stride))


@pytest.mark.parametrize("shape", [(1, 5, 5), (3, 3, 4), (2, 12, 20), (1, 1, 1)])
def test_odd_sizes_work(shape):
    check_backbone(tiny(image_shape=shape))


def test_is_the_network_of_table_12():
    with torch.device("meta"):
        network = Generator(GeneratorConfig((3, 64, 64), (100, 100), (200, 200), ngf=128))
    shapes = {name: tuple(value.shape) for name, value in network.state_dict().items()}
    weights = [shapes[f"p_x.{i}.weight"] for i in range(0, 9, 2)]
    channels = [100, 1024, 512, 256, 128, 3]
    assert weights == [(a, b, 4, 4) for a, b in zip(channels, channels[1:], strict=False)]
    weights = [shapes[f"q_x.{i}.weight"] for i in range(0, 9, 2)]
    channels = [3, 128, 256, 512, 1024, 200]
    assert weights == [(b, a, 4, 4) for a, b in zip(channels, channels[1:], strict=False)]
    for net in ("p_z", "q_z"):
        assert [shapes[f"{net}.0.{i}.weight"] for i in (0, 2, 4)] == [
            (200, 100), (200, 200), (200, 200)]  # fmt: skip
    assert all(m.negative_slope == 0.2 for m in network.modules() if isinstance(m, nn.LeakyReLU))
    assert network.p_x[2].stride == (2, 2) and network.q_x[0].stride == (2, 2)


def test_28_pixels_begin_at_7x7():
    assert GeneratorConfig((1, 28, 28)).first_map == (7, 7, 2)
    assert GeneratorConfig((3, 32, 32)).first_map == (4, 4, 3)
    assert GeneratorConfig((3, 32, 48), start=8).first_map == (8, 12, 2)
    with pytest.raises(EbmPriorError, match="28x28 pixels do not fit a generator with start=8: "):
        GeneratorConfig((1, 28, 28), start=8)


def layers_of(network):
    """(inputs, outputs, kernel, stride, padding) of every convolution."""
    return [
        (m.in_channels, m.out_channels, m.kernel_size[0], m.stride[0], m.padding[0])
        for m in network if isinstance(m, (nn.Conv2d, nn.ConvTranspose2d))
    ]  # fmt: skip


def test_is_the_network_of_the_public_code_for_cifar10():
    """8x8x1024, doubled twice, then 3x3 convolutions at the size of the image."""
    with torch.device("meta"):
        network = Generator(GeneratorConfig((3, 32, 32), (100, 128), (200,) * 4, 256, start=8,
                                            image_stride=1))  # fmt: skip
    decoder = [
        (128, 1024, 8, 1, 0), (1024, 512, 4, 2, 1), (512, 256, 4, 2, 1), (256, 3, 3, 1, 1),
    ]  # fmt: skip
    assert layers_of(network.p_x) == decoder
    encoder = [(b, a, *rest) for a, b, *rest in reversed(decoder)]
    assert layers_of(network.q_x) == [*encoder[:-1], (1024, 256, 8, 1, 0)]


def test_log_prob_is_the_density_over_the_unit_interval():
    """On [-1, 1] the paper's N(g, sigma^2); over [0, 1] each pixel adds log 2."""
    backbone = tiny(sigma=0.3).double()
    z, x = backbone.transform(noise(backbone)), images(backbone)
    g = torch.tanh(backbone.p_x(z[1][:, :, None, None]))
    on_network_scale = Normal(g, 0.3).log_prob(2 * x - 1).flatten(1).sum(1)
    expected = on_network_scale + x[0].numel() * math.log(2)
    torch.testing.assert_close(backbone.decode(z).log_prob(x), expected)
    torch.testing.assert_close(backbone.decode(z).mean, (g + 1) / 2)


def test_the_prior_is_markov_and_the_inference_runs_upwards():
    backbone = tiny(latents=(2, 3, 4))
    assert [g.name for g in backbone.groups] == ["z3", "z2", "z1"]
    eps = noise(backbone)
    z = backbone.transform(eps)
    assert torch.equal(z[0], eps[0])
    moved = backbone.log_prior([z[0] + 1, z[1], z[2]])
    assert torch.equal(moved[:, 2], backbone.log_prior(z)[:, 2])
    # the image moves z_1, z_1's noise moves z_2: top groups depend on those below
    post = backbone.posterior(images(backbone), noise=eps)
    other = backbone.posterior(images(backbone), noise=[eps[0], eps[1], -eps[2]])
    assert not torch.allclose(post.z[0], other.z[0])
    other = backbone.posterior(images(backbone), noise=[-eps[0], eps[1], eps[2]])
    assert torch.equal(post.z[1], other.z[1]) and torch.equal(post.z[2], other.z[2])


def test_log_posterior_is_that_of_the_draw():
    backbone = tiny(latents=(2, 3, 4)).double()
    x = images(backbone)
    post = backbone.posterior(x, noise=noise(backbone))
    torch.testing.assert_close(backbone.log_posterior(x, post.z), post.log_q)


def test_sigmas_are_bounded_however_far_the_layer_above():
    """Else exp(-E) with a linear head could not be normalised."""
    backbone = tiny()
    for scale in (1.0, 1e6):
        sigma = backbone.prior(1, scale * torch.randn(50, 2)).scale
        assert sigma.min() >= math.exp(-1.0) - 1e-6 and sigma.max() <= math.exp(1.0) + 1e-6


def test_a_joint_head_sees_every_layer():
    prior = EnergyPrior.for_backbone(tiny(), heads="joint", nef=2, ndf=4)
    z = [t.requires_grad_() for t in prior.backbone.transform(noise(prior.backbone))]
    assert all(g.abs().max() > 0 for g in torch.autograd.grad(prior.energy(z).sum(), z))


# --- the file --------------------------------------------------------------------------


def test_the_file_gives_the_same_generator_and_is_recognised(saved):
    assert ebm_prior.detect_backbone(saved) == "generator"
    loaded = ebm_prior.load_backbone("generator", saved)
    assert loaded.dataset == "digits" and loaded.config == TINY
    again = load(saved)
    for a, b in zip(loaded.state_dict().values(), again.state_dict().values(), strict=True):
        assert torch.equal(a, b)
    check_backbone(loaded)
    assert checkpoint_bytes(loaded) == saved.read_bytes()
    # what `push --with-backbone` sends is the file itself
    assert to_safetensors("generator", saved) == saved.read_bytes()


def test_files_name_the_first_map_only_where_it_was_chosen(saved, tmp_path):
    """So that older files are read, and written as they were."""
    assert load_torch_file(saved)["config"].keys() == {
        "image_shape", "latents", "hidden", "ngf", "sigma", "dataset"}  # fmt: skip
    chosen = tiny(image_shape=(3, 16, 16), start=8, image_stride=1)
    path = tmp_path / "chosen.safetensors"
    path.write_bytes(checkpoint_bytes(chosen))
    assert load(path).config == chosen.config and load(path).config.start == 8


def changed(saved, **changes):
    data = load_torch_file(saved)
    for name, change in changes.items():
        data[name] = change(data[name])
    saved.write_bytes(encode(data, saved))
    return saved


@pytest.mark.parametrize(
    "config, message",
    [
        ({"latents": [2, 4]}, "layer sizes do not chain: weight p_z.0.2.weight is .* need"),
        ({"hidden": [5, 5]}, "does not fit its sizes: weight p_z.0.4.bias"),
        ({"depth": 3}, "unknown settings 'depth'"),
        ({"latents": []}, "latents must list 1 to"),
        ({"latents": [0, 3]}, "latents must list whole numbers"),
        ({"ngf": 2.5}, "ngf must lie in"),
        ({"sigma": 0}, "sigma must be positive"),
        ({"sigma": "0.3"}, "sigma must be positive"),
        ({"image_shape": [1, 8]}, r"image_shape must be \(C, H, W\)"),
        ({"image_shape": [1, 45, 45]}, "45x45 pixels do not fit"),
        ({"dataset": "a\nb"}, "dataset must be a name"),
        ({"start": 17}, r"start must lie in 0 ... 16, got 17"),
        ({"start": 3}, "8x8 pixels do not fit a generator with start=3: halved 2 times .* 2x2"),
        ({"start": True}, "start must lie in 0 ... 16, got True"),
        ({"image_stride": 3}, "image_stride must be 1 or 2, got 3"),
        ({"image_stride": 1}, "does not fit its sizes: weight p_x.4"),
        ({"ngf": 65536}, "layer sizes do not chain"),  # gigabytes, if they were made
    ],
)
def test_wrong_sizes_are_one_line(saved, config, message):
    changed(saved, config=lambda old: old | config)
    with pytest.raises(EbmPriorError, match=message) as caught:
        ebm_prior.load_backbone("generator", saved)
    assert "\n" not in str(caught.value) and str(saved) in str(caught.value)


def test_damaged_files_are_one_line(saved, tmp_path):
    path = tmp_path / "other.safetensors"
    path.write_bytes(encode({"family": "x", "state_dict": {}}, path))
    with pytest.raises(EbmPriorError, match="no generator's file"):
        load(path)
    path.write_bytes(saved.read_bytes()[:-9])
    with pytest.raises(EbmPriorError, match="is damaged"):
        load(path)
    changed(saved, state_dict=lambda old: old | {"p_x.0.bias": old["p_x.0.bias"].int()})
    with pytest.raises(EbmPriorError, match=r"p_x.0.bias holds no floating-point"):
        load(saved)
