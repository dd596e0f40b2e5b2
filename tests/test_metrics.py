"""Sample-quality metrics: against closed forms, pytorch-fid itself and known cases."""

import json
import math
import os
import subprocess
import sys
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from ebm_prior import EbmPriorError
from ebm_prior.metrics import (
    FeatureStatistics,
    compare,
    frechet_distance,
    gap_closed,
    inception_score,
    load_features,
    manifold_overlap,
)
from ebm_prior.metrics.classifier import main as classifier_command
from ebm_prior.metrics.classifier import train_classifier
from ebm_prior.metrics.features import INCEPTION_NAME, METADATA_KEY, SHIPPED
from ebm_prior.metrics.frechet import MAX_ROWS, StatisticsBuilder
from ebm_prior.metrics.inception import InceptionScore
from ebm_prior.metrics.manifold import class_counts, entropy_of_counts


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def normal(*shape, seed=0):
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def bytes_images(*shape, seed=0):
    return torch.randint(0, 256, shape, generator=seeded(seed), dtype=torch.uint8)


# Fréchet distance


def test_frechet_of_known_gaussians_is_the_closed_form():
    """Covariances that commute: tr(C1 + C2 - 2 (C1 C2)^1/2) = sum (sqrt(a) - sqrt(b))^2."""
    basis = torch.linalg.qr(normal(5, 5)).Q.numpy()
    a, b = np.array([1.0, 2, 3, 4, 5]), np.array([0.5, 2, 1, 9, 0.1])
    shift = np.array([1.0, -2, 0, 0.5, 0])
    one = FeatureStatistics(np.zeros(5), basis @ np.diag(a) @ basis.T, "test")
    two = FeatureStatistics(shift, basis @ np.diag(b) @ basis.T, "test")
    expected = shift @ shift + ((np.sqrt(a) - np.sqrt(b)) ** 2).sum()
    assert frechet_distance(one, two) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(two, one) == pytest.approx(expected, rel=1e-9)
    assert frechet_distance(one, one) == pytest.approx(0, abs=1e-9)


def test_frechet_is_pytorch_fids_on_the_same_features():
    from ebm_prior.torchvision_compat import import_torchvision

    import_torchvision()
    from pytorch_fid.fid_score import calculate_frechet_distance

    x, y = normal(500, 16), normal(400, 16, seed=1) @ normal(16, 16, seed=2) + 0.3
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = calculate_frechet_distance(
            x.numpy().mean(0), np.cov(x.numpy(), rowvar=False),
            y.numpy().mean(0), np.cov(y.numpy(), rowvar=False),
        )  # fmt: skip
    ours = frechet_distance(
        FeatureStatistics.from_features(x, "test"), FeatureStatistics.from_features(y, "test")
    )
    assert ours == pytest.approx(theirs, rel=1e-9)


@pytest.mark.parametrize("part", [7, 100, 1000, 5000])
@pytest.mark.parametrize("offset", [0, 1e6])
def test_streamed_statistics_are_those_of_the_whole(offset, part):
    x = normal(1000, 6) + offset
    builder = StatisticsBuilder("test", part=part)
    for batch in x.split([1, 399, 0, 600]):
        builder.add(batch)
    streamed = builder.finish()
    assert streamed.n == 1000 and streamed.rows is None
    np.testing.assert_allclose(streamed.mean, x.numpy().mean(0), rtol=1e-12)
    np.testing.assert_allclose(streamed.cov, np.cov(x.numpy(), rowvar=False), atol=1e-9)


def test_of_a_large_set_ten_thousand_rows_are_kept_whatever_the_batches():
    x = torch.arange(2 * MAX_ROWS + 5).double()[:, None]
    by_hundred, at_once = (
        FeatureStatistics.from_batches(x.split(size), "test", len(x)).rows
        for size in (100, len(x))
    )
    np.testing.assert_array_equal(by_hundred, at_once)
    assert len(np.unique(at_once)) == MAX_ROWS
    assert abs(at_once.mean() / MAX_ROWS - 1) < 0.02  # a fair choice, not the first ones
    exact = normal(9, 3)  # float32 only where that loses nothing
    np.testing.assert_array_equal(FeatureStatistics.from_features(exact, "test").rows, exact)
    assert FeatureStatistics.from_features(exact.float(), "test").rows.dtype == np.float32


