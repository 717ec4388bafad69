"""This rank's parameters against the weight table: load from, and write to, full HF tensors."""

from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.policy import device
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.table import WeightTable, export_tensor, import_tensor


def iter_parameters(chunks: list[Any]) -> Iterator[tuple[str, torch.nn.Parameter]]:
    """(name with the global layer index, parameter) of this rank's GPTModel chunks."""
    for chunk in chunks:
        layers = [layer.layer_number - 1 for layer in chunk.decoder.layers]
        for name, parameter in chunk.named_parameters():
            parts = name.split(".")
            if parts[:2] == ["decoder", "layers"]:
                parts[2] = str(layers[int(parts[2])])
            yield ".".join(parts), parameter


@torch.no_grad()
def load_hf_weights(
    chunks: list[Any], table: WeightTable, checkpoint: HfCheckpoint, info: ParallelInfo
) -> None:
    """Fill every parameter with its slices of the checkpoint. A rank reads what it holds."""
    for name, parameter in iter_parameters(chunks):
        import_tensor(
            table.entry(name),
            parameter,
            checkpoint.read,
            tp_rank=info.tp_rank,
            tp_size=info.tp_size,
        )


@torch.no_grad()
def write_hf_weights(
    chunks: list[Any],
    table: WeightTable,
    info: ParallelInfo,
    view: Callable[[str], Tensor],
) -> None:
    """Write the model into the full HF tensors that `view` maps by name. Collective over the world.

    Ranks write disjoint parts; those that hold the same shard take turns. On return every rank has
    written, and the count of elements proves that each tensor was written once and whole.

    Raises:
        ConversionError: on every rank, naming the tensors that were not.
    """
    index = {name: i for i, name in enumerate(table.hf_shapes)}
    written = torch.zeros(len(index), dtype=torch.int64, device=device.current())
    for i, (name, parameter) in enumerate(iter_parameters(chunks)):
        if i % info.replica_size == info.replica_rank:
            counts = export_tensor(
                table.entry(name), parameter, view, tp_rank=info.tp_rank, tp_size=info.tp_size
            )
            for hf_name, elements in counts.items():
                written[index[hf_name]] += elements
    dist.all_reduce(written)
    table.check_written(dict(zip(index, written.tolist(), strict=True)))
