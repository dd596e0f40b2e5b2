"""Heads on disk and on the Hugging Face Hub: save, load, pull, push.

Everything that travels is described in `ebm_prior.saved`. From the Hub only the files named
there are asked for, the small ones first: the configuration is fetched and checked, then it
says how large the weights may be, then they are fetched and checked.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from ebm_prior._version import __version__
from ebm_prior.backbone import Backbone
from ebm_prior.card import model_card
from ebm_prior.errors import EbmPriorError
from ebm_prior.files import atomic_write, write_bytes, write_json, write_text
from ebm_prior.safe_load import sha256_of
from ebm_prior.saved import (
    BACKBONE,
    CARD,
    CONFIG,
    MAX_CONFIG,
    WEIGHTS,
    check_fits,
    check_size,
    heads_bytes,
    prior_config,
    read_config,
    read_weights,
    shareable,
)

if TYPE_CHECKING:
    from ebm_prior.prior import EnergyPrior

__all__ = [
    "HeadsSource", "from_pretrained", "is_hub_id", "open_source", "pull", "push_files",
    "push_to_hub", "save_pretrained",
]  # fmt: skip

LOAD_OPTIONS = ("revision", "token", "cache_dir", "force_download", "local_files_only")
PAUSES = (1, 2, 4)  # seconds before a broken call is made again
PATIENCE = 10  # seconds
T = TypeVar("T")


def save_pretrained(
    prior: EnergyPrior,
    directory: str | Path,
    training: dict | None = None,
    *,
    repo_id: str | None = None,
    push_to_hub: bool = False,
    **push_options: Any,
) -> str | None:
    """See `EnergyPrior.save_pretrained`."""
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
    if push_to_hub:
        return prior.push_to_hub(repo_id or directory.name, training=training, **push_options)
    return None


@torch.inference_mode(False)  # weights made in inference mode could never be differentiated
def from_pretrained(
    cls: type[EnergyPrior],
    source: str | Path | HeadsSource,
    *,
    backbone: Backbone,
    check_backbone: bool = True,
    **hub_options: Any,
) -> EnergyPrior:
    """See `EnergyPrior.from_pretrained`."""
    from ebm_prior.prior import SamplerConfig

    if not isinstance(source, HeadsSource):
        source = open_source(source, **hub_options)
    check_fits(source.config, backbone, source.name, check_backbone)
    state = read_weights(source.weights(), source.config)
    heads, sampler = source.config["heads"], source.config["sampler"]
    prior = cls(
        backbone,
        heads["kind"],
        heads["nef"],
        heads["ndf"],
        SamplerConfig(sampler["transition"], sampler["steps"], float(sampler["step_size"])),
        heads.get("layers"),
    )
    prior.heads.load_state_dict(state)
    return prior


class HeadsSource:
    """Heads in a local folder: their configuration, checked; their files when asked for.

    Attributes:
        name: As the user wrote it.
        folder: Where the files are.
        config: The checked configuration.
    """

    def __init__(self, name: str, folder: Path, config: dict) -> None:
        self.name, self.folder, self.config = name, folder, config

    def weights(self) -> Path:
        """Path of `heads.safetensors`; its size fits the configuration.

        Raises:
            EbmPriorError: If there is none, or it is too large or too small.
        """
        path = self.folder / WEIGHTS
        check_size(path.stat().st_size, self.config, path)
        return path

    def checkpoint(self, given: str | Path | None = None) -> Path:
        """Path of the backbone: the given one, where the run found it, stored, or beside.

        Raises:
            EbmPriorError: If none is given and none is found.
        """
        stored = self.config["backbone"]
        path = given or stored.get("path") or self.backbone()
        if path is None:
            raise EbmPriorError(
                f"{self.name} does not come with its backbone {stored.get('checkpoint') or ''}"
                f"{_where(stored)}; give the checkpoint with --ckpt"
            )
        return Path(path)

    def backbone(self) -> Path | None:
        """Path of the backbone stored with the heads or beside their folder, or None.

        Raises:
            EbmPriorError: If a converted backbone is not the one that the configuration names.
        """
        stored = self.config["backbone"]
        path, converted = self.folder / BACKBONE, stored.get("converted")
        if converted is not None and path.is_file():
            if path.stat().st_size != converted["size"] or sha256_of(path) != converted["sha256"]:
                training = self.config.get("training", {})
                cut_off = "train" in training and training.get("status") != "finished"
                raise EbmPriorError(
                    f"{path} is not the backbone that its {CONFIG} names; "
                    + (
                        _go_on(training, self.folder)
                        if cut_off
                        else "give the checkpoint with --ckpt"
                    )
                )
            return path
        if not stored.get("checkpoint"):
            return None
        around = self.folder.absolute().parent
        name = Path(stored["checkpoint"]).name
        if around.name == name:  # of a family whose checkpoints are folders
            return around
        return around / name if (around / name).exists() else None

    def card(self) -> str | None:
        """Text of the model card, or None."""
        path = self.folder / CARD
        return path.read_text(errors="replace") if path.is_file() else None


class _HubSource(HeadsSource):
    """Heads in a repository; files come into the Hub's cache one by one, sizes checked first."""

    def __init__(self, name: str, **options: Any) -> None:
        self.repo_id, self.options = name, options
        folder = self.fetch(CONFIG, MAX_CONFIG).parent
        # every other file comes from the commit that this one came from
        self.options = {**options, "revision": folder.name}
        config = read_config(folder, f"{name}/{CONFIG}")
        super().__init__(name, folder, shareable(config))

    def fetch(
        self,
        filename: str,
        limit: int | None = None,
        check: Callable[[int], None] | None = None,
    ) -> Path:
        """Local path of one file, which is fetched only if its size passes."""
        from huggingface_hub import hf_hub_download

        def ask(**more: Any) -> Any:
            return _call(
                lambda: hf_hub_download(
                    self.repo_id,
                    filename,
                    library_name="ebm-prior",
                    library_version=__version__,
                    **self.options,
                    **more,
                ),
                self.repo_id,
                f"fetch {filename} of {self.repo_id}",
            )

        size = ask(dry_run=True).file_size
        where = f"{self.repo_id}/{filename}"
        if size is None:
            raise EbmPriorError(f"{where}: the Hub does not say how large it is; not fetched")
        if limit is not None and size > limit:
            raise EbmPriorError(f"{where} has {size} bytes, at most {limit} are read; not fetched")
        if check is not None:
            check(size)
        return Path(ask())

    def weights(self) -> Path:
        where = f"{self.name}/{WEIGHTS}"
        return self.fetch(WEIGHTS, check=lambda size: check_size(size, self.config, where))

    def backbone(self) -> Path | None:
        converted = self.config["backbone"].get("converted")
        if converted is None:
            return None
        self.fetch(BACKBONE, converted["size"])
        return super().backbone()

    def card(self) -> str | None:
        try:
            return self.fetch(CARD, MAX_CONFIG).read_text(errors="replace")
        except EbmPriorError:  # heads without a card are still heads
            return None


