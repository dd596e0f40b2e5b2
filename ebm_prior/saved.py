"""A folder of heads, and what is checked before any of it is believed.

heads.safetensors   the heads' weights
config.json         format version, heads, sampler, backbone and its SHA-256, training
README.md           the model card; never read back

Only these JSON and safetensors files are ever read, so nothing in a folder can run. Whoever
wrote it may still have meant harm: the configuration is checked field by field, the weights
against what the configuration describes, and both before anything is built from them.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from copy import deepcopy
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ebm_prior._version import __version__
from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError
from ebm_prior.heads import check_layers, make_heads

if TYPE_CHECKING:
    from ebm_prior.prior import EnergyPrior

__all__ = [
    "check_config", "check_fits", "check_size", "count_weights", "fitted_on", "heads_bytes",
    "prior_config", "read_config", "read_weights", "shareable",
]  # fmt: skip

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD = "heads.safetensors", "config.json", "README.md"
BACKBONE = "backbone.safetensors"
MAX_CONFIG = 1 << 20  # bytes; ours have 5 kB, with every result recorded 50 kB
MAX_PARAMETERS = 1 << 30  # of all heads together; the paper's have 20 million
MAX_GROUPS = 1024
MAX_SIDE = 1 << 16  # of a shape, and of nef and ndf
MAX_TEXT = 500  # characters of a name
FLOATS = {"F16", "BF16", "F32", "F64"}


def prior_config(prior: EnergyPrior) -> dict:
    """Everything needed to rebuild the heads and recognise their backbone."""
    backbone = prior.backbone
    return {
        "format_version": FORMAT_VERSION,
        "library": f"ebm-prior {__version__}",
        "backbone": {
            "name": backbone.name,
            "dataset": backbone.dataset,
            "checkpoint": Path(backbone.checkpoint).name,
            "sha256": backbone.sha256,
            "groups": [[group.name, list(group.shape)] for group in backbone.groups],
            "feature_shape": list(backbone.feature_shape),
            "image_shape": list(backbone.image_shape),
            "parameters": sum(p.numel() for p in backbone.parameters()),
        },
        **prior.config(),
    }


def shareable(config: dict) -> dict:
    """A copy without the paths of the machine it was made on.

    They are of no use elsewhere and nobody else's business; and the other way round, a
    stranger's configuration must not choose which local files are read.
    """
    config = deepcopy(config)
    config["backbone"].pop("path", None)
    training = config.get("training")
    data = training.get("data") if isinstance(training, dict) else None
    source = data.get("source") if isinstance(data, dict) else None
    if data is not None and not (isinstance(source, str) and re.fullmatch(r"[\w-]+", source)):
        del training["data"]
    return config


def heads_bytes(prior: EnergyPrior) -> bytes:
    """The heads' weights as a safetensors file."""
    return save({k: v.detach().cpu().contiguous() for k, v in prior.heads.state_dict().items()})


def read_config(folder: Path, where: str | None = None) -> dict:
    """Read and check `config.json` of a folder of heads.

    Args:
        folder: Where it is.
        where: Named in messages; the path by default.

    Raises:
        EbmPriorError: If it is missing, too large, no JSON, or a field is wrong.
    """
    path = folder / CONFIG
    try:
        with path.open("rb") as file:
            text = file.read(MAX_CONFIG + 1)
    except FileNotFoundError as error:
        raise EbmPriorError(f"{folder} holds no {CONFIG}; it is not a folder of heads") from error
    except OSError as error:
        raise EbmPriorError(f"{path} cannot be read: {error.strerror}") from error
    return check_config(text, where or path)


