"""Measured results stored with the heads, where the report and the model card find them.

A result is a small dictionary in `config.json`, under `training`, by the name of the verb
that measured it: its numbers, the tables that show them, and its pictures, which are PNG
files in `results/` beside it.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from ebm_prior.errors import EbmPriorError
from ebm_prior.files import json_text, write_bytes, write_text
from ebm_prior.saved import CONFIG, MAX_CONFIG, is_text, read_config
from ebm_prior.tables import Table

__all__ = ["RESULTS", "Picture", "Recorded", "record", "recorded", "recorded_pictures"]

RESULTS = "results"
FILE_NAME = re.compile(r"[A-Za-z0-9][\w-]*\.png")
MAX_PICTURE = 32 << 20  # bytes
ORDER = ("evaluation", "ood", "anomaly", "chains", "likelihood")


class Picture(NamedTuple):
    """A PNG file and one line that says what it shows."""

    png: bytes
    caption: str


class Recorded(NamedTuple):
    """What a verb left: its tables, and the captions of its pictures by file name."""

    tables: tuple[Table, ...]
    captions: Mapping[str, str]


def record(
    folder: Path,
    name: str,
    result: dict,
    tables: Sequence[Table],
    pictures: Mapping[str, Picture] | None = None,
) -> None:
    """Store a result, in the place of an earlier one of the same name.

    Args:
        folder: Run folder or saved folder.
        name: What was measured, such as "likelihood", or with what, such as "ood: svhn".
        result: Numbers as plain values, a few kilobytes.
        tables: How to show them.
        pictures: By file name, such as `{"ood.png": ...}`.

    Raises:
        EbmPriorError: If the folder holds no heads, or its configuration would get so large
            that it could not be read again; nothing is changed then.
    """
    config = read_config(folder)  # anew: another measurement may have finished meanwhile
    pictures = pictures or {}
    config.setdefault("training", {})[name] = result | {
        "tables": [table.to_dict() for table in tables],
        "pictures": {file_name: picture.caption for file_name, picture in pictures.items()},
    }
    text = json_text(config)
    if len(text.encode()) > MAX_CONFIG:
        raise EbmPriorError(
            f"the result is too large to record in {folder / CONFIG}, which may have {MAX_CONFIG} "
            "bytes; measure in fewer repeats or steps"
        )
    for file_name, picture in pictures.items():
        write_bytes(folder / RESULTS / file_name, picture.png)
    write_text(folder / CONFIG, text)


def recorded(config: dict) -> dict[str, Recorded]:
    """The recorded results of a configuration by name; whatever is odd is left out.

    Args:
        config: It may be a stranger's.
    """
    training = config.get("training")
    found = {}
    for name, value in training.items() if isinstance(training, dict) else ():
        if not is_text(name) or not isinstance(value, dict):
            continue
        stored, captions = value.get("tables"), value.get("pictures")
        stored = stored if isinstance(stored, list) else []
        captions = captions if isinstance(captions, dict) else {}
        tables = [table for table in map(Table.from_dict, stored[:50]) if table is not None]
        captions = {
            file_name: caption
            for file_name, caption in captions.items()
            if FILE_NAME.fullmatch(file_name) and is_text(caption)
        }
        if tables or captions:
            found[name] = Recorded(tuple(tables), captions)
    order = {name: i for i, name in enumerate(ORDER)}
    names = sorted(found, key=lambda name: order.get(name.partition(": ")[0], len(order)))
    return {name: found[name] for name in names}


def recorded_pictures(folder: Path, config: dict) -> dict[str, bytes]:
    """The PNG files that recorded results name, by their path in the folder."""
    names = [name for found in recorded(config).values() for name in found.captions]
    read = {f"{RESULTS}/{name}": read_png(folder / RESULTS / name) for name in names}
    return {path: data for path, data in read.items() if data is not None}


def read_png(path: Path) -> bytes | None:
    """A picture file, or None if it is missing, endless or something else."""
    try:
        if not path.is_file():  # opening a pipe would wait for ever
            return None
        with path.open("rb") as file:
            data = file.read(MAX_PICTURE + 1)
    except OSError:
        return None
    return data if data.startswith(b"\x89PNG") and len(data) <= MAX_PICTURE else None
