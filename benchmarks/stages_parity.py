"""Compare the BIVA and HVAE adapters with stored reference tensors.

    python benchmarks/stages_parity.py FOLDER [FOLDER ...]

Each FOLDER is of one checkpoint, under a folder named after its family: `ckpt/` (and other
`ckpt*` copies), `expected.safetensors` (tensors of the public code, float32) and `meta.json`.
Prints, per checkpoint, the largest error of any tensor as a fraction of what is allowed: 1e-5
of the tensor's largest value, or five times the float32-against-float64 difference that
`meta.json` lists, whichever is larger.
"""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from backbones.stages import StagedBackbone
from backbones.stages.network import log_normal

NOT_OUTPUTS = ("eps", "eps_q", "w", "x")
# Scores with some stages left to the prior mean (HVAE's L>k) are not part of the package.
NOT_OFFERED = ("elbo_k", "log_px_k", "kl_k", "llr_k", "z_k", "x_params_k")


def compute(backbone: StagedBackbone, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's answer for every tensor that the reference holds.

    The reference counts latents from the bottom, in the reverse of the prior's order.
    """
    count = len(backbone.groups)
    out: dict[str, Tensor] = {}

    def get(name: str) -> list[Tensor]:
        return [given[f"{name}.{i}"] for i in reversed(range(count))]

    def put(name: str, values) -> None:
        out.update({f"{name}.{count - 1 - i}": v.detach() for i, v in enumerate(values)})

    eps = [e.clone().requires_grad_() for e in get("eps")]
    z = backbone.transform(eps)
    put("z", z)
    g = sum((w * v).sum() for w, v in zip(get("w"), z, strict=True))
    put("grad_eps", torch.autograd.grad(g, eps))
    put("prior_mu", [mu for mu, _ in backbone.prior_parameters(z)])
    put("prior_sigma", [sigma for _, sigma in backbone.prior_parameters(z)])
    px = backbone.decode(backbone.transform(eps))
    parts = _parts(px)
    out.update({f"x_params{k}": v.detach() for k, v in parts.items()})
    square = 0.5 * sum(v.square().sum() for v in parts.values())
    put("grad_x_eps", torch.autograd.grad(square, eps))

    x = given["x"]
    x = (x + 1) / 2 if backbone.centred else x
    noise = [e.clone().requires_grad_() for e in get("eps_q")]
    draws = backbone.infer(x, noise)
    put("zq", [d.z for d in draws])
    for name, field in (("q", "q"), ("pq", "p")):
        put(f"{name}_mu", [getattr(d, field)[0] for d in draws])
        put(f"{name}_sigma", [getattr(d, field)[1] for d in draws])
    kl = [log_normal(d.z, d.q) - log_normal(d.z, d.p) for d in draws]
    put("kl", kl)
    px = backbone.decode([d.z for d in draws])
    out.update({f"x_params_q{k}": v.detach() for k, v in _parts(px).items()})
    log_px = px.log_prob(x)
    elbo = log_px - sum(kl)
    put("grad_elbo_eps_q", torch.autograd.grad(elbo.sum(), noise))
    out["log_px"], out["elbo"] = log_px.detach(), elbo.detach()
    return out


def _parts(px) -> dict[str, Tensor]:  # noqa: ANN001
    """Likelihood parameters as the reference names them."""
    if hasattr(px, "location"):
        return {".mean": px.location, ".logscale": px.log_scale}
    return {"": px.params}


def errors(folder: Path, family: str, checkpoint: str = "ckpt") -> dict[str, float]:
    """Error of each reference tensor as a fraction of the tolerance (1 = at the bound)."""
    given = load_file(folder / "expected.safetensors")
    meta = json.loads((folder / "meta.json").read_text())
    float32 = meta["float32_vs_float64_max_abs_diff"]
    load = importlib.import_module(f"backbones.{family}").load
    actual = compute(load(folder / checkpoint), given)
    ratios = {}
    for name, expected in given.items():
        if name.split(".")[0] in NOT_OUTPUTS or name.startswith(NOT_OFFERED):
            continue
        if actual[name].shape != expected.shape:
            raise ValueError(f"{name}: {tuple(actual[name].shape)}, not {tuple(expected.shape)}")
        allowed = max(1e-5 * expected.abs().max().item(), 5 * (float32.get(name) or 0.0))
        worst = (actual[name] - expected).abs().max().item()
        ratios[name] = worst / allowed if allowed else float(worst > 0)
    return ratios


def main() -> int:
    """Print the table; exit code 1 if any tensor is out of bounds."""
    if len(sys.argv) < 2:
        print(__doc__)
        return 2
    bad = False
    print(f"{'checkpoint':<42}{'tensors':>8}{'worst / allowed':>17}  worst tensor")
    for folder in map(Path, sys.argv[1:]):
        for checkpoint in sorted(p.name for p in folder.glob("ckpt*")):
            ratios = errors(folder, folder.parent.name, checkpoint)
            worst = max(ratios, key=ratios.get)
            bad |= not ratios[worst] <= 1
            label = f"{folder.parent.name}/{folder.name}/{checkpoint}"
            print(f"{label:<42}{len(ratios):>8}{ratios[worst]:>17.3f}  {worst}")
    return int(bad)


if __name__ == "__main__":
    sys.exit(main())
