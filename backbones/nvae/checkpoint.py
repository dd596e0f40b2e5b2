"""The format of NVAE's `checkpoint.pt`: reading it safely, checking that it fits itself."""

from __future__ import annotations

import argparse
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.nvae.network import Network, NetworkConfig
from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import load_torch_file, plain_state, shown
from ebm_prior.saved import is_text

__all__ = [
    "ARCHITECTURES",
    "Checkpoint",
    "checkpoint_dict",
    "groups_per_scale",
    "image_format",
    "network_config",
    "read_checkpoint",
]

# What the public parser fills in; old checkpoints lack the arguments added later.
DEFAULTS: dict[str, Any] = {
    "arch_instance": "res_mbconv",
    "num_nf": 0,
    "num_x_bits": 8,
    "num_latent_scales": 1,
    "num_groups_per_scale": 10,
    "num_latent_per_group": 20,
    "ada_groups": False,
    "min_groups_per_scale": 1,
    "num_channels_enc": 32,
    "num_preprocess_blocks": 2,
    "num_preprocess_cells": 3,
    "num_cell_per_cond_enc": 1,
    "num_channels_dec": 32,
    "num_postprocess_blocks": 2,
    "num_postprocess_cells": 3,
    "num_cell_per_cond_dec": 1,
    "num_mixture_dec": 10,
    "use_se": False,
    "res_dist": False,
}

LARGEST = 4096  # of any argument: published models stay below 512
MAY_BE_ZERO = ("num_nf", "num_preprocess_blocks", "num_postprocess_blocks")

CELL_KINDS = ("enc", "dec", "pre", "post")


def _architecture(enc: str, dec: str, pre: str, post: str) -> dict[str, tuple[str, ...]]:
    """Operations per cell type; a cell and its resizing sibling are made alike."""
    cells = {}
    for kind, operations in zip(CELL_KINDS, (enc, dec, pre, post), strict=True):
        resizing = "down" if kind in ("enc", "pre") else "up"
        cells[f"normal_{kind}"] = cells[f"{resizing}_{kind}"] = tuple(operations.split())
    return cells


_RES, _MB6, _MB3 = "res_bnswish res_bnswish", "mconv_e6k5g0", "mconv_e3k5g0"

ARCHITECTURES = {
    "res_elu": _architecture(*["res_elu res_elu"] * 4),
    "res_bnelu": _architecture(*["res_bnelu res_bnelu"] * 4),
    "res_bnswish": _architecture(*[_RES] * 4),
    "mbconv_sep": _architecture(_MB6, _MB6, _MB3, _MB3),
    "mbconv_sep11": _architecture("mconv_e6k11g0", "mconv_e6k11g0", _MB3, _MB3),
    "mbconv_den": _architecture(_MB6, _MB6, "mconv_e3k5g8", "mconv_e3k5g8"),
    "mbconv_res": _architecture(_MB6, _RES, _MB3, _RES),
    "res_mbconv": _architecture(_RES, _MB6, _RES, _MB3),
    "res53_mbconv": _architecture(
        "res_bnswish5 res_bnswish", _MB6, "res_bnswish5 res_bnswish", _MB3
    ),
    "res35_mbconv": _architecture(
        "res_bnswish res_bnswish5", _MB6, "res_bnswish res_bnswish5", _MB3
    ),
    "res55_mbconv": _architecture(
        "res_bnswish5 res_bnswish5", _MB6, "res_bnswish5 res_bnswish5", _MB3
    ),
}
"""Operations of each architecture name, for checkpoints without their own table."""

PADDED = {"mnist", "omniglot"}  # binary 28x28 images in a 32x32 network
_SIZES = {"mnist": 32, "omniglot": 32, "cifar10": 32, "svhn": 32, "ffhq": 256, "digits": 8}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and checked.

    Attributes:
        config: Shape of the network.
        network: The network with its weights, on the CPU.
        dataset: Data set it was trained on.
        bits: Bits per channel of the training data.
        likelihood: "bernoulli", "binomial", "mixture" or "gaussian".
        args: All training arguments, defaults filled in.
    """

    config: NetworkConfig
    network: Network
    dataset: str
    bits: int
    likelihood: str
    args: dict[str, Any]


def groups_per_scale(args: Mapping[str, Any]) -> tuple[int, ...]:
    """Latent groups per scale, finest first; with `ada_groups`, halved scale by scale."""
    count = args["num_groups_per_scale"]
    groups = []
    for _ in range(args["num_latent_scales"]):
        groups.append(count)
        if args["ada_groups"]:
            count = max(count // 2, args["min_groups_per_scale"])
    return tuple(groups)


def image_format(dataset: str) -> tuple[int | None, int | None]:
    """(channels, working size) that a data set's name implies; None where it does not."""
    if dataset in PADDED or dataset == "digits":
        return 1, _SIZES[dataset]
    if dataset in _SIZES:
        return 3, _SIZES[dataset]
    size = re.fullmatch(r"(?:celeba|imagenet|lsun)\w*_(\d+)", dataset)
    return (3, int(size[1])) if size else (None, None)


