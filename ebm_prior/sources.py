"""Images at a path, read without extracting, unpickling or running anything.

A folder of images, a zip of images, an `.npz`, or an LMDB as NVAE stores it becomes a
`Part`: one split of it, not decoded yet. Sizes are checked before anything is decoded.
"""

from __future__ import annotations

import io
import os
import re
import stat
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath

import numpy as np
from PIL import Image

from ebm_prior.errors import EbmPriorError

__all__ = [
    "PARTS", "Part", "channels_first", "image_channels", "lmdb_part", "open_image", "read_path",
    "to_bytes",
]  # fmt: skip

IMAGE_SUFFIXES = {
    ".bmp", ".gif", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"
}  # fmt: skip
# Only these decoders: Pillow hands some other formats (EPS) to external programs.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PARTS = {"train": ("train", "training"), "test": ("test", "validation", "val", "valid")}
HELD_OUT = 0.1

MAX_PIXELS = 2**26  # of one image: 8192 x 8192
MAX_FILE = 2**28  # bytes of one image file
MAX_ARCHIVE = 2**40  # bytes of an archive's files together
MAX_RATIO = 200  # of sizes after and before decompression; images hardly compress at all
SMALL = 2**20  # bytes; below this a ratio is harmless


@dataclass(frozen=True)
class Part:
    """One split of a source, not decoded yet.

    `items` are the pixels, (N, C, H, W) uint8, or the names that `read` turns into
    images. `where` is what the names belong to: a folder, or the one file that has it all.
    """

    items: np.ndarray
    labels: np.ndarray | None = None
    read: Callable[[str], Image.Image] | None = None
    where: Path | None = None

    def take(self, index: np.ndarray) -> Part:
        """Items at the given places."""
        labels = None if self.labels is None else self.labels[index]
        return replace(self, items=self.items[index], labels=labels)

    def held_out(self, split: str | None, count: int | None = None) -> Part:
        """Train or test split of a source that has none; the test split has `count`."""
        if split is None:
            return self
        n = len(self.items)
        count = round(n * HELD_OUT) if count is None else count
        order = np.random.RandomState(0).permutation(n)  # the same in every NumPy
        count = max(count, min(n - 1, 1))
        return self.take(np.sort(order[:count] if split == "test" else order[count:]))

    def image(self, i: int) -> Image.Image:
        """Item i as a picture."""
        if self.read is not None:
            return self.read(self.items[i])
        pixels = self.items[i].transpose(1, 2, 0)
        return Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)

    def describe(self, i: int) -> str:
        """What an error message calls item i."""
        return str(self.items[i]) if self.read is not None else f"image {i}"


# Sources


def read_path(path: Path, split: str | None, stack: ExitStack) -> Part:
    """One split of the images at an existing path.

    Args:
        path: Folder of images, zip of images, `.npz`, or folder with an LMDB.
        split: "train" or "test"; None for all images of a source that has no parts, and for
            the test split of one that has.
        stack: Closes the opened files once the images are decoded.
    """
    if path.is_dir():
        reader = _lmdb if _is_lmdb(path) or _lmdb_parts(path) else _folder
    elif path.suffix.lower() == ".npz":
        reader = _npz
    elif path.suffix.lower() == ".zip":
        reader = _zip
    else:
        raise EbmPriorError(
            f"{path} is not a data set: give a folder of images, a .zip, an .npz or an LMDB folder"
        )
    return reader(path, split, stack)


def _folder(path: Path, split: str | None, stack: ExitStack) -> Part:
    names = []
    # Links to folders are not followed: they may lead in circles.
    for folder, _, files in os.walk(path):
        inside = Path(folder).relative_to(path)
        names += [(inside / file).as_posix() for file in files if (Path(folder) / file).is_file()]
    return _named_images(names, split, path, partial(open_image, path))


def _zip(path: Path, split: str | None, stack: ExitStack) -> Part:
    archive = _archive(path, stack)

    def read(name: str) -> Image.Image:
        if archive.getinfo(name).file_size > MAX_FILE:
            raise _too_large(f"{path}: {name}")
        try:
            data = archive.read(name)
        # What zipfile raises for damage, a password, an unknown compression.
        except (
            zipfile.BadZipFile, zlib.error, OSError, EOFError, RuntimeError, NotImplementedError
        ) as error:  # fmt: skip
            raise EbmPriorError(f"{path}: cannot read {name} ({error})") from error
        return _decode(data, f"{path}: {name}")

    return _named_images(archive.namelist(), split, path, read)


