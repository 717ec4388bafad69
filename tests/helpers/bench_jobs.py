"""tools/bench_objectives.py as a module, and its two sides as a job for `run_distributed`."""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

TOOL = Path(__file__).parents[2] / "tools" / "bench_objectives.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_objectives", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def make_case(bench: ModuleType, **changes: Any) -> Any:
    """23 tokens in responses of 6, 6, 6 and 5; chunks of 10, 10 and 3."""
    settings = {
        "tokens": 23, "vocab": 50, "hidden": 16, "dtype": "fp32", "objective": "cpgd",
        "device": "cpu", "chunk_tokens": 10, "response_tokens": 6, "repeat": 1,
    }  # fmt: skip
    return bench.Case(**settings | changes)


def both_sides_job(objective: str, dtype: str) -> dict[str, tuple[torch.Tensor, ...]]:
    """Loss and gradients of each side."""
    bench = load_tool()
    case, results = make_case(bench, objective=objective, dtype=dtype), {}
    for side, step in bench.SIDES.items():
        batch = bench.make_batch(case)
        loss = step(case, batch)
        loss.backward()
        results[side] = loss.detach(), batch.hidden.grad, batch.weight.grad
    return results
