"""Joint training: what is updated, what is kept, resuming, divergence, the verb."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

import ebm_prior
from backbones import loop
from backbones.generator import Generator
from backbones.generator.config import PRESETS, TrainConfig
from backbones.generator.train import _Joint, train
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.fit import DivergenceError
from ebm_prior.interrupt import Interrupted
from ebm_prior.joint import posterior_log_density
from ebm_prior.run import newest_run, read_state
from ebm_prior.saved import read_config
from tests.test_cli import run
from tests.test_heads import linear_sizes
from tests.test_hub import REPO

TINY = dict(
    iterations=8, batch_size=6, latents=(2, 3), hidden=(4,), ngf=2, ndf=5, prior_steps=2,
    posterior_steps=2, heads_lr=1e-2, generator_lr=1e-2, save_every=3, log_every=4, sample_every=0,
)  # fmt: skip
METHODS = ["mle", "variational"]
FILES = ("backbone.safetensors", "heads.safetensors")


def blobs(n=20):
    """Bright squares at one of two places."""
    x = torch.zeros(n, 1, 8, 8, dtype=torch.uint8)
    x[::2, :, :4, :4], x[1::2, :, 4:, 4:] = 250, 200
    return x


def go(out, **changes):
    progress = changes.pop("progress", lambda *_: None)
    settings = TINY | changes
    return train(blobs(), out=out, dataset="blobs", progress=progress, **settings)


def opened(folder):
    config = read_config(folder)
    backbone = ebm_prior.load_backbone("generator", folder / "backbone.safetensors")
    return config, EnergyPrior.from_pretrained(folder, backbone=backbone)


@pytest.mark.parametrize("method", METHODS)
def test_everything_learns_and_the_folder_is_what_was_trained(tmp_path, method):
    start = {}

    def keep(step, total, metrics):
        if step == 1:
            start.update(metrics)
        start["last"] = metrics

    result = go(
        tmp_path / "run", method=method, iterations=60, progress=keep, batch_size=20,
        posterior_steps=5, log_every=30, save_every=60, heads_lr=1e-3, generator_lr=3e-3,
    )  # fmt: skip
    assert start["last"]["log_px"] > start["log_px"] + 150
    assert result.iterations == 60 and result.rollbacks == 0
    config, prior = opened(tmp_path / "run")
    assert config["training"]["status"] == "finished" and prior.backbone.dataset == "blobs"
    assert config["training"]["train"]["latents"] == [2, 3]
    assert prior.sampler == SamplerConfig("langevin", 2, 0.16)
    # the inference network knows the images, whichever method trained it
    x = blobs().float() / 255
    z = prior.backbone.posterior(x, generator=torch.Generator().manual_seed(0)).z
    other = prior.backbone.decode([t.roll(1, 0) for t in z])  # the other kind's latents
    assert prior.backbone.decode(z).log_prob(x).mean() > other.log_prob(x).mean() + 50
    fresh = joint(TrainConfig(**TINY | {"method": method}), blobs())
    for module in ("p_x", "p_z", "q_x", "q_z"):
        before, after = (getattr(b, module).state_dict() for b in (fresh.model, prior.backbone))
        assert not any(torch.equal(before[k], after[k]) for k in before), module
    assert not (tmp_path / "run" / "state").exists()
    assert [p.name for p in (tmp_path / "run" / "samples").iterdir()] == ["000060.png"]
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    log = json.loads(lines[-1])
    assert len(lines) == 2 and log["iteration"] == 60
    assert log["energy_posterior"].keys() == {"z2", "z1"} == log["energy_prior"].keys()
    assert ("eps_norm_posterior" in log) == (method == "mle")


def joint(config, images):
    return _Joint(images, Path("nowhere"), "blobs", config, torch.device("cpu"), {})


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kill", [False, True], ids=["ctrl-c", "kill"])
def test_resuming_gives_identical_files(tmp_path, method, kill):
    go(tmp_path / "whole", method=method)

    def stop(step, *_):
        if step == 5 and kill:
            raise RuntimeError("killed")
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(RuntimeError if kill else Interrupted):
        go(tmp_path / "parts", method=method, progress=stop)
    steps = []
    go(tmp_path / "parts", method=method, resume=True, progress=lambda s, *_: steps.append(s))
    assert steps[0] == (4 if kill else 6)  # saved at 3, or when asked to stop
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    logs = [
        [json.loads(line)["iteration"] for line in (tmp_path / run / "log.jsonl").open()]
        for run in ("whole", "parts")
    ]
    assert logs[0] == logs[1]


def sabotage(monkeypatch, at, times=1, what="energies in z1"):
    """Let a step report trouble so many times."""
    whole, hits = _Joint.trouble, []

    def trouble(self, terms, norms):
        if self.step == at and len(hits) < times:
            hits.append(self.step)
            return what
        return whole(self, terms, norms)

    monkeypatch.setattr(_Joint, "trouble", trouble)
    return hits


def test_slow_steps_save_more_often(tmp_path, monkeypatch):
    def stop(step, *_):
        if step == 5:
            raise RuntimeError("killed")

    go(tmp_path / "whole")
    monkeypatch.setattr(loop, "SAVE_SECONDS", 0)
    with pytest.raises(RuntimeError, match="killed"):
        go(tmp_path / "parts", progress=stop)
    steps = []
    go(tmp_path / "parts", resume=True, progress=lambda step, *_: steps.append(step))
    assert steps[0] == 5
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_an_interrupted_run_rolls_back_to_where_it_would_have(tmp_path, monkeypatch):
    sabotage(monkeypatch, at=5)
    assert go(tmp_path / "whole").rollbacks == 1
    sabotage(monkeypatch, at=5)

    def press(step, *_):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        go(tmp_path / "parts", progress=press)
    steps = []
    result = go(tmp_path / "parts", resume=True, progress=lambda s, *_: steps.append(s))
    assert result.rollbacks == 1 and steps == [4, 5, 6, 7, 8]  # back to the save at 3
    for name in FILES:
        assert (tmp_path / "parts" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize("kill", [False, True])
def test_energies_on_their_way_are_not_rolled_back_to(tmp_path, monkeypatch, kill):
    """Apart at the save at 6, they run away at 7: back to 3, before they did."""
    monkeypatch.setattr(
        _Joint, "gaps", lambda self, _: [1, 0.02 * self.config.energy_limit * (self.step >= 5)]
    )
    sabotage(monkeypatch, at=6)
    steps = []

    def note(step, *_):
        steps.append(step)

    def die(step, *_):
        if step == 7:
            raise RuntimeError("killed")

    if kill:
        with monkeypatch.context() as patch:  # later, so that the save at 6 is the last
            patch.setattr(_Joint, "trouble", lambda *_: "")
            with pytest.raises(RuntimeError, match="killed"):
                go(tmp_path / "run", progress=die)
    assert go(tmp_path / "run", resume=kill, progress=note).rollbacks == 1
    assert steps == ([4, 5, 6, 7, 8] if kill else [1, 2, 3, 4, 5, 6, 4, 5, 6, 7, 8])


@pytest.mark.parametrize("what, step_size", [("energies in z1", 0.16), ("prior chains", 0.08)])
def test_a_rollback_halves_rates_or_steps_too_and_undoes_everything(
    tmp_path, monkeypatch, what, step_size
):
    sabotage(monkeypatch, at=4, what=what)
    seen = []
    monkeypatch.setattr(
        _Joint, "negatives",
        lambda self, *a, whole=_Joint.negatives: seen.append(
            (self.step, self.sampler.step_size, self.optimizer.param_groups[0]["lr"])
        ) or whole(self, *a),
    )  # fmt: skip
    result = go(tmp_path / "run")
    assert [s for s, *_ in seen] == [0, 1, 2, 3, 4, 3, 4, 5, 6, 7]
    assert seen[0][1:] == (0.16, 0.01) and seen[-1][1:] == (step_size, 0.005)
    assert result.step_size == step_size and read_config(tmp_path / "run")["sampler"] == {
        "transition": "langevin", "steps": 2, "step_size": step_size}  # fmt: skip
    log = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").open()]
    assert [r["iteration"] for r in log] == [3, 4, 8] and log[0]["diverged"] == what


def test_posterior_chains_that_run_away_are_named_and_survived(tmp_path, capsys):
    """On N(0, I) a step multiplies eps by 1 - s/2: by 7 at s = 16."""
    result = go(tmp_path / "run", posterior_step_size=16.0, posterior_steps=10)
    assert 1 <= result.rollbacks <= 3
    err = capsys.readouterr().err
    assert "posterior chains diverged at iteration 1: back to 0 with half" in err
    assert opened(tmp_path / "run")[0]["training"]["status"] == "finished"


def test_hopeless_divergence_ends_with_the_last_good_model(tmp_path):
    with pytest.raises(DivergenceError, match="posterior chains diverged at iteration 1 after 3"):
        go(tmp_path / "run", posterior_step_size=1e6)
    config, prior = opened(tmp_path / "run")
    assert config["training"]["status"] == "diverged"
    assert all(p.isfinite().all() for p in prior.parameters())


def test_energies_that_run_away_are_named(tmp_path):
    with pytest.raises(DivergenceError, match="energies in z2, z1 diverged at iteration 1 "):
        go(tmp_path / "run", energy_limit=1e-12)


def test_a_spoilt_update_is_never_kept(tmp_path, monkeypatch):
    adam, calls = torch.optim.Adam.step, []

    def step(self, *args):
        adam(self, *args)
        calls.append(1)
        if len(calls) == 6:  # right before the save at 6
            with torch.no_grad():
                self.param_groups[0]["params"][0].mul_(float("nan"))

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    assert go(tmp_path / "run", method="variational").rollbacks == 1
    assert all(p.isfinite().all() for p in opened(tmp_path / "run")[1].parameters())


@pytest.mark.parametrize("method", METHODS)
def test_the_gaussian_prior_is_the_same_generator_without_heads(tmp_path, method):
    go(tmp_path / "run", prior="gaussian", method=method)
    config, prior = opened(tmp_path / "run")
    eps = prior.noise(50, torch.Generator().manual_seed(0))
    assert torch.equal(prior.energy_of_noise(eps), torch.zeros(50))
    assert (
        prior.sampler.transition == "pcnl" and config["training"]["train"]["prior"] == "gaussian"
    )
    x = blobs()[:50].float() / 255
    eps = prior.noise(len(x), torch.Generator().manual_seed(0))
    half_norm = sum(e.square().sum(1) for e in eps) / 2
    log_px = prior.backbone.decode(prior.backbone.transform(eps)).log_prob(x)
    torch.testing.assert_close(posterior_log_density(prior, x, eps), log_px - half_norm)


def test_one_layer_is_the_single_layer_model(tmp_path):
    go(tmp_path / "run", latents=(4,), heads="joint", iterations=3)
    prior = opened(tmp_path / "run")[1]
    assert [g.shape for g in prior.backbone.groups] == [(4,)] and len(prior.heads) == 1


def test_presets_fill_what_is_not_given(tmp_path):
    settings = {k: v for k, v in TINY.items() if k not in ("latents", "prior_steps")}
    train(blobs(), out=tmp_path / "run", dataset="x", preset="figure2", prior_steps=3,
          progress=lambda *_: None, **settings | {"iterations": 2})  # fmt: skip
    config = read_config(tmp_path / "run")
    assert config["backbone"]["groups"] == [["z2", [2]], ["z1", [2]]]
    assert config["training"]["train"]["method"] == "variational"
    assert config["sampler"]["steps"] == 3


def test_presets_are_the_networks_of_the_tables():
    """Table 12's, and for CIFAR-10 that of the public code, here with their heads."""
    heads = {}
    for name, preset in PRESETS.items():
        config = TrainConfig(**preset)
        side = 28 if name == "figure2" else 32 if "cifar" in name else 64
        with torch.device("meta"):
            model = Generator(config.generator((3, side, side)))
            prior = EnergyPrior.for_backbone(model, layers=config.head_layers or None)
        heads[name] = [linear_sizes(head) for head in prior.heads]
        first = model.p_x[0]
        assert (first.out_channels, first.kernel_size[0]) == {
            "figure2": (128, 7), "table1-cifar10": (1024, 8)}.get(name, (1024, 4))  # fmt: skip
    table_12 = [
        [(100, 100), (100, 100), (100, 1)],
        [(100, 200), (200, 200), (200, 200), (200, 200), (200, 1)],
    ]
    assert heads["table1"] == heads["table5"] == heads["table7"] == table_12
    cifar = [(128, 200), (200, 200), (200, 200), (200, 1)]
    assert heads["table1-cifar10"] == [table_12[0], cifar]
    assert TrainConfig(**PRESETS["table5"]).prior == "gaussian"


