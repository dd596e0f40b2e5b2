"""Heads in the layout of the paper authors' public code; backbones as safetensors."""

import os
from pathlib import Path

import pytest
import torch
from torch import nn

import ebm_prior
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.convert import import_heads, to_safetensors
from tests.test_cli import run

FIXTURES = Path(__file__).parent / "fixtures" / "nvae"
CKPT = FIXTURES / "legacy" / "checkpoint.pt"  # groups of 8x8 and of 16x16
SAMPLER = SamplerConfig("langevin", 10, 1e-5)
NEF, NDF = 6, 5


class Theirs(nn.Module):
    """A head under their names: stride-2 convolutions to 4x4, linear layers; returns f."""

    def __init__(self, shape):
        super().__init__()
        channels, side, _ = shape
        depth = {8: 1, 16: 2}[side]
        self.conv2d, self.linear = nn.ModuleDict(), nn.ModuleDict()
        width = 16 * NEF
        for i in range(1, depth + 1):
            self.conv2d[f"conv{i}"] = nn.Conv2d(channels, NEF, 4, 2, 1)
            self.linear[f"fc{i}"] = nn.Linear(width, NDF)
            channels, width = NEF, NDF
        self.linear["out"] = nn.Linear(width, 1)

    def forward(self, z):
        for layer in self.conv2d.values():
            z = torch.nn.functional.leaky_relu(layer(z), 0.2)
        z = z.flatten(1)
        for name, layer in self.linear.items():
            z = layer(z) if name == "out" else torch.nn.functional.leaky_relu(layer(z), 0.2)
        return z.squeeze(1)


@pytest.fixture(scope="module")
def backbone():
    return ebm_prior.load_backbone("nvae", CKPT)


@pytest.fixture
def theirs(backbone):
    return [Theirs(group.shape) for group in backbone.groups]


def saved(heads, path, prefix="", **more):
    """Their file: a state dict per head, and its optimizer's beside it."""
    data = {}
    for i, head in enumerate(heads):
        optimizer = torch.optim.Adam(head.parameters())
        channels = head.conv2d["conv1"].weight.shape[1]
        size = 4 * 2 ** len(head.conv2d)
        head(torch.randn(2, channels, size, size)).sum().backward()
        optimizer.step()
        data[f"netE{i}"] = {prefix + key: value for key, value in head.state_dict().items()}
        data[f"opt{i}"] = optimizer.state_dict()
    torch.save(data | more, path)
    return path


@pytest.mark.parametrize("prefix", ["", "module."])
def test_imported_energies_are_minus_f(backbone, theirs, tmp_path, prefix):
    path = saved(theirs, tmp_path / "300.pth", prefix)
    prior = import_heads(path, backbone, SAMPLER)
    assert (prior.kind, prior.nef, prior.ndf, prior.sampler) == ("factorized", NEF, NDF, SAMPLER)
    z = backbone.transform(prior.noise(3))
    f = torch.stack([head(part) for head, part in zip(theirs, z, strict=True)], 1)
    torch.testing.assert_close(prior.energies(z), -f)


def test_the_command_writes_heads_that_load(backbone, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved(theirs, "300.pth")
    command = ["import", "300.pth", "--backbone", "nvae", "--ckpt", CKPT, "--out", "heads"]
    assert "4 heads, nef 6, ndf 5 -> heads" in run(*command)
    assert "already holds heads" in run(*command, code=1)
    prior = EnergyPrior.from_pretrained("heads", backbone=backbone)
    assert prior.sampler == SAMPLER
    run("sample", "--heads", "heads", "--ckpt", CKPT, "-n", 1, "--steps", 1, "--out", "x.png")


class Bomb:
    def __reduce__(self):
        return (os.mkdir, ("executed",))


def test_other_files_are_refused(backbone, theirs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def refuse(path, message):
        with pytest.raises(EbmPriorError, match=message):
            import_heads(path, backbone, SAMPLER)

    refuse("nothing.pth", "no such checkpoint")
    refuse(saved(theirs, "bomb.pth", extra=Bomb()), "asks to run .*mkdir")
    assert not Path("executed").exists()
    torch.save([1, 2], "list.pth")
    refuse("list.pth", "holds no heads netE0")
    refuse(saved(theirs[:3], "three.pth"), "holds 3 heads, this backbone has 4 groups")
    refuse(saved(theirs[::-1], "turned.pth"), r"netE0 \(.*\) does not fit a group of 4x8x8")
    refuse(saved(theirs, "text.pth", netE2="no"), "holds no state dict netE2")
    broken = theirs[0].state_dict() | {"linear.out.bias": torch.tensor([torch.inf])}
    refuse(saved(theirs, "inf.pth", netE0=broken), "linear.out.bias is not finite")
    bare = {"conv2d.conv1.weight": torch.zeros(())}
    refuse(saved(theirs, "bare.pth", netE1=bare), "netE1 .* has no conv2d.conv1")
    Path("cut.pth").write_bytes(Path("turned.pth").read_bytes()[:-300])
    refuse("cut.pth", "not a readable PyTorch checkpoint")


@pytest.mark.parametrize("folder", sorted(FIXTURES.iterdir()), ids=lambda p: p.name)
def test_a_converted_backbone_is_the_same_network(folder, tmp_path):
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(to_safetensors("nvae", folder / "checkpoint.pt"))
    one = ebm_prior.load_backbone("nvae", folder / "checkpoint.pt")
    two = ebm_prior.load_backbone("nvae", path)
    assert one.groups == two.groups and one.dataset == two.dataset
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name


def test_damaged_converted_backbones_are_refused(tmp_path):
    from safetensors.torch import save

    path = tmp_path / "backbone.safetensors"
    data = to_safetensors("nvae", CKPT)
    for content, message in (
        (save({"a": torch.zeros(1)}), "holds bare tensors"),
        (data[:-10], "is damaged"),
        (data.replace(b'{\\"table\\"', b'{\\"tabel\\"', 1), "unknown entry 'tabel'"),
        (b"\x80\x02}q\x00.", "is damaged"),
    ):
        path.write_bytes(content)
        with pytest.raises(EbmPriorError, match=message):
            ebm_prior.load_backbone("nvae", path)
