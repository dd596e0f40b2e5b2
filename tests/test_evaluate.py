"""`ebm-prior evaluate`: reference statistics, pictures, repeats, and going on after a kill."""

import json
import math
import os
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from click.testing import CliRunner

from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig, load_backbone, registry
from ebm_prior.card import model_card
from ebm_prior.cli import main
from ebm_prior.evaluate import SETS, Evaluation, Repeated, evaluate
from ebm_prior.feature_cache import FeatureCache
from ebm_prior.gaussian_fit import GaussianFit
from ebm_prior.images import to_uint8
from ebm_prior.interrupt import Interrupted
from ebm_prior.metrics import FeatureStatistics, SampleQuality, compare, load_features
from ebm_prior.report import report


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        lines = result.stderr.splitlines()
        assert [line.startswith("Error: ") for line in lines].count(True) == 1
        return lines[-1]
    return result.stdout


def world_in(root):
    """Heads on a toy backbone, saved, with images in the forms that exist."""
    torch.manual_seed(0)
    settings = {"top": 2, "bottom": 3, "size": 8}
    (root / "toy.json").write_text(json.dumps(settings))
    toy = ToyBackbone(**settings)
    z = toy.transform([0.5 * torch.randn(300, *g.shape) for g in toy.groups])
    x = (toy.decode(z).mean * 255).round().to(torch.uint8).squeeze(1).numpy()
    np.savez(root / "x.npz", x_train=x[:200], x_test=x[200:])
    backbone = load_backbone("toy", root / "toy.json")
    EnergyPrior.for_backbone(
        backbone, heads="joint", nef=4, ndf=8, sampler=SamplerConfig("pcnl", 3, 0.5)
    ).save_pretrained(root / "heads")


@pytest.fixture
def world(tmp_path, monkeypatch):
    world_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


EVALUATE = ["evaluate", "--heads", "heads", "--ckpt", "toy.json", "--data", "x.npz", "-n", 120]


def test_a_statistics_file_takes_the_place_of_the_test_images(world):
    direct = json.loads(run(*EVALUATE, "--json"))
    out = run("evaluate", "stats", "--data", "x.npz", "--out", "test.npz")
    assert out == "100 images, features: digits classifier (64) -> test.npz\n"
    assert json.loads(run(*EVALUATE, "--reference", "test.npz", "--json")) == direct
    assert direct["reference_images"] == 100
    run("evaluate", "stats", "--data", "x.npz", "--out", "train.npz", "--split", "train")
    other = json.loads(run(*EVALUATE, "--reference", "train.npz", "--json"))
    assert other["reference_images"] == 200 and other["energy"] != direct["energy"]
    assert not (world / "heads" / "state").exists()


def test_the_feature_network_goes_where_the_backbone_went(world, monkeypatch):
    """Each of several processes has a GPU of its own, which `cuda` alone does not name."""
    monkeypatch.setattr(registry, "check_device", lambda device: torch.device("cpu"))
    direct = run(*EVALUATE, "--json")
    assert run(*EVALUATE, "--json", "--device", "cuda") == direct


def test_statistics_that_do_not_fit_are_refused(world):
    network = load_features("digits")
    wide = FeatureStatistics.from_images(torch.zeros(9, 1, 8, 8), network)
    object.__setattr__(wide, "image_shape", (3, 32, 32))
    wide.save("wide.npz")
    assert "3x32x32" in run(*EVALUATE, "--reference", "wide.npz", code=1)
    other = FeatureStatistics.from_features(torch.randn(99, 64), "MNIST classifier (64)")
    other.save("other.npz")
    line = run(*EVALUATE, "--reference", "other.npz", code=1)
    assert "'MNIST classifier (64)', not of 'digits classifier (64)'" in line
    line = run("evaluate", "images", "x.npz", "--reference", "other.npz", code=1)
    assert "'MNIST classifier (64)'" in line
    assert "no such file" in run(*EVALUATE, "--reference", "gone.npz", code=1)
    assert "holds no feature statistics" in run(*EVALUATE, "--reference", "x.npz", code=1)


