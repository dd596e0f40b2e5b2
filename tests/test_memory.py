"""How much memory there is, how much a gradient needs, and what chains make of the two."""

from pathlib import Path

import pytest
import torch

from backbones.biva import load as load_biva
from backbones.hvae import load as load_hvae
from backbones.nvae import load as load_nvae
from benchmarks.cost import peak_bytes
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig, memory, micro_batch
from ebm_prior.cpu import freed_memory
from ebm_prior.hierarchy import redraw
from ebm_prior.joint import posterior_chains
from ebm_prior.langevin import flatten, value_and_grad
from ebm_prior.memory import free_memory, host_memory, saved_bytes
from ebm_prior.micro_batch import HEADROOM
from ebm_prior.partition import log_partition
from ebm_prior.prior import frozen
from tests.test_micro_batch import ERRORS, limit_memory, new_prior, sampled

FIXTURES = Path(__file__).parent / "fixtures"
LOADERS = {"biva": load_biva, "hvae": load_hvae, "nvae": load_nvae}
FOLDERS = sorted(FIXTURES.glob("*/*"))


def load(folder):
    (checkpoint,) = folder.glob("c*k*pt*")
    return LOADERS[folder.parent.name](checkpoint)


def per_chain(prior):
    flat, unflatten = flatten(prior.noise(1))
    with frozen(prior.heads):
        return HEADROOM * saved_bytes(prior.energy_of_noise, flat, unflatten)


def free(monkeypatch, size):
    """Let so much memory be free; returns all devices asked about."""
    asked = []
    monkeypatch.setattr(micro_batch, "free_memory", lambda device: asked.append(device) or size)
    return asked


def batches(monkeypatch):
    """Sizes of all batches whose energy is asked for."""
    asked, whole = [], EnergyPrior.energy_of_noise

    def energy(self, eps, temperature=1.0):
        asked.append(len(eps[0]))
        return whole(self, eps, temperature)

    monkeypatch.setattr(EnergyPrior, "energy_of_noise", energy)
    return asked


# --- how much a gradient needs -----------------------------------------------------------


def test_saved_bytes_of_known_operations():
    weight = torch.randn(4, 6)
    flat = torch.randn(3, 6)

    def energy(eps):
        hidden = (eps[0] @ weight.T).tanh()  # keeps its own output; the product, the weight
        return hidden.square().sum(1)  # keeps its input, which is there already

    assert saved_bytes(energy, flat, lambda x: (x,)) == 3 * 4 * 4
    # also where inference tensors come in
    with torch.inference_mode():
        assert saved_bytes(energy, torch.randn(2, 6), lambda x: (x,)) == 2 * 4 * 4


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_they_are_what_a_step_takes(folder):
    """The peak of all tensors of a whole gradient, forward and backward, in any architecture."""
    prior = EnergyPrior.for_backbone(load(folder), "both", nef=8, ndf=16)
    prior.heads.requires_grad_(False)
    flat, unflatten = flatten(prior.noise(3))
    kept = saved_bytes(prior.log_density, flat[:1], unflatten)
    peak = peak_bytes(lambda: value_and_grad(prior.log_density, flat, unflatten))
    assert 0.95 < peak / (3 * kept) < 1.2


# --- how many chains at once --------------------------------------------------------------


def test_what_fits_is_not_cut_and_asked_about_once(toy, monkeypatch, capsys):
    prior = new_prior(toy)
    with monkeypatch.context() as patch:
        free(patch, None)
        want = sampled(prior)
    prior = new_prior(toy)
    asked_free, asked = free(monkeypatch, 10 * per_chain(prior)), batches(monkeypatch)
    assert torch.equal(sampled(prior), want)
    assert asked == [1] + [10] * 4  # the estimate; the start and three steps
    sampled(prior)
    assert asked[5:] == [10] * 4
    sampled(prior, 8)
    assert asked[9:] == [8] * 4  # the estimate holds for other numbers of chains
    assert asked_free == [toy.device] * 2
    assert prior.micro_batch is None and not capsys.readouterr().err


@pytest.mark.parametrize("chains_fit, at_once", [(9.9, 5), (4.5, 4), (3.5, 3), (1.0, 1), (0.2, 1)])
def test_what_does_not_fit_is_cut_evenly(toy, monkeypatch, capsys, chains_fit, at_once):
    prior = new_prior(toy)
    want = sampled(prior)
    prior = new_prior(toy)
    free(monkeypatch, chains_fit * per_chain(prior))
    asked = batches(monkeypatch)
    torch.testing.assert_close(sampled(prior), want, rtol=1e-12, atol=1e-12)
    assert asked[0] == 1 and max(asked[1:]) == at_once
    assert sum(asked[1:]) == 4 * 10
    assert prior.micro_batch is None  # that number is the user's
    (line,) = capsys.readouterr().err.splitlines()
    assert f"{at_once} at a time, with the same result" in line


def test_the_users_number_wins(toy, monkeypatch, capsys):
    prior = new_prior(toy)
    asked_free, asked = free(monkeypatch, 0), batches(monkeypatch)
    prior.micro_batch = 7
    sampled(prior)
    assert asked[:2] == [7, 3] and not asked_free and not capsys.readouterr().err


