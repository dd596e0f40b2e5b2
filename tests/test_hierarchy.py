import json
import math

import numpy as np
import pytest
import torch
from PIL import Image

import ebm_prior
from ebm_prior import EbmPriorError, EnergyPrior, LatentGroup, SamplerConfig
from ebm_prior.hierarchy import explore, infer, levels, redraw
from ebm_prior.langevin import keyed_generator, randn
from ebm_prior.sampling import seeded_batches
from ebm_prior.transitions import TRANSITIONS
from tests.sessions import write_biva, write_hvae
from tests.test_cli import run
from tests.test_prior import gaussian_of_quadratic_heads, quadratic_prior


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def zero_heads(backbone, kind="both"):
    prior = EnergyPrior.for_backbone(backbone, heads=kind, nef=2, ndf=3)
    with torch.no_grad():
        for p in prior.heads.parameters():
            p.zero_()
    return prior


def assert_gaussian(samples, mean, covariance, slack=0.0):
    """Moments of samples (n, D) lie within Monte-Carlo error of these."""
    n, sd = len(samples), covariance.diagonal().sqrt()
    assert ((samples.mean(0) - mean) / sd).abs().max() < 5 / math.sqrt(n) + slack
    error = (samples.T.cov() - covariance) / (sd[:, None] * sd)
    assert error.abs().max() < 5 * math.sqrt(2 / n) + slack


CHAINS = [
    SamplerConfig("pcnl", 150, 0.15),
    SamplerConfig("mala", 150, 0.15),
    SamplerConfig("hmc", 20, 0.15),
    SamplerConfig("langevin", 250, 0.03),
]


@pytest.mark.parametrize("config", CHAINS, ids=lambda c: c.transition)
def test_lower_groups_follow_the_conditional_law_given_the_upper_latents(toy, config):
    """z_1 | z_2 under the tilted prior, whose joint law over z is a known Gaussian."""
    prior, n = quadratic_prior(toy), 3000
    held = torch.tensor([[0.7, -1.1]]).double().expand(n, 2)
    eps = toy.inverse((held, torch.zeros(n, 3).double()))
    z = toy.transform(redraw(prior, eps, ["z2"], config, generator=seeded()).end)
    assert torch.equal(z[0], held)
    mean, cov = gaussian_of_quadratic_heads(toy)
    gain = cov[2:, :2] @ cov[:2, :2].inverse()
    expected = mean[2:] + gain @ (held[0] - mean[:2])
    slack = 0.04 if config.transition == "langevin" else 0.0
    assert_gaussian(z[1], expected, cov[2:, 2:] - gain @ cov[:2, 2:], slack)


@pytest.mark.parametrize("config", CHAINS, ids=lambda c: c.transition)
def test_upper_groups_follow_the_conditional_law_given_the_lower_noise(toy, config):
    """eps_2 | eps_1: with z = M eps + m the joint law over eps is Gaussian."""
    prior, n = quadratic_prior(toy), 3000
    held = torch.tensor([[0.5, -1.0, 1.5]]).double().expand(n, 3)
    eps = (torch.zeros(n, 2).double(), held)
    end = redraw(prior, eps, ["z1"], config, generator=seeded()).end
    assert torch.equal(end[1], held)
    matrix = torch.zeros(5, 5).double()
    matrix[:2, :2], matrix[2:, :2], matrix[2:, 2:] = torch.eye(2), toy.A, toy.s.diag()
    offset = torch.cat([torch.zeros(2).double(), toy.a])
    kappa = torch.tensor([1.5, 1.5, 3, 3, 3]).double()
    center = torch.tensor([0.8, 0.8, -0.5, -0.5, -0.5]).double()
    precision = torch.eye(5).double() + matrix.T @ kappa.diag() @ matrix
    mean = precision.inverse() @ matrix.T @ (kappa * (center - offset))
    cov = precision[:2, :2].inverse()
    expected = mean[:2] - cov @ precision[:2, 2:] @ (held[0] - mean[2:])
    slack = 0.04 if config.transition == "langevin" else 0.0
    assert_gaussian(end[0], expected, cov, slack)


