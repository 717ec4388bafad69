"""Rules of the section `rollout`: what its settings exclude, and what they would do in vain."""

import itertools
import math
from collections.abc import Iterator

from megatron_cpgd.config.algorithm_checks import CUDA_GRAPHS
from megatron_cpgd.config.messages import show
from megatron_cpgd.config.schema import ExperimentConfig, RolloutConfig

_ENGINE_INTEGERS = (
    "tensor_parallel_size", "pipeline_parallel_size", "max_num_seqs", "kv_cache_memory_bytes"
)  # fmt: skip


def check_rollout(config: ExperimentConfig) -> Iterator[str]:
    """The problems of sampling and of the engines."""
    rollout = config.rollout
    if rollout.logprob_diff_limit is not None:
        yield from _limit_problems(rollout)
    yield from _piece_problems(rollout)
    if rollout.overlap and rollout.staleness == 0:
        yield (
            "rollout.overlap=true does nothing: with rollout.staleness=0 every batch is sampled by "
            "the weights of the step before; set staleness to at least 1, or overlap=false"
        )
    yield from _engine_problems(rollout)
    yield from _sync_problems(config)
    yield from _sleep_problems(config)


def _limit_problems(rollout: RolloutConfig) -> Iterator[str]:
    if rollout.top_p < 1 or rollout.top_k != -1:
        yield (
            f"rollout.logprob_diff_limit={rollout.logprob_diff_limit} compares full distributions, "
            f"but rollout.top_p={rollout.top_p} and rollout.top_k={rollout.top_k} truncate the "
            "engine's; set top_p=1 and top_k=-1, or logprob_diff_limit=null"
        )
    if rollout.staleness > 0:
        yield (
            f"rollout.logprob_diff_limit={rollout.logprob_diff_limit} expects trainer and engine "
            f"to hold the same weights, but rollout.staleness={rollout.staleness} compares "
            "different ones; set logprob_diff_limit=null or staleness=0"
        )
    if rollout.piece_tokens is not None:
        yield (
            f"rollout.logprob_diff_limit={rollout.logprob_diff_limit} expects trainer and engine "
            "to hold the same weights, but with rollout.piece_tokens some tokens come from older "
            "ones; set one of them to null"
        )


def _piece_problems(rollout: RolloutConfig) -> Iterator[str]:
    piece, groups = rollout.piece_tokens, rollout.groups_in_flight
    if piece is None:
        if groups is not None:
            yield (
                f"rollout.groups_in_flight={groups} does nothing: without rollout.piece_tokens "
                "every step samples its own prompts; set piece_tokens or remove it"
            )
        return
    if rollout.max_response_tokens % piece or piece == rollout.max_response_tokens:
        yield (
            f"rollout.piece_tokens={piece}: expected a proper divisor of "
            f"rollout.max_response_tokens={rollout.max_response_tokens}"
        )
    if groups is not None and groups < rollout.prompts_per_step:
        yield (
            f"rollout.groups_in_flight={groups} must be >= rollout.prompts_per_step="
            f"{rollout.prompts_per_step}"
        )


def _engine_number_problems(rollout: RolloutConfig) -> Iterator[str]:
    """Of engine arguments that plans and other rules compute with."""
    for name in _ENGINE_INTEGERS:
        value = rollout.engine_args.get(name)
        if value is not None and not (type(value) is int and value > 0):
            yield f"rollout.engine_args.{name}: must be an integer > 0, got {show(value)}"
    share = rollout.engine_args.get("gpu_memory_utilization")
    if share is not None and not (type(share) in (int, float) and 0 < share <= 1):
        yield (
            "rollout.engine_args.gpu_memory_utilization: must be a share of the GPU's memory, > 0 "
            f"and <= 1, got {show(share)}"
        )


def _engine_problems(rollout: RolloutConfig) -> Iterator[str]:
    devices, nodes = rollout.devices, rollout.nodes
    numbers = list(_engine_number_problems(rollout))
    yield from numbers
    if nodes and rollout.engines % nodes:
        yield (
            f"rollout.engines={rollout.engines}: expected a multiple of rollout.nodes={nodes}, as "
            "every node has as many engines; change one of them"
        )
    elif devices is not None and (not devices or len(devices) % rollout.engines_per_node):
        share = f"rollout.engines={rollout.engines}" + (f" / rollout.nodes={nodes}" * (nodes > 0))
        yield (
            f"rollout.devices={devices}: expected a multiple of {share}, got {len(devices)}; every "
            "engine takes as many"
        )
    elif devices is not None and not numbers:
        sizes = ("tensor_parallel_size", "pipeline_parallel_size")
        needed = math.prod(rollout.engine_args.get(name) or 1 for name in sizes)
        count = len(devices) // rollout.engines_per_node
        if any(len(set(each)) < needed for each in itertools.batched(devices, count)):
            yield (
                f"rollout.devices={devices}: {count} for each engine, which takes {needed} others "
                "(rollout.engine_args.tensor_parallel_size * pipeline_parallel_size); name more "
                "GPUs, or change rollout.engines"
            )


def _sync_problems(config: ExperimentConfig) -> Iterator[str]:
    if config.rollout.sync != "in_place":
        return
    if config.rollout.nodes > 0:
        yield (
            "rollout.sync=in_place reads the memory of the trainer's first node, but rollout.nodes="
            f"{config.rollout.nodes} puts the engines elsewhere; set sync=arena or nodes=0"
        )
    if not config.optim.distributed:
        yield (
            "rollout.sync=in_place needs the weights in a few buffers, which Megatron has with "
            "optim.distributed=true only; set that, or rollout.sync=arena"
        )
    if config.optim.offload:
        yield (
            "rollout.sync=in_place reads weights on the GPUs, from which optim.offload=true takes "
            "them before the engines wake; set sync=arena or offload=false"
        )


def _sleep_problems(config: ExperimentConfig) -> Iterator[str]:
    rollout, ranks = config.rollout, config.parallel.world_size
    if rollout.sleep and rollout.overlap:
        yield (
            "rollout.sleep=true lets the engines sleep while the trainer works, but "
            "rollout.overlap=true samples meanwhile; set one of them to false"
        )
    if rollout.sleep and rollout.nodes > 0:
        yield (
            f"rollout.sleep=true does nothing: with rollout.nodes={rollout.nodes} the engines have "
            "GPUs of their own; set sleep=false"
        )
    if rollout.sleep and rollout.devices and min(rollout.devices) >= ranks:
        yield (
            f"rollout.sleep=true does nothing: rollout.devices={rollout.devices} are none of the "
            f"{ranks} that the trainer takes; set sleep=false or remove devices"
        )
    if not config.optim.offload:
        return
    if not rollout.sleep:
        yield (
            "optim.offload=true does nothing: with rollout.sleep=false engines keep their share "
            "of the GPUs all the time; set sleep=true or offload=false"
        )
    for name in CUDA_GRAPHS:
        value = config.model.megatron.get(name)
        if value not in (None, False, "none"):
            yield (
                f"model.megatron.{name}={value}: a captured graph expects the weights where they "
                "were, and with optim.offload=true they come back elsewhere; remove one of them"
            )