def read_checkpoint(path: str | Path) -> Checkpoint:
    """Read NVAE's `checkpoint.pt` without running anything in it.

    Raises:
        EbmPriorError: If it is not an NVAE checkpoint, lacks a part, names an option that
            is not supported, or its weights do not fit its arguments.
    """
    path = Path(path)
    data = _read(path)
    args = dict(DEFAULTS)
    given = data["args"]
    args.update(vars(given) if isinstance(given, argparse.Namespace) else given)
    _check_args(args, path)
    state = _clean_state(data["state_dict"], path)
    _check_extent(args, state, path)
    dataset = args["dataset"]
    try:
        config, likelihood = network_config(
            args, _cells(data, args, path), *_image_format(args, state, path)
        )
        # Spend no memory and no random numbers on weights about to be replaced.
        with torch.device("meta"):
            network = Network(config)
    except EbmPriorError as error:
        text = str(error)
        raise EbmPriorError(text if str(path) in text else f"{path}: {text}") from error
    except RuntimeError as error:  # sizes beyond 64 bits
        raise EbmPriorError(f"{path}: its args make no NVAE: {error}") from error
    _check_state(network, state, path)
    network.load_state_dict(state, assign=True)
    return Checkpoint(config, network, dataset, args["num_x_bits"], likelihood, args)


def _read(path: Path) -> Mapping[str, Any]:
    """Load the outer dictionary, or say what the file is instead."""
    other = _other_family(path)
    if path.is_dir():
        if other:
            raise EbmPriorError(f"{path} is not an NVAE checkpoint: {other}")
        if (path / "checkpoint.pt").is_file():
            raise EbmPriorError(f"{path} is a folder; give the file {path / 'checkpoint.pt'}")
        raise EbmPriorError(f"{path} is a folder; give NVAE's checkpoint.pt itself")
    if other:
        raise EbmPriorError(f"{path} is not an NVAE checkpoint: {other}")
    data = load_torch_file(path, allowed=[argparse.Namespace])
    if not isinstance(data, Mapping):
        raise EbmPriorError(
            f"{path} is not an NVAE checkpoint: it holds a {type(data).__name__}, expected a "
            "dictionary with 'args' and 'state_dict'"
        )
    missing = [key for key in ("args", "state_dict") if key not in data]
    if missing:
        hint = "give the checkpoint.pt that NVAE's training code writes"
        if any(str(key).startswith("stages.") for key in data):
            hint = "its keys look like a BIVA or HVAE model; load it with backbone biva or hvae"
        elif any(str(key).startswith(("prior_ftr0", "stem.")) for key in data):
            hint = "it holds bare NVAE weights; give the whole checkpoint.pt, which has its args"
        raise EbmPriorError(
            f"{path} is not an NVAE checkpoint: no {' and no '.join(map(repr, missing))} in it; "
            + hint
        )
    for key, types in (("args", (argparse.Namespace, Mapping)), ("state_dict", (Mapping,))):
        if not isinstance(data[key], types):
            raise EbmPriorError(
                f"{path} is not an NVAE checkpoint: its {key!r} is a "
                f"{type(data[key]).__name__}; download it again"
            )
    return data


def _other_family(path: Path) -> str:
    """What a folder, or the folder around a file, shows another family's files."""
    folder = path if path.is_dir() else path.parent
    own = {"model.pth", "hyperparameters.p", "config.json"}
    if (folder / "hyperparameters.p").is_file() and (path == folder or path.name in own):
        return f"{folder} looks like a BIVA session folder; use backbone biva on the folder"
    own = {f"{name}.pt" for name in ("model_class_name", "model_kwargs", "model_state_dict")}
    own |= {"datamodule_config.pt", "evaluator.pt"}
    if (folder / "model_class_name.pt").is_file() and (path == folder or path.name in own):
        return f"{folder} looks like an HVAE folder; use backbone hvae on the folder"
    return ""


