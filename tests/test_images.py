"""Pictures and sample files, and the atomic writes under them."""

import errno
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_prior import files
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import CannotWriteError, atomic_write, check_writable, write_json
from ebm_prior.images import ImageWriter, grid, labelled_rows, save_png, side_by_side, to_uint8


def pictures(n=5, c=3, h=6, w=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (n, c, h, w), generator=g, dtype=torch.uint8)


def read_png(path):
    pixels = np.array(Image.open(path))
    return torch.from_numpy(pixels.reshape(*pixels.shape[:2], -1)).permute(2, 0, 1)


def full_disk(*args):
    raise OSError(errno.ENOSPC, "No space left on device")


# files


def test_a_file_is_replaced_only_on_success(tmp_path):
    path = tmp_path / "new folder" / "a.json"
    write_json(path, {"x": [1, "é"]})
    assert path.read_text(encoding="utf-8") == '{\n  "x": [\n    1,\n    "é"\n  ]\n}\n'
    for error in (KeyError, KeyboardInterrupt, FileNotFoundError):
        with pytest.raises(error), atomic_write(path) as file:
            file.write(b"half")
            raise error("other")
    assert path.read_bytes().startswith(b"{") and os.listdir(path.parent) == ["a.json"]


def test_a_full_disk_is_one_line_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(CannotWriteError, match="disk full while writing .*free some space"):
        write_json(tmp_path / "a.json", {})
    assert not os.listdir(tmp_path)


def test_a_new_file_has_the_usual_permissions(tmp_path):
    (tmp_path / "plain").write_text("")
    write_json(tmp_path / "ours", {})
    assert (tmp_path / "ours").stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_what_cannot_be_written_is_one_line(tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "a", tmp_path, tmp_path / ("x" * 300), "/dev/null"):
        with pytest.raises(CannotWriteError, match="cannot write"):
            write_json(path, {})
    with pytest.raises(CannotWriteError, match="cannot write"):
        check_writable(tmp_path / "file" / "a")
    assert os.listdir(tmp_path) == ["file"]


# pictures


def test_to_uint8_rounds_and_checks():
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 255), levels.to(torch.uint8))
    assert torch.equal(to_uint8(levels[:-1].double() / 255 + 0.0019), levels[:-1].byte())
    assert to_uint8(torch.tensor([-1e-4, 1.0001])).tolist() == [0, 255]
    for bad in ([7.0], [-0.1], [float("nan")], [float("inf")]):
        with pytest.raises(EbmPriorError, match=r"in \[0, 1\]"):
            to_uint8(torch.tensor(bad))
    with pytest.raises(EbmPriorError, match="int64"):
        to_uint8(levels)


