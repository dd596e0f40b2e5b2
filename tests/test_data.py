"""Data sets by name and by path, good and hostile ones."""

import io
import os
import struct
import subprocess
import sys
import types
import urllib.error
import warnings
import zipfile
import zlib

import numpy as np
import pytest
import torch
from PIL import Image

from ebm_prior import data, files, sources
from ebm_prior.data import known_names, load_images, to_float
from ebm_prior.errors import EbmPriorError
from ebm_prior.torchvision_compat import import_torchvision


@pytest.fixture(autouse=True)
def root(tmp_path_factory, monkeypatch):
    """No test sees or changes the user's own data folder."""
    folder = tmp_path_factory.mktemp("root")
    monkeypatch.setenv("EBM_PRIOR_DATA", str(folder))
    return folder


def pictures(n, shape=(3, 6, 5), seed=0):
    return np.random.RandomState(seed).randint(0, 256, (n, *shape), dtype=np.uint8)


def encode(pixels, form="PNG"):
    buffer = io.BytesIO()
    hwc = pixels.transpose(1, 2, 0)
    Image.fromarray(hwc[..., 0] if hwc.shape[2] == 1 else hwc).save(buffer, form)
    return buffer.getvalue()


def write(where, entries):
    """Write {name: bytes} into a folder, or into a zip if `where` ends in .zip."""
    if where.suffix == ".zip":
        with zipfile.ZipFile(where, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, content in entries.items():
                archive.writestr(name, content)
    else:
        for name, content in entries.items():
            (where / name).parent.mkdir(parents=True, exist_ok=True)
            (where / name).write_bytes(content)
    return where


def image_files(pixels, pattern="{:03d}.png"):
    return {pattern.format(i): encode(p) for i, p in enumerate(pixels)}


def fails(match, source, **options):
    with pytest.raises(EbmPriorError, match=match) as caught:
        load_images(source, **options)
    assert "\n" not in str(caught.value)


both = pytest.mark.parametrize("name", ["set", "set.zip"])


# names


def test_digits_are_scikit_learns_in_a_fixed_order():
    from sklearn.datasets import load_digits

    train, test = load_images("digits"), load_images("digits", split="test")
    assert train.images.shape == (1500, 1, 8, 8) and len(test) == 297
    assert train.images.dtype == torch.uint8 and train.labels.dtype == torch.int64
    assert (train.name, train.split, test.split) == ("digits", "train", "test")
    raw = load_digits()
    expected = {(np.round(i * 255 / 16).astype(np.uint8).tobytes(), t)
                for i, t in zip(raw.images, raw.target, strict=True)}  # fmt: skip
    found = {(i.numpy().tobytes(), int(t)) for s in (train, test)
             for i, t in zip(s.images, s.labels, strict=True)}  # fmt: skip
    assert found == expected
    assert np.bincount(test.labels).min() > 15  # shuffled
    # The split is part of published numbers: it must never move.
    assert test.labels[:12].tolist() == [4, 5, 6, 9, 4, 7, 8, 9, 6, 9, 9, 1]


def test_to_float_is_exact():
    levels = torch.arange(256, dtype=torch.uint8)
    assert to_float(levels).dtype == torch.float32
    assert torch.equal(to_float(levels), torch.arange(256).float() / 255)


def fake_torchvision(monkeypatch, class_name, make):
    monkeypatch.setattr(import_torchvision().datasets, class_name, make)


def test_torchvision_names(root, monkeypatch):
    hwc, grey = pictures(4, (7, 7, 3)), pictures(4, (7, 7))
    calls = []

    def make(**attributes):
        def build(*args, **options):
            calls.append((args, options))
            return types.SimpleNamespace(**attributes)

        return build

    fake_torchvision(monkeypatch, "CIFAR10", make(data=hwc, targets=[3, 1, 2, 0]))
    fake_torchvision(monkeypatch, "FashionMNIST", make(
        data=torch.from_numpy(grey), targets=torch.arange(4)))  # fmt: skip
    fake_torchvision(monkeypatch, "SVHN", make(
        data=hwc.transpose(0, 3, 1, 2), labels=np.arange(4)))  # fmt: skip
    cifar = load_images("CIFAR10", split="test")
    assert np.array_equal(cifar.images.numpy(), hwc.transpose(0, 3, 1, 2))
    assert cifar.labels.tolist() == [3, 1, 2, 0] and cifar.name == "cifar10"
    assert np.array_equal(load_images("Fashion-MNIST").images.numpy(), grey[:, None])
    assert np.array_equal(load_images("svhn", download=False).images.numpy(), cifar.images)
    assert calls == [
        ((str(root),), {"train": False, "download": True}),
        ((str(root),), {"train": True, "download": True}),
        ((str(root),), {"split": "train", "download": False}),
    ]


def test_a_failed_download_points_to_data(monkeypatch):
    def offline(*args, **options):
        raise urllib.error.URLError("no route\nto host")

    fake_torchvision(monkeypatch, "MNIST", offline)
    fails("could not get MNIST in .*no route.*pass a path with --data", "mnist")
    fails("could not get Omniglot", "omniglot", download=False)


def test_omniglot_columns_are_images(root):
    from scipy.io import savemat

    (root / "omniglot").mkdir()
    columns = np.random.RandomState(0).rand(784, 3)
    savemat(root / "omniglot" / "chardata.mat", {"data": columns, "testdata": columns[:, :2]})
    train = load_images("omniglot").images
    assert train.shape == (3, 1, 28, 28) and len(load_images("omniglot", split="test")) == 2
    expected = np.round(255 * columns.astype(np.float32)[:, 1].reshape(28, 28, order="F"))
    assert np.array_equal(train[1, 0].numpy(), expected)


def test_celeba_is_cropped_as_nvae_does(root, monkeypatch):
    # Red outside NVAE's crop, black inside: no red must be left.
    image = np.zeros((3, 218, 178), np.uint8)
    image[0] = 255
    image[:, 40:188, 15:163] = 0
    write(root / "celeba" / "img_align_celeba", {"1.jpg": encode(image)})
    fake_torchvision(monkeypatch, "CelebA", lambda *args, **options: types.SimpleNamespace(
        base_folder="celeba", filename=["1.jpg"]))  # fmt: skip
    for name in ("celeba", "celeba_64"):
        found = load_images(name).images
        assert found.shape == (1, 3, 64, 64) and not found.any()
    assert load_images("celeba", shape=(1, 32, 32), resize=True).images.shape == (1, 1, 32, 32)
    fails("3x218x178 but 3x32x32 is needed", "celeba", shape=(3, 32, 32))


def test_lsun_names_carry_a_size(root):
    fails(r"church_outdoor_val_lmdb is missing: fetch .*\.zip", "lsun_church_64", split="test")
    pytest.importorskip("lmdb")
    pixels = pictures(5, (3, 20, 30))
    entries = {f"{i:040x}".encode(): encode(p, "WEBP") for i, p in enumerate(pixels)}
    write_lmdb(root / "church_outdoor_train_lmdb", entries)
    assert load_images("lsun_church_16").images.shape == (5, 3, 16, 16)
    assert load_images("lsun_church", shape=(3, 20, 30)).images.shape == (5, 3, 20, 30)


def test_names_without_a_loader_say_what_to_pass(root):
    fails(r"ffhq cannot be fetched: pass --data .*train\.lmdb", "ffhq")
    write(root / "ffhq", image_files(pictures(10)))
    assert len(load_images("ffhq")) == 9


def test_unknown_sources(tmp_path):
    fails("no such file or folder: cifar11, nor a known name: .*cifar10.*ffhq", "cifar11")
    fails(r"no such file or folder: .*gone\.zip$", tmp_path / "gone.zip")
    (tmp_path / "a.tar").write_text("")
    fails(r"a\.tar is not a data set: give a folder", tmp_path / "a.tar")
    fails("unknown split 'dev'", "digits", split="dev")
    fails("limit must be", "digits", limit=0)
    assert {"digits", "mnist", "cifar10", "svhn", "celeba", "lsun_church"} <= set(known_names())


# folders and zips


@both
def test_a_tenth_is_held_out_where_nothing_says_otherwise(tmp_path, name):
    pixels = pictures(40)
    where = write(tmp_path / name, {
        **image_files(pixels), "notes.txt": b"", ".hidden.png": b"", "__MACOSX/._000.png": b""
    })  # fmt: skip
    train, test = load_images(where), load_images(where, split="test")
    assert (len(train), len(test), train.name, train.labels) == (36, 4, "set", None)
    found = [p.tobytes() for s in (train, test) for p in s.images.numpy()]
    assert sorted(found) == sorted(p.tobytes() for p in pixels)
    assert torch.equal(load_images(str(where)).images, train.images)
    places = [[p.tobytes() for p in pixels].index(p.numpy().tobytes()) for p in train.images]
    assert places == sorted(places)  # in the order of the names
    fails("no labels: use one sub-folder per class", where, labels=True)
    some = load_images(where, limit=5).images
    assert len(some) == 5 and torch.equal(some, load_images(where, limit=5).images)


@both
@pytest.mark.parametrize("wrapper", ["", "outer/"])
def test_train_and_test_folders_and_classes(tmp_path, name, wrapper):
    pixels = pictures(6)
    names = ["train/cat/0.png", "train/dog/1.png", "Val/dog/2.png", "train/emu/3.png",
             "Val/emu/4.png", "stray.png"]  # fmt: skip
    where = write(tmp_path / name, {
        wrapper + n: encode(p) for n, p in zip(names, pixels, strict=True)
    })  # fmt: skip
    train, test = load_images(where), load_images(where, split="test", labels=True)
    assert np.array_equal(train.images, pixels[[0, 1, 3]]) and train.labels.tolist() == [0, 1, 2]
    # "cat" is missing in the test part; the others keep their numbers.
    assert np.array_equal(test.images, pixels[[2, 4]]) and test.labels.tolist() == [1, 2]


@both
def test_a_lone_part(tmp_path, name):
    where = write(tmp_path / name, image_files(pictures(20), "train/{:02d}.png"))
    assert (len(load_images(where)), len(load_images(where, split="test"))) == (18, 2)
    (tmp_path / "other").mkdir()
    where = write(tmp_path / "other" / name, image_files(pictures(20), "test/{:02d}.png"))
    assert len(load_images(where, split="test")) == 20
    fails("has a folder test but none called train", where)


@both
def test_classes_are_the_folders(tmp_path, name):
    entries = image_files(pictures(10), "b/{}.png") | image_files(pictures(10), "a/{}.png")
    found = load_images(write(tmp_path / name, entries))
    assert sorted(set(found.labels.tolist())) == [0, 1] and len(found) == 18
    assert torch.equal(found.labels, found.labels.sort().values)


@both
def test_formats_and_modes(tmp_path, name):
    entries = {
        f"{i}.{form}": encode(p, form)
        for i, (p, form) in enumerate(
            zip(pictures(6), ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"], strict=True)
        )
    }
    buffer = io.BytesIO()
    Image.new("RGBA", (5, 6), (1, 2, 3, 128)).save(buffer, "PNG")
    where = write(tmp_path / name, {"train/x.png": buffer.getvalue()} | {
        f"test/{key}": content for key, content in entries.items()
    })  # fmt: skip
    assert load_images(where, split="test").images.shape == (6, 3, 6, 5)
    assert load_images(where).images[0, :, 0, 0].tolist() == [1, 2, 3]


@both
def test_an_empty_source(tmp_path, name):
    where = write(tmp_path / name, {"notes.txt": b""})
    fails("no images in .*set.*: looked for .*png", where)
    (tmp_path / "one").mkdir()
    where = write(tmp_path / "one" / name, image_files(pictures(1)))
    assert len(load_images(where)) == 1
    fails("has no test images", where, split="test")


@both
def test_a_damaged_image_is_named(tmp_path, name):
    entries = image_files(pictures(8))
    whole = encode(pictures(1, (3, 40, 40))[0])
    for damage in (b"", b"hello", whole[: len(whole) // 2]):
        where = write(tmp_path / name, entries | {"005.png": damage})
        fails(r"005\.png is not a readable image; replace or remove it", where)


@both
def test_sizes_and_colours_must_fit_unless_resize(tmp_path, name):
    entries = image_files(pictures(8))
    where = write(tmp_path / name, entries)
    fails(r"000\.png is 3x6x5 but 3x8x8 is needed; pass --resize", where, shape=(3, 8, 8))
    fails("is 3x6x5 but 1x6x5 is needed", where, shape=(1, 6, 5))
    for shape in [(3, 8, 8), (1, 4, 8), (1, 6, 5)]:
        found = load_images(where, shape=shape, resize=True)
        assert tuple(found.images.shape[1:]) == shape
    grey = {"007.png": encode(pictures(1, (1, 9, 9))[0])}
    where = write(tmp_path / name, entries | grey)
    fails(r"007\.png is 1x9x9 but 000\.png is 3x6x5; pass --resize", where)
    assert load_images(where, shape=[3, 4, 4], resize=True).images.shape[1:] == (3, 4, 4)


def test_resize_crops_the_centre_and_averages(tmp_path):
    image = np.zeros((1, 8, 16), np.uint8)
    image[0, :, 4:8], image[0, :, :4] = 200, 99
    where = write(tmp_path / "set", {"0.png": encode(image), "1.png": encode(image)})
    found = load_images(where, shape=(1, 8, 8), resize=True).images[0, 0]
    assert found[0].tolist() == [200] * 4 + [0] * 4
    checks = np.indices((1, 64, 64)).sum(0).astype(np.uint8) % 2 * 255
    where = write(tmp_path / "checks", {"0.png": encode(checks), "1.png": encode(checks)})
    small = load_images(where, shape=(1, 8, 8), resize=True).images
    assert ((small > 115) & (small < 140)).all()  # without antialiasing: 0 or 255


def test_sixteen_bits_are_refused(tmp_path):
    (tmp_path / "set").mkdir()
    for i in range(2):
        Image.fromarray(np.full((4, 4), 999, np.uint16)).save(tmp_path / "set" / f"{i}.png")
    fails("more than 8 bits per channel", tmp_path / "set")


def test_links_to_folders_are_not_followed(tmp_path):
    write(tmp_path / "set", image_files(pictures(10)))
    write(tmp_path / "elsewhere", image_files(pictures(10)))
    (tmp_path / "set" / "loop").symlink_to(tmp_path / "set")
    (tmp_path / "set" / "away").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "broken.png").symlink_to(tmp_path / "gone.png")
    os.mkfifo(tmp_path / "set" / "pipe.png")  # opening it would wait for ever
    assert len(load_images(tmp_path / "set")) == 9


# hostile files


@pytest.mark.parametrize("name", ["../a.png", "/a.png", "a/../../b.png", "C:/a.png", "..\\a.png"])
def test_a_zip_that_points_outside(tmp_path, name):
    where = write(tmp_path / "set.zip", image_files(pictures(4)) | {name: b""})
    fails("is unsafe: .* points outside the archive", where)


def test_a_zip_with_a_link(tmp_path):
    where = tmp_path / "set.zip"
    info = zipfile.ZipInfo("a.png")
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(where, "w") as archive:
        archive.writestr(info, "/etc/passwd")
    fails("is unsafe: 'a.png' is a link", where)


def test_zip_bombs(tmp_path):
    where = write(tmp_path / "set.zip", {"a.png": bytes(2**24)})
    fails("'a.png' expands too much", where)
    fails(
        "expands too much", write_npz(tmp_path / "a.npz", images=np.zeros((2**16, 16, 16), "u1"))
    )
    # Many names for the same compressed bytes: each is harmless, all together are not.
    content = zlib.compress(bytes(2**20))
    with zipfile.ZipFile(where, "w") as archive:
        archive.writestr("a.bmp", bytes(2**20), zipfile.ZIP_DEFLATED)
        first = archive.infolist()[0]
        for i in range(50):
            twin = zipfile.ZipInfo(f"{i}.bmp")
            for field in ("header_offset", "CRC", "compress_size", "file_size", "compress_type"):
                setattr(twin, field, getattr(first, field))
            archive.filelist.append(twin)
            archive._didModify = True
    assert where.stat().st_size < 2**14 + len(content)
    fails("expand too much together", where)


def test_a_declared_size_is_not_exceeded(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "MAX_FILE", 1000)
    entries = {f"{i}.bmp": encode(pictures(1, (3, 64, 64))[0], "BMP") for i in range(3)}
    for name in ("set", "set.zip"):
        fails("bmp exceeds", write(tmp_path / name, entries))


@pytest.mark.parametrize("side", [9_000, 40_000])
def test_pixel_bombs(tmp_path, side):
    def chunk(kind, content):
        crc = zlib.crc32(kind + content)
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)

    bomb = b"\x89PNG\r\n\x1a\n" + chunk(
        b"IHDR", struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    )
    bomb += chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")
    where = write(tmp_path / "set.zip", {"0.png": bomb, "1.png": bomb})
    fails("more than 67108864 pixels", where)


def test_zips_that_are_none(tmp_path):
    (tmp_path / "a.zip").write_bytes(b"PK\x03\x04 and then nothing")
    fails("a.zip is not a readable zip file", tmp_path / "a.zip")
    whole = write(tmp_path / "b.zip", image_files(pictures(20, (3, 32, 32)))).read_bytes()
    (tmp_path / "a.zip").write_bytes(whole[: len(whole) // 2])
    fails("a.zip is not a readable zip file", tmp_path / "a.zip")
    damaged = bytearray(whole)
    damaged[100:2000] = bytes(1900)
    (tmp_path / "a.zip").write_bytes(damaged)
    fails("a.zip: cannot read 000.png", tmp_path / "a.zip")
    locked = bytearray(whole)
    for at in [i for i in range(len(whole)) if whole[i : i + 4] == b"PK\x01\x02"]:
        locked[at + 8] |= 1
    (tmp_path / "a.zip").write_bytes(locked)
    fails(r"cannot read .*encrypted", tmp_path / "a.zip")


def test_a_postscript_file_never_reaches_its_interpreter(tmp_path):
    postscript = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n%%EOF\n"
    where = write(tmp_path / "set", {"0.png": postscript, "1.png": postscript})
    fails("not a readable image", where)


# npz


def write_npz(path, **arrays):
    np.savez_compressed(path, **arrays)
    return path


def test_chosen_classes(tmp_path):
    x, y = pictures(30, (7, 6)), np.arange(30) % 5
    where = write_npz(tmp_path / "a.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:])
    found = load_images(f"{where}:1,3")
    assert found.labels.tolist() == [1, 3] * 4 and found.name == "a"
    assert np.array_equal(found.images[:, 0], x[:20][np.isin(y[:20], [1, 3])])
    assert load_images(f"{where}:3,1", limit=3).labels.max() <= 3
    digits = load_images("digits:0,1", split="test").labels
    assert set(digits.tolist()) == {0, 1}
    fails("no train images of class 7", f"{where}:1,7")
    fails("a.npz:1 needs labels", f"{where}:1", split="test")
    fails("no such file or folder: .*b.npz", f"{tmp_path / 'b.npz'}:1")
    write_npz(tmp_path / "c.npz", x_train=x).rename(tmp_path / "c:1")  # a file is what it is
    fails("c:1", tmp_path / "c:1")


def test_npz_parts(tmp_path):
    x, y = pictures(30, (7, 6)), np.arange(30)
    where = write_npz(tmp_path / "a.npz", x_train=x[:20], y_train=y[:20], x_test=x[20:])
    train = load_images(where)
    assert np.array_equal(train.images, x[:20, None]) and train.labels.tolist() == y[:20].tolist()
    assert np.array_equal(load_images(where, split="test").images, x[20:, None])
    fails("no labels.*y_test in an .npz", where, split="test", labels=True)
    where = write_npz(tmp_path / "b.npz", x_test=x)
    assert len(load_images(where, split="test")) == 30
    fails("holds x_test but no x_train; use its test split", where)
    where = write_npz(tmp_path / "c.npz", x_train=x, y_train=y)
    test = load_images(where, split="test")
    assert len(test) == 3 and len(load_images(where)) == 27
    assert np.array_equal(test.images[:, 0], x[test.labels])


@pytest.mark.parametrize("key", ["images", "x", "arr_0"])
@pytest.mark.parametrize("c", [1, 3])
def test_npz_layouts(tmp_path, key, c):
    x = pictures(10, (c, 8, 6))
    chw = load_images(write_npz(tmp_path / "a.npz", **{key: x})).images
    hwc = load_images(write_npz(tmp_path / "b.npz", **{key: x.transpose(0, 2, 3, 1)})).images
    for kind in ("f2", "f4", "f8"):
        floats = (x / 255.0).astype(kind)
        assert torch.equal(load_images(write_npz(tmp_path / "c.npz", **{key: floats})).images, chw)
    assert chw.shape == (9, c, 8, 6) and torch.equal(chw, hwc)


def test_npz_of_the_wrong_kind(tmp_path):
    def refused(match, **arrays):
        fails(match, write_npz(tmp_path / "a.npz", **arrays))

    x = pictures(10, (8, 8))
    refused("holds none of x_train, .*; it holds latents", latents=x)
    refused("it holds nothing")
    refused("has no train images", images=x[:0])
    refused("images is int64; save uint8", images=x.astype(np.int64))
    refused(r"floats outside \[0, 1\]", images=x.astype(np.float32))
    refused(r"floats outside \[0, 1\]", images=np.full((9, 8, 8), np.nan))
    refused(r"has shape \(10, 64\); it must be", images=x.reshape(10, 64))
    refused(r"has shape \(10, 8, 4, 2\)", images=x.reshape(10, 8, 4, 2))
    refused("labels must be 10 whole numbers", images=x, labels=np.arange(9))
    refused("labels must be 10 whole numbers", images=x, labels=np.ones(10))
    refused("cannot read images .*pickle", images=np.array([{}, None], dtype=object))
    (tmp_path / "a.npz").write_bytes(b"not a zip")
    fails("a.npz is not a readable zip", tmp_path / "a.npz")
    where = write(tmp_path / "b.zip", {"images": b"no array"}).rename(tmp_path / "b.npz")
    fails("cannot read images .it is no array", where)


def test_an_array_that_claims_to_be_huge(tmp_path):
    header = io.BytesIO()
    np.lib.format.write_array_header_1_0(
        header, {"descr": "|u1", "fortran_order": False, "shape": (10**13, 8, 8)}
    )
    where = write(tmp_path / "a.zip", {"images.npy": header.getvalue()})
    fails("cannot read images", where.rename(tmp_path / "a.npz"))


def test_arrays_are_resized_on_request(tmp_path):
    where = write_npz(tmp_path / "a.npz", x_train=pictures(9, (4, 4)))
    fails("a: image 0 is 1x4x4 but 3x8x8 is needed; pass --resize", where, shape=(3, 8, 8))
    found = load_images(where, shape=(3, 8, 8), resize=True).images
    assert found.shape == (8, 3, 8, 8) and torch.equal(found[:, 0], found[:, 2])


# LMDB


def write_lmdb(path, entries):
    import lmdb

    path.mkdir(parents=True)
    with lmdb.open(str(path), map_size=2**24) as env, env.begin(write=True) as transaction:
        for key, value in entries.items():
            transaction.put(key, value)
    return path


@pytest.mark.parametrize("form", ["raw", "PNG"])
def test_nvaes_lmdb(tmp_path, form):
    pytest.importorskip("lmdb")
    pixels = pictures(12, (3, 8, 8))
    values = [p.transpose(1, 2, 0).tobytes() if form == "raw" else encode(p, form) for p in pixels]
    entries = {str(i).encode(): value for i, value in enumerate(values)}
    write_lmdb(tmp_path / "set" / "train.lmdb", entries | {b"length": b"12"})
    write_lmdb(tmp_path / "set" / "validation.lmdb", {b"0": values[3]})
    before = os.listdir(tmp_path / "set" / "train.lmdb")
    train = load_images(tmp_path / "set")
    assert np.array_equal(train.images, pixels)  # 2 before 10
    assert np.array_equal(load_images(tmp_path / "set", split="test").images, pixels[3:4])
    lone = tmp_path / "set" / "train.lmdb"
    assert (len(load_images(lone)), len(load_images(lone, split="test"))) == (11, 1)
    assert os.listdir(lone) == before  # nothing was written, no lock file either


def test_bad_lmdbs(tmp_path):
    pytest.importorskip("lmdb")
    text = write_lmdb(tmp_path / "a", {str(i).encode(): b"some words" for i in range(9)})
    fails("key 0 is neither an encoded image nor .* raw one", text)
    fails("has no train images", write_lmdb(tmp_path / "b", {}))
    pixels = pictures(40, (3, 32, 32))
    whole = write_lmdb(tmp_path / "c", {str(i).encode(): encode(p) for i, p in enumerate(pixels)})
    with open(whole / "data.mdb", "r+b") as file:
        file.truncate(60_000)
    fails("data.mdb is cut short", whole)
    (whole / "data.mdb").write_bytes(b"hello" * 5000)
    fails("is not a readable LMDB", whole)


def test_lmdb_missing(tmp_path, monkeypatch):
    write(tmp_path, {"data.mdb": b""})
    monkeypatch.setitem(sys.modules, "lmdb", None)
    fails(r"pip install 'ebm-prior\[lmdb\]'", tmp_path)


# the cache


@pytest.fixture
def big_set(tmp_path, monkeypatch):
    """Twelve images that count as many; returns the path and the names decoded so far."""
    monkeypatch.setattr(data, "CACHE_FROM", 5)
    monkeypatch.setattr(data, "CHUNK", 4)
    decoded, decode = [], sources._decode
    monkeypatch.setattr(
        sources, "_decode", lambda content, what: decoded.append(what) or decode(content, what)
    )
    return write(tmp_path / "set.zip", image_files(pictures(12))), decoded


@pytest.mark.parametrize("folder", [False, True])
def test_large_sets_are_decoded_once(big_set, root, folder):
    where, decoded = big_set
    if folder:
        where = write(where.with_suffix(""), image_files(pictures(12)))
    first = load_images(where).images
    count = len(decoded)
    assert len(os.listdir(root / "decoded")) == 1 and count >= 11
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        second = load_images(where).images
        second[0] += 1  # a private copy: the file stays as it is
    assert len(decoded) <= count + 1 and torch.equal(load_images(where).images, first)
    assert load_images(where, shape=(1, 4, 4), resize=True).images.shape == (11, 1, 4, 4)
    assert len(os.listdir(root / "decoded")) == 2
    os.utime(where / "003.png" if folder else where, ns=(0, 0))  # changed: decoded anew
    count = len(decoded)
    load_images(where)
    assert len(decoded) > count + 5


def test_a_damaged_cache_is_written_anew(big_set, root):
    where, _ = big_set
    first = load_images(where).images.clone()
    (cache,) = (root / "decoded").iterdir()
    cache.write_bytes(cache.read_bytes()[:200])
    assert torch.equal(load_images(where).images, first)


def test_an_unwritable_cache_only_warns(big_set, root, monkeypatch):
    where, _ = big_set
    expected = load_images(where).images.clone()

    def check():
        with pytest.warns(UserWarning, match="decoded images are not kept"):
            assert torch.equal(load_images(where).images, expected)

    (cache,) = (root / "decoded").iterdir()
    cache.unlink()
    with monkeypatch.context() as patch:
        patch.setattr(files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(28, "full")))
        check()
    assert not os.listdir(root / "decoded")
    with monkeypatch.context() as patch:
        patch.setattr(data.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=10))
        check()
    (root / "decoded").rmdir()
    (root / "decoded").write_text("in the way")
    check()


def test_a_damaged_image_leaves_no_cache(big_set, root):
    where, _ = big_set
    write(where, image_files(pictures(12)) | {"011.png": b""})
    fails("011.png is not a readable image", where)
    assert not os.listdir(root / "decoded")


# torchvision


def test_torchvision_and_pytorch_fid_import():
    code = (
        "import sys, ebm_prior.data; assert 'torchvision' not in sys.modules; "
        "from ebm_prior.torchvision_compat import import_torchvision as get; "
        "assert get() is get(); import torchvision.datasets, torchvision.models; "
        "import pytorch_fid.inception, pytorch_fid.fid_score"
    )
    subprocess.run([sys.executable, "-W", "error::RuntimeWarning", "-c", code], check=True)


def test_other_import_failures_are_not_hidden(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(ImportError):
        import_torchvision()


def test_no_split_is_all_of_a_source_without_parts(tmp_path):
    x = np.arange(40, dtype=np.uint8)[:, None, None] * np.ones((1, 4, 4), np.uint8)
    np.savez(tmp_path / "whole.npz", images=x)
    np.savez(tmp_path / "parts.npz", x_train=x[:30], x_test=x[30:])
    np.savez(tmp_path / "train.npz", x_train=x[:30])
    for i in range(40):
        for folder in ("flat", "deep/test" if i < 10 else "deep/train"):
            (tmp_path / folder).mkdir(parents=True, exist_ok=True)
            Image.fromarray(x[i]).save(tmp_path / folder / f"{i:02}.png")
    counts = {"whole.npz": 40, "flat": 40, "parts.npz": 10, "deep": 10, "train.npz": 30}
    for name, count in counts.items():
        assert len(load_images(tmp_path / name, split=None)) == count
    assert len(load_images("digits", split=None)) == 297
