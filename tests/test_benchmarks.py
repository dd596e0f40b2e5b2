"""Every benchmark runs, at toy size; what it measures is another matter."""

import json
import statistics
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

from benchmarks import gpu, langevin_step, memory, peer, scaling, throughput
from benchmarks.models import MODELS
from benchmarks.timing import interleaved, ratios
from ebm_prior import EbmPriorError
from tests.test_micro_batch import ERRORS

CHECKPOINT = Path(__file__).parents[1] / "checkpoints/nvae_digits/checkpoint.pt"


@pytest.fixture(autouse=True)
def _threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def run(command, *args):
    result = CliRunner().invoke(command, [str(arg) for arg in args], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


def test_the_langevin_step(tmp_path, monkeypatch):
    # in this process, which is quicker
    monkeypatch.setattr(langevin_step, "peak_memory", langevin_step.peak_here)
    out = tmp_path / "x.json"
    run(langevin_step.main, "--ckpt", CHECKPOINT, "--batch", 4, "--threads", 1, "--repeats", 1,
        "--heads", "joint", "--json", out)  # fmt: skip
    found = json.loads(out.read_text())
    forms = {row["form"]: row for row in found["forms"]}
    assert list(forms) == list(langevin_step.FORMS)
    assert forms["published"]["speed_up"] == 1
    assert forms["ours"]["gflop"] == forms["chunked"]["gflop"] < forms["published"]["gflop"]
    assert forms["bf16"]["saved_mib"] < forms["ours"]["saved_mib"] / 1.5
    assert forms["chunked"]["saved_mib"] == forms["ours"]["saved_mib"] / 4
    (floor,) = found["floors"]
    assert 0 < floor["arithmetic_ms"] < floor["convolutions_ms"]


def test_memory(monkeypatch):
    tiny = MODELS["B"] | {"num_groups_per_scale": 4, "num_channels_dec": 4, "num_channels_enc": 4}
    monkeypatch.setitem(MODELS, "B", tiny)
    monkeypatch.setattr(memory, "peak_memory", langevin_step.peak_here)
    row = run(memory.main, "B", "--batch", 2).splitlines()[-1].split()
    estimate, tensors, ratio, again, _, _ = map(float, row[1:])
    assert 0.9 < ratio < 1.1 and again < tensors and abs(tensors - estimate) < 0.2 * estimate


def test_scaling(monkeypatch, tmp_path):
    monkeypatch.setattr(scaling, "SWEEPS", {"steps": (1, 2), "groups": (2, 4), "batch": (1, 2)})
    monkeypatch.setattr(scaling, "BASE", {"steps": 1, "groups": 2, "batch": 1})
    run(scaling.main, "--width", 2, "--repeats", 1, "--json", tmp_path / "x.json")
    found = {s["variable"]: s for s in json.loads((tmp_path / "x.json").read_text())["sweeps"]}
    for variable in ("steps", "batch"):  # proportional to the letter
        assert found[variable]["flop_exponent"] == pytest.approx(1)
    assert found["groups"]["flop_exponent"] > 1  # the first group has no cells
    assert scaling.exponent((1, 2, 4), [3, 12, 48]) == pytest.approx(2)


def test_the_throughput(monkeypatch, tmp_path):
    tiny = MODELS["A"] | {"num_groups_per_scale": 2, "num_channels_dec": 4, "num_channels_enc": 4}
    monkeypatch.setitem(MODELS, "A", tiny)
    out = tmp_path / "x.json"
    run(throughput.main, "--batch", 2, "--steps", 2, "--repeats", 1, "--json", out)
    rows = json.loads(out.read_text())["rows"]
    names = [(row["what"], row["form"]) for row in rows]
    assert names == [(w, f) for w in ("iteration", "samples") for f in throughput.FORMS]
    for row in rows:
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"])
        assert 0 < row["floor_share"] < 1


def test_the_forms_of_an_iteration_learn_the_same(monkeypatch):
    tiny = MODELS["A"] | {"num_groups_per_scale": 2, "num_channels_dec": 4, "num_channels_enc": 4}
    monkeypatch.setitem(MODELS, "A", tiny)
    backbone = throughput.nvae("A")
    found = []
    for form in ("published", "ours"):
        torch.manual_seed(0)
        prior = throughput.EnergyPrior.for_backbone(backbone, nef=4, ndf=6)
        throughput.Work(prior, form, batch=2, steps=1).iteration()  # steps too small to differ
        found.append(torch.cat([p.detach().flatten() for p in prior.heads.parameters()]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-6)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_gpu_its_benchmark_says_so():
    assert run(gpu.main) == "no CUDA device: nothing measured\n"


def test_what_cuda_graphs_keep_counts_as_memory(monkeypatch):
    segments = [
        {"total_size": size, "segment_pool_id": pool}
        for size, pool in ((1, (0, 0)), (2, (0, 1)), (4, (3, 0)))
    ]
    monkeypatch.setattr(torch.cuda, "memory_snapshot", lambda: segments)
    assert gpu.graph_memory() == 6


def test_a_form_that_does_not_fit_is_left_out():
    def ends_with(error):
        def call():
            raise error

        return call

    assert gpu.fits(lambda: None)
    for error in (*ERRORS.values(), EbmPriorError("out of memory for a single chain")):
        assert not gpu.fits(ends_with(error))
    with pytest.raises(RuntimeError, match="shapes"):
        gpu.fits(ends_with(RuntimeError("mat1 and mat2 shapes")))


@pytest.mark.gpu
def test_the_gpu_benchmark(tmp_path):
    run(gpu.main, "--model", "A", "--batch", 2, "--repeats", 1, "--json", tmp_path / "x.json")
    assert len(json.loads((tmp_path / "x.json").read_text())["forms"]) == len(gpu.FORMS)


def test_the_comparison_with_a_peer():
    output = run(peer.main, "--ckpt", CHECKPOINT, "--batch", 2, "--steps", 2, "--repeats", 1)
    if find_spec("torchebm") is None:
        assert "torchebm is not installed" in output
    else:
        assert float(output.split()[-1]) < 1e-4


def test_rounds_are_interleaved_and_each_call_goes_first():
    order, now = [], iter(range(100))
    calls = {name: (lambda name=name: order.append(name)) for name in "abc"}
    times = interleaved(calls, 3, lambda: next(now))
    assert "".join(order) == "abc" + "bca" + "cab" + "abc"  # the first round warms up
    assert all(len(values) == 3 and set(values) == {1} for values in times.values())
    pairs = {"slow": [2.0, 9.0, 4.0], "fast": [1.0, 3.0, 4.0]}
    assert ratios(pairs, "slow") == {"slow": 1, "fast": statistics.median([2, 3, 1])}