def test_every_density_has_its_own_estimate(toy, monkeypatch):
    prior = new_prior(toy)
    free(monkeypatch, 1e12)
    sampled(prior)
    x = torch.rand(3, *toy.image_shape, dtype=toy.dtype)
    posterior_chains(prior, x, steps=1, step_size=0.01)  # reads the image decoder, too
    small, large = prior.chain_memory.kept_bytes.values()
    assert small < large
    log_partition(prior, chains=4, temperatures=3)  # a density per temperature is one density
    assert len(prior.chain_memory.kept_bytes) == 4


def test_so_have_the_groups_that_move(nvae_prior, monkeypatch):
    free(monkeypatch, 1e12)
    eps = nvae_prior.noise(2)
    names = [group.name for group in nvae_prior.backbone.groups]
    for moves in (names[-1], names[-2]):  # the last one alone has no tower below it
        redraw(nvae_prior, eps, [name for name in names if name != moves])
    last, above = nvae_prior.chain_memory.kept_bytes.values()
    assert last < above


def test_copies_of_weights_are_counted_once(nvae_prior, monkeypatch):
    free(monkeypatch, 1e12)
    prior = EnergyPrior.for_backbone(
        load(FIXTURES / "hvae" / "fmnist_vae"), nef=4, ndf=8, sampler=nvae_prior.sampler
    )
    prior.precision = "bf16"
    kept = []
    for n in (1, 2):  # a single one cannot tell
        prior.chain_memory.kept_bytes.clear()
        sampled(prior, n)
        kept += prior.chain_memory.kept_bytes.values()
    assert kept[1] < kept[0]


def test_where_the_estimate_is_wrong_the_number_halves(toy, monkeypatch, capsys):
    prior = new_prior(toy)
    asked = limit_memory(monkeypatch, 3)
    free(monkeypatch, 1e12)
    sampled(prior)
    assert asked[:5] == [1, 10, 5, 2, 2] and prior.micro_batch == 2
    assert len(capsys.readouterr().err.splitlines()) == 2


def test_no_memory_for_the_estimate(toy, monkeypatch):
    limit_memory(monkeypatch, 0)
    free(monkeypatch, 0)
    with pytest.raises(EbmPriorError, match="out of memory for a single chain"):
        sampled(new_prior(toy))


# --- computing again -----------------------------------------------------------------------


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda p: f"{p.parent.name}-{p.name}")
def test_computing_again_gives_the_same_gradient_in_less_memory(folder):
    backbone = load(folder)
    for kind in ("factorized", "joint"):
        prior = EnergyPrior.for_backbone(backbone, kind, nef=4, ndf=8)
        prior.heads.requires_grad_(False)
        flat, unflatten = flatten(prior.noise(2, torch.Generator().manual_seed(0)))

        def gradient(prior=prior, flat=flat, unflatten=unflatten):
            return value_and_grad(prior.energy_of_noise, flat, unflatten)

        found = {}
        for backbone.checkpointing in (False, True):
            kept = saved_bytes(prior.energy_of_noise, flat, unflatten)
            found[backbone.checkpointing] = *gradient(), kept, peak_bytes(gradient)
        for plain, again in zip(found[False][:2], found[True][:2], strict=True):
            assert torch.equal(plain, again)
        # one of the two or three stages that a fixture has is most of its peak
        for plain, again, share in zip(
            found[False][2:], found[True][2:], (0.7, 0.95), strict=True
        ):
            assert again < share * plain


def test_it_does_so_inside_autocast():
    prior = EnergyPrior.for_backbone(load(FIXTURES / "nvae" / "mbconv_den"), nef=4, ndf=8)
    prior.precision = "bf16"
    flat, unflatten = flatten(prior.noise(2))
    found = []
    for prior.backbone.checkpointing in (False, True):
        found.append(value_and_grad(prior.energy_of_noise, flat, unflatten)[1])
    assert torch.equal(*found)


@pytest.fixture
def nvae_prior():
    sampler = SamplerConfig("langevin", 2, 0.1)
    return EnergyPrior.for_backbone(
        load(FIXTURES / "nvae" / "mbconv_sep").double(), nef=4, ndf=8, sampler=sampler
    )


