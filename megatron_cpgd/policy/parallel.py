"""Process groups from the configuration, and where this rank stands in them."""

import math
import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

from megatron_cpgd.config.schema import ParallelConfig
from megatron_cpgd.slurm import host_name


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelInfo:
    """Sizes of the parallel axes and this rank's place on each."""

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    vpp_size: int
    cp_rank: int
    cp_size: int
    dp_rank: int
    dp_size: int
    ep_rank: int
    ep_size: int
    etp_rank: int
    etp_size: int
    sequence_parallel: bool
    hosts: tuple[str, ...]
    """Of every rank."""

    @property
    def beside_rank_0(self) -> bool:
        """Whether this rank and rank 0 share a host, and so the memory that the engine reads."""
        return self.hosts[self.rank] == self.hosts[0]

    @property
    def replica_size(self) -> int:
        """Ranks that hold the same parameters, experts aside."""
        return self.dp_size * self.cp_size

    @property
    def sequence_multiple(self) -> int:
        """Every packed sequence and every padded row is a multiple of this: zig-zag halves."""
        return 2 * self.cp_size if self.cp_size > 1 else 1

    def total_multiple(self, rank_multiple: int) -> int:
        """The tokens of a micro-batch are a multiple of this: each TP rank holds equal shares.

        Args:
            rank_multiple: what the tokens of one rank are to be a multiple of.
        """
        shards = self.tp_size if self.sequence_parallel else 1
        return math.lcm(self.sequence_multiple, self.cp_size * rank_multiple) * shards


def join_world(timeout: timedelta) -> None:
    """Join the process group that RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT describe.

    Args:
        timeout: longest wait of a collective for the slowest rank.
    """
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    backend = "nccl" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, timeout=timeout)


def leave_world() -> None:
    """End all process groups. Collective over the world."""
    parallel_state.destroy_model_parallel()
    dist.destroy_process_group()


def init_model_parallel(config: ParallelConfig, *, seed: int) -> ParallelInfo:
    """Create Megatron's groups and RNG streams; groups of the same sizes are used again.

    Collective over the world.

    Raises:
        ValueError: the world size is not tp * pp * cp * dp.
    """
    if dist.get_world_size() != config.world_size:
        raise ValueError(
            f"parallel: tp({config.tp}) * pp({config.pp}) * cp({config.cp}) * dp({config.dp}) = "
            f"{config.world_size} processes, but {dist.get_world_size()} were started"
        )
    if parallel_state.model_parallel_is_initialized() and not _groups_fit(config):
        parallel_state.destroy_model_parallel()
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            config.tp,
            config.pp,
            config.vpp if config.vpp > 1 else None,
            context_parallel_size=config.cp,
            expert_model_parallel_size=config.ep,
            expert_tensor_parallel_size=config.etp,
            create_gloo_process_groups=dist.get_backend() != "fake",  # those would be real
        )
    model_parallel_cuda_manual_seed(seed + 1)  # the seed must be positive
    return parallel_info(config)


def _groups_fit(config: ParallelConfig) -> bool:
    """Upstream never ends the threads of the groups that it destroys: better keep them."""
    return (config.tp, config.pp, config.vpp, config.cp, config.ep, config.etp) == (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
        parallel_state.get_expert_model_parallel_world_size(),
        parallel_state.get_expert_tensor_parallel_world_size(),
    )


def parallel_info(config: ParallelConfig) -> ParallelInfo:
    """This rank's place in the groups that exist. Collective over the world."""
    hosts = [""] * dist.get_world_size()
    dist.all_gather_object(hosts, host_name())
    return ParallelInfo(
        rank=dist.get_rank(),
        world_size=dist.get_world_size(),
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        tp_size=config.tp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        pp_size=config.pp,
        vpp_size=config.vpp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        cp_size=config.cp,
        dp_rank=parallel_state.get_data_parallel_rank(),
        dp_size=config.dp,
        ep_rank=parallel_state.get_expert_model_parallel_rank(),
        ep_size=config.ep,
        etp_rank=parallel_state.get_expert_tensor_parallel_rank(),
        etp_size=config.etp,
        sequence_parallel=config.sequence_parallel and config.tp > 1,
        hosts=tuple(hosts),
    )