def test_plain_statistics_show_dashes(world, monkeypatch):
    class Plain:
        name, num_classes, dim = "pytorch-fid InceptionV3 (64)", 0, 64
        device = torch.device("cpu")

        def __call__(self, images):
            return images.flatten(1).double()

    monkeypatch.setattr("ebm_prior.metrics.load_features", lambda *_, **__: Plain())
    test = torch.from_numpy(np.load("x.npz")["x_test"])
    whole = FeatureStatistics.from_features(test.flatten(1), "any")
    np.savez("fid.npz", mu=whole.mean, sigma=whole.cov)
    text = run(*EVALUATE, "--reference", "fid.npz")
    assert [row.split()[-6:] for row in text.splitlines()[1:4]] == [["-"] * 6] * 3
    assert "against held-out images" in text
    line = run(*EVALUATE, "--reference", "fid.npz", "--record", code=1)
    assert "evaluate stats" in line


@pytest.mark.parametrize("form", ["", ".zip", ".npz"])
def test_pictures_that_exist_are_measured(world, form):
    sample = ["sample", "--heads", "heads", "--ckpt", "toy.json", "--seeds", "0-119"]
    run(*sample, "--out", f"s{form}")
    direct = json.loads(run(*EVALUATE, "--json"))["energy"]
    found = json.loads(run("evaluate", "images", f"s{form}", "--reference", "x.npz", "--json"))
    assert found.pop("reference_images") == 100  # the test images
    assert found.pop("features") == direct.pop("features")
    assert found == pytest.approx(direct, rel=1e-6)  # all 120, of a source without parts
    run("evaluate", "stats", "--data", f"s{form}", "--out", "s-stats.npz")
    text = run("evaluate", "images", f"s{form}", "--reference", "s-stats.npz")
    numbers = text.splitlines()[1].split()
    assert numbers[:4] == [f"s{form}", "0.00", "1.000", "1.000"]
    assert "120 images against 120 reference images; features: digits classifier (64)" in text


def test_pictures_that_do_not_fit_are_refused(world):
    np.savez("big.npz", images=np.zeros((20, 9, 9), np.uint8))
    images = ["evaluate", "images"]
    line = run(*images, "x.npz", "--reference", "big.npz", code=1)
    assert "1x9x9 but 1x8x8 is needed" in line
    found = json.loads(
        run(*images, "x.npz", "--reference", "big.npz", "--resize", "--split", "train", "--json")
    )
    assert found["reference_images"] == 18
    run("evaluate", "stats", "--data", "x.npz", "--out", "s.npz")
    assert "statistics" in run(*images, "x.npz", "--reference", "s.npz", "--resize", code=2)
    assert "gone" in run(*images, "gone", "--reference", "s.npz", code=1)
    np.savez("few.npz", images=np.zeros((4, 8, 8), np.uint8))
    line = run(*images, "few.npz", "--reference", "s.npz", code=1)
    assert "4 samples are too few to measure; give at least 6" in line
    assert "-n goes after images" in run("evaluate", "-n", 9, *images[1:], "x.npz", code=2)
    assert ".npz" in run("evaluate", "stats", "--data", "x.npz", "--out", "s.txt", code=1)


def test_bad_numbers_of_images(world):
    assert "-n" in run("evaluate", "-n", 1, code=2)
    assert "5 samples are too few" in run(*EVALUATE[:-1], 5, code=1)
    assert "--repeats" in run("evaluate", "--repeats", 0, code=2)
    result = CliRunner().invoke(main, list(map(str, [*EVALUATE[:-1], 30])))
    warnings = [x for x in result.stderr.splitlines() if x.startswith("Warning: ")]
    assert warnings == [
        "Warning: 30 images for 64 features: the covariance is singular and the Fréchet distance "
        "much too large; compare it only with one from as many images"
    ]
    assert "Warning" not in CliRunner().invoke(main, list(map(str, EVALUATE))).stderr


def test_nan_features_are_named(world, monkeypatch):
    network = load_features("digits")
    forward = network._forward

    def broken(images):
        features = forward(images)
        features[3] = torch.nan
        return features

    monkeypatch.setattr(network, "_forward", broken)
    monkeypatch.setattr("ebm_prior.metrics.load_features", lambda *_, **__: network)
    line = run(*EVALUATE, code=1)
    assert "1 of 100 images have NaN or infinite features" in line


