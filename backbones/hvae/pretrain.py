"""Stage one for HVAE; `backbones.stages.pretrain` says how, here is the model folder."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from backbones.hvae import make_backbone
from backbones.hvae.checkpoint import build
from backbones.hvae.network import HvaeNetwork
from backbones.stages import StagedBackbone
from backbones.stages.network import Stochastic
from backbones.stages.pretrain import PretrainConfig, StagedTraining, public_state, train
from backbones.training import Progress, save_torch_file

__all__ = ["pretrain", "public_weights"]

PUBLIC = {"mnist": "MNIST", "cifar10": "CIFAR10", "fashion_mnist": "FashionMNIST"}


def pretrain(
    images: Tensor,
    *,
    out: str | Path,
    dataset: str,
    resume: bool = False,
    device: str | torch.device = "cpu",
    progress: Progress | None = None,
    **settings: Any,  # noqa: ANN401
) -> Path:
    """Train an HVAE of VAE or BIVA stages on images and write its model folder to `out`.

    Blocks are gated with ELU activations, as in BIVA, which trained faster than plain ones
    with ReLU. The public code's `load_model` does not know its own BIVA
    class; `BIVA.load` of the class itself reads such a folder.

    The folder holds `model_class_name.pt`, `model_kwargs.pt`, `datamodule_config.pt` and
    `model_state_dict.pt`. Arguments, result and errors are those of
    `backbones.stages.pretrain.train`; `settings` are the fields of its `PretrainConfig` and of
    `TrainingConfig`.
    """
    return train(
        _Training, images, out=out, dataset=dataset, resume=resume, device=device,
        progress=progress, settings=settings,
    )  # fmt: skip


class _Training(StagedTraining):
    family = "hvae"
    kinds = ("vae", "biva")
    # The code leaves a second input out where its shape is that of the first: widths that
    # differ keep the connections between stages.
    defaults = PretrainConfig(stages="biva", channels=(8, 16, 20), latents=(16, 16, 10), blocks=2)

    def build(
        self, config: PretrainConfig, shape: tuple[int, int, int], dataset: str
    ) -> StagedBackbone:
        """Backbone of random weights."""
        likelihood = "Bernoulli" if shape[0] == 1 else "DiscretizedLogisticMix"
        self.model_kwargs = {
            "kwargs": {
                "input_shape": torch.Size(shape),
                "likelihood_module": f"{likelihood}LikelihoodConv2d",
                "config_deterministic": [
                    [
                        {
                            "block": "ResBlockConv2d", "out_channels": channels,
                            "kernel_size": kernel, "stride": stride, "weightnorm": True,
                            "gated": True,
                        }
                        for channels, kernel, stride in config.blocks_of(i)
                    ]
                    for i in range(len(config.channels))
                ],
                "config_stochastic": [
                    {
                        "block": "GaussianConv2d" if i < config.maps else "GaussianDense",
                        "latent_features": size,
                        "weightnorm": True,
                    }
                    for i, size in enumerate(config.latents)
                ],
                "q_dropout": float(config.dropout),
                "p_dropout": float(config.dropout),
                "activation": "ELU",
                "skip_stochastic": True,
                "padded_shape": None,
            }
        }  # fmt: skip
        name = config.stages.upper()
        return make_backbone(build(name, self.model_kwargs, Path("settings"), {}, dataset))

    def write_arguments(self) -> None:
        """Write the three files of arguments."""
        suffix = "Binarized" if self.model.binarize else "Dequantized"
        name = PUBLIC.get(self.dataset, self.dataset) + suffix
        contents = {
            "model_class_name.pt": self.config.stages.upper(),
            "model_kwargs.pt": self.model_kwargs,
            "datamodule_config.pt": {
                # The public code's option "dynamic" means the opposite: drawn once and kept.
                "train_datasets": {name: {"dynamic": False, "split": "train"}},
                "val_datasets": {name: {"dynamic": False, "split": "validation"}},
                "test_datasets": {},
                "batch_size": self.config.batch_size,
                "test_batch_size": 250,
                "data_workers": 1,
            },
        }
        for file, data in contents.items():
            save_torch_file(self.out / file, data)

    def weights(self) -> dict[str, Tensor]:
        """Weights under the public keys."""
        return public_weights(self.network)


def public_weights(network: HvaeNetwork) -> dict[str, Tensor]:
    """Weights, and two constants that the public code keeps with every group."""
    state = public_state(network)
    for name, module in network.named_modules():
        if isinstance(module, Stochastic):
            constants = f"{name}.std_activation_inverse"
            state[f"{constants}.beta"] = torch.tensor([math.log(2)])
            state[f"{constants}.threshold"] = torch.tensor([20.0])
    return state
