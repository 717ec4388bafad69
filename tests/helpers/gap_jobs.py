"""tools/measure_routing_gap.py as a module, and its trainer's side as a job."""

import importlib.util
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any

from megatron_cpgd.algorithm.loss_sequences import without_loss
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.types import TrainSequence
from tests.helpers.routing_jobs import taken_experts

TOOL = Path(__file__).parents[2] / "tools" / "measure_routing_gap.py"


def load_tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("measure_routing_gap", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def measure_job(
    config: ExperimentConfig, sequences: list[TrainSequence], noises: list[float]
) -> list[dict[str, float]]:
    """The tool's rows."""
    tool = load_tool()
    return [tool.measure(config, sequences, noise) for noise in noises]


def shifted_job(
    config: ExperimentConfig, sequences: list[TrainSequence], axes: list[int]
) -> list[dict[str, float]]:
    """Rows without noise, with the engine's routes shifted by one token (axis 0) or layer (1)."""
    tool = load_tool()
    return [
        tool.measure(
            config,
            [replace(s, rollout_routes=s.rollout_routes.roll(1, axis)) for s in sequences],
            0.0,
        )
        for axis in axes
    ]


def noisy_replay_job(
    config: ExperimentConfig, sequences: list[TrainSequence], noise: float, folder: Path
) -> list[list[Any]]:
    """Where a trainer with noise sends the tokens of each sequence, replaying and not."""
    tool = load_tool()
    noisy = tool.copy_with_noise(config.model.path, folder / "noisy", noise)
    model = config.model.model_copy(update={"path": noisy})
    policy = tool.build_policy(config.model_copy(update={"model": model}))
    batch = without_loss([replace(each, routes=each.rollout_routes) for each in sequences])
    return taken_experts(policy, batch)