def test_statistics_survive_a_file(tmp_path):
    network = load_features("digits")
    statistics = FeatureStatistics.from_images(bytes_images(80, 1, 8, 8), network)
    statistics.save(tmp_path / "reference.npz")
    loaded = FeatureStatistics.load(tmp_path / "reference.npz")
    assert (loaded.n, loaded.features, loaded.image_shape) == (80, network.name, (1, 8, 8))
    np.testing.assert_array_equal(loaded.rows, statistics.rows)
    assert frechet_distance(statistics, loaded) == pytest.approx(0, abs=1e-4)
    samples = network(bytes_images(90, 1, 8, 8, seed=1))
    assert compare(loaded, samples, network) == compare(
        network(bytes_images(80, 1, 8, 8)), samples, network
    )
    assert loaded.of(network, (1, 8, 8)) is loaded
    with pytest.raises(EbmPriorError, match="of 1x8x8 images, these are 1x28x28"):
        loaded.of(network, (1, 28, 28))
    with pytest.raises(EbmPriorError, match="'digits classifier.*not of 'MNIST classifier"):
        loaded.of(load_features("mnist"), (1, 28, 28))


def test_pytorch_fid_reads_our_files(tmp_path):
    from ebm_prior.torchvision_compat import import_torchvision

    import_torchvision()
    from pytorch_fid.fid_score import compute_statistics_of_path

    statistics = FeatureStatistics.from_features(normal(50, 6), "some network (6)")
    statistics.save(tmp_path / "ours.npz")
    mean, cov = compute_statistics_of_path(str(tmp_path / "ours.npz"), None, 50, 6, "cpu")
    np.testing.assert_array_equal(mean, statistics.mean)
    np.testing.assert_array_equal(cov, statistics.cov)


def test_plain_statistics_give_the_distance_alone(tmp_path):
    """pytorch-fid's files do not say which weights: they go with any Inception, nothing else."""
    x, y = normal(50, 6), normal(40, 6, seed=1)
    whole = FeatureStatistics.from_features(x, "pytorch-fid InceptionV3 (6)")
    np.savez(tmp_path / "fid.npz", mu=whole.mean, sigma=whole.cov)
    plain = FeatureStatistics.load(tmp_path / "fid.npz")
    network = SimpleNamespace(name=whole.features + " with other weights 12", dim=6, num_classes=0)
    found = compare(plain.of(network, (3, 4, 4)), y, network)
    statistics = FeatureStatistics.from_features(y, whole.features)
    assert found.frechet == frechet_distance(whole, statistics)
    assert (found.precision, found.recall, found.density, found.coverage) == (None,) * 4
    with pytest.raises(EbmPriorError, match="InceptionV3"):
        plain.of(load_features("digits"), (1, 8, 8))


@pytest.mark.parametrize(("dim", "name"), [(2048, INCEPTION_NAME), (64, "InceptionV3 (64)")])
def test_pytorch_fids_own_files_load(tmp_path, dim, name):
    np.savez_compressed(tmp_path / "fid.npz", mu=np.zeros(dim), sigma=np.eye(dim))
    loaded = FeatureStatistics.load(tmp_path / "fid.npz")
    assert loaded.features.endswith(name)
    assert loaded.n is None


@pytest.mark.parametrize(
    "entries",
    [
        {"images": np.zeros(3)},
        {"mu": np.zeros(3), "sigma": np.zeros((2, 2))},
        {"mu": np.full(2, np.nan), "sigma": np.eye(2)},
        {"mu": np.array(["a"]), "sigma": np.eye(1)},
        {"mu": np.array([print], dtype=object), "sigma": np.eye(1)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "rows": np.zeros((5, 3))},
        {"mu": np.zeros(2), "sigma": np.eye(2), "rows": np.full((5, 2), np.nan)},
        {"mu": np.zeros(2), "sigma": np.eye(2), "rows": np.full((5, 2), "a")},
        {"mu": np.zeros(2), "sigma": np.eye(2), "image_shape": np.float64(3)},
    ],
)
def test_files_that_hold_no_statistics_are_refused(tmp_path, entries):
    np.savez(tmp_path / "bad.npz", **entries)
    with pytest.raises(EbmPriorError, match="statistics"):
        FeatureStatistics.load(tmp_path / "bad.npz")


