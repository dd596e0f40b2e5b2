"""Feature networks: what a Fréchet distance is measured on.

A distance means nothing without the network behind it, so every network has a `name`
that travels with each number and each file of statistics.
"""

from __future__ import annotations

import abc
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from ebm_prior.errors import EbmPriorError
from ebm_prior.safe_load import load_torch_file, sha256_of

__all__ = [
    "ClassifierFeatures",
    "FeatureNetwork",
    "InceptionFeatures",
    "SmallClassifier",
    "load_features",
]

INCEPTION_NAME = "pytorch-fid InceptionV3 pool3 (2048)"
INCEPTION_SHA256 = "6726825d"  # torch hub puts the first digits of the hash into the file name
ASSETS = Path(__file__).parent.parent / "assets"
SHIPPED = {name: ASSETS / f"features_{name}.safetensors" for name in ("mnist", "digits")}
METADATA_KEY = "ebm_prior"


class FeatureNetwork(abc.ABC):
    """A frozen map from images to feature vectors.

    Attributes:
        name: Printed next to every number and stored with every file of statistics; two
            networks with different weights have different names.
        dim: Number of features.
        image_shape: (C, H, W) it takes, or None for any size.
        num_classes: Number of classes that `classify` tells apart, 0 if it does not classify.
        knows_data: Whether these are the classes of the data that it measures.
        device: Where it runs; features come back on the CPU.
    """

    name: str
    dim: int
    image_shape: tuple[int, int, int] | None = None
    num_classes: int = 0
    knows_data: bool = True
    device: torch.device
    batch_size: int = 250

    @abc.abstractmethod
    def _forward(self, images: Tensor) -> Tensor:
        """Features (B, dim) of float images (B, C, H, W) in [0, 1], on `device`."""

    def __call__(self, images: Tensor) -> Tensor:
        """Features of any number of images, (B, dim); see `batches`."""
        batches = list(self.batches(images))
        return torch.cat(batches) if batches else torch.empty(0, self.dim, dtype=torch.float64)

    @torch.no_grad()
    def batches(self, images: Tensor) -> Iterator[Tensor]:
        """Features of any number of images, batch by batch.

        Float images are rounded to 8 bits first: the number is then that of the saved
        picture files, and generated images are treated as the reference's are.

        Args:
            images: (B, C, H, W), uint8, or floats in [0, 1].

        Yields:
            (b, dim), float64, on the CPU.

        Raises:
            EbmPriorError: If the shape does not fit, or values are NaN or out of range.
        """
        from tqdm import tqdm

        expected = self.image_shape or ("C", "H", "W")
        if images.ndim != 4 or self.image_shape not in (None, tuple(images.shape[1:])):
            raise EbmPriorError(
                f"{self.name} takes images of shape (B, {', '.join(map(str, expected))}), "
                f"got {tuple(images.shape)}; choose other features or train a classifier with "
                "python -m ebm_prior.metrics.classifier"
            )
        # Shown only on a terminal and only once it has taken two seconds.
        for x in tqdm(
            images.split(self.batch_size), desc="features", delay=2, leave=False, disable=None
        ):
            yield self._forward(_quantize(x).to(self.device)).cpu().double()

    def classify(self, features: Tensor) -> Tensor:
        """Class probabilities (B, num_classes), float64, of features (B, dim).

        Raises:
            EbmPriorError: If the network is not a classifier.
        """
        raise EbmPriorError(f"{self.name} gives no class probabilities")

    def probabilities(self, images: Tensor) -> Tensor:
        """Class probabilities (B, num_classes), float64, of images (B, C, H, W)."""
        return self.classify(self(images))


def _quantize(images: Tensor) -> Tensor:
    """Float32 images in [0, 1] on the 256 levels of a picture file."""
    if images.dtype == torch.uint8:
        return images.float() / 255
    if not images.is_floating_point():
        raise EbmPriorError(f"images must be uint8 or floats in [0, 1], got {images.dtype}")
    low, high = images.min().item(), images.max().item()
    if not (low >= -1e-3 and high <= 1 + 1e-3):  # also true for NaN
        raise EbmPriorError(f"images must be floats in [0, 1], got values from {low} to {high}")
    return (images.clamp(0, 1) * 255).round().float() / 255


