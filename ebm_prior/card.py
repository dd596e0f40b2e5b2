"""The model card of fitted heads: made from their configuration, so it says what was measured."""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Collection
from dataclasses import fields
from typing import TYPE_CHECKING

from ebm_prior.heads import widths_of
from ebm_prior.record import RESULTS, recorded
from ebm_prior.saved import BACKBONE, is_number, is_text
from ebm_prior.tables import Table, escaped

if TYPE_CHECKING:
    from huggingface_hub import EvalResult

__all__ = ["commands", "evaluation_table", "heading", "model_card", "picture_captions"]

PAPER = "https://arxiv.org/abs/2306.06323"
STAGE_TWO = f"""Small networks for `ebm-prior` that tilt the Gaussian prior of a pretrained, frozen
hierarchical VAE: p(z) ∝ exp(-E(z)) · p_VAE(z), after
[Cui, Wu and Han (CVPR 2023)]({PAPER}). The backbone's weights are untouched."""
JOINT = f"""Small networks for `ebm-prior` that tilt the Gaussian prior of a multi-layer generator,
p(z) ∝ exp(-E(z)) · p_generator(z), trained together with it, after
[Cui, Wu and Han (CVPR 2023)]({PAPER})."""
HUB_DATASETS = {
    "celeba": "flwrlabs/celeba",
    "cifar10": "uoft-cs/cifar10",
    "cifar100": "uoft-cs/cifar100",
    "fashion_mnist": "zalando-datasets/fashion_mnist",
    "mnist": "ylecun/mnist",
    "svhn": "ufldl-stanford/svhn",
}
"""Hub ids of the data sets that have one; others are named in the text alone."""
PRIORS = {
    "gaussian": "Gaussian prior",
    "full_covariance": "full-covariance Gaussian",
    "resampling": "importance resampling",
    "energy": "energy prior",
    "reconstruction": "reconstructions (floor)",
}
BASELINES = ("full_covariance", "resampling")
"""Those of them that are measured where asked for."""
SECTIONS = {
    "evaluation": "Results",
    "ood": "Out-of-distribution detection",
    "anomaly": "Anomaly detection",
    "chains": "Long chains",
    "likelihood": "Log-likelihood",
}
"""Headings of recorded results."""