def test_unreadable_and_missing_statistics_are_refused(tmp_path):
    (tmp_path / "text.npz").write_text("not a zip")
    for name in ("text.npz", "missing.npz"):
        with pytest.raises(EbmPriorError, match="statistics"):
            FeatureStatistics.load(tmp_path / name)


def test_statistics_of_different_features_do_not_compare():
    a = FeatureStatistics.from_features(normal(50, 4), "MNIST classifier (4)")
    b = FeatureStatistics.from_features(normal(50, 4), "digits classifier (4)")
    with pytest.raises(EbmPriorError, match="MNIST classifier.*digits classifier"):
        frechet_distance(a, b)


def test_too_few_images_warn_and_nan_is_refused(capsys):
    few = FeatureStatistics.from_features(normal(8, 8), "test")
    with pytest.warns(UserWarning, match="8 images for 8 features.*too large"):
        assert frechet_distance(few, few) == pytest.approx(0, abs=1e-4)
    assert capsys.readouterr().out == ""
    bad = normal(10, 4)
    bad[3, 2] = torch.nan
    with pytest.raises(EbmPriorError, match="1 of 10 images have NaN"):
        FeatureStatistics.from_features(bad, "test")
    with pytest.raises(EbmPriorError, match="two images"):
        FeatureStatistics.from_features(normal(1, 4), "test")


# Precision, recall, entropy


def test_precision_and_recall_of_known_sets():
    x = normal(300, 8) + 1e4
    assert manifold_overlap(x, x)[:2] == (1, 1)
    assert manifold_overlap(x, x.repeat(2, 1)[:300])[:2] == (1, 1)
    assert manifold_overlap(x, x + 100)[:2] == (0, 0)
    # Samples that copy one mode of two: all good, half missing.
    two_modes = torch.cat([x, x + 100])
    copied = normal(600, 8, seed=1) + 1e4
    precision, recall, _, _ = manifold_overlap(two_modes, copied)
    assert precision > 0.8
    assert 0.3 < recall <= 0.5


def test_precision_and_recall_on_a_line_by_hand():
    """k = 1: reference balls [-1, 2] and [7, 16], sample balls [-3.5, -1.5] and [1, 3]."""
    reference = torch.tensor([[0.0], [1], [10], [13]])
    samples = torch.tensor([[1.5], [2.5], [-3], [-2]])
    assert manifold_overlap(reference, samples, k=1, density_k=1) == (0.25, 0.25, 0.25, 0.25)


def test_the_larger_set_is_cut_to_the_size_of_the_other():
    x, y = normal(50, 4), normal(400, 4, seed=1)
    part = y[torch.randperm(400, generator=seeded())[:50]]
    assert manifold_overlap(x, y) == manifold_overlap(x, part)
    assert manifold_overlap(y, x) == manifold_overlap(part, x) != manifold_overlap(x, part)


def brute_force(real, fake, k, density_k):
    """The four numbers from their definitions, one distance at a time."""

    def radii(points, k):
        return [np.sort([np.linalg.norm(p - q) for q in points])[k] for p in points]  # [0]: p

    def inside(queries, points, k):
        balls = list(zip(points, radii(points, k), strict=True))
        return np.array([[np.linalg.norm(x - p) <= r for p, r in balls] for x in queries])

    return (
        inside(fake, real, k).any(1).mean(),
        inside(real, fake, k).any(1).mean(),
        inside(fake, real, density_k).sum(1).mean() / density_k,
        inside(fake, real, density_k).any(0).mean(),
    )


