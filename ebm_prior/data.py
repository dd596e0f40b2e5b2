"""Images by name or by path, as uint8 tensors.

A name is fetched by torchvision (`digits` comes with scikit-learn); a path is a folder
of images, a zip of images, an `.npz`, or an LMDB as NVAE stores it. Nothing is ever
extracted, unpickled or run, and sizes are checked before anything is decoded.

`:` and numbers after either keep the images of these classes: `mnist:0,1`.

Splits: a source with parts of its own (a named data set, `x_train`/`x_test`, folders
`train` and `test` or `validation`) keeps them. Of any other, a fixed random tenth is
the test split and the rest is the train split.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from tqdm import tqdm

from ebm_prior.errors import EbmPriorError
from ebm_prior.files import CannotWriteError, atomic_write
from ebm_prior.sources import (
    PARTS,
    Part,
    channels_first,
    image_channels,
    lmdb_part,
    open_image,
    read_path,
    to_bytes,
)
from ebm_prior.torchvision_compat import import_torchvision

__all__ = ["ImageSet", "known_names", "load_files", "load_images", "split_classes", "to_float"]

Shape = tuple[int, int, int]  # C, H, W

CACHE_FROM = 2000  # images; fewer are decoded again each time
CACHE_VERSION = 1  # raise it when the same files would give other pixels
CHUNK = 512  # images decoded before the next are read

CELEBA_SIZE, CELEBA_CROP = (178, 218), (15, 40, 163, 188)  # aligned images; NVAE's crop


@dataclass(frozen=True)
class ImageSet:
    """Images of one split.

    Attributes:
        images: (N, C, H, W), uint8; may be mapped from a file instead of held in memory.
        labels: (N,), int64, or None where the source has none.
        name: Name of the data set, or of the file or folder without its suffix.
        split: "train" or "test".
    """

    images: Tensor
    labels: Tensor | None
    name: str
    split: str

    def __len__(self) -> int:
        """Number of images."""
        return len(self.images)


def to_float(images: Tensor) -> Tensor:
    """Convert uint8 images to float32 in [0, 1]: exactly v / 255."""
    return images.to(torch.float32) / 255


def load_images(
    source: str | Path,
    *,
    split: str | None = "train",
    shape: Shape | None = None,
    resize: bool = False,
    root: str | Path | None = None,
    limit: int | None = None,
    labels: bool = False,
    download: bool = True,
) -> ImageSet:
    """Load one split of a data set.

    Large folders, zips and LMDBs are decoded once and kept under `root`/decoded.

    Args:
        source: A known name (see `known_names`), or the path of a folder or zip of
            images, an `.npz` (x_train, x_test and y_train, y_test; or images, x or
            arr_0), or a folder with an LMDB. Write "./mnist" for a path that is a name.
            ":0,1" at the end keeps the images with these labels.
        split: "train" or "test"; the module's docstring says what they are. None for all
            images of a source that has no parts, and for the test split of one that has.
        shape: (C, H, W) the images must have; by default what the first one has.
        resize: Crop (centrally, to the wanted aspect), scale and convert images between
            grey and colour where they differ from `shape`, instead of refusing them.
        root: Folder of downloads and decoded images; by default the environment
            variable EBM_PRIOR_DATA, or ~/.cache/ebm_prior/data.
        limit: Keep this many images, a fixed random choice, in their order.
        labels: Fail if there are no labels.
        download: Fetch a named data set that is not under `root` yet.

    Returns:
        The images, uint8.

    Raises:
        EbmPriorError: If the source is missing, damaged, unsafe or does not fit.
    """
    if split not in (None, *PARTS):
        raise EbmPriorError(f"unknown split {split!r}: use train or test")
    if limit is not None and limit < 1:
        raise EbmPriorError(f"limit must be at least 1, got {limit}")
    root = Path(root or os.environ.get("EBM_PRIOR_DATA") or "~/.cache/ebm_prior/data")
    root = root.expanduser()
    shape = tuple(shape) if shape is not None else None
    source, classes = split_classes(source)
    name, loader, size = _find(source, root)
    if loader in NAMED.values():  # all of which have parts
        split = split or "test"
    if size is not None:  # such images have no size of their own
        resize = resize or shape in (None, (3, size, size))
        shape = shape or (3, size, size)
    with ExitStack() as stack:
        part = loader(split, root, download, stack=stack)
        if not len(part.items):
            raise EbmPriorError(
                f"{source} has no {split or 'test'} images; add some or name another source"
            )
        if classes is not None:
            part = _of_classes(part, source, split or "test", classes)
        if limit is not None and limit < len(part.items):
            order = np.random.RandomState(0).permutation(len(part.items))
            part = part.take(np.sort(order[:limit]))
        if labels and part.labels is None:
            raise EbmPriorError(
                f"{source} has no labels: use one sub-folder per class, or y_{split or 'test'} "
                "in an .npz"
            )
        pixels = _pixels(part, name, shape, resize, root / "decoded")
    target = None if part.labels is None else torch.as_tensor(part.labels, dtype=torch.int64)
    return ImageSet(torch.from_numpy(pixels), target, name, split or "test")


def load_files(paths: Sequence[str | Path], shape: Shape, *, resize: bool = False) -> Tensor:
    """Read a few image files.

    Args:
        paths: PNG, JPEG, ... files.
        shape: (C, H, W) they must have.
        resize: Crop, scale and convert those that differ, instead of refusing them.

    Returns:
        (N, C, H, W), uint8.

    Raises:
        EbmPriorError: If a file is missing, is no image, or does not fit.
    """
    names = np.array([str(path) for path in paths], dtype=object)
    part = Part(names, None, partial(open_image, Path()), Path())
    return torch.from_numpy(_pixels(part, "image files", tuple(shape), resize, None))


Loader = Callable[..., Part]  # (split, root, download, *, stack): `stack` closes opened files


# From a source to its loader


def known_names() -> list[str]:
    """Names that `load_images` fetches by itself; LSUN's and CelebA's also take a size."""
    return sorted(NAMED)


def split_classes(source: str | Path) -> tuple[str | Path, str | None]:
    """A source such as "mnist:0,1" as "mnist" and "0,1"; without classes None for these."""
    match = re.fullmatch(r"(.+):(\d+(?:,\d+)*)", str(source))
    if match is None or Path(source).expanduser().exists():
        return source, None
    return match[1], match[2]


def _of_classes(part: Part, source: str | Path, split: str, classes: str) -> Part:
    """Items of these classes only."""
    if part.labels is None:
        raise EbmPriorError(f"{source}:{classes} needs labels, and {source} has none")
    wanted = [int(text) for text in classes.split(",")]
    if absent := sorted(set(wanted) - set(np.unique(part.labels).tolist())):
        raise EbmPriorError(f"{source} has no {split} images of class {absent[0]}")
    return part.take(np.flatnonzero(np.isin(part.labels, wanted)))


def _find(source: str | Path, root: Path) -> tuple[str, Loader, int | None]:
    """Name of a source, the function that loads it, and the side its name asks for."""
    key = source.lower().replace("-", "_") if isinstance(source, str) else ""
    key = ALIASES.get(key, key)
    if key in NAMED:
        return key, NAMED[key], 64 if key == "celeba" else None
    if match := re.fullmatch(r"(celeba(?=_64)|lsun_[a-z]+)_(\d+)", key):
        if match[1] in NAMED:
            return key, NAMED[match[1]], int(match[2])
    path = Path(source).expanduser()
    if key in BY_PATH and not path.exists():
        path = root / key
        if not path.exists():
            raise EbmPriorError(
                f"{key} cannot be fetched: pass --data with its folder (train.lmdb and "
                f"validation.lmdb, or images), or put that folder at {path}"
            )
    if not path.exists():
        hint = "" if path.suffix or len(path.parts) > 1 else (
            f", nor a known name: {', '.join([*known_names(), *BY_PATH])}"
        )  # fmt: skip
        raise EbmPriorError(f"no such file or folder: {source}{hint}")
    return path.resolve().stem, lambda split, *_, stack: read_path(path, split, stack), None


# Named data sets


def _digits(split: str, root: Path, download: bool, *, stack: ExitStack) -> Part:
    from sklearn.datasets import load_digits

    digits = load_digits()
    pixels = np.round(digits.images * 255 / 16).astype(np.uint8)[:, None]
    return Part(pixels, digits.target).held_out(split, count=297)


def _fetch(root: Path, what: str, make: Callable[[], object]) -> object:
    """Run torchvision's download; whatever stops it, a path is the way out."""
    try:
        return make()
    except Exception as error:
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        raise EbmPriorError(
            f"could not get {what} in {root} ({reason}); pass a path with --data instead"
        ) from error


