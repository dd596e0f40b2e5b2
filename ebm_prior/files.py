"""Files that are either complete or absent, and one-line errors when they cannot be written."""

from __future__ import annotations

import errno
import json
import math
import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO

from ebm_prior.errors import EbmPriorError

__all__ = [
    "CannotWriteError", "atomic_write", "check_writable", "finite", "json_text", "write_bytes",
    "write_json", "write_text",
]  # fmt: skip

DISK_FULL = (errno.ENOSPC, errno.EDQUOT)


class CannotWriteError(EbmPriorError):
    """A file could not be written: disk full, no permission, not a regular file, ..."""


@contextmanager
def atomic_write(path: str | Path) -> Iterator[BinaryIO]:
    """Open a binary file that takes the place of `path` only if the block succeeds.

    The data go to a temporary file in the same folder (created if missing), are
    flushed to disk and renamed; on any failure, Ctrl-C included, `path` stays as it
    was and no temporary file is left.

    Args:
        path: File to create or replace.

    Raises:
        CannotWriteError: If the disk is full or the folder is not writable.
    """
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        file = _open(path, temp)
    except OSError as error:
        raise _cannot_write(path, error) from error
    try:
        with file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temp, path)
    except BaseException as error:
        temp.unlink(missing_ok=True)
        # Anything else the block raised may be about another file: leave it alone.
        if isinstance(error, OSError) and (
            error.errno in (*DISK_FULL, errno.EFBIG, errno.EIO, errno.EROFS)
            or error.filename == str(temp)
        ):
            raise _cannot_write(path, error) from error
        raise


def _open(path: Path, temp: Path) -> BinaryIO:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Renaming onto a device would replace it: `--out /dev/null` must not do that.
    if path.exists() and not path.is_file():
        raise OSError(errno.EEXIST, "it exists and is not a regular file")
    return open(temp, "xb")


def _cannot_write(path: Path, error: OSError) -> CannotWriteError:
    if error.errno in DISK_FULL:
        return CannotWriteError(
            f"disk full while writing {path}; free some space or choose another folder"
        )
    return CannotWriteError(f"cannot write {path}: {error.strerror or error}; choose another path")


def check_writable(path: str | Path) -> None:
    """Raise `CannotWriteError` now rather than after an hour if `path` cannot be written."""
    path = Path(path)
    temp = path.with_name(f".{secrets.token_hex(6)}.tmp")
    try:
        _open(path, temp).close()
        temp.unlink()
    except OSError as error:
        raise _cannot_write(path, error) from error


def write_bytes(path: str | Path, data: bytes) -> None:
    """Write `data` to `path`, atomically."""
    with atomic_write(path) as file:
        file.write(data)


def write_text(path: str | Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    write_bytes(path, text.encode())


def write_json(path: str | Path, value: object) -> None:
    """Write `value` to `path` as indented JSON, atomically."""
    write_text(path, json_text(value))


def json_text(value: object) -> str:
    """Indented JSON, as `write_json` writes it."""
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"


def finite(value: float) -> float | None:
    """A number that JSON has, or None: it knows neither NaN nor infinity."""
    return value if math.isfinite(value) else None