def check_config(text: bytes, where: object) -> dict:
    """Parse a configuration and check every field that is used.

    Args:
        text: Contents of `config.json`.
        where: Named in messages.

    Raises:
        EbmPriorError: If it is too large, no JSON, or a field is wrong; the field is named.
    """
    if len(text) > MAX_CONFIG:
        raise EbmPriorError(
            f"{where} has more than {MAX_CONFIG} bytes; it is no {CONFIG} of heads"
        )
    try:
        config = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise EbmPriorError(f"{where} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise EbmPriorError(f"{where}: expected a JSON object")
    version = config.get("format_version")
    if not isinstance(version, int) or isinstance(version, bool) or version < 1:
        raise EbmPriorError(f"{where}: field format_version is missing or no version number")
    if version > FORMAT_VERSION:
        raise EbmPriorError(
            f"{where} has format version {version}, this library reads up to {FORMAT_VERSION}; "
            "update with: pip install -U ebm-prior"
        )
    _Fields(config, where).check()
    expected_tensors(config, where)
    return config


class _Fields:
    """Checks the fields of one configuration; the first wrong one is named."""

    def __init__(self, config: dict, where: object) -> None:
        self.config, self.where = config, where

    def check(self) -> None:
        from ebm_prior.prior import HEAD_KINDS
        from ebm_prior.transitions import TRANSITIONS

        self.choice("heads.kind", HEAD_KINDS)
        self.whole("heads.nef", MAX_SIDE)
        self.whole("heads.ndf", MAX_SIDE)
        self.choice("sampler.transition", tuple(TRANSITIONS))
        self.whole("sampler.steps", 1 << 24)
        step_size = self.value("sampler.step_size", (int, float))
        if not 0 < step_size < 1e6:
            raise self.error("sampler.step_size", "must be positive and below 1e6")
        self.text("backbone.name")
        self.text("backbone.sha256")  # any word for a backbone made in memory
        groups = self.value("backbone.groups", list)
        if not 1 <= len(groups) <= MAX_GROUPS:
            raise self.error("backbone.groups", f"must list 1 to {MAX_GROUPS} groups")
        for group in groups:
            if not (isinstance(group, list) and len(group) == 2 and is_text(group[0])):
                raise self.error("backbone.groups", "must list [name, shape] pairs")
            if not _is_shape(group[1]):
                raise self.error("backbone.groups", f"must list [name, shape] pairs, not {group}")
        if len({name for name, _ in groups} | {"joint"}) != len(groups) + 1:
            raise self.error("backbone.groups", "must have names that differ, and not 'joint'")
        if not _is_shape(self.value("backbone.feature_shape", list)):
            raise self.error("backbone.feature_shape", "must be (D,) or (C, H, W)")
        if (layers := self.value("heads.layers", list, optional=True)) is not None:
            try:
                check_layers(layers, [*_head_shapes(self.config)])
            except EbmPriorError as error:
                raise self.error("heads.layers", f"is wrong: {error}") from error
        for name in ("dataset", "checkpoint", "path", "source", "license"):
            self.text(f"backbone.{name}", optional=True)
        self.text("license", optional=True)
        if self.value("backbone.converted", dict, optional=True) is not None:
            self.sha256("backbone.converted.sha256")
            self.whole("backbone.converted.size", 1 << 40)
        if "training" in self.config:
            self.value("training", dict)

    def error(self, name: str, what: str) -> EbmPriorError:
        return EbmPriorError(f"{self.where}: field {name} {what}")

    def value(self, name: str, kind: Any, optional: bool = False) -> Any:
        value: Any = self.config
        for key in name.split("."):
            value = value.get(key) if isinstance(value, dict) else None
        if value is None and optional:
            return None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise self.error(name, "is missing or of a wrong type")
        return value

    def whole(self, name: str, limit: int) -> None:
        if not 1 <= self.value(name, int) <= limit:
            raise self.error(name, f"must lie in 1..{limit}")

    def sha256(self, name: str) -> None:
        if not re.fullmatch("[0-9a-f]{64}", self.value(name, str)):
            raise self.error(name, "must be 64 hexadecimal digits")

    def choice(self, name: str, choices: tuple[str, ...]) -> None:
        if self.value(name, str) not in choices:
            raise self.error(name, f"must be one of {', '.join(choices)}")

    def text(self, name: str, optional: bool = False) -> None:
        value = self.value(name, str, optional)
        if value is not None and not is_text(value):
            raise self.error(name, f"must be one printable line of up to {MAX_TEXT} characters")


def is_text(value: object) -> bool:
    """Whether a value can stand in a message: no control characters, not endless."""
    return isinstance(value, str) and len(value) <= MAX_TEXT and value.isprintable()


def is_number(value: object) -> bool:
    """Whether a value can be shown as a number: finite, and not endless."""
    return type(value) in (int, float) and abs(value) < 1e15  # which NaN is not


def _is_shape(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) in (1, 3)
        and all(type(n) is int and 1 <= n <= MAX_SIDE for n in value)
    )


def _head_shapes(config: dict) -> dict[str, tuple[int, ...]]:
    """Name and input shape of every head that a configuration describes."""
    from ebm_prior.prior import head_shapes

    backbone = config["backbone"]
    return head_shapes(backbone["groups"], backbone["feature_shape"], config["heads"]["kind"])


