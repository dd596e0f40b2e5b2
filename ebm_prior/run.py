"""Run folders: what `fit` and `train` leave behind and resume from.

config.json         settings, backbone path and SHA-256, versions, seed, status, results
heads.safetensors   the heads to sample with, replaced atomically at every save
backbone.safetensors  of `train`: the generator that was trained with them
state/              what --resume needs (one file, replaced atomically)
log.jsonl, tb/      one line per logged iteration; the same as TensorBoard events
samples/*.png       sample grids
"""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from datetime import datetime
from importlib.metadata import version
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ebm_prior.errors import EbmPriorError
from ebm_prior.files import write_bytes, write_json, write_text
from ebm_prior.saved import CONFIG, WEIGHTS, read_config

__all__ = ["Onlooker", "RunFolder", "newest_run"]

STATE = "state/state.safetensors"
CACHE = "state/posterior.npy"  # large; made again where it is missing
VERSIONED = ("ebm-prior", "torch", "numpy", "safetensors")


class RunFolder:
    """Reads and writes the files of one run.

    Args:
        path: The folder; created by `start`.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._events = None

    def start(self, config: dict) -> None:
        """Create the folder and write its configuration.

        Raises:
            EbmPriorError: If the folder already holds a run, or cannot be written.
        """
        if (self.path / CONFIG).exists():
            raise EbmPriorError(
                f"{self.path} already holds a run; continue it with --resume, or choose "
                "another --out"
            )
        try:
            (self.path / "state").mkdir(parents=True, exist_ok=True)
            (self.path / "samples").mkdir(exist_ok=True)
            (self.path / STATE).unlink(missing_ok=True)  # of a run whose configuration is gone
        except OSError as error:
            raise EbmPriorError(
                f"cannot create {self.path}: {error.strerror}; choose another --out"
            ) from error
        self.write_config(config)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Context in which no other process can work on this run; a kill ends it too.

        Raises:
            EbmPriorError: If another one does. Each would take the other's state for its own,
                and the one that is behind replace the finished heads.
        """
        lock = _lock(self.path)
        try:
            yield
        finally:
            if lock is not None:
                os.close(lock)

    def write_config(self, config: dict) -> None:
        """Replace `config.json`."""
        write_json(self.path / CONFIG, config)

    def config(self) -> dict:
        """Read and check `config.json` of an existing run.

        Raises:
            EbmPriorError: If there is none, or it is damaged or no run's.
        """
        if not (self.path / CONFIG).exists():
            raise EbmPriorError(f"{self.path} holds no run to resume")
        config = read_config(self.path)
        training = config.get("training")
        if not isinstance(training, dict) or not {"status", "fit"} <= training.keys():
            raise EbmPriorError(f"{self.path} is not a run folder written by fit")
        if not isinstance(training["fit"], dict) or "path" not in config["backbone"]:
            raise EbmPriorError(
                f"{self.path / CONFIG}: field training.fit or backbone.path is wrong"
            )
        if "data" in training and not _names_images(training["data"]):
            raise EbmPriorError(f"{self.path / CONFIG}: field training.data is wrong")
        return config

    def save_heads(self, data: bytes) -> None:
        """Replace `heads.safetensors`."""
        write_bytes(self.path / WEIGHTS, data)

    def save_state(self, tensors: dict[str, Tensor], meta: dict) -> None:
        """Replace the state to resume from: tensors, and plain values beside them."""
        write_state(self.path / STATE, tensors, meta)

    def load_state(self) -> tuple[dict[str, Tensor], dict] | None:
        """The last saved state, or None before the first save."""
        path = self.path / STATE
        return read_state(path) if path.exists() else None

    def drop_cache(self) -> None:
        """Delete the posterior samples, before anything says that the run is finished."""
        (self.path / CACHE).unlink(missing_ok=True)
        (self.path / CACHE).with_suffix(".json").unlink(missing_ok=True)

    def finish(self) -> None:
        """Drop what only an unfinished run needs, and nothing that was in its folder before."""
        state = (self.path / STATE).parent
        with suppress(OSError):
            for cut_off in state.glob(f".{'[0-9a-f]' * 12}.tmp"):  # by a kill
                cut_off.unlink()
            self.drop_cache()
            (self.path / STATE).unlink(missing_ok=True)
            state.rmdir()  # fails where it holds anything else
        if self._events is not None:
            self._events.close()

    def rewind_log(self, iteration: int) -> None:
        """Forget logged iterations after `iteration`: a resumed run writes them again."""
        path = self.path / "log.jsonl"
        if path.exists():
            kept = []
            for line in path.read_text(errors="replace").splitlines():
                try:
                    if json.loads(line)["iteration"] <= iteration:
                        kept.append(line + "\n")
                except (ValueError, KeyError, TypeError):  # cut off by a kill, or damaged
                    continue
            write_text(path, "".join(kept))

    def log(self, record: dict) -> None:
        """Append one line to `log.jsonl` and to TensorBoard."""
        iteration = record["iteration"]
        try:
            with (self.path / "log.jsonl").open("a") as file:
                file.write(json.dumps(record) + "\n")
        except OSError as error:
            raise EbmPriorError(f"cannot write {self.path / 'log.jsonl'}: {error.strerror}") from (
                error
            )
        try:
            if self._events is None:
                from torch.utils.tensorboard import SummaryWriter

                self._events = SummaryWriter(str(self.path / "tb"), purge_step=iteration)
            for key, value in _scalars(record):
                self._events.add_scalar(key, value, iteration)
        except OSError as error:  # of its thread, which writes some time later
            raise EbmPriorError(
                f"cannot write events to {self.path / 'tb'}: {error.strerror}"
            ) from error


