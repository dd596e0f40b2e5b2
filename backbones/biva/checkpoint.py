"""BIVA's session folder: `hyperparameters.p`, `config.json` and `model.pth`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.biva.network import BivaNetwork
from backbones.stages.checkpoint import (
    check_extent,
    check_state,
    fill,
    kernel_of,
    option,
    padded,
    positive,
    read_session,
)
from backbones.stages.layers import ACTIVATIONS, BlockSpec, Shape
from backbones.stages.network import LatentSpec, StageSpec
from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import Named, load_pickle_file, load_torch_file, shown
from ebm_prior.saved import is_text

__all__ = ["DATASETS", "NAMES", "Checkpoint", "build", "contents", "read_checkpoint"]

NAMES = {
    "biva.model.stage.BivaStage": "biva",
    "biva.model.stage.LvaeStage": "lvae",
    "biva.model.stage.VaeStage": "vae",
    "biva.model.stochastic.ConvNormal": "conv",
    "biva.model.stochastic.DenseNormal": "dense",
    "torch.nn.modules.activation.Softplus": "softplus",
    "torch.nn.modules.activation.Tanh": "tanh",
}
"""All names that may occur in `hyperparameters.p`, and what they are read as."""

REQUIRED = ("Stage", "tensor_shp", "stages", "latents", "features_out", "log_var_act")
OPTIONAL = {
    "padded_shp": None, "nonlinearity": "elu", "q_dropout": 0.0, "p_dropout": 0.0, "type": None,
    "no_skip": False, "conditional_bu": False, "merge_kernel": 3, "learn_prior": False,
}  # fmt: skip
DATASETS = {"binmnist": "mnist", "cifar": "cifar10"}


@dataclass(frozen=True)
class Checkpoint:
    """A session that has been read and checked, or is about to be trained.

    Attributes:
        network: The network with its weights, on the CPU.
        image_shape: (C, H, W) of the images.
        padding: Zeros around them, (vertical, horizontal).
        mixture: Whether the likelihood is a mixture of logistics, else Bernoulli.
        dataset: Data set it was trained on.
    """

    network: BivaNetwork
    image_shape: Shape
    padding: tuple[int, int]
    mixture: bool
    dataset: str | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a session from its folder, from the weights inside, or converted into one file.

    Raises:
        EbmPriorError: If a file is missing, swapped, of another family or names anything
            foreign; if an option is not supported, or the weights do not fit.
    """
    files, parts = read_session(path, "biva", READERS)
    dataset = parts["config.json"]
    dataset = DATASETS.get(dataset, dataset) if is_text(dataset) else None
    state = check_state(parts["model.pth"], files["model.pth"])
    # Spend no memory and no random numbers on weights about to be replaced.
    with torch.device("meta"):
        checkpoint = build(parts["hyperparameters.p"], files["hyperparameters.p"], state, dataset)
    fill(checkpoint.network, state, files["model.pth"])
    return checkpoint


def contents(path: Path) -> dict[str, Any]:
    """What the files of a session hold, for converting them into one."""
    return read_session(path, "biva", READERS)[1]


def build(
    hyperparameters: Mapping[str, Any],
    where: Path,
    state: Mapping[str, Tensor],
    dataset: str | None,
) -> Checkpoint:
    """The network of these hyperparameters, with random weights.

    Args:
        hyperparameters: As in `hyperparameters.p`, with `Named` for classes and functions.
        where: Where they come from, for messages.
        state: Stored weights, for the few blocks whose geometry they alone state; may be
            empty.
        dataset: Data set to note.

    Raises:
        EbmPriorError: If an option is not supported or does not fit the others.
    """
    options = _options(hyperparameters, where)
    image_shape = _image_shape(options["tensor_shp"], where)
    in_shape, padding = padded(image_shape, options["padded_shp"], "padded_shp", where)
    outputs = positive(options["features_out"], "features_out", where)
    channels = image_shape[0]
    if outputs != channels and (channels != 3 or outputs % 10):
        raise EbmPriorError(
            f"{where}: features_out={outputs} for {channels} image channels is neither a "
            "Bernoulli nor a mixture of logistics"
        )
    specs = _stages(options, state, where)
    name = options["log_var_act"]
    try:
        network = BivaNetwork(
            specs,
            in_shape,
            outputs,
            ACTIVATIONS[options["nonlinearity"]],
            None if name is None else name.name,
        )
    except EbmPriorError as error:
        raise EbmPriorError(f"{where}: {error}") from error
    except RuntimeError as error:  # sizes beyond 64 bits
        raise EbmPriorError(f"{where}: its sizes make no network: {error}") from error
    return Checkpoint(network, image_shape, padding, outputs != channels, dataset)


def _dataset(path: Path) -> Any:
    """Name of the training data in `config.json`; its other entries are of no use here."""
    try:
        config = json.loads(path.read_text())
    except (ValueError, OSError) as error:
        raise EbmPriorError(
            f"{path} is not readable JSON; the files of the folder may be swapped"
        ) from error
    if not isinstance(config, Mapping):
        raise EbmPriorError(f"{path} does not hold a table of arguments")
    return config.get("dataset")


READERS = {
    "hyperparameters.p": partial(load_pickle_file, table=NAMES),
    "config.json": _dataset,
    "model.pth": load_torch_file,
}


