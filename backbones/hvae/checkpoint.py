"""HVAE's folder: `model_class_name.pt`, `model_kwargs.pt`, `model_state_dict.pt`, and data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.hvae.network import HvaeNetwork
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
from ebm_prior.safe_load import load_torch_file, shown
from ebm_prior.saved import is_text

__all__ = ["Checkpoint", "build", "contents", "read_checkpoint"]

CLASSES = {"VAE": "vae", "LVAE": "lvae", "BIVA": "biva"}
LIKELIHOODS = {
    "BernoulliLikelihoodConv2d": "bernoulli",
    "DiscretizedLogisticLikelihoodConv2d": "logistic",
    "DiscretizedLogisticMixLikelihoodConv2d": "mixture",
}
MIXTURES = 10
REQUIRED = ("input_shape", "likelihood_module", "config_deterministic", "config_stochastic")
OPTIONAL = {
    "q_dropout": 0.0, "p_dropout": 0.0, "activation": "Swish", "skip_stochastic": True,
    "padded_shape": None,
}  # fmt: skip
BLOCK_KEYS = {
    "block", "out_channels", "kernel_size", "stride", "weightnorm", "gated", "upsampling_mode",
    "downsampling_mode",
}  # fmt: skip
LATENT_KEYS = {"block", "latent_features", "weightnorm", "kernel_size", "learn_prior"}
RESIZE = (None, "nearest", "bilinear")
UNUSED = (".std_activation_inverse.beta", ".std_activation_inverse.threshold")
DATASETS = {"fashionmnist": "fashion_mnist", "smallnorb": "small_norb"}


@dataclass(frozen=True)
class Checkpoint:
    """A folder that has been read and checked, or is about to be trained.

    Attributes:
        network: The network with its weights, on the CPU.
        image_shape: (C, H, W) of the images.
        padding: Zeros around them, (vertical, horizontal).
        likelihood: "bernoulli", "logistic" or "mixture".
        dataset: Data set it was trained on.
    """

    network: HvaeNetwork
    image_shape: Shape
    padding: tuple[int, int]
    likelihood: str
    dataset: str | None


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read a model from its folder, from the weights inside, or converted into one file.

    `evaluator.pt` is never opened.

    Raises:
        EbmPriorError: If a file is missing, swapped, of another family or names anything
            foreign; if an option is not supported, or the weights do not fit.
    """
    files, parts = read_session(path, "hvae", READERS)
    name, where = parts["model_class_name.pt"], files["model_class_name.pt"]
    if not isinstance(name, str):
        raise EbmPriorError(
            f"{where} holds a {type(name).__name__}, not the name of a class; the files of the "
            "folder may be swapped"
        )
    if name not in CLASSES:
        raise EbmPriorError(
            f"{where}: model class {shown(name)} is not supported; known are {', '.join(CLASSES)}"
        )
    dataset = _dataset(parts["datamodule_config.pt"])
    state = check_state(parts["model_state_dict.pt"], files["model_state_dict.pt"])
    where = files["model_kwargs.pt"]
    # Spend no memory and no random numbers on weights about to be replaced.
    with torch.device("meta"):
        checkpoint = build(name, parts["model_kwargs.pt"], where, state, dataset)
    fill(checkpoint.network, state, files["model_state_dict.pt"], UNUSED)
    return checkpoint


def contents(path: Path) -> dict[str, Any]:
    """What the files of a model hold, for converting them into one."""
    return read_session(path, "hvae", READERS)[1]


