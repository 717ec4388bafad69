"""Seconds of one piece of work."""

import time
from collections.abc import Callable

import torch


def fastest(work: Callable[[], object], device: str, *, repeat: int = 3) -> float:
    """Of `repeat` times, after one that does not count."""
    work()
    return min(seconds(work, device) for _ in range(repeat))


def seconds(work: Callable[[], object], device: str) -> float:
    """Until the device has done it."""
    _wait_for(device)
    start = time.perf_counter()
    work()
    _wait_for(device)
    return time.perf_counter() - start


def _wait_for(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()
