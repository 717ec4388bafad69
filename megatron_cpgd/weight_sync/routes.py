"""Which way the weights of a run take."""

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.rollout.remote_engine import RemoteEngineGroup
from megatron_cpgd.weight_sync.arena import open_arena
from megatron_cpgd.weight_sync.arena_weights import ArenaWeights
from megatron_cpgd.weight_sync.in_place import InPlaceWeights
from megatron_cpgd.weight_sync.node_weights import NodeWeights
from megatron_cpgd.weight_sync.sync import WeightRoute
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.table import WeightTable


def open_route(
    config: ExperimentConfig, policy: Policy, table: WeightTable, engine: RolloutEngine | None
) -> WeightRoute:
    """The way to the engines of `rollout.nodes`, or to those of rank 0's host. Collective.

    Args:
        engine: rank 0's.

    Raises:
        ConfigError: on every rank, `rollout.sync=in_place` is not possible.
    """
    rollout, format = config.rollout, config.precision.engine_weights
    if rollout.nodes:
        return NodeWeights(
            policy.shards,
            table,
            format,
            engine.nodes if isinstance(engine, RemoteEngineGroup) else None,
            count=rollout.nodes,
            start_timeout_s=rollout.start_timeout_s,
            step_timeout_s=rollout.step_timeout_s,
        )
    beside = policy.info.beside_rank_0
    if rollout.sync == "in_place":
        return InPlaceWeights(policy, table, format, beside_rank_0=beside)
    arena = open_arena(engine_tensors(table, format), beside_rank_0=beside)
    return ArenaWeights(policy, arena, format)