def build(
    name: str,
    model_kwargs: Mapping[str, Any],
    where: Path,
    state: Mapping[str, Tensor],
    dataset: str | None,
) -> Checkpoint:
    """The network of these arguments, with random weights.

    Args:
        name: Class of the model, "VAE", "LVAE" or "BIVA".
        model_kwargs: As in `model_kwargs.pt`.
        where: Where they come from, for messages.
        state: Stored weights, for what they alone state of the geometry; may be empty.
        dataset: Data set to note.

    Raises:
        EbmPriorError: If an option is not supported or does not fit the others.
    """
    options = _options(model_kwargs, where)
    image_shape = tuple(positive(n, "a size in input_shape", where) for n in options["shape"])
    in_shape, padding = padded(image_shape, options["padded_shape"], "padded_shape", where)
    likelihood = LIKELIHOODS[options["likelihood_module"]]
    channels = image_shape[0]
    if likelihood == "mixture" and channels != 3:
        raise EbmPriorError(f"{where}: a mixture of logistics needs 3 channels, not {channels}")
    outputs = {"bernoulli": channels, "logistic": 2 * channels, "mixture": 10 * MIXTURES}
    specs = _stages(options, CLASSES[name], state, where)
    try:
        network = HvaeNetwork(
            specs,
            in_shape,
            image_shape[1:],
            outputs[likelihood],
            1 if likelihood == "mixture" else 3,
            likelihood == "bernoulli",
            ACTIVATIONS[options["activation"].lower()],
        )
    except EbmPriorError as error:
        raise EbmPriorError(f"{where}: {error}") from error
    except RuntimeError as error:  # sizes beyond 64 bits
        raise EbmPriorError(f"{where}: its sizes make no network: {error}") from error
    return Checkpoint(network, image_shape, padding, likelihood, dataset)


def _dataset(name: Any) -> str | None:
    """Name of the training data, without the code's suffix for how pixels are drawn."""
    if not is_text(name):
        return None
    for suffix in ("Binarized", "Dequantized"):
        name = name.removesuffix(suffix)
    return DATASETS.get(name.lower(), name.lower())


def _train_dataset(path: Path) -> Any:
    """First of the data sets in `datamodule_config.pt`; its other entries are of no use here."""
    config = load_torch_file(path)
    if not isinstance(config, Mapping) or "train_datasets" not in config:
        raise EbmPriorError(
            f"{path} does not say what the model was trained on; the files of the folder may be "
            "swapped"
        )
    names = config["train_datasets"]
    name = next(iter(names)) if isinstance(names, Mapping) and names else None
    return name if is_text(name) else None


READERS = {
    "model_class_name.pt": load_torch_file,
    # The size of the input is saved as a torch.Size, a tuple that runs nothing.
    "model_kwargs.pt": partial(load_torch_file, allowed=[torch.Size]),
    "model_state_dict.pt": load_torch_file,
    "datamodule_config.pt": _train_dataset,
}


def _options(data: Any, path: Path) -> dict[str, Any]:
    """The model's arguments with defaults filled in, checked one by one."""
    kwargs = data.get("kwargs") if isinstance(data, Mapping) else None
    if not isinstance(kwargs, Mapping):
        raise EbmPriorError(
            f"{path} holds no table 'kwargs' of model arguments; the files of the folder may be "
            "swapped"
        )
    missing = [key for key in REQUIRED if key not in kwargs]
    if missing:
        raise EbmPriorError(f"{path}: no {' and no '.join(missing)} in the model's arguments")
    unknown = [key for key in kwargs if key not in REQUIRED and key not in OPTIONAL]
    if unknown:
        raise EbmPriorError(f"{path}: option {option(unknown[0], kwargs)} is not supported")
    options = OPTIONAL | dict(kwargs)
    for key, known in (("likelihood_module", LIKELIHOODS), ("activation", ACTIVATIONS)):
        value = options[key]
        found = value.lower() if key == "activation" and isinstance(value, str) else value
        if not isinstance(found, str) or found not in known:
            raise EbmPriorError(f"{path}: option {option(key, options)} is not supported")
    if not isinstance(options["skip_stochastic"], bool):
        raise EbmPriorError(
            f"{path}: option {option('skip_stochastic', options)} is not supported"
        )
    shape = options["input_shape"]
    if not isinstance(shape, (list, tuple)) or len(shape) not in (3, 4):
        raise EbmPriorError(f"{path}: input_shape={shown(shape)} is not (C, H, W)")
    options["shape"] = shape[-3:]
    return options