def _archive(path: Path, stack: ExitStack) -> zipfile.ZipFile:
    """Open a zip and refuse it if its names or its declared sizes are dangerous."""
    try:
        archive = stack.enter_context(zipfile.ZipFile(path))
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise EbmPriorError(f"{path} is not a readable zip file ({error})") from error
    total = 0
    for info in archive.infolist():
        name = info.filename.replace("\\", "/")
        if name.startswith("/") or re.match("[A-Za-z]:", name) or ".." in name.split("/"):
            raise EbmPriorError(f"{path} is unsafe: {info.filename!r} points outside the archive")
        if stat.S_ISLNK(info.external_attr >> 16):
            raise EbmPriorError(f"{path} is unsafe: {info.filename!r} is a link")
        total += info.file_size
        if info.file_size > max(SMALL, MAX_RATIO * info.compress_size):
            raise EbmPriorError(f"{path} is unsafe: {info.filename!r} expands too much (zip bomb)")
    # Files may share their compressed bytes, so the archive as a whole counts too.
    if total > min(MAX_ARCHIVE, max(SMALL, MAX_RATIO * path.stat().st_size)):
        raise EbmPriorError(f"{path} is unsafe: its files expand too much together (zip bomb)")
    return archive


def _named_images(
    names: Sequence[str], split: str | None, where: Path, read: Callable[[str], Image.Image]
) -> Part:
    """The split and the class of each file, read off the folders in its name."""
    paths = sorted(
        PurePosixPath(name) for name in names
        if PurePosixPath(name).suffix.lower() in IMAGE_SUFFIXES
        and not any(p.startswith((".", "__MACOSX")) for p in PurePosixPath(name).parts)
    )  # fmt: skip
    if not paths:
        known = " ".join(sorted(IMAGE_SUFFIXES))
        raise EbmPriorError(f"no images in {where}: looked for {known}")
    folders = [path.parts[:-1] for path in paths]
    start = 0  # A single folder around everything says nothing, unless it names a split.
    while all(len(f) > start for f in folders) and len({f[start] for f in folders}) == 1:
        if any(folders[0][start].lower() in part for part in PARTS.values()):
            break
        start += 1
    folders = [f[start:] for f in folders]

    tops = {f[0].lower() for f in folders if f}
    own = {s: next((p for p in part if p in tops), None) for s, part in PARTS.items()}
    wanted = own[split or "test"] or own["train"]
    if own["test"] and not wanted:
        raise EbmPriorError(f"{where} has a folder {own['test']} but none called train")
    if wanted:
        parts = [f[0].lower() if f else None for f in folders]
        folders = [f[1:] if p in own.values() else () for f, p in zip(folders, parts, strict=True)]
        index = np.array([i for i, part in enumerate(parts) if part == wanted])
    else:
        index = np.arange(len(paths))
    # Classes are those of all parts, so that train and test agree.
    classes = {name: i for i, name in enumerate(sorted({f[0] for f in folders if f}))}
    labels = None
    if all(folders[i] for i in index):
        labels = np.array([classes[folders[i][0]] for i in index])
    items = np.array([str(paths[i]) for i in index], dtype=object)
    part = Part(items, labels, read, where)
    return part if own["test"] else part.held_out(split)


def _npz(path: Path, split: str | None, stack: ExitStack) -> Part:
    _archive(path, stack)
    archive = stack.enter_context(np.load(path, allow_pickle=False))
    keys = set(archive.files)

    def array(key: str) -> np.ndarray:
        try:
            if isinstance(found := archive[key], np.ndarray):
                return found
            raise ValueError("it is no array")  # but bytes: any file can be in a zip
        except (ValueError, OSError, EOFError, MemoryError, zipfile.BadZipFile, zlib.error) as e:
            raise EbmPriorError(f"{path}: cannot read {key} ({e})") from e

    if keys & {"x_train", "x_test"}:
        if not keys >= {"x_train"} and split == "train":
            raise EbmPriorError(f"{path} holds x_test but no x_train; use its test split")
        which = split or "test"
        which = which if f"x_{which}" in keys else "train"
        images, labels = f"x_{which}", f"y_{which}"
        whole = {"x_train", "x_test"} <= keys or "x_train" not in keys
    else:
        images = next((k for k in ("images", "x", "arr_0") if k in keys), None)
        if images is None:
            raise EbmPriorError(
                f"{path} holds none of x_train, x_test, images, x, arr_0; "
                f"it holds {', '.join(sorted(keys)) or 'nothing'}"
            )
        labels, whole = next((k for k in ("labels", "y") if k in keys), ""), False
    pixels = channels_first(to_bytes(array(images), f"{path}: {images}"), f"{path}: {images}")
    target = array(labels) if labels in keys else None
    if target is not None and not (
        target.shape == (len(pixels),) and np.issubdtype(target.dtype, np.integer)
    ):
        raise EbmPriorError(
            f"{path}: {labels} must be {len(pixels)} whole numbers, one per image, "
            f"got {target.dtype} of shape {target.shape}"
        )
    part = Part(pixels, target)
    return part if whole else part.held_out(split)


def to_bytes(array: np.ndarray, what: str) -> np.ndarray:
    """Round floats in [0, 1] to uint8, leave uint8 alone, refuse the rest."""
    if array.dtype == np.uint8:
        return array
    if not np.issubdtype(array.dtype, np.floating):
        raise EbmPriorError(f"{what} is {array.dtype}; save uint8, or floats in [0, 1]")
    if array.size and not (array.min() >= 0 and array.max() <= 1):
        raise EbmPriorError(f"{what} has floats outside [0, 1]; scale them or save uint8")
    return np.round(array * 255).astype(np.uint8)