def _torchvision(
    class_name: str, split: str, root: Path, download: bool, *, stack: ExitStack
) -> Part:
    make = getattr(import_torchvision().datasets, class_name)
    which = {"split": split} if class_name == "SVHN" else {"train": split == "train"}
    found = _fetch(root, class_name, lambda: make(str(root), download=download, **which))
    labels = found.labels if class_name == "SVHN" else found.targets
    pixels = np.asarray(found.data)
    if class_name != "SVHN":  # the only one stored channels first
        pixels = channels_first(pixels)
    return Part(pixels, np.asarray(labels))


def _celeba(split: str, root: Path, download: bool, *, stack: ExitStack) -> Part:
    make = import_torchvision().datasets.CelebA
    found = _fetch(root, "CelebA", lambda: make(str(root), split=split, download=download))
    folder = root / found.base_folder / "img_align_celeba"
    return Part(np.array(found.filename, dtype=object), None, partial(open_image, folder), folder)


def _lsun(scene: str, split: str, root: Path, download: bool, *, stack: ExitStack) -> Part:
    folder = root / f"{scene}_{'train' if split == 'train' else 'val'}_lmdb"
    if not folder.is_dir():
        raise EbmPriorError(
            f"{folder} is missing: fetch {folder.name}.zip with github.com/fyu/lsun and unpack "
            "it there, or pass a path with --data"
        )
    return lmdb_part(folder, stack)