def expected_tensors(config: dict, where: object) -> dict[str, Tensor]:
    """The heads' tensors that a configuration describes, on the meta device: no memory.

    Raises:
        EbmPriorError: If they are far more than any heads have.
    """
    heads, shapes = config["heads"], _head_shapes(config).values()
    with torch.device("meta"):
        module = make_heads(shapes, heads["nef"], heads["ndf"], heads.get("layers"))
    tensors = dict(module.state_dict())
    count = sum(tensor.numel() for tensor in tensors.values())
    if count > MAX_PARAMETERS:
        raise EbmPriorError(
            f"{where}: fields heads and backbone.groups describe {count} parameters; at most "
            f"{MAX_PARAMETERS} are read"
        )
    return tensors


def check_size(size: int, config: dict, where: object) -> None:
    """Refuse weights too small or too large for their configuration, before they are fetched.

    Args:
        size: Bytes of `heads.safetensors`.
        config: Checked configuration.
        where: Named in messages.
    """
    tensors = expected_tensors(config, where)
    numbers = sum(tensor.numel() for tensor in tensors.values())
    header = 256 * len(tensors) + 4096
    if not 2 * numbers <= size <= 8 * numbers + header:  # half to double precision
        raise EbmPriorError(
            f"{where} has {size} bytes, which cannot be the {numbers} parameters that its "
            f"{CONFIG} describes; the two do not belong together"
        )


def read_weights(path: Path, config: dict) -> dict[str, Tensor]:
    """Weights of the heads, by name; size, names, shapes, types and values are checked.

    Args:
        path: `heads.safetensors`.
        config: The checked configuration beside it.

    Raises:
        EbmPriorError: If the file is damaged, does not fit its configuration, or holds
            anything but finite floating-point numbers.
    """
    check_size(path.stat().st_size, config, path)
    expected = expected_tensors(config, path)
    state = {}
    try:
        with safe_open(path, "pt") as file:
            names = sorted(file.keys())
            _check_names(names, file, expected, path)
            for name in names:
                state[name] = file.get_tensor(name)
    except (SafetensorError, OSError) as error:
        raise EbmPriorError(f"{path} is not a readable safetensors file: {error}") from error
    for name, tensor in state.items():
        # in single precision: a double may be finite there and not here
        if not torch.isfinite(tensor.float()).all():
            raise EbmPriorError(f"{path}: {name} holds values that are no finite numbers")
    return state


def _check_names(names: list[str], file: Any, expected: Mapping[str, Tensor], path: Path) -> None:
    """Names, shapes and types as the header states them, before any tensor is read."""
    wrong = sorted(expected.keys() ^ set(names))
    wrong += [
        name
        for name in sorted(expected.keys() & set(names))
        if tuple(file.get_slice(name).get_shape()) != tuple(expected[name].shape)
    ]
    if wrong:
        names = ", ".join(name if is_text(name) else repr(name[:50]) for name in wrong[:3])
        raise EbmPriorError(f"{path} does not fit its {CONFIG}: {names}")
    for name in names:
        if file.get_slice(name).get_dtype() not in FLOATS:
            raise EbmPriorError(f"{path}: {name} holds no floating-point numbers")


def count_weights(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            return sum(prod(file.get_slice(name).get_shape()) for name in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EbmPriorError(f"{path} is not a readable safetensors file: {error}") from error


def fitted_on(stored: dict, backbone: Backbone) -> bool:
    """Whether heads were fitted on this checkpoint, as it is or converted to safetensors.

    Args:
        stored: Field `backbone` of their configuration.
        backbone: A loaded backbone.
    """
    from ebm_prior.convert import to_safetensors

    known = (stored["sha256"], stored.get("converted", {}).get("sha256"))
    if backbone.sha256 in known:
        return True
    try:
        data = to_safetensors(backbone.name, backbone.checkpoint)
    except EbmPriorError:
        return False
    return hashlib.sha256(data).hexdigest() in known


def check_fits(config: dict, backbone: Backbone, source: object, check_hash: bool) -> None:
    """Refuse heads that were fitted on another backbone."""
    stored = config["backbone"]
    groups = [[group.name, list(group.shape)] for group in backbone.groups]
    theirs, ours = (
        " ".join("x".join(map(str, shape)) for shape in [*(s for _, s in listed), features])
        for listed, features in (
            (stored["groups"], stored["feature_shape"]),
            (groups, backbone.feature_shape),
        )
    )
    if stored["groups"] != groups or stored["feature_shape"] != list(backbone.feature_shape):
        raise EbmPriorError(
            f"{source} was fitted on another backbone: its groups and features are {theirs}, "
            f"this backbone's are {ours}"
        )
    if check_hash and not fitted_on(stored, backbone):
        raise EbmPriorError(
            f"{source} was fitted on a checkpoint with SHA-256 {stored['sha256'][:12]}..., this "
            f"one has {backbone.sha256[:12]}...; give the right checkpoint, or allow it with "
            "--any-backbone (check_backbone=False)"
        )
