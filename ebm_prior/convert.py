"""Checkpoints and heads of others in safetensors: the same numbers, nothing that can run."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save
from torch import Tensor, nn

from ebm_prior.errors import EbmPriorError
from ebm_prior.heads import EnergyHead
from ebm_prior.registry import load_backbone, read_contents
from ebm_prior.safe_load import FORMAT_KEY, Named, load_torch_file, plain_state, sha256_of

if TYPE_CHECKING:
    from ebm_prior.backbone import Backbone
    from ebm_prior.prior import EnergyPrior, SamplerConfig

__all__ = ["converted_backbone", "encode", "import_heads", "to_safetensors"]

WIDTHS = ("conv2d.conv1.weight", "linear.fc1.weight")  # nef and ndf rows
TRAINING_ONLY = {"optimizer", "scheduler", "grad_scalar"}
OPEN = {
    "afl-3.0", "apache-2.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsl-1.0", "cc0-1.0",
    "cc-by-2.0", "cc-by-3.0", "cc-by-4.0", "cc-by-sa-3.0", "cc-by-sa-4.0", "isc", "mit", "pddl",
    "unlicense", "wtfpl", "zlib",
}  # fmt: skip
"""Licences, by their Hub identifier, that let anybody pass a checkpoint on."""


def converted_backbone(config: dict, path: Path) -> bytes:
    """The backbone of some heads as a safetensors file, noted in their configuration.

    Args:
        config: Configuration of the heads; `backbone.converted` is added.
        path: The checkpoint.

    Raises:
        EbmPriorError: If it is another checkpoint, holds what cannot be converted, or its
            licence is not known to allow passing it on.
    """
    backbone = config["backbone"]
    original = load_backbone(backbone["name"], path)
    converted = original.sha256 == backbone.pop("converted", {}).get("sha256")
    if not converted and original.sha256 != backbone["sha256"]:
        raise EbmPriorError(f"{path} is not the checkpoint that the heads were fitted on")
    licence = backbone.get("license") or recorded_license(path)
    if (licence or "").lower() not in OPEN:
        raise EbmPriorError(
            f"the backbone's licence is {licence or 'not known'}, which does not let anybody pass "
            "it on; state another with --backbone-license, or leave --with-backbone out"
        )
    data = path.read_bytes() if converted else to_safetensors(backbone["name"], path)
    with TemporaryDirectory() as folder:
        copy = Path(folder) / "backbone.safetensors"
        copy.write_bytes(data)
        try:
            load_backbone(backbone["name"], copy)
        except EbmPriorError as error:
            raise EbmPriorError(
                f"{path} cannot be pushed: converted to one safetensors file, the family "
                f"{backbone['name']} does not read it ({error})"
            ) from error
    backbone["license"] = licence
    backbone["converted"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
    return data


def recorded_license(path: Path) -> str | None:
    """What the `card.json` beside a checkpoint says, if it is about this very one.

    Of a folder it states the SHA-256 of one file inside, the weights.
    """
    folder = path if path.is_dir() else path.parent
    try:
        card = json.loads((folder / "card.json").read_text())
        files = [path] if path.is_file() else [f for f in folder.iterdir() if f.is_file()]
        return card["license"] if card["sha256"] in map(sha256_of, files) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def to_safetensors(family: str, path: str | Path) -> bytes:
    """A checkpoint, a file or a folder, as one safetensors file: tensors, and JSON for the rest.

    `load_torch_file` reads it as what `registry.read_contents` found in the original. What
    only resuming the training needs is left out.

    Args:
        family: One of `list_backbones()`.
        path: The checkpoint.

    Raises:
        EbmPriorError: If it holds anything but tensors, plain values, lists, tables, argument
            lists and names.
    """
    data = read_contents(family, path)
    if isinstance(data, Mapping):
        data = {key: value for key, value in data.items() if key not in TRAINING_ONLY}
    return encode(data, path)


def encode(data: Any, path: str | Path) -> bytes:
    """What a checkpoint holds as one safetensors file, which `load_torch_file` reads.

    Args:
        data: Tensors, plain values, and lists and tables of them.
        path: Named in messages.

    Raises:
        EbmPriorError: If it holds anything else.
    """
    tensors: dict[str, Tensor] = {}
    names: dict[tuple, str] = {}

    def node(value: Any) -> Any:
        if isinstance(value, Tensor) and value.layout == torch.strided:
            # a tensor under two names is stored once
            key = (value.data_ptr(), value.dtype, value.shape, value.stride())
            if key not in names or not value.numel():
                names[key] = str(len(tensors))
                tensors[names[key]] = value.detach()
            return {"tensor": names[key]}
        if isinstance(value, Named):
            return {"name": value.name}
        if isinstance(value, argparse.Namespace):
            return {"namespace": node(vars(value))["table"]}
        if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
            return {"table": {key: node(entry) for key, entry in value.items()}}
        if isinstance(value, (list, tuple)):
            return {"list": [node(entry) for entry in value]}
        if value is None or type(value) in (bool, int, float, str):
            return {"value": value}
        raise EbmPriorError(f"{path} holds a {type(value).__name__}, which cannot be converted")

    structure = json.dumps(node(data))
    plain_state(tensors, Path(path))  # before copies are made of what may claim to be terabytes
    try:
        return save(
            {key: value.contiguous().clone() for key, value in tensors.items()},
            {FORMAT_KEY: structure},
        )
    except Exception as error:  # kinds of numbers that safetensors lacks
        raise EbmPriorError(f"{path} cannot be converted: {error}") from error


def import_heads(path: str | Path, backbone: Backbone, sampler: SamplerConfig) -> EnergyPrior:
    """Heads from a file of the paper authors' public training code, without running it.

    The file holds one state dict per latent group, `netE0` for the top group and onwards,
    with `conv2d.conv1`, ..., `linear.fc1`, ..., `linear.out` inside, and optimizer states
    beside them, which are left out. Their networks return f = -E, so the last layer
    changes its sign. Widths are read off the weights.

    Args:
        path: The `.pth` file.
        backbone: The backbone the heads were trained on. The file does not say which; the
            number and shapes of its groups are all that can be checked.
        sampler: Settings to store; the file holds none.

    Raises:
        EbmPriorError: If it is another kind of file, damaged, or does not fit the backbone.
    """
    from ebm_prior.prior import EnergyPrior

    path = Path(path)
    data = load_torch_file(path)
    found = [key for key in data if re.fullmatch(r"netE\d+", str(key))] if _is_table(data) else []
    if not found:
        raise EbmPriorError(f"{path} holds no heads netE0, netE1, ... of the authors' code")
    if len(found) != len(backbone.groups):
        raise EbmPriorError(
            f"{path} holds {len(found)} heads, this backbone has {len(backbone.groups)} groups"
        )
    states = []
    for i, group in enumerate(backbone.groups):
        state = data.get(f"netE{i}")
        if not _is_table(state):
            raise EbmPriorError(f"{path} holds no state dict netE{i}")
        state = {str(k).removeprefix("module."): v for k, v in plain_state(state, path).items()}
        if not {"conv2d.conv1.weight", "linear.fc1.weight"} <= state.keys():
            raise EbmPriorError(
                f"{path}: netE{i} ({group.name}) has no conv2d.conv1 or linear.fc1"
            )
        states.append(state)
    nef, ndf = (len(states[0][k]) for k in ("conv2d.conv1.weight", "linear.fc1.weight"))
    with torch.device("meta"):
        shapes = [EnergyHead(group.shape, nef, ndf) for group in backbone.groups]
    for i, (state, head) in enumerate(zip(states, shapes, strict=True)):
        _check_layout(state, head, f"{path}: netE{i} ({backbone.groups[i].name})")
    prior = EnergyPrior.for_backbone(backbone, "factorized", nef, ndf, sampler)
    for state, head in zip(states, prior.heads, strict=True):
        names = _their_names(head)
        head.load_state_dict({ours: state[theirs] for ours, theirs in names.items()})
        with torch.no_grad():
            for parameter in head.layers[-1].parameters():
                parameter.neg_()
    return prior


def _is_table(value: object) -> bool:
    return isinstance(value, Mapping)


def _their_names(head: EnergyHead) -> dict[str, str]:
    """Name in the authors' layout of every parameter of a head."""
    names, convs, linears = {}, 0, 0
    for i, layer in enumerate(head.layers):
        if isinstance(layer, nn.Conv2d):
            convs += 1
            theirs = f"conv2d.conv{convs}"
        elif isinstance(layer, nn.Linear):
            linears += 1
            theirs = "linear.out" if i == len(head.layers) - 1 else f"linear.fc{linears}"
        else:
            continue
        names |= {f"layers.{i}.{part}": f"{theirs}.{part}" for part in ("weight", "bias")}
    return names


def _check_layout(state: Mapping[str, Tensor], head: EnergyHead, where: str) -> None:
    """Refuse a state dict that is not that of a head of this shape."""
    names = _their_names(head)
    expected = {names[ours]: tensor.shape for ours, tensor in head.state_dict().items()}
    wrong = sorted(expected.keys() ^ state.keys())
    wrong += [k for k in sorted(expected.keys() & state.keys()) if state[k].shape != expected[k]]
    if wrong:
        size = "x".join(map(str, head.shape))
        raise EbmPriorError(
            f"{where} does not fit a group of {size}: {', '.join(map(str, wrong[:3]))}"
        )
