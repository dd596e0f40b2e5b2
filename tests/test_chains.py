import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ebm_prior
from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.chain_pictures import latents_figure, posterior_latents, way_picture
from ebm_prior.chain_study import ChainStudy, Pixels, ess_rates, study
from ebm_prior.chains import LongChains, long_chains
from ebm_prior.metrics import FeatureNetwork
from ebm_prior.sampling import seeded_batches
from ebm_prior.transitions import TRANSITIONS
from ebm_prior.tuning import tuned
from ebm_prior.two_sample import AggregatePosterior
from tests.test_cli import run
from tests.test_hierarchy import zero_heads
from tests.test_prior import gaussian_of_quadratic_heads, quadratic_prior


class Flat(FeatureNetwork):
    """Four pixels as features."""

    name, dim, device = "flat", 4, torch.device("cpu")

    def _forward(self, images):
        return images[..., :2, :2].flatten(1)


def random_heads(toy):
    return EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=6)


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_what_is_kept_is_what_the_chains_did(toy, transition):
    prior, config = random_heads(toy), SamplerConfig(transition, 20, 0.3)
    found = long_chains(prior, [3, 4, 5], config, at=(0, 7, 20), temperature=0.7)
    states, accepted = {}, {}

    def keep(info):
        states[info.step], accepted[info.step] = info.eps, info.accepted

    (batch,) = seeded_batches(prior, [3, 4, 5], config, temperature=0.7, callback=keep)
    states[0] = batch.start
    assert found.energy.shape == found.half_norm.shape == (21, 3)
    for step, eps in states.items():
        energy = prior.energy_of_noise(eps, 0.7).detach().numpy()
        np.testing.assert_allclose(found.energy[step], energy, atol=1e-12)
        flat = torch.cat([e.flatten(1) for e in eps], 1).numpy()
        np.testing.assert_allclose(found.half_norm[step], (flat**2).sum(1) / 2)
        # unit vectors: no projection is longer than the vector
        longest = np.abs(found.projections[step]).max(1)
        assert (longest <= np.sqrt(2 * found.half_norm[step]) + 1e-9).all()
        if step:
            assert found.accepted[step - 1] == accepted[step].double().mean().item()
    assert list(found.images) == [0, 7, 20]
    for step, x in found.images.items():
        assert torch.equal(x, (prior.images(states[step], 0.7) * 255).round().to(torch.uint8))
    assert list(found.latents) == [0, 10, 20]
    assert list(found.latents[10]) == ["z2"]  # the group of two units
    np.testing.assert_array_equal(
        found.latents[10]["z2"], toy.transform(states[10], 0.7)[0].detach().numpy()
    )


def test_chains_do_not_depend_on_the_batch_size(toy):
    prior, config = random_heads(toy), SamplerConfig("hmc", 16, 0.3)
    found = [long_chains(prior, range(5), config, at=(16,), batch_size=size) for size in (100, 2)]
    np.testing.assert_allclose(found[0].energy, found[1].energy)
    np.testing.assert_allclose(found[0].projections, found[1].projections)
    np.testing.assert_allclose(found[0].accepted, found[1].accepted)
    assert (found[0].images[16].int() - found[1].images[16].int()).abs().max() <= 1


