"""Micro-batches through Megatron's pipeline schedules: one forward, or forward and backward."""

import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from megatron_cpgd.algorithm.sequences import Sequences, one_rank_sequences
from megatron_cpgd.data.packing import build_micro_batch, micro_batch_shape, sequence_index
from megatron_cpgd.data.plan import BatchFormat, plan_micro_batches
from megatron_cpgd.policy import device
from megatron_cpgd.policy.context_parallel import packed_rank_positions, rank_positions
from megatron_cpgd.policy.logprobs import LogprobSettings, chunked_logprobs
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.types import LossSequence, MicroBatch

LocalTokens = dict[str, Tensor]
"""Tensors of one micro-batch at this context-parallel rank's positions, [B, S / cp] each."""

MicroBatchFunction = Callable[[MicroBatch, LocalTokens, Tensor, Tensor], tuple[Tensor | None, Any]]
"""(micro-batch, local tokens, logprobs, entropy) -> (loss to differentiate or None, result)."""

ForwardContext = Callable[[torch.nn.Module, MicroBatch], AbstractContextManager[None]]
"""(pipeline chunk, micro-batch) -> what surrounds the chunk's forward pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """What stays the same from batch to batch."""

    models: list[torch.nn.Module]
    """This rank's pipeline chunks."""
    info: ParallelInfo
    logprobs: LogprobSettings
    batch_format: BatchFormat
    rank_multiple: int
    """The tokens of each rank in a micro-batch are a multiple of this: FP8 products need it."""
    common_shape: bool
    """All micro-batches of all ranks have one shape."""


def plan_rank_micro_batches(
    sequences: Sequence[LossSequence], schedule: Schedule, token_budget: int
) -> list[MicroBatch]:
    """This data-parallel rank's micro-batches. Every rank gets the same number of them."""
    info = schedule.info
    lengths = [sequence.length for sequence in sequences]
    plan = plan_micro_batches(
        lengths,
        dp_size=info.dp_size,
        token_budget=token_budget,
        format=schedule.batch_format,
        align=info.sequence_multiple,
        multiple_of=info.pp_size if info.vpp_size > 1 else 1,
        common_shape=schedule.common_shape,
    )
    unit: dict[str, Any] = {
        "format": schedule.batch_format,
        "align": info.sequence_multiple,
        "total_multiple": info.total_multiple(schedule.rank_multiple),
    }
    shape: dict[str, Any] = {}
    if schedule.common_shape:
        common = micro_batch_shape(plan, lengths, **unit)
        shape = {"length": common.length, "rows": common.rows}
    return [
        build_micro_batch(
            sequences,
            indices,
            tensor_names=list(sequences[0].tensors),
            **unit,
            **shape,
        )
        for indices in plan[info.dp_rank]
    ]


def run_schedule(
    schedule: Schedule,
    micro_batches: list[MicroBatch],
    function: MicroBatchFunction,
    *,
    forward_only: bool,
    forward_contexts: Sequence[ForwardContext] = (),
) -> list[Any]:
    """Results of `function` for each micro-batch; empty but on the last pipeline stage.

    Collective over the world. The loss that `function` returns is a plain sum: gradients add up
    over micro-batches, data-parallel and context-parallel ranks.
    """
    info = schedule.info
    # Megatron divides by the micro-batches and, in DDP, by the replicas; undo both.
    scale = len(micro_batches) * info.replica_size
    iterators = [iter(micro_batches) for _ in schedule.models]
    rows, length = micro_batches[0].input_ids.shape
    results: list[Any] = get_forward_backward_func()(
        forward_step_func=partial(_forward_step, schedule, function, scale, forward_contexts),
        data_iterator=iterators if len(iterators) > 1 else iterators[0],
        model=schedule.models if len(schedule.models) > 1 else schedule.models[0],
        num_microbatches=len(micro_batches),
        seq_length=length,
        micro_batch_size=rows,
        forward_only=forward_only,
    )
    return results


def _forward_step(
    schedule: Schedule,
    function: MicroBatchFunction,
    scale: int,
    forward_contexts: Sequence[ForwardContext],
    iterator: Iterator[MicroBatch],
    model: torch.nn.Module,
) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, Any]]]:
    """Megatron's forward_step_func."""
    batch = next(iterator)
    local = _local_tokens(batch, schedule.info)
    with ExitStack() as stack:
        for context in forward_contexts:
            stack.enter_context(context(model, batch))
        output = model(
            local["input_ids"],
            local["position_ids"],
            None,
            labels=local["targets"],
            packed_seq_params=_packed_seq_params(batch),
            output_processor=chunked_logprobs,
            output_processor_context=schedule.logprobs,
        )

    def loss_func(output: Tensor) -> tuple[Tensor, Tensor, Any]:
        """Megatron's loss_func; the 3-tuple keeps it from scaling by the context parallel size."""
        logprobs, entropy = output
        loss, result = function(batch, local, logprobs, entropy)
        if loss is None:
            loss = logprobs.new_zeros(())
        return loss * scale, torch.ones((), dtype=torch.int, device=loss.device), result

    return output, loss_func


def local_positions(batch: MicroBatch, info: ParallelInfo) -> Tensor:
    """[S / cp] columns of the micro-batch that this context-parallel rank computes."""
    if batch.cu_seqlens is not None:
        return packed_rank_positions(batch.cu_seqlens, rank=info.cp_rank, size=info.cp_size)
    return rank_positions(batch.input_ids.size(1), rank=info.cp_rank, size=info.cp_size)


def batch_sequences(batch: MicroBatch, info: ParallelInfo) -> Sequences:
    """The responses of a micro-batch across the context-parallel ranks that share it."""
    index = sequence_index(batch).to(device.current())
    if info.cp_size == 1:
        return one_rank_sequences(index)
    positions = local_positions(batch, info).to(index.device)

    def gather(values: Tensor) -> Tensor:
        # Every position has one owner: a sum with zeros brings it to all ranks bit by bit.
        whole = torch.zeros(index.shape, dtype=values.dtype, device=values.device)
        whole[:, positions] = values.detach()
        dist.all_reduce(whole, group=parallel_state.get_context_parallel_group())
        return whole

    return Sequences(index=index, gather=gather, take=lambda whole: whole[:, positions])


def _local_tokens(batch: MicroBatch, info: ParallelInfo) -> LocalTokens:
    positions = local_positions(batch, info)
    tensors = {
        "input_ids": batch.input_ids,
        "targets": batch.targets,
        "position_ids": batch.position_ids,
        "loss_mask": batch.loss_mask,
        **batch.tensors,
    }
    return {name: x[:, positions].to(device.current()) for name, x in tensors.items()}


def _packed_seq_params(batch: MicroBatch) -> PackedSeqParams | None:
    if batch.cu_seqlens is None:
        return None
    boundaries = torch.tensor(batch.cu_seqlens, dtype=torch.int32, device=device.current())
    longest = max(end - start for start, end in itertools.pairwise(batch.cu_seqlens))
    # Padding counts as part of its sequence: it comes last, so no real token attends to it.
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=boundaries,
        cu_seqlens_kv=boundaries,
        cu_seqlens_q_padded=boundaries,
        cu_seqlens_kv_padded=boundaries,
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
