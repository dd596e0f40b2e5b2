"""Recorded results: tables, the way into a folder of heads, the report, the card."""

import json
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
    assert "![Grey.](results/ood.png)" in card.text
    assert files["results/ood.png"] == picture().png
