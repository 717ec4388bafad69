"""The shared memory through which the policy's weights reach the engine."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.weight_sync.shared_memory import arena_path, remove_stale_arenas
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.quantize import (
    SCALE_SUFFIX,
    Tensors,
    is_quantized,
    quantize,
    quantized_tensors,
)
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import TensorFile, tensor_bytes

_METADATA = {"format": "pt"}


@dataclass(frozen=True, slots=True)
class Arena:
    """Files of full HF tensors, mapped by every rank of rank 0's host, or by an engine node."""

    file: TensorFile
    """What the engine reads."""
    staging: TensorFile | None = None
    """With FP8: the weights that become blocks, in bfloat16. Shards end inside a block, so a block
    is quantised when all ranks have written; then it cannot depend on the layout."""
    group: dist.ProcessGroup | None = None
    """With FP8: the ranks that map the files; None on an engine node."""

    def view(self, name: str) -> Tensor:
        """Where the policy writes the tensor of this HF name."""
        if self.staging is not None and name in self.staging.slots:
            return self.staging.view(name)
        return self.file.view(name)

    def complete(self) -> None:
        """Quantise what all ranks have written, a share on each that maps the files.

        Collective over these.
        """
        if self.group is not None:
            self.quantize(dist.get_rank(self.group), dist.get_world_size(self.group))
            dist.barrier(self.group)

    def quantize(self, share: int, shares: int) -> None:
        """Make the FP8 blocks of one of `shares` shares of the weights that become blocks."""
        assert self.staging is not None
        slots = self.staging.slots
        by_size = sorted(slots, key=lambda name: tensor_bytes(slots[name].dtype, slots[name].shape))
        for name in by_size[share::shares]:
            _quantize_into(self.file, name, self.staging.view(name))


def open_arena(
    table: WeightTable,
    format: Literal["bf16", "fp32", "fp8_block"],
    *,
    beside_rank_0: bool = True,
) -> Arena | None:
    """The arena on the ranks of rank 0's host; None on other hosts. Collective over the world.

    Rank 0 creates the files and removes what killed runs have left.

    Args:
        format: of the engine's weights.
    """
    read, staged = _tensors(table, format)
    if dist.get_rank() == 0:
        remove_stale_arenas()
    file = _open_everywhere("", read, beside_rank_0)
    if staged is None:
        return Arena(file) if file else None
    staging = _open_everywhere("_bf16", staged, beside_rank_0)
    beside: list[bool] = [False] * dist.get_world_size()
    dist.all_gather_object(beside, beside_rank_0)
    ranks = [rank for rank, mapped in enumerate(beside) if mapped]
    group = dist.new_group(ranks, backend="gloo")
    return Arena(file, staging, group) if file else None


def create_arena(table: WeightTable, format: Literal["bf16", "fp32", "fp8_block"]) -> Arena:
    """The arena of an engine node, without a group. See `open_arena`."""
    read, staged = _tensors(table, format)
    remove_stale_arenas()
    file = TensorFile.create(arena_path(os.getpid()), read, _METADATA)
    if staged is None:
        return Arena(file)
    return Arena(file, TensorFile.create(arena_path(os.getpid(), "_bf16"), staged, _METADATA))


def remove_arena(arena: Arena) -> None:
    """Unmap the files, and delete them on the rank that created them."""
    for file, kind in ((arena.file, ""), (arena.staging, "_bf16")):
        if file is not None:
            file.close()
            if file.path == arena_path(os.getpid(), kind):
                file.path.unlink(missing_ok=True)
    if arena.group is not None:
        dist.destroy_process_group(arena.group)


@contextmanager
def quantized_checkpoint(model_dir: Path) -> Iterator[TensorFile]:
    """The weights of a Hugging Face folder in blocks of FP8, in shared memory; for one process."""
    remove_stale_arenas()
    with HfCheckpoint.open(model_dir) as checkpoint, ExitStack() as stack:
        table = weight_table(checkpoint.config)
        checkpoint.check(table)
        tensors = table.hf_tensors(torch.bfloat16)
        path = arena_path(os.getpid())
        file = TensorFile.create(path, quantized_tensors(tensors), _METADATA)
        stack.callback(remove_arena, Arena(file))
        for name, (dtype, _) in tensors.items():
            weight = checkpoint.read(name, ()).to(dtype)
            if is_quantized(name):
                _quantize_into(file, name, weight)
            else:
                file.view(name).copy_(weight)
        yield file


def _quantize_into(file: TensorFile, name: str, weight: Tensor) -> None:
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    quantize(weight, file.view(name), file.view(f"{name}{SCALE_SUFFIX}"), device=device)


def _tensors(
    table: WeightTable, format: Literal["bf16", "fp32", "fp8_block"]
) -> tuple[Tensors, Tensors | None]:
    """What the engine reads, and with FP8 what becomes blocks."""
    tensors = table.hf_tensors(torch.float32 if format == "fp32" else torch.bfloat16)
    if format != "fp8_block":
        return tensors, None
    staged = {name: tensor for name, tensor in tensors.items() if is_quantized(name)}
    return quantized_tensors(tensors), staged


def _open_everywhere(kind: str, tensors: Tensors, beside_rank_0: bool) -> TensorFile | None:
    """Rank 0 creates the file, the others of its host map it. Collective over the world."""
    path: list[str | None] = [None]
    file = None
    if dist.get_rank() == 0:
        target = arena_path(os.getpid(), kind)
        file = TensorFile.create(target, tensors, _METADATA)
        path = [str(target)]
    dist.broadcast_object_list(path)
    if not beside_rank_0:
        return None
    assert path[0] is not None
    return file or TensorFile.open(Path(path[0]), writable=True)