def test_grid_places_every_image():
    x = pictures(5)
    picture = grid(x, columns=3, padding=1, scale=1)
    assert picture.shape == (3, 2 * 7 + 1, 3 * 9 + 1)
    for i in range(5):
        top, left = 1 + (i // 3) * 7, 1 + (i % 3) * 9
        assert torch.equal(picture[:, top : top + 6, left : left + 8], x[i])
    assert (picture[:, 8:, 19:] == 255).all()  # no sixth image
    assert (picture[:, 0] == 255).all() and (picture[:, :, 0] == 255).all()


def test_grid_enlarges_small_images_by_a_whole_factor():
    x = pictures(4, 1, 8, 8)
    picture = grid(x)
    assert picture.shape == (1, 2 * 130 + 2, 2 * 130 + 2)
    assert picture[0, 2:18, 2:18].unique().tolist() == [x[0, 0, 0, 0]]
    assert grid(pictures(1, 3, 256, 512)).shape == (3, 260, 516)
    with pytest.raises(EbmPriorError, match="grid needs images"):
        grid(x[:0])


def test_labelled_rows_are_as_wide_as_the_widest():
    label = "a label much longer than its single small image would be wide " * 2
    picture = labelled_rows([("before", pictures(40, 1, 28, 28)), (label, pictures(2, 3, 28, 28))])
    assert picture.dtype == torch.uint8 and picture.shape[0] == 3
    assert picture.shape[2] >= 40 * 30
    assert (picture[:, :24] < 128).any()  # a label was drawn above the first row
    wrapped = labelled_rows([("one", pictures(7)), ("two", pictures(7))], columns=4)
    assert wrapped.shape[2] > 500


def test_save_png_round_trip(tmp_path):
    for c in (1, 3):
        x = pictures(1, c)[0]
        save_png(tmp_path / "samples" / "a.png", x)
        assert torch.equal(read_png(tmp_path / "samples" / "a.png"), x)
    with pytest.raises(EbmPriorError, match="1 or 3 channels"):
        save_png(tmp_path / "b.png", pictures(1, 2)[0])


# ImageWriter


def written(path):
    """Images in an output of any form but the grid, (N, C, H, W)."""
    if path.suffix == ".npz":
        return torch.from_numpy(np.load(path)["images"]).permute(0, 3, 1, 2)
    if path.suffix == ".zip":
        with zipfile.ZipFile(path) as archive:
            assert all(i.compress_type == zipfile.ZIP_STORED for i in archive.infolist())
            return torch.stack([read_png(archive.open(n)) for n in archive.namelist()])
    return torch.stack([read_png(p) for p in sorted(path.iterdir())])


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("name", ["a.zip", "a.npz", "folder"])
def test_images_come_back(tmp_path, name, channels):
    x = pictures(7, channels)
    with ImageWriter(tmp_path / name, count=7, seeds=range(3, 10)) as writer:
        writer.add(x[:4])
        writer.add(x[4:].double() / 255)
    assert os.listdir(tmp_path) == [name]
    assert torch.equal(written(tmp_path / name), x)
    if name == "a.npz":
        assert np.load(tmp_path / name)["seeds"].tolist() == list(range(3, 10))


def test_png_is_one_grid(tmp_path):
    x = pictures(7)
    with ImageWriter(tmp_path / "a.PNG", count=7) as writer:
        for part in x.split(3):
            writer.add(part)
    assert torch.equal(read_png(tmp_path / "a.PNG"), grid(x))


@pytest.mark.parametrize("name", ["a.zip", "a.npz", "a.png"])
def test_a_failure_leaves_the_old_file(tmp_path, name, monkeypatch):
    path = tmp_path / name
    path.write_text("old")

    def attempt(error=None, count=9):
        with ImageWriter(path, count=count) as writer:
            writer.add(pictures())
            if error:
                raise error
        return writer

    with pytest.raises(KeyboardInterrupt):
        attempt(KeyboardInterrupt())
    with pytest.raises(ValueError, match="expected 9 images, got 5"):
        attempt()
    monkeypatch.setattr(files.os, "fsync", full_disk)
    with pytest.raises(EbmPriorError, match="disk full"):
        attempt(count=5)
    assert os.listdir(tmp_path) == [name] and path.read_text() == "old"


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
@pytest.mark.parametrize("name", ["a.zip", "a.npz"])
def test_a_disk_that_fills_up_while_writing(tmp_path, name, monkeypatch):
    def full(path, temp):
        temp.touch()
        return open("/dev/full", "wb")

    writer = ImageWriter(tmp_path / name, count=300)
    monkeypatch.setattr(files, "_open", full)
    with pytest.raises(EbmPriorError, match="disk full"), writer:
        for _ in range(3):
            writer.add(pictures(100))
    assert not os.listdir(tmp_path)


def test_a_folder_with_pictures_is_never_touched(tmp_path):
    out = tmp_path / "samples.v2"
    out.mkdir()  # an existing folder may have a suffix
    with ImageWriter(out, count=3) as writer:
        writer.add(pictures(3, seed=3))
    with pytest.raises(EbmPriorError, match=r"\.png: choose an empty or new folder"):
        ImageWriter(out, count=1)
    assert torch.equal(written(out), pictures(3, seed=3))


def test_bad_outputs_are_refused_before_sampling(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(EbmPriorError, match=r"\.png .*\.zip .*\.npz.* folder"):
        ImageWriter(tmp_path / "a.jpg", count=1)
    with pytest.raises(EbmPriorError, match="cannot write"):
        ImageWriter(tmp_path / "file" / "a.zip", count=1)
    with pytest.raises(EbmPriorError, match="cannot write"):
        ImageWriter(tmp_path / "file", count=1)
    with pytest.raises(EbmPriorError, match="too many for one grid"):
        ImageWriter(tmp_path / "a.png", count=50_000)


@pytest.mark.skipif(sys.platform == "win32" or os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_folder_is_refused_before_sampling(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(EbmPriorError, match="cannot write .*Permission denied"):
        ImageWriter(tmp_path / "a.zip", count=1)


def test_pictures_stand_side_by_side():
    tall, wide = torch.zeros(3, 4, 2, dtype=torch.uint8), torch.ones(3, 2, 5, dtype=torch.uint8)
    picture = side_by_side([tall, wide], gap=3)
    assert picture.shape == (3, 4, 10) and picture.dtype == torch.uint8
    assert torch.equal(picture[..., :2], tall) and torch.equal(picture[:, :2, 5:], wide)
    assert (picture[..., 2:5] == 255).all() and (picture[:, 2:, 5:] == 255).all()
