"""Heads in the layout of the paper authors' public code; backbones as safetensors."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save
from torch import nn

import ebm_prior
from ebm_prior import EbmPriorError, EnergyPrior, SamplerConfig
from ebm_prior.convert import import_heads, to_safetensors
from ebm_prior.registry import detect_backbone
from ebm_prior.safe_load import FORMAT_KEY, load_torch_file
from tests.sessions import write_biva, write_hvae
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


# Folders

SESSIONS = [
    pytest.param(family, folder, id=f"{family}-{folder.parent.name}")
    for family in ("biva", "hvae")
    for folder in sorted((FIXTURES.parent / family).glob("*/*"))
    if folder.is_dir()
]


def converted(family, folder, path):
    path.write_bytes(to_safetensors(family, folder))
    return path


@pytest.mark.parametrize(("family", "folder"), SESSIONS)
def test_a_converted_folder_is_the_same_network(family, folder, tmp_path):
    path = converted(family, folder, tmp_path / "backbone.safetensors")
    assert detect_backbone(path) == family
    one, two = ebm_prior.load_backbone(family, folder), ebm_prior.load_backbone(family, path)
    assert one.groups == two.groups and one.feature_shape == two.feature_shape
    for fact in ("dataset", "binarize", "centred", "padding", "image_shape"):
        assert getattr(one, fact) == getattr(two, fact)
    for (name, a), (_, b) in zip(one.state_dict().items(), two.state_dict().items(), strict=True):
        assert torch.equal(a, b), name
    x = torch.rand(2, *one.image_shape)
    noise = [torch.randn(2, *group.shape) for group in one.groups]
    for a, b in zip(one.posterior(x, noise), two.posterior(x, noise), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    decoded = [backbone.decode(backbone.transform(noise)) for backbone in (one, two)]
    assert torch.equal(decoded[0].params, decoded[1].params)
    assert torch.equal(decoded[0].log_prob(x), decoded[1].log_prob(x))
    # a second conversion changes nothing
    assert to_safetensors(family, path) == path.read_bytes()


def test_a_converted_folder_keeps_nothing_of_the_machine(tmp_path):
    folder = write_biva(tmp_path / "session")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"data_root": "/home/me/secret"}))
    assert b"secret" not in to_safetensors("biva", folder)


def test_one_family_is_not_taken_for_another(tmp_path):
    paths = {
        "biva": converted("biva", write_biva(tmp_path / "b"), tmp_path / "b.safetensors"),
        "hvae": converted("hvae", write_hvae(tmp_path / "h"), tmp_path / "h.safetensors"),
        "nvae": converted("nvae", CKPT, tmp_path / "n.safetensors"),
    }
    for family, path in paths.items():
        assert detect_backbone(path) == family
        for other in paths.keys() - {family}:
            with pytest.raises(EbmPriorError, match="is no|is not an"):
                ebm_prior.load_backbone(other, path)


def changed(data, change=None, tensors=None):
    """A converted checkpoint with its structure changed in place, or other tensors."""
    length = int.from_bytes(data[:8], "little")
    structure = json.loads(json.loads(data[8 : 8 + length])["__metadata__"][FORMAT_KEY])
    found = change(structure["table"]) if change else None
    state = load(data)
    if tensors:
        tensors(state)
    return save(state, {FORMAT_KEY: found if isinstance(found, str) else json.dumps(structure)})


def nested(levels):
    return '{"list": [' * levels + "]}" * levels


HOSTILE = {
    "an extra tensor": (
        {"tensors": lambda state: state.update(more=torch.zeros(9))},
        "holds tensors that its structure does not name",
    ),
    "a tensor too few": ({"tensors": lambda state: state.pop("3")}, "does not contain tensor 3"),
    "no finite numbers": (
        {"tensors": lambda state: [t.fill_(torch.nan) for t in state.values() if t.ndim]},
        "is not finite",
    ),
    "another shape": (
        {"tensors": lambda state: state.update({k: t[None] for k, t in state.items()})},
        "misshaped",
    ),
    "whole numbers": (
        {"tensors": lambda state: state.update({k: t.int() for k, t in state.items()})},
        "mistyped",
    ),
    "an endless structure": ({"change": lambda _: " " * (1 << 23) + "{}"}, "characters"),
    "endless nesting": ({"change": lambda _: nested(100_000)}, "is damaged"),
    "deep nesting": ({"change": lambda _: nested(150)}, "100 deep"),
    "no JSON": ({"change": lambda _: "{"}, "is damaged"),
    "a bare word": ({"change": lambda _: '"x"'}, "unknown entry ''"),
    "two kinds at once": ({"change": lambda _: '{"list": [], "table": {}}'}, "is damaged"),
    "a table as a value": ({"change": lambda _: '{"value": {}}'}, "unknown entry 'value'"),
    "an unprintable kind": ({"change": lambda _: '{"\\u001b[2J": 1}'}, "unknown entry"),
    "a list as a name": ({"change": lambda _: '{"name": []}'}, "unknown entry 'name'"),
    "a namespace of methods": (
        {"change": lambda _: '{"namespace": {"__class__": {"value": 1}}}'},
        "is damaged",
    ),
    "a number of many digits": ({"change": lambda _: '{"value": 1' + "0" * 5000 + "}"}, "damaged"),
    "a tensor that is missing": (
        {"change": lambda _: '{"tensor": "\\u001b' + "x" * 5000 + '"}'},
        "is damaged",
    ),
    "no weights": (
        {
            "change": lambda table: table.update({WEIGHTS: {"table": {}}}),
            "tensors": lambda state: state.clear(),
        },
        "not weights",
    ),
    "a file too few": (
        {"change": lambda table: [table.pop("config.json")]},
        "is no BIVA session",
    ),
    "weights for hyperparameters": (
        {"change": lambda table: table.update({ARGUMENTS: table[WEIGHTS]})},
        "no Stage",
    ),
    "one weight under many names": (
        {
            "change": lambda table: table.update(
                {WEIGHTS: {"table": {f"{i}": {"tensor": "0"} for i in range(10_000)}}}
            ),
            "tensors": lambda state: [state.pop(k) for k in list(state) if k != "0"],
        },
        "views of far fewer weights",
    ),
    "a name of the file's own": (
        {"change": lambda table: table[ARGUMENTS]["table"].update(Stage={"name": "os.system"})},
        "option Stage=Named(name='os.system') is not supported",
    ),
    "an infinite number": (
        {"change": lambda table: table[ARGUMENTS]["table"].update(features_out={"value": 1e999})},
        "features_out is inf",
    ),
    "huge blocks": (
        {
            "change": lambda table: table[ARGUMENTS]["table"].update(
                features_out={"value": 1 << 40}
            )
        },
        "expected a whole number in 1..65536",
    ),
    "endless stages": (
        {
            "change": lambda table: table[ARGUMENTS]["table"]["stages"]["list"][0]["list"].extend(
                table[ARGUMENTS]["table"]["stages"]["list"][0]["list"] * 1000
            )
        },
        "far more than the",
    ),
}
ARGUMENTS, WEIGHTS = "hyperparameters.p", "model.pth"


@pytest.fixture(scope="module")
def biva(tmp_path_factory):
    return to_safetensors("biva", write_biva(tmp_path_factory.mktemp("biva") / "session"))


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_converted_folders_are_refused(biva, tmp_path, kind):
    how, message = HOSTILE[kind]
    path = tmp_path / "backbone.safetensors"
    path.write_bytes(changed(biva))
    ebm_prior.load_backbone("biva", path)  # the way of changing does no harm itself
    path.write_bytes(changed(biva, **how))
    with pytest.raises(EbmPriorError) as error:
        ebm_prior.load_backbone("biva", path)
    line = str(error.value)
    assert message in line, line
    assert len(line) < 700 and line.isprintable()


def test_damage_anywhere_in_a_converted_folder_is_one_kind_of_error(biva, tmp_path):
    path, refused = tmp_path / "backbone.safetensors", 0
    end = int.from_bytes(biva[:8], "little") + 8
    places = torch.randint(end, (60,), generator=torch.Generator().manual_seed(0)).tolist()
    for place in places:
        path.write_bytes(biva[:place] + bytes([biva[place] ^ 1]) + biva[place + 1 :])
        try:
            ebm_prior.load_backbone("biva", path)
        except EbmPriorError as error:
            assert str(error).isprintable()
            refused += 1
    assert refused > 40


def test_tensors_that_claim_far_more_than_is_stored_are_not_converted(tmp_path):
    torch.save({"x": torch.zeros(1).expand(1 << 40)}, tmp_path / "c.pt")
    with pytest.raises(EbmPriorError, match="not stored in full"):
        to_safetensors("nvae", tmp_path / "c.pt")
    big = torch.ones(10_000)
    torch.save({"x": [big[i:] for i in range(50)]}, tmp_path / "c.pt")
    with pytest.raises(EbmPriorError, match="views of far fewer weights"):
        to_safetensors("nvae", tmp_path / "c.pt")


@pytest.mark.parametrize(
    "value",
    [
        torch.eye(3).to_sparse(),
        torch.empty(3, device="meta"),
        {1: 2},
        {"a": b"bytes"},
    ],
    ids=["sparse", "meta", "numbered", "bytes"],
)
def test_what_has_no_form_in_safetensors_is_not_converted(tmp_path, value):
    torch.save({"x": value}, tmp_path / "c.pt")
    with pytest.raises(EbmPriorError, match="cannot be converted|not stored in full"):
        to_safetensors("nvae", tmp_path / "c.pt")


def test_tied_weights_stay_one(tmp_path):
    weight = torch.ones(5)
    torch.save({"a": weight, "b": weight}, tmp_path / "c.pt")
    path = converted("nvae", tmp_path / "c.pt", tmp_path / "c.safetensors")
    found = load_torch_file(path)
    assert len(load(path.read_bytes())) == 1 and found["a"] is found["b"]
