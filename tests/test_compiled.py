import copy
import pickle
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend

from backbones.nvae import frozen, load
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, FitConfig, SamplerConfig, fit, micro_batch
from ebm_prior.cli import main
from ebm_prior.compiled import MAX_GRAPHS, CompiledEnergy
from ebm_prior.langevin import flatten, value_and_grad
from ebm_prior.transitions import TRANSITIONS
from tests.test_evaluate import EVALUATE, world_in

DIGITS = Path(__file__).parents[1] / "checkpoints/nvae_digits"
COMPILE = torch.compile


@pytest.fixture(autouse=True)
def _forget():
    yield
    torch.compiler.reset()


@pytest.fixture
def backend(monkeypatch):
    """Replaces the compiler's backend."""

    def use(backend):
        def compile_with(function, *, fullgraph, dynamic, mode):
            return COMPILE(function, backend=backend, fullgraph=fullgraph, dynamic=dynamic)

        monkeypatch.setattr(torch, "compile", compile_with)
        return backend

    return use


def small(**settings):
    torch.manual_seed(0)
    sampler = SamplerConfig("pcnl", 3, 0.1)
    prior = EnergyPrior.for_backbone(ToyBackbone(), "both", nef=4, ndf=6, sampler=sampler)
    for name, value in settings.items():
        setattr(prior, name, value)
    return prior


def drawn(prior, n=4, **settings):
    return prior.sample_eps(n, generator=torch.Generator().manual_seed(0), **settings)


def of_both(prior, function="log_density"):
    """Value and gradient, as they are and compiled."""
    flat, unflatten = flatten(prior.noise(3))
    found = []
    for prior.compiled in (False, True):
        found.append(value_and_grad(getattr(prior, function), flat, unflatten))
    return found


@pytest.mark.parametrize("transition", [k for k, t in TRANSITIONS.items() if t.gradients])
def test_chains_are_the_same(backend, transition):
    counter = backend(CompileCounterWithBackend("aot_eager"))
    prior = small()
    expected = drawn(prior, transition=transition)
    prior.compiled = True
    torch.testing.assert_close(drawn(prior, transition=transition), expected)
    assert prior._compiled_energy.works
    assert counter.frame_count == 1  # for all steps, and for none of them again


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_so_is_a_networks_gradient(backend, precision, monkeypatch):
    monkeypatch.setattr(frozen, "WORTH", 0)  # the kernels of large networks
    counter = backend(CompileCounterWithBackend("aot_eager"))
    prior = EnergyPrior.for_backbone(load(DIGITS / "checkpoint.pt"), "both", nef=4, ndf=6)
    prior.heads.requires_grad_(False)
    prior.precision = precision
    plain, compiled = of_both(prior)
    torch.testing.assert_close(compiled, plain, rtol=1e-4, atol=1e-4)
    assert counter.frame_count == 1 and prior._compiled_energy.works


def test_each_batch_size_is_compiled_once(backend):
    counter = backend(CompileCounterWithBackend("eager"))
    prior = small(compiled=True)
    for n in (4, 2, 4, 2):
        drawn(prior, n)
    assert counter.frame_count == 2


def test_not_for_the_estimate_of_memory(backend, monkeypatch):
    monkeypatch.setattr(micro_batch, "free_memory", lambda _: 2**40)
    counter = backend(CompileCounterWithBackend("eager"))
    prior = small(compiled=True)
    drawn(prior)
    assert prior.chain_memory.kept_bytes
    assert counter.frame_count == 1 and prior.compiled and prior._compiled_energy.works


def test_more_sizes_than_torch_keeps_run_as_they_are(backend, capsys):
    backend("eager")
    prior = small(compiled=True)
    for n in range(2, MAX_GRAPHS + 4):
        drawn(prior, n)
    assert prior._compiled_energy.works and len(prior._compiled_energy.tried) == MAX_GRAPHS
    assert "not compiled" not in capsys.readouterr().err