def test_it_is_what_is_left_when_not_even_one_chain_fits(nvae_prior, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        free(patch, 1e12)
        want = sampled(nvae_prior, 3)
    nvae_prior.chain_memory.rows.clear()
    free(monkeypatch, 0.9 * per_chain(nvae_prior))
    asked = batches(monkeypatch)
    torch.testing.assert_close(sampled(nvae_prior, 3), want, rtol=1e-10, atol=1e-12)
    assert nvae_prior.backbone.checkpointing and nvae_prior.micro_batch is None
    assert asked == [1] * 6
    (line,) = capsys.readouterr().err.splitlines()
    assert "one at a time, computing again" in line and "with the same result" in line
    sampled(nvae_prior, 2)  # another batch knows
    assert asked[6:] == [1] * 4 and not capsys.readouterr().err


@pytest.mark.parametrize("error", ERRORS.values(), ids=ERRORS)
def test_running_out_of_memory_leads_there_too(nvae_prior, error, monkeypatch, capsys):
    want = sampled(nvae_prior, 4)
    asked = limit_memory(monkeypatch, 1, error)
    backbone, transform = nvae_prior.backbone, type(nvae_prior.backbone).transform

    def only_checkpointed(self, eps, temperature=1.0):
        if not self.checkpointing:
            raise error
        return transform(self, eps, temperature)

    monkeypatch.setattr(type(backbone), "transform", only_checkpointed)
    torch.testing.assert_close(sampled(nvae_prior, 4), want, rtol=1e-10, atol=1e-12)
    assert asked[:4] == [4, 2, 1, 1] and backbone.checkpointing and nvae_prior.micro_batch == 1
    assert len(capsys.readouterr().err.splitlines()) == 3
    # and when that does not help either
    limit_memory(monkeypatch, 0, error)
    with pytest.raises(EbmPriorError, match="out of memory for a single chain"):
        sampled(nvae_prior, 1)


def test_a_backbone_that_cannot_is_left_alone(toy, monkeypatch):
    assert toy.checkpointing is None
    prior = new_prior(toy)
    free(monkeypatch, 0)
    sampled(prior, 2)
    assert toy.checkpointing is None


# --- how much there is ----------------------------------------------------------------------


def machine(tmp_path, available, cgroup, files):
    """Host memory of a machine whose kernel says this."""
    proc, groups = tmp_path / "proc", tmp_path / "cgroup"
    (proc / "self").mkdir(parents=True)
    (proc / "meminfo").write_text(
        f"MemTotal:  9000 kB\nMemAvailable:  {available} kB\nHugePages: 0\n"
    )
    (proc / "self" / "cgroup").write_text(cgroup)
    for name, text in files.items():
        (groups / name).parent.mkdir(parents=True, exist_ok=True)
        (groups / name).write_text(text)
    return host_memory(proc, groups)


def test_memory_without_a_limit(tmp_path):
    assert machine(tmp_path, 5000, "0::/user\n", {}) == 5000 * 1024


def test_the_tightest_limit_counts_and_what_the_kernel_would_give_up_does_not(tmp_path):
    files = {
        "job/memory.max": "1000000\n",
        "job/memory.current": "700000\n",
        "job/memory.stat": "anon 600000\ninactive_file 100000\n",
        "job/step/memory.max": "max\n",
        "job/step/memory.current": "650000\n",
        "job/step/memory.stat": "inactive_file 0\n",
    }
    assert machine(tmp_path, 5000, "0::/job/step\n", files) == 400000


def test_version_one_of_control_groups_in_a_container(tmp_path):
    """There the path is that of the host, and the root is the container's own group."""
    files = {
        "memory/memory.limit_in_bytes": "2000000\n",
        "memory/memory.usage_in_bytes": "1900000\n",
        "memory/memory.stat": "total_inactive_file 400000\n",
    }
    text = "7:cpu,cpuacct:/x\n4:memory:/docker/abc\n0::/\n"
    assert machine(tmp_path, 5000, text, files) == 500000


def test_a_group_over_its_limit_has_nothing(tmp_path):
    files = {"memory.max": "10\n", "memory.current": "20\n", "memory.stat": ""}
    assert machine(tmp_path, 5000, "0::/\n", files) == 0


def test_where_the_kernel_tells_nothing(tmp_path):
    assert host_memory(tmp_path) is None
    (tmp_path / "meminfo").write_text("MemTotal: 5 kB\n")
    assert host_memory(tmp_path) is None


def test_processes_on_one_machine_share_it(monkeypatch):
    monkeypatch.setattr(memory, "host_memory", lambda: 1000)
    monkeypatch.setattr(memory, "freed_memory", lambda: 7)
    monkeypatch.setattr("sys.platform", "linux")
    cpu = torch.device("cpu")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")  # left over, without a launcher
    assert free_memory(cpu) == 1007
    monkeypatch.setenv("WORLD_SIZE", "4")
    monkeypatch.setenv("RANK", "0")
    assert free_memory(cpu) == 507
    monkeypatch.setattr("sys.platform", "darwin")
    assert free_memory(cpu) is None


def test_cuda_counts_what_its_allocator_holds_unused(monkeypatch):
    for name, value in (
        ("mem_get_info", (100, 500)),
        ("memory_reserved", 70),
        ("memory_allocated", 50),
    ):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    assert free_memory(torch.device("cuda")) == 120
    assert free_memory(torch.device("meta")) is None


@pytest.mark.skipif(not hasattr(__import__("ctypes").CDLL(None), "mallinfo2"), reason="no glibc")
def test_freed_memory_is_what_the_process_keeps():
    size = 8 * 2**10  # small pieces, which malloc does not return one by one
    pieces = [torch.empty(size, dtype=torch.uint8) for _ in range(2000)]
    before = freed_memory()
    del pieces[:1999]  # the last one holds the top of the heap
    assert freed_memory() - before > 0.5 * 1999 * size