def is_hub_id(text: str) -> bool:
    """Whether a text could name a repository on the Hub: user/name or user/name@revision."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    repo_id, at, revision = text.partition("@")
    try:
        validate_repo_id(repo_id)
    except HFValidationError:
        return False
    return repo_id.count("/") == 1 and bool(revision) == bool(at)


def open_source(source: str | Path, **hub_options: Any) -> HeadsSource:
    """Find heads and check their configuration; the weights are not touched yet.

    Args:
        source: A saved folder, a run folder or a Hub id, `user/name` or `user/name@revision`.
        hub_options: `revision`, `token`, `cache_dir`, `force_download`, `local_files_only`,
            as everywhere in `huggingface_hub`.

    Raises:
        EbmPriorError: If there is no such source or its configuration is wrong.
    """
    unknown = hub_options.keys() - set(LOAD_OPTIONS)
    if unknown:
        raise TypeError(f"unknown options: {', '.join(sorted(unknown))}")
    name, folder = str(source), Path(source)
    if folder.is_dir():
        if not (folder / CONFIG).is_file():
            raise EbmPriorError(f"{folder} holds no {CONFIG}; it is not a folder of heads")
        config = read_config(folder)
        if not (folder / WEIGHTS).is_file():
            training = config.get("training")
            started = isinstance(training, dict) and "status" in training
            raise EbmPriorError(
                f"{folder} holds no {WEIGHTS}"
                + (
                    f" yet; {_go_on(training, folder)}"
                    if started
                    else "; it is not a folder of heads"
                )
            )
        return HeadsSource(name, folder, config)
    # a mistyped path must not become a question to the Hub; a revision makes it one
    mistyped = folder.parent.is_dir() and "@" not in name
    if folder.exists() or mistyped or not is_hub_id(name):
        raise EbmPriorError(
            f"no heads at {name}: expected a saved folder, a run folder or a Hub id user/name"
            + (f" (for the one on the Hub, {name}@main)" if is_hub_id(name) else "")
        )
    repo_id, _, revision = name.partition("@")
    if revision:
        if hub_options.get("revision") not in (None, revision):
            raise EbmPriorError(
                f"{name} and revision={hub_options['revision']!r} contradict; give one revision"
            )
        hub_options["revision"] = revision
    return _HubSource(repo_id, **hub_options)


def _go_on(training: dict, folder: Path) -> str:
    """How to continue the run in this folder."""
    if "train" in training:
        return f"continue it with the same ebm-prior train ... and --resume --out {folder}"
    return f"continue its fit with: ebm-prior fit --resume {folder}"


def pull(
    repo_id: str, out: str | Path | None = None, *, with_backbone: bool = False, **hub_options: Any
) -> Path:
    """Fetch heads from the Hub and check them in full.

    Args:
        repo_id: Hub id, `user/name` or `user/name@revision`.
        out: Folder to write them to; the Hub's cache alone by default.
        with_backbone: Fetch the backbone that the repository holds, too.
        hub_options: As for `open_source`.

    Returns:
        The folder that holds them: `out`, or the one in the cache.

    Raises:
        EbmPriorError: If anything is missing or wrong; `out` then holds no heads.
    """
    source = open_source(repo_id, **hub_options)
    if not isinstance(source, _HubSource):
        raise EbmPriorError(f"{repo_id} is a local folder already; nothing to pull")
    weights, card = source.weights(), source.card()
    read_weights(weights, source.config)
    backbone = source.backbone() if with_backbone else None
    if with_backbone and backbone is None:
        raise EbmPriorError(
            f"{repo_id} holds no backbone; get the checkpoint from its authors"
            + _where(source.config["backbone"])
        )
    if out is None:
        return source.folder
    out = Path(out)
    if (out / CONFIG).exists() or (out.exists() and not out.is_dir()):
        raise EbmPriorError(f"{out} already holds heads or is no folder; choose another --out")
    # the configuration last: without it a folder is none of heads
    if backbone is not None:
        with atomic_write(out / BACKBONE) as file, backbone.open("rb") as source_file:
            shutil.copyfileobj(source_file, file)
    write_bytes(out / WEIGHTS, weights.read_bytes())
    if card is not None:
        write_text(out / CARD, card)
    write_json(out / CONFIG, source.config)
    return out


def _where(backbone: dict) -> str:
    return f" ({backbone['source']})" if backbone.get("source") else ""


def push_to_hub(
    prior: EnergyPrior,
    repo_id: str,
    *,
    training: dict | None = None,
    license: str | None = None,
    backbone_source: str | None = None,
    backbone_license: str | None = None,
    pictures: bool = True,
    **push_options: Any,
) -> str:
    """See `EnergyPrior.push_to_hub`."""
    from ebm_prior.pictures import card_pictures

    repo_id = check_can_push(repo_id, push_options.get("token"))
    config = prior_config(prior) | ({"training": training} if training else {})
    state_facts(config, license, backbone_source, backbone_license)
    drawn = card_pictures(prior) if pictures else {}
    return push_files(heads_bytes(prior), config, repo_id, drawn, **push_options)


def state_facts(
    config: dict,
    license: str | None = None,
    backbone_source: str | None = None,
    backbone_license: str | None = None,
) -> None:
    """Write into a configuration what only its owner knows; None leaves a field as it is.

    Args:
        config: Changed in place.
        license: Licence of the heads, a Hub identifier such as `mit`.
        backbone_source: Where the backbone is to be had: a Hub id, a URL or a description.
        backbone_license: Licence of the backbone.
    """
    if license is not None:
        config["license"] = license
    if backbone_source is not None:
        config["backbone"]["source"] = backbone_source
    if backbone_license is not None:
        config["backbone"]["license"] = backbone_license


def push_files(
    weights: bytes,
    config: dict,
    repo_id: str,
    pictures: Mapping[str, bytes],
    *,
    card: str | None = None,
    backbone: bytes | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
    commit_message: str = "Upload energy heads",
) -> str:
    """Upload heads with their card in one commit: all of it appears, or nothing.

    Args:
        weights: Contents of `heads.safetensors`.
        config: Checked configuration; local paths are left out of what is uploaded.
        repo_id: `user/name`, or `name` alone; created if there is none.
        pictures: PNG files for the card by path in the repository.
        card: A card to use in place of the generated one.
        backbone: Contents of `backbone.safetensors`, named in `config`.
        private: Visibility of a new repository; the account's default if None.
        token: Access token; by default the one of `hf auth login` or `HF_TOKEN`.
        branch: Branch to commit to, created if there is none; `main` by default.
        create_pr: Open a pull request in place of committing.
        commit_message: Message of the commit.

    Returns:
        URL of the commit, or of the pull request.

    Raises:
        EbmPriorError: If the Hub cannot be reached or refuses; nothing is published then.
    """
    from huggingface_hub import HfApi

    repo_id = check_can_push(repo_id, token)
    config = shareable(config)
    text = model_card(config, repo_id, pictures) if card is None else card
    check_card(text)
    api = HfApi(token=token, library_name="ebm-prior", library_version=__version__)
    with TemporaryDirectory() as folder:
        root = Path(folder)
        write_bytes(root / WEIGHTS, weights)
        write_json(root / CONFIG, config)
        write_text(root / CARD, text)
        for name, data in pictures.items():
            write_bytes(root / name, data)
        if backbone is not None:
            write_bytes(root / BACKBONE, backbone)

        def call(function: Callable[[], T]) -> T:
            return _call(function, repo_id, f"push to {repo_id}")

        call(lambda: api.create_repo(repo_id, private=private, exist_ok=True))
        if branch is not None and not branch.startswith("refs/"):
            call(lambda: api.create_branch(repo_id, branch=branch, exist_ok=True))
        info = call(
            lambda: api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
            )
        )
    return str(info.pr_url or info.commit_url)


def check_can_push(repo_id: str, token: str | bool | None = None) -> str:
    """Raise now, rather than after drawing pictures, if a push cannot work.

    Returns:
        `repo_id` in full: a name alone means the name space of the token's owner.

    Raises:
        EbmPriorError: If it is no name of a repository, or there is no token or no network.
    """
    from huggingface_hub import HfApi, get_token, is_offline_mode

    full = repo_id if "/" in repo_id else f"user/{repo_id}"
    if not is_hub_id(full) or "@" in repo_id:
        raise EbmPriorError(f"{repo_id!r} is no name of a repository; give user/name")
    if is_offline_mode():
        raise EbmPriorError("HF_HUB_OFFLINE is set; unset it to push")
    if not isinstance(token, str) and (token is False or get_token() is None):
        raise EbmPriorError(
            "no Hub token; log in with: hf auth login (or set HF_TOKEN, or give --token)"
        )
    if "/" in repo_id:
        return repo_id
    user = _call(lambda: HfApi(token=token).whoami()["name"], repo_id, f"push to {repo_id}")
    return f"{user}/{repo_id}"


def check_card(text: str) -> None:
    """Refuse a model card whose metadata block is missing, unreadable or wrong.

    Raises:
        EbmPriorError: Names the field that is missing.
    """
    from huggingface_hub import ModelCard

    try:
        # strict about the block itself, so that a typo is an error and not an empty table
        data = ModelCard(text).data.to_dict() if text.lstrip().startswith("---") else {}
    except Exception as error:  # any YAML error
        line = " ".join(str(error).split())
        raise EbmPriorError(f"the metadata of the model card cannot be read: {line}") from error
    for field in ("library_name", "license", "tags"):
        if not data.get(field):
            raise EbmPriorError(
                f"the model card's metadata lack {field}; a card starts with a block between "
                "two lines --- that holds library_name, license and tags"
            )


def _call(function: Callable[[], T], repo_id: str, doing: str) -> T:
    """Call the Hub's client; make broken calls again, turn errors into one line.

    The client repeats requests that the Hub answers with 429 or 5xx, and resumes downloads.
    What it leaves to its caller are connections that break at other points.
    """
    from huggingface_hub.errors import HfHubHTTPError, HTTPError, XetDownloadError

    for pause in (*PAUSES, None):
        started = time.monotonic()
        try:
            with _bars_on_terminals_only():
                return function()
        except EbmPriorError:
            raise
        except (HTTPError, OSError, ValueError, RuntimeError, XetDownloadError) as error:
            cause = error.__cause__ if type(error) is RuntimeError and error.__cause__ else error
            if isinstance(cause, HfHubHTTPError):
                again = cause.response is not None and cause.response.status_code >= 500
            elif isinstance(cause, HTTPError):  # where nothing answers, waiting is no use
                again = type(cause).__name__ not in ("ConnectError", "ConnectTimeout")
            else:  # a download that is too short, an error page in place of an answer
                short = "Consistency check failed" in str(cause)
                again = short or isinstance(cause, json.JSONDecodeError)
            # what took long to fail, the client has tried again and again already
            if not again or pause is None or time.monotonic() - started > PATIENCE:
                raise EbmPriorError(_explain(cause, repo_id, doing)) from error
            time.sleep(pause)
    raise AssertionError("unreachable")


@contextmanager
def _bars_on_terminals_only() -> Iterator[None]:
    """The client draws bars into pipes, too, and leaves them unfinished on errors."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    terminal = sys.stderr.isatty()
    silence = not terminal and not are_progress_bars_disabled()
    if silence:
        disable_progress_bars()
    try:
        yield
    except BaseException:
        if terminal:
            print(file=sys.stderr)  # the message goes below the bar
        raise
    finally:
        if silence:
            enable_progress_bars()


