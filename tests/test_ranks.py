import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from ebm_prior.cli import main
from ebm_prior.errors import EbmPriorError
from ebm_prior.feature_cache import FeatureCache
from ebm_prior.fit import FitConfig, _Fit, fit
from ebm_prior.langevin import rand, randn
from ebm_prior.prior import EnergyPrior, SamplerConfig
from ebm_prior.ranks import Ranks, Share, is_main

FIT = "fit --backbone toy --ckpt toy.json --data x.npz --heads both --nef 8 --ndf 16 --draws 3"
FIT += " --objective nce+mle --nce-iterations 60 --mle-iterations 12 --batch-size 16 --reuse 3"
FIT += " --save-every 5 --log-every 5 --sample-steps 4 --out"
SAMPLE = "sample --ckpt toy.json --seeds 5-68 --batch-size 13 --step-size 0.2 --heads"
EVALUATE = (
    "evaluate --ckpt toy.json --data x.npz -n 40 --batch-size 9 --step-size 0.2 --json --heads"
)
WORKER = """
import json, os, sys
from ebm_prior.cli import main
from ebm_prior.fit import _Fit

if dies_at := int(os.environ.get("DIES_AT", 0)):
    update = _Fit.update
    _Fit.update = lambda self, *args: (
        os._exit(9) if self.total == dies_at and self.ranks.rank else update(self, *args)
    )
for line in json.loads(sys.argv[1]):
    try:
        main(line.split())
    except SystemExit as end:
        if end.code:
            raise
"""


def together(folder, *lines, size=2, **env):
    """Run command lines in `size` processes, as a launcher would: their ends."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    common = os.environ | {"WORLD_SIZE": str(size), "MASTER_ADDR": "127.0.0.1"}
    common |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", **env}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, json.dumps(lines)],
            cwd=folder,
            env=common | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    ends = [process.communicate(timeout=300) for process in processes]
    return [(p.returncode, *end) for p, end in zip(processes, ends, strict=True)]


def alone(line):
    with pytest.raises(SystemExit) as end:
        main(line.split())
    assert end.value.code == 0


def weights(run):
    return torch.cat([t.flatten() for t in load_file(run / "heads.safetensors").values()])


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Images that the toy's prior does not fit, and heads fitted by a single process."""
    root = tmp_path_factory.mktemp("ranks")
    (root / "toy.json").write_text(json.dumps({"top": 2, "bottom": 3, "size": 8}))
    images = np.random.default_rng(0).integers(0, 256, (40, 8, 8), dtype=np.uint8)
    np.savez(root / "x.npz", x_train=images, x_test=images)
    before = os.getcwd()
    os.chdir(root)
    try:
        alone(f"{FIT} one")
        yield root
    finally:
        os.chdir(before)


def test_two_processes_do_what_one_does(world, monkeypatch, capsys):
    update = _Fit.update

    def dying(self, *args):
        if self.total == 48:
            raise KeyboardInterrupt  # as abrupt as a kill: nothing is saved
        return update(self, *args)

    save, saved = FeatureCache.save, []

    def stopping(self, seeds, *features):
        if len(saved) == 2:
            raise KeyboardInterrupt
        saved.append(seeds)
        save(self, seeds, *features)

    with monkeypatch.context() as patch:
        patch.setattr(_Fit, "update", dying)
        patch.setattr(FeatureCache, "save", stopping)
        for line in (f"{FIT} parts", f"{EVALUATE} one"):
            with pytest.raises(SystemExit):
                main(line.split())
    assert list((world / "one").glob("state/evaluate-*/*"))
    capsys.readouterr()
    ends = together(
        world,
        f"{FIT} two",
        "fit --resume parts",
        f"{SAMPLE} one --out two.npz",
        f"{EVALUATE} one",
        "info toy.json",
    )
    assert [code for code, *_ in ends] == [0, 0], ends
    assert ends[1][1:] == ("", "")  # only one speaks
    assert "2 of 5 batches were finished before" in ends[0][2]
    said = next(line for line in ends[0][1].splitlines() if line.startswith("{"))

    expected = weights(world / "one")
    assert (expected - weights(world / "two")).abs().max() < 1e-5 * expected.abs().max()
    assert (expected - weights(world / "parts")).abs().max() < 1e-5 * expected.abs().max()
    for run in ("one", "two", "parts"):
        lines = (world / run / "log.jsonl").read_text().splitlines()
        lines = [json.loads(line) for line in lines]
        assert [x["iteration"] for x in lines if "loss" in x] == list(range(5, 73, 5))
    assert not (world / "one" / "state").exists()
    alone(f"{EVALUATE} one")
    one, two = (json.loads(text.splitlines()[-1]) for text in (capsys.readouterr().out, said))
    for name in ("gaussian", "energy", "reconstruction"):
        assert one[name]["frechet"] == pytest.approx(two[name]["frechet"], rel=1e-5)
    alone(f"{SAMPLE} one --out one.npz")
    one, two = (np.load(world / f"{name}.npz")["images"] for name in ("one", "two"))
    assert one.shape[0] == 64 and np.array_equal(one, two)
    capsys.readouterr()


def test_when_a_process_dies_the_other_says_so_and_the_run_goes_on(world):
    other = "--cache-gb 0 --transition langevin --chains fresh"  # the other ways to draw
    alone(f"{FIT} whole {other}")
    ends = together(world, f"{FIT} dead {other}", DIES_AT="63")
    assert [code for code, *_ in ends] == [1, 9]
    error = ends[0][2].splitlines()[-1]
    assert error.startswith("Error: process 0 cannot reach the others") and "--resume" in error
    alone("fit --resume dead")
    expected = weights(world / "whole")
    assert (expected - weights(world / "dead")).abs().max() < 1e-5 * expected.abs().max()


def test_a_share_is_what_one_process_would_have_drawn():
    whole = randn(torch.empty(6, 3), torch.Generator().manual_seed(1))
    parts = [
        randn(torch.empty(2, 3), Share(torch.Generator().manual_seed(1), rank, 3))
        for rank in range(3)
    ]
    assert torch.equal(whole, torch.cat(parts))
    generator, shared = (torch.Generator().manual_seed(2) for _ in range(2))
    rand(torch.empty(4), generator)
    rand(torch.empty(2), Share(shared, 1, 2))
    assert torch.equal(generator.get_state(), shared.get_state())  # all stay in step


def test_batches_that_cannot_be_shared_are_refused(toy, tmp_path, monkeypatch):
    prior = EnergyPrior.for_backbone(toy, sampler=SamplerConfig("pcnl", 4, 0.3))
    images = torch.zeros(20, *toy.image_shape, dtype=torch.uint8)
    monkeypatch.setattr(Ranks, "__init__", lambda self, _: vars(self).update(rank=0, size=3))
    with pytest.raises(EbmPriorError, match="batch of 128 cannot be shared by 3 processes"):
        fit(prior, images, FitConfig(), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_rank_without_a_size_is_left_by_somebody_else(monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    assert is_main() and Ranks(torch.device("cpu")).is_main
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert not is_main()


@pytest.mark.parametrize(
    "rank, size", [(None, "2"), ("", "2"), ("0", "two"), ("1", ""), ("2", "2")]
)
def test_so_are_sizes_that_no_launcher_sets(monkeypatch, rank, size):
    monkeypatch.setenv("WORLD_SIZE", size)
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    assert is_main() and Ranks(torch.device("cpu")).size == 1
    alone("info --help")
