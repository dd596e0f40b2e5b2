import json
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from PIL import Image

import ebm_prior
from backbones.toy import ToyBackbone
from ebm_prior import EnergyPrior
from ebm_prior.cli import main
from ebm_prior.fit import FitConfig, _Fit, fit

QUICK = [
    "--objective",
    "nce+mle",
    "--nce-iterations",
    "40",
    "--mle-iterations",
    "10",
    "--batch-size",
    "16",
    "--nef",
    "4",
    "--ndf",
    "8",
    "--sample-steps",
    "5",
    "--heads",
    "both",
]


def run(*args, code=0):
    result = CliRunner().invoke(main, [str(a) for a in args])
    assert result.exit_code == code, (result.output, result.exception)
    if code:
        (line,) = [x for x in result.stderr.splitlines() if x.startswith("Error: ")]
        assert result.stderr.rstrip().endswith(line)  # and nothing after it
        assert "Traceback" not in result.output
        return line
    return result.stdout


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A toy checkpoint, a data set and one finished run under runs/."""
    root = tmp_path_factory.mktemp("world")
    settings = {"top": 2, "bottom": 3, "size": 8}
    (root / "toy.json").write_text(json.dumps(settings))
    toy = ToyBackbone(**settings)
    z = toy.transform([0.5 * torch.randn(300, *g.shape) for g in toy.groups])
    x = (toy.decode(z).mean * 255).round().to(torch.uint8).squeeze(1).numpy()
    np.savez(root / "x.npz", x_train=x[:200], x_test=x[200:])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)
        run("fit", "--backbone", "toy", "--ckpt", "toy.json", "--data", "x.npz", *QUICK)
    return root


@pytest.fixture(autouse=True)
def _inside(world, monkeypatch):
    monkeypatch.chdir(world)


VERBS = ["fit", "sample", "evaluate", "hierarchy", "ood", "anomaly", "chains", "likelihood"]
VERBS += ["report", "info", "pretrain", "train", "push", "pull", "import", "demo"]
VERBS += ["evaluate stats", "evaluate images"]


@pytest.mark.parametrize("command", ["", *VERBS])
def test_help_has_an_example(command):
    text = run(*command.split(), "--help")
    assert f"ebm-prior {command}" in text


def test_fit_names_its_run_folder(world):
    (folder,) = (world / "runs").iterdir()
    assert folder.name.startswith("toy-x-")
    stored = json.loads((folder / "config.json").read_text())
    assert stored["training"]["data"]["source"] == str(world / "x.npz")
    assert stored["backbone"]["path"] == str(world / "toy.json")


def test_a_source_with_classes_is_stored_in_full(world):
    from ebm_prior.cli.fit import absolute

    assert absolute("x.npz:0,1") == f"{world / 'x.npz'}:0,1"
    assert absolute("x.npz") == str(world / "x.npz") and absolute("mnist:0,1") == "mnist:0,1"


def test_fit_prints_json(tmp_path):
    out = run(
        "fit",
        "--backbone",
        "toy",
        "--ckpt",
        "toy.json",
        "--data",
        "x.npz",
        *QUICK,
        "--out",
        tmp_path / "run",
        "--json",
    )
    assert json.loads(out)["iterations"] == 50


def test_the_paper_preset_fills_what_is_not_given(tmp_path):
    run("fit", "--backbone", "toy", "--ckpt", "toy.json", "--data", "x.npz", "--preset", "paper",
        "--mle-iterations", 5, "--nef", 8, "--out", tmp_path / "run")  # fmt: skip
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert config["heads"] == {"kind": "factorized", "nef": 8, "ndf": 200}
    assert config["sampler"] == {"transition": "langevin", "steps": 10, "step_size": 1e-5}
    assert config["training"]["fit"]["mle_lr"] == 2e-5


def test_sample_finds_the_newest_run_and_writes_a_grid(tmp_path):
    out = run("sample", "--steps", 3, "-n", 4)
    path = out.strip().split(" -> ")[1]
    assert out.startswith("4 images -> runs/") and Image.open(path).size[0] >= 8


@pytest.mark.parametrize("suffix", ["", ".zip", ".npz"])
def test_sample_output_forms_hold_the_same_pixels(tmp_path, suffix):
    out = tmp_path / f"s{suffix}"
    run("sample", "--steps", 3, "--seeds", "5-8", "--out", out)
    if suffix == ".npz":
        images = list(np.load(out)["images"][..., 0])
    elif suffix == ".zip":
        with zipfile.ZipFile(out) as archive:
            images = [
                np.array(Image.open(archive.open(n)))
                for n in sorted(archive.namelist())
                if n.endswith(".png")
            ]
    else:
        images = [np.array(Image.open(p)) for p in sorted(out.glob("*.png"))]
    assert len(images) == 4
    run("sample", "--steps", 3, "--seeds", "5-8", "--out", tmp_path / "again.npz")
    again = np.load(tmp_path / "again.npz")["images"][..., 0]
    np.testing.assert_array_equal(np.stack(images), again)


def test_an_image_depends_on_its_seed_only(tmp_path):
    run("sample", "--steps", 6, "--seeds", "0-9", "--out", tmp_path / "a.npz")
    run("sample", "--steps", 6, "--seeds", "7,3,9", "--batch-size", 2, "--out", tmp_path / "b.npz")
    a, b = (np.load(tmp_path / f"{n}.npz")["images"].astype(int) for n in "ab")
    assert np.abs(a[[7, 3, 9]] - b).max() <= 1  # rounding of the eighth bit
    assert not np.array_equal(a[0], a[1])
    run("sample", "--steps", 6, "--seed", 7, "-n", 1, "--out", tmp_path / "c.npz")
    assert np.abs(np.load(tmp_path / "c.npz")["images"].astype(int)[0] - a[7]).max() <= 1


def test_compare_and_trajectory(tmp_path):
    run(
        "sample",
        "--steps",
        4,
        "-n",
        6,
        "--compare",
        "--out",
        tmp_path / "c.png",
        "--trajectory",
        tmp_path / "t.png",
    )
    assert Image.open(tmp_path / "c.png").size[1] > 20
    assert Image.open(tmp_path / "t.png").size[1] > 20
    run("sample", "--steps", 4, "-n", 6, "--compare", "--out", tmp_path / "c.npz")
    assert np.load(tmp_path / "c-gaussian.npz")["images"].shape == (6, 8, 8, 1)


def test_evaluate_prints_a_table_and_json():
    text = run("evaluate", "-n", 150, "--steps", 3, "--features", "digits")
    for word in ("Gaussian prior", "energy prior", "reconstructions", "gap closed", "digits"):
        assert word in text
    values = json.loads(run("evaluate", "-n", 150, "--steps", 3, "--json"))
    assert values["energy"]["n"] == 150 and values["energy"]["features"].startswith("digits")
    assert values["sampler"]["steps"] == 3


def test_resume_by_flag_or_folder(tmp_path):
    folder = tmp_path / "run"
    run(
        "fit",
        "--backbone",
        "toy",
        "--ckpt",
        "toy.json",
        "--data",
        "x.npz",
        *QUICK,
        "--out",
        folder,
    )
    assert "nothing to resume" in run("fit", "--resume", folder, code=1)
    config = json.loads((folder / "config.json").read_text())
    weights = (folder / "heads.safetensors").read_bytes()
    config["training"]["status"] = "running"  # as if killed before its first save
    config["sampler"]["step_size"] = 0.3
    (folder / "config.json").write_text(json.dumps(config))
    changes = {"--seed": 5, "--heads": "joint", "--nef": 8, "--data": "y.npz", "--limit": 9}
    changes |= {"--transition": "langevin", "--preset": "paper"}
    for option, value in changes.items():
        line = run("fit", "--resume", folder, option, value, code=2)
        assert "differs from the" in line and "keeps its settings" in line
    run("fit", "--resume", folder, "--seed", 0, "--nef", 4, "--data", "x.npz")  # the same
    config["training"]["status"] = "running"
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "heads.safetensors").unlink()
    run("fit", "--out", folder, "--resume")
    assert (folder / "heads.safetensors").read_bytes() == weights


FIT = ["fit", "--backbone", "toy", "--ckpt", "toy.json", "--data", "x.npz"]


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["sample", "--steps", "0"], 2, "--steps"),
        (["sample", "--step-size", "-1"], 2, "--step-size"),
        (["sample", "-n", "0"], 2, "-n"),
        (["sample", "--temperature", "0"], 2, "--temperature"),
        (["sample", "--seeds", "9-2"], 1, "runs backwards"),
        (["sample", "--seeds", "cats"], 1, "cannot read seeds"),
        (["sample", "--heads", "nowhere"], 1, "no heads at nowhere"),
        (["sample", "--ckpt", "nothing.json"], 1, "no such checkpoint"),
        (["sample", "--transition", "langevin"], 2, "give --step-size too"),
        (["sample", "--out", "x.gif"], 1, "x.gif"),
        (["sample", "--readjust-bn"], 2, "no batch-norm statistics"),
        (["fit", "--backbone", "toy"], 2, "--ckpt"),
        (["fit", "--ckpt", "toy.json"], 1, "does not name its data set"),
        (["fit", "--ckpt", "x.npz"], 1, "no checkpoint of a known family"),
        (["fit", "--backbone", "nvae", "--ckpt", "toy.json"], 1, "not a readable PyTorch"),
        (["fit", "--backbone", "vqvae", "--ckpt", "toy.json"], 1, "unknown backbone 'vqvae'"),
        ([*FIT[:5]], 1, "does not name its data set"),
        ([*FIT[:5], "--data", "nothing.zip"], 1, "nothing.zip"),
        ([*FIT, "--nce-lr", "-1"], 2, "--nce-lr"),
        ([*FIT, "--objective", "gan"], 2, "--objective"),
        (["fit", "--resume", "nowhere"], 1, "no run to resume"),
        (["evaluate", "--features", "nothing.safetensors"], 1, "nothing.safetensors"),
        (["pretrain", "--backbone", "toy", "--data", "x.npz", "--out", "y"], 1, "unknown trainer"),
        (["frobnicate"], 2, "No such command"),
        (["fit", "--resume", "runs", "--out", "elsewhere"], 2, "--out elsewhere"),
        (["sample", "--heads", "runs/typo"], 1, "no heads at runs/typo"),
        (["sample", "--heads", "../nope"], 1, "no heads at ../nope"),
        (["sample", "--temperature", "nan"], 2, "--temperature"),
        (["sample", "--step-size", "inf"], 2, "--step-size"),
        (["sample", "--seed", str(2**63)], 2, "--seed"),
        (["sample", "--seeds", f"0,{2**64}"], 1, "cannot read seeds"),
        (["sample", "--device", "meta"], 1, "unknown device"),
        (["sample", "--device", "xpu"], 1, "unknown device"),
        ([*FIT, "--weight-decay", "nan"], 2, "--weight-decay"),
        (
            ["pretrain", "--backbone", "nvae", "--data", "x.npz", "--out", "y", "--set", "seed=1"],
            2,
            "--set seed",
        ),
    ],
)
def test_bad_input_gives_one_line(args, code, message):
    assert message in run(*args, code=code)


@pytest.mark.skipif(torch.cuda.is_available(), reason="has a GPU")
def test_no_gpu_is_said():
    assert "use --device cpu" in run("sample", "--device", "cuda", code=1)


def test_another_backbone_is_refused(tmp_path):
    (tmp_path / "other.json").write_text('{"top": 2, "bottom": 3, "size": 8, "seed": 1}')
    line = run("sample", "--ckpt", tmp_path / "other.json", code=1)
    assert "SHA-256" in line and "--any-backbone" in line
    run(
        "sample",
        "--ckpt",
        tmp_path / "other.json",
        "--any-backbone",
        "--steps",
        1,
        "-n",
        1,
        "--out",
        tmp_path / "x.png",
    )
    (tmp_path / "wide.json").write_text('{"top": 4, "bottom": 3, "size": 8}')
    assert "its groups and features are 2 3" in run(
        "sample", "--ckpt", tmp_path / "wide.json", code=1
    )


def test_wrong_image_sizes_are_refused_or_resized(tmp_path):
    np.savez(
        tmp_path / "big.npz",
        x_train=np.zeros((30, 9, 9), np.uint8),
        x_test=np.zeros((3, 9, 9), np.uint8),
    )
    args = [*FIT[:5], "--data", tmp_path / "big.npz", *QUICK, "--out", tmp_path / "run"]
    assert "--resize" in run(*args, code=1)
    assert not (tmp_path / "run").exists()
    run(*args, "--resize")


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 12 bytes"),
        MemoryError(),
    ],
)
def test_out_of_memory_outside_of_chains_says_what_to_do(tmp_path, monkeypatch, error):
    monkeypatch.setattr(EnergyPrior, "images", lambda *_: (_ for _ in ()).throw(error))
    line = run("sample", "--steps", 1, "--out", tmp_path / "x.png", code=1)
    assert line.startswith("Error: out of memory; free some, lower the batch size")


def test_a_traceback_only_with_debug(monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr("ebm_prior.run.newest_run", broken)
    line = run("sample", code=1)
    assert line.startswith("Error: unexpected RuntimeError: first line; run again with --debug")
    for arguments in (["--debug", "sample"], ["sample", "--debug"]):
        result = CliRunner().invoke(main, arguments)
        assert isinstance(result.exception, RuntimeError)


def test_names_in_files_do_not_move_the_cursor(tmp_path):
    np.savez(tmp_path / "x.npz", **{"a\x1b[2J\nb": np.zeros(3)})
    args = [str(a) for a in (*FIT[:5], "--data", tmp_path / "x.npz", "--out", tmp_path / "run")]
    result = CliRunner().invoke(main, args, color=True)  # as on a terminal
    assert result.exit_code == 1 and result.stderr.endswith("it holds a\\x1b[2J b\n")


FULL_DISK = """
import errno, sys
from tensorboard.summary.writer.record_writer import RecordWriter
from ebm_prior.cli import main