@pytest.mark.parametrize("times, ngf", [(1, 128), (2, 190), (4, 277), (8, 401)])
def test_table_5_multiplies_the_parameters_of_the_generator(times, ngf):
    def count(ngf):
        config = TrainConfig(**PRESETS["table5"] | {"ngf": ngf})
        with torch.device("meta"):
            model = Generator(config.generator((3, 32, 32)))
        return sum(p.numel() for net in (model.p_x, model.p_z) for p in net.parameters())

    assert count(ngf) / count(128) == pytest.approx(times, rel=0.003)
    assert f"{ngf}" in run("train", "--help") or times == 1


def test_heads_learn_with_the_layers_they_were_given(tmp_path):
    go(tmp_path / "run", ndf=200, head_layers=[[3], [4, 5]], iterations=3)
    config, prior = opened(tmp_path / "run")
    assert config["heads"]["layers"] == [[3], [4, 5]] == config["training"]["train"]["head_layers"]
    assert prior.layers == ((3,), (4, 5))
    assert [linear_sizes(h) for h in prior.heads] == [[(2, 3), (3, 1)], [(3, 4), (4, 5), (5, 1)]]
    assert "linear layers 3, 4-5" in run("info", tmp_path / "run")


def test_the_first_map_is_kept_with_the_generator(tmp_path):
    go(tmp_path / "run", start=8, image_stride=1, iterations=2)
    backbone = opened(tmp_path / "run")[1].backbone
    assert (backbone.config.start, backbone.config.image_stride) == (8, 1)
    assert backbone.p_x[0].kernel_size == (8, 8) and backbone.q_x[0].stride == (1, 1)


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(layers=2), "unknown train settings: layers"),
        (dict(latents=(2, 0)), "latents must not be"),
        (dict(latents=()), "latents must list 1 to"),
        (dict(latents=4), "latents must not be 4"),
        (dict(latents=[[4]]), "latents must not be [[4]]"),
        (dict(ndf=200, head_layers=5), "head_layers must not be 5"),
        (
            dict(ndf=200, head_layers=[[4]]),
            "head_layers: the heads' linear layers must be one list "
            "of widths for each of 2 heads ('z2', 'z1')",
        ),
        (
            dict(ndf=200, head_layers=[[4], [0]]),
            "whole numbers up to 65536; got ([4], [0])",
        ),
        (dict(ndf=200, head_layers=[[4], [4]], heads="both"), "3 heads ('z2', 'z1', 'joint')"),
        (dict(head_layers=[[4], [4]]), "ndf has no effect beside head_layers"),
        (dict(ndf=200, preset="table1", latents=[4]), "for each of 1 heads ('z1')"),
        (dict(start=3), "images of 8x8 pixels do not fit a generator with start=3"),
        (dict(image_stride=3), "image_stride must be 1 or 2, got 3"),
        (dict(method="em"), "method must be one of mle, variational"),
        (dict(prior="none"), "prior must be one of ebm, gaussian"),
        (dict(heads="all"), "heads must be one of"),
        (dict(sigma=0), "sigma must be positive"),
        (dict(ema=1.0), "ema must be below 1"),
        (dict(posterior_step_size=-1.0), "posterior_step_size must not be"),
        (dict(preset="table99"), "unknown preset 'table99'; known are table1"),
        (dict(resume=True), "holds no run to resume"),
    ],
)
def test_bad_settings_are_one_line(tmp_path, changes, message):
    with pytest.raises(EbmPriorError, match=re.escape(message)) as caught:
        go(tmp_path / "run", **changes)
    assert "\n" not in str(caught.value) and not (tmp_path / "run").exists()


