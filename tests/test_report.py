"""Recorded results: tables, the way into a folder of heads, the report, the card."""

import ast
import json
import os
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import ebm_prior
from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior.images import png_bytes
from ebm_prior.record import Picture, record, recorded, recorded_pictures
from ebm_prior.report import read_log, report
from ebm_prior.saved import read_config
from ebm_prior.tables import Table
from tests.test_cli import run

TABLE = Table("Scores", ("k", "AUROC"), [("0", "0.5"), ("10", "0.987")], "on 900 images")
HOSTILE = "<script>alert(1)</script> | [x](http://x.org) `rm`"


@pytest.fixture
def world(tmp_path, monkeypatch):
    """Heads on a toy checkpoint in the working directory."""
    (tmp_path / "toy.json").write_text('{"top": 2, "bottom": 3, "size": 8}')
    monkeypatch.chdir(tmp_path)
    backbone = ebm_prior.load_backbone("toy", "toy.json")
    prior = EnergyPrior.for_backbone(backbone, heads="both", nef=4, ndf=8)
    prior.save_pretrained("heads")
    return prior


def picture(value=0):
    return Picture(png_bytes(torch.full((1, 4, 4), value, dtype=torch.uint8)), "Grey.")


def test_a_table_as_text_has_aligned_columns():
    assert TABLE.text().splitlines() == [
        "Scores", "k  AUROC", "0    0.5", "10 0.987", "on 900 images",
    ]  # fmt: skip


def test_a_table_as_markdown_cannot_be_broken_out_of():
    lines = Table(HOSTILE, (HOSTILE, "b"), [(HOSTILE, "1")]).markdown().splitlines()
    assert len(lines) == 5
    for line in (lines[2], lines[4]):
        assert len(re.findall(r"(?<!\\)\|", line)) == 3
    assert not re.search(r"(?<!\\)[<\[`]", "\n".join(lines))


def test_a_table_survives_json():
    again = Table.from_dict(json.loads(json.dumps(TABLE.to_dict())))
    assert again.text() == TABLE.text()


@pytest.mark.parametrize(
    "change",
    [
        {"rows": [["0"]]}, {"rows": [[0, 1]]}, {"header": []}, {"rows": "ab"}, {"title": None},
        {"note": "two\nlines"}, {"rows": [["a", "b"]] * 201}, {"more": 1},
        {"title": "x" * 501},
    ],
)  # fmt: skip
def test_an_odd_table_is_none(change):
    assert Table.from_dict(json.loads(json.dumps(TABLE.to_dict())) | change) is None


def test_a_record_is_read_back_and_replaced(world):
    folder = Path("heads")
    record(folder, "ood", {"auroc": 0.5}, [TABLE], {"ood.png": picture()})
    record(folder, "ood", {"auroc": 0.6}, [TABLE], {"ood.png": picture(9)})
    config = read_config(folder)
    assert config["training"]["ood"]["auroc"] == 0.6
    found = recorded(config)["ood"]
    assert found.tables[0].text() == TABLE.text() and found.captions == {"ood.png": "Grey."}
    assert recorded_pictures(folder, config) == {"results/ood.png": picture(9).png}
    EnergyPrior.from_pretrained("heads", backbone=world.backbone)  # still heads


def test_results_with_several_sets_stand_side_by_side(world):
    for name in ("likelihood", "ood: svhn", "ood: mnist"):
        record(Path("heads"), name, {}, [TABLE])
    names = list(recorded(read_config(Path("heads"))))
    assert names == ["ood: svhn", "ood: mnist", "likelihood"]
    assert "Out-of-distribution detection: svhn" in report("heads")


def test_a_record_needs_heads(tmp_path):
    with pytest.raises(EbmPriorError, match="not a folder of heads"):
        record(tmp_path, "ood", {}, [TABLE])
    assert not any(tmp_path.iterdir())


