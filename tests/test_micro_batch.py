import pytest
import torch

from ebm_prior import EbmPriorError, EnergyPrior, FitConfig, SamplerConfig, fit, micro_batch
from ebm_prior.hierarchy import redraw
from ebm_prior.joint import posterior_chains
from ebm_prior.langevin import flatten
from ebm_prior.partition import log_partition
from ebm_prior.transitions import TRANSITIONS

ERRORS = {
    "cuda": torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
    "cpu": RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
    "onednn": RuntimeError("could not create a primitive"),
    "mps": RuntimeError("MPS backend out of memory (MPS allocated: 8 GB)"),
}


def new_prior(toy, transition="pcnl"):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        sampler = SamplerConfig(transition, 3, 0.1)
        return EnergyPrior.for_backbone(toy, "both", nef=4, ndf=6, sampler=sampler)


def limit_memory(monkeypatch, most, error=ERRORS["cuda"]):
    """Let the energy of more than `most` samples at once fail; returns all batches asked for.

    How much memory is free is not known.
    """
    monkeypatch.setattr(micro_batch, "free_memory", lambda _: None)
    whole, asked = EnergyPrior.energy_of_noise, []

    def energy(self, eps, temperature=1.0):
        asked.append(len(eps[0]))
        if asked[-1] > most:
            raise error
        return whole(self, eps, temperature)

    monkeypatch.setattr(EnergyPrior, "energy_of_noise", energy)
    return asked


def sampled(prior, n=10):
    return flatten(prior.sample_eps(n, generator=torch.Generator().manual_seed(0)))[0]


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_parts_give_what_the_whole_gives(toy, transition, monkeypatch):
    prior = new_prior(toy, transition)
    want = sampled(prior)
    prior.micro_batch = 4
    asked = limit_memory(monkeypatch, 4)
    torch.testing.assert_close(sampled(prior), want, rtol=1e-12, atol=1e-12)
    assert asked[:3] == [4, 4, 2]


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_the_batch_halves_until_it_fits_and_stays_so(toy, error, monkeypatch, capsys):
    prior = new_prior(toy)
    want = sampled(prior)
    asked = limit_memory(monkeypatch, 3, error)
    torch.testing.assert_close(sampled(prior), want, rtol=1e-12, atol=1e-12)
    assert asked[:7] == [10, 5, 2, 2, 2, 2, 2] and prior.micro_batch == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2 and "10 chains at once: from now on 5" in lines[0]
    sampled(prior)  # the next chain knows
    assert max(asked[7:]) == 2 and not capsys.readouterr().err


def test_what_does_not_fit_at_all_is_said(toy, monkeypatch):
    limit_memory(monkeypatch, 0)
    with pytest.raises(EbmPriorError, match="out of memory for a single chain"):
        sampled(new_prior(toy))


@pytest.mark.parametrize(
    "text",
    [
        "GET was unable to find an engine to execute this computation",
        "FIND was unable to find an engine to execute this computation",
        "cuDNN error: CUDNN_STATUS_ALLOC_FAILED",
        "CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`",
        "CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported",
    ],
)
def test_nor_do_libraries_on_cuda_that_find_no_memory_stop_a_chain(toy, text, monkeypatch):
    prior = new_prior(toy)
    limit_memory(monkeypatch, 3, RuntimeError(text))
    sampled(prior)
    assert prior.micro_batch == 2


def test_other_errors_are_not_taken_for_it(toy, monkeypatch):
    asked = limit_memory(monkeypatch, 3, RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    with pytest.raises(RuntimeError, match="mat1"):
        sampled(new_prior(toy))
    assert asked == [10]


def test_a_size_below_one_is_refused(toy):
    prior = new_prior(toy)
    prior.micro_batch = 0
    with pytest.raises(EbmPriorError, match="micro_batch must be at least 1"):
        sampled(prior)


@pytest.mark.parametrize("transition", ["langevin", "pcnl"])
def test_fitting_goes_on_with_less_memory(toy, transition, tmp_path, monkeypatch):
    images = torch.randint(0, 256, (40, *toy.image_shape), dtype=torch.uint8)
    config = FitConfig(objective="mle", mle_iterations=3, batch_size=12, sample_every=0, draws=1)

    def heads_after(folder):
        prior = new_prior(toy, transition)
        fit(prior, images, config, run_dir=tmp_path / folder)
        return torch.cat([p.detach().flatten() for p in prior.heads.parameters()])

    want = heads_after("whole")
    asked = limit_memory(monkeypatch, 5)
    torch.testing.assert_close(heads_after("parts"), want, rtol=1e-9, atol=1e-12)
    assert max(asked) > 5


def test_so_does_the_estimate_of_the_partition_function(toy, monkeypatch):
    prior = new_prior(toy)
    settings = dict(chains=6, temperatures=3)
    want = log_partition(prior, **settings).log_z
    limit_memory(monkeypatch, 4)
    assert log_partition(prior, **settings).log_z == pytest.approx(want, abs=1e-9)


@pytest.mark.parametrize("transition", ["langevin", "pcnl"])
def test_held_groups_are_cut_with_their_samples(toy, transition):
    prior = EnergyPrior.for_backbone(toy, "both", nef=4, ndf=8)
    eps = prior.noise(10, torch.Generator().manual_seed(1))
    config = SamplerConfig(transition, 3, 0.2)
    ends = []
    for prior.micro_batch in (None, 4):
        generator = torch.Generator().manual_seed(2)
        ends.append(redraw(prior, eps, [toy.groups[0].name], config, generator=generator).end)
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(whole, parts)


def test_so_are_the_images_of_posterior_chains(toy):
    prior = EnergyPrior.for_backbone(toy, "factorized", nef=4, ndf=8)
    x = torch.rand(7, *toy.image_shape, dtype=toy.dtype)
    ends = []
    for prior.micro_batch in (None, 3):
        generator = torch.Generator().manual_seed(2)
        ends.append(posterior_chains(prior, x, steps=3, step_size=0.01, generator=generator))
    for whole, parts in zip(*ends, strict=True):
        torch.testing.assert_close(whole, parts)
