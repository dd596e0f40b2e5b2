"""Read checkpoints from strangers without running anything in them."""

from __future__ import annotations

import argparse
import hashlib
import json
import pickle
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ebm_prior.errors import EbmPriorError

FORMAT_KEY = "ebm_prior_checkpoint"  # of the metadata of a checkpoint in safetensors

__all__ = [
    "Named", "load_pickle_file", "load_torch_file", "mentions", "plain_state", "sha256_of",
    "sha256_of_files",
]  # fmt: skip

MAX_INDEX = 1 << 26  # bytes of a checkpoint's pickle; the largest seen has a few MB


def load_torch_file(path: str | Path, allowed: Sequence[type] = ()) -> Any:
    """`torch.load` on the CPU with `weights_only=True` and an explicit allow-list.

    Args:
        path: File written by `torch.save`, or converted by `ebm_prior.convert`.
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
    if path.suffix == ".safetensors":
        return _load_converted(path)
    try:
        # torch.save never compresses: what does is a bomb, and inflating it takes the memory.
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                if any(e.compress_type != zipfile.ZIP_STORED for e in archive.infolist()):
                    raise EbmPriorError(f"{path} is compressed, which PyTorch files never are")
        with torch.serialization.safe_globals(list(allowed)), warnings.catch_warnings():
            # A pickle that torch did not write is refused below; no need to warn first.
            warnings.filterwarnings("ignore", message="Detected pickle protocol")
            return torch.load(path, map_location="cpu", weights_only=True)
    except EbmPriorError:
        raise
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
    # A damaged file can fail in any way; whatever it is, the file is of no use.
    except Exception as error:
        raise EbmPriorError(
            f"{path} is not a readable PyTorch checkpoint (truncated or of another kind)"
        ) from error


def _load_converted(path: Path) -> Any:
    """What a checkpoint was before `ebm_prior.convert` made safetensors of it."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FORMAT_KEY)
            if text is None:
                raise EbmPriorError(f"{path} is no converted checkpoint: it holds bare tensors")
            return _decode(json.loads(text), file)
    except EbmPriorError:
        raise
    except (SafetensorError, ValueError, TypeError, RecursionError, OSError) as error:
        raise EbmPriorError(f"{path} is damaged: {error}; fetch it again") from error


def _decode(node: Any, file: Any) -> Any:
    ((kind, value),) = node.items() if isinstance(node, dict) else (("", None),)
    if kind == "tensor" and isinstance(value, str):
        return file.get_tensor(value)
    if kind in ("table", "namespace") and isinstance(value, dict):
        table = {key: _decode(entry, file) for key, entry in value.items()}
        return argparse.Namespace(**table) if kind == "namespace" else table
    if kind == "list" and isinstance(value, list):
        return [_decode(entry, file) for entry in value]
    if kind == "value" and not isinstance(value, (dict, list)):
        return value
    raise ValueError(f"unknown entry {kind!r}")


def mentions(path: str | Path, word: str) -> bool:
    """Whether a file of `torch.save` holds a word, such as a weight's name, in its pickle.

    For telling families apart: nothing is unpickled and no weight is read. False for
    whatever is no such file.
    """
    path = Path(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                index = [e for e in archive.infolist() if e.filename.endswith("data.pkl")]
                # what is compressed is a bomb, as in `load_torch_file`
                if len(index) != 1 or index[0].compress_type != zipfile.ZIP_STORED:
                    return False
                with archive.open(index[0]) as file:
                    return word.encode() in file.read(MAX_INDEX)
        with path.open("rb") as file:
            # In the format before zip the pickle comes before the weights.
            start = file.read(2)
            return start == b"\x80\x02" and word.encode() in file.read(MAX_INDEX)
    except (OSError, ValueError, RuntimeError, NotImplementedError, zipfile.BadZipFile):
        return False


def plain_state(state: Mapping[Any, Any], path: Path, hint: str = "") -> dict[str, Tensor]:
    """Weights as float32 and their flags and counts as they are, by name.

    Args:
        state: What a file holds as its state dict.
        path: The file, for messages.
        hint: What to add where an entry is no named tensor.

    Raises:
        EbmPriorError: If an entry is no named tensor, claims more numbers than the file
            holds (a few bytes can be declared to be terabytes), or is not finite.
    """
    plain = {}
    for key, value in state.items():
        if not isinstance(key, str) or not isinstance(value, Tensor):
            raise EbmPriorError(f"{path}: entry {key!r} is not a named tensor{hint}")
        stored = value.layout == torch.strided and value.device.type == "cpu"
        if not stored or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise EbmPriorError(
                f"{path}: weight {key} is not stored in full; use the file as its training code "
                "wrote it"
            )
        plain[key] = value.float() if value.is_floating_point() else value
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise EbmPriorError(f"{path}: weight {key} is not finite; the training had diverged")
    return plain


@dataclass(frozen=True)
class Named:
    """Stands for a class or function that a pickle names; cannot be called."""

    name: str


class _TableUnpickler(pickle.Unpickler):
    """Resolves only the names of a table, to objects that run nothing."""

    def __init__(self, file: BinaryIO, table: Mapping[str, str], path: Path) -> None:
        super().__init__(file)
        self.table = table
        self.path = path

    def find_class(self, module: str, name: str) -> Named:
        """Look a global up in the table; nothing is imported."""
        known = self.table.get(f"{module}.{name}")
        if known is None:
            raise EbmPriorError(
                f"{self.path} asks to run {module}.{name}, which is not on the list of allowed "
                "names; nothing was run. Use a checkpoint as its training code wrote it"
            )
        return Named(known)

    def persistent_load(self, pid: Any) -> Any:
        """Refuse references to objects outside the file."""
        raise pickle.UnpicklingError("reference to an object outside the file")


def load_pickle_file(path: str | Path, table: Mapping[str, str]) -> Any:
    """Read a plain pickle in which classes and functions only occur as names.

    Args:
        path: File written by `pickle.dump`.
        table: Full name ("package.module.name") of every class or function it may mention,
            to the word that stands for it; it is read as `Named(word)`.

    Raises:
        EbmPriorError: If the file is missing, not a pickle, calls something, or mentions a
            name outside the table.
    """
    path = Path(path)
    if not path.is_file():
        raise EbmPriorError(f"no such file: {path}")
    unreadable = f"{path} is not a readable pickle (truncated, swapped or of another kind)"
    try:
        with path.open("rb") as file:
            data = _TableUnpickler(file, table, path).load()
            if file.read(1):  # a torch file of the old format is several pickles in a row
                raise EbmPriorError(unreadable)
            return data
    except EbmPriorError:
        raise
    except PermissionError as error:
        raise EbmPriorError(f"{path} cannot be read: permission denied") from error
    # A broken pickle can fail in any way; whatever it is, the file is of no use.
    except Exception as error:
        raise EbmPriorError(unreadable) from error


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
    return sha256_of_files(
        {p.relative_to(path).as_posix(): p for p in sorted(path.rglob("*")) if p.is_file()}
    )


def sha256_of_files(files: Mapping[str, Path]) -> str:
    """One SHA-256 of several files, in the order given: of their names and contents."""
    lines = (f"{name} {sha256_of(file)}\n" for name, file in files.items())
    return hashlib.sha256("".join(lines).encode()).hexdigest()