@pytest.mark.parametrize(("shift", "scale"), [(0, 1), (0.6, 0.5), (1, 1.3)])
def test_manifolds_are_those_of_their_definitions(shift, scale):
    real, fake = normal(40, 3), normal(40, 3, seed=1) * scale + shift
    found = manifold_overlap(real + 1e4, fake + 1e4)
    assert found == pytest.approx(brute_force(real.numpy(), fake.numpy(), 3, 5), abs=1e-12)


def test_manifolds_do_not_depend_on_the_blocks_of_distances(monkeypatch):
    real, fake = normal(700, 4), normal(700, 4, seed=1) * 0.7 + 0.3
    whole = manifold_overlap(real, fake)
    monkeypatch.setattr("ebm_prior.metrics.manifold.WORKING_MEMORY", 1)  # 4 blocks
    assert manifold_overlap(real, fake) == whole
    assert 0 < whole.recall < whole.precision < 1 < whole.density


def test_density_and_coverage_of_known_sets():
    x = normal(600, 8)
    alike = manifold_overlap(x, normal(600, 8, seed=1))
    assert alike.density == pytest.approx(1, abs=0.1)
    # P(no sample among the k nearest of both sets together), about 1 - 2^-k
    assert alike.coverage == pytest.approx(1 - 2**-5, abs=0.02)
    assert manifold_overlap(x, x + 100)[2:] == (0, 0)
    one_spot = manifold_overlap(x, x[:1] + 1e-3 * normal(600, 8, seed=1))
    assert one_spot.density > 0.5 > 0.1 > one_spot.coverage
    with pytest.raises(EbmPriorError, match="more than 5 images"):
        manifold_overlap(x[:5], x)


# Inception score