class SmallClassifier(nn.Module):
    """Convolutional classifier for small images, with 64 penultimate features.

    A stem of 16 channels, stride-2 convolutions (32, then 64 channels) until the larger
    side is at most 8 pixels, one more convolution, average pooling to 4x4, then
    Linear(64) and Linear(classes). LeakyReLU throughout: with ReLU a feature that is
    always zero would make covariances singular.
    """

    architecture = "small-classifier-1"
    dim = 64

    def __init__(self, image_shape: Sequence[int], num_classes: int):
        super().__init__()
        channels, height, width = image_shape
        layers: list[nn.Module] = _conv(channels, 16, 1)
        channels, side = 16, max(height, width)
        while channels == 16 or side > 8:
            layers += _conv(channels, min(2 * channels, 64), 2)
            channels, side = min(2 * channels, 64), (side + 1) // 2
        self.body = nn.Sequential(
            *layers,
            *_conv(channels, 64, 1),
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, self.dim),
            nn.LeakyReLU(0.1),
        )
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(self.dim, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        """Class logits (B, classes) of images (B, C, H, W) in [0, 1]."""
        return self.head(self.dropout(self.body(2 * x - 1)))


def _conv(inputs: int, outputs: int, stride: int) -> list[nn.Module]:
    return [
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False),
        nn.BatchNorm2d(outputs),
        nn.LeakyReLU(0.1),
    ]


class ClassifierFeatures(FeatureNetwork):
    """Penultimate features of a `SmallClassifier` stored by `train_classifier`.

    Args:
        path: A .safetensors file; the description of the network is in its metadata.
        device: Where to run it.

    Attributes:
        metadata: What the file says about itself: data, accuracy, command and so on.

    Raises:
        EbmPriorError: If the file is missing or not such a classifier.
    """

    def __init__(self, path: str | Path, device: str | torch.device = "cpu"):
        from safetensors import SafetensorError, safe_open

        path = Path(path)
        if not path.is_file():
            raise EbmPriorError(f"no such feature classifier: {path}")
        wrong = f"{path} is not a classifier written by python -m ebm_prior.metrics.classifier"
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads((file.metadata() or {})[METADATA_KEY])
                state = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise EbmPriorError(wrong) from error
        self.metadata: dict[str, Any] = _check_metadata(metadata, wrong)
        self.dim = SmallClassifier.dim
        self.image_shape = tuple(metadata["image_shape"])
        self.num_classes = metadata["num_classes"]
        self.device = torch.device(device)
        self.name = f"{metadata['title']} classifier ({self.dim})"
        if path not in SHIPPED.values():  # the user may train several on the same data
            self.name += f" {sha256_of(path)[:8]}"
        # Built without memory, so that sizes in a stranger's metadata allocate nothing.
        with torch.device("meta"):
            network = SmallClassifier(self.image_shape, self.num_classes)
        try:
            network.load_state_dict(state, assign=True)
        except RuntimeError as error:
            raise EbmPriorError(f"{wrong}: its tensors do not fit its description") from error
        self._network = network.to(self.device, torch.float32).eval().requires_grad_(False)

    def _forward(self, images: Tensor) -> Tensor:
        return self._network.body(2 * images - 1)

    @torch.no_grad()
    def classify(self, features: Tensor) -> Tensor:
        """Class probabilities (B, num_classes), float64, of features (B, dim)."""
        return self._network.head(features.float().to(self.device)).cpu().double().softmax(1)


def _check_metadata(metadata: Any, wrong: str) -> dict[str, Any]:  # noqa: ANN401
    if not isinstance(metadata, dict):
        raise EbmPriorError(wrong)
    if metadata.get("architecture") != SmallClassifier.architecture:
        raise EbmPriorError(f"{wrong}: unknown architecture {metadata.get('architecture')!r}")
    shape, classes = metadata.get("image_shape"), metadata.get("num_classes")
    sizes = [*shape, classes] if isinstance(shape, list) and len(shape) == 3 else []
    if not sizes or not all(type(n) is int and 0 < n <= 1 << 20 for n in sizes):
        raise EbmPriorError(f"{wrong}: bad image_shape {shape!r} or num_classes {classes!r}")
    if not isinstance(metadata.get("title"), str):
        raise EbmPriorError(f"{wrong}: no title")
    return metadata