def test_repeats_are_runs_with_the_next_seeds(world):
    found = json.loads(run(*EVALUATE, "--repeats", 3, "--json"))
    single = [json.loads(run(*EVALUATE, "--seed", r * 120, "--json")) for r in range(3)]
    assert found["runs"] == single
    for name, key in (("energy", "frechet"), ("gaussian", "coverage"), ("energy", "entropy")):
        values = [run[name][key] for run in single]
        assert found[name][key] == pytest.approx(statistics.fmean(values))
        assert found["std"][name][key] == pytest.approx(statistics.stdev(values))
    assert found["std"]["gap_closed"] > 0 and found["energy"]["n"] == 120
    text = run(*EVALUATE, "--repeats", 3)
    mean, std = (x["energy"]["frechet"] for x in (found, found["std"]))
    assert f"{mean:.2f} ± {std:.2f}" in text and "of 3 runs" in text


def test_baselines_are_rows_on_equal_terms(world):
    plain = json.loads(run(*EVALUATE, "--json"))
    found = json.loads(run(*EVALUATE, "--baselines", "--json"))
    extra = {key: found.pop(key) for key in ("full_covariance", "resampling", "fitted_to")}
    assert found == plain and extra["fitted_to"] == 200  # all there are
    # importance resampling is what --transition sir makes of the same seeds
    assert (
        extra["resampling"]
        == json.loads(run(*EVALUATE, "--transition", "sir", "--json"))["energy"]
    )
    s = small(world)
    fitted = GaussianFit.of(s.prior, s.train)
    eps = fitted.sample_eps(120, [torch.Generator().manual_seed(i) for i in range(120)])
    own = s.network(to_uint8(s.prior.images(eps)))
    quality = compare(s.network(s.test), own, s.network)
    assert extra["full_covariance"]["frechet"] == pytest.approx(quality.frechet, rel=1e-3)
    # images of narrow latents: the covariance alone already tells
    assert extra["full_covariance"]["frechet"] < plain["gaussian"]["frechet"] / 2
    many = json.loads(run(*EVALUATE[:-1], 250, "--baselines", "--json"))
    assert many["full_covariance"]["n"] == many["resampling"]["n"] == 250


def test_baselines_are_shown_repeated_and_recorded(world):
    titles = ["Gaussian prior", "full-covariance Gaussian", "importance resampling",
              "energy prior", "reconstructions"]  # fmt: skip
    text = run(*EVALUATE, "--repeats", 2, "--baselines", "--record")
    assert [row.split("  ")[0] for row in text.splitlines()[1:6]] == titles
    assert "by full-covariance Gaussian 0." in text and ", by importance resampling " in text
    assert "Gaussian fitted to 200 posterior draws; one of 4 draws resampled" in text
    config = json.loads(Path("heads/config.json").read_text())
    stored = config["training"]["evaluation"]
    values = [r["full_covariance"]["frechet"] for r in stored["runs"]]
    assert values[0] != values[1]
    assert stored["full_covariance"]["frechet"] == pytest.approx(statistics.fmean(values))
    assert stored["std"]["resampling"]["recall"] >= 0
    card = model_card(config)
    for key, title in zip(SETS, titles, strict=True):
        assert f"| {title}" in card and f"| {stored[key]['frechet']:.2f} |" in card
    assert "--repeats 2 --baselines" in card and "fitted to 200 posterior draws" in card
    assert "full-covariance Gaussian" in report(Path("heads"))
    for key, value in (("resampling", {"frechet": "x"}), ("full_covariance", None)):
        config["training"]["evaluation"] = stored | {key: value}
        assert "importance resampling" not in model_card(config)  # a stranger's: all or nothing


def test_interrupted_baselines_go_on_too(world, monkeypatch):
    whole = run(*COMMAND, "--baselines")
    with monkeypatch.context() as patch:
        stop_after(patch, 19)
        run(*COMMAND, "--baselines", code=1)
    assert len(list(world.glob("heads/state/*/*-resampling.safetensors"))) == 4
    result = CliRunner().invoke(main, [*COMMAND, "--baselines"])
    assert "15 of 15 batches were finished before\n4 of 15" in result.stderr
    assert result.stdout == whole and not batches(world)


def test_what_is_recorded_reproduces_from_the_card(world):
    run("evaluate", "stats", "--data", "x.npz", "--out", "test.npz")
    run(*EVALUATE, "--reference", "test.npz", "--repeats", 2, "--precision", "bf16", "--record")
    config = json.loads(Path("heads/config.json").read_text())
    card = model_card(config)
    assert (
        "--reference test.npz --repeats 2 --precision bf16" in card and "Means of 2 runs." in card
    )
    recorded = config["training"]["evaluation"]
    assert f"| energy prior | {recorded['energy']['frechet']:.2f} |" in card
    for key, value in (("runs", "x"), ("reference", 3)):
        config["training"]["evaluation"] = recorded | {key: value}
        assert "--reference" not in model_card(config)