def _check_args(args: Mapping[str, Any], path: Path) -> None:
    if not is_text(args.get("dataset")):
        raise EbmPriorError(f"{path}: its args name no data set; it cannot be interpreted")
    if args["dataset"] == "stacked_mnist":
        raise EbmPriorError(
            f"{path} was trained on stacked_mnist, which NVAE's code does not finish; "
            "use another checkpoint"
        )
    for key, default in DEFAULTS.items():
        value = args[key]
        if isinstance(default, bool):
            valid = isinstance(value, bool)
        elif isinstance(default, int):
            least = 0 if key in MAY_BE_ZERO else 1
            valid = isinstance(value, int) and not isinstance(value, bool)
            valid = valid and least <= value <= LARGEST
        else:
            valid = isinstance(value, str)
        if not valid:
            raise EbmPriorError(f"{path}: its args say {key}={shown(value)}, which makes no NVAE")
    if args["num_x_bits"] > 8:
        raise EbmPriorError(f"{path}: num_x_bits={args['num_x_bits']}; images have at most 8 bits")


def _check_extent(args: Mapping[str, Any], state: Mapping[str, Tensor], path: Path) -> None:
    """Refuse arguments that describe far more than the file holds, before building it."""
    blocks = args["num_preprocess_blocks"], args["num_postprocess_blocks"]
    halvings = args["num_latent_scales"] + max(blocks)
    per_group = args["num_nf"] + args["num_cell_per_cond_enc"] + args["num_cell_per_cond_dec"]
    cells = sum(groups_per_scale(args)) * per_group
    cells += blocks[0] * args["num_preprocess_cells"] + blocks[1] * args["num_postprocess_cells"]
    # a flow's masks, which are not stored, are as large as its weights
    masks = 54 * args["num_latent_per_group"] ** 2 if args["num_nf"] else 0
    if halvings > 16 or cells > len(state) or masks > sum(v.numel() for v in state.values()):
        raise EbmPriorError(
            f"{path}: its args describe a far larger network than the {len(state)} tensors in it; "
            "use the file as NVAE's training code wrote it"
        )


