"""What the benchmarks share: alternated runs, ratios with their spread, and where and when they were made."""

import ctypes
import datetime
import os
import platform
import statistics
import time
from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

__all__ = ["Timed", "alternate", "environment", "keep_memory", "ratios", "summary", "timed", "timed_on_gpu"]


class Timed(NamedTuple):
    """Seconds of each system, one figure a round, and of some the bytes that a round moves."""

    seconds: dict[str, list[float]]
    moved: dict[str, int] | None = None


def alternate(
    functions: Mapping[str, Callable[[], object]], rounds: int, warm_up: int = 2, device: str = "cpu"
) -> dict[str, list[float]]:
    """Return seconds of each function, one figure a round; every round runs all, each in turn first."""
    time_of = timed_on_gpu if device == "cuda" else timed
    names = list(functions)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    for index in range(warm_up + rounds):
        turn = index % len(names)
        for name in names[turn:] + names[:turn]:
            taken = time_of(functions[name])
            if index >= warm_up:
                seconds[name].append(taken)
    return seconds


def ratios(seconds: Mapping[str, list[float]], base: str) -> dict[str, dict[str, float]]:
    """Return, for each name, the time of the base over its own, round by round: above 1 is faster than the base."""
    return {name: summary([b / s for b, s in zip(seconds[base], own)]) for name, own in seconds.items()}


def timed(function: Callable[[], object]) -> float:
    """Return the seconds a call takes."""
    started = time.perf_counter()
    function()
    return time.perf_counter() - started


def timed_on_gpu(function: Callable[[], object]) -> float:
    """Return the seconds that the GPU takes over a call, from what it starts to what it ends with."""
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / 1e3


def keep_memory() -> None:
    """Have glibc keep what it is given back, for the next call, instead of handing it back to the system.

    Raises:
        RuntimeError: Where the process has another allocator.
    """
    trim_threshold, mmap_max = -1, -4  # malloc.h's names for what is set; a threshold of -1 is none
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is None or not (mallopt(trim_threshold, -1) and mallopt(mmap_max, 0)):
        raise RuntimeError("This needs glibc's allocator, whose mallopt tells it to keep memory.")


def summary(values: list[float]) -> dict[str, float]:
    """Return the median, its quartiles and the number of values."""
    low, median, high = statistics.quantiles(values, n=4)
    return {"median": median, "quartile_low": low, "quartile_high": high, "rounds": len(values)}


def environment(device: str = "cpu") -> dict[str, Any]:
    """Return versions, machine, threads and date; on a GPU its name too."""
    import timm
    import torch

    from timm_eca.fused import native

    return {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "timm": timm.__version__,
        "torch": torch.__version__,
        "machine": f"{platform.system()} {platform.machine()}",
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "compiled_passes": native.loaded(),
        **({"gpu": torch.cuda.get_device_name(), "triton": version("triton")} if device == "cuda" else {}),
    }
