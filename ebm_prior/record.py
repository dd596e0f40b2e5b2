"""Measured results stored with the heads, where the report and the model card find them.

A result is a small dictionary in `config.json`, under `training`, by the name of the verb
that measured it; its pictures are PNG files in `results/` beside it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from ebm_prior.files import write_bytes, write_json
from ebm_prior.saved import CONFIG, read_config

__all__ = ["RESULTS", "record"]

RESULTS = "results"


def record(
    folder: Path, name: str, result: dict, pictures: Mapping[str, bytes] | None = None
) -> None:
    """Store a result, in the place of an earlier one of the same name.

    Args:
        folder: Run folder or saved folder.
        name: Verb that measured it, such as "evaluation".
        result: Plain values, a few kilobytes: curves thinned to some hundred points.
        pictures: PNG files by name, such as `{"ood.png": ...}`.

    Raises:
        EbmPriorError: If the folder holds no heads.
    """
    config = read_config(folder)  # anew: another measurement may have finished meanwhile
    for file_name, content in (pictures or {}).items():
        write_bytes(folder / RESULTS / file_name, content)
    config.setdefault("training", {})[name] = result
    write_json(folder / CONFIG, config)