class Onlooker(RunFolder):
    """The same folder for a process that must not write to it."""

    def _leave(self, *_: object) -> None:
        """What the main process does."""

    start = write_config = save_heads = save_state = drop_cache = _leave
    finish = rewind_log = log = _leave
    alone = nullcontext


def write_state(path: Path, tensors: dict[str, Tensor], meta: dict) -> None:
    """Replace a training's state: tensors, and what JSON has beside them."""
    tensors = {key: value.detach().cpu().contiguous() for key, value in tensors.items()}
    write_bytes(path, save(tensors, {"state": json.dumps(meta)}))


def read_state(path: Path) -> tuple[dict[str, Tensor], dict]:
    """What `write_state` wrote, on the CPU.

    Raises:
        EbmPriorError: If it is damaged or cannot be read.
    """
    try:
        with safe_open(path, "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            return tensors, json.loads(file.metadata()["state"])
    except (SafetensorError, KeyError, ValueError, TypeError, OSError) as error:
        raise EbmPriorError(f"{path} is damaged: {error}; start the run anew") from error


def _lock(folder: Path) -> int | None:
    """Open and lock a folder; None where that cannot be done.

    Raises:
        EbmPriorError: If another process has locked it.
    """
    try:
        import fcntl

        lock = os.open(folder, os.O_RDONLY)
    except (ImportError, OSError):  # Windows; no folder yet
        return None
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        os.close(lock)
        raise EbmPriorError(
            f"another process is at work on {folder}; wait for its end, or stop it first"
        ) from error
    except OSError:  # a file system without locks
        pass
    return lock


def _names_images(data: object) -> bool:
    """Whether a value says which images a run was started on, as `--resume` reads it."""
    return (
        isinstance(data, dict)
        and isinstance(data.get("source"), str)
        and isinstance(data.get("resize"), bool)
        and isinstance(data.get("limit"), (int, type(None)))
    )


def _scalars(record: dict, prefix: str = "") -> Iterable[tuple[str, float]]:
    """Numbers of a nested record with slash-joined names."""
    for key, value in record.items():
        if isinstance(value, dict):
            yield from _scalars(value, f"{prefix}{key}/")
        elif isinstance(value, (int, float)) and key != "iteration":
            yield prefix + key, value


def environment() -> dict:
    """Versions that a run depends on, and when it started."""
    return {
        "started": datetime.now().isoformat(timespec="seconds"),
        "python": platform.python_version(),
        **{name: version(name) for name in VERSIONED},
    }


def newest_run(
    root: str | Path = "runs",
    statuses: Sequence[str] = ("finished",),
    made_by: str | None = None,
) -> Path:
    """The most recent run under `root` with one of the given statuses.

    Args:
        root: Folder of run folders.
        statuses: Which to consider.
        made_by: `fit` or `train`: only runs that hold this verb's settings.

    Raises:
        EbmPriorError: If there is none.
    """
    found = []
    for path in Path(root).glob(f"*/{CONFIG}"):
        try:
            training = json.loads(path.read_text())["training"]
            status = training["status"] if made_by is None or made_by in training else None
        except (OSError, ValueError, KeyError, TypeError):
            continue
        if status in statuses:
            found.append((path.stat().st_mtime, path.parent))
    if not found:
        raise EbmPriorError(
            f"no {statuses[0]} run under {root}/; name one, or run ebm-prior fit first"
        )
    return max(found)[1]