def _options(data: Any, path: Path) -> dict[str, Any]:
    """The hyperparameters with defaults filled in, checked one by one."""
    if not isinstance(data, Mapping):
        raise EbmPriorError(f"{path} holds a {type(data).__name__}, not BIVA's hyperparameters")
    missing = [key for key in REQUIRED if key not in data]
    if missing:
        raise EbmPriorError(f"{path}: no {' and no '.join(missing)} in BIVA's hyperparameters")
    unknown = [key for key in data if key not in REQUIRED and key not in OPTIONAL]
    if unknown:
        raise EbmPriorError(f"{path}: option {option(unknown[0], data)} is not supported")
    options = OPTIONAL | dict(data)
    allowed = {
        "Stage": [Named("biva"), Named("lvae"), Named("vae")],
        "nonlinearity": ["elu", "relu"],
        "log_var_act": [Named("softplus"), Named("tanh"), None],
        "no_skip": [False, True],
        "conditional_bu": [False, True],
    }
    for key, values in allowed.items():
        if options[key] not in values:
            raise EbmPriorError(f"{path}: option {option(key, options)} is not supported")
    return options


def _image_shape(value: Any, path: Path) -> Shape:
    if not isinstance(value, (list, tuple)) or len(value) not in (3, 4):
        raise EbmPriorError(f"{path}: tensor_shp={shown(value)} is not (-1, C, H, W)")
    return tuple(positive(n, "a size in tensor_shp", path) for n in value[-3:])


def _stages(
    options: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> tuple[StageSpec, ...]:
    stages, latents = options["stages"], options["latents"]
    if not all(isinstance(v, (list, tuple)) and v for v in (stages, latents)):
        raise EbmPriorError(f"{path}: stages and latents must be lists with an entry per stage")
    if len(stages) != len(latents):
        raise EbmPriorError(f"{path}: {len(stages)} stages but {len(latents)} latents")
    check_extent(stages, state, path)
    kind = options["Stage"].name
    skip = not options["no_skip"]
    return tuple(
        _stage(i, blocks, latent, i == len(stages) - 1, kind, skip, options, state, path)
        for i, (blocks, latent) in enumerate(zip(stages, latents, strict=True))
    )


def _stage(
    i: int,
    blocks: Any,
    latent: Any,
    last: bool,
    kind: str,
    skip: bool,
    options: Mapping[str, Any],
    state: Mapping[str, Tensor],
    path: Path,
) -> StageSpec:
    if not isinstance(blocks, (list, tuple)) or not blocks:
        raise EbmPriorError(f"{path}: stage {i} has no blocks")
    for block in blocks:
        if not isinstance(block, (list, tuple)) or len(block) != 3:
            raise EbmPriorError(
                f"{path}: block {shown(block)} of stage {i} is not supported; expected (filters, "
                "kernel, stride)"
            )
    specs = [BlockSpec(*(positive(n, f"a block of stage {i}", path) for n in b)) for b in blocks]
    merge = None
    if kind == "lvae":
        # The code forces the stride of this block to 1 in lists only.
        if isinstance(blocks[-1], tuple) and specs[-1].stride > 1:
            raise EbmPriorError(
                f"{path}: stage {i} ends in a tuple with stride {specs[-1].stride}, which is not "
                "supported for LVAE; use a list"
            )
        merge = BlockSpec(specs[-1].channels, specs[-1].kernel)
    if kind == "biva" and not last:
        kernel = positive(options["merge_kernel"], "merge_kernel", path)
        merge = BlockSpec(specs[0].channels, kernel)
    condition = top = None
    if kind == "biva" and last:
        top = BlockSpec(*(kernel_of(state, f"stages.{i}.q_top.conv1") or (specs[-1].channels, 3)))
    if kind == "biva" and not last and options["conditional_bu"]:
        found = kernel_of(state, f"stages.{i}.bu_condition.conv1")
        condition = BlockSpec(*(found or (specs[0].channels, 3)))
    return StageSpec(
        kind,
        tuple(specs),
        _latent(i, latent, path),
        merge=merge,
        top=top,
        condition=condition,
        infer_skip=skip,
        generate_skip=skip,
    )


def _latent(i: int, latent: Any, path: Path) -> LatentSpec:
    if not isinstance(latent, Mapping) or not {"N", "block"} <= latent.keys():
        raise EbmPriorError(f"{path}: the latents of stage {i} are not a table with N and block")
    unknown = [key for key in latent if key not in ("N", "block", "kernel", "learn_prior")]
    if unknown:
        raise EbmPriorError(
            f"{path}: option {option(unknown[0], latent)} of latents is not supported"
        )
    if latent["block"] not in (Named("conv"), Named("dense")):
        raise EbmPriorError(f"{path}: latents of kind {shown(latent['block'])} are not supported")
    size = latent["N"]
    if isinstance(size, int) and size == 0:
        raise EbmPriorError(f"{path}: stage {i} has latents of zero size, which make no group")
    dense = latent["block"] == Named("dense")
    return LatentSpec(
        positive(size, f"N of stage {i}", path),
        dense,
        1 if dense else positive(latent.get("kernel", 3), f"kernel of stage {i}", path),
    )
