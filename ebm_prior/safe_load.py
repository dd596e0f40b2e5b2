"""Read checkpoints from strangers without running anything in them."""

from __future__ import annotations

import hashlib
import pickle
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from ebm_prior.errors import EbmPriorError

__all__ = ["load_torch_file", "sha256_of"]


def load_torch_file(path: str | Path, allowed: Sequence[type] = ()) -> Any:
    """`torch.load` on the CPU with `weights_only=True` and an explicit allow-list.

    Args:
        path: File written by `torch.save`.
        allowed: Classes that may be rebuilt besides tensors and plain containers.

    Raises:
        EbmPriorError: If the file is missing, empty, truncated, not a PyTorch file, or
            names a class or function outside the allow-list (which then never runs).
    """
    path = Path(path)
    if not path.exists():
        raise EbmPriorError(f"no such checkpoint: {path}")
    if path.is_dir():
        raise EbmPriorError(f"{path} is a folder, expected a checkpoint file")
    if path.stat().st_size == 0:
        raise EbmPriorError(f"{path} is empty; download or copy it again")
    try:
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            # A pickle that torch did not write is refused below; no need to warn first.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        text = str(error)
        if "Unsupported global" in text or "GLOBAL" in text or "Unsupported class" in text:
            name = _quoted(text, "GLOBAL ") or _quoted(text, "class ") or "a foreign class"
            raise EbmPriorError(
                f"{path} asks to run {name}, which is not on the list of allowed names; "
                "nothing was run. Use a checkpoint as its training code wrote it"
            ) from error
        raise EbmPriorError(
            f"{path} is not a readable PyTorch checkpoint (truncated or of another kind)"
        ) from error
    except PermissionError as error:
        raise EbmPriorError(f"{path} cannot be read: permission denied") from error
    except (
        RuntimeError,
        EOFError,
        KeyError,
        ValueError,
        TypeError,
        AttributeError,
        IndexError,
        OSError,
        zipfile.BadZipFile,
        UnicodeDecodeError,
    ) as error:
        raise EbmPriorError(
            f"{path} is not a readable PyTorch checkpoint (truncated or of another kind)"
        ) from error


def _quoted(text: str, after: str) -> str:
    """The word that follows `after` in torch's message, or an empty string."""
    if after not in text:
        return ""
    return text.split(after, 1)[1].split()[0].strip("`'\".,")


def sha256_of(path: str | Path) -> str:
    """SHA-256 of a file, or of a folder's sorted file names and contents."""
    path = Path(path)
    if path.is_file():
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return digest.hexdigest()
    digest = hashlib.sha256()
    for file in sorted(p for p in path.rglob("*") if p.is_file()):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256_of(file)}\n".encode())
    return digest.hexdigest()
