"""One class held out: the split, the scores, and an experiment that survives interruptions."""

import json
import math
import sys

import numpy as np
import pytest
import torch

import ebm_prior
from ebm_prior import EbmPriorError, EnergyPrior, FitConfig, SamplerConfig, anomaly
from ebm_prior.anomaly import AnomalyConfig, evaluate_points, hold_out, judge, start, table
from ebm_prior.data import ImageSet
from ebm_prior.decision import Terms, score_images
from ebm_prior.interrupt import Interrupted
from ebm_prior.report import report
from tests.sessions import write_hvae
from tests.test_cli import run

TINY = {"channels": [4, 4], "latents": [3, 2], "blocks": 1, "iterations": 6, "batch_size": 16}


def labelled(n=100, classes=4):
    images = torch.arange(n).to(torch.uint8)[:, None, None, None].expand(n, 1, 2, 2)
    return ImageSet(images, torch.arange(n) % classes, "counts", "train and test")


# --- the split -------------------------------------------------------------------------


def test_four_fifths_of_the_normal_images_are_for_training_and_the_rest_for_testing():
    whole = labelled()
    split = hold_out(whole, 3, seed=0)
    train, test = (set(x[:, 0, 0, 0].tolist()) for x in (split.train, split.test))
    assert len(split.train) == 60 and len(split.test) == 15 + 25
    assert not train & test and train | test == set(range(100))
    assert all(i % 4 != 3 for i in train)
    of_class = [i % 4 == 3 for i in split.test[:, 0, 0, 0].tolist()]
    assert of_class == split.anomalous.tolist() and sum(of_class) == 25
    assert torch.equal(hold_out(whole, 3, seed=0).train, split.train)
    assert not torch.equal(hold_out(whole, 3, seed=1).train, split.train)


def test_a_smaller_test_set_is_a_random_part_of_the_whole():
    whole = labelled(1000)
    full, part = hold_out(whole, 1, 0), hold_out(whole, 1, 0, number=200)
    assert torch.equal(full.train, part.train) and len(part.test) == 200
    assert 0.5 < part.anomalous.float().mean() < 0.75  # 250 of 400
    assert torch.equal(hold_out(whole, 1, 0, number=9999).test, full.test)


def test_classes_that_cannot_be_held_out_are_refused():
    with pytest.raises(EbmPriorError, match="the labels of counts are 0, 1, 2, 3"):
        hold_out(labelled(), 7, 0)
    with pytest.raises(EbmPriorError, match="there must be others"):
        hold_out(labelled(classes=1), 0, 0)
    with pytest.raises(EbmPriorError, match="only one kind"):
        hold_out(labelled(), 0, 0, number=1)


# --- scores ----------------------------------------------------------------------------


def test_low_log_posterior_and_high_energy_are_anomalies():
    same, anomalous = torch.zeros(4).double(), torch.tensor([False, False, True, True])
    high = torch.tensor([0.0, 0, 3, 3]).double()
    auprc = judge(Terms(same, same, -high, same), torch.stack([high, -2 * high]), anomalous)
    assert auprc["elbo"] == [0.5]  # all equal: the share of anomalies
    assert auprc["log_posterior"] == [1.0]
    assert auprc["energy_log_posterior"] == [1.0, 0.5]  # the other way round: last
    assert auprc["energy_elbo"][0] == 1.0
    auprc = judge(Terms(-high, high, same, same), torch.stack([same]), anomalous)
    assert auprc["elbo"] == [1.0] and auprc["energy_elbo"] == [1.0]
    with pytest.raises(EbmPriorError, match="energy prior, Eq. 20 is not finite for 2 of 4"):
        judge(
            Terms(same, same, same, same),
            torch.stack([high.where(high == 0, math.nan)]),
            anomalous,
        )


def test_the_decision_function_is_that_of_outlier_detection(tmp_path):
    backbone = ebm_prior.load_backbone("hvae", write_hvae(tmp_path, name="BIVA"))
    priors = [EnergyPrior.for_backbone(backbone, "both", 4, 6) for _ in range(2)]
    images = (255 * torch.rand(7, *backbone.image_shape)).to(torch.uint8)
    points = [prior.heads.state_dict() for prior in priors]
    terms, energies = evaluate_points(
        EnergyPrior.for_backbone(backbone, "both", 4, 6), points, images, seed=3, batch_size=4
    )
    for prior, energy in zip(priors, energies, strict=True):
        expected = score_images(prior, images, range(3, 10), [0])
        found = terms._replace(energy=energy)
        for name in ("log_posterior", "energy_elbo"):
            torch.testing.assert_close(
                getattr(found, name), expected[name][0], rtol=1e-5, atol=1e-3
            )
    torch.testing.assert_close(terms.elbo, expected["mode"][0], rtol=1e-5, atol=1e-3)


