"""Public models and published runs for the tests of plans."""

import json
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from megatron_cpgd.planning.activations import Passes
from megatron_cpgd.planning.estimate import estimate
from megatron_cpgd.planning.generation import Requests
from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.machine import GPUS, Machine, with_factors
from megatron_cpgd.planning.memory import EngineSettings, TrainerSettings
from megatron_cpgd.planning.model import Model, read_model
from megatron_cpgd.planning.passes import Batch
from megatron_cpgd.planning.plan import Plan
from megatron_cpgd.planning.workload import Workload

MODELS = Path(__file__).parents[2] / "configs/models"

H20 = replace(
    GPUS["h100"],
    name="h20",
    memory=97_871 * 2**20,
    bandwidth=4e12,
    flops={"bf16": 148e12, "fp32": 44e12},
)
"""NVIDIA's data sheet of the H20 with 96 GB."""


def public_config(name: str) -> dict[str, Any]:
    """config.json of a public model."""
    config: dict[str, Any] = json.loads((MODELS / name / "config.json").read_text())
    return config


@cache
def public_model(name: str) -> Model:
    return read_model(public_config(name))


class EnginesEverywhere(EngineSettings):
    """Those of other systems are on all nodes of the trainer."""

    def on_gpu(self, gpu: int) -> int:
        return 1


def published_plan(
    name: str, layout: Layout, *, machine: Machine, prompts: int, samples: int, length: int,
    longest: int, engine_tp: int, updates: int, recompute: Any,
) -> Plan:  # fmt: skip
    """A run of another system in our formulas: engines on all GPUs that sleep while it trains, a
    reference policy, log-probs of the policy before the step, weights sent from GPU to GPU.

    Args:
        length: mean of prompt and response, of which 100 are taken for the prompt.
        longest: bound of both together, and the tokens of a micro-batch.
    """
    passes = Passes(precision="bf16", recompute=recompute, accelerator=True, fused_activation=True)
    workload = Workload(
        requests=Requests(
            prompts=prompts, samples=samples, prompt_tokens=100, response_tokens=length - 100,
            longest=longest - 100,
        ),
        trainer=TrainerSettings(
            passes=passes, distributed_optimizer=True, micro_tokens=longest, chunk_tokens=longest,
            reference=True, offloads=True,
        ),
        engine=EnginesEverywhere(
            tp=engine_tp, precision="bf16", utilization=0.6, max_sequences=1024,
            engines=layout.world_size // engine_tp, sleeps=True,
        ),
        batch=Batch(tokens=prompts * samples * length, length=length, micro_tokens=longest),
        logprob_micro_tokens=longest, forward_passes=1, updates=updates, epochs=1, routes=False,
    )  # fmt: skip
    # Their weights do not go through a host's memory.
    machine = with_factors(machine, host_write=4e11, host_sum=8e11)
    return estimate(public_model(name), layout, machine, workload)