def _cells(
    data: Mapping[str, Any], args: Mapping[str, Any], path: Path
) -> Mapping[str, tuple[str, ...]]:
    """Operations per cell type: the checkpoint's own table, else by architecture name."""
    table = data.get("arch_instance")
    name = args["arch_instance"]
    if isinstance(table, Mapping):
        needed = ARCHITECTURES["res_mbconv"]
        broken = [key for key in needed if not _is_cell(table.get(key))]
        if broken:
            raise EbmPriorError(f"{path}: its arch_instance lacks {', '.join(broken)}")
        return {kind: tuple(table[kind]) for kind in needed}
    if isinstance(table, str):
        name = table
    if name not in ARCHITECTURES:
        why = "" if name != "res_mbconv9" else " (NVAE's own code cannot build it either)"
        raise EbmPriorError(
            f"{path}: architecture {shown(name)} is not supported{why}; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    return ARCHITECTURES[name]


def _is_cell(operations: Any) -> bool:
    """Whether it lists a few operations by name; the public code's cells have up to two."""
    if not isinstance(operations, (list, tuple)) or not 1 <= len(operations) <= 8:
        return False
    return all(map(is_text, operations))


def _clean_state(state: Mapping[str, Any], path: Path) -> dict[str, Tensor]:
    """Weights under plain names, aliases dropped."""
    # `weight_normalized` is the same tensor as the key's '.weight'
    clean = {k: v for k, v in state.items() if not str(k).endswith(".weight_normalized")}
    clean = plain_state(clean, path)  # which refuses keys that are no text
    if clean and all(key.startswith("module.") for key in clean):
        clean = {key.removeprefix("module."): value for key, value in clean.items()}
    return clean


def network_config(
    args: Mapping[str, Any], cells: Mapping[str, tuple[str, ...]], channels: int, size: int
) -> tuple[NetworkConfig, str]:
    """Shape of the network and kind of its image likelihood.

    Args:
        args: Training arguments, complete.
        cells: Operations per cell type.
        channels: Image channels.
        size: Height and width the network works on.

    Returns:
        The configuration and "bernoulli", "binomial", "gaussian" or "mixture".
    """
    if channels == 1:
        likelihood, outputs = "binomial" if args["dataset"] == "digits" else "bernoulli", 1
    elif channels != 3:
        raise EbmPriorError(f"NVAE has no likelihood for images of {channels} channels")
    elif args["num_mixture_dec"] == 1:
        likelihood, outputs = "gaussian", 2 * channels
    else:
        likelihood, outputs = "mixture", 10 * args["num_mixture_dec"]
    config = NetworkConfig(
        image_channels=channels,
        image_size=size,
        output_channels=outputs,
        cells=cells,
        groups_per_scale=groups_per_scale(args),
        latents=args["num_latent_per_group"],
        channels_enc=args["num_channels_enc"],
        channels_dec=args["num_channels_dec"],
        preprocess_blocks=args["num_preprocess_blocks"],
        preprocess_cells=args["num_preprocess_cells"],
        postprocess_blocks=args["num_postprocess_blocks"],
        postprocess_cells=args["num_postprocess_cells"],
        cells_enc=args["num_cell_per_cond_enc"],
        cells_dec=args["num_cell_per_cond_dec"],
        flows=args["num_nf"],
        use_se=args["use_se"],
        res_dist=args["res_dist"],
    )
    return config, likelihood


def checkpoint_dict(
    network: Network,
    args: Mapping[str, Any],
    *,
    epoch: int,
    global_step: int,
    optimizer: Mapping[str, Any] | None = None,
    scheduler: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """What `torch.save` should write for the public code to load, strictly.

    Args:
        network: Plain (unfolded) network.
        args: Training arguments, complete.
        epoch: Epochs done.
        global_step: Optimizer steps done.
        optimizer: Optimizer state; left out, an empty one.
        scheduler: Learning-rate scheduler state; left out, an empty one.
    """
    state = dict(network.state_dict())
    for name, module in network.named_modules():
        if type(module) is torch.nn.Conv2d:  # the convolutions without weight norm
            state[f"{name}.weight_normalized"] = state[f"{name}.weight"]
    return {
        "epoch": epoch,
        "state_dict": state,
        "optimizer": optimizer or {"state": {}, "param_groups": []},
        "global_step": global_step,
        "args": argparse.Namespace(**args),
        "arch_instance": {k: list(v) for k, v in network.config.cells.items()} | {"ar_nn": [""]},
        "scheduler": scheduler or {},
        "grad_scalar": {},
    }


def _image_format(
    args: Mapping[str, Any], state: Mapping[str, Tensor], path: Path
) -> tuple[int, int]:
    """Image channels and working size: from the data set's name, else from the weights."""
    channels, size = image_format(args["dataset"])
    if channels is not None and size is not None:
        return channels, size
    halvings = args["num_preprocess_blocks"] + args["num_latent_scales"] - 1
    try:
        return state["stem.weight"].shape[1], state["prior_ftr0"].shape[1] << halvings
    except (KeyError, IndexError) as error:
        raise EbmPriorError(
            f"{path} is not an NVAE checkpoint: its state_dict has no stem.weight and "
            "prior_ftr0 of the right kind"
        ) from error


def _check_state(network: Network, state: Mapping[str, Tensor], path: Path) -> None:
    """Raise, naming a few keys, unless the weights are exactly those of the network."""
    expected = network.state_dict()
    # Some files lack this counter, which evaluation does not read.
    optional = {key for key in expected if key.endswith("num_batches_tracked")}
    if isinstance(state, dict):
        for key in optional - state.keys():
            state[key] = torch.tensor(0)
    problems = []
    for label, keys in (
        ("missing", [k for k in expected if k not in state]),
        ("unexpected", [k for k in state if k not in expected]),
        (
            "misshaped",
            [
                f"{k} {tuple(state[k].shape)} instead of {tuple(v.shape)}"
                for k, v in expected.items()
                if k in state and state[k].shape != v.shape
            ],
        ),
        (
            "mistyped",
            [
                f"{k} of {state[k].dtype}"
                for k, v in expected.items()
                if k in state and state[k].is_floating_point() != v.is_floating_point()
            ],
        ),
    ):
        if keys:
            more = f" and {len(keys) - 3} more" if len(keys) > 3 else ""
            problems.append(f"{label} {', '.join(keys[:3])}{more}")
    if problems:
        raise EbmPriorError(
            f"{path}: the weights do not fit the checkpoint's own args: {'; '.join(problems)}. "
            "Use the file as NVAE's training code wrote it"
        )