def test_table_shows_mean_and_deviation():
    auprc = {"elbo": [0.25], "log_posterior": [0.3], "energy_log_posterior": [0.4, 0.6],
             "energy_elbo": [0.5, 0.5]}  # fmt: skip
    found = table([{"digit": 7, "auprc": auprc, "anomalies": 3, "test_images": 8}])
    lines = dict([found.header, *found.rows])
    assert lines["held-out class"] == "7" and lines["backbone, ELBO"] == "0.250"
    assert lines["energy prior, Eq. 20"] == "0.500 ± 0.141" and lines["chance"] == "0.375"


@pytest.mark.parametrize("n", [10, 19, 20, 99, 119, 6000])
def test_there_are_ten_points_in_the_second_half(n):
    settings = AnomalyConfig("x", fit_iterations=n).fit_config()
    saves = range(settings.save_every, n + 1, settings.save_every)
    kept = [i for i in saves if i > n - anomaly.POINTS * settings.save_every]
    assert len(kept) == 10 and (n < 20 or kept[0] > n / 2 - 1)
    assert settings.patience == n  # never stops before its end


# --- the fit's callback ----------------------------------------------------------------


def test_on_save_sees_the_averaged_heads_and_changes_nothing(toy, tmp_path):
    images = (255 * torch.rand(60, *toy.image_shape)).to(torch.uint8)
    config = FitConfig(nce_iterations=25, save_every=10, draws=1, patience=99, ema=0.9,
                       warmup=0, held_out=0.0, sample_every=0)  # fmt: skip
    seen, ended = {}, []
    for name in ("plain", "watched"):
        torch.manual_seed(0)
        prior = EnergyPrior.for_backbone(toy, "both", 4, 6, SamplerConfig("pcnl", 2, 0.3))

        def look(iteration, prior=prior):
            seen[iteration] = [p.detach().clone() for p in prior.heads.parameters()]

        ebm_prior.fit(prior, images, config, run_dir=tmp_path / name,
                      on_save=look if name == "watched" else None)  # fmt: skip
        ended.append([p.detach().clone() for p in prior.heads.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*ended, strict=True))
    assert list(seen) == [10, 20]
    torch.manual_seed(0)
    prior = EnergyPrior.for_backbone(toy, "both", 4, 6, SamplerConfig("pcnl", 2, 0.3))
    fitting = sys.modules["ebm_prior.fit"]._Fit(
        prior, config, ebm_prior.run.RunFolder(tmp_path / "again"), {}
    )
    fitting.run.start(fitting.describe("running"))
    fitting.open_source(images, lambda: None)
    for _ in range(10):
        fitting.set_lr("nce", 25)
        fitting.nce_iteration()
        fitting.iteration += 1
    assert all(torch.equal(a, b) for a, b in zip(seen[10], fitting.average, strict=True))
    assert any(not torch.equal(a, b) for a, b in zip(seen[10], fitting.parameters, strict=True))


def test_a_fit_killed_before_it_showed_its_heads_shows_them_when_it_resumes(toy, tmp_path):
    images = (255 * torch.rand(60, *toy.image_shape)).to(torch.uint8)
    config = FitConfig(nce_iterations=25, save_every=10, draws=1, patience=99, warmup=0,
                       held_out=0.0, sample_every=0)  # fmt: skip

    def killed(iteration):
        if iteration == 20:
            raise RuntimeError("killed")

    torch.manual_seed(0)
    prior = EnergyPrior.for_backbone(toy, "both", 4, 6, SamplerConfig("pcnl", 2, 0.3))
    with pytest.raises(RuntimeError, match="killed"):
        ebm_prior.fit(prior, images, config, run_dir=tmp_path / "run", on_save=killed)
    seen = []
    ebm_prior.fit(prior, images, config, run_dir=tmp_path / "run", resume=True,
                  on_save=seen.append)  # fmt: skip
    assert seen == [20]