def test_nor_do_more_choices_of_what_moves_fail(backend, capsys):
    backend("eager")
    on_cpu = SimpleNamespace(
        precision="fp32", backbone=SimpleNamespace(device=torch.device("cpu"))
    )
    energy = CompiledEnergy(lambda prior, eps, temperature: sum(e.sum(1) for e in eps))
    for i in range(MAX_GRAPHS + 2):
        eps = [torch.ones(2, 1, requires_grad=i == j) for j in range(MAX_GRAPHS + 2)]
        for _ in range(2):
            assert energy(on_cpu, eps, 1.0).tolist() == [MAX_GRAPHS + 2] * 2
    assert energy.works and not capsys.readouterr().err


def test_only_gradients_are(backend):
    counter = backend(CompileCounterWithBackend("eager"))
    prior = small(compiled=True)
    with torch.no_grad():
        prior.log_density(prior.noise(2))
    prior.images(prior.noise(2))
    assert counter.frame_count == 0


def fails(*_, **__):
    raise RuntimeError("no compiler here\nand more that nobody reads")


class Breaks(ToyBackbone):
    def transform(self, eps, temperature=1.0):
        torch._dynamo.graph_break()
        return super().transform(eps, temperature)


FAILURES = {
    "backend": (fails, ToyBackbone, "RuntimeError: no compiler here\n"),
    "backward": (
        aot_autograd(fw_compiler=lambda graph, _: graph, bw_compiler=fails),
        ToyBackbone,
        "RuntimeError: no compiler here\n",
    ),
    "graph break": ("eager", Breaks, "Unsupported: "),
    "unknown": ("nonsense", ToyBackbone, "InvalidBackend: "),
}


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failure_is_said_once_and_changes_nothing(backend, capsys, kind):
    failing, family, message = FAILURES[kind]
    backend(failing)
    prior = small()
    prior.backbone = family().freeze()
    expected = drawn(prior)
    prior.compiled = True
    for _ in range(2):
        assert all(map(torch.equal, drawn(prior), expected))
    drawn(prior, 3)
    (line,) = capsys.readouterr().err.splitlines(keepends=True)
    assert line.startswith("not compiled, which is only slower: " + message) and len(line) < 300
    assert not prior._compiled_energy.works


@pytest.mark.parametrize("failing", [2, 3])
def test_recording_and_replaying_a_cuda_graph_are_tried_too(backend, capsys, failing):
    runs = []

    def recorder(graph, _):
        def run(*args):
            runs.append(args)
            if len(runs) == failing:
                raise RuntimeError("operation not permitted when stream is capturing")
            return graph(*args)

        return run

    backend(recorder)
    on_cuda = SimpleNamespace(
        precision="fp32", backbone=SimpleNamespace(device=torch.device("cuda"))
    )
    energy = CompiledEnergy(lambda prior, eps, temperature: temperature * eps[0].sum(1))
    for _ in range(3):
        point = torch.ones(2, 3, requires_grad=True)
        assert energy(on_cuda, (point,), 2.0).tolist() == [6, 6]
    assert len(runs) == failing and not energy.works
    assert "stream is capturing" in capsys.readouterr().err


def test_no_compiler_at_all(monkeypatch, capsys):
    monkeypatch.setattr(torch, "compile", fails)
    expected = drawn(small())
    assert all(map(torch.equal, drawn(small(compiled=True)), expected))
    assert "no compiler here" in capsys.readouterr().err


def test_other_errors_are_raised(backend, capsys):
    backend("eager")
    prior = small(compiled=True)
    wrong = [torch.zeros(2, 1, requires_grad=True)] * 2
    with pytest.raises(EbmPriorError, match="group"):
        prior.log_density(wrong)
    assert prior._compiled_energy.works and not capsys.readouterr().err


