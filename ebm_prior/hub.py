"""Heads on disk and on the Hugging Face Hub: safetensors + JSON, nothing that can run.

A folder of heads holds `heads.safetensors`, `config.json` and a model card `README.md`.
A run folder holds the same first two files, so either may be a `source`.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ebm_prior._version import __version__
from ebm_prior.backbone import Backbone
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import write_bytes, write_json, write_text

if TYPE_CHECKING:
    from ebm_prior.prior import EnergyPrior

__all__ = ["from_pretrained", "push_to_hub", "read_config", "save_pretrained"]

FORMAT_VERSION = 1
WEIGHTS, CONFIG, CARD = "heads.safetensors", "config.json", "README.md"
HUB_ID = re.compile(r"^\w[\w.-]*/\w[\w.-]*(@[\w./-]+)?$")


def prior_config(prior: EnergyPrior) -> dict:
    """Everything needed to rebuild the heads and recognise their backbone."""
    backbone = prior.backbone
    return {
        "format_version": FORMAT_VERSION,
        "library": f"ebm-prior {__version__}",
        "backbone": {
            "name": backbone.name,
            "dataset": backbone.dataset,
            "checkpoint": Path(backbone.checkpoint).name,
            "sha256": backbone.sha256,
            "groups": [[group.name, list(group.shape)] for group in backbone.groups],
            "feature_shape": list(backbone.feature_shape),
            "image_shape": list(backbone.image_shape),
            "parameters": sum(p.numel() for p in backbone.parameters()),
        },
        **prior.config(),
    }


def heads_bytes(prior: EnergyPrior) -> bytes:
    """The heads' weights as a safetensors file."""
    return save({k: v.detach().cpu().contiguous() for k, v in prior.heads.state_dict().items()})


def save_pretrained(
    prior: EnergyPrior, directory: str | Path, training: dict | None = None
) -> None:
    """Write weights, configuration and, if there is none yet, a model card.

    Args:
        prior: Heads to store.
        directory: Created if needed.
        training: Settings and results to record under `training` in the configuration.
    """
    directory = Path(directory)
    try:
        directory.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EbmPriorError(f"cannot create {directory}: {error.strerror}") from error
    config = prior_config(prior) | ({"training": training} if training else {})
    write_bytes(directory / WEIGHTS, heads_bytes(prior))
    write_json(directory / CONFIG, config)
    if not (directory / CARD).exists():
        write_text(directory / CARD, model_card(config))


def from_pretrained(
    cls: type[EnergyPrior],
    source: str | Path,
    *,
    backbone: Backbone,
    check_backbone: bool = True,
    **hub_options: object,
) -> EnergyPrior:
    """See `EnergyPrior.from_pretrained`."""
    from ebm_prior.prior import SamplerConfig

    folder = resolve(source, **hub_options)
    config = read_config(folder)
    check_fits(config, backbone, source, check_backbone)
    heads, sampler = config["heads"], config["sampler"]
    check_size(folder / WEIGHTS, backbone, **{k: heads[k] for k in ("kind", "nef", "ndf")})
    prior = cls(
        backbone,
        heads["kind"],
        heads["nef"],
        heads["ndf"],
        SamplerConfig(sampler["transition"], sampler["steps"], float(sampler["step_size"])),
    )
    load_weights(prior, folder / WEIGHTS)
    return prior


