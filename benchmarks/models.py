"""NVAEs with random weights, of the public sizes: what benchmarks and cost tests run on.

A and B are what a CPU can step through; `cifar10` and `celeba_256` are the public GPU
configurations. All have the public cells (res_mbconv, two per group, squeeze-and-excitation).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from backbones.nvae import NVAEBackbone
from backbones.nvae.checkpoint import (
    ARCHITECTURES,
    DEFAULTS,
    Checkpoint,
    image_format,
    network_config,
)
from backbones.nvae.network import Network, NetworkConfig

__all__ = ["MODELS", "configuration", "nvae"]

PUBLIC = {
    "num_preprocess_blocks": 1, "num_postprocess_blocks": 1, "num_preprocess_cells": 2,
    "num_postprocess_cells": 2, "num_cell_per_cond_enc": 2, "num_cell_per_cond_dec": 2,
    "use_se": True, "res_dist": True,
}  # fmt: skip

MODELS: dict[str, dict[str, Any]] = {
    # 10 groups of 20x16x16, 128 decoder channels
    "A": {
        "dataset": "cifar10", "num_latent_scales": 1, "num_groups_per_scale": 10,
        "num_channels_enc": 64, "num_channels_dec": 64,
    },
    # groups 2 at 8x8, 4 at 16x16, 8 at 32x32, with 256, 128 and 64 decoder channels
    "B": {
        "dataset": "celeba_64", "num_latent_scales": 3, "num_groups_per_scale": 8,
        "ada_groups": True, "num_channels_enc": 32, "num_channels_dec": 32,
    },
    # 30 groups of 20x16x16
    "cifar10": {
        "dataset": "cifar10", "num_latent_scales": 1, "num_groups_per_scale": 30,
        "num_channels_enc": 128, "num_channels_dec": 128, "num_nf": 1,
    },
    # CelebA-HQ-256: 36 groups from 8x8 to 128x128
    "celeba_256": {
        "dataset": "celeba_256", "num_latent_scales": 5, "num_groups_per_scale": 16,
        "ada_groups": True, "min_groups_per_scale": 4, "num_channels_enc": 30,
        "num_channels_dec": 30, "num_nf": 2, "num_x_bits": 5,
    },
}  # fmt: skip
"""Arguments of the public trainer, beyond `PUBLIC`."""


def nvae(
    model: str, device: str | torch.device = "cpu", passes: int = 2, seed: int = 0, **changes: Any
) -> NVAEBackbone:
    """An NVAE whose activations are as well scaled as a trained one's, its weights random.

    Args:
        model: A name in `MODELS`.
        device: Where it runs.
        passes: Training-mode passes over random images that set the batch-norm statistics; 0
            leaves them at mean 0 and variance 1, which costs the same.
        seed: Of weights and images; the global generator is left alone.
        changes: Arguments of the public trainer in place of the model's, such as fewer groups.
    """
    args, config, likelihood = configuration(model, **changes)
    with torch.random.fork_rng(devices=[]):  # made on the CPU
        torch.manual_seed(seed)
        network = Network(config).to(device)
        if passes:
            calibrate(network, passes)
    return NVAEBackbone(
        Checkpoint(config, network, args["dataset"], args["num_x_bits"], likelihood, args)
    )


def configuration(model: str, **changes: Any) -> tuple[dict[str, Any], NetworkConfig, str]:
    """Complete arguments of the public trainer, the network's shape, and the likelihood."""
    args = DEFAULTS | PUBLIC | MODELS[model] | changes
    cells = ARCHITECTURES[args["arch_instance"]]
    return args, *network_config(args, cells, *image_format(args["dataset"]))


@torch.no_grad()
def calibrate(network: Network, passes: int, batch: int = 2) -> None:
    """Set every batch norm to the average statistics of posterior draws of random images."""
    norms = [module for module in network.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # cumulative average
    network.train()
    like, c = network.prior_ftr0, network.config
    for _ in range(passes):
        x = torch.rand(batch, c.image_channels, c.image_size, c.image_size).to(like)
        noise = [torch.randn(batch, *shape).to(like) for shape in network.group_shapes]
        network.decode(network.infer(x, noise)[1])
    network.eval()
