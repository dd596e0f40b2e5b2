"""examples/paper: scripts use only what exists, and the comparison compares."""

import json
import os
import subprocess
import sys
from pathlib import Path

import click
import pytest

from backbones.generator.config import PRESETS, TrainConfig
from backbones.hvae.pretrain import PretrainConfig as HVAEConfig
from backbones.nvae.pretrain import PretrainConfig as NVAEConfig
from ebm_prior.cli import main
from ebm_prior.cli.pretrain import parse_setting
from tests.test_cli import run

PAPER = Path(__file__).parent.parent / "examples" / "paper"
SCRIPTS = sorted(p.name for p in PAPER.glob("*.sh") if p.name != "lib.sh")
EVERYTHING = dict(
    CKPT="mine.pt", DATA="mine.npz", HEADS="runs/mine", FEATURES="f.safetensors", N="7", K="0,1",
    DEVICE="cuda", KINDS="both", KIND="both", FIT="--preset paper --limit 9", IMAGES="3",
    OUTLIERS="svhn", DIGITS="2", ITERATIONS="5", NGF="8", PRESET="table1", STEPS="16",
    MINUTES="0.5",
)  # fmt: skip
SETTINGS = {"train": TrainConfig, "pretrain": NVAEConfig, "anomaly": HVAEConfig}


@pytest.fixture
def compare(monkeypatch):
    monkeypatch.syspath_prepend(PAPER)
    import compare

    yield compare
    for name in ("compare", "equal_minutes"):
        sys.modules.pop(name, None)


@pytest.fixture
def shell(tmp_path):
    """Runs bash with stand-ins for the programs that only note their arguments."""
    programs, log = tmp_path / "bin", tmp_path / "calls"
    programs.mkdir()
    for name in ("ebm-prior", "python"):
        note = f'{{ echo {name}; printf "%s\\n" "$@"; echo; }} >>"{log}"'
        (programs / name).write_text(f"#!/usr/bin/env bash\n{note}\n")
        (programs / name).chmod(0o755)

    def calls(*command, **env):
        log.write_text("")
        path = f"{programs}:{os.environ['PATH']}"
        clean = {k: v for k, v in os.environ.items() if k not in EVERYTHING}
        subprocess.run(
            ["bash", *map(str, command)], cwd=tmp_path, env=clean | env | {"PATH": path},
            check=True, capture_output=True,
        )  # fmt: skip
        return [block.split("\n") for block in log.read_text().split("\n\n") if block]

    return calls


def parsed(command, args):
    """The options of a command line, by the parser that will read it."""
    while isinstance(command, click.Group) and args and args[0] in command.commands:
        command, args = command.commands[args[0]], args[1:]
    assert command is not main, args
    return command.make_context(command.name, list(args)).params


@pytest.mark.parametrize("env", [{}, EVERYTHING], ids=["default", "everything"])
@pytest.mark.parametrize("script", SCRIPTS)
def test_scripts_use_only_what_exists(script, env, shell, compare):
    used = shell(PAPER / script, **env)
    assert used
    for program, *args in used:
        if program == "python":
            path, *args = args
            assert Path(path).name == "compare.py"
            values = compare.main.make_context("compare", args).params
            assert set(values["tables"].split(",")) <= set(compare.TABLES)
            if env:
                assert values["minutes"] == 0.5 and values["features"] == "f.safetensors"
            continue
        values = parsed(main, args)
        if args[0] in SETTINGS:
            preset = PRESETS[values["preset"]] if values.get("preset") else {}
            SETTINGS[args[0]](**{**preset, **dict(map(parse_setting, values["settings"]))})
        if "device" in values:
            assert values["device"] == env.get("DEVICE", "cpu")
        if not env and "--heads" in args and args[0] not in ("fit", "evaluate", "anomaly"):
            heads = Path(args[args.index("--heads") + 1])
            assert (heads / "config.json").exists() or heads.parts[:2] == ("runs", "paper")


