"""`ebm-prior info`: what a checkpoint or a folder of heads is."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import click

from ebm_prior.cli.options import json_option


@click.command()
@click.argument("source", metavar="PATH")
@click.option("--backbone", help="Backbone family [default: by the checkpoint].")
@click.option("--ckpt", metavar="FILE", help="For heads: the checkpoint of their backbone.")
@json_option
def info(source: str, backbone: str | None, ckpt: str | None, as_json: bool) -> None:
    """Describe a backbone's checkpoint, or heads: family, groups, parameters, sampler.

    \b
    ebm-prior info nvae_cifar.pt
    ebm-prior info runs/mine
    ebm-prior info user/name --ckpt nvae_cifar.pt --json
    """
    from ebm_prior.info import describe
    from ebm_prior.safe_load import printable

    found = describe(source, backbone=backbone, ckpt=ckpt)
    if as_json:
        click.echo(json.dumps(found))
        return
    lines = list(heads_lines(found) if found["what"] == "heads" else backbone_lines(found))
    width = max(len(label) for label, _ in lines)
    for label, text in lines:
        # A stranger's words must forge no lines of their own.
        click.echo(printable(f"{label:{width}}  {text}"))


def backbone_lines(found: dict) -> Iterator[tuple[str, str]]:
    """Labels and texts of a backbone; facts that heads did not record are left out."""
    yield "family", found["family"]
    data = found["dataset"] or "not named"
    yield "data set", f"{data}, binarized" if found.get("binarize") else str(data)
    if found["image_shape"]:
        yield "image shape", times(found["image_shape"])
    if "likelihood" in found:
        yield "likelihood", found["likelihood"]
    yield "groups", f"{len(found['groups'])}, top first"
    for name, shape in found["groups"]:
        yield f"  {name}", times(shape)
    yield "feature shape", times(found["feature_shape"])
    if found["parameters"]:
        yield "parameters", f"{found['parameters']:,}"
    yield "checkpoint", str(found["checkpoint"])
    yield "SHA-256", found["sha256"]


def heads_lines(found: dict) -> Iterator[tuple[str, str]]:
    """Labels and texts of heads, then of their backbone."""
    from ebm_prior.heads import widths_of

    heads, sampler = found["heads"], found["sampler"]
    share = "" if found["share"] is None else f" ({found['share']:.1%} of the backbone's)"
    yield "heads", f"{heads['kind']}, {widths_of(heads)}"
    yield "head parameters", f"{heads['parameters']:,}{share}"
    yield (
        "sampler",
        f"{sampler['steps']} {sampler['transition']} steps of size {sampler['step_size']:.3g}",
    )
    for label, text in backbone_lines(found["backbone"]):
        yield f"  {label}", text
    if found["note"]:
        yield "  note", found["note"]


def times(shape: Any) -> str:
    """A shape such as 8x4x4."""
    return "x".join(map(str, shape))
