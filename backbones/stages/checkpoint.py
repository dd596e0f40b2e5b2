"""Session folders of both families: finding the files, checking that they fit together."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from backbones.stages.layers import Dense, Layer, PSwish, Shape
from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import load_torch_file, mentions, plain_state, shown
from ebm_prior.saved import is_text

__all__ = [
    "check_extent", "check_state", "fill", "is_session", "kernel_of", "network_files", "option",
    "padded", "positive", "read_session",
]  # fmt: skip

FILES = {
    "biva": ("hyperparameters.p", "config.json", "model.pth"),
    "hvae": (
        "model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt", "datamodule_config.pt",
    ),
}  # fmt: skip
"""Files that a session of each family must have; the state is model.pth, model_state_dict.pt."""

WEIGHTS = {"biva": "model.pth", "hvae": "model_state_dict.pt"}


DEFINING = {
    "biva": ("hyperparameters.p", "model.pth"),
    "hvae": ("model_class_name.pt", "model_kwargs.pt", "model_state_dict.pt"),
}
"""Files that two sessions share if they are the same network."""

FEW = 16  # blocks that cost nothing to build, whatever the weights are
LARGEST = 1 << 16  # of any size: no model is near it, and products stay below 2**63


def read_session(
    path: str | Path, family: str, readers: Mapping[str, Callable[[Path], Any]]
) -> tuple[dict[str, Path], dict[str, Any]]:
    """What the files of a session hold.

    Args:
        path: Its folder, a file inside it, or all of it converted into one `.safetensors` file.
        family: "biva" or "hvae".
        readers: How each file is read where it was not converted.

    Returns:
        By each file's name, its path (where converted, always the same) and its contents.

    Raises:
        EbmPriorError: If a file is missing or cannot be read, or is of another family.
    """
    path = Path(path)
    if not _is_converted(path):
        files = _find_files(path, family)
        return files, {name: read(files[name]) for name, read in readers.items()}
    data = load_torch_file(path)
    if isinstance(data, Mapping) and data.keys() == readers.keys():
        return dict.fromkeys(readers, path), dict(data)
    other = _other_family(path, path.parent, family)
    name = family.upper()
    raise EbmPriorError(f"{path} is no {name} session{f': {other}' if other else ''}")


def _is_converted(path: Path) -> bool:
    return path.suffix == ".safetensors" and path.is_file()


def _find_files(path: Path, family: str) -> dict[str, Path]:
    """The files of a session, by name, from its folder or from a file inside it."""
    if not path.exists():
        raise EbmPriorError(f"no such checkpoint: {path}")
    folder = path if path.is_dir() else path.parent
    files = {name: folder / name for name in FILES[family]}
    name = family.upper()
    if path.is_file() and path.name not in files:
        files[WEIGHTS[family]] = path  # weights under a name of the user's own
    missing = [file for file, where in files.items() if not where.is_file()]
    if not missing:
        return files
    if other := _other_family(path, folder, family):
        raise EbmPriorError(f"{path} is no {name} session: {other}")
    raise EbmPriorError(
        f"{folder} is no complete {name} session folder: no {' and no '.join(missing)} in it; "
        "copy the whole folder that the training code wrote"
    )


def network_files(path: str | Path, family: str) -> dict[str, Path] | None:
    """The files of a session that make its network, whichever was given; None if converted."""
    path = Path(path)
    if _is_converted(path):
        return None
    files = _find_files(path, family)
    return {name: files[name] for name in DEFINING[family]}


def is_session(path: Path, family: str) -> bool:
    """Whether a path is, belongs to, or was a folder of this family; no file is loaded."""
    if _is_converted(path):
        return mentions(path, FILES[family][0])
    folder = path if path.is_dir() else path.parent
    if not (folder / FILES[family][0]).is_file():
        return False
    # or weights under a name of the user's own
    return path.is_dir() or path.name in FILES[family] or mentions(path, "stages.")


def _other_family(path: Path, folder: Path, family: str) -> str:
    """What shows that the path belongs to another family; empty if nothing does."""
    for other, files in FILES.items():
        if other != family and _is_converted(path) and is_session(path, other):
            return f"it looks like one of {other.upper()}; use backbone {other} on it"
        if other != family and (folder / files[0]).is_file():
            return f"{folder} looks like one of {other.upper()}; use backbone {other} on it"
    file = path if path.is_file() else folder / "checkpoint.pt"
    try:
        data = load_torch_file(file, allowed=[argparse.Namespace])
    except EbmPriorError:
        return ""
    if isinstance(data, Mapping) and {"args", "state_dict"} <= data.keys():
        return f"{file} looks like an NVAE checkpoint; use backbone nvae on it"
    return ""


def option(key: Any, options: Mapping[Any, Any]) -> str:
    """A stranger's option for a message, such as stride=2."""
    return f"{key if is_text(key) else shown(key)}={shown(options[key])}"


def positive(value: Any, what: str, path: Path) -> int:
    """`value` as a positive whole number, or an error that names it."""
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value <= LARGEST:
        raise EbmPriorError(
            f"{path}: {what} is {shown(value)}, expected a whole number in 1..{LARGEST}"
        )
    return value


