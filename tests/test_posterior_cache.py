import errno
import json
import os
import signal

import pytest
import torch

from backbones.toy import ToyBackbone
from ebm_prior import EbmPriorError, EnergyPrior
from ebm_prior import posterior_cache as module
from ebm_prior.posterior_cache import PosteriorCache, PosteriorStream, row_size

N, SEED = 25, 3


class StoppedError(Exception):
    """What `on_chunk` raises."""


def stop_after(chunks):
    """An `on_chunk` that lets so many chunks pass."""
    left = [chunks]

    def on_chunk():
        left[0] -= 1
        if not left[0]:
            raise StoppedError

    return on_chunk


def stream_of(backbone, images, kind="both", draws=10):
    return PosteriorStream(EnergyPrior.for_backbone(backbone, kind, nef=4, ndf=6), images, draws)


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(module, "ENCODE_BATCH", 10)  # of 250 rows; every 20th is recorded


@pytest.fixture
def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randint(256, (N, 1, 4, 4), generator=generator).to(torch.uint8)


@pytest.fixture
def path(tmp_path):
    return tmp_path / "state" / "posterior.npy"


@pytest.fixture
def half(toy, images, path):
    """A cache whose first 200 rows are recorded; its stream."""
    stream = stream_of(toy, images)
    with pytest.raises(StoppedError):
        PosteriorCache(stream, path, SEED, stop_after(22))
    assert json.loads(path.with_suffix(".json").read_text())["done"] == 200
    return stream


@pytest.fixture
def whole(toy, images, tmp_path):
    """All rows, encoded without an interruption."""
    return PosteriorCache(stream_of(toy, images), tmp_path / "whole.npy", SEED).rows.copy()


def encoded(monkeypatch):
    """Rows that are encoded from now on, as a growing list."""
    rows, call = [], PosteriorStream.__call__

    def counted(self, index, generator):
        rows.extend(index.tolist())
        return call(self, index, generator)

    monkeypatch.setattr(PosteriorStream, "__call__", counted)
    return rows


def test_a_half_filled_cache_goes_on(toy, images, path, half, whole, monkeypatch):
    rows = encoded(monkeypatch)
    again = PosteriorCache(stream_of(toy, images), path, SEED)
    assert rows == list(range(200, 250)) and (again.rows == whole).all()
    assert len({row.tobytes() for row in again.rows}) == 250
    rows.clear()
    assert (PosteriorCache(half, path, SEED).rows == whole).all() and not rows


def test_every_row_is_what_the_stream_draws(toy, images, whole):
    stream = stream_of(toy, images)
    index = torch.arange(30, 40)
    generator = torch.Generator().manual_seed(SEED * 1_000_003 + 30)
    inputs = torch.cat([t.flatten(1) for t in stream(index, generator)], 1)
    assert (torch.from_numpy(whole[30:40]) == inputs.float()).all()


@pytest.mark.parametrize(
    "change, what",
    [
        (lambda toy, x: (stream_of(ToyBackbone(seed=1).double(), x), SEED), "another backbone"),
        (lambda toy, x: (stream_of(toy, x.flip(0)), SEED), "another data set"),
        (lambda toy, x: (stream_of(toy, x[:-1]), SEED), "another data set"),
        (lambda toy, x: (stream_of(toy, x, "joint"), SEED), "other head inputs"),
        (lambda toy, x: (stream_of(toy, x, draws=9), SEED), "another number of draws"),
        (lambda toy, x: (stream_of(toy, x), SEED + 1), "another seed"),
        (
            lambda toy, x: (stream_of(ToyBackbone(seed=1).double(), 255 - x), SEED),
            "another backbone and another data set",
        ),
    ],
)
def test_a_cache_of_something_else_is_refused(toy, images, path, half, change, what):
    before = path.read_bytes(), path.with_suffix(".json").read_bytes()
    stream, seed = change(toy, images)
    with pytest.raises(EbmPriorError) as error:
        PosteriorCache(stream, path, seed)
    assert f"{path} holds posterior samples of {what}; go on with" in str(error.value)
    assert "or delete this file" in str(error.value)
    assert before == (path.read_bytes(), path.with_suffix(".json").read_bytes())
    path.unlink()  # as it says
    assert len(PosteriorCache(stream, path, seed)) == len(stream)


def test_a_backbone_without_a_checkpoint_is_known_by_its_weights(toy, images, path):
    toy.sha256 = ""
    PosteriorCache(stream_of(toy, images), path, SEED)
    PosteriorCache(stream_of(toy, images), path, SEED)
    toy.a += 1e-6
    with pytest.raises(EbmPriorError, match="of another backbone;"):
        PosteriorCache(stream_of(toy, images), path, SEED)