def direct_inception_score(p):
    """As defined, part by part, in the order of torch-fidelity's shuffle."""
    p = p.numpy()[np.random.RandomState(2020).permutation(len(p))]
    scores = []
    for i in range(10):
        part = p[i * len(p) // 10 : (i + 1) * len(p) // 10]
        scores.append(np.exp((part * np.log(part / part.mean(0))).sum(1).mean()))
    return np.mean(scores), np.std(scores)


@pytest.mark.parametrize("n", [10, 123, 1000])
def test_inception_score_is_its_definition(n):
    p = (3 * normal(n, 7)).softmax(1)
    assert inception_score(p) == pytest.approx(direct_inception_score(p), rel=1e-9)
    score = InceptionScore(n)
    for batch in p.split(9):
        score.add(batch)
    assert score.finish() == pytest.approx(inception_score(p), rel=1e-12)


def test_inception_score_of_known_probabilities():
    assert inception_score(torch.full((100, 8), 1 / 8)) == pytest.approx((1, 0))
    assert inception_score(torch.eye(8)[[3] * 100]) == pytest.approx((1, 0))
    sure = torch.eye(8).repeat_interleave(1000, 0)  # sorted by class, as folders are
    mean, std = inception_score(sure)
    assert 7.9 < mean <= 8 and std < 0.05
    assert inception_score(sure[:9]) is None


def test_class_entropy():
    def entropy(probabilities):
        return entropy_of_counts(class_counts(probabilities))

    assert entropy(torch.eye(10).repeat(3, 1)) == pytest.approx(math.log(10))
    assert entropy(torch.eye(10)[[4, 4, 4]]) == 0
    assert entropy(torch.eye(4)[[0, 0, 1, 1]]) == pytest.approx(math.log(2))


def test_gap_closed():
    assert gap_closed(50, 20, 10) == 0.75
    assert gap_closed(50, 60, 10) == -0.25
    assert math.isnan(gap_closed(10, 10, 10))


# Classifiers


@pytest.mark.parametrize(
    ("spec", "shape", "floor"), [("mnist", (1, 28, 28), 0.99), ("digits", (1, 8, 8), 0.97)]
)
def test_shipped_classifiers(spec, shape, floor):
    network = load_features(spec)
    assert (network.dim, network.image_shape, network.num_classes) == (64, shape, 10)
    assert network.metadata["accuracy"] >= floor
    assert "--data" in network.metadata["command"]
    assert SHIPPED[spec].stat().st_size < 1_000_000
    assert load_features(None, shape).name == network.name
    images = bytes_images(7, *shape)
    features = network(images)
    assert features.shape == (7, 64)
    assert features.dtype == torch.float64
    torch.testing.assert_close(network.probabilities(images).sum(1), torch.ones(7).double())
    # Floats are those of the picture file; batches do not matter.
    torch.testing.assert_close(network(images.double() / 255 + 1e-4), features)
    network.batch_size = 2
    torch.testing.assert_close(network(images), features, rtol=1e-3, atol=1e-3)


def test_the_shipped_digits_classifier_knows_the_digits():
    from ebm_prior.data import load_images

    test = load_images("digits", split="test")
    network = load_features("digits", (1, 8, 8))
    features = network(torch.as_tensor(test.images))
    hits = network.classify(features).argmax(1) == torch.as_tensor(test.labels)
    assert hits.double().mean().item() == pytest.approx(network.metadata["accuracy"])
    half = len(features) // 2
    same = compare(features[:half], features[half:], network)
    noise = compare(features, network(bytes_images(len(features), 1, 8, 8)), network)
    assert same.features == "digits classifier (64)"
    assert same.frechet < 0.2 * noise.frechet
    assert same.precision > noise.precision
    assert same.recall > 0.5 > noise.recall
    assert noise.entropy < same.entropy <= math.log(10)
    assert noise.n == len(features)


@pytest.mark.parametrize(
    "images",
    [
        torch.full((2, 1, 8, 8), 7.0),
        torch.full((2, 1, 8, 8), torch.nan),
        torch.zeros(2, 1, 8, 8, dtype=torch.int64),
        torch.zeros(2, 1, 9, 8),
        torch.zeros(1, 8, 8),
    ],
)
def test_wrong_images_are_refused(images):
    with pytest.raises(EbmPriorError, match="images"):
        load_features("digits")(images)


def striped(n, shape=(3, 12, 10), seed=0):
    """Labelled images whose class is the brightness of their left half."""
    images, labels = bytes_images(n, *shape, seed=seed) // 4, torch.arange(n) % 3
    images[..., : shape[2] // 2] += (labels * 60).to(torch.uint8)[:, None, None, None]
    return SimpleNamespace(images=images, labels=labels)


def test_a_classifier_trained_by_the_user(tmp_path):
    path = tmp_path / "mine.safetensors"
    accuracy = train_classifier(striped(300), striped(90, seed=1), path, title="x", steps=60)
    assert accuracy > 0.9
    network = load_features(path, (3, 12, 10))
    assert network.name.startswith("x classifier (64) ")
    assert (network.metadata["accuracy"], network.num_classes) == (accuracy, 3)
    again = tmp_path / "again.safetensors"
    train_classifier(striped(300), striped(90, seed=1), again, title="x", steps=60)
    assert again.read_bytes() == path.read_bytes()
    with pytest.raises(EbmPriorError, match="these are"):
        load_features(path, (3, 32, 32))
    with pytest.raises(EbmPriorError, match="held-out"):
        train_classifier(striped(9), striped(9, (3, 9, 9)), path, title="x", steps=2)
    with pytest.raises(EbmPriorError, match="labels"):
        unlabelled = SimpleNamespace(images=striped(9).images, labels=None)
        train_classifier(unlabelled, striped(9), path, title="x", steps=2)


def test_the_training_command(tmp_path):
    from click.testing import CliRunner

    out = tmp_path / "digits.safetensors"
    arguments = ["--data", "digits", "--title", "digits", "--steps", "5", "--out", str(out)]
    result = CliRunner().invoke(classifier_command, arguments)
    assert result.exit_code == 0, result.output
    assert "held-out accuracy" in result.output
    command = load_features(out).metadata["command"]
    assert str(tmp_path) not in command
    arguments[1] = str(tmp_path / "missing.npz")
    result = CliRunner().invoke(classifier_command, arguments)
    assert result.exit_code == 1
    assert "Error: " in result.output
    arguments[-1] = "x.pt"
    assert CliRunner().invoke(classifier_command, arguments).exit_code == 2


@pytest.mark.parametrize(
    "change",
    [
        {"architecture": "other"},
        {"num_classes": 10**9},
        {"num_classes": 11},
        {"image_shape": [1, 8]},
        {"image_shape": [2, 8, 8]},
        {"image_shape": "abc"},
        {"title": None},
        None,
    ],
)
def test_broken_classifier_files_are_refused(tmp_path, change):
    description = load_features("digits").metadata
    path = tmp_path / "bad.safetensors"
    metadata = {METADATA_KEY: json.dumps({**description, **change})} if change else None
    save_file(load_file(SHIPPED["digits"]), path, metadata=metadata)
    with pytest.raises(EbmPriorError, match="not a classifier"):
        load_features(path)


def test_what_is_no_feature_network_is_refused(tmp_path):
    (tmp_path / "text.safetensors").write_text("no tensors here")
    with pytest.raises(EbmPriorError, match="not a classifier"):
        load_features(tmp_path / "text.safetensors")
    with pytest.raises(EbmPriorError, match="no such"):
        load_features(tmp_path / "missing.safetensors")
    with pytest.raises(EbmPriorError, match="choose inception, mnist, digits"):
        load_features("resnet")
    with pytest.raises(EbmPriorError, match="does not go with"):
        load_features("mnist", inception_weights=tmp_path / "w.pth")


# Inception


@pytest.fixture(scope="module")
def inception_weights(tmp_path_factory):
    """Random weights in a file like pytorch-fid's, where torch hub's cache would have it."""
    from ebm_prior.torchvision_compat import import_torchvision

    import_torchvision()
    from pytorch_fid import inception

    def random_state(model):
        generator = seeded()
        for parameter in model.parameters():
            scale = 0.1 if parameter.ndim < 2 else parameter[0].numel() ** -0.5
            parameter.data.normal_(0, 1.5 * scale, generator=generator)
            if parameter.ndim < 2:
                parameter.data.add_(1)
        return model.state_dict()

    built = []
    original = inception._inception_v3

    def remember(*args, **kwargs):
        built.append(original(*args, **kwargs))
        return built[0]

    def no_download(*args, **kwargs):
        return random_state(built[0])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "_inception_v3", remember)
        patch.setattr(inception, "load_state_dict_from_url", no_download)
        model = inception.fid_inception_v3()
    folder = tmp_path_factory.mktemp("torch") / "hub" / "checkpoints"
    folder.mkdir(parents=True)
    path = folder / inception.FID_WEIGHTS_URL.rpartition("/")[2]
    torch.save(model.state_dict(), path)
    return path


def test_inception_is_pytorch_fids_on_a_folder_of_pictures(tmp_path, inception_weights):
    from PIL import Image
    from pytorch_fid import fid_score, inception

    images = bytes_images(10, 1, 20, 20)
    images[5:] //= 3
    for i, image in enumerate(images):
        Image.fromarray(image[0].numpy()).save(tmp_path / f"{i:02}.png")
    with pytest.MonkeyPatch.context() as patch:
        state = torch.load(inception_weights, weights_only=True)
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
        model = inception.InceptionV3([3])
    files = sorted(tmp_path.glob("*.png"))
    theirs = fid_score.get_activations(files, model, batch_size=5, num_workers=0)

    network = load_features(None, (1, 20, 20), inception_weights=inception_weights)
    assert network.name.startswith(f"{INCEPTION_NAME} with other weights ")
    assert (network.dim, network.num_classes) == (2048, 1008)
    network.batch_size = 4
    ours = network(images.float() / 255)
    spread = theirs.std(axis=0).mean()
    assert spread > 1e-3  # otherwise agreement means nothing
    np.testing.assert_allclose(ours.numpy(), theirs, atol=1e-3 * spread)
    # The distance, on so few features that ten images give regular covariances.
    columns = slice(0, 2048, 512)

    def distance(x):
        x = torch.as_tensor(x)[:, columns]
        one, two = (FeatureStatistics.from_features(half, "test") for half in x.split(5))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return frechet_distance(one, two)

    assert distance(theirs) > 0
    assert distance(ours) == pytest.approx(distance(theirs), rel=1e-3)
    # Classes: pytorch-fid's network leaves out this layer of the same file.
    logits = torch.from_numpy(theirs) @ state["fc.weight"].double().T
    probabilities = network.classify(ours)
    torch.testing.assert_close(probabilities, logits.softmax(1), rtol=1e-3, atol=0)
    assert (network.num_classes, network.knows_data) == (1008, False)
    with pytest.raises(EbmPriorError, match="2 channels"):
        network(torch.zeros(1, 2, 20, 20))


FID = """
import runpy
from ebm_prior.torchvision_compat import import_torchvision
import_torchvision()  # or it does not import beside a CPU-only torch
runpy.run_module("pytorch_fid", run_name="__main__", alter_sys=True)
"""


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_pictures_measure_as_by_pytorch_fids_command_line(tmp_path, inception_weights):
    from click.testing import CliRunner
    from PIL import Image

    from ebm_prior.cli import main

    for name, dim in (("a", 1), ("b", 3)):
        (tmp_path / name).mkdir()
        for i, image in enumerate(bytes_images(24, 32, 32, 3, seed=dim) // dim):
            Image.fromarray(image.numpy()).save(tmp_path / name / f"{i:02}.png")
    a, b = str(tmp_path / "a"), str(tmp_path / "b")
    environment = os.environ | {"TORCH_HOME": str(inception_weights.parents[2])}

    command = [sys.executable, "-c", FID, a, b, "--device", "cpu", "--num-workers", "0"]
    process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    theirs = float(process.stdout.split("FID:")[1])
    # The score from pytorch-fid's own network, whose classes tell these pictures apart:
    # random directions less their share along the mean, or all were of one class.
    from pytorch_fid import fid_score, inception

    state = torch.load(inception_weights, weights_only=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(inception, "load_state_dict_from_url", lambda *_, **__: state)
        model = inception.InceptionV3([3])
    files = sorted((tmp_path / "a").glob("*.png"))
    features = torch.from_numpy(fid_score.get_activations(files, model, 24, num_workers=0))
    mean = torch.nn.functional.normalize(features.mean(0), dim=0)
    classes = normal(1008, 2048)
    classes -= torch.outer(classes @ mean, mean)
    state["fc.weight"] = (classes * 3 / (features @ classes.T).std()).float()
    torch.save(state, tmp_path / "weights.pth")
    probabilities = (features @ state["fc.weight"].double().T).softmax(1)

    arguments = ["evaluate", "images", a, "--reference", b, "--json"]
    arguments += ["--inception-weights", str(tmp_path / "weights.pth")]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    assert len(result.stderr.splitlines()) == 1  # 24 images, 2048 features
    found = json.loads(result.stdout)
    assert found["frechet"] == pytest.approx(theirs, rel=1e-3)
    score = found["inception_score"], found["inception_score_std"]
    assert score[0] > 1.1
    assert score == pytest.approx(direct_inception_score(probabilities), rel=1e-3)


def test_inception_without_weights_says_what_to_do(tmp_path, monkeypatch):
    def offline(*args, **kwargs):
        assert kwargs["weights_only"]
        assert kwargs["check_hash"]
        raise OSError("no route to host")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", offline)
    with pytest.raises(EbmPriorError, match="--inception-weights FILE"):
        load_features(None, (3, 32, 32))
    torch.save({"fc.weight": torch.zeros(2)}, tmp_path / "other.pth")
    with pytest.raises(EbmPriorError, match="does not hold the weights"):
        load_features("inception", inception_weights=tmp_path / "other.pth")
    with pytest.raises(EbmPriorError, match="no such"):
        load_features("inception", inception_weights=tmp_path / "missing.pth")


def test_importing_the_metrics_imports_nothing_heavy():
    code = (
        "import sys, ebm_prior.metrics\n"
        "heavy = {'torchvision', 'pytorch_fid', 'scipy', 'sklearn'} & set(sys.modules)\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