def _omniglot(split: str, root: Path, download: bool, *, stack: ExitStack) -> Part:
    """The 28 x 28 version that likelihood papers use, not torchvision's 105 x 105."""
    from scipy.io import loadmat

    url = "https://raw.githubusercontent.com/yburda/iwae/master/datasets/OMNIGLOT/chardata.mat"
    path = root / "omniglot" / "chardata.mat"
    if download and not path.is_file():
        utils = import_torchvision().datasets.utils
        _fetch(root, "Omniglot", lambda: utils.download_url(url, str(path.parent), path.name))
    content = _fetch(root, "Omniglot", lambda: loadmat(str(path)))
    columns = content["data" if split == "train" else "testdata"]  # a column is an image
    pixels = columns.T.reshape(-1, 28, 28).transpose(0, 2, 1)
    return Part(to_bytes(pixels.astype(np.float32), str(path))[:, None])


NAMED: dict[str, Loader] = {
    "celeba": _celeba,
    "cifar10": partial(_torchvision, "CIFAR10"),
    "cifar100": partial(_torchvision, "CIFAR100"),
    "digits": _digits,
    "fashion_mnist": partial(_torchvision, "FashionMNIST"),
    "kmnist": partial(_torchvision, "KMNIST"),
    "lsun_bedroom": partial(_lsun, "bedroom"),
    "lsun_church": partial(_lsun, "church_outdoor"),
    "lsun_tower": partial(_lsun, "tower"),
    "mnist": partial(_torchvision, "MNIST"),
    "omniglot": _omniglot,
    "svhn": partial(_torchvision, "SVHN"),
}
ALIASES = {"cifar": "cifar10", "fashionmnist": "fashion_mnist", "celeba64": "celeba_64"}
BY_PATH = ("celeba_256", "ffhq", "imagenet_32", "imagenet_64")  # NVAE's, without a loader


