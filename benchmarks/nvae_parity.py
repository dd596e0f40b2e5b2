"""What the NVAE adapter answers for every tensor of a reference file; see `parity.py`."""

from __future__ import annotations

import torch
from torch import Tensor

from backbones.nvae import NVAEBackbone
from backbones.nvae.likelihoods import NvaeGaussian, NvaeLogisticMixture
from backbones.nvae.network import kl_divergence

NOT_COMPARED = (
    # inputs
    *("eps", "eps_q", "w", "x", "dec_eps", "dec_u_mix", "dec_u_logistic", "x_8bit", "x_8bit_sub"),
    "decoder_sample_t07",  # the decoder has no sampling temperature here
)


def compute(backbone: NVAEBackbone, given: dict[str, Tensor]) -> dict[str, Tensor]:
    """The adapter's answer for every tensor that the reference holds."""
    count = len(backbone.groups)
    noise = [given[f"eps.{i}"] for i in range(count)]
    out: dict[str, Tensor] = {}

    def put(name: str, values: list[Tensor] | tuple[Tensor, ...]) -> None:
        out.update({f"{name}.{i}": value for i, value in enumerate(values)})

    eps = [e.clone().requires_grad_() for e in noise]
    z = backbone.transform(eps)
    put("z", [v.detach() for v in z])
    g = sum((given[f"w.{i}"] * v).sum() for i, v in enumerate(z))
    out["g"] = g.detach().reshape(1)
    put("grad_eps", torch.autograd.grad(g, eps))
    z = backbone.transform(eps)
    log_p = _log_prior(backbone, z)
    put("grad_logp_eps", torch.autograd.grad(log_p.sum(), eps))
    with torch.no_grad():
        out["log_p_total"] = log_p.detach()
        z = backbone.transform(noise)
        moments = backbone.prior_parameters(z)
        put("prior_mu", [m for m, _ in moments])
        put("prior_sigma", [s for _, s in moments])
        px = backbone.decode(z)
        out["logits"] = px.params
        out["decoder_mean"] = _mean(px)
        if isinstance(px, NvaeLogisticMixture) and "dec_u_mix" in given:
            out["decoder_sample"] = px.sample(
                uniforms=(given["dec_u_mix"], given["dec_u_logistic"])
            )
        if isinstance(px, NvaeGaussian) and "dec_eps" in given:
            out["decoder_sample"] = px.sample(noise=given["dec_eps"])
        cold, features = backbone.top_down(noise, 0.7)
        put("z_t07", cold)
        out["logits_t07"] = backbone.decode(cold, features).params
        out["log_p_total_t07"] = _log_prior(backbone, cold, 0.7)

        x = given.get("x_8bit", given["x"])
        pad = backbone.padding
        x = x[..., pad : -pad or None, pad : -pad or None]
        groups = backbone.infer(x, [given[f"eps_q.{i}"] for i in range(count)])
        for name, field in (
            ("q_mu", "q_mu"), ("q_sigma", "q_sigma"), ("p_mu", "p_mu"),
            ("p_sigma", "p_sigma"), ("zq", "z"), ("zq_pre_nf", "z_base"),
        ):  # fmt: skip
            put(name, [getattr(group, field) for group in groups])
        analytic = [kl_divergence(q.q_mu, q.q_sigma, q.p_mu, q.p_sigma) for q in groups]
        put("kl_analytic", analytic)
        flows = backbone.network.config.flows > 0
        put("kl", [q.log_q - q.log_p for q in groups] if flows else analytic)
        out["log_q"] = sum(q.log_q for q in groups)
        out["log_p"] = sum(q.log_p for q in groups)
        px = backbone.decode([q.z for q in groups])
        out["logits_q"] = px.params
        out["decoder_mean_q"] = _mean(px)
        out["recon_log_px"] = px.log_prob(x)
        out["log_iw"] = out["recon_log_px"] - out["log_q"] + out["log_p"]
    for name in [n for n in given if n.endswith("_sub")]:
        if name.removesuffix("_sub") in out:
            out[name] = out[name.removesuffix("_sub")][:, :, ::8, ::8]
    return out


def _mean(px) -> Tensor:  # noqa: ANN001
    """Mean image on the network's own canvas: the reference keeps the padding."""
    return torch.sigmoid(px.params) if px.params.shape[1] == 1 else px.mean


def _log_prior(backbone: NVAEBackbone, z: tuple[Tensor, ...], temperature: float = 1.0) -> Tensor:
    """Log p(z) per sample with sigmas scaled by the temperature."""
    total = 0.0
    for v, (mu, sigma) in zip(z, backbone.prior_parameters(z), strict=True):
        normal = torch.distributions.Normal(mu, temperature * sigma)
        total = total + normal.log_prob(v).flatten(1).sum(1)
    return total
