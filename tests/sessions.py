"""Session folders of the BIVA and HVAE families with random weights, and hostile files."""

import contextlib
import json
import os
import pickle
import sys
import types
from pathlib import Path

import torch

from backbones.biva import checkpoint as biva
from backbones.biva.network import BivaNetwork
from backbones.hvae import checkpoint as hvae
from backbones.hvae.network import HvaeNetwork
from backbones.stages.layers import ACTIVATIONS, Layer

BIVA_OPTIONS = {
    "Stage": "biva.model.stage.BivaStage",
    "tensor_shp": (-1, 1, 8, 8),
    "stages": [[[4, 3, 1], [4, 3, 2]], [[4, 3, 1], [4, 3, 2]], [[4, 3, 1], [4, 3, 1]]],
    "latents": [
        {"N": 2, "kernel": 4, "block": "biva.model.stochastic.ConvNormal"},
        {"N": 3, "block": "biva.model.stochastic.DenseNormal"},
        {"N": 2, "block": "biva.model.stochastic.DenseNormal"},
    ],
    "nonlinearity": "elu",
    "q_dropout": 0.5,
    "p_dropout": 0.5,
    "type": "biva",
    "features_out": 1,
    "no_skip": False,
    "log_var_act": "torch.nn.modules.activation.Softplus",
}
"""Names stand for the classes and functions that the file mentions."""


def hvae_block(channels=4, kernel=3, stride=1, **changes):
    return {
        "block": "ResBlockConv2d", "out_channels": channels, "kernel_size": kernel,
        "stride": stride, "weightnorm": True, "gated": False,
    } | changes  # fmt: skip


HVAE_OPTIONS = {
    "input_shape": torch.Size([1, 8, 8]),
    "likelihood_module": "BernoulliLikelihoodConv2d",
    "config_deterministic": [
        [hvae_block(), hvae_block(stride=2)], [hvae_block(), hvae_block(stride=2)],
        [hvae_block(), hvae_block()],
    ],
    "config_stochastic": [
        {"block": "GaussianConv2d", "latent_features": 2, "weightnorm": True},
        {"block": "GaussianDense", "latent_features": 3, "weightnorm": True},
        {"block": "GaussianDense", "latent_features": 2, "weightnorm": True},
    ],
    "q_dropout": 0.0,
    "p_dropout": 0.0,
    "activation": "ReLU",
    "skip_stochastic": True,
    "padded_shape": None,
}  # fmt: skip


class Global:
    """Pickled as a mention of the named class or function."""

    def __init__(self, name):
        self.name = name

    def __reduce__(self):
        return self.name.rpartition(".")[2]


def dump(data, path):
    """Pickle in which every `Global` becomes a mention of that name."""

    class Pickler(pickle._Pickler):
        def save_global(self, obj, name=None):
            if isinstance(obj, Global):
                module, _, attribute = obj.name.rpartition(".")
                self.write(f"c{module}\n{attribute}\n".encode())
                self.memoize(obj)
            else:
                super().save_global(obj, name)

    with open(path, "wb") as file:
        Pickler(file, protocol=3).dump(data)


def mention(value):
    """Full names, as in BIVA_OPTIONS, to mentions."""
    if isinstance(value, str) and value.startswith(("biva.", "torch.nn.", "evil.")):
        return Global(value)
    if isinstance(value, dict):
        return {k: mention(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(mention(v) for v in value)
    return value


def public_state(network):
    """Random weights under the public keys, weight-normalised, all marked as initialised."""
    state = {}
    plain = network.state_dict()
    for name, layer in network.named_modules():
        if isinstance(layer, Layer):
            for key in [k for k in plain if k.startswith(f"{name}.")]:
                del plain[key]
            for key, shape in layer.stored().items():
                if key == "initialized":
                    value = torch.tensor(True)
                elif key.endswith("weight_g"):
                    value = torch.empty(shape).uniform_(0.4, 0.9)
                else:
                    value = 0.3 * torch.randn(shape)
                state[f"{name}.{key}"] = value
    return state | plain


def write_biva(folder, state=None, dataset="binmnist", **changes):
    """A session folder; its path."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    options = BIVA_OPTIONS | changes
    dump(mention(options), folder / "hyperparameters.p")
    (folder / "config.json").write_text(json.dumps({"dataset": dataset}))
    if state is None:
        where = folder / "hyperparameters.p"
        checked = biva._options(biva.load_pickle_file(where, biva.NAMES), where)
        shape, _ = biva.padded(
            checked["tensor_shp"][-3:], checked["padded_shp"], "padded_shp", where
        )
        name = checked["log_var_act"]
        torch.manual_seed(0)
        state = public_state(
            BivaNetwork(
                biva._stages(checked, {}, where),
                shape,
                checked["features_out"],
                ACTIVATIONS[checked["nonlinearity"]],
                name and name.name,
            )
        )
    torch.save(state, folder / "model.pth")
    return folder


def write_hvae(folder, name="VAE", state=None, dataset="MNISTBinarized", **changes):
    """A model folder; its path."""
    folder = Path(folder)
    folder.mkdir(exist_ok=True)
    options = HVAE_OPTIONS | changes
    torch.save(name, folder / "model_class_name.pt")
    torch.save({"kwargs": options}, folder / "model_kwargs.pt")
    torch.save({"train_datasets": {dataset: {}}}, folder / "datamodule_config.pt")
    if state is None:
        where = folder / "model_kwargs.pt"
        checked = hvae._options({"kwargs": options}, where)
        shape, _ = hvae.padded(
            tuple(checked["shape"]), checked["padded_shape"], "padded_shape", where
        )
        kind = hvae.LIKELIHOODS[checked["likelihood_module"]]
        outputs = {"bernoulli": shape[0], "logistic": 2 * shape[0], "mixture": 100}[kind]
        # the geometry of the blocks that only the weights state, as the code makes it
        specs = hvae._stages(checked, hvae.CLASSES[name], {}, where)
        torch.manual_seed(0)
        state = public_state(
            HvaeNetwork(
                specs, shape, tuple(checked["shape"][1:]), outputs,
                1 if kind == "mixture" else 3, kind == "bernoulli",
                ACTIVATIONS[checked["activation"].lower()],
            )
        )  # fmt: skip
        for key in [k for k in state if k.endswith("in_transform_q.initialized")]:
            head = key.removesuffix("in_transform_q.initialized")
            state[f"{head}std_activation_inverse.beta"] = torch.tensor([0.6931])
            state[f"{head}std_activation_inverse.threshold"] = torch.tensor([20.0])
    torch.save(state, folder / "model_state_dict.pt")
    return folder


def nest(levels, kind=list):
    """Twice the same of twice the same of ...: a few bytes in a file, 2**levels to print."""
    value = kind([1, 2])
    for _ in range(levels):
        value = kind([value, value])
    return value


class Evil:
    """Touches a file when unpickled by `pickle.load`."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.system, (f"touch {self.target}",)


class EvilEval(Evil):
    """The same through a builtin."""

    def __reduce__(self):
        return eval, (f"open({str(self.target)!r}, 'w')",)


@contextlib.contextmanager
def trap(*names):
    """Importable modules that record being used: the names must not be resolved at all."""
    used = []

    class Module(types.ModuleType):
        def __getattr__(self, name):
            used.append(name)
            raise AttributeError(name)

    before = {name: sys.modules.get(name) for name in names}
    sys.modules.update({name: Module(name) for name in names})
    try:
        yield used
    finally:
        for name, module in before.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module