def channels_first(array: np.ndarray, what: str = "images") -> np.ndarray:
    """Bring (N, H, W), (N, H, W, C) or (N, C, H, W) to (N, C, H, W)."""
    if array.ndim == 3:
        return array[:, None]
    if array.ndim == 4 and array.shape[3] in (1, 3):
        return np.ascontiguousarray(array.transpose(0, 3, 1, 2))
    if array.ndim == 4 and array.shape[1] in (1, 3):
        return array
    raise EbmPriorError(
        f"{what} has shape {array.shape}; it must be (N, H, W), (N, H, W, C) or (N, C, H, W) "
        "with C 1 or 3"
    )


def _is_lmdb(path: Path) -> bool:
    return (path / "data.mdb").is_file()


def _lmdb_parts(path: Path) -> dict[str, Path]:
    """NVAE keeps two LMDBs in a folder: train.lmdb and validation.lmdb."""
    found = {s: [path / f"{n}.lmdb" for n in names] for s, names in PARTS.items()}
    found = {s: [p for p in paths if _is_lmdb(p)] for s, paths in found.items()}
    return {s: paths[0] for s, paths in found.items() if paths}


def _lmdb(path: Path, split: str | None, stack: ExitStack) -> Part:
    parts = {"train": path} if _is_lmdb(path) else _lmdb_parts(path)
    if (split or "test") not in parts and "train" not in parts:
        raise EbmPriorError(f"{path} holds no train.lmdb; use its test split")
    part = lmdb_part(parts.get(split or "test", parts.get("train")), stack)
    return part.held_out(split) if set(parts) == {"train"} else part


def lmdb_part(path: Path, stack: ExitStack) -> Part:
    """Images under any keys; whole-number keys, if there are any, are the only ones."""
    try:
        import lmdb
    except ImportError as error:
        raise EbmPriorError(
            f"{path} is an LMDB: install its reader with pip install 'ebm-prior[lmdb]'"
        ) from error
    file = path / "data.mdb"
    try:
        env = lmdb.open(str(path), readonly=True, lock=False, readahead=False, meminit=False)
        stack.callback(env.close)
        # Reading past the end of a mapped file would kill the process.
        if (env.info()["last_pgno"] + 1) * env.stat()["psize"] > file.stat().st_size:
            raise EbmPriorError(f"{file} is cut short; copy or download it again")
        with env.begin() as transaction:
            keys = [bytes(key) for key in transaction.cursor().iternext(values=False)]
    except lmdb.Error as error:
        raise EbmPriorError(f"{path} is not a readable LMDB ({error})") from error
    keys = [key for key in keys if key.isdigit()] or keys
    keys.sort(key=lambda key: (len(key), key))  # numbers by value

    def read(name: str) -> Image.Image:
        with env.begin() as transaction:
            return _decode_or_raw(transaction.get(name.encode("latin-1")), f"{path}: key {name}")

    items = np.array([key.decode("latin-1") for key in keys], dtype=object)
    return Part(items, None, read, file)


# Decoding


def open_image(folder: Path, name: str) -> Image.Image:
    """Decode one image file."""
    path = folder / name
    try:
        if path.stat().st_size > MAX_FILE:
            raise _too_large(path)
        return _decode(path.read_bytes(), str(path))
    except OSError as error:
        raise EbmPriorError(f"cannot read {path}: {error.strerror}") from error


def _too_large(what: object) -> EbmPriorError:
    return EbmPriorError(f"{what} exceeds {MAX_FILE >> 20} MiB; no such image is read")


def _decode(data: bytes, what: str) -> Image.Image:
    """Decode one image after checking how large it will be."""
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        small = prod(image.size) <= MAX_PIXELS
        if small:
            image.load()
    except Image.DecompressionBombError:
        small = False
    except Exception as error:  # decoders raise nearly anything for a damaged file
        raise EbmPriorError(f"{what} is not a readable image; replace or remove it") from error
    if not small:
        raise EbmPriorError(f"{what} has more than {MAX_PIXELS} pixels; shrink or remove it")
    return image


def _decode_or_raw(data: bytes, what: str) -> Image.Image:
    """An encoded image, or the bytes of a square one, (H, W, 3) or (H, W)."""
    try:
        Image.open(io.BytesIO(data), formats=FORMATS)
    except Image.UnidentifiedImageError:
        for channels in (3, 1):
            side = round((len(data) / channels) ** 0.5)
            if side > 1 and side * side * channels == len(data):
                pixels = np.frombuffer(data, np.uint8).reshape(side, side, channels)
                return Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
        raise EbmPriorError(
            f"{what} is neither an encoded image nor a square raw one; is this an image LMDB?"
        ) from None
    except Exception:  # damaged or too large: decoding says which
        pass
    return _decode(data, what)


def image_channels(image: Image.Image, what: str) -> int:
    """1 for grey, 3 for colour; transparency does not count."""
    if image.mode in ("1", "L", "LA"):
        return 1
    if image.mode in ("RGB", "RGBA", "RGBX", "P", "PA", "CMYK", "YCbCr"):
        return 3
    raise EbmPriorError(f"{what} has more than 8 bits per channel; save it with 8")
