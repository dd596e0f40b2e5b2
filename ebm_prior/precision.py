"""Arithmetic of the backbone's pass inside chains: float32, or bfloat16 where that is faster.

On CUDA torch's convolutions in float32 round to TF32, 10 bits of mantissa, unless
`torch.backends.cudnn.allow_tf32` is False; nothing here changes that.
"""

from __future__ import annotations

import contextlib
import warnings

import torch

from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError

__all__ = ["PRECISIONS", "check_precision", "tower_precision"]

PRECISIONS = ("fp32", "bf16")


def tower_precision(precision: str, device: torch.device) -> contextlib.AbstractContextManager:
    """Context in which a pass through a backbone runs in this precision."""
    if precision == "fp32":  # whatever the weights are of
        return contextlib.nullcontext()
    return torch.autocast(device.type, torch.bfloat16)


def check_precision(precision: str, backbone: Backbone) -> None:
    """Raise `EbmPriorError` unless the backbone's pass can run in this precision."""
    if precision not in PRECISIONS:
        raise EbmPriorError(f"precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    if precision == "fp32":
        return
    device, dtype = backbone.device, backbone.dtype
    # Where it cannot, autocast may raise, or warn and do nothing; it skips float64 silently.
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with tower_precision(precision, device):
                one = torch.ones(1, 1, device=device, dtype=dtype)
                works = (one @ one).dtype == torch.bfloat16
    except RuntimeError:
        works = False
    if not works:
        kind = str(dtype).removeprefix("torch.")
        raise EbmPriorError(f"bf16 does not work for {kind} weights on {device}; use fp32")