def test_strange_records_are_left_out():
    good = {"tables": [TABLE.to_dict()], "pictures": {"../x.png": "a", "b.png": "c\n", 'd"': "e"}}
    training = {"ood": good, "fit": {"seed": 1}, "chains": [1], "likelihood": {"tables": 3}}
    training["ood"]["tables"] = json.loads(json.dumps(training["ood"]["tables"])) + [{}, 1]
    found = recorded({"training": training})
    assert list(found) == ["ood"] and len(found["ood"].tables) == 1 and not found["ood"].captions
    assert recorded({"training": 5}) == {} and recorded({}) == {}


def test_a_recorded_picture_must_be_one(world):
    record(Path("heads"), "ood", {}, [], {"ood.png": picture()})
    Path("heads/results/ood.png").write_bytes(b"<script>")
    assert recorded_pictures(Path("heads"), read_config(Path("heads"))) == {}
    assert "base64" not in report("heads")


def test_the_report_holds_everything_in_itself(world):
    record(Path("heads"), "ood", {}, [TABLE], {"ood.png": picture()})
    Path("heads/log.jsonl").write_text(
        "".join(
            json.dumps({"iteration": i, "loss": 1 / i, "energy_prior": {"a": i, "b": 1.0}}) + "\n"
            for i in range(1, 30)
        )
        + "half a li"
    )
    run("report", "heads", "--ckpt", "toy.json")
    page = Path("heads/report.html").read_text()
    assert "Out-of-distribution detection" in page and "0.987" in page and "Grey." in page
    # before and after, the strip, the curves, the recorded one
    assert page.count("data:image/png;base64,") == 4
    assert not re.search(r"(src|href)=\"(?!data:)", page) and "http://" not in page
    assert "<script" not in page


def test_a_strangers_words_stay_words(world):
    config = json.loads(Path("heads/config.json").read_text())
    config["backbone"]["dataset"] = HOSTILE
    config["training"] = {"ood": {"tables": [Table(HOSTILE, (HOSTILE,), [(HOSTILE,)]).to_dict()]}}
    Path("heads/config.json").write_text(json.dumps(config))
    assert "<script" not in report("heads") and "&lt;script&gt;" in report("heads")


def test_the_report_says_what_it_needs(world):
    assert "no folder of heads" in run("report", "nowhere", code=1)
    assert "--no-samples" in run("report", "heads", "--ckpt", "no.json", code=1)
    assert not Path("heads/report.html").exists()
    run("report", "heads", "--no-samples", "--out", "r.html")
    assert Path("r.html").read_text().startswith("<!doctype html>")


def test_a_log_may_be_missing_or_odd(tmp_path):
    assert read_log(tmp_path / "none") == []
    (tmp_path / "log").write_text('[1]\n{"iteration": "x"}\n{"iteration": 3, "loss": NaN}\n')
    assert len(read_log(tmp_path / "log")) == 1


def test_recorded_results_go_into_the_card(hub, world):
    record(Path("heads"), "ood", {}, [TABLE], {"ood.png": picture()})
    run("push", "heads", "user/heads", "--no-pictures", "--license", "mit")
    files = hub.files("user/heads")
    card = ModelCard(files["README.md"].decode())
    card.validate()
    assert "## Out-of-distribution detection" in card.text and "| 10 | 0.987 |" in card.text
    assert "![Grey.](results/ood.png)\n\n*Grey.*" in card.text
    assert files["results/ood.png"] == picture().png


def test_a_record_that_could_not_be_read_again_is_refused(world):
    """Its configuration has a limit; beyond it the heads themselves would be lost."""
    before = Path("heads/config.json").read_bytes()
    with pytest.raises(EbmPriorError, match="too large to record"):
        record(Path("heads"), "ood", {"x": ["y" * 100] * 11_000}, [], {"ood.png": picture()})
    assert Path("heads/config.json").read_bytes() == before
    assert not Path("heads/results").exists()


EVALUATED = {
    "gaussian": {"frechet": 9.0, "precision": 0.5, "recall": 0.5, "n": 9, "features": "digits"},
    "data": "digits", "gap_closed": 0.5, "reference_images": 9,
}  # fmt: skip
EVALUATED |= {name: EVALUATED["gaussian"] for name in ("energy", "reconstruction")}


