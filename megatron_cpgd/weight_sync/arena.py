"""The shared memory through which the policy's weights reach the engine."""

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

import torch
import torch.distributed as dist

from megatron_cpgd.weight_sync.shared_memory import arena_path, remove_stale_arenas
from megatron_cpgd.weights.engine_format import engine_tensors
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.quantize import SCALE_SUFFIX, Tensors, is_quantized, quantize
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.tensor_file import TensorFile

_METADATA = {"format": "pt"}


def open_arena(tensors: Tensors, *, beside_rank_0: bool = True) -> TensorFile | None:
    """The arena on the ranks of rank 0's host; None on other hosts. Collective over the world.

    Rank 0 creates the file and removes what killed runs have left.

    Args:
        tensors: what the engines load.
    """
    path: list[str | None] = [None]
    file = None
    if dist.get_rank() == 0:
        file = create_arena(tensors)
        path = [str(file.path)]
    dist.broadcast_object_list(path)
    if not beside_rank_0:
        return None
    assert path[0] is not None
    return file or TensorFile.open(Path(path[0]), writable=True)


def create_arena(tensors: Tensors) -> TensorFile:
    """An arena of this process, in place of what killed runs have left."""
    remove_stale_arenas()
    # Nobody else on this host is to read the weights.
    return TensorFile.create(arena_path(os.getpid()), tensors, _METADATA, mode=0o600)


def remove_arena(arena: TensorFile) -> None:
    """Unmap the file, and delete it on the rank that created it."""
    arena.close()
    if arena.path == arena_path(os.getpid()):
        arena.path.unlink(missing_ok=True)


@contextmanager
def quantized_checkpoint(model_dir: Path) -> Iterator[TensorFile]:
    """The weights of a Hugging Face folder in blocks of FP8, in shared memory; for one process."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with HfCheckpoint.open(model_dir) as checkpoint, ExitStack() as stack:
        table = weight_table(checkpoint.config)
        checkpoint.check(table)
        file = create_arena(engine_tensors(table, "fp8_block"))
        stack.callback(remove_arena, file)
        for name, (dtype, _) in table.hf_tensors(torch.bfloat16).items():
            weight, target = checkpoint.read(name, ()).to(dtype), file.view(name)
            if is_quantized(name):
                quantize(weight, target, file.view(f"{name}{SCALE_SUFFIX}"), device=device)
            else:
                target.copy_(weight)
        yield file