def _fit(image: Image.Image, shape: Shape) -> Image.Image:
    """Convert, crop and scale; bilinear with antialiasing, as NVAE prepared its data."""
    c, h, w = shape
    image = image.convert("L" if c == 1 else "RGB")
    if image.size == CELEBA_SIZE:
        image = image.crop(CELEBA_CROP)
    return ImageOps.fit(image, (w, h), Image.Resampling.BILINEAR)


def _array(image: Image.Image, channels: int) -> np.ndarray:
    array = np.asarray(image.convert("L" if channels == 1 else "RGB"))
    return array[None] if channels == 1 else array.transpose(2, 0, 1)


def _pixels(
    part: Part, name: str, shape: Shape | None, resize: bool, cache: Path | None
) -> np.ndarray:
    """Pixels of a part, (N, *shape) uint8: as they are, from the cache, or decoded."""
    if part.read is None and shape in (None, part.items.shape[1:]):
        return np.ascontiguousarray(part.items)
    first = part.image(0)
    first_shape = (image_channels(first, part.describe(0)), first.height, first.width)
    given, shape = shape, shape or first_shape

    def one(i: int) -> np.ndarray:
        image = part.image(i)
        own = (image_channels(image, part.describe(i)), image.height, image.width)
        if own == shape:
            return _array(image, own[0])
        if resize:
            return _array(_fit(image, shape), shape[0])
        wanted = f"{_times(shape)} is needed" if given else (
            f"{part.describe(0)} is {_times(shape)}"
        )  # fmt: skip
        raise EbmPriorError(
            f"{name}: {part.describe(i)} is {_times(own)} but {wanted}; "
            "pass --resize to crop, scale and convert images"
        )

    def chunks() -> Iterator[np.ndarray]:
        n = len(part.items)
        progress = tqdm(total=n, desc=f"reading {name}", unit="image", delay=2, disable=None)
        with progress, ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            for start in range(0, n, CHUNK):
                chunk = np.stack(list(pool.map(one, range(start, min(start + CHUNK, n)))))
                progress.update(len(chunk))
                yield chunk

    full = (len(part.items), *shape)
    if part.read is not None and cache is not None and len(part.items) > CACHE_FROM:
        cache = cache / f"{name}-{_fingerprint(part, shape, resize)}.npy"
        try:
            if not _is_cached(cache, full):
                _write_cache(cache, full, chunks())
            # Copy-on-write, because torch wants writable memory.
            return np.load(cache, mmap_mode="c", allow_pickle=False)
        except (CannotWriteError, OSError) as error:
            warnings.warn(f"decoded images are not kept: {error}", stacklevel=3)
    pixels, start = np.empty(full, np.uint8), 0
    for chunk in chunks():
        pixels[start : start + len(chunk)] = chunk
        start += len(chunk)
    return pixels


def _times(shape: Shape) -> str:
    return "x".join(map(str, shape))


def _fingerprint(part: Part, shape: Shape, resize: bool) -> str:
    """Hash of all that decoded pixels depend on: files with sizes and times, settings."""
    folder = part.where.is_dir()
    files = [part.where / name for name in part.items] if folder else [part.where]
    status = [(s.st_size, s.st_mtime_ns) for s in map(os.stat, files)]
    key = (CACHE_VERSION, str(part.where.resolve()), list(part.items), status, shape, resize)
    return hashlib.sha256(repr(key).encode()).hexdigest()[:20]


def _is_cached(path: Path, shape: tuple[int, ...]) -> bool:
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError):
        return False
    return (array.shape, array.dtype) == (shape, np.uint8)


def _write_cache(path: Path, shape: tuple[int, ...], chunks: Iterator[np.ndarray]) -> None:
    """Write chunks one after the other, so that they need not fit into memory together."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if shutil.disk_usage(path.parent).free < 1.1 * prod(shape):
        raise CannotWriteError(f"too little space in {path.parent}")
    with atomic_write(path) as file:
        header = {"descr": "|u1", "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        for chunk in chunks:
            file.write(np.ascontiguousarray(chunk))
