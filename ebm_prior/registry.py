"""Find and load backbones: adapters register under the entry-point group `ebm_prior.backbones`.

An entry point names a function `load(path, device) -> Backbone`. This package's own
adapters register in `pyproject.toml` exactly as a third party's would.

The module that holds `load` may also hold `recognises(path) -> bool`, so that users need not
name the family. It should be quick and must run nothing of the file; an exception counts as
a no, and the first line of its docstring says what it looks for.

A family whose checkpoints are not one file of `torch.save` each may also hold
`contents(path) -> dict`: plain values and tensors that `ebm_prior.convert` makes one file of.
Its `load` then gets them back from `load_torch_file` on that file.

Trainers register under `ebm_prior.pretrain` (stage one) and `ebm_prior.train` (a backbone and
its heads together), by the name of their family.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import os
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import load_torch_file, sha256_of, sha256_of_files

__all__ = [
    "check_device", "detect_backbone", "find_trainer", "list_backbones", "load_backbone",
    "read_contents",
]  # fmt: skip

ENTRY_POINT_GROUP = "ebm_prior.backbones"
TRAINER_GROUP = "ebm_prior.pretrain"
JOINT_GROUP = "ebm_prior.train"


def list_backbones() -> tuple[str, ...]:
    """Names of all installed backbone families, sorted."""
    return tuple(sorted({entry.name for entry in entry_points(group=ENTRY_POINT_GROUP)}))


@torch.inference_mode(False)  # weights made in inference mode could never be differentiated
def load_backbone(name: str, path: str | Path, device: str | torch.device = "cpu") -> Backbone:
    """Load a pretrained backbone, frozen and in evaluation mode.

    Args:
        name: Family, one of `list_backbones()`.
        path: Checkpoint as the family's own training code writes it.
        device: Where the weights go.

    Raises:
        EbmPriorError: If the family is unknown, the device is absent, or the checkpoint
            cannot be read, is of another family, or does not fit its own arguments.
    """
    device = check_device(device)
    path = Path(path)
    if not path.exists():
        raise EbmPriorError(f"no such checkpoint: {path}")
    adapter = _find(name).load()
    try:
        backbone = adapter(path, device).freeze()
    except EbmPriorError:
        raise
    except Exception as error:  # an adapter, perhaps someone else's, that did not foresee it
        raise _unforeseen(path, name, error) from error
    backbone.name = name
    backbone.checkpoint = str(path)
    backbone.sha256 = sha256_of_files(backbone.files) if backbone.files else sha256_of(path)
    return backbone


def _unforeseen(path: object, name: str, error: Exception) -> EbmPriorError:
    line = (str(error).strip().splitlines() or [""])[0]
    return EbmPriorError(f"{path} cannot be loaded as {name}: {type(error).__name__}: {line}")


def detect_backbone(path: str | Path) -> str:
    """Family of a checkpoint, by asking every installed adapter that `recognises` its own.

    Args:
        path: Checkpoint as some family's training code writes it. It is not loaded.

    Raises:
        EbmPriorError: If there is no such file or folder, or not exactly one family
            recognises it.
    """
    path = Path(path)
    if not path.exists():
        raise EbmPriorError(f"no such checkpoint: {path}")
    found, sought = [], []
    for name in list_backbones():
        # a broken plug-in of someone else's must not stop the others
        with suppress(Exception):
            recognises = importlib.import_module(_find(name).module).recognises
            sought.append(f"{name}: {_first_line(recognises)}")
            if recognises(path):
                found.append(name)
    if len(found) == 1:
        return found[0]
    if found:
        raise EbmPriorError(
            f"{path} may belong to {' or '.join(found)}; say which with --backbone"
        )
    raise EbmPriorError(
        f"{path} is no checkpoint of a known family; looked for {'; '.join(sought) or 'nothing'}. "
        "Give its right path, or name its family with --backbone"
    )


def _first_line(function: Callable) -> str:
    """First line of a docstring as part of a sentence."""
    line = (inspect.getdoc(function) or "Its own files.").splitlines()[0]
    return (line[0].lower() + line[1:]).rstrip(".").replace("`", "")


def read_contents(name: str, path: str | Path) -> Any:
    """What a checkpoint of this family holds: plain values and tensors, nothing that can run.

    Raises:
        EbmPriorError: If it cannot be read.
    """
    contents = getattr(importlib.import_module(_find(name).module), "contents", None)
    if contents is None:
        return load_torch_file(path, allowed=[argparse.Namespace])
    try:
        return contents(Path(path))
    except EbmPriorError:
        raise
    except Exception as error:  # as in `load_backbone`
        raise _unforeseen(path, name, error) from error


def find_trainer(name: str, group: str = TRAINER_GROUP) -> Callable:
    """The function that trains a family's backbone: stage one, or with its heads.

    Args:
        name: Family.
        group: Entry-point group: `TRAINER_GROUP` for stage one, `JOINT_GROUP` for both.
    """
    return _find(name, group).load()


def _find(name: str, group: str = ENTRY_POINT_GROUP) -> EntryPoint:
    entries = {entry.name: entry for entry in entry_points(group=group)}
    if name not in entries:
        what = "backbone" if group == ENTRY_POINT_GROUP else "trainer"
        raise EbmPriorError(
            f"unknown {what} {name!r}; installed: {', '.join(sorted(entries)) or 'none'}"
        )
    return entries[name]


def check_device(device: str | torch.device) -> torch.device:
    """Parse a device name; raise `EbmPriorError` where this machine does not have it."""
    try:
        device = torch.device(device)
    except RuntimeError:
        known = False
    else:
        known = device.type in ("cpu", "cuda", "mps")
    if not known:
        raise EbmPriorError(f"unknown device {str(device)!r}; use cpu, cuda, cuda:1 or mps")
    if device.type == "cuda":
        if device.index is None and int(os.environ.get("WORLD_SIZE", "1")) > 1:  # one GPU each
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        count = torch.cuda.device_count()
        if count == 0:
            raise EbmPriorError("no CUDA device on this machine; use --device cpu")
        if device.index is not None and device.index >= count:
            raise EbmPriorError(f"{device} does not exist; this machine has {count} CUDA devices")
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise EbmPriorError("no MPS device on this machine; use --device cpu")
    return device