def test_a_cache_of_an_earlier_version_is_made_again(toy, images, path, half, whole, capsys):
    shape = [250, row_size(half.prior)]
    path.write_bytes(bytes(4 * shape[0] * shape[1]))
    old = {"shape": shape, "seed": SEED, "done": 250}
    path.with_suffix(".json").write_text(json.dumps(old))
    capsys.readouterr()
    assert (PosteriorCache(half, path, SEED).rows == whole).all()
    (line,) = [x for x in capsys.readouterr().err.splitlines() if "earlier version" in x]
    assert str(path) in line and "drawn again" in line


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[:20],
        lambda text: b"\xff\xfe" + text,
        lambda text: b"[]",
        lambda text: text.replace(b'"done": 200', b'"done": "200"'),
        lambda text: text.replace(b'"done": 200', b'"done": -200'),
        lambda text: text.replace(b'"done"', b'"gone"'),
        lambda text: text.replace(b'"made_of": {', b'"made_of": [], "other": {'),
    ],
)
def test_a_damaged_record_is_none(path, half, whole, capsys, spoil):
    record = path.with_suffix(".json")
    record.write_bytes(spoil(record.read_bytes()))
    path.write_bytes(bytes(path.stat().st_size))
    assert (PosteriorCache(half, path, SEED).rows == whole).all()
    assert f"{path}: a damaged file" in capsys.readouterr().err


def test_a_file_that_lost_rows_is_made_again(path, half, whole):
    os.truncate(path, 1000)
    assert (PosteriorCache(half, path, SEED).rows == whole).all()


def test_a_record_never_speaks_of_another_array(path, half):
    path.unlink()
    with pytest.raises(StoppedError):
        PosteriorCache(half, path, SEED, stop_after(5))
    assert path.exists() and not path.with_suffix(".json").exists()


def test_the_size_is_said_before_anything_is_encoded(toy, images, path, monkeypatch, capsys):
    def stop(*_, keep):
        raise StoppedError

    monkeypatch.setattr(module, "row_size", lambda prior: 307 * 2**20)
    monkeypatch.setattr(module, "_reserve", stop)
    with pytest.raises(StoppedError):
        PosteriorCache(stream_of(toy, images, draws=50), path, SEED)
    line = f"encoding 25 images, 50 times each: 1499.0 GiB of posterior samples at {path}\n"
    assert capsys.readouterr().err == line


def fails_with(code):
    def fallocate(*_):
        raise OSError(code, os.strerror(code))

    return fallocate


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL])
def test_file_systems_that_cannot_reserve_are_written_all_the_same(
    toy, images, path, whole, monkeypatch, code
):
    monkeypatch.setattr(os, "posix_fallocate", fails_with(code), raising=False)
    cache = PosteriorCache(stream_of(toy, images), path, SEED)
    assert (cache.rows == whole).all() and path.stat().st_size == whole.nbytes


def test_a_full_disk_shows_before_anything_is_encoded(toy, images, path, monkeypatch):
    rows = encoded(monkeypatch)
    monkeypatch.setattr(os, "posix_fallocate", fails_with(errno.ENOSPC), raising=False)
    with pytest.raises(EbmPriorError, match=r"cannot reserve 1 MiB .* \(No space .*lower --cache"):
        PosteriorCache(stream_of(toy, images), path, SEED)
    assert not rows and not path.exists()


@pytest.mark.skipif(not hasattr(os, "posix_fallocate"), reason="this system cannot reserve")
def test_what_is_missing_of_a_copy_is_reserved_too(path, half, whole, monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(os, "posix_fallocate", fails_with(errno.ENOSPC))
        with pytest.raises(EbmPriorError, match="cannot reserve"):
            PosteriorCache(half, path, SEED)
    rows = encoded(monkeypatch)
    assert (PosteriorCache(half, path, SEED).rows == whole).all()
    assert rows == list(range(200, 250))  # the others were kept


def test_a_write_that_fails_costs_one_line_and_no_rows(path, half, whole, monkeypatch):
    resource = pytest.importorskip("resource")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    allowed = whole[:235].nbytes  # ends within a chunk
    monkeypatch.setattr(module, "_reserve", lambda *_, keep: None)
    before = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (allowed, hard))
        with pytest.raises(EbmPriorError, match=r"cannot write posterior samples .*go on with"):
            PosteriorCache(half, path, SEED)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, before)
    assert json.loads(path.with_suffix(".json").read_text())["done"] == 200
    assert (PosteriorCache(half, path, SEED).rows == whole).all()