@pytest.mark.parametrize("keep", [["z2"], ["z1"], []])
def test_zero_heads_give_the_score_minus_eps_exactly(toy, keep):
    prior, s = zero_heads(toy), 0.3
    eps = prior.noise(4, seeded(1))
    generator = seeded(2)
    drawn = redraw(prior, eps, keep, SamplerConfig("langevin", 1, s), generator=seeded(2))
    start = prior.noise(4, generator)  # the same stream again
    free = [i for i, group in enumerate(toy.groups) if group.name not in keep]
    flat = torch.cat([start[i] for i in free], 1)
    expected = flat + (s / 2) * -flat + s**0.5 * randn(flat, generator)
    assert torch.equal(torch.cat([drawn.start[i] for i in free], 1), flat)
    assert torch.equal(torch.cat([drawn.end[i] for i in free], 1), expected)


def test_zero_heads_leave_the_free_noise_standard_normal(toy):
    prior, accepted = zero_heads(toy), []
    drawn = redraw(
        prior,
        prior.noise(4000, seeded(1)),
        ["z2"],
        SamplerConfig("pcnl", 5, 0.5),
        generator=seeded(2),
        callback=lambda info: accepted.append(info.accepted.all()),
    )
    assert all(accepted)
    assert_gaussian(drawn.end[1], torch.zeros(3).double(), torch.eye(3).double())


@pytest.mark.parametrize("transition", TRANSITIONS)
@pytest.mark.parametrize("keep", [["z2"], ["z1"]])
def test_held_groups_stay_as_they_are(toy, transition, keep):
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=6)
    eps = prior.noise(5, seeded())
    copies = [e.clone() for e in eps]
    config = SamplerConfig(transition, 5, 0.3)
    drawn = [redraw(prior, eps, keep, config, generator=seeded(s)) for s in (1, 2)]
    held = 0 if keep == ["z2"] else 1
    for states in drawn:
        for state in states:
            assert torch.equal(state[held], eps[held])
            assert not torch.equal(state[1 - held], eps[1 - held])
    z = toy.transform(eps)
    if held == 0:  # an uppermost group: its latents are held too
        assert torch.equal(toy.transform(drawn[0].end)[0], z[0])
    else:  # below a redrawn group the latents move with it
        assert not torch.allclose(toy.transform(drawn[0].end)[1], z[1])
    assert not torch.equal(drawn[0].end[1 - held], drawn[1].end[1 - held])
    assert all(torch.equal(a, b) for a, b in zip(eps, copies, strict=True))


@pytest.mark.parametrize("transition", TRANSITIONS)
def test_holding_nothing_is_the_plain_chain(toy, transition):
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=6)
    config = SamplerConfig(transition, 6, 0.2)
    blank = tuple(torch.zeros(3, *g.shape).double() for g in toy.groups)
    drawn = redraw(prior, blank, (), config, generator=[seeded(s) for s in (4, 5, 6)])
    generators = [seeded(s) for s in (4, 5, 6)]
    plain = prior.run_chain(prior.noise(3, generators), config, generator=generators)
    assert all(torch.equal(a, b) for a, b in zip(drawn.end, plain, strict=True))


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_inferred_noise_gives_the_posterior_draw_back(toy, temperature):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    images = torch.randint(0, 256, (3, 1, 4, 4), dtype=torch.uint8)
    eps = infer(prior, images, [5, 6, 7], temperature)
    for i, seed in enumerate((5, 6, 7)):
        x = images[i : i + 1].double() / 255
        z = toy.posterior(x, noise=prior.noise(1, seeded(seed))).z
        again = [t[i : i + 1] for t in toy.transform(eps, temperature)]
        torch.testing.assert_close(again, list(z))


@pytest.mark.parametrize("reconstruct", [False, True])
def test_a_redraw_depends_on_its_seed_alone(toy, reconstruct):
    prior = EnergyPrior.for_backbone(toy, heads="both", nef=4, ndf=6)
    images = torch.randint(0, 256, (4, 1, 4, 4), dtype=torch.uint8) if reconstruct else None
    config = SamplerConfig("pcnl", 4, 0.3)

    def pixels(seeds, redraws, batch, chosen):
        found = explore(prior, seeds, None if images is None else images[chosen],
                        redraws=redraws, config=config, batch_size=batch)  # fmt: skip
        parts = [found.gaussian, found.energy]
        parts += [x for level in found.levels for x in (level.gaussian, level.energy)]
        return [part.int() for part in parts]

    many = pixels([3, 4, 5, 6], 4, 100, [0, 1, 2, 3])
    for one, all_ in zip(pixels([5], 2, 3, [2]), many, strict=True):
        assert (one[0, :2] - all_[2, :2]).abs().max() <= 1  # rounding


