"""From a configuration to what one step of it does, with the lengths that are assumed."""

import math
from dataclasses import dataclass
from typing import Any

from megatron_cpgd.config.algorithm import AlgorithmConfig, BalancedClip, LogRatioTerm
from megatron_cpgd.config.schema import ExperimentConfig, PrecisionConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.planning.activations import passes_of
from megatron_cpgd.planning.fp8 import Fp8
from megatron_cpgd.planning.generation import Requests
from megatron_cpgd.planning.machine import Machine
from megatron_cpgd.planning.memory import EngineSettings, TrainerSettings
from megatron_cpgd.planning.passes import Batch

RESPONSE_SHARE = 0.5
"""Assumed mean length of a response, as a share of the longest allowed."""
PROMPT_SHARE = 0.5
"""The same of prompts."""
VLLM_UTILIZATION = 0.92
"""vLLM's own default of gpu_memory_utilization (vllm/config/cache.py, 0.25)."""
MAX_SEQUENCES = {True: 1024, False: 256}
"""Sequences that the engine decodes together: vLLM's default on large GPUs, ours on CPU."""
CPU_CACHE_BYTES = 256 << 20
"""As in `CPU_ENGINE_ARGS` of rollout/vllm_requests.py."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """What a step does."""

    requests: Requests
    trainer: TrainerSettings
    engine: EngineSettings
    batch: Batch
    """Of the passes with gradient, all mini-batches together."""
    logprob_micro_tokens: int
    forward_passes: float
    """Passes without gradient over the whole batch, with the policy's weights, before training."""
    updates: int
    """Optimizer steps."""
    epochs: int
    routes: bool
    live_passes: int = 0
    """The same between optimizer steps."""
    overlap: bool = False
    """Batches are sampled while the trainer works."""

    @property
    def tokens(self) -> int:
        return math.ceil(self.batch.tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Mean lengths that are assumed of prompts and responses."""

    prompt: float
    response: float
    longest: int | None = None
    """Longest response, if the lengths are known; None: any response may be as long as allowed."""


def assumed_lengths(config: ExperimentConfig, response_tokens: float | None = None) -> Lengths:
    """Shares of the limits; `response_tokens` replaces that of the responses.

    Raises:
        ConfigError: no response may be as long.
    """
    longest = config.rollout.max_response_tokens
    if (response_tokens or 0) > longest:
        raise ConfigError(
            f"a mean of {response_tokens:g} tokens of a response is more than "
            f"rollout.max_response_tokens={longest}; assume fewer"
        )
    return Lengths(
        prompt=PROMPT_SHARE * config.data.max_prompt_tokens,
        response=response_tokens or RESPONSE_SHARE * longest,
    )


def workload_of(config: ExperimentConfig, machine: Machine, lengths: Lengths) -> Workload:
    """What a step of this configuration does."""
    rollout, algorithm, batch = config.rollout, config.algorithm, config.batch
    sequences = rollout.prompts_per_step * rollout.samples_per_prompt
    longest = config.data.max_prompt_tokens + (lengths.longest or rollout.max_response_tokens)
    updates = algorithm.mini_batches * algorithm.epochs
    # No micro-batch is larger than what a rank has of a mini-batch, nor smaller than a sequence; of
    # lengths that are only assumed, all may be the longest.
    known = lengths.prompt + lengths.response if lengths.longest else longest
    per_rank = math.ceil(sequences / algorithm.mini_batches / config.parallel.dp * known)
    micro_tokens = max(min(batch.tokens_per_micro_batch, per_rank), longest)
    return Workload(
        requests=Requests(
            prompts=rollout.prompts_per_step,
            samples=rollout.samples_per_prompt,
            prompt_tokens=lengths.prompt,
            response_tokens=lengths.response,
            longest=lengths.longest or rollout.max_response_tokens,
        ),
        trainer=TrainerSettings(
            passes=passes_of(
                config.precision.policy_weights, config.model.recompute, config.model.megatron,
                accelerator=machine.accelerator, fp8=_fp8_settings(config.precision),
            ),
            distributed_optimizer=config.optim.distributed,
            micro_tokens=micro_tokens,
            chunk_tokens=batch.logprob_chunk_tokens,
            reference=config.reference_path is not None,
            offloads=config.optim.offload,
        ),
        engine=_engine_settings(config, machine),
        batch=Batch(
            tokens=sequences * (lengths.prompt + lengths.response),
            length=lengths.prompt + lengths.response,
            micro_tokens=batch.tokens_per_micro_batch,
        ),
        logprob_micro_tokens=batch.tokens_per_logprob_batch or 2 * batch.tokens_per_micro_batch,
        forward_passes=float(algorithm.old_policy == "trainer"),
        live_passes=_live_passes(algorithm),
        updates=updates,
        epochs=algorithm.epochs,
        routes=algorithm.routing_replay != "none" or config.tracking.routing_every is not None,
        overlap=rollout.overlap,
    )  # fmt: skip


def _live_passes(algorithm: AlgorithmConfig) -> int:
    """For a clip range that is searched, and for the weights of epochs after the first."""
    searches = algorithm.epochs if isinstance(algorithm.clip, BalancedClip) else 0
    weighs = algorithm.epochs - 1 if isinstance(algorithm.policy, LogRatioTerm) else 0
    return searches + weighs


def _fp8_settings(precision: PrecisionConfig) -> Fp8 | None:
    if precision.recipe is None:
        return None
    return Fp8(recipe=precision.recipe, bf16_layers=precision.bf16_layers)


def _engine_settings(config: ExperimentConfig, machine: Machine) -> EngineSettings:
    given: dict[str, Any] = config.rollout.engine_args
    cache = given.get("kv_cache_memory_bytes")
    if cache is None and not machine.accelerator:
        cache = CPU_CACHE_BYTES
    return EngineSettings(
        tp=int(given.get("tensor_parallel_size") or 1),
        precision=config.precision.engine_weights,
        utilization=float(given.get("gpu_memory_utilization") or VLLM_UTILIZATION),
        max_sequences=int(given.get("max_num_seqs") or MAX_SEQUENCES[machine.accelerator]),
        cache_bytes=int(cache) if cache is not None else None,
        engines=config.rollout.engines,
        devices=tuple(config.rollout.devices) if config.rollout.devices else None,
        in_place=config.rollout.sync == "in_place",
        sleeps=config.rollout.sleep,
        nodes=config.rollout.nodes,
        fp8_cache=str(given.get("kv_cache_dtype")).startswith("fp8"),
    )
