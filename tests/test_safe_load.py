import argparse
import io
import pickle
import struct
import zipfile
from pathlib import Path

import pytest
import torch

from ebm_prior import EbmPriorError
from ebm_prior.safe_load import (
    MAX_PICKLE,
    Named,
    load_pickle_file,
    load_torch_file,
    mentions,
    plain_state,
    printable,
    sha256_of,
    shown,
)
from tests.sessions import nest


def saved(**kwargs):
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(64.0), "b": [1, "x"]}, buffer, **kwargs)
    return buffer.getvalue()


def test_a_compressed_file_is_refused(tmp_path):
    path = tmp_path / "bomb.pt"
    with zipfile.ZipFile(io.BytesIO(saved())) as plain:
        with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
            for name in plain.namelist():
                packed.writestr(name, plain.read(name))
    with pytest.raises(EbmPriorError, match="compressed"):
        load_torch_file(path)


@pytest.mark.parametrize("new_format", [True, False])
def test_damage_anywhere_is_one_kind_of_error(tmp_path, new_format):
    data = saved(_use_new_zipfile_serialization=new_format)
    path, refused = tmp_path / "x.pt", 0
    generator = torch.Generator().manual_seed(0)
    for place in torch.randint(len(data), (150,), generator=generator).tolist():
        path.write_bytes(data[:place] + bytes([data[place] ^ 0xFF]) + data[place + 1 :])
        try:
            load_torch_file(path)
        except EbmPriorError:
            refused += 1
    assert refused > 10


def test_the_hash_of_a_folder_depends_on_names_and_contents(tmp_path):
    hashes = set()
    for name, text in (("a", "1"), ("b", "1"), ("a", "2")):
        folder = tmp_path / f"{name}{text}"
        folder.mkdir()
        (folder / name).write_text(text)
        hashes.add(sha256_of(folder))
    assert len(hashes) == 3


# Files of a few bytes that stand for gigabytes


def looped():
    value = []
    value.append(value)
    return value


TANGLES = {
    "lists": {"x": nest(20)},
    "a tuple as a key": {nest(20, tuple): 1},
    "a list in itself": looped(),
}


@pytest.mark.parametrize("value", TANGLES.values(), ids=TANGLES)
def test_what_is_endless_when_written_out_is_refused(tmp_path, value):
    path = tmp_path / "x.p"
    path.write_bytes(pickle.dumps(value, 2))
    assert path.stat().st_size < 400
    with pytest.raises(EbmPriorError, match="far more than it holds"):
        load_pickle_file(path, {})
    for new_format in (True, False):
        torch.save(value, path, _use_new_zipfile_serialization=new_format)
        with pytest.raises(EbmPriorError, match="far more than it holds"):
            load_torch_file(path)


def test_deep_nesting_is_refused(tmp_path):
    path = tmp_path / "x.p"
    path.write_bytes(b"\x80\x02" + 500 * b"]" + 499 * b"a" + b".")
    with pytest.raises(EbmPriorError, match="far more than it holds"):
        load_pickle_file(path, {})


def test_a_list_that_is_filled_after_it_was_used_counts_in_full(tmp_path):
    path = tmp_path / "x.p"
    levels = b"".join(b"]q%c" % i for i in range(20))
    fill = b"".join(b"h%c(h%ch%ce" % (i, i + 1, i + 1) for i in range(19))
    path.write_bytes(b"\x80\x02" + levels + fill + b"h\x00.")
    with pytest.raises(EbmPriorError, match="far more than it holds"):
        load_pickle_file(path, {})


def test_ordinary_sharing_is_no_tangle(tmp_path):
    block = (64, 5, 1)
    value = {"stages": [[block] * 50] * 9, "names": ["x"] * 100}
    path = tmp_path / "x.p"
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        path.write_bytes(pickle.dumps(value, protocol))
        assert load_pickle_file(path, {}) == value
    weight = torch.ones(2)
    value = {"args": argparse.Namespace(stages=value["stages"]), "w": {"a": weight, "b": weight}}
    for new_format in (True, False):
        torch.save(value, path, _use_new_zipfile_serialization=new_format)
        found = load_torch_file(path, allowed=[argparse.Namespace])
        assert found["args"] == value["args"] and torch.equal(found["w"]["b"], weight)


def test_memos_cannot_ask_for_memory(tmp_path):
    path = tmp_path / "x.p"
    for put in (b"r" + struct.pack("<I", 1 << 20), b"p1000000\n"):
        path.write_bytes(b"\x80\x02N" + put + b".")
        with pytest.raises(EbmPriorError, match="numbers 10"):
            load_pickle_file(path, {})


def test_large_pickles_are_refused(tmp_path):
    path = tmp_path / "x.p"
    path.write_bytes(pickle.dumps("x" * MAX_PICKLE))
    with pytest.raises(EbmPriorError, match="not a readable pickle"):
        load_pickle_file(path, {})


def test_many_names_of_the_same_weights_are_refused():
    for dtype in (torch.float16, torch.float32):
        weight = torch.ones(1000, dtype=dtype)
        few = {"a": weight, "tied": weight, "own": torch.ones(3, dtype=dtype)}
        assert set(plain_state(few, Path("x"))) == set(few)
        for many in (
            {f"{i}": weight for i in range(40)},
            {f"{i}": weight[i:] for i in range(40)},
        ):
            with pytest.raises(EbmPriorError, match="views of far fewer weights"):
                plain_state(many, Path("x"))


def test_names_of_weights_can_be_printed():
    for key in ("a\nb", "a\x1b[2J", ("a", "b"), 3):
        with pytest.raises(EbmPriorError, match="is not a named tensor") as error:
            plain_state({key: torch.ones(1)}, Path("x"))
        assert str(error.value).isprintable()


def test_a_record_that_ends_early_mentions_nothing(tmp_path):
    path, buffer = tmp_path / "x.pt", io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr("archive/data.pkl", "needle" * 10)
    data = bytearray(buffer.getvalue())
    path.write_bytes(data)
    assert mentions(path, "needle")
    place = data.rfind(b"PK\x01\x02") + 20
    data[place : place + 8] = struct.pack("<II", 10**6, 10**6)
    path.write_bytes(data)
    assert not mentions(path, "needle")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        ("mine", "'mine'"),
        ([1, "x", None], "[1, 'x', None]"),
        ((3,), "(3,)"),
        (torch.Size([1, 2, 3, 4, 5]), "(1, 2, 3, 4, ...)"),
        ([[[[1]]], []], "[[[...]], []]"),
        (10**19, "10000000000000000000"),
        (1 << 20000, "a number of 20001 bits"),
        (Named("conv"), "Named(name='conv')"),
        ({"a": nest(20)}, "a dict"),
        ("a\n\x1b\u202e", r"'a\n\x1b\u202e'"),
    ],
    ids=range(10),
)
def test_values_are_shown_in_one_short_line(value, text):
    assert shown(value) == text


def test_nothing_shown_is_long():
    for value in (nest(20), "x" * 10**5, b"x" * 10**5, ["x" * 10**5] * 10**5, nest(60, tuple)):
        assert len(shown(value)) < 2000 and shown(value).isprintable()
    assert printable("a\nb\x1b[31m \ud800") == r"a\nb\x1b[31m \ud800"