def test_where_there_is_no_gap_json_has_none_and_the_card_says_so(world):
    run(*EVALUATE, "--record")
    path = Path("heads/config.json")
    config = json.loads(path.read_text())
    found = config["training"]["evaluation"]
    quality = SampleQuality(1.0, 0.5, 0.5, None, 120, "x")
    sampler = SamplerConfig("pcnl", 3, 0.5)
    none = Evaluation(quality, quality, quality, math.nan, 100, sampler, 1.0, 0)
    for result in (none, Repeated((none, none))):
        assert "gap closed: nan" in result.table().text()
        plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
        assert plain["gap_closed"] is None and plain["energy"]["frechet"] == 1
        config["training"]["evaluation"] = found | plain
        card = model_card(config)
        assert "no gap between" in card and "gap-closed" not in card and "1.00" in card


def test_reconstructions_do_not_depend_on_the_chains_batches(world):
    whole, parts = (json.loads(run(*EVALUATE, "--batch-size", b, "--json")) for b in (120, 7))
    assert parts["reconstruction"] == whole["reconstruction"]
    assert parts["energy"]["frechet"] == pytest.approx(whole["energy"]["frechet"], rel=0.05)


# -- interruptions --------------------------------------------------------------------------------

COMMAND = [*EVALUATE[:-1], "300", "--batch-size", "20", "--steps", "20", "--json"]


def batches(world):
    return list(world.glob("heads/state/evaluate-*/*.safetensors"))


