"""Images as files and pictures: 8-bit rounding, grids, labelled strips, sample writers."""

from __future__ import annotations

import io
import math
import zipfile
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.files import atomic_write, check_writable, write_bytes

__all__ = [
    "ImageWriter", "grid", "labelled_rows", "png_bytes", "save_png", "side_by_side", "to_pil",
    "to_uint8",
]  # fmt: skip

MIN_WIDTH = 800  # pixels; narrower grids are enlarged by a whole factor
MAX_ENLARGED = 128  # pixels; no image is enlarged beyond this
WHITE = 255
LABEL_SIZE = 16  # pixels
MAX_GRID = 4096  # images
FORMS = "a .png (one grid), a .zip of PNGs, an .npz, or a folder of PNGs (no suffix)"


def to_uint8(x: Tensor) -> Tensor:
    """Round images (B, C, H, W) in [0, 1] to the nearest of 256 levels; uint8 stays as is."""
    if x.dtype == torch.uint8:
        return x
    if not x.is_floating_point():
        raise EbmPriorError(f"images must be uint8 or floats in [0, 1], not {x.dtype}")
    # Written so that NaN fails; the slack is for a decoder's own rounding.
    if x.numel() and not (x.min() >= -1e-3 and x.max() <= 1 + 1e-3):
        raise EbmPriorError("float images must be finite and in [0, 1]")
    return x.clamp(0, 1).mul(255).round().to(torch.uint8)


def grid(
    images: Tensor, columns: int | None = None, padding: int = 2, scale: int | None = None
) -> Tensor:
    """Arrange images row by row on white.

    Args:
        images: (N, C, H, W), uint8 or float in [0, 1].
        columns: Images per row; by default about as many as rows.
        padding: White pixels around each image.
        scale: Whole factor by which pixels are enlarged; by default the smallest that
            makes the picture at least 800 pixels wide, or its images 128.

    Returns:
        Picture (C, H', W'), uint8.
    """
    if images.ndim != 4 or not len(images):
        raise EbmPriorError(f"a grid needs images (N, C, H, W), got {tuple(images.shape)}")
    images = to_uint8(images).cpu()
    n, c, h, w = images.shape
    columns = min(columns or math.ceil(math.sqrt(n)), n)
    rows = math.ceil(n / columns)
    scale = scale or whole_scale(columns, w, padding)
    cells = torch.full((rows * columns, c, h * scale + padding, w * scale + padding), WHITE)
    cells = cells.to(torch.uint8)
    big = images.repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    cells[:n, :, padding:, padding:] = big
    picture = rearrange(cells, "(r k) c h w -> c (r h) (k w)", k=columns)
    return torch.nn.functional.pad(picture, (0, padding, 0, padding), value=WHITE)