def padded(shape: Shape, value: Any, what: str, path: Path) -> tuple[Shape, tuple[int, int]]:
    """Shape that the network works on, and the zeros on each side.

    Args:
        shape: (C, H, W) of the images.
        value: The padded shape that the configuration states, or None.
        what: Its name there.
        path: File it is in.
    """
    if value is None:
        return shape, (0, 0)
    if not isinstance(value, (list, tuple)) or len(value) < 2:
        raise EbmPriorError(f"{path}: {what}={shown(value)} is not supported")
    sizes = [positive(n, f"a size in {what}", path) for n in value[-2:]]
    excess = [n - m for n, m in zip(sizes, shape[1:], strict=True)]
    if any(n < 0 or n % 2 for n in excess):
        raise EbmPriorError(
            f"{path}: {what}={shown(value)} around {shape[1]}x{shape[2]} images is not "
            "supported; the same padding must fit on both sides"
        )
    return (shape[0], *sizes), (excess[0] // 2, excess[1] // 2)


def check_extent(stages: Sequence[Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse lists of far more blocks than there are weights, before building any.

    Args:
        stages: A list of blocks per stage, not checked yet.
        state: Stored weights; where there are none, nothing is refused.
        path: File the stages are in.
    """
    blocks = sum(len(stage) for stage in stages if isinstance(stage, (list, tuple)))
    if state and blocks > max(len(state), FEW):
        raise EbmPriorError(
            f"{path} describes {blocks} blocks, far more than the {len(state)} weights beside it; "
            "use the folder as the training code wrote it"
        )


def check_state(data: Any, path: Path) -> dict[str, Tensor]:
    """What a file holds as its state dict: float32 tensors, checked to be finite."""
    if not isinstance(data, Mapping) or not data:
        raise EbmPriorError(
            f"{path} holds a {type(data).__name__}, not weights; the files of the folder may be "
            "swapped"
        )
    return plain_state(data, path, "; the files of the folder may be swapped")


def kernel_of(state: Mapping[str, Tensor], layer: str) -> tuple[int, int] | None:
    """(output channels, kernel size) of a stored convolution; None where there is none.

    For the few blocks whose geometry the configuration does not state.
    """
    for name in ("weight_v", "weight"):
        weight = state.get(f"{layer}.conv.{name}")
        if weight is not None and weight.ndim == 4:
            return weight.shape[0], weight.shape[2]
    return None


def fill(
    network: nn.Module, state: Mapping[str, Tensor], path: Path, ignored: Sequence[str] = ()
) -> None:
    """Check that stored weights are exactly those of the network, fold and assign them.

    Args:
        network: The network, on the meta device.
        state: Weights under the public keys.
        path: File they came from, for messages.
        ignored: Endings of keys that evaluation does not read.

    Raises:
        EbmPriorError: Naming the first keys that do not fit, or a layer that had not been
            initialised from data yet.
    """
    layers = {name: m for name, m in network.named_modules() if isinstance(m, Layer)}
    expected: dict[str, tuple[int, ...]] = {}
    for name, layer in layers.items():
        expected |= {f"{name}.{key}": shape for key, shape in layer.stored().items()}
    plain = {
        key: value
        for key, value in network.state_dict().items()
        if not any(key.startswith(f"{name}.") for name in layers)
    }
    expected |= {key: tuple(value.shape) for key, value in plain.items()}
    scalars = {f"{n}.beta" for n, m in network.named_modules() if isinstance(m, PSwish)}
    given = {
        # The code may keep a scalar as (1,).
        key: value.reshape(()) if key in scalars and value.numel() == 1 else value
        for key, value in state.items()
        if not key.endswith(tuple(ignored))
    }
    for key in _idle(network) & scalars - given.keys():
        given[key] = torch.ones(())
    _compare(expected, given, path)
    result = {key: given[key] for key in plain}
    for name, layer in layers.items():
        stored = {key: given[f"{name}.{key}"] for key in layer.stored()}
        if not stored["initialized"] and (layer.normed or not isinstance(layer, Dense)):
            raise EbmPriorError(
                f"{path}: {name}.initialized is False: the weights had not been initialised from "
                "data when they were saved; use a later checkpoint"
            )
        result |= {f"{name}.{key}": value for key, value in layer.fold(stored).items()}
    for key, value in result.items():
        if value.is_floating_point() and not torch.isfinite(value).all():
            raise EbmPriorError(f"{path}: {key} has a weight direction of length zero")
    network.load_state_dict(result, assign=True)


def _idle(network: nn.Module) -> set[str]:
    """Scalars of activations that are never applied; files may lack them."""
    return {
        f"{name}.{part}.beta"
        for name, module in network.named_modules()
        if hasattr(module, "unused")
        for part in module.unused()
    }


def _compare(
    expected: Mapping[str, tuple[int, ...]], given: Mapping[str, Tensor], path: Path
) -> None:
    misshaped = [
        f"{key} {tuple(given[key].shape)} instead of {shape}"
        for key, shape in expected.items()
        if key in given and tuple(given[key].shape) != shape
    ]
    mistyped = [
        f"{key} of {value.dtype}"
        for key, value in given.items()
        if key in expected and value.is_floating_point() == key.endswith(".initialized")
    ]
    problems = []
    for label, keys in (
        ("missing", [key for key in expected if key not in given]),
        ("unexpected", [key for key in given if key not in expected]),
        ("misshaped", misshaped),
        ("mistyped", mistyped),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{label} {', '.join(keys[:3])}{more}")
    if problems:
        raise EbmPriorError(
            f"{path}: the weights do not fit the folder's own configuration: "
            f"{'; '.join(problems)}. Use the folder as the training code wrote it"
        )
