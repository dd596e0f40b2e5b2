"""How much memory a gradient needs, and how much there is."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from ebm_prior.cpu import freed_memory
from ebm_prior.ranks import processes_here

__all__ = ["free_memory", "recomputed", "rows_in_memory", "saved_bytes"]

LATENTS_KEPT = 1 << 28  # numbers, 1 GiB in float32


def saved_bytes(function: Callable, flat: Tensor, unflatten: Callable) -> int:
    """Bytes that autograd would keep of samples from the forward to the backward pass.

    One forward pass, which keeps nothing: what dies with it would have been kept for its
    sake, while what survives, such as weights, is there anyway. Copies of weights that
    autocast makes are among what dies.

    Args:
        function: Density or energy of latents.
        flat: Samples, (B, D).
        unflatten: Makes latents of them.
    """
    sizes: dict[StorageWeakRef, int] = {}

    def count(tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        sizes[StorageWeakRef(storage)] = storage.nbytes()

    with (
        torch.inference_mode(False),
        torch.enable_grad(),
        torch.autograd.graph.saved_tensors_hooks(count, lambda nothing: nothing),
    ):
        function(unflatten(flat.detach().clone().requires_grad_()))
    return sum(size for storage, size in sizes.items() if storage.expired())


def recomputed(function: Callable, *inputs: Any) -> Any:
    """The function's outputs, of which a gradient keeps the inputs and computes the rest again.

    Args:
        function: Without side effects or random numbers.
        inputs: Its arguments.
    """
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


def rows_in_memory(units: int, sets: int = 1) -> int:
    """How many latents of so many units to keep, of each of several sets; two at least."""
    return max(LATENTS_KEPT // (units * sets), 2)


def free_memory(device: torch.device) -> int | None:
    """Bytes that this process can still allocate on a device; None where nobody tells."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "cpu" and sys.platform.startswith("linux"):
        free = host_memory()
        # processes on the same machine allocate at the same time
        return None if free is None else free // processes_here() + freed_memory()
    return None


def host_memory(proc: Path = Path("/proc"), cgroups: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that Linux can give without swapping, to the machine and to this control group.

    Args:
        proc: Where the kernel tells about processes.
        cgroups: Where it tells about control groups, of version 2 or 1.
    """
    try:
        fields = dict(
            line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines() if line
        )
        free = [1024 * int(fields["MemAvailable"].split()[0])]
        for line in (proc / "self" / "cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controllers == "":
                names = "memory.max", "memory.current", "inactive_file"
                free += group_memory(cgroups, path, *names)
            elif "memory" in controllers.split(","):
                names = "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
                free += group_memory(cgroups / "memory", path, *names)
    except (OSError, ValueError, KeyError):
        return None
    return max(min(free), 0)


def group_memory(root: Path, path: str, limit: str, usage: str, cached: str) -> list[int]:
    """Bytes up to the limit of a control group, and of each that contains it.

    Inside a container the path may be that of the host, of which only the root is seen.

    Args:
        root: Folder of the controller.
        path: Of the group, as /proc/self/cgroup tells it.
        limit: Name of the file with the limit.
        usage: Name of the file with what is used, page cache included.
        cached: Field of memory.stat with the part of it that the kernel gives up when asked.
    """
    free: list[int] = []
    folder = root / path.lstrip("/")
    for group in (folder, *folder.parents):
        try:
            most = (group / limit).read_text().strip()
            stat = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
            used = int((group / usage).read_text()) - int(stat.get(cached, 0))
            free += [] if most == "max" else [int(most) - used]
        except OSError:
            pass  # not a group, or not one of ours
        if group == root:
            break
    return free
