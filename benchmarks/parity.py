"""Compare the adapters with tensors that the public code computed.

    python -m benchmarks.parity FOLDER [FOLDER ...]

Each FOLDER is of one checkpoint, under a folder named after its family: the checkpoint
(`checkpoint.pt`, or `ckpt/` and other `ckpt*` copies), `expected.safetensors` (float32) and
`meta.json`. Prints, per checkpoint, the largest error of any tensor as a fraction of what is
allowed: 1e-5 of the tensor's largest value, or five times the float32-against-float64
difference that `meta.json` lists, whichever is larger.
"""

from __future__ import annotations

import importlib
import json
import math
import sys
from collections.abc import Callable
from pathlib import Path

from safetensors.torch import load_file

from benchmarks import nvae_parity, stages_parity
from ebm_prior import Backbone

ANSWERS = {"nvae": nvae_parity, "biva": stages_parity, "hvae": stages_parity}


def errors(
    folder: Path,
    family: str,
    checkpoint: str = "",
    *,
    load: Callable[[Path], Backbone] | None = None,
    expected: Path | None = None,
) -> dict[str, float]:
    """Error of each reference tensor as a fraction of the tolerance (1 = at the bound).

    Args:
        folder: Folder of one checkpoint.
        family: `nvae`, `biva` or `hvae`.
        checkpoint: Name of the checkpoint inside the folder [default: the family's].
        load: How to load it [default: the adapter's `load`].
        expected: Reference file to use instead of the folder's own.
    """
    answers = ANSWERS[family]
    load = load or importlib.import_module(f"backbones.{family}").load
    checkpoint = checkpoint or ("checkpoint.pt" if family == "nvae" else "ckpt")
    given = load_file(expected or folder / "expected.safetensors")
    actual = answers.compute(load(folder / checkpoint), given)
    float32 = rounding(json.loads((folder / "meta.json").read_text()))
    ratios = {}
    for name, value in given.items():
        if name.split(".")[0] in answers.NOT_COMPARED:
            continue
        if actual[name].shape != value.shape:
            raise ValueError(f"{name}: {tuple(actual[name].shape)}, not {tuple(value.shape)}")
        allowed = max(1e-5 * value.abs().max().item(), 5 * (float32.get(name) or 0.0))
        worst = (actual[name] - value).abs().max().item()
        ratios[name] = worst / allowed if allowed else float(worst > 0)
    return ratios


def rounding(meta: dict) -> dict[str, float | None]:
    """Largest float32-against-float64 difference of each tensor."""
    listed = meta.get("float32_vs_float64_max_abs_diff")
    if listed is not None:
        return listed
    return {n: facts.get("max_abs_diff_fp32_vs_fp64") for n, facts in meta["tensors"].items()}


def main() -> int:
    """Print the table; exit code 1 if any tensor is out of bounds."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    bad = False
    print(f"{'checkpoint':<42}{'tensors':>8}{'worst / allowed':>17}  worst tensor")
    for folder in map(Path, sys.argv[1:]):
        family = folder.resolve().parent.name
        for checkpoint in sorted(p.name for p in folder.glob("c*k*pt*")):
            ratios = errors(folder, family, checkpoint)
            bad |= not all(ratio <= 1 for ratio in ratios.values())
            worst = max(ratios, key=lambda name: ratios[name] if ratios[name] >= 0 else math.inf)
            label = f"{family}/{folder.name}/{checkpoint}"
            print(f"{label:<42}{len(ratios):>8}{ratios[worst]:>17.3f}  {worst}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
