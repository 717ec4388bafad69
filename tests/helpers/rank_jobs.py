"""Jobs for `run_distributed` that do not end well."""

import os

import torch
import torch.distributed as dist


def fail_job(failing: int, how: str) -> None:
    """One rank fails; the others wait for it in a collective."""
    if dist.get_rank() == failing:
        if how == "dies":
            os._exit(1)
        raise ValueError("on purpose")
    dist.all_reduce(torch.zeros(1))