def with_energy(energy, transition="pcnl"):
    steps, n = len(energy) - 1, energy.shape[1]
    config = SamplerConfig(transition, steps, 0.1)
    rest = np.random.default_rng(0).standard_normal((steps + 1, n, 2))
    accepted = np.arange(steps) >= min(100, steps // 2)  # none on the way there
    return LongChains(config, energy, rest[..., 0], rest, accepted, {}, {})


def test_the_energy_band_is_that_of_the_settled_steps():
    noise = np.random.default_rng(0).standard_normal((1001, 50))
    noise[:101] += 1e3  # the way there
    steady = with_energy(noise)
    band = steady.energy_band()
    assert steady.acceptance == 1  # of the settled steps alone
    assert steady.settled == 100 and -0.7 < band["low"] < 0 < band["high"] < 0.7
    assert abs(band["drift"]) < 0.05
    rising = with_energy(noise + np.arange(1001)[:, None] / 100)
    # quarters are 675 steps apart; a uniform ramp of length 9 has deviation 9 / sqrt(12)
    assert rising.energy_band()["drift"] == pytest.approx(
        6.75 / math.hypot(1, 9 / 12**0.5), rel=0.02
    )
    assert with_energy(noise[:81]).settled == 40


def test_effective_samples_are_counted_per_gradient():
    """Independent draws: one per transition, so a fifth of one per gradient of hmc."""
    noise = np.random.default_rng(0).standard_normal((1001, 50))
    for transition, cost, unit in (("pcnl", 1, "gradients"), ("hmc", 5, "gradients"),
                                   ("sir", 1, "energies")):  # fmt: skip
        found = with_energy(noise, transition)
        assert found.cost == (900 * cost, unit)
        rates = ess_rates(found, found.mixing())
        assert rates["energy"] == pytest.approx(1000 / cost, rel=0.05)


def test_summaries_without_numbers_hide_no_others():
    """Zero heads: the energy never changes, the chains mix all the same."""
    found = with_energy(np.zeros((1001, 50)))
    (table,) = ChainStudy((found,), ({},)).tables()
    cells = dict(zip(table.header, table.rows[0], strict=True))
    assert cells["ESS of E"] == "nan" and float(cells["R-hat"]) < 1.02
    assert float(cells["slowest"]) == pytest.approx(1000, rel=0.1)
    alone = with_energy(np.zeros((1001, 1)))
    assert ChainStudy((alone,), ({},)).tables()[0].rows[0][5] == "nan"  # R-hat of one chain


def test_curves_are_short_and_start_with_every_step():
    curve = with_energy(np.random.default_rng(0).standard_normal((2501, 20))).curve()
    assert len(curve["step"]) <= 201 and curve["step"][:6] == [0, 1, 2, 3, 4, 5]
    assert curve["step"][-1] == 2500
    assert all(np.array(curve["low"]) < curve["median"])
    assert len(json.dumps(curve)) < 10_000


@pytest.mark.parametrize("transition", ["mala", "hmc", "pcnl"])
def test_tuning_meets_its_target(toy, transition):
    prior = quadratic_prior(toy)
    config = tuned(prior, transition, 300)
    found = long_chains(prior, range(64), config)
    assert config.steps == 300
    assert found.acceptance == pytest.approx(TRANSITIONS[transition].target, abs=0.06)


def test_langevin_is_tuned_as_mala(toy):
    prior = quadratic_prior(toy)
    langevin, mala = (tuned(prior, name, 9, rounds=6) for name in ("langevin", "mala"))
    assert langevin.step_size == mala.step_size and langevin.transition == "langevin"


def test_zero_heads_accept_all_of_pcnl_and_tune_to_the_longest_step(toy):
    assert tuned(zero_heads(toy), "pcnl", 9).step_size == pytest.approx(1.9)


def test_pixels():
    images = torch.tensor([0, 255, 255, 51], dtype=torch.uint8).view(1, 1, 2, 2)
    found = Pixels.of(images)
    assert found.extreme == 0.75 and found.mean == pytest.approx(0.55)
    assert found.std == pytest.approx(np.std([0, 1, 1, 0.2], ddof=1))


def test_a_study_measures_every_run_at_every_step(toy):
    prior = random_heads(toy)
    configs = [SamplerConfig("pcnl", 20, 0.3), SamplerConfig("hmc", 16, 0.1)]
    reference = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    found = study(prior, range(9), configs, at=(0, 16, 20), reference=reference, network=Flat())
    assert [list(f) for f in found.frechet] == [[0, 16, 20], [0, 16]]
    assert found.frechet[0][0] == found.frechet[1][0] > 0  # the same noise
    first, second = found.to_dict()["runs"]
    assert first["at"][0] == second["at"][0] and first["sampler"]["transition"] == "pcnl"
    assert second["gradients_per_chain"] == 5 * 8
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["reference_images"] == 50
    draws = AggregatePosterior.of(prior, reference)
    assert found.posterior_draws == len(draws.draws) == 25
    for run_, tests, row in zip(found.runs, found.two_sample, (first, second), strict=True):
        config = run_.config
        z = {}
        (batch,) = seeded_batches(
            prior, range(9), config, callback=lambda i, z=z: z.update({i.step: i.eps})
        )
        for step in row["at"]:
            flat = torch.cat(toy.transform(z.get(step["step"], batch.start)), 1)
            torch.testing.assert_close(run_.z[step["step"]], flat)
            assert tests[step["step"]] == draws.test(flat)
            assert (step["energy_distance"], step["p_value"]) == tests[step["step"]]
    text = found.table()
    assert "hmc, step 16" in text and "held-out images" in text and "flat" in text
    assert way_picture(found, reference).shape[0] == 3
    posterior = posterior_latents(prior, reference, n=30)
    assert list(posterior) == ["z2"] and posterior["z2"].shape == (30, 2)
    assert len(latents_figure(found, posterior).axes) == 2 * 2
    alone = study(prior, range(9), configs[:1], at=(0,))
    assert alone.data is None and "held-out" not in alone.table()
    assert alone.to_dict()["runs"][0]["at"][0]["energy_distance"] is None
    few = study(prior, range(2), configs[:1], at=(0,), reference=reference[:3])
    assert few.to_dict()["runs"][0]["at"][0]["p_value"] is None and "-" in few.table()


def test_latents_move_towards_the_aggregate_posterior_and_only_what_fits_is_kept(toy, monkeypatch):
    """Quadratic heads against draws of the Gaussian that they make of the prior."""
    prior = quadratic_prior(toy)
    mean, covariance = gaussian_of_quadratic_heads(toy)
    draws = torch.distributions.MultivariateNormal(mean, covariance).sample((200,))
    monkeypatch.setattr(
        AggregatePosterior, "of", lambda *_: AggregatePosterior(mean * 0, mean * 0 + 1, draws)
    )
    monkeypatch.setattr("ebm_prior.memory.LATENTS_KEPT", 2 * 5 * 150)
    reference = torch.zeros(50, 1, 4, 4, dtype=torch.uint8)
    config = SamplerConfig("pcnl", 60, 0.3)
    found = study(prior, range(200), [config], at=(0, 60), reference=reference, batch_size=90)
    before, after = found.two_sample[0].values()
    assert before.p_value == 0.001 and after.p_value > 0.01
    assert abs(after.distance) < 0.05 * before.distance
    assert [len(z) for z in found.runs[0].z.values()] == [150, 150]
    assert found.runs[0].energy.shape == (61, 200) and "150 chains" in found.table()


def test_singular_covariances_are_warned_of_once(toy):
    reference = torch.randint(0, 256, (50, 1, 4, 4), dtype=torch.uint8)
    config = SamplerConfig("pcnl", 16, 0.3)
    with pytest.warns(UserWarning, match="singular") as seen:
        study(random_heads(toy), range(3), [config], at=(0, 8, 16), reference=reference,
              network=Flat())  # fmt: skip
    assert len(seen) == 1


def test_no_group_of_two_units_gives_no_latent_picture():
    toy = ToyBackbone(top=3, bottom=4).double().freeze()
    found = study(random_heads(toy), range(3), [SamplerConfig("pcnl", 16, 0.3)], at=(0,))
    assert latents_figure(found) is None


def test_bad_chains_are_refused(toy):
    prior = random_heads(toy)
    with pytest.raises(EbmPriorError, match="at least 16 steps"):
        long_chains(prior, [0], SamplerConfig("pcnl", 15, 0.3))
    with pytest.raises(EbmPriorError, match="no step 17"):
        long_chains(prior, [0], SamplerConfig("pcnl", 16, 0.3), at=(0, 17))
    with pytest.raises(EbmPriorError, match="langevin chains diverged at step .* below 50"):
        long_chains(quadratic_prior(toy), [0, 1], SamplerConfig("langevin", 400, 50.0))


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("chains")
    (root / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    backbone = ebm_prior.load_backbone("toy", root / "toy.json")
    torch.manual_seed(0)
    sampler = SamplerConfig("pcnl", 5, 0.3)
    EnergyPrior.for_backbone(backbone, "both", 4, 6, sampler).save_pretrained(root / "heads")
    x = (255 * torch.rand(40, 8, 8)).to(torch.uint8).numpy()
    np.savez(root / "x.npz", x_train=x[:20], x_test=x[20:])
    return root


@pytest.fixture
def chains(folder, monkeypatch):
    monkeypatch.chdir(folder)
    base = ["chains", "--heads", "heads", "--ckpt", "toy.json", "--steps", 20, "-n", 6]
    return lambda *args, code=0: run(*base, *args, code=code)


def test_command_without_images(chains, tmp_path):
    text = chains("--out", tmp_path)
    assert "pcnl, step 20" in text and "Fréchet distance" not in text
    for name in ("chains.png", "chains-energy.png", "chains-latents.png"):
        assert Image.open(tmp_path / name).size[0] > 500
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.filterwarnings("ignore:.*singular")
def test_command_records_what_it_prints(chains, folder, tmp_path):
    args = ["--data", "x.npz", "--features", "digits", "--at", "0,20", "--out", tmp_path]
    found = json.loads(chains("--json", "--record", "--transition", "all", *args))
    assert [r["sampler"]["transition"] for r in found["runs"]] == list(TRANSITIONS)
    assert found["runs"][0]["sampler"]["step_size"] == found["runs"][1]["sampler"]["step_size"]
    rows = [row for r in found["runs"] for row in r["at"]]
    assert all(row["frechet"] > 0 and 0 < row["p_value"] <= 1 for row in rows)
    assert found["features"] and found["reference_images"] == 20
    pictures = found.pop("pictures")
    stored = json.loads((folder / "heads/config.json").read_text())["training"]["chains"]
    tables, captions = stored.pop("tables"), stored.pop("pictures")
    assert stored == found and len(json.dumps(stored)) < 60_000
    assert len(tables) == 2 and all(captions.values())
    assert captions.keys() == {picture.rpartition("/")[2] for picture in pictures}
    for picture in pictures:
        name = picture.rpartition("/")[2]
        content = (folder / "heads/results" / name).read_bytes()
        assert content == (tmp_path / name).read_bytes()


def test_command_uses_given_stored_or_tuned_step_sizes(chains, tmp_path):
    def size(*args):
        found = json.loads(chains("--json", "--out", tmp_path, *args))
        return found["runs"][0]["sampler"]["step_size"]

    assert size() == size("--transition", "pcnl") == 0.3
    assert size("--transition", "mala", "--step-size", "0.07") == 0.07
    assert size("--transition", "mala") not in (0.3, 0.07)


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--transition", "all", "--step-size", "0.1"], 2, "leave --step-size"),
        (["--transition", "nuts"], 2, "--transition"),
        (["--at", "0,21"], 2, "the chains have 20 steps"),
        (["--at", "0,x"], 2, "expected steps such as"),
        (["--steps", "99", "--at", ",".join(map(str, range(41)))], 2, "at most 40"),
        (["--steps", "5"], 2, "--steps"),
        (["-n", "1"], 2, "-n"),
        (["--data", "nowhere.npz"], 1, "no such file"),
        (["--heads", "user/name", "--record"], 2, "--record needs heads in a local folder"),
    ],
)
def test_bad_input_gives_one_line(chains, args, code, message):
    assert message in chains(*args, code=code)


def test_other_verbs_take_every_transition(folder, monkeypatch, tmp_path):
    monkeypatch.chdir(folder)
    for name in TRANSITIONS:
        size = [] if name == "sir" else ["--step-size", 0.1]  # it has none
        run("sample", "--heads", "heads", "--ckpt", "toy.json", "--transition", name, *size,
            "--steps", 3, "-n", 2, "--out", tmp_path / name)  # fmt: skip
        assert len(list((tmp_path / name).iterdir())) == 2