def test_images_of_a_wrong_size_are_refused(tmp_path):
    x = torch.zeros(5, 1, 45, 45, dtype=torch.uint8)
    with pytest.raises(EbmPriorError, match="images of 45x45 pixels do not fit a generator"):
        train(x, out=tmp_path / "run", dataset="x", **TINY)
    with pytest.raises(EbmPriorError, match="images must be uint8"):
        train(x.float(), out=tmp_path / "run", dataset="x", **TINY)


def test_folders_that_hold_a_run_are_refused(tmp_path):
    go(tmp_path / "run", iterations=1)
    with pytest.raises(EbmPriorError, match="already holds a run"):
        go(tmp_path / "run")
    with pytest.raises(EbmPriorError, match="holds no unfinished training"):
        go(tmp_path / "run", resume=True)

    def press(*_):
        with pytest.raises(EbmPriorError, match="another process is at work on .*other; wait"):
            go(tmp_path / "other", resume=True)
        os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted, match="at iteration 1 of 8; .* --resume --out"):
        go(tmp_path / "other", progress=press)
    with pytest.raises(EbmPriorError, match=r"other settings \(ngf\)"):
        go(tmp_path / "other", resume=True, ngf=3)


def test_the_state_is_tensors_and_json(tmp_path):
    """And what an earlier version pickled is named, rather than begun again."""

    def press(step, *_):
        if step == 5:
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(Interrupted):
        go(tmp_path / "run", progress=press)
    state = tmp_path / "run/state/state.safetensors"
    assert [*state.parent.iterdir()] == [state]
    tensors, values = read_state(state)
    assert (values["step"], values["good"]["step"]) == (5, 3)
    moments = {k for k in tensors if k.startswith("optimizer.")}
    assert len(moments) == 3 * (len([k for k in tensors if k.startswith(("model.", "heads."))]))
    state.write_bytes(state.read_bytes()[:-9])
    with pytest.raises(EbmPriorError, match="state.safetensors is damaged: .*; start the run an"):
        go(tmp_path / "run", resume=True)
    state.rename(state.with_suffix(".pt"))
    with pytest.raises(EbmPriorError, match=r"state.pt is of an earlier version .* another --out"):
        go(tmp_path / "run", resume=True)