def test_samples_and_levels_are_what_they_say(toy):
    prior = EnergyPrior.for_backbone(toy, heads="joint", nef=4, ndf=6)
    config = SamplerConfig("pcnl", 4, 0.3)
    found = explore(prior, [7, 8], config=config, redraws=3)
    (batch,) = seeded_batches(prior, [7, 8], config)
    for given, eps in ((found.gaussian, batch.start), (found.energy, batch.end)):
        expected = (prior.images(eps) * 255).round().to(torch.uint8)
        assert (given[:, 0].int() - expected.int()).abs().max() <= 1
    assert [(level.held, level.redrawn) for level in found.levels] == [
        (("z2",), ("z1",)),
        ((), ("z2", "z1")),
    ]
    # one noise per redraw at every level, and for both priors
    generators = [keyed_generator(seed, j) for seed in (7, 8) for j in range(3)]
    start = redraw(prior, prior.noise(6, seeded()), (), config, generator=generators).start
    before = (start[0], start[1]), (batch.start[0].repeat_interleave(3, 0), start[1])
    for level, eps in zip(reversed(found.levels), before, strict=True):
        expected = (prior.images(eps) * 255).round().int().unflatten(0, (2, 3))
        assert (level.gaussian.int() - expected).abs().max() <= 1
    exact = (found.levels[0].energy.double() / 255).std(1).mean().item()
    assert found.levels[0].energy_std == pytest.approx(exact) and exact > 0
    assert "z1" in found.table().text() and found.picture().shape[0] == 3


def groups(*names):
    return [LatentGroup(name, (2,)) for name in names]


def test_default_levels_are_even_steps_from_the_bottom():
    assert levels(groups("a", "b", "c")) == [("a", "b"), ("a",), ()]
    counts = [len(held) for held in levels(groups(*map(str, range(30))))]
    assert counts == [25, 20, 15, 10, 5, 0]
    counts = [len(held) for held in levels(groups(*map(str, range(8))))]
    assert counts == [6, 5, 4, 2, 1, 0]


def test_levels_are_counts_or_names():
    assert levels(groups("a", "b", "c"), "2, 0") == [("a", "b"), ()]
    assert levels(groups("a", "b", "c"), "c+a,b") == [("a", "c"), ("b",)]


@pytest.mark.parametrize("keep", ["", "3", "4", "-1", "x", "a+x", "a b", "a+b+c", "1,,0", "1.5"])
def test_bad_levels_are_refused(keep):
    with pytest.raises(EbmPriorError, match="hold"):
        levels(groups("a", "b", "c"), keep)


def test_bad_settings_are_refused(toy):
    prior = EnergyPrior.for_backbone(toy, nef=4, ndf=6)
    eps = prior.noise(2)
    with pytest.raises(EbmPriorError, match="no group z9; the groups are z2, z1"):
        redraw(prior, eps, ["z9"])
    with pytest.raises(EbmPriorError, match="nothing to redraw"):
        redraw(prior, eps, ["z1", "z2"])
    with pytest.raises(EbmPriorError, match="eps: group z1"):
        redraw(prior, (eps[0], eps[1][:1]), ["z2"])
    with pytest.raises(EbmPriorError, match="two redraws"):
        explore(prior, [0], redraws=1)
    with pytest.raises(EbmPriorError, match="too many for one picture"):
        explore(prior, range(5000))


@pytest.mark.parametrize("family", ["biva", "hvae", "nvae"])
def test_every_family_shows_its_hierarchy(tmp_path, family):
    path = "checkpoints/nvae_digits/checkpoint.pt"
    if family != "nvae":
        path = {"biva": write_biva, "hvae": write_hvae}[family](tmp_path / family)
    backbone = ebm_prior.load_backbone(family, path)
    prior = EnergyPrior.for_backbone(backbone, heads="both", nef=4, ndf=6)
    images = torch.randint(0, 256, (2, *backbone.image_shape), dtype=torch.uint8)
    found = explore(prior, [0, 1], images, redraws=2, config=SamplerConfig("pcnl", 2, 0.3))
    assert torch.equal(found.energy[:, 0], images)
    assert len(found.levels) == len(backbone.groups)
    # the upper latents of a redraw are those of q(z|x)
    eps = infer(prior, images, [0, 1])
    z = backbone.transform(eps)
    top = [g.name for g in backbone.groups[:-1]]
    again = backbone.transform(redraw(prior, eps, top, SamplerConfig("pcnl", 2, 0.3)).end)
    assert all(torch.equal(a, b) for a, b in zip(again[:-1], z[:-1], strict=True))
    assert not torch.equal(again[-1], z[-1])


