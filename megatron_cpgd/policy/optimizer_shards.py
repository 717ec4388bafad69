"""The distributed optimizer's state in checkpoints: every rank writes and reads its own part alone.

Upstream's format that loads under any layout, fully_reshardable, first gathers the state of all
data-parallel ranks on each of them, in host memory: 20 bytes per parameter of the shard and rank,
while the rank's own part may be a hundredth of that. It loads the same way. Here a rank's part of a
parameter, a range of its flattened elements, is a few boxes of the full tensor, and the checkpoint
takes boxes of any size. Names and shapes in the files are upstream's.
"""

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch import Tensor
from torch.nn import Parameter

OwnState = dict[Parameter, dict[str, Tensor]]
"""Of each parameter of which this rank optimizes a range: its fp32 copy ("param") and moments in
that range, flat."""
Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(offsets, sizes)."""


def own_state(optimizer: DistributedOptimizer) -> OwnState:
    """The tensors of the optimizer themselves."""
    names = ("param", *optimizer.optimizer_state_keys)
    return {
        param: {name: optimizer._get_main_param_and_optimizer_states(param)[name] for name in names}
        for param in optimizer.model_param_group_index_map
    }


def empty_state(optimizer: DistributedOptimizer) -> OwnState:
    """The same on the host, to be read into."""
    return {
        param: {name: torch.empty(flat.shape, dtype=flat.dtype) for name, flat in tensors.items()}
        for param, tensors in own_state(optimizer).items()
    }


def restore(optimizer: DistributedOptimizer, state: OwnState) -> None:
    """Copy it into the optimizer."""
    for param, tensors in state.items():
        optimizer._set_main_param_and_optimizer_states(param, tensors)


def sharded_state(
    optimizer: DistributedOptimizer, state: OwnState, model_state: dict[str, Any]
) -> dict[str, ShardedTensor]:
    """Views of `state` as boxes of full tensors, by a name for each that is this rank's own.

    Args:
        model_state: of Megatron's `sharded_state_dict`, with the parameters as data.
    """
    sharded, _ = extract_sharded_tensors_and_factories(model_state)
    by_param = {base.data: base for base in nested_values(sharded)}
    boxes = {}
    for param, tensors in state.items():
        place = optimizer._get_model_param_range_map(param)["param"]
        for leaf, first in _leaves(by_param[param], param):
            begin, end = place.start - first, place.end - first
            for name, flat in tensors.items():
                for box in _boxes(leaf, f"optimizer.state.{name}.", flat, begin, end):
                    boxes[f"{box.key} {box.global_offset}"] = box
    return boxes


def check_whole(boxes: Iterable[ShardedTensor]) -> None:
    """The parts of all ranks have as many elements together as the full tensors. Collective.

    Upstream checks grids of equal parts only. What no rank has written would be read as noise.

    Raises:
        RuntimeError: on every rank, naming the tensors.
    """
    written: Counter[str] = Counter()
    sizes: dict[str, int] = {}
    for box in boxes:
        written[box.key] += math.prod(box.local_shape) * is_main_replica(box.replica_id)
        sizes[box.key] = math.prod(box.global_shape)
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, (written, sizes))
    total = sum((own for own, _ in ranks), Counter[str]())
    expected = {key: size for _, own in ranks for key, size in own.items()}
    if wrong := [f"{key}: {total[key]} of {n}" for key, n in expected.items() if total[key] != n]:
        raise RuntimeError(
            f"the ranks' parts of {len(wrong)} tensors of the optimizer have other numbers of "
            f"elements together than the tensors, first {'; '.join(wrong[:3])}"
        )


def flat_boxes(shape: tuple[int, ...], begin: int, end: int) -> Iterator[Box]:
    """The elements [begin, end) of a flattened tensor as boxes of it, in order.

    Of a matrix at most three: what is left of a row, whole rows, the beginning of a row.
    """
    if len(shape) == 1:
        if begin < end:
            yield (begin,), (end - begin,)
        return
    inner = shape[1:]
    row = math.prod(inner)
    first, last = -(-begin // row) * row, end // row * row  # where whole rows begin and end
    for a, b in pairwise([begin, first, last, end] if first <= last else [begin, end]):
        index = a // row
        if a % row or b % row:
            for offsets, sizes in flat_boxes(inner, a - index * row, b - index * row):
                yield (index, *offsets), (1, *sizes)
        elif a < b:
            yield (index, *(0 for _ in inner)), ((b - a) // row, *inner)


def _leaves(
    base: ShardedTensor | ShardedTensorFactory, param: Parameter
) -> Iterator[tuple[ShardedTensor, int]]:
    """The full tensors of which a parameter holds a part, as gate and up in one matrix; with each
    where that part begins among the parameter's elements."""
    built = base.build() if isinstance(base, ShardedTensorFactory) else base
    for leaf in nested_values({"": built}):
        assert leaf.data.is_contiguous(), leaf
        yield leaf, (leaf.data.data_ptr() - param.data_ptr()) // param.element_size()


def _boxes(
    leaf: ShardedTensor, prefix: str, flat: Tensor, begin: int, end: int
) -> Iterator[ShardedTensor]:
    """Of `flat`, which holds the elements [begin, end) as the leaf counts its own, those in it."""
    axes, shape = leaf.prepend_axis_num, leaf.local_shape
    start = max(begin, 0)
    for offsets, sizes in flat_boxes(shape, start, min(end, math.prod(shape))):
        count = math.prod(sizes)
        data = flat[start - begin : start - begin + count].view((1,) * axes + sizes)
        start += count
        place = (*(0,) * axes, *offsets)
        yield replace(
            leaf,
            key=prefix + leaf.key,
            data=data,
            dtype=data.dtype,
            local_shape=tuple(data.shape),
            global_offset=tuple(a + b for a, b in zip(leaf.global_offset, place, strict=True)),
            axis_fragmentations=None,  # boxes are not of one size
            replica_id=(*leaf.replica_id[:-1], 0),  # no other data-parallel rank has it
            prepend_axis_num=0,
        )