def model_card(config: dict, repo_id: str | None = None, pictures: Collection[str] = ()) -> str:
    """Markdown with the Hub's metadata block.

    Nothing is in it that is not in the configuration: without a recorded evaluation there
    are no numbers, without pictures no pictures.

    Args:
        config: Checked configuration of the heads, without local paths.
        repo_id: Where the heads will be, for the commands.
        pictures: Paths of the pictures beside the card.
    """
    from ebm_prior.pictures import BEFORE_AFTER

    parts = [
        _metadata(config, repo_id),
        _title(config),
        _before_after(config, pictures),
        _usage(config, repo_id or "user/name"),
        _backbone(config),
        _results(config),
        _chains(config, pictures),
        *_recorded(config, pictures),
        _reproduction(config, repo_id or "user/name", BEFORE_AFTER in pictures),
        _limits(config),
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _metadata(config: dict, repo_id: str | None) -> str:
    from huggingface_hub import ModelCardData

    backbone = config["backbone"]
    dataset = HUB_DATASETS.get(backbone.get("dataset") or "")
    results = _eval_results(config)
    data = ModelCardData(
        library_name="ebm-prior",
        license=config.get("license") or "unknown",
        tags=["energy-based-model", "vae", "image-generation", backbone["name"]],
        datasets=[dataset] if dataset else None,
        base_model=_hub_id(backbone.get("source")),
        model_name=(repo_id or _name(config)).split("/")[-1] if results else None,
        eval_results=results or None,
    )
    return f"---\n{data.to_yaml()}\n---"


def _hub_id(source: str | None) -> str | None:
    """The Hub id that a backbone's location is, or None for a URL or a description."""
    return source if source and re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", source) else None


def _name(config: dict) -> str:
    return f"{config['backbone']['name']}-{config['backbone'].get('dataset') or 'unnamed'}"


def _evaluation(config: dict) -> dict | None:
    """The recorded evaluation if it is complete; a card shows a table or none."""
    found = config.get("training", {}).get("evaluation")
    try:
        for prior in PRIORS:
            if prior in BASELINES and prior not in found:
                continue
            quality = found[prior]
            numbers = [quality[key] for key in ("frechet", "precision", "recall", "n")]
            if not all(map(is_number, numbers)):
                return None
            if not is_text(quality["features"]):
                return None
        if found["gap_closed"] is not None and not is_number(found["gap_closed"]):
            return None
        if not all(
            is_text(found.get(key) or "") for key in ("data", "features_option", "reference")
        ):
            return None
        if not isinstance(found.get("runs", []), list):
            return None
    except (KeyError, TypeError):
        return None
    return found


def _eval_results(config: dict) -> list[EvalResult]:
    from huggingface_hub import EvalResult

    found = _evaluation(config)
    if found is None:
        return []
    data = found.get("data") or config["backbone"].get("dataset") or "unnamed"
    energy = found["energy"]
    measured = f"{energy['features']} features, {energy['n']} samples"
    return [
        EvalResult(
            task_type="unconditional-image-generation",
            task_name="Image generation",
            dataset_type=HUB_DATASETS.get(data, data),
            dataset_name=data,
            dataset_split="test",
            metric_type=kind,
            metric_name=f"{name} ({measured})",
            metric_value=round(value, 4),
        )
        for kind, name, value in (
            ("frechet-distance", "Fréchet distance", energy["frechet"]),
            ("precision", "Precision", energy["precision"]),
            ("recall", "Recall", energy["recall"]),
            ("gap-closed", "Share of the gap closed", found["gap_closed"]),
        )
        if value is not None
    ]


def _title(config: dict) -> str:
    backbone, heads, sampler = config["backbone"], config["heads"], config["sampler"]
    dataset = escaped(backbone.get("dataset") or "unnamed data")
    about = JOINT if "train" in config.get("training", {}) else STAGE_TWO
    return f"""# Energy heads for {escaped(backbone["name"])} on {dataset}

{about}

Heads: `{heads["kind"]}`, {widths_of(heads)}. Sampler: {sampler["steps"]}
`{sampler["transition"]}` steps of size {sampler["step_size"]:.4g}."""


def picture_captions(config: dict) -> dict[str, str]:
    """What the card's own pictures show, by their path in the repository."""
    from ebm_prior.pictures import BEFORE_AFTER, CARD_SEEDS, TRANSITION

    return {
        BEFORE_AFTER: f"The same noise (seeds {CARD_SEEDS[0]} to {CARD_SEEDS[-1]}, none left "
        f"out): the Gaussian prior, then {config['sampler']['steps']} steps of the energy prior.",
        TRANSITION: "Eight of the chains above: each column is one, time runs downwards.",
    }


def _before_after(config: dict, pictures: Collection[str]) -> str:
    from ebm_prior.pictures import BEFORE_AFTER as PATH

    if PATH not in pictures:
        return ""
    return f"![Samples before and after]({PATH})\n\n*{picture_captions(config)[PATH]}*"


def _chains(config: dict, pictures: Collection[str]) -> str:
    from ebm_prior.pictures import TRANSITION as PATH

    if PATH not in pictures:
        return ""
    return f"## Chains\n\n![Chains on their way]({PATH})\n\n*{picture_captions(config)[PATH]}*"


def _checkpoint(config: dict) -> str:
    return config["backbone"].get("checkpoint") or "checkpoint.pt"


def _ckpt(config: dict) -> str:
    """Where a reader has the backbone after the commands of `_usage`."""
    return f"heads/{BACKBONE}" if config["backbone"].get("converted") else _checkpoint(config)


def _usage(config: dict, repo_id: str) -> str:
    backbone = config["backbone"]
    ckpt = _ckpt(config)
    if backbone.get("converted"):
        fetch = f"ebm-prior pull {repo_id} --with-backbone --out heads\n"
        own, source = "", "heads"
    else:
        fetch, own, source = "", f" --ckpt {shlex.quote(ckpt)}", repo_id
    return f"""## Use

```bash
pip install ebm-prior
{fetch}ebm-prior sample --heads {source}{own} --steps {config["sampler"]["steps"]}
```

```python
import ebm_prior

backbone = ebm_prior.load_backbone({_string(backbone["name"])}, {_string(ckpt)})
prior = ebm_prior.EnergyPrior.from_pretrained({_string(source)}, backbone=backbone)
images = prior.sample(16)  # (16, C, H, W) in [0, 1]
```"""


def _string(text: str) -> str:
    """Python's literal of a text, which may be a stranger's."""
    return json.dumps(text, ensure_ascii=False)


def _code(text: str) -> str:
    """Text in a monospaced cell."""
    return f"`{text.replace('`', chr(39)).replace('|', '/')}`"


def _backbone(config: dict) -> str:
    backbone = config["backbone"]
    source = backbone.get("source")
    if _hub_id(source):
        where = f"[{source}](https://huggingface.co/{source})"
    elif re.fullmatch(r"https?://[\w./~%?=&#:@+-]+", source or ""):
        where = f"<{source}>"
    else:
        where = escaped(source or "not recorded")
    lines = [
        "## Backbone",
        "",
        f"| family | {escaped(backbone['name'])} |",
        "|---|---|",
        f"| data set | {escaped(backbone.get('dataset') or 'not recorded')} |",
        f"| checkpoint | {_code(_checkpoint(config))} |",
        f"| SHA-256 | {_code(backbone['sha256'] or 'none')} |",
        f"| where to get it | {where} |",
        f"| licence | {escaped(backbone.get('license') or 'not recorded')} |",
    ]
    if converted := backbone.get("converted"):
        lines += [
            f"| in this repository | `{BACKBONE}`, the same weights as safetensors, SHA-256 "
            f"`{converted['sha256']}` |"
        ]
        return "\n".join(lines)
    return "\n".join([*lines, "", "It is not part of this repository."])


def evaluation_table(config: dict) -> Table | None:
    """The recorded evaluation as a table, or None if there is none that is complete."""
    found = _evaluation(config)
    if found is None:
        return None
    priors = {key: title for key, title in PRIORS.items() if key in found}
    names = {"frechet": "Fréchet distance", "precision": "precision", "recall": "recall"}
    for key in ("density", "coverage"):  # newer ones; statistics alone do not give them
        if all(is_number(found[prior].get(key)) for prior in priors):
            names[key] = key
    rows = [
        (
            title,
            *(f"{found[key][name]:.{2 if name == 'frechet' else 3}f}" for name in names),
            str(found[key]["n"]),
        )
        for key, title in priors.items()
    ]
    data = found.get("data") or config["backbone"].get("dataset") or "the data set"
    held_out = found.get("reference_images")
    held_out = held_out if is_number(held_out) else None
    against = f"{held_out} held-out images of {data}" if held_out else f"held-out images of {data}"
    if found.get("reference"):
        against = f"the statistics in {found['reference']}"
        against += f" ({held_out} images)" if held_out else ""
    runs = f" Means of {len(found['runs'])} runs." if found.get("runs") else ""
    if is_number(found.get("fitted_to")):
        runs += f" The full-covariance Gaussian is fitted to {found['fitted_to']} posterior draws."
    gap = found["gap_closed"]
    return Table(
        f"Against {against}, on the features of: {found['energy']['features']}. Distances compare "
        f"only on the same features and with as many samples.{runs}",
        ("", *names.values(), "samples"),
        rows,
        "There is no gap between Gaussian prior and reconstructions to close."
        if gap is None
        else "Share of the gap between Gaussian prior and reconstructions that is closed: "
        f"{gap:.2f}.",
    )


def _results(config: dict) -> str:
    table = evaluation_table(config)
    return f"## {SECTIONS['evaluation']}\n\n{table.markdown()}" if table else ""


def heading(name: str) -> str:
    """Heading of a recorded result."""
    kind, colon, rest = name.partition(": ")
    return SECTIONS.get(kind, kind.capitalize()) + colon + rest


def _recorded(config: dict, pictures: Collection[str]) -> list[str]:
    """What other verbs have recorded, a section each."""
    parts = []
    for name, found in recorded(config).items():
        shown = [
            f"![{escaped(caption)}]({RESULTS}/{file_name})\n\n*{escaped(caption)}*"
            for file_name, caption in found.captions.items()
            if f"{RESULTS}/{file_name}" in pictures
        ]
        title = f"## {escaped(heading(name))}"
        parts.append("\n\n".join([title, *(t.markdown() for t in found.tables), *shown]))
    return parts


def commands(config: dict, source: str, pictures: bool = True) -> list[str]:
    """The commands that repeat what is recorded.

    Args:
        config: Checked configuration of the heads.
        source: What to call them: a Hub id or a folder.
        pictures: Whether to show the one that draws the sample grids.
    """
    from ebm_prior.pictures import BEFORE_AFTER, CARD_SEEDS, TRANSITION

    ckpt, quoted, found = shlex.quote(_ckpt(config)), shlex.quote(source), []
    if isinstance(config.get("training", {}).get("fit"), dict):
        found.append(fit_command(config)[0])
    if pictures:
        found.append(
            f"ebm-prior sample --heads {quoted} --ckpt {ckpt} "
            f"--seeds {CARD_SEEDS[0]}-{CARD_SEEDS[-1]} --compare \\\n"
            f"    --out {BEFORE_AFTER} --trajectory {TRANSITION}"
        )
    if _evaluation(config):
        found.append(evaluate_command(config, source))
    # a recorded setting with a line break of its own would leave the block of commands
    return [c for c in found if all(map(str.isprintable, c.split("\\\n")))]


def _reproduction(config: dict, repo_id: str, pictures: bool) -> str:
    found, remarks = commands(config, repo_id, pictures), ""
    if not found:
        return ""
    training = config.get("training", {})
    if isinstance(training.get("fit"), dict) and (unsettable := fit_command(config)[1]):
        remarks = f"\n\nSet from Python (`FitConfig`): {', '.join(unsettable)}."
    result = training.get("result")
    if isinstance(result, dict) and isinstance(result.get("iterations"), int):
        what = "training" if "train" in training else "fit"
        remarks = f"\n\nThe {what} stopped after {result['iterations']} iterations." + remarks
    return "## Reproduce\n\n```bash\n" + "\n".join(found) + "\n```" + remarks


def fit_command(config: dict) -> tuple[str, list[str]]:
    """The command that repeats a recorded fit, and settings that it has no option for.

    Settings at their default are left out.
    """
    from ebm_prior.cli.fit import fit
    from ebm_prior.fit import FitConfig

    training, heads, sampler = config["training"], config["heads"], config["sampler"]
    options = {parameter.name: parameter.opts[0] for parameter in fit.params}
    args = ["--backbone", config["backbone"]["name"], "--ckpt", _ckpt(config)]
    data = training.get("data")
    if isinstance(data, dict):
        args += ["--data", str(data["source"])]
        args += ["--resize"] if data.get("resize") else []
        args += ["--limit", str(data["limit"])] if data.get("limit") else []
    for name, value, default in (
        ("kind", heads["kind"], "joint"),
        ("nef", heads["nef"], 64),
        ("ndf", heads["ndf"], 200),
        ("transition", sampler["transition"], "pcnl"),
        ("sample_steps", sampler["steps"], 40),
    ):
        if value != default:
            args += [options[name], str(value)]
    if sampler["transition"] == "langevin":  # pcnl tunes its step size while fitting
        args += ["--step-size", repr(sampler["step_size"])]
    unsettable = []
    if layers := heads.get("layers"):
        unsettable.append(_code(f"EnergyPrior.for_backbone(layers={layers})"))
    for field in fields(FitConfig):
        value = training["fit"].get(field.name, field.default)
        if value == field.default or type(value) not in (int, float, str):
            continue
        if field.name in options:
            args += [options[field.name], str(value)]
        else:
            unsettable.append(_code(f"{field.name}={value!r}"))
    return "ebm-prior fit " + shlex.join(args), unsettable


def evaluate_command(config: dict, repo_id: str) -> str:
    """The command that repeats a recorded evaluation."""
    found, stored = _evaluation(config), config["sampler"]
    args = ["--heads", repo_id, "--ckpt", _ckpt(config), "-n", str(found["energy"]["n"])]
    if found.get("data") and found["data"] != config["backbone"].get("dataset"):
        args += ["--data", str(found["data"])]
    if found.get("features_option"):
        args += ["--features", str(found["features_option"])]
    if found.get("reference"):
        args += ["--reference", str(found["reference"])]
    if found.get("runs"):
        args += ["--repeats", str(len(found["runs"]))]
    if any(key in found for key in BASELINES):
        args += ["--baselines"]
    used = found.get("sampler")
    if isinstance(used, dict) and used != stored:
        for option, key in (
            ("--transition", "transition"), ("--steps", "steps"), ("--step-size", "step_size"),
        ):  # fmt: skip
            args += [option, str(used.get(key))]
    for option, key, default in (
        ("--temperature", "temperature", 1.0), ("--precision", "chain_precision", "fp32"),
        ("--seed", "seed", 0),
    ):  # fmt: skip
        if found.get(key, default) != default:
            args += [option, str(found[key])]
    return "ebm-prior evaluate " + shlex.join(args)


def _limits(config: dict) -> str:
    backbone = config["backbone"]
    lines = [
        "## Limits and licence",
        "",
        "* The heads fit this backbone alone; loading them on a checkpoint with another SHA-256 "
        "is refused.",
    ]
    if _evaluation(config) is None:
        lines.append("* No evaluation is recorded with these heads.")
    else:
        lines.append("* Nothing was measured beyond what is above.")
    heads = escaped(config.get("license") or "not stated")
    licence = escaped(backbone.get("license") or "not recorded")
    lines.append(
        f"* Licence of the heads: {heads}. Licence of the "
        f"backbone: {licence}; whatever is made with both is bound by both."
    )
    return "\n".join(lines)