def _explain(error: BaseException, repo_id: str, doing: str) -> str:
    """One line that says what went wrong at the Hub and what to do."""
    from huggingface_hub import constants, errors, is_offline_mode

    at = constants.ENDPOINT
    response = getattr(error, "response", None)
    status = getattr(response, "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{repo_id} is gated: accept its conditions at {at}/{repo_id}, then log in"
    if isinstance(error, errors.RevisionNotFoundError):
        return f"cannot {doing}: there is no such revision, branch or tag in {repo_id}"
    if isinstance(error, errors.EntryNotFoundError) and status == 404:
        return (
            f"cannot {doing}: the repository holds no such file. Heads are {CONFIG} and "
            f"{WEIGHTS}; nothing else is read, pickles least of all"
        )
    if status == 401 and not isinstance(error, errors.RepositoryNotFoundError):
        return f"cannot {doing}: the Hub refused the token; log in again with: hf auth login"
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"no heads at {repo_id}: there is no such local folder, and {at} has no repository "
            "of that name, or a private one; log in with: hf auth login"
        )
    if status == 403:
        return (
            f"cannot {doing}: the token may not do that; use one with write access to "
            f"{repo_id.split('/')[0]}"
        )
    if status == 409 or status == 412:
        return f"cannot {doing}: somebody else changed it at the same time; run this again"
    if status == 429:
        return f"cannot {doing}: too many requests; wait a few minutes and run this again"
    if status is not None and status >= 500:
        return f"cannot {doing}: the Hub is in trouble (HTTP {status}); run this again later"
    if isinstance(error, (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError)):
        if is_offline_mode():
            return f"cannot {doing}: it is not in the cache, and HF_HUB_OFFLINE is set"
        if error.__cause__ is None:
            return f"cannot {doing}: it is not in the cache, and local_files_only is set"
        return _explain(error.__cause__, repo_id, doing)
    if status is None and isinstance(error, errors.HTTPError):
        return f"cannot {doing}: {at} cannot be reached; check the connection and run this again"
    if isinstance(error, json.JSONDecodeError):
        return f"cannot {doing}: {at} does not answer as a Hub does; run this again later"
    return f"cannot {doing}: {' '.join(str(error).split())}"