def full(self, data):
    raise OSError(errno.ENOSPC, "No space left on device")

RecordWriter.write = full
main(sys.argv[1:])
"""


def test_a_disk_too_full_for_events_is_one_line(tmp_path):
    args = [*FIT, *QUICK, "--log-every", "1", "--out", str(tmp_path / "run")]
    end = subprocess.run([sys.executable, "-c", FULL_DISK, *args], capture_output=True, text=True)
    assert end.returncode == 1 and "Traceback" not in end.stderr
    line = end.stderr.splitlines()[-1]
    assert line == f"Error: cannot write events to {tmp_path / 'run/tb'}: No space left on device"


def test_no_arguments_show_the_help():
    assert "ebm-prior fit" in run()


def test_a_fit_begun_from_python_with_listed_layers_is_resumed(tmp_path, monkeypatch):
    backbone = ebm_prior.load_backbone("toy", "toy.json")
    prior = EnergyPrior.for_backbone(backbone, nef=4, layers=((3,), (4, 5)))
    config = FitConfig(objective="nce", nce_iterations=8, batch_size=16, save_every=4)
    images = torch.from_numpy(np.load("x.npz")["x_train"])[:, None]
    update = _Fit.update

    def dying(self, *args):
        if self.total == 6:
            raise KeyboardInterrupt
        return update(self, *args)

    monkeypatch.setattr(_Fit, "update", dying)
    with pytest.raises(KeyboardInterrupt):
        fit(prior, images, config, run_dir=tmp_path / "run")
    monkeypatch.setattr(_Fit, "update", update)
    run("fit", "--resume", tmp_path / "run", "--data", "x.npz")
    again = EnergyPrior.from_pretrained(tmp_path / "run", backbone=backbone)
    assert again.layers == ((3,), (4, 5))
    run("report", tmp_path / "run", "--no-samples")
    assert "nef 4, linear layers 3, 4-5" in (tmp_path / "run/report.html").read_text()


def test_a_damaged_run_is_not_resumed(world, tmp_path):
    shutil.copytree(next((world / "runs").iterdir()), tmp_path / "run")
    path = tmp_path / "run" / "config.json"
    config = json.loads(path.read_text())
    config["training"]["status"] = "running"
    (tmp_path / "run" / "heads.safetensors").unlink()
    path.write_text(json.dumps(config))
    assert "fit --resume" in run("sample", "--heads", tmp_path / "run", code=1)
    wrong = {"source": 5, "resize": False, "limit": None}
    for data in (None, "x.npz", wrong, {"source": "x.npz"}):
        training = config["training"] | {"data": data}
        path.write_text(json.dumps(config | {"training": training}))
        line = run("fit", "--resume", tmp_path / "run", code=1)
        assert line == f"Error: {path}: field training.data is wrong"
    training = config["training"] | {"fit": config["training"]["fit"] | {"batch_size": "16"}}
    path.write_text(json.dumps(config | {"training": training}))
    line = run("fit", "--resume", tmp_path / "run", code=1)
    assert line == "Error: the fit setting batch_size cannot be '16'"
    del config["backbone"]
    path.write_text(json.dumps(config))
    assert "field backbone.name" in run("fit", "--resume", tmp_path / "run", code=1)


def test_the_largest_seed_works(tmp_path):
    run(*FIT, *QUICK, "--seed", 2**62, "--out", tmp_path / "run")


def test_the_installed_command_starts():
    for command in (["ebm-prior"], [sys.executable, "-m", "ebm_prior"]):
        if command == ["ebm-prior"]:
            command = [str(__import__("pathlib").Path(sys.executable).parent / "ebm-prior")]
        out = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
        assert out.stdout.startswith("ebm-prior, version")


def test_a_checkpoint_does_not_choose_which_folder_is_read(tmp_path):
    from ebm_prior import EbmPriorError
    from ebm_prior.cli.options import DataChoice

    Image.new("L", (8, 8)).save(tmp_path / "mine.png")
    toy = ToyBackbone(size=8)
    toy.dataset = str(tmp_path)
    with pytest.raises(EbmPriorError, match="--data"):
        DataChoice(None, resize=False).open(toy, "train")