def _stages(
    options: Mapping[str, Any], kind: str, state: Mapping[str, Tensor], path: Path
) -> list[StageSpec]:
    stages, latents = options["config_deterministic"], options["config_stochastic"]
    if not all(isinstance(v, (list, tuple)) and v for v in (stages, latents)):
        raise EbmPriorError(f"{path}: its configurations must be lists with an entry per stage")
    if len(stages) != len(latents):
        raise EbmPriorError(f"{path}: {len(stages)} stages but {len(latents)} latents")
    check_extent(stages, state, path)
    skip = options["skip_stochastic"]
    if kind == "biva" and not skip and len(stages) > 2:
        raise EbmPriorError(
            f"{path}: option skip_stochastic=False is not supported for BIVA with more than two "
            "stages (HVAE's own code fails on it)"
        )
    specs = []
    for i, (blocks, latent) in enumerate(zip(stages, latents, strict=True)):
        last = i == len(stages) - 1
        if not isinstance(blocks, (list, tuple)) or not blocks:
            raise EbmPriorError(f"{path}: stage {i} has no blocks")
        stack = "q_bu_convs" if kind == "biva" else "q_deterministic"
        made = tuple(
            _block(config, state, f"stages.{i}.{stack}.layers.{j}", i, path)
            for j, config in enumerate(blocks)
        )
        single = BlockSpec(**{**vars(made[-1]), "stride": 1})
        merge = top = None
        if kind == "lvae" and (not last or kernel_of(state, f"stages.{i}.merge.conv1")):
            merge = single
        elif kind == "biva" and not last:
            merge = single
        elif kind == "biva":
            channels, kernel = kernel_of(state, f"stages.{i}.q_top.conv1") or (
                single.channels,
                single.kernel,
            )
            top = BlockSpec(**{**vars(single), "channels": channels, "kernel": kernel})
        specs.append(
            StageSpec(
                kind,
                made,
                _latent(i, latent, path),
                merge=merge,
                top=top,
                reverse=kind != "biva",
                # BIVA's inner stages test this option the wrong way round.
                infer_skip=skip and (kind != "biva" or last),
                generate_skip=skip,
            )
        )
    return specs


def _block(config: Any, state: Mapping[str, Tensor], name: str, i: int, path: Path) -> BlockSpec:
    if not isinstance(config, Mapping) or not {"block", "out_channels"} <= config.keys():
        raise EbmPriorError(f"{path}: a block of stage {i} is no table with block, out_channels")
    for key, value in config.items():
        if key not in BLOCK_KEYS or (key == "block" and value != "ResBlockConv2d"):
            raise EbmPriorError(f"{path}: option {option(key, config)} of blocks is not supported")
        if key.endswith("sampling_mode") and value not in RESIZE:
            raise EbmPriorError(f"{path}: option {option(key, config)} of blocks is not supported")
    channels = positive(config["out_channels"], f"out_channels of stage {i}", path)
    stored = kernel_of(state, f"{name}.conv1") or (channels, 3)
    # Older folders leave defaults out; the weights then say what they were.
    wide = (kernel_of(state, f"{name}.conv2") or (channels, 3))[0] > channels
    normed = f"{name}.conv1.conv.weight_v" in state
    kernel = config.get("kernel_size", stored[1])
    whole = isinstance(kernel, (list, tuple)) and all(type(n) is int for n in kernel)
    if whole and len(set(kernel)) == 1:
        kernel = kernel[0]
    return BlockSpec(
        channels,
        positive(kernel, f"kernel_size of stage {i}", path),
        positive(config.get("stride", 1), f"stride of stage {i}", path),
        bool(config.get("gated", wide)),
        bool(config.get("weightnorm", normed)),
        config.get("upsampling_mode"),
        config.get("downsampling_mode"),
    )


def _latent(i: int, config: Any, path: Path) -> LatentSpec:
    if not isinstance(config, Mapping) or not {"block", "latent_features"} <= config.keys():
        raise EbmPriorError(
            f"{path}: the latents of stage {i} are no table with block and latent_features"
        )
    for key, value in config.items():
        kinds = ("GaussianConv2d", "GaussianDense")
        if key not in LATENT_KEYS or (key == "block" and value not in kinds):
            raise EbmPriorError(
                f"{path}: option {option(key, config)} of latents is not supported"
            )
    size = config["latent_features"]
    if isinstance(size, int) and size == 0:
        raise EbmPriorError(f"{path}: stage {i} has latents of zero size, which make no group")
    return LatentSpec(
        positive(size, f"latent_features of stage {i}", path),
        config["block"] == "GaussianDense",
        positive(config.get("kernel_size", 3), f"kernel_size of stage {i}", path),
        bool(config.get("weightnorm", True)),
    )
