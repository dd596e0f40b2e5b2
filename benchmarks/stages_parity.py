"""What the BIVA and HVAE adapters answer for every tensor of a reference file; see `parity.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.stages import StagedBackbone
from backbones.stages.network import log_normal
from ebm_prior.decision import infer_upper

NOT_COMPARED = ("eps", "eps_q", "w", "x")  # inputs


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
    for k in (1, 2):
        if f"elbo_k{k}" in given:
            out |= skipping(backbone, x, noise, k)
            out[f"llr_k{k}"] = out["elbo"] - out[f"elbo_k{k}"]
    return out


@torch.no_grad()
def skipping(
    backbone: StagedBackbone, x: Tensor, noise: list[Tensor], k: int
) -> dict[str, Tensor]:
    """L>k and its parts; the reference's k counts stages, and a stage may have two groups."""
    groups = sum(int(group.name[1]) <= k for group in backbone.groups)
    upper = infer_upper(backbone, x, noise, groups)
    z = upper.complete(backbone)
    px = backbone.decode(z)
    log_px = px.log_prob(x)
    out = {f"x_params_k{k}{name}": value for name, value in _parts(px).items()}
    last = len(backbone.groups) - 1
    out |= {f"z_k{k}.{last - i}": value for i, value in enumerate(z)}
    out |= {f"kl_k{k}.{last - i}": value for i, value in enumerate(upper.log_ratio.unbind(1))}
    out |= {f"log_px_k{k}": log_px, f"elbo_k{k}": log_px - upper.log_ratio.sum(1)}
    return out


def _parts(px) -> dict[str, Tensor]:  # noqa: ANN001
    """Likelihood parameters as the reference names them."""
    if hasattr(px, "location"):
        return {".mean": px.location, ".logscale": px.log_scale}
    return {"": px.params}
