"""Read checkpoints from strangers without running anything in them."""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import pickle
import pickletools
import struct
import warnings
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import torch
from safetensors import safe_open
from torch import Tensor

from ebm_prior.errors import EbmPriorError

FORMAT_KEY = "ebm_prior_checkpoint"  # of the metadata of a checkpoint in safetensors

__all__ = [
    "Named", "load_pickle_file", "load_torch_file", "mentions", "plain_state", "printable",
    "sha256_of", "sha256_of_files", "sha256_of_weights", "shown",
]  # fmt: skip

MAX_INDEX = 1 << 26  # bytes of a checkpoint's pickle; the largest seen has a few MB
MAX_STRUCTURE = 1 << 23  # characters of a converted checkpoint's structure; ours have 30 kB
MAX_PICKLE = 1 << 18  # bytes of a plain pickle; the largest seen has a few kB
MAX_DEPTH = 100  # of containers in containers; checkpoints have about ten
MAX_SHOWN = 80  # characters of a value in a message


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
        _check_torch_outlines(path)
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


def _check_torch_outlines(path: Path) -> None:
    """`_check_outline` of whatever `torch.load` unpickles from a file."""
    with path.open("rb") as file:
        if file.peek(4)[:4] != b"PK\x03\x04":
            for _ in range(5):  # before zip: so many pickles in a row, then the weights
                if file.peek(1):
                    _check_outline(file, path)
            return
    with zipfile.ZipFile(path) as archive:
        for entry in archive.infolist():
            if entry.filename.lower().endswith("data.pkl"):
                _check_outline(io.BytesIO(archive.read(entry)), path)


def _check_outline(file: BinaryIO, path: Path) -> None:
    """Follow a pickle to its end without making its objects, to see how they are nested.

    A few bytes can describe a list of twice the same list of twice the same list, and so
    on, which takes for ever to print or, of tuples, to hash. They can also ask for a table
    of memos with billions of places.

    Raises:
        EbmPriorError: If what it describes is far larger than itself when written out, is
            nested very deeply or in itself, or a memo has a number beyond the pickle's own.
    """
    atom: list[Any] = []  # a container is the list of what it holds, all else is this
    containers, stack, marks = [atom], [], []
    memo: dict[int, list[Any]] = {}
    count = 0
    for op, arg, _ in pickletools.genops(file):
        count += 1
        if op.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            index = len(memo) if arg is None else arg
            if index > count:
                raise EbmPriorError(
                    f"{path} is damaged: it numbers {index} objects; fetch it again"
                )
            memo[index] = stack[-1]
        elif op.name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(memo[arg])
        elif op.name == "DUP":
            stack.append(stack[-1])
        elif op.name == "MARK":
            marks.append(len(stack))
        elif op.name.startswith("EMPTY_"):
            stack.append([])
            containers.append(stack[-1])
        elif not op.stack_before:
            stack += [atom] * len(op.stack_after)
        elif op.name == "STOP":
            break
        else:
            marked = pickletools.markobject in op.stack_before
            first = len(stack) - len(op.stack_before)
            if marked:  # with what precedes the mark, and all that follows it
                first = marks.pop() - op.stack_before.index(pickletools.markobject)
            held = stack[first:]
            del stack[first:]
            if op.name in ("APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"):
                target = held.pop(0)
                if target is atom:
                    raise ValueError(f"{op.name} to what holds nothing")
                target += held
                stack.append(target)
            elif op.stack_after:
                stack.append(held)
                containers.append(held)
            else:  # no pickler takes back what it wrote
                raise ValueError(op.name)
    if not _is_modest(containers, 8 * count + (1 << 16)):
        raise EbmPriorError(
            f"{path} describes far more than it holds, by naming the same parts over and over; "
            "use the file as its training code wrote it"
        )


def _is_modest(containers: Sequence[list[Any]], limit: int) -> bool:
    """Whether nested lists, written out, have up to `limit` entries, no loop and a small depth."""
    sizes: dict[int, tuple[int, int]] = {}  # by identity: entries and depth
    begun = set()
    todo = list(containers)
    while todo:
        node = todo[-1]
        waiting = [] if id(node) in sizes else [c for c in node if id(c) not in sizes]
        if waiting:
            if id(node) in begun:  # by its own contents
                return False
            begun.add(id(node))
            todo += waiting
            continue
        todo.pop()
        if id(node) not in sizes:
            parts = [sizes[id(child)] for child in node]
            size, depth = 1 + sum(n for n, _ in parts), 1 + max((d for _, d in parts), default=0)
            if size > limit or depth > MAX_DEPTH:
                return False
            sizes[id(node)] = size, depth
    return True


def shown(value: Any, depth: int = 2) -> str:
    """A stranger's value for a message: one short line, whatever it is."""
    if isinstance(value, (list, tuple)):
        some = ", ".join(shown(v, depth - 1) for v in value[:4]) if depth else ""
        more = "" if depth and len(value) <= 4 else "..."
        text = f"{some}, {more}" if some and more else some + more
        if isinstance(value, list):
            return f"[{text}]"
        return f"({text},)" if len(value) == 1 else f"({text})"
    if isinstance(value, int) and value.bit_length() > 2 * MAX_SHOWN:
        return f"a number of {value.bit_length()} bits"
    if isinstance(value, (str, bytes)):
        text = repr(value[:MAX_SHOWN])
    elif value is None or isinstance(value, (bool, int, float, Named)):
        text = repr(value)
    else:
        return f"a {type(value).__name__}"
    return printable(text if len(text) <= MAX_SHOWN + 2 else f"{text[:MAX_SHOWN]}...")