def whole_scale(columns: int, width: int, padding: int) -> int:
    """Factor that makes a grid of images of this width 800 pixels wide, or its images 128."""
    room = MIN_WIDTH - (columns + 1) * padding
    return max(1, min(math.ceil(room / (columns * width)), MAX_ENLARGED // width))


def labelled_rows(
    rows: Sequence[tuple[str, Tensor]],
    columns: int | None = None,
    padding: int = 2,
    scale: int | None = None,
) -> Tensor:
    """Stack labelled rows of images, for before/after pictures and transition strips.

    Args:
        rows: Pairs of a label, written above, and its images (N, C, H, W), uint8 or
            float in [0, 1]. All rows are drawn at one scale.
        columns: Images per line; by default each row is a single line.
        padding: White pixels around each image.
        scale: Whole factor by which pixels are enlarged; by default as in `grid`.

    Returns:
        Picture (3, H', W'), uint8.
    """
    widest = max(min(columns or len(images), len(images)) for _, images in rows)
    scale = scale or whole_scale(widest, rows[0][1].shape[-1], padding)
    font = ImageFont.load_default(LABEL_SIZE)
    blocks = [to_pil(grid(x, columns or len(x), padding, scale)) for _, x in rows]
    line = LABEL_SIZE + 8
    width = max(
        max(block.width, math.ceil(font.getlength(label)) + 8)
        for (label, _), block in zip(rows, blocks, strict=True)
    )
    picture = Image.new("RGB", (width, sum(line + block.height for block in blocks)), "white")
    draw, y = ImageDraw.Draw(picture), 0
    for (label, _), block in zip(rows, blocks, strict=True):
        draw.text((4, y + 3), label, fill="black", font=font)
        picture.paste(block, (0, y + line))
        y += line + block.height
    return torch.from_numpy(np.array(picture)).permute(2, 0, 1)


def side_by_side(pictures: Sequence[Tensor], gap: int = 16) -> Tensor:
    """Place pictures (C, H, W), uint8, next to each other on white, their tops in line."""
    height = max(picture.shape[1] for picture in pictures)
    pad = torch.nn.functional.pad
    padded = [
        pad(picture, (gap if i else 0, 0, 0, height - picture.shape[1]), value=WHITE)
        for i, picture in enumerate(pictures)
    ]
    return torch.cat(padded, 2)


def to_pil(image: Tensor) -> Image.Image:
    """One picture (C, H, W), uint8 or float in [0, 1], as a PIL image."""
    if image.ndim != 3 or len(image) not in (1, 3):
        raise EbmPriorError(f"a picture needs 1 or 3 channels, got shape {tuple(image.shape)}")
    pixels = to_uint8(image).cpu().permute(1, 2, 0).numpy()
    return Image.fromarray(pixels[..., 0] if len(image) == 1 else pixels)


def png_bytes(image: Tensor) -> bytes:
    """One picture (C, H, W), uint8 or float in [0, 1], as a PNG file."""
    buffer = io.BytesIO()
    to_pil(image).save(buffer, "PNG")
    return buffer.getvalue()


def save_png(path: str | Path, image: Tensor) -> None:
    """Write one picture (C, H, W), uint8 or float in [0, 1], atomically."""
    write_bytes(path, png_bytes(image))


class ImageWriter:
    """Writes images as they are made; the suffix of `out` chooses the form.

    `.png`: one grid. `.zip`: 000000.png, ... `.npz`: key `images`, uint8 (N, H, W, C),
    and `seeds` where given. No suffix, or an existing empty folder: 000000.png, ... in it;
    a folder that holds anything is refused. A single file appears only once it is complete.

    Example:
        >>> with ImageWriter("samples.zip", count=64) as writer:
        ...     writer.add(prior.sample(64))

    Args:
        out: File or folder to write.
        count: Number of images that will be added.
        seeds: One whole number per image, stored in an `.npz`.

    Raises:
        EbmPriorError: At once, if `out` cannot be written, has an unknown suffix, or is
            a folder with files in it.
    """

    def __init__(self, out: str | Path, count: int, seeds: Sequence[int] | None = None) -> None:
        self.path, self.count, self.seeds = Path(out), count, seeds
        self.added = 0
        self.form = "" if self.path.is_dir() else self.path.suffix.lower()
        if self.form not in ("", ".png", ".zip", ".npz"):
            raise EbmPriorError(f"cannot write {out}: images go to {FORMS}")
        if self.form == ".png" and count > MAX_GRID:
            raise EbmPriorError(
                f"{count} images are too many for one grid (at most {MAX_GRID}): "
                "write them to a folder, a .zip or an .npz"
            )
        if self.form == "":
            self._check_empty()
        check_writable(self.path / self._name() if self.form == "" else self.path)

    def _name(self) -> str:
        return f"{self.added:06d}.png"

    def _check_empty(self) -> None:
        """Refuse a folder with anything in it: numbered pictures may well be somebody's own."""
        if self.path.is_dir() and (first := next(self.path.iterdir(), None)) is not None:
            raise EbmPriorError(
                f"{self.path} holds files, such as {first.name}: choose an empty or new folder"
            )

    def __enter__(self) -> ImageWriter:
        self._stack = ExitStack()
        self._images: list[Tensor] = []
        if self.form in (".zip", ".npz"):
            # A later context is closed first: the zip's directory is written, then renamed.
            file = self._stack.enter_context(atomic_write(self.path))
            self._zip = self._stack.enter_context(zipfile.ZipFile(file, "w"))
        return self

    def add(self, images: Tensor) -> None:
        """Append images (B, C, H, W), uint8 or float in [0, 1]."""
        images = to_uint8(images).cpu()
        if not self.added:
            self._start(images)
        for image in images:
            if self.form == ".zip":
                self._zip.writestr(self._name(), png_bytes(image))
            elif self.form == "":
                save_png(self.path / self._name(), image)
            self.added += 1
        if self.form == ".png":
            self._images.append(images)
        elif self.form == ".npz":
            self._npy.write(images.permute(0, 2, 3, 1).contiguous().numpy())

    def _start(self, images: Tensor) -> None:
        """What has to wait for the first images: their shape."""
        if self.form == ".npz":
            _, c, h, w = images.shape
            # Written by hand so that the images need not all fit into memory.
            self._npy = self._zip.open("images.npy", "w", force_zip64=True)
            self._stack.callback(self._npy.close)
            header = {"descr": "|u1", "fortran_order": False, "shape": (self.count, h, w, c)}
            np.lib.format.write_array_header_1_0(self._npy, header)

    def __exit__(self, *error: object) -> None:
        if error[0] is None:
            try:
                self._finish()
            except BaseException as failure:
                self._stack.__exit__(type(failure), failure, failure.__traceback__)
                raise
        self._stack.__exit__(*error)

    def _finish(self) -> None:
        if self.added != self.count:
            raise ValueError(f"expected {self.count} images, got {self.added}")
        if self.form == ".png":
            save_png(self.path, grid(torch.cat(self._images)))
        elif self.form == ".npz":
            self._npy.close()
            if self.seeds is not None:
                with self._zip.open("seeds.npy", "w") as file:
                    np.lib.format.write_array(file, np.asarray(self.seeds, dtype=np.int64))