# --- the command -----------------------------------------------------------------------


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Three classes of 8x8 images; few posterior draws, to be quick."""
    rng = np.random.RandomState(0)
    labels = np.arange(150) % 3
    images = (rng.rand(150, 8, 8) * 80).astype(np.uint8)
    images[np.arange(150), 2 + 2 * labels] = 255  # a bar per class
    np.savez(tmp_path / "bars.npz", x_train=images[:120], y_train=labels[:120],
             x_test=images[120:], y_test=labels[120:])  # fmt: skip
    np.savez(tmp_path / "bare.npz", x_train=images, x_test=images)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys.modules["ebm_prior.fit"], "MIN_ROWS", 100)
    return tmp_path


SETTINGS = [f"--set={name}={json.dumps(value)}" for name, value in TINY.items()]


def experiment(*args, out="out", code=0):
    return run("anomaly", "--data", "bars.npz", *SETTINGS, "--fit-iterations", 20, "--out", out,
               *args, code=code)  # fmt: skip


def test_experiment_goes_on_after_every_interruption(world, monkeypatch):
    whole = json.loads(experiment("--digits", "1", "--out", "whole", "--json"))
    (result,) = whole
    assert result["digit"] == 1 and (result["train_images"], result["anomalies"]) == (80, 50)
    assert result["test_images"] == 70
    sizes = {name: len(values) for name, values in result["auprc"].items()}
    assert sizes == {"elbo": 1, "log_posterior": 1, "energy_log_posterior": 10, "energy_elbo": 10}
    assert all(0 < v <= 1 for values in result["auprc"].values() for v in values)

    find_trainer, fit, resumed = anomaly.find_trainer, anomaly.fit, []

    def half_trained(name):  # Ctrl-C in the third iteration
        def train(*args, **options):
            resumed.append(options["resume"])
            stop = None if options["resume"] else press
            return find_trainer(name)(*args, progress=stop, **options)

        return train

    def press(step, total, metrics):
        import signal

        if step == 3:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(anomaly, "find_trainer", half_trained)
    assert "the same command goes on" in experiment("--digit", "1", code=1)
    monkeypatch.setattr(anomaly, "fit", lambda *a, **k: (_ for _ in ()).throw(Interrupted("x")))
    assert "the same command goes on" in experiment("--digit", "1", code=1)
    assert resumed == [False, True]

    def half_fitted(*args, on_save, **options):
        def stop(iteration):
            on_save(iteration)
            if iteration == 15:
                raise Interrupted("x")

        return fit(*args, on_save=stop, **options)

    monkeypatch.setattr(anomaly, "fit", half_fitted)
    experiment("--digit", "1", code=1)
    monkeypatch.setattr(anomaly, "fit", fit)
    (again,) = json.loads(experiment("--digit", "1", "--json"))
    assert resumed == [False, True]  # the finished backbone was kept
    assert again["auprc"] == result["auprc"]

    def never(*args, **options):
        raise AssertionError("a finished class is done again")

    monkeypatch.setattr(anomaly, "hold_out", never)
    assert json.loads(experiment("--digit", "1", "--json")) == [again]
    page = report(world / "out" / "digit-1" / "heads")
    assert "Anomaly detection" in page and "AUPRC of a held-out class" in page
    assert "energy prior, Eq. 20" in experiment("--digit", "1")


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--digits", "1,x"], 2, "labels such as 1,4,5,7,9"),
        (["--digits", ""], 2, "labels such as"),
        (["--digits", "9"], 1, "cannot hold out 9: the labels of bars are 0, 1, 2"),
        (["--data", "bare.npz"], 1, "bare.npz has no labels"),
        (["--backbone", "nope"], 1, "unknown trainer 'nope'"),
        (["--digit", "1", "--set", "layers=3"], 1, "unknown pretrain settings: layers"),
        (["--set", "iterations"], 2, "expected NAME=VALUE"),
        (["--fit-iterations", "5"], 2, "--fit-iterations"),
    ],
)
def test_bad_input_gives_one_line(world, args, code, message):
    assert message in experiment(*args, code=code)


def test_an_experiment_keeps_its_settings(world):
    experiment("--digit", "1", "--set", "layers=3", code=1)  # refused: nothing has begun
    experiment("--digits", "9", code=1)
    experiment("--digits", "1,9", code=1)  # before any training
    assert not list((world / "out").glob("digit-*"))
    start(AnomalyConfig("x", seed=1), world / "out")  # so other settings are still free
    (world / "out" / "digit-1").mkdir()
    with pytest.raises(EbmPriorError, match="out was started with another value of seed;"):
        start(AnomalyConfig("x", seed=2), world / "out")
    line = experiment("--digits", "1", "--seed", 3, code=1)
    assert "out was started with another value of data, pretrain" in line