def printable(text: str) -> str:
    """Text with line ends and whatever else could move a terminal's cursor written as codes."""
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def _load_converted(path: Path) -> Any:
    """What a checkpoint was before `ebm_prior.convert` made safetensors of it."""
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(FORMAT_KEY)
            if text is None:
                raise EbmPriorError(f"{path} is no converted checkpoint: it holds bare tensors")
            if len(text) > MAX_STRUCTURE:
                raise ValueError(f"its structure has {len(text)} characters")
            tensors: dict[str, Tensor] = {}
            data = _decode(json.loads(text), file, tensors)
            if tensors.keys() != set(file.keys()):
                raise ValueError("it holds tensors that its structure does not name")
            return data
    except EbmPriorError:
        raise
    # Whatever fails, a kind of number that torch lacks included, the file is of no use.
    except Exception as error:
        line = printable(str(error))[: 2 * MAX_SHOWN]
        raise EbmPriorError(f"{path} is damaged: {line}; fetch it again") from error


def _decode(node: Any, file: Any, tensors: dict[str, Tensor], depth: int = 0) -> Any:
    ((kind, value),) = node.items() if isinstance(node, dict) else (("", None),)
    if depth > MAX_DEPTH:
        raise ValueError(f"its tables and lists are more than {MAX_DEPTH} deep")
    if kind == "tensor" and isinstance(value, str):
        # one tensor whatever the number of its names, as in the original
        if value not in tensors:
            tensors[value] = file.get_tensor(value)
        return tensors[value]
    if kind in ("table", "namespace") and isinstance(value, dict):
        table = {k: _decode(entry, file, tensors, depth + 1) for k, entry in value.items()}
        return argparse.Namespace(**table) if kind == "namespace" else table
    if kind == "list" and isinstance(value, list):
        return [_decode(entry, file, tensors, depth + 1) for entry in value]
    if kind == "name" and isinstance(value, str):
        return Named(value)
    if kind == "value" and not isinstance(value, (dict, list)):
        return value
    raise ValueError(f"unknown entry {shown(kind)}")


def mentions(path: str | Path, word: str) -> bool:
    """Whether a file of `torch.save` holds a word, such as a weight's name, in its pickle.

    Or one converted from it in its header. For telling families apart: nothing is unpickled
    and no weight is read. False for whatever is no such file.
    """
    path = Path(path)
    try:
        if path.suffix == ".safetensors":
            with path.open("rb") as file:
                (length,) = struct.unpack("<Q", file.read(8))
                header = file.read(min(length, MAX_INDEX))
            return FORMAT_KEY.encode() in header and word.encode() in header
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
    except (OSError, ValueError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile):
        return False


def plain_state(state: Mapping[Any, Any], path: Path, hint: str = "") -> dict[str, Tensor]:
    """Weights as float32 and their flags and counts as they are, by name.

    Args:
        state: What a file holds as its state dict.
        path: The file, for messages.
        hint: What to add where an entry is no named tensor.

    Raises:
        EbmPriorError: If an entry is no named tensor, or they claim more numbers than the
            file holds (a few bytes can be declared to be terabytes, one by one or by naming
            the same ones again and again), or one is not finite.
    """
    held, claimed = {}, 0
    for key, value in state.items():
        if not isinstance(key, str) or not key.isprintable() or not isinstance(value, Tensor):
            raise EbmPriorError(f"{path}: entry {shown(key)} is not a named tensor{hint}")
        stored = value.layout == torch.strided and value.device.type == "cpu"
        if not stored or value.untyped_storage().nbytes() < value.numel() * value.element_size():
            raise EbmPriorError(
                f"{path}: weight {key} is not stored in full; use the file as its training code "
                "wrote it"
            )
        held[value.untyped_storage().data_ptr()] = value.untyped_storage().nbytes()
        claimed += 4 * value.numel()
    # Bytes may become float32, and few weights are tied to others.
    if claimed > 8 * sum(held.values()):
        raise EbmPriorError(
            f"{path}: its {len(state)} entries are views of far fewer weights; use the file as "
            "its training code wrote it"
        )
    plain = {}
    for key, value in state.items():
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
        EbmPriorError: If the file is missing, not a small pickle, calls something, or
            mentions a name outside the table.
    """
    path = Path(path)
    if not path.is_file():
        raise EbmPriorError(f"no such file: {path}")
    unreadable = f"{path} is not a readable pickle (truncated, swapped or of another kind)"
    try:
        with path.open("rb") as opened:
            file = io.BytesIO(opened.read(MAX_PICKLE + 1))
        if len(file.getbuffer()) > MAX_PICKLE:
            raise EbmPriorError(unreadable)
        _check_outline(file, path)
        if file.read(1):  # a torch file of the old format is several pickles in a row
            raise EbmPriorError(unreadable)
        file.seek(0)
        return _TableUnpickler(file, table, path).load()
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


def sha256_of_weights(module: torch.nn.Module) -> str:
    """SHA-256 of every parameter and buffer, also of those that no checkpoint holds."""
    digest = hashlib.sha256()
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        flat = tensor.detach().cpu().contiguous().flatten()
        digest.update(flat.view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