def strange(**evaluation):
    """A stranger's configuration: the fields that are checked are right, others are not."""
    config = json.loads(Path("heads/config.json").read_text())
    config["backbone"] |= {"dataset": HOSTILE, "license": HOSTILE, "checkpoint": 'x"); rm("`|'}
    config["training"] = {
        "evaluation": EVALUATED | evaluation,
        HOSTILE: {
            "tables": [TABLE.to_dict()],
            "pictures": {"a.png": "](javascript:x) " + HOSTILE},
        },
    }
    Path("heads/results").mkdir(exist_ok=True)
    Path("heads/results/a.png").write_bytes(picture().png)
    Path("heads/config.json").write_text(json.dumps(config))
    return read_config(Path("heads"))


def test_a_strangers_words_do_not_break_out_of_the_card(world):
    from ebm_prior.card import model_card

    config = strange(temperature="1\n```\n<script>", seed="\n```")
    text = model_card(config, "user/heads", ["results/a.png"])
    body = text.split("---\n", 2)[2]
    prose = "".join(re.split(r"```.*?```", body, flags=re.DOTALL))
    assert "a.png" in prose
    outside = re.sub(r"`[^`\n]*`", "", prose)
    assert not re.search(r"(?<!\\)<script|(?<!\\)\]\((http://x|javascript)", outside)
    assert body.count("\n```\n") == body.count("```bash") + body.count("```python")
    snippet = re.search(r"```python\n(.*?)```", body, re.DOTALL)[1]
    assert "rm" not in {name.id for name in ast.walk(ast.parse(snippet)) if type(name) is ast.Name}
    assert not any("evaluate" in command for command in re.findall(r"^ebm-prior.*", body, re.M))


@pytest.mark.parametrize(
    "evaluation",
    [{"gap_closed": 10**400}, {"gap_closed": float("nan")}, {"gap_closed": None},
     {"reference_images": 10**400}, {"gaussian": EVALUATED["gaussian"] | {"frechet": 10**400}},
     {"gaussian": EVALUATED["gaussian"] | {"density": "x"}}, {"runs": {}}],
)  # fmt: skip
def test_odd_numbers_of_a_stranger_end_neither_card_nor_report(world, evaluation):
    from ebm_prior.card import model_card

    card = model_card(strange(**evaluation), "user/heads")
    ModelCard(card).validate()
    shown = "Fréchet distance" in report("heads")
    assert shown == (evaluation.keys() == {"gap_closed"} and evaluation["gap_closed"] is None) or (
        shown and not {"gap_closed", "runs"} & evaluation.keys()
    )


def test_odd_files_of_a_stranger_do_not_end_the_report(world):
    config = strange()
    config["backbone"]["parameters"] = ["many"]
    config["training"]["result"] = {"iterations": 10**400, "seconds": float("nan")}
    Path("heads/config.json").write_text(json.dumps(config))
    Path("heads/samples").mkdir()
    Path("heads/samples/2024-party.png").write_bytes(picture().png)
    Path("heads/log.jsonl").write_text(
        f'{{"iteration": 1, "loss": {10**400}}}\n{{"iteration": {10**400}, "loss": 1}}\n'
        '{"iteration": 2, "loss": 1, "energy_prior": {"a": true, "b": "x"}}\n'
    )
    Path("heads/results/a.png").unlink()
    os.mkfifo("heads/results/a.png")  # reading it would never end
    assert report("heads").count("data:image/png") == 1  # the curves


def test_recording_is_refused_before_the_work_where_nothing_can_be_written(world, monkeypatch):
    from ebm_prior import files
    from ebm_prior.files import CannotWriteError

    def full(path):
        raise CannotWriteError(f"disk full while writing {path}")

    monkeypatch.setattr(files, "check_writable", full)
    monkeypatch.setattr(ebm_prior.registry, "load_backbone", None)  # not reached
    line = run("likelihood", "--heads", "heads", "--ckpt", "toy.json", "--record", code=1)
    assert "disk full while writing heads/config.json" in line