def test_a_full_disk_costs_nothing_but_the_wait(tmp_path, monkeypatch):
    go(tmp_path / "whole")

    def fill(step, *_):
        if step == 5:
            monkeypatch.setattr(os, "fsync", no_space)

    def no_space(_):
        raise OSError(errno.ENOSPC, "No space")

    with pytest.raises(EbmPriorError, match="disk full while writing .*state.safetensors"):
        go(tmp_path / "run", progress=fill)
    monkeypatch.undo()
    go(tmp_path / "run", resume=True)
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.slow
@pytest.mark.timeout(3600)  # a dozen processes, each of which imports torch
@pytest.mark.parametrize("method", METHODS)
def test_kill_at_random_moments_and_resume(tmp_path, method):
    """kill -9, at any moment, then --resume: the same bytes as an uninterrupted run."""
    x = blobs(60).squeeze(1).numpy()
    np.savez(tmp_path / "x.npz", x_train=x, x_test=x[:9])
    settings = TINY | {
        "iterations": 300, "save_every": 5, "sample_every": 20, "heads_lr": 1e-3,
        "generator_lr": 1e-3,
    }  # fmt: skip
    command = [
        sys.executable, "-m", "ebm_prior", "train", "--data", str(tmp_path / "x.npz"),
        "--method", method, *(f"--set={k}={json.dumps(v)}" for k, v in settings.items()),
    ]  # fmt: skip
    whole = tmp_path / "whole"
    began = time.monotonic()
    subprocess.run([*command, "--out", str(whole)], check=True, capture_output=True)
    length = time.monotonic() - began
    killed = 0
    for i, part in enumerate(torch.rand(5, generator=torch.Generator().manual_seed(0)).tolist()):
        folder = tmp_path / f"run{i}"
        process = subprocess.Popen(
            [*command, "--out", str(folder)], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        time.sleep(part * length)
        process.kill()
        process.wait()
        resume = ["--resume"] if (folder / "config.json").exists() else []
        if resume and read_config(folder)["training"]["status"] == "finished":
            continue
        killed += bool(resume)
        subprocess.run([*command, *resume, "--out", str(folder)], check=True, capture_output=True)
        for name in FILES:
            assert (folder / name).read_bytes() == (whole / name).read_bytes(), part * length
    assert killed


def test_a_run_killed_before_its_first_save_begins_again(tmp_path):
    def kill(*_):
        raise RuntimeError("killed")

    with pytest.raises(RuntimeError):
        go(tmp_path / "run", progress=kill)
    assert opened(tmp_path / "run")[0]["training"]["status"] == "running"
    go(tmp_path / "run", resume=True)
    go(tmp_path / "whole")
    for name in FILES:
        assert (tmp_path / "run" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


# --- the verb, and the others on its result --------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    root = tmp_path_factory.mktemp("train")
    x = blobs(60).squeeze(1).numpy()
    np.savez(root / "x.npz", x_train=x[:40], x_test=x[40:], y_train=np.arange(40) % 2,
             y_test=np.arange(20) % 2)  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        settings = [f"--set={k}={json.dumps(v)}" for k, v in TINY.items()]
        out = run("train", "--data", "x.npz:0,1", "--method", "variational", "--json", *settings)
    return root, json.loads(out)


@pytest.fixture
def inside(world, monkeypatch):
    monkeypatch.chdir(world[0])
    return world[0] / world[1]["run"]


def test_the_verb_writes_the_newest_run(inside, world):
    assert world[1]["iterations"] == 8 and inside.name.startswith("generator-x-")
    assert newest_run().resolve() == inside.resolve()
    training = read_config(inside)["training"]
    assert training["data"]["source"] == f"{world[0] / 'x.npz'}:0,1"
    assert training["train"]["method"] == "variational"


@pytest.mark.parametrize(
    "args",
    [
        ["sample", "-n", 4, "--compare", "--out", "s.png"],
        ["evaluate", "--data", "x.npz", "-n", 20, "--steps", 2, "--features", "digits"],
        ["hierarchy", "--redraws", 2, "--out", "h.png"],
        ["ood", "--in", "x.npz:0", "--out", "x.npz:1", "-n", 5, "--samples", 2],
        ["chains", "--data", "x.npz", "--steps", 20, "-n", 10, "--features", "digits"],
        ["likelihood", "--data", "x.npz", "--images", 4, "--samples", 2, "--chains", 2,
         "--temperatures", 2],
        ["info", "{run}"],
        ["info", "{run}/backbone.safetensors"],
        ["report", "{run}"],
    ],
    ids=lambda args: f"{args[0]}-{len(str(args[1]))}",
)  # fmt: skip
def test_the_other_verbs_work_on_it(inside, args):
    run(*(str(a).format(run=inside) for a in args))


def test_the_folder_can_be_moved_and_pushed(inside, hub, tmp_path):
    shutil.copytree(inside, tmp_path / "moved")
    run("sample", "--heads", tmp_path / "moved", "-n", 2, "--out", "a.npz")
    run("push", tmp_path / "moved", REPO, "--no-pictures", "--license", "mit",
        "--with-backbone", "--ckpt", tmp_path / "moved/backbone.safetensors",
        "--backbone-license", "mit")  # fmt: skip
    files = hub.files(REPO)
    assert files["backbone.safetensors"] == (inside / "backbone.safetensors").read_bytes()
    run("sample", "--heads", REPO, "-n", 2, "--out", "b.npz")
    assert np.array_equal(np.load("a.npz")["images"], np.load("b.npz")["images"])


def test_fit_takes_the_generator_as_a_backbone(inside):
    run("fit", "--ckpt", inside / "backbone.safetensors", "--data", "x.npz", "--out", "fitted",
        "--nce-iterations", 3, "--nef", 2, "--ndf", 3, "--sample-steps", 2)  # fmt: skip


def test_fit_does_not_resume_what_train_began(inside, monkeypatch):
    config = read_config(inside)
    config["training"]["status"] = "running"
    shutil.copytree(inside, "runs/unfinished")
    with open("runs/unfinished/config.json", "w") as file:
        json.dump(config, file)
    assert "no running run" in run("fit", "--resume", code=1)
    shutil.rmtree("runs/unfinished")


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--data", "x.npz", "--resume"], 2, "--resume needs the --out"),
        (["--data", "x.npz", "--set", "seed=1"], 2, "--set seed"),
        (["--data", "x.npz", "--set", "layers=1", "--out", "y"], 1, "unknown train settings"),
        (["--data", "x.npz", "--preset", "t", "--out", "y"], 1, "unknown preset 't'"),
        (["--data", "x.npz", "--backbone", "nvae"], 1, "unknown trainer 'nvae'; installed: gen"),
        (["--data", "gone.npz"], 1, "gone.npz"),
    ],
)
def test_wrong_usage_of_the_verb(inside, args, code, message):
    assert message in run("train", *args, code=code)
