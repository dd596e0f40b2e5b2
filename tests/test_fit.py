import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, FitConfig, SamplerConfig, fit, micro_batch
from ebm_prior import fit as fit_function
from ebm_prior.fit import DivergenceError, _Fit
from ebm_prior.interrupt import Interrupted
from ebm_prior.losses import contrastive_loss, nce_loss
from ebm_prior.posterior_cache import PosteriorStream, row_size
from ebm_prior.run import RunFolder, newest_run

QUICK = dict(
    objective="nce+mle",
    nce_iterations=60,
    mle_iterations=20,
    batch_size=32,
    save_every=10,
    judge_every=20,
    sample_every=0,
    cache_gb=0.1,
)


def mismatched_images(toy, n=600):
    """Images whose latents have half the spread the prior believes: a hole to find."""
    z = toy.transform([0.5 * torch.randn(n, *g.shape, dtype=toy.dtype) for g in toy.groups])
    return (toy.decode(z).mean * 255).round().to(torch.uint8)


def new_prior(toy, kind="both", transition="pcnl", step_size=0.3):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return EnergyPrior.for_backbone(
            toy, kind, nef=4, ndf=16, sampler=SamplerConfig(transition, 20, step_size)
        )


def weights(prior):
    return torch.cat([p.detach().flatten() for p in prior.heads.parameters()])


def test_losses_point_the_right_way():
    e_pos = torch.zeros(4, 2, requires_grad=True)
    e_neg = torch.zeros(4, 2, requires_grad=True)
    for loss in (contrastive_loss, nce_loss):
        grads = torch.autograd.grad(loss(e_pos, e_neg), (e_pos, e_neg))
        assert (grads[0] > 0).all() and (grads[1] < 0).all()  # descent lowers E on data
    assert nce_loss(e_pos, e_neg).item() == pytest.approx(2 * math.log(2))


def test_contrastive_gradient_is_equation_10(toy):
    """d loss = E_q[dE] - E_p[dE], the negative of Eq. 10 with f = -E."""
    prior = new_prior(toy)
    z_pos, z_neg = (toy.transform(prior.noise(8)) for _ in range(2))
    parameters = list(prior.heads.parameters())
    grads = torch.autograd.grad(
        contrastive_loss(prior.energies(z_pos), prior.energies(z_neg)), parameters
    )
    per_sample = [
        torch.autograd.grad(prior.energy([t[i : i + 1] for t in z]).sum(), parameters)
        for z in (z_pos, z_neg)
        for i in range(8)
    ]
    for j, grad in enumerate(grads):
        pos = sum(g[j] for g in per_sample[:8]) / 8
        neg = sum(g[j] for g in per_sample[8:]) / 8
        torch.testing.assert_close(grad, pos - neg)


def test_nce_finds_the_density_ratio(tmp_path):
    """At the optimum -E is log q/p, so the tilted prior has the posterior's spread."""
    toy = ToyBackbone(sigma=0.02).freeze()
    prior = new_prior(toy, "both")
    config = FitConfig(
        objective="nce",
        nce_iterations=1500,
        nce_lr=5e-3,
        batch_size=128,
        sample_every=0,
        patience=100,
    )
    images = mismatched_images(toy, 4000)
    result = fit(prior, images, config, run_dir=tmp_path / "run")
    assert result.held_out_loss < 1.25  # chance: 1.386
    eps = prior.sample_eps(4000, steps=60, generator=torch.Generator().manual_seed(1))
    want = toy.inverse(toy.posterior(images / 255).z)
    for ours, theirs in zip(eps, want, strict=True):
        spread = theirs.std(0)
        assert spread.min() < 0.8  # 1 under the Gaussian prior
        torch.testing.assert_close(ours.std(0), spread, rtol=0.12, atol=0)


