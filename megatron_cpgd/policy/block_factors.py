"""FP8 blocks of weights that are cut: ranks agree on their factors, and each makes its own codes.

Shards may end inside a block. Its largest number is then that of all ranks that share it, so that
codes and factors are those of the whole weight under any layout.
"""

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpgd.policy import device
from megatron_cpgd.weights.buckets import Piece
from megatron_cpgd.weights.quantize import (
    SCALE_SUFFIX,
    block_scales,
    is_quantized,
    own_blocks,
    quantize_part,
    raise_maxima,
    scale_shape,
)
from megatron_cpgd.weights.table import Entry, WeightTable
from megatron_cpgd.weights.tiling import span


@torch.no_grad()
def block_factors(
    held: Iterable[tuple[Entry, Iterable[Piece]]], table: WeightTable
) -> dict[str, Tensor]:
    """Factors of all weights of which this rank has a part, by HF name. Collective over the ranks
    that share tensors.

    Args:
        held: all weights of this rank, with the parts that it contributes.

    Returns:
        [ceil(m / 128), ceil(n / 128)] float32 of each whole weight [m, n]; only those of blocks
        that this rank reaches into mean something.
    """
    maxima: dict[str, Tensor] = {}
    shared: dict[bool, list[str]] = {False: [], True: []}
    for entry, pieces in held:
        for name in dict.fromkeys(segment.hf for segment in entry.segments):
            if is_quantized(name):
                shape = scale_shape(table.hf_shapes[name])
                maxima[name] = torch.zeros(shape, device=device.current())
                if entry.split != "replicated":
                    shared[entry.expert].append(name)
        for name, place, values in pieces:
            if name in maxima:
                raise_maxima(maxima[name], values.to(torch.bfloat16), place)
    for experts, names in shared.items():
        group = _sharing_group(experts=experts)
        if names and dist.get_world_size(group) > 1:
            flat = torch.cat([maxima[name].flatten() for name in names])
            dist.all_reduce(flat, op=dist.ReduceOp.MAX, group=group)
            parts = flat.split([maxima[name].numel() for name in names])
            for name, part in zip(names, parts, strict=True):
                maxima[name] = part.view_as(maxima[name])
    return {name: block_scales(each) for name, each in maxima.items()}


@torch.no_grad()
def quantized_pieces(pieces: Iterable[Piece], factors: Mapping[str, Tensor]) -> Iterator[Piece]:
    """The same weights, those with factors as codes and factors of their own blocks."""
    for name, place, values in pieces:
        if name not in factors:
            yield name, place, values
            continue
        yield name, place, quantize_part(values.to(torch.bfloat16), place, factors[name])
        blocks = own_blocks(place)
        if all(map(span, blocks)):
            yield f"{name}{SCALE_SUFFIX}", blocks, factors[name][blocks]


def _sharing_group(*, experts: bool) -> Any:
    """The ranks among which tensors are cut."""
    if experts:
        return parallel_state.get_expert_tensor_parallel_group()
    return parallel_state.get_tensor_model_parallel_group()