class InceptionFeatures(FeatureNetwork):
    """pytorch-fid's InceptionV3, final average pooling: the features of published FIDs.

    Grey images are repeated to three channels, as pytorch-fid does with grey files. Its
    classes are ImageNet's and 8 that are never used; their logits are taken without the
    bias, as by the first inception score (Salimans et al., 2016) and by torch-fidelity
    ("logits_unbiased").

    Args:
        weights: State dict as pytorch-fid downloads it
            (pt_inception-2015-12-05-6726825d.pth); None takes it from torch hub's cache,
            fetching it first if need be.
        device: Where to run it.

    Raises:
        EbmPriorError: If the weights cannot be had or read.
    """

    dim = 2048
    num_classes = 1008
    knows_data = False
    batch_size = 50

    def __init__(self, weights: str | Path | None = None, device: str | torch.device = "cpu"):
        from ebm_prior.torchvision_compat import import_torchvision

        import_torchvision()  # pytorch_fid needs torchvision to import
        from pytorch_fid import inception

        self.name, state = INCEPTION_NAME, _inception_state(inception.FID_WEIGHTS_URL, weights)
        if weights is not None:
            digest = sha256_of(weights)[:8]
            if digest != INCEPTION_SHA256:
                self.name += f" with other weights {digest}"
        # pytorch-fid fetches inside its constructor and unpickles; hand it the tensors instead.
        with mock.patch.object(inception, "load_state_dict_from_url", lambda *_, **__: state):
            try:
                network = inception.InceptionV3([inception.InceptionV3.BLOCK_INDEX_BY_DIM[2048]])
            except (RuntimeError, TypeError, AttributeError) as error:
                raise EbmPriorError(
                    f"{weights} does not hold the weights of pytorch-fid's InceptionV3; "
                    f"expected the file of {inception.FID_WEIGHTS_URL}"
                ) from error
        self.device = torch.device(device)
        self._network = network.to(self.device).eval()
        self._classes = state["fc.weight"].double()  # which pytorch-fid's own network drops

    def classify(self, features: Tensor) -> Tensor:
        """Class probabilities (B, 1008), float64, of features (B, 2048)."""
        return (features.double() @ self._classes.T).softmax(1)

    def _forward(self, images: Tensor) -> Tensor:
        if images.shape[1] == 1:
            images = images.expand(-1, 3, -1, -1)
        elif images.shape[1] != 3:
            raise EbmPriorError(
                f"{self.name} takes grey or RGB images, got {images.shape[1]} channels"
            )
        return self._network(images)[0].flatten(1)


def _inception_state(url: str, weights: str | Path | None) -> dict[str, Tensor]:
    if weights is not None:
        return load_torch_file(weights)
    try:
        with contextlib.redirect_stdout(sys.stderr):  # torch prints what it fetches
            return torch.hub.load_state_dict_from_url(
                url, map_location="cpu", check_hash=True, weights_only=True
            )
    except (OSError, RuntimeError) as error:  # no network, no room, wrong hash
        raise EbmPriorError(
            f"cannot fetch the Inception weights ({error}); download {url} elsewhere and pass "
            "--inception-weights FILE, or use --features mnist, digits or a classifier file"
        ) from error


def load_features(
    spec: str | Path | None = None,
    image_shape: Sequence[int] | None = None,
    *,
    inception_weights: str | Path | None = None,
    device: str | torch.device = "cpu",
) -> FeatureNetwork:
    """Load the network that distances are measured on.

    Args:
        spec: "inception", "mnist", "digits", or the path of a .safetensors file written by
            `train_classifier`. None chooses: Inception where `inception_weights` is given,
            else the shipped classifier for (1, 28, 28) or (1, 8, 8) images, else Inception.
        image_shape: (C, H, W) of the images, used to choose and to check.
        inception_weights: See `InceptionFeatures`.
        device: Where to run it.

    Raises:
        EbmPriorError: If `spec` is unknown, its file unusable, or made for other images.
    """
    if spec is None:
        shipped = {(1, 28, 28): "mnist", (1, 8, 8): "digits"}
        shape = tuple(image_shape or ())
        spec = "inception" if inception_weights else shipped.get(shape, "inception")
    if spec == "inception":
        return InceptionFeatures(inception_weights, device)
    if inception_weights is not None:
        raise EbmPriorError(f"--inception-weights does not go with --features {spec}")
    if str(spec) not in SHIPPED and Path(spec).suffix != ".safetensors":
        raise EbmPriorError(
            f"unknown features {str(spec)!r}: choose inception, {', '.join(SHIPPED)} or a "
            ".safetensors file written by python -m ebm_prior.metrics.classifier"
        )
    network = ClassifierFeatures(SHIPPED.get(str(spec), spec), device)
    if image_shape is not None and tuple(image_shape) != network.image_shape:
        raise EbmPriorError(
            f"{network.name} takes images of shape {network.image_shape}, these are "
            f"{tuple(image_shape)}; choose other features with --features"
        )
    return network