def test_a_killed_evaluation_goes_on_to_the_same_numbers(world):
    whole = run(*COMMAND)
    process = subprocess.Popen(
        [sys.executable, "-m", "ebm_prior", *COMMAND], stderr=subprocess.DEVNULL
    )
    deadline = time.monotonic() + 120
    while len(batches(world)) < 3 and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.001)
    os.kill(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = len(batches(world))
    assert 3 <= kept < 15
    result = CliRunner().invoke(main, COMMAND)
    assert f"{kept} of 15 batches were finished before" in result.stderr
    assert result.stdout == whole
    assert not (world / "heads" / "state").exists()


def stop_after(monkeypatch, count, error=KeyboardInterrupt):
    """Make a count of batches, then stop."""
    save = FeatureCache.save

    def counting(self, *args):
        save(self, *args)
        if len(list(self.folder.iterdir())) == count:
            raise error

    monkeypatch.setattr(FeatureCache, "save", counting)


def test_ctrl_c_says_how_to_go_on(world, monkeypatch):
    whole = run(*COMMAND)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        line = run(*COMMAND, code=1)
    assert "the same command goes on" in line and "heads/state/evaluate-" in line
    # Other settings do not take these batches; repeats, whose first run it is, do.
    result = CliRunner().invoke(main, [*COMMAND, "--steps", "21"])
    assert result.exit_code == 0 and "finished before" not in result.stderr
    assert len(batches(world)) == 4
    result = CliRunner().invoke(main, [*COMMAND, "--repeats", "2"])
    assert "4 of 15 batches were finished before" in result.stderr
    assert json.loads(result.stdout)["runs"][0] == json.loads(whole)
    assert not batches(world)


def test_the_cache_tells_apart_all_that_samples_depend_on(world, toy, tmp_path):
    network = load_features("digits")
    config = SamplerConfig("pcnl", 3, 0.5)

    def folder(prior, config=config, temperature=1.0, network=network):
        return FeatureCache(tmp_path, prior, config, temperature, network).folder

    prior = EnergyPrior.for_backbone(toy)
    first = folder(prior)
    assert folder(prior) == first
    others = {
        folder(prior, temperature=0.9),
        folder(prior, config=SamplerConfig("pcnl", 4, 0.5)),
        folder(prior, config=SamplerConfig("langevin", 3, 0.5)),
        folder(prior, network=load_features("mnist")),
        folder(EnergyPrior.for_backbone(toy)),  # other weights
    }
    toy.register_buffer("statistics", torch.zeros(2), persistent=False)  # as --readjust-bn
    others.add(folder(prior))
    toy.statistics += 1
    others.add(folder(prior))
    assert len(others | {first}) == 8


def small(world):
    backbone = load_backbone("toy", world / "toy.json")
    prior = EnergyPrior.from_pretrained(world / "heads", backbone=backbone)
    x = np.load(world / "x.npz")
    train, test = (torch.from_numpy(x[k])[:, None] for k in ("x_train", "x_test"))
    return SimpleNamespace(prior=prior, train=train, test=test, network=load_features("digits"))


def test_damaged_batches_are_refused_and_a_full_disk_is_survived(world, monkeypatch):
    s = small(world)

    def measure():
        cache = FeatureCache(world / "c", s.prior, s.prior.sampler, 1.0, s.network)
        with cache:
            args = s.prior, s.test, s.train, s.network
            return evaluate(*args, n=120, batch_size=30, cache=cache)

    with monkeypatch.context() as patch, pytest.raises(Interrupted):
        stop_after(patch, 2)
        measure()
    (path,) = world.glob("c/evaluate-*/0-29-*.safetensors")
    good = path.read_bytes()
    for bad in (b"", good[:-1], good[:100]):
        path.write_bytes(bad)
        with pytest.raises(EbmPriorError, match="damaged.*delete"):
            measure()
    path.write_bytes(good)
    plain = evaluate(s.prior, s.test, s.train, s.network, n=120, batch_size=30)
    assert measure() == plain
    (world / "c").write_text("no folder")
    with pytest.warns(UserWarning, match="will lose all samples: cannot write"):
        assert measure() == plain


def test_large_evaluations_keep_ten_thousand_features_at_most(world, monkeypatch):
    """The distance is of all samples, the manifold of a part of them."""
    s = small(world)
    whole = evaluate(s.prior, s.test, s.train, s.network, n=150)
    monkeypatch.setattr("ebm_prior.metrics.frechet.MAX_ROWS", 60)
    part = evaluate(s.prior, s.test, s.train, s.network, n=150)
    assert part.energy.frechet == pytest.approx(whole.energy.frechet, rel=1e-9)
    assert part.energy.inception_score == whole.energy.inception_score
    assert part.energy.entropy == whole.energy.entropy
    assert part.energy.recall != whole.energy.recall and part.energy.n == 150
    features = s.network(s.test)
    kept = FeatureStatistics.from_features(features, s.network.name)
    assert len(kept.rows) == 60 and len(kept.rows) < kept.n
    assert compare(kept, features, s.network).frechet == pytest.approx(0, abs=1e-3)


def test_no_gap_is_null_in_json_and_in_the_record(world, monkeypatch):
    monkeypatch.setattr("ebm_prior.evaluate.gap_closed", lambda *_: float("nan"))

    def refuse(constant):
        raise AssertionError(f"{constant} is no JSON")

    for more in ([], ["--repeats", 2]):
        text = run(*EVALUATE, "--json", "--record", *more)
        assert json.loads(text, parse_constant=refuse)["gap_closed"] is None
        config = json.loads(Path("heads/config.json").read_text(), parse_constant=refuse)
        assert "There is no gap" in model_card(config)
        assert "gap closed: nan" in run(*EVALUATE, *more)


def test_a_result_is_shown_even_if_it_cannot_be_recorded(world, monkeypatch):
    def full(*_, **__):
        raise EbmPriorError("disk full")

    monkeypatch.setattr("ebm_prior.record.record", full)
    result = CliRunner().invoke(main, [str(a) for a in [*EVALUATE, "--json", "--record"]])
    assert result.exit_code == 1 and result.stderr.endswith("Error: disk full\n")
    assert json.loads(result.stdout)["energy"]["n"] == 120


def test_a_record_keeps_no_path_of_the_features(world):
    from ebm_prior.metrics.features import SHIPPED

    Path("private").mkdir()
    Path("private/own.safetensors").write_bytes(SHIPPED["digits"].read_bytes())
    run(*EVALUATE, "--features", world / "private" / "own.safetensors", "--record")
    text = Path("heads/config.json").read_text()
    assert "own.safetensors" in text and "private" not in text


def test_what_torch_says_of_a_download_is_no_output(monkeypatch, capsys):
    def fetch(*_, **__):
        print("Downloading")
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", fetch)
    with pytest.raises(EbmPriorError, match="cannot fetch the Inception weights"):
        load_features("inception")
    assert capsys.readouterr().out == ""
