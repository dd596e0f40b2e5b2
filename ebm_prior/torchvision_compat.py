"""torchvision next to a CPU-only torch: the one place that makes the import work.

torchvision's wheel on PyPI is built against a CUDA build of torch. Beside a CPU-only
one its compiled operators do not load, and importing it fails as soon as it attaches
Python code to the operator `torchvision::nms`, although nothing here calls that
operator. Declaring its signature is enough. pytorch-fid imports torchvision too:
call `import_torchvision` before importing either.
"""

from __future__ import annotations

import sys
from types import ModuleType

import torch

__all__ = ["import_torchvision"]

_declarations: list[torch.library.Library] = []  # operators vanish with their Library object


def import_torchvision() -> ModuleType:
    """Import torchvision, declaring its two missing operators if that is what fails.

    Returns:
        The torchvision module; data sets, transforms and models work, the box
        operators only if the installed torchvision brought its own.
    """
    try:
        import torchvision
    except RuntimeError as error:
        if "torchvision::nms" not in str(error):
            raise
        library = torch.library.Library("torchvision", "FRAGMENT")
        library.define("nms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        library.define("qnms(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
        _declarations.append(library)
        # The failed import left half of its submodules behind.
        for name in [n for n in sys.modules if n.partition(".")[0] == "torchvision"]:
            del sys.modules[name]
        import torchvision
    return torchvision