def test_out_of_memory_halves_the_batch_and_keeps_the_graph(backend, capsys):
    def greedy(graph, _):
        def run(*args):
            if any(arg.shape[:1] == (4,) for arg in args):
                raise torch.OutOfMemoryError("out of memory")
            return graph(*args)

        return run

    backend(greedy)
    expected = drawn(small())
    prior = small(compiled=True)
    torch.testing.assert_close(drawn(prior), expected)
    assert prior.micro_batch == 2 and prior._compiled_energy.works
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_a_copy_compiles_what_it_is(backend):
    backend("eager")
    prior = small(compiled=True)
    half = copy.copy(prior)
    half.precision = "bf16"
    flat, unflatten = flatten(prior.noise(3))
    for one in (prior, half):
        found = value_and_grad(one.log_density, flat, unflatten)
        one.compiled = False
        torch.testing.assert_close(found, value_and_grad(one.log_density, flat, unflatten))
    assert copy.deepcopy(prior)._compiled_energy.tried == set()
    assert isinstance(pickle.loads(pickle.dumps(prior._compiled_energy)), CompiledEnergy)


@pytest.fixture
def used(monkeypatch):
    """Batch sizes that were asked for compiled; nothing is."""
    used = []

    def spy(self, prior, eps, temperature):
        used.append(len(eps[0]))
        return self.function(prior, eps, temperature)

    monkeypatch.setattr(CompiledEnergy, "__call__", spy)
    return used


def test_a_fit_can_be_compiled(used, tmp_path):
    prior = small()
    images = torch.randint(0, 256, (40, *prior.backbone.image_shape), dtype=torch.uint8)
    common = dict(objective="mle", batch_size=8, sample_every=0, draws=1, mle_iterations=3)
    fit(prior, images, FitConfig(**common), run_dir=tmp_path / "plain")
    assert not used  # the default
    fit(prior, images, FitConfig(compiled=True, **common), run_dir=tmp_path / "compiled")
    assert used and not prior.compiled


def test_the_commands_can(used, tmp_path, monkeypatch):
    world_in(tmp_path)
    monkeypatch.chdir(tmp_path)
    heads = ["--heads", "heads", "--ckpt", "toy.json"]
    for args in (
        ["sample", *heads, "-n", 4, "--steps", 2, "--out", "x.png"],
        EVALUATE,
        ["fit", "--backbone", "toy", "--ckpt", "toy.json", "--data", "x.npz", "--out", "run",
         "--objective", "mle", "--mle-iterations", 1, "--batch-size", 4, "--nef", 4],
    ):  # fmt: skip
        used.clear()
        result = CliRunner().invoke(main, [str(arg) for arg in [*args, "--compile"]])
        assert result.exit_code == 0, result.output
        assert used, args


@pytest.mark.slow
def test_with_the_real_compiler():
    prior = small()
    expected = drawn(prior)
    prior.compiled = True
    torch.testing.assert_close(drawn(prior), expected)
    assert prior._compiled_energy.works


@pytest.mark.gpu
def test_a_replay_overwrites_nothing_that_a_chain_still_needs():
    prior = small()
    prior.to("cuda")
    start, config = prior.noise(4), SamplerConfig("langevin", 5, 0.1)
    ends = []
    for prior.compiled in (False, True):
        generator = torch.Generator().manual_seed(0)
        ends.append(prior.run_chain(start, config, generator=generator))
    assert prior._compiled_energy.works
    torch.testing.assert_close(*ends)


@pytest.mark.gpu
@pytest.mark.parametrize("precision, share", [("fp32", 0.01), ("bf16", 0.1)])
def test_a_replay_sees_what_the_heads_are_now(precision, share):
    prior = EnergyPrior.for_backbone(load(DIGITS / "checkpoint.pt", "cuda"), "both", nef=4, ndf=6)
    prior.heads.requires_grad_(False)
    prior.precision = precision
    sizes = []
    for _ in range(3):
        (_, plain), (_, compiled) = of_both(prior, "energy_of_noise")
        assert (compiled - plain).norm() < share * plain.norm()
        sizes.append(plain.norm().item())
        with torch.no_grad():
            for parameter in prior.heads.parameters():
                parameter.mul_(1.5)
    assert prior._compiled_energy.works and sizes[2] > 2 * sizes[0]