def resolve(source: str | Path, **hub_options: object) -> Path:
    """Local folder of a source, downloading the three known files of a Hub id."""
    folder = Path(source)
    if folder.is_dir():
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                raise EbmPriorError(f"{folder} holds no {name}; it is not a folder of heads")
        return folder
    if not HUB_ID.match(str(source)) or folder.exists():
        raise EbmPriorError(
            f"no heads at {source}: expected a saved folder, a run folder or a Hub id user/name"
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    repo_id, _, revision = str(source).partition("@")
    if revision:
        hub_options["revision"] = revision
    try:
        folder = snapshot_download(repo_id, allow_patterns=[WEIGHTS, CONFIG, CARD], **hub_options)
    except (HfHubHTTPError, LocalEntryNotFoundError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise EbmPriorError(f"cannot fetch {source} from the Hub: {line}") from error
    return resolve(folder)


def read_config(folder: Path) -> dict:
    """Read and check `config.json` of a folder of heads."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError as error:
        raise EbmPriorError(f"{folder} holds no {CONFIG}; it is not a folder of heads") from error
    except (OSError, ValueError, RecursionError) as error:
        raise EbmPriorError(f"{path} is not readable JSON: {error}") from error
    if not isinstance(config, dict):
        raise EbmPriorError(f"{path}: expected a JSON object")
    version = config.get("format_version")
    if not isinstance(version, int):
        raise EbmPriorError(f"{path}: field format_version is missing or no number")
    if version > FORMAT_VERSION:
        raise EbmPriorError(
            f"{path} has format version {version}, this library reads up to {FORMAT_VERSION}; "
            "update with: pip install -U ebm-prior"
        )
    fields = {
        "heads": {"kind": str, "nef": int, "ndf": int},
        "sampler": {"transition": str, "steps": int, "step_size": (int, float)},
        "backbone": {"name": str, "sha256": str, "groups": list, "feature_shape": list},
    }
    for section, keys in fields.items():
        for key, kind in keys.items():
            value = config.get(section, {})
            value = value.get(key) if isinstance(value, dict) else None
            if not isinstance(value, kind) or isinstance(value, bool):
                raise EbmPriorError(f"{path}: field {section}.{key} is missing or of a wrong type")
    limits = {("heads", "nef"): 1 << 16, ("heads", "ndf"): 1 << 16, ("sampler", "steps"): 1 << 24}
    for (section, key), limit in limits.items():
        if not 1 <= config[section][key] <= limit:
            raise EbmPriorError(f"{path}: field {section}.{key} must lie in 1..{limit}")
    if not 0 < config["sampler"]["step_size"] < 1e6:
        raise EbmPriorError(f"{path}: field sampler.step_size must be positive and below 1e6")
    for group in config["backbone"]["groups"]:
        if not (isinstance(group, list) and len(group) == 2 and isinstance(group[1], list)):
            raise EbmPriorError(f"{path}: field backbone.groups must list [name, shape] pairs")
    return config


def check_fits(config: dict, backbone: Backbone, source: object, check_hash: bool) -> None:
    """Refuse heads that were fitted on another backbone."""
    stored = config["backbone"]
    groups = [[group.name, list(group.shape)] for group in backbone.groups]
    theirs, ours = (
        " ".join("x".join(map(str, shape)) for shape in [*(s for _, s in listed), features])
        for listed, features in (
            (stored["groups"], stored["feature_shape"]),
            (groups, backbone.feature_shape),
        )
    )
    if stored["groups"] != groups or stored["feature_shape"] != list(backbone.feature_shape):
        raise EbmPriorError(
            f"{source} was fitted on another backbone: its groups and features are {theirs}, "
            f"this backbone's are {ours}"
        )
    if check_hash and stored["sha256"] != backbone.sha256:
        raise EbmPriorError(
            f"{source} was fitted on a checkpoint with SHA-256 {stored['sha256'][:12]}..., this "
            f"one has {backbone.sha256[:12]}...; give the right checkpoint, or allow it with "
            "--any-backbone (check_backbone=False)"
        )


def check_size(path: Path, backbone: Backbone, kind: str, nef: int, ndf: int) -> None:
    """Refuse a file too small or too large for its configuration, before memory is taken."""
    from ebm_prior.heads import EnergyHead
    from ebm_prior.prior import head_shapes

    with torch.device("meta"):
        heads = [EnergyHead(s, nef, ndf) for s in head_shapes(backbone, kind).values()]
    tensors = [tensor for head in heads for tensor in head.parameters()]
    numbers = sum(tensor.numel() for tensor in tensors)
    size, header = path.stat().st_size, 256 * len(tensors) + 4096
    if not 2 * numbers <= size <= 8 * numbers + header:  # half to double precision
        raise EbmPriorError(
            f"{path} has {size} bytes, which cannot be the {numbers} parameters that its "
            f"{CONFIG} describes; the two do not belong together"
        )


def load_weights(prior: EnergyPrior, path: Path) -> None:
    """Load a safetensors file into the heads; shapes, types and finiteness are checked."""
    expected = prior.heads.state_dict()
    try:
        state = load_file(path)
    except (SafetensorError, OSError) as error:
        raise EbmPriorError(f"{path} is not a readable safetensors file: {error}") from error
    wrong = [
        k
        for k in sorted(state.keys() | expected.keys())
        if k not in state or k not in expected or state[k].shape != expected[k].shape
    ]
    if wrong:
        raise EbmPriorError(f"{path} does not fit its {CONFIG}: {', '.join(wrong[:3])}")
    for key, tensor in state.items():
        if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise EbmPriorError(f"{path}: {key} holds values that are no finite numbers")
    prior.heads.load_state_dict(state)


def count_weights(path: Path) -> int:
    """Numbers in a safetensors file, from its header alone."""
    try:
        with safe_open(path, "pt") as file:
            return sum(math.prod(file.get_slice(key).get_shape()) for key in file.keys())  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise EbmPriorError(f"{path} is not a readable safetensors file: {error}") from error


def push_to_hub(prior: EnergyPrior, repo_id: str, **hub_options: object) -> str:
    """See `EnergyPrior.push_to_hub`. Options: `private`, `token`, `commit_message`."""
    with TemporaryDirectory() as folder:
        save_pretrained(prior, folder)
        return push_folder(folder, repo_id, **hub_options)


def push_folder(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    token: str | None = None,
    commit_message: str = "Upload energy heads",
) -> str:
    """Upload the known files of a folder of heads; returns the repository's URL."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError

    api = HfApi(token=token, library_name="ebm-prior", library_version=__version__)
    try:
        url = api.create_repo(repo_id, private=private, exist_ok=True)
        api.upload_folder(
            repo_id=url.repo_id,
            folder_path=str(folder),
            commit_message=commit_message,
            allow_patterns=[WEIGHTS, CONFIG, CARD, "samples/*.png"],
        )
    except LocalTokenNotFoundError as error:
        raise EbmPriorError("no Hub token; log in with: hf auth login") from error
    except (HfHubHTTPError, HFValidationError, OSError) as error:
        line = str(error).strip().splitlines()[0]
        raise EbmPriorError(f"cannot push to {repo_id}: {line}") from error
    return str(url)


def model_card(config: dict) -> str:
    """Model card with Hub metadata; holds nothing that is not in the configuration."""
    from huggingface_hub import ModelCardData

    backbone, heads, sampler = config["backbone"], config["heads"], config["sampler"]
    data = ModelCardData(
        library_name="ebm-prior",
        tags=["energy-based-model", "vae", backbone["name"]],
        datasets=[backbone["dataset"]] if backbone.get("dataset") else None,
    )
    return f"""---
{data.to_yaml()}
---
# Energy heads for {backbone["name"]} on {backbone.get("dataset") or "unnamed data"}

Heads: {heads["kind"]}, nef {heads["nef"]}, ndf {heads["ndf"]}. Sampled with
{sampler["steps"]} {sampler["transition"]} steps of size {sampler["step_size"]:.4g}.
The backbone is not part of this repository: `{backbone.get("checkpoint")}`, SHA-256
`{backbone["sha256"]}`.

```python
import ebm_prior

backbone = ebm_prior.load_backbone("{backbone["name"]}", "{backbone.get("checkpoint")}")
prior = ebm_prior.EnergyPrior.from_pretrained("user/name", backbone=backbone)
images = prior.sample(16)
```
"""
