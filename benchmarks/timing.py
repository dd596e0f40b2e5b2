"""Timing on a machine that others use too: interleaved, repeated, medians of ratios."""

from __future__ import annotations

import platform
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

__all__ = ["cpu_model", "interleaved", "median", "ratios", "synchronised"]


def interleaved(
    calls: Mapping[str, Callable[[], Any]],
    repeats: int,
    clock: Callable[[], float] = time.process_time,
) -> dict[str, list[float]]:
    """Seconds of every call, `repeats` times, after one round that warms up.

    Each round runs all calls, beginning with another one, so that what the machine does
    meanwhile, and what one call leaves behind, falls on all alike.

    Args:
        calls: By name.
        repeats: Rounds that count.
        clock: Seconds; of this process's processors by default, as wall time on a shared
            machine measures the others.
    """
    names, times = list(calls), {name: [] for name in calls}
    for round_ in range(repeats + 1):
        first = round_ % len(names)
        for name in names[first:] + names[:first]:
            began = clock()
            calls[name]()
            if round_:
                times[name].append(clock() - began)
    return times


def median(times: Mapping[str, list[float]], scale: float = 1e3) -> dict[str, float]:
    """Median of every call's times; in milliseconds by default."""
    return {name: scale * statistics.median(values) for name, values in times.items()}


def ratios(times: Mapping[str, list[float]], baseline: str) -> dict[str, float]:
    """How many times faster than the baseline each call is: the median over the rounds."""
    return {
        name: statistics.median(a / b for a, b in zip(times[baseline], values, strict=True))
        for name, values in times.items()
    }


def cpu_model() -> str:
    """What the processor calls itself, and torch's version."""
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo") as file:
            name = next(line.split(":")[1].strip() for line in file if "model name" in line)
    except (OSError, StopIteration):
        pass
    return f"{name}, torch {torch.__version__}"


def synchronised() -> float:
    """Seconds, once the CUDA device has done all it was asked to."""
    torch.cuda.synchronize()
    return time.perf_counter()