def test_finished_runs_are_left_alone_and_interrupted_ones_go_on(shell, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(f'. "{PAPER}/lib.sh"\nonce train run --seed 3\n')
    expected = ["ebm-prior", "train", "--out", "run", "--seed", "3", "--device", "cpu"]
    assert shell("-eu", script) == [expected]
    (tmp_path / "run").mkdir()
    script.write_text(script.read_text().replace("3", "4"))
    with pytest.raises(subprocess.CalledProcessError):  # never one run for another
        shell("-eu", script)
    script.write_text(script.read_text().replace("4", "3"))
    for status, calls in (("running", [[*expected, "--resume"]]), ("finished", [])):
        config = {"training": {"status": status}}
        (tmp_path / "run" / "config.json").write_text(json.dumps(config, indent=2))
        assert shell("-eu", script) == calls


def test_what_failed_is_not_kept(shell, tmp_path):
    script = tmp_path / "script.sh"
    script.write_text(f'. "{PAPER}/lib.sh"\nkept out/x.txt "$@"\n')
    with pytest.raises(subprocess.CalledProcessError):
        shell("-eu", script, "false")
    said = tmp_path / "said"
    for text in ("hello", "again"):
        said.write_text(text)
        shell("-eu", script, "cat", said)
    with pytest.raises(subprocess.CalledProcessError):  # never one result for another
        shell("-eu", script, "cat", "other")
    assert (tmp_path / "out" / "x.txt").read_text() == "hello"


def test_every_file_is_explained_and_listed():
    listed = (PAPER / "README.md").read_text()
    for script in SCRIPTS:
        head = (PAPER / script).read_text()
        number = script.removesuffix(".sh").removeprefix("table").removeprefix("figure")
        kind = "Table" if script.startswith("table") else "Figure"
        assert f"# {kind} {number}:" in head and "set -euo pipefail" in head
        assert all(f"# {word}" in head for word in ("Data:", "Cost:", "Needs:", "Instead:"))
        assert f"`{script}`" in listed and os.access(PAPER / script, os.X_OK)
        assert "not measured" not in head
    assert "TODO" not in listed and "not measured" not in listed


TOY = ["--minutes", "0.0005", "-n", "40", "--set", "batch_size=10"]
TOY += [f"--set={s}" for s in ("latents=[2,2]", "ngf=2", "posterior_steps=1", "prior_steps=2")]


def test_comparison(compare, tmp_path, monkeypatch):
    from click.testing import CliRunner

    calls = []

    def call(self, *args):  # in this process, which has torch already
        calls.append(args)
        return run(*args, "--device", self.device)

    monkeypatch.setattr(compare.Comparison, "call", call)
    monkeypatch.setattr("equal_minutes.ROUNDS", 1)

    def comparison(*args):
        calls.clear()
        args = ["--data", "digits", "--out", str(tmp_path / "out"), *TOY, *args]
        return CliRunner().invoke(compare.main, args)

    result = comparison("--tables", "1,7")
    assert result.exit_code == 0, (result.output, result.exception)
    found = json.loads((tmp_path / "out" / "compare.json").read_text())["tables"]
    seconds = json.loads((tmp_path / "out" / "seconds.json").read_text())
    assert len(found["1"]) == 6 and found["7"]["MCMC"] == found["1"]["ours, MCMC"]
    for row in found["1"].values():
        assert row["frechet"] > 0 and row["features"] == "digits classifier (64)"
        if "nce" not in row["run"]:  # as many iterations as the minutes pay for
            name = Path(row["run"]).name
            count = max(1, round(0.03 / seconds[name]["iteration"]))
            assert row["iterations"] == count
        assert (row["head_parameters"] == 0) == row["run"].endswith("-gaussian")
    one, two = (found["1"][k] for k in ("EBM of one layer (LEBM)", "ours, MCMC"))
    assert one["head_parameters"] < two["head_parameters"]
    assert [args[0] for args in calls].count("train") == 6  # one of them for NCE

    assert comparison("--tables", "7").exit_code == 0 and not calls  # all of it was there
    assert comparison("--tables", "7", "--seed", "1").exit_code == 2


def test_a_method_that_fails_costs_only_its_own_row(compare, tmp_path, monkeypatch):
    from click.testing import CliRunner

    def call(self, *args):
        if '--set=method="mle"' in args:
            raise click.ClickException("failed: ebm-prior train")
        return run(*args, "--device", self.device)

    monkeypatch.setattr(compare.Comparison, "call", call)
    args = ["--data", "digits", "--out", str(tmp_path), "--tables", "7", *TOY]
    result = CliRunner().invoke(compare.main, args)
    assert result.exit_code == 1 and "tries again" in result.output
    rows = json.loads((tmp_path / "compare.json").read_text())["tables"]["7"]
    assert rows["MCMC"] is None and rows["inference"]["frechet"] > 0


def test_baselines_are_rows_below_their_method(compare):
    row = dict(
        frechet=3,
        others={"reconstruction": 1, "gaussian": 5, "full_covariance": 4},
        seconds_per_iteration=0.5,
        iterations=7,
        generator_parameters=8,
        head_parameters=9,
    )
    shown = compare.text("1", {"NCE": row, "MCMC": None}, "note").splitlines()
    assert [line.split() for line in shown[2:5]] == [
        ["NCE", "3.00", "1.00", "0.5", "7", "8", "9"],
        ["full", "covariance", "4.00", *"-----"],
        ["MCMC", "failed", *"-----"],
    ]


def test_processes_of_their_own(compare, tmp_path):
    common = compare.Comparison("digits", [1, 8, 8], {}, 1.0, 0, "cpu", 1, [])
    common.call("evaluate", "stats", "--data", "digits", "--out", tmp_path / "x.npz")
    assert (tmp_path / "x.npz").exists()
    with pytest.raises(click.ClickException, match="evaluate stats --data nowhere"):
        common.call("evaluate", "stats", "--data", "nowhere", "--out", tmp_path / "y.npz")


def test_wider_generators_have_the_parameters_they_are_named_for(compare):
    base, shape = compare.SMALL, [1, 28, 28]
    size = compare.generator_size(base, shape)
    for factor in (2, 8):
        ngf = compare.wider(base, shape, factor)
        found = [compare.generator_size(base | {"ngf": n}, shape) for n in (ngf - 1, ngf)]
        assert found[0] < factor * size <= found[1] < 1.1 * factor * size
    rows = compare.rows_of("5", base, shape)
    names = {method.name(base) for method in rows.values()}
    assert len(names) == 5 and "variational-gaussian" in names
    assert compare.rows_of("8", base, shape)["k = 40"].name(base) == "mle-ebm"