# The command


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A toy checkpoint with heads, images beside them."""
    root = tmp_path_factory.mktemp("hierarchy")
    (root / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    backbone = ebm_prior.load_backbone("toy", root / "toy.json")
    torch.manual_seed(0)
    sampler = SamplerConfig("pcnl", 5, 0.3)
    EnergyPrior.for_backbone(backbone, "both", 4, 6, sampler).save_pretrained(root / "heads")
    (root / "heads" / "samples").mkdir()
    x = (255 * torch.rand(40, 8, 8)).to(torch.uint8).numpy()
    Image.fromarray(x[0]).save(root / "a.png")
    Image.fromarray(x[1]).save(root / "b.jpg")
    Image.fromarray(np.zeros((9, 12, 3), np.uint8)).save(root / "wide.png")
    np.savez(root / "x.npz", x_train=x[:20], x_test=x[20:])
    (root / "note.png").write_text("not an image")
    return root


@pytest.fixture
def show(folder, monkeypatch):
    monkeypatch.chdir(folder)
    base = ["hierarchy", "--heads", "heads", "--ckpt", "toy.json"]
    return lambda *args, code=0: run(*base, *args, code=code)


def test_command_samples_into_the_run(show, folder):
    text = show("--redraws", 3)
    assert "Gaussian prior" in text and "all groups" in text
    path = folder / text.strip().split(" -> ")[1]
    assert path.parent == folder / "heads/samples" and path.name == "hierarchy-seed0.png"
    assert Image.open(path).size[0] > 800


def test_command_reconstructs_files_and_test_images(show, folder, tmp_path):
    found = json.loads(
        show("a.png", "b.jpg", "--keep", "1", "--out", tmp_path / "r.png", "--json")
    )
    assert found["redraws"] == 7 and found["picture"] == str(tmp_path / "r.png")
    (level,) = found["levels"]
    assert level["held"] == ["z2"] and level["redrawn"] == ["z1"] and level["energy_std"] > 0
    assert Image.open(tmp_path / "r.png").size[1] > 100
    show("0", "19", "--data", "x.npz", "--out", tmp_path / "i.png")
    show("wide.png", "--resize", "--out", tmp_path / "w.png")


def test_the_same_seed_gives_the_same_picture(show, tmp_path):
    for name in ("one.png", "two.png"):
        show("--seed", 4, "--redraws", 2, "--steps", 2, "--out", tmp_path / name)
    assert (tmp_path / "one.png").read_bytes() == (tmp_path / "two.png").read_bytes()


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--keep", "2"], 1, "'2' holds every group"),
        (["--keep", "3"], 1, "a row is a number of uppermost groups, 0 to 1"),
        (["--keep", "z9"], 1, "cannot hold 'z9'"),
        (["--keep", ""], 1, "cannot hold ''"),
        (["--redraws", "1"], 2, "--redraws"),
        (["-n", "0"], 2, "-n"),
        (["-n", "2000"], 1, "too many for one picture"),
        (["a.png", "-n", "2"], 2, "-n counts samples"),
        (["missing.png"], 1, "cannot read missing.png"),
        (["note.png"], 1, "note.png is not a readable image"),
        (["heads"], 1, "cannot read heads"),
        (["wide.png"], 1, "pass --resize"),
        (["a.png", "3"], 2, "either image files or indices"),
        (["3"], 1, "does not name its data set"),
        (["3", "20", "--data", "x.npz"], 1, "no test image 20: x has 20"),
        (["--out", "x.gif"], 1, "goes to a .png"),
        (["--transition", "langevin"], 2, "give --step-size too"),
    ],
)
def test_bad_input_gives_one_line(show, args, code, message):
    assert message in show(*args, code=code)