def test_other_transitions_are_for_sampling_only(tmp_path, toy):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6, sampler=SamplerConfig("mala", 5, 0.1))
    images = torch.zeros(20, *toy.image_shape, dtype=torch.uint8)
    with pytest.raises(EbmPriorError, match="fitted with langevin or pcnl, not mala"):
        fit(prior, images, FitConfig(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("chains", ["persistent", "fresh"])
@pytest.mark.parametrize("transition", ["pcnl", "langevin"])
def test_mle_moves_the_prior_towards_the_posterior(tmp_path, transition, chains):
    toy = ToyBackbone(sigma=0.02).freeze()
    prior = new_prior(toy, "both", transition, 0.2)
    config = FitConfig(
        objective="mle",
        mle_iterations=300,
        mle_lr=5e-3,
        batch_size=64,
        steps=8,
        chains=chains,
        sample_every=0,
    )
    result = fit(prior, mismatched_images(toy, 1000), config, run_dir=tmp_path / "run")
    eps = prior.sample_eps(1000, steps=80, generator=torch.Generator().manual_seed(1))
    assert torch.cat([e.flatten() for e in eps]).std().item() < 0.8
    assert (result.acceptance is None) == (transition == "langevin")


def test_run_folder_holds_what_it_should(toy, tmp_path):
    prior = new_prior(toy)
    config = FitConfig(**QUICK | dict(sample_every=40))
    fit(prior, mismatched_images(toy), config, run_dir=tmp_path / "run", record={"note": 1})
    names = {p.name for p in (tmp_path / "run").iterdir()}
    assert names == {"config.json", "heads.safetensors", "log.jsonl", "tb", "samples"}
    stored = json.loads((tmp_path / "run" / "config.json").read_text())
    training = stored["training"]
    assert training["status"] == "finished" and training["note"] == 1
    assert FitConfig.from_dict(training["fit"]) == config
    assert stored["backbone"]["sha256"] == toy.sha256
    assert {p.name for p in (tmp_path / "run" / "samples").iterdir()} == {
        "000040.png",
        "000080.png",
    }
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    last = [r for r in log if "loss" in r][-1]
    assert last["iteration"] == 80 and set(last["energy_posterior"]) == set(prior.head_names)
    assert {"acceptance", "grad_norm", "images_per_second", "step_size"} <= last.keys()
    again = EnergyPrior.from_pretrained(tmp_path / "run", backbone=toy)
    assert torch.equal(weights(again), weights(prior)) and again.sampler == prior.sampler
    assert newest_run(tmp_path) == tmp_path / "run"


@pytest.mark.parametrize("cache_gb", [0.1, 0.0])
@pytest.mark.parametrize("stop_at", [1, 25, 60, 61, 75])
def test_resuming_gives_the_identical_heads(toy, tmp_path, monkeypatch, stop_at, cache_gb):
    images = mismatched_images(toy)
    config = FitConfig(**QUICK | dict(cache_gb=cache_gb))
    whole = new_prior(toy)
    fit(whole, images, config, run_dir=tmp_path / "whole")

    count, update = 0, _Fit.update

    def dying(self, *args):
        nonlocal count
        count += 1
        if count == stop_at:
            raise KeyboardInterrupt  # as abrupt as a kill: nothing is saved
        return update(self, *args)

    monkeypatch.setattr(_Fit, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(new_prior(toy), images, config, run_dir=tmp_path / "parts")
    monkeypatch.undo()
    parts = new_prior(toy)
    fit(parts, images, config, run_dir=tmp_path / "parts", resume=True)
    assert torch.equal(weights(whole), weights(parts))
    assert whole.sampler == parts.sampler
    logs = [
        [
            {k: v for k, v in json.loads(line).items() if k != "images_per_second"}
            for line in (tmp_path / run / "log.jsonl").read_text().splitlines()
        ]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def test_ctrl_c_saves_and_says_how_to_resume(toy, tmp_path, monkeypatch):
    images, config = mismatched_images(toy), FitConfig(**QUICK)
    whole = new_prior(toy)
    fit(whole, images, config, run_dir=tmp_path / "whole")
    update = _Fit.update

    def press(self, *args):
        if self.total == 33:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    monkeypatch.setattr(_Fit, "update", press)
    with pytest.raises(Interrupted, match=f"fit --resume {tmp_path / 'parts'}"):
        fit(new_prior(toy), images, config, run_dir=tmp_path / "parts")
    assert RunFolder(tmp_path / "parts").load_state()[1]["total"] == 34
    monkeypatch.undo()
    parts = new_prior(toy)
    fit(parts, images, config, run_dir=tmp_path / "parts", resume=True)
    assert torch.equal(weights(whole), weights(parts))


def interrupted(toy, images, run, config, monkeypatch, at):
    """Fit with Ctrl-C during iteration `at`, resumed; the prior."""
    update = _Fit.update

    def press(self, *args):
        if self.total == at:
            os.kill(os.getpid(), signal.SIGINT)
        return update(self, *args)

    with monkeypatch.context() as patch:
        patch.setattr(_Fit, "update", press)
        with pytest.raises(Interrupted):
            fit(new_prior(toy), images, config, run_dir=run)
    prior = new_prior(toy)
    fit(prior, images, config, run_dir=run, resume=True)
    return prior


def test_ctrl_c_where_patience_ends_changes_nothing(toy, tmp_path, monkeypatch):
    def judge(self):
        self.best_loss, self.since_best = 1.0, self.since_best + 1

    monkeypatch.setattr(_Fit, "judge", judge)
    config, whole = FitConfig(**QUICK | dict(patience=15)), new_prior(toy)
    images = mismatched_images(toy)
    result = fit(whole, images, config, run_dir=tmp_path / "whole")
    assert result.iterations == 15 + 20
    parts = interrupted(toy, images, tmp_path / "parts", config, monkeypatch, at=14)
    assert torch.equal(weights(whole), weights(parts))


def test_a_rollback_after_an_interruption_goes_where_it_would_have(toy, tmp_path, monkeypatch):
    diverged = _Fit.diverged

    def report(self, step):
        return "z1" if self.total == 27 and self.rollbacks == 0 else diverged(self, step)

    monkeypatch.setattr(_Fit, "diverged", report)
    config, whole = FitConfig(**QUICK), new_prior(toy)
    images = mismatched_images(toy)
    fit(whole, images, config, run_dir=tmp_path / "whole")
    parts = interrupted(toy, images, tmp_path / "parts", config, monkeypatch, at=24)
    assert torch.equal(weights(whole), weights(parts))


@pytest.mark.parametrize("bad", [math.nan, 1e9])
def test_divergence_is_rolled_back_and_survived(toy, tmp_path, monkeypatch, bad):
    update, hits = _Fit.update, []

    def sabotage(self, loss, positives, negatives):
        if self.total == 27 and not hits:
            hits.append(1)
            with torch.no_grad():
                self.prior.heads[1].layers[-1].bias.fill_(bad)
                self.prior.heads[1].layers[-1].weight.mul_(bad)
        return update(self, loss, positives, negatives)

    monkeypatch.setattr(_Fit, "update", sabotage)
    prior = new_prior(toy)
    result = fit(prior, mismatched_images(toy), FitConfig(**QUICK), run_dir=tmp_path / "run")
    assert result.rollbacks == 1 and weights(prior).isfinite().all()
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (record,) = [r for r in log if "rollback" in r]
    assert record["diverged"] == "z1" and record["iteration"] == 20


def test_weights_that_the_last_update_spoilt_are_never_saved_as_good(toy, tmp_path, monkeypatch):
    update, hits = _Fit.update, []

    def sabotage(self, loss, positives, negatives):
        step = update(self, loss, positives, negatives)
        if self.total == 29 and not hits:  # the save at 30 comes next
            hits.append(1)
            with torch.no_grad():
                self.prior.heads[1].layers[-1].weight.mul_(1e9)
        return step

    monkeypatch.setattr(_Fit, "update", sabotage)
    prior = new_prior(toy)
    result = fit(prior, mismatched_images(toy), FitConfig(**QUICK), run_dir=tmp_path / "run")
    assert result.rollbacks == 1
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    (record,) = [r for r in log if "rollback" in r]
    assert record["iteration"] == 20


def test_a_rollback_halves_learning_rate_and_step(toy, tmp_path, monkeypatch):
    seen, diverged = [], _Fit.diverged

    def report(self, step):
        if self.total == 27 and self.rollbacks == 0:
            return "z1"
        if self.rollbacks and not seen:
            seen.append((self.lr_scale, self.step_size))
        return diverged(self, step)

    monkeypatch.setattr(_Fit, "diverged", report)
    prior = new_prior(toy)
    start = prior.sampler.step_size
    fit(prior, mismatched_images(toy), FitConfig(**QUICK), run_dir=tmp_path / "run")
    assert seen == [(0.5, start / 2)]


def test_divergence_before_the_first_save_leaves_heads(toy, tmp_path, monkeypatch):
    monkeypatch.setattr(_Fit, "diverged", lambda self, step: "z1")
    with pytest.raises(DivergenceError):
        fit(new_prior(toy), mismatched_images(toy), FitConfig(**QUICK), run_dir=tmp_path / "run")
    again = EnergyPrior.from_pretrained(tmp_path / "run", backbone=toy)
    assert torch.equal(weights(again), weights(new_prior(toy)))


def test_a_picture_that_cannot_be_made_costs_nothing(toy, tmp_path, monkeypatch):
    images = mismatched_images(toy)
    monkeypatch.setattr(
        EnergyPrior, "images", lambda self, eps, t=1.0: torch.full((36, 1, 4, 4), math.nan)
    )
    fit(new_prior(toy), images, FitConfig(**QUICK), run_dir=tmp_path / "run")
    assert not list((tmp_path / "run" / "samples").iterdir())


def test_nce_stops_when_patience_ends_and_keeps_the_best(toy, tmp_path, monkeypatch):
    prior, kept = new_prior(toy), []
    losses = iter([3.0, 1.0, 2.0, 2.0, 2.0, 2.0])
    judge = _Fit.judge

    def judged(self):
        with monkeypatch.context() as patch:
            if self.iteration % self.config.judge_every == 0:
                loss = torch.tensor(next(losses))
                patch.setattr(sys.modules[_Fit.__module__], "nce_loss", lambda pos, neg: loss)
                if loss == 1.0:
                    kept.append(torch.cat([p.detach().flatten() for p in self.average]).clone())
            return judge(self)

    monkeypatch.setattr(_Fit, "judge", judged)
    config = FitConfig(**QUICK | dict(objective="nce", nce_iterations=500, patience=2))
    result = fit(prior, mismatched_images(toy), config, run_dir=tmp_path / "run")
    assert result.iterations == 4 * config.judge_every and result.held_out_loss == 1.0
    assert torch.equal(weights(prior), kept[0])


def test_hopeless_divergence_ends_with_the_last_good_heads(toy, tmp_path, monkeypatch):
    update = _Fit.update

    def sabotage(self, loss, positives, negatives):
        if self.total >= 27:
            negatives = [n * math.inf for n in negatives]
        return update(self, loss, positives, negatives)

    monkeypatch.setattr(_Fit, "update", sabotage)
    with pytest.raises(DivergenceError, match="at iteration 27 after 3 rollbacks.*last good"):
        fit(new_prior(toy), mismatched_images(toy), FitConfig(**QUICK), run_dir=tmp_path / "run")
    again = EnergyPrior.from_pretrained(tmp_path / "run", backbone=toy)
    assert weights(again).isfinite().all()
    assert json.loads((tmp_path / "run" / "config.json").read_text())["training"]["status"] == (
        "diverged"
    )


def test_a_full_disk_leaves_the_last_good_files(toy, tmp_path, monkeypatch):
    import errno

    saves, real = [], RunFolder.save_state
    images = mismatched_images(toy)

    def full(self, *args):
        saves.append(1)
        if len(saves) == 3:
            monkeypatch.setattr(
                os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space"))
            )
        return real(self, *args)

    monkeypatch.setattr(RunFolder, "save_state", full)
    with pytest.raises(EbmPriorError, match="disk full"):
        fit(new_prior(toy), images, FitConfig(**QUICK), run_dir=tmp_path / "run")
    monkeypatch.undo()
    assert RunFolder(tmp_path / "run").load_state()[1]["total"] == 20
    EnergyPrior.from_pretrained(tmp_path / "run", backbone=toy)
    assert not list((tmp_path / "run").rglob("*tmp*"))
    prior = new_prior(toy)
    fit(prior, images, FitConfig(**QUICK), run_dir=tmp_path / "run", resume=True)


def test_what_was_in_the_folder_before_stays(toy, tmp_path):
    run = tmp_path / "run"
    (run / "state").mkdir(parents=True)
    (run / "state" / "own.txt").write_text("my own")
    (run / "state" / ".0123456789ab.tmp").write_text("of a save that was killed")
    fit(new_prior(toy), mismatched_images(toy), FitConfig(**QUICK), run_dir=run)
    assert [path.name for path in (run / "state").iterdir()] == ["own.txt"]


def test_a_new_run_never_goes_on_from_the_state_of_an_old_one(saved, tmp_path):
    toy, run, images, config = saved
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "config.json").unlink()
    config = replace(config, seed=5, save_every=100)

    def stop(*_):
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(_Fit, "update", stop)
        (tmp_path / "run" / "state" / "posterior.json").unlink()
        fit(new_prior(toy), images, config, run_dir=tmp_path / "run")
    parts, whole = new_prior(toy), new_prior(toy)
    fit(parts, images, config, run_dir=tmp_path / "run", resume=True)
    fit(whole, images, config, run_dir=tmp_path / "whole")
    assert torch.equal(weights(parts), weights(whole))


def test_no_two_processes_work_on_one_run(toy, tmp_path):
    images, config, other = mismatched_images(toy), FitConfig(**QUICK), []

    def meanwhile(iteration):
        if iteration == 30:
            with pytest.raises(EbmPriorError, match="another process is at work on .*run; wait"):
                fit(new_prior(toy), images, config, run_dir=tmp_path / "run", resume=True)
            other.append(RunFolder(tmp_path / "run").load_state()[1]["total"])
            raise KeyboardInterrupt  # a run that ended in any way can be resumed

    with pytest.raises(KeyboardInterrupt):
        fit(new_prior(toy), images, config, run_dir=tmp_path / "run", on_save=meanwhile)
    assert other == [20]
    fit(new_prior(toy), images, config, run_dir=tmp_path / "run", resume=True)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A fit of a toy that was killed after its save at iteration 20; all it was made of."""
    toy, run = ToyBackbone().double().freeze(), tmp_path_factory.mktemp("saved") / "run"

    def stop(iteration):
        if iteration == 30:
            raise KeyboardInterrupt

    images, config = mismatched_images(toy), FitConfig(**QUICK)
    with pytest.raises(KeyboardInterrupt):
        fit(new_prior(toy), images, config, run_dir=run, on_save=stop)
    return toy, run, images, config


def test_a_resumed_run_keeps_its_settings(saved):
    toy, run, images, config = saved
    with pytest.raises(EbmPriorError, match="batch_size 16 differs from the 32 of .*run; a res"):
        fit(new_prior(toy), images, replace(config, batch_size=16), run_dir=run, resume=True)


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tensors, values: tensors.pop("generator"),
        lambda tensors, values: tensors.update(generator=torch.zeros(3, dtype=torch.uint8)),
        # of one number: copied into a head it would fill it
        lambda tensors, values: tensors.update({"parameters.0": torch.zeros(1)}),
        lambda tensors, values: tensors.update({"best.1": torch.zeros(1)}),
        lambda tensors, values: tensors.pop("average.0"),
        lambda tensors, values: values.update(phase=7),
        lambda tensors, values: values.update(iteration="20"),
        lambda tensors, values: values.update(run_phase=1),
        lambda tensors, values: values.update({"good.": {"phase": 0}}),
    ],
)
def test_a_damaged_state_is_one_line(saved, tmp_path, spoil):
    toy, run, images, config = saved
    shutil.copytree(run, tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    tensors, values = folder.load_state()
    assert values["total"] == 20
    spoil(tensors, values)
    folder.save_state(tensors, values)
    with pytest.raises(EbmPriorError, match="state.safetensors is damaged or of other heads"):
        fit(new_prior(toy), images, config, run_dir=tmp_path / "run", resume=True)


@pytest.mark.parametrize(
    "settings, message",
    [
        (dict(objective="gan"), "objective must be one of nce, mle, nce\\+mle"),
        (dict(nce_lr=-1.0), "nce_lr must be positive"),
        (dict(batch_size=0), "batch_size must be at least 1"),
        (dict(chains="old"), "chains must be"),
        (dict(weight_decay=math.nan), "weight_decay must be 0 or more"),
        (dict(mle_lr=math.inf), "mle_lr must be positive"),
        (dict(beta1=1.0), r"beta1 must lie in \[0, 1\)"),
        (dict(seed=-1), "seed must be 0 or more"),
    ],
)
def test_wrong_settings_are_named(settings, message):
    with pytest.raises(EbmPriorError, match=message):
        FitConfig(**settings)


def test_the_regularizer_adds_the_squared_total_energies():
    pos, neg = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[2.0, 2.0]])
    for loss in (nce_loss, contrastive_loss):
        added = loss(pos, neg, 0.1) - loss(pos, neg)
        torch.testing.assert_close(added, torch.tensor(0.1 * ((9 + 1) / 2 + 16)))


def test_the_average_of_the_heads_is_exponential(toy, tmp_path, monkeypatch):
    trail, update = [], _Fit.update

    def recorded(self, *args):
        if not trail:
            trail.append(weights(self.prior).clone())
        step = update(self, *args)
        trail.append(weights(self.prior).clone())
        return step

    monkeypatch.setattr(_Fit, "update", recorded)
    config = FitConfig(
        objective="mle", mle_iterations=30, batch_size=8, ema=0.5, sample_every=0, draws=1
    )
    prior = new_prior(toy)
    fit(prior, mismatched_images(toy, 50), config, run_dir=tmp_path / "run")
    average = trail[0]
    for iteration, value in enumerate(trail[1:]):
        decay = min(0.5, (1 + iteration) / (10 + iteration))  # shorter at first
        average = decay * average + (1 - decay) * value
    torch.testing.assert_close(weights(prior), average)


def test_a_share_of_the_persistent_chains_starts_afresh(toy, tmp_path):
    kept = []
    for refresh in (0.0, 0.5):
        config = FitConfig(objective="mle", batch_size=200, refresh=refresh)
        fitting = _Fit(new_prior(toy), config, RunFolder(tmp_path), {})
        fitting.pool = torch.arange(400.0, dtype=toy.dtype)[:, None].repeat(1, 5) + 100
        starts = fitting.chain_starts()
        kept.append((starts == fitting.pool[fitting.picked]).all(1).double().mean().item())
    assert kept[0] == 1 and 0.35 < kept[1] < 0.65


def test_every_prior_sample_serves_as_often_as_reuse_says(toy, tmp_path):
    config = FitConfig(batch_size=32, reuse=4)
    fitting = _Fit(new_prior(toy), config, RunFolder(tmp_path), {})
    fitting.gaussian_negatives()
    before = fitting.pool.clone()
    fitting.iteration = 5
    fitting.gaussian_negatives()
    changed = (fitting.pool != before).any(1).nonzero().flatten()
    assert changed.tolist() == list(range(40, 48))  # a quarter of the batch, the oldest rows


def test_cached_batches_reach_a_gpu_one_ahead(toy, tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(sys.modules["ebm_prior.fit"], "Prefetch", lambda *args: made.append(args))
    fitting = _Fit(new_prior(toy), FitConfig(), RunFolder(tmp_path / "run"), {})
    fitting.open_source(mismatched_images(toy), lambda: None)
    with fitting.prefetch(5) as prefetched:
        assert prefetched is None and not made  # on the CPU a batch is read when it is needed
    fitting.prior = SimpleNamespace(backbone=SimpleNamespace(device=torch.device("cuda")))
    fitting.prefetch(5)
    ((make, length, device),) = made
    assert length == 5 and device.type == "cuda"
    batch = make(3)[0]
    assert torch.equal(batch, make(3)[0]) and not torch.equal(batch, make(4)[0])


@pytest.mark.gpu
def test_what_a_rollback_needs_is_kept_in_the_hosts_memory(tmp_path):
    toy = ToyBackbone().to("cuda").freeze()
    fitting = _Fit(new_prior(toy), FitConfig(), RunFolder(tmp_path / "run"), {})
    fitting.pool = torch.zeros(3, 2, device="cuda")
    kept, _ = fitting.capture()
    assert {tensor.device.type for tensor in kept.values()} == {"cpu"}


@pytest.mark.parametrize("fit_in, rows", [(1e9, [200, 50]), (34, [34]), (0.1, [2])])
def test_as_many_judge_as_fit_into_memory(toy, tmp_path, monkeypatch, fit_in, rows):
    prior = new_prior(toy)
    kept = int(fit_in * row_size(prior))
    monkeypatch.setattr(sys.modules["ebm_prior.fit"], "HELD_OUT_KEPT", kept)
    fitting = _Fit(prior, FitConfig(draws=1, held_out=0.5), RunFolder(tmp_path / "run"), {})
    fitting.open_source(mismatched_images(toy, 500), lambda: None)
    positives, negatives = zip(*fitting.judged, strict=True)
    assert [len(inputs[0]) for inputs in positives] == rows
    assert [len(inputs[0]) for inputs in negatives] == rows


def test_draws_of_a_held_out_image_are_never_trained_on(toy, tmp_path):
    config = FitConfig(draws=3, held_out=0.2)
    run = RunFolder(tmp_path / "run")
    fitting = _Fit(new_prior(toy), config, run, {})
    fitting.open_source(mismatched_images(toy, 50), lambda: None)
    train, held_out = (
        {i % 50 for i in rows.tolist()} for rows in (fitting.train, fitting.held_out)
    )
    assert len(fitting.source) == 150 == len(fitting.train) + len(fitting.held_out)
    assert len(held_out) == 10 and not train & held_out
    z = fitting.source(torch.tensor([7, 57, 107]))[1]
    assert z.unique(dim=0).shape[0] == 3  # draws of one image differ


def test_binary_backbones_see_images_drawn_anew(toy):
    toy.binarize = True
    grey = torch.full((1, 1, 4, 4), 64, dtype=torch.uint8)
    stream = PosteriorStream(new_prior(toy), grey)
    x = stream.pictures(torch.zeros(2000).long(), torch.Generator().manual_seed(0))
    assert set(x.unique().tolist()) == {0.0, 1.0}
    assert abs(x.mean().item() - 64 / 255) < 5 * (0.25 * 0.75 / x.numel()) ** 0.5


def test_a_damaged_log_keeps_its_whole_lines(tmp_path):
    lines = [b'{"iteration": 10}', b"\xff\xfe\0", b"[1]", b"5", b'{"iteration": 30}', b'{"iter']
    (tmp_path / "log.jsonl").write_bytes(b"\n".join(lines))
    RunFolder(tmp_path).rewind_log(20)
    assert (tmp_path / "log.jsonl").read_bytes() == b'{"iteration": 10}\n'


def test_unknown_settings_are_named():
    with pytest.raises(EbmPriorError, match="unknown fit settings: nce_lrr"):
        FitConfig.from_dict({"nce_lrr": 1})


def test_wrong_images_and_folders_are_refused(toy, tmp_path):
    with pytest.raises(EbmPriorError, match="images are"):
        fit(
            new_prior(toy),
            torch.zeros(20, 3, 4, 4, dtype=torch.uint8),
            FitConfig(),
            run_dir=tmp_path / "run",
        )
    with pytest.raises(EbmPriorError, match="too few"):
        fit(
            new_prior(toy),
            torch.zeros(2, 1, 4, 4, dtype=torch.uint8),
            FitConfig(),
            run_dir=tmp_path / "run",
        )
    assert not (tmp_path / "run").exists()
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "config.json").write_text("{}")
    with pytest.raises(EbmPriorError, match="already holds a run"):
        fit(new_prior(toy), mismatched_images(toy), FitConfig(), run_dir=tmp_path / "run")


def test_the_package_exports_the_function_not_the_module():
    assert callable(fit_function)


@pytest.mark.slow
@pytest.mark.timeout(3600)  # twenty processes, each of which imports torch
def test_kill_at_ten_random_moments_and_resume(tmp_path):
    """kill -9, at any moment, then --resume: the same bytes as an uninterrupted run."""
    torch.manual_seed(3)
    (tmp_path / "toy.json").write_text('{"top": 2, "bottom": 3}')
    import numpy as np

    images = mismatched_images(ToyBackbone(), 3000).squeeze(1).numpy()
    np.savez(tmp_path / "x.npz", x_train=images, x_test=images[:100])
    command = [sys.executable, "-m", "ebm_prior", "fit"]
    first = [
        "--backbone",
        "toy",
        "--ckpt",
        str(tmp_path / "toy.json"),
        "--data",
        str(tmp_path / "x.npz"),
        "--heads",
        "both",
        "--objective",
        "nce+mle",
        "--nce-iterations",
        "600",
        "--mle-iterations",
        "200",
        "--save-every",
        "20",
    ]
    whole = tmp_path / "whole"
    began = time.monotonic()
    subprocess.run([*command, *first, "--out", str(whole)], check=True, capture_output=True)
    length = time.monotonic() - began
    expected = (whole / "heads.safetensors").read_bytes()
    moments = torch.rand(10, generator=torch.Generator().manual_seed(0)) * length * 0.9
    for i, moment in enumerate(moments.tolist()):
        run = tmp_path / f"run{i}"
        process = subprocess.Popen(
            [*command, *first, "--out", str(run)],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        time.sleep(moment)
        process.kill()
        process.wait()
        again = (
            ["--resume", str(run)]
            if (run / "config.json").exists()
            else [*first, "--out", str(run)]
        )
        subprocess.run([*command, *again], check=True, capture_output=True)
        assert (run / "heads.safetensors").read_bytes() == expected, f"killed after {moment:.1f} s"


def test_a_resumed_run_cuts_its_chains_as_it_began(toy, tmp_path, monkeypatch):
    images = mismatched_images(toy)
    config = FitConfig(**QUICK | dict(objective="mle", save_every=5))

    def run(name, free, **options):
        monkeypatch.setattr(micro_batch, "free_memory", lambda _: free)
        prior = new_prior(toy)
        fit(prior, images, config, run_dir=tmp_path / name, **options)
        batch = f" x {config.batch_size}"
        return [n for key, n in prior.chain_memory.rows.items() if key.endswith(batch)]

    def stop(iteration):
        if iteration == 10:  # before it is saved: back to 5
            raise KeyboardInterrupt

    whole = run("whole", 2e4)
    with pytest.raises(KeyboardInterrupt):
        run("parts", 2e4, on_save=stop)
    assert run("parts", 1e15, resume=True) == whole
    assert run("plenty", 1e15) == [config.batch_size] != whole
