"""Distributed checkpoints (Megatron's torch_dist format) that load under any layout.

A checkpoint is a folder: Megatron's files, `trainer_state.json` and, written last, `MANIFEST.json`
with the size of every file. A folder without a complete manifest is not a checkpoint.
"""

import json
import os
import queue
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import (
    TorchDistLoadShardedStrategy,
    TorchDistSaveShardedStrategy,
)
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from torch.distributed.checkpoint.api import CheckpointException

from megatron_cpgd.errors import ConversionError, RunError
from megatron_cpgd.policy.optimizer_shards import (
    OwnState,
    check_whole,
    empty_state,
    own_state,
    restore,
    sharded_state,
)
from megatron_cpgd.weights.carried import CarriedTensors
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.hf_export import copy_side_files
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import TensorFile

MANIFEST = "MANIFEST.json"
TRAINER_STATE = "trainer_state.json"
HF_FILES = "hf"
"""Folder inside a checkpoint with config.json and tokenizer of the model."""
NOT_TRAINED = "not_trained.safetensors"
"""What the model's source has beside the model, e.g. layers that predict further tokens."""
FORMAT = "megatron_cpgd/1"
_TENSORS = "optimizer_tensors"
"""Key of what the distributed optimizer has for each parameter."""


def save_checkpoint(
    path: Path,
    chunks: list[Any],
    optimizer: MegatronOptimizer | None,
    trainer_state: dict[str, Any],
    *,
    hf_source: Path,
    table: WeightTable,
    files: Mapping[str, bytes] | None = None,
) -> None:
    """Write everything, then the manifest, then give the folder its name. Collective.

    Args:
        optimizer: None saves the weights only.
        trainer_state: what JSON can hold.
        hf_source: folder whose config.json, tokenizer and tensors that `table` carries over go
            along, so that the checkpoint alone is enough to build the model and to convert it back.
        files: further ones, name -> content; read on rank 0 only.

    Raises:
        RunError: the disk does not take it.
        RuntimeError: the ranks' parts are not the whole optimizer state.
    """
    partial = path.with_name(path.name + ".partial")
    if dist.get_rank() == 0:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
    dist.barrier()
    state = model_state(chunks)
    if optimizer is not None:
        state |= _optimizer_state(optimizer, state)
    try:
        save_state(state, partial)
    except CheckpointException as error:  # names no cause; the writers have logged theirs
        free = shutil.disk_usage(partial).free
        shutil.rmtree(partial, ignore_errors=True)
        raise RunError(
            f"{path}: the checkpoint was not written; {free / 1e9:.1f} GB were free there. If its "
            "disk or quota is full, make room: the same command goes on from the last checkpoint"
        ) from error
    dist.barrier()
    if dist.get_rank() == 0:
        (partial / HF_FILES).mkdir()
        copy_side_files(hf_source, partial / HF_FILES)
        for name, content in (files or {}).items():
            (partial / name).write_bytes(content)
        dtype = str(next(chunks[0].parameters()).dtype).removeprefix("torch.")
        facts: dict[str, Any] = {"has_optimizer": optimizer is not None, "dtype": dtype}
        if table.carries:
            with CarriedTensors.find(HfCheckpoint.open(hf_source), table) as carried:
                facts["not_trained"] = carried.save(partial / NOT_TRAINED)
        _commit(partial, path, trainer_state, facts)
    dist.barrier()


def load_checkpoint(
    path: Path, chunks: list[Any], optimizer: MegatronOptimizer | None
) -> dict[str, Any]:
    """Fill model and optimizer, whatever layout saved them; returns the trainer state.

    Collective over the world. A checkpoint of weights only leaves the optimizer at its start.

    Raises:
        ConversionError: the folder is not a complete checkpoint, or its optimizer does not fit.
    """
    manifest = check_checkpoint(path)
    stored = optimizer if manifest["has_optimizer"] else None
    state = model_state(chunks)
    read: list[tuple[DistributedOptimizer, OwnState]] = []
    if stored is not None and _is_distributed(stored):
        for part in stored.chained_optimizers:
            # torch's Adam has no state before its first step.
            part._init_optimizer_states_with_dummy_values()
            read.append((part, empty_state(part)))
        state[_TENSORS] = _tensors(read, state)
    elif stored is not None:
        state["optimizer"] = stored.sharded_state_dict(state, is_loading=True, metadata=metadata())
    loaded = load_state(state, path)
    for i, chunk in enumerate(chunks):
        chunk.load_state_dict(loaded[_chunk_key(i, len(chunks))], strict=False)
    if stored is not None:
        with torch.no_grad():
            stored.load_state_dict(_fit_parts(loaded["optimizer"], stored))
            for part, tensors in read:
                restore(part, tensors)
    elif optimizer is not None:
        optimizer.reload_model_params()  # the fp32 copies of bf16 weights
    trainer_state: dict[str, Any] = json.loads((path / TRAINER_STATE).read_text())
    return trainer_state


def check_checkpoint(path: Path) -> dict[str, Any]:
    """The manifest, after comparing it with the files.

    Raises:
        ConversionError: no manifest, or a file is missing or has another size.
    """
    manifest_path = path / MANIFEST
    if not manifest_path.is_file():
        inside = [*path.glob(f"*/{MANIFEST}"), *path.glob(f"checkpoints/*/{MANIFEST}")]
        hint = f"; did you mean {max(inside).parent}?" if inside else ""
        raise ConversionError(f"{path}: not a complete checkpoint, it has no {MANIFEST}{hint}")
    try:
        manifest: dict[str, Any] = json.loads(manifest_path.read_text())
    except ValueError as error:
        raise ConversionError(
            f"{manifest_path}: damaged, {error}; use another checkpoint"
        ) from error
    for name, size in manifest["files"].items():
        file = path / name
        actual = file.stat().st_size if file.is_file() else None
        if actual != size:
            found = "is missing" if actual is None else f"has {actual} bytes"
            raise ConversionError(f"{file}: expected {size} bytes, the file {found}")
    return manifest


def carried_file(path: Path, table: WeightTable) -> Path | None:
    """The file of a checkpoint that holds what `table` carries over, if it carries anything.

    Raises:
        ConversionError: it is not that which the checkpoint was saved with.
    """
    if not table.carries:
        return None
    file, expected = path / NOT_TRAINED, check_checkpoint(path).get("not_trained")
    if expected is None:
        raise ConversionError(
            f"{path}: has no {NOT_TRAINED} with the layers that predict further tokens "
            "(num_nextn_predict_layers); an older version has written it, make it again"
        )
    with TensorFile.open(file) as opened:
        digest = opened.digest()
    if digest != expected:
        raise ConversionError(f"{file}: expected the digest {expected}, the file has {digest}")
    return file


def model_state(chunks: list[Any]) -> dict[str, Any]:
    """The parameters with their places in full tensors."""
    return {
        _chunk_key(i, len(chunks)): chunk.sharded_state_dict(metadata=metadata())
        for i, chunk in enumerate(chunks)
    }


def save_state(state: dict[str, Any], folder: Path) -> None:
    """Write it as Megatron does; replicas share the work. Collective."""
    # Results of the writer threads. By default upstream starts a manager process that imports
    # everything again (6 to 20 s) and outlives a killed rank; a synchronous save needs neither.
    filesystem_async._results_queue = queue.Queue()
    dist_checkpointing.save(
        state,
        str(folder),
        FullyParallelSaveStrategyWrapper(TorchDistSaveShardedStrategy(), _replica_group()),
        content_metadata={k: v for k, v in metadata().items() if k != "dp_cp_group"},
    )


def load_state(state: dict[str, Any], folder: Path) -> dict[str, Any]:
    """The same with what the files have: sharded tensors are read into, replicas share the work.
    Collective."""
    loaded: dict[str, Any] = dist_checkpointing.load(
        state,
        str(folder),
        FullyParallelLoadStrategyWrapper(TorchDistLoadShardedStrategy(), _replica_group()),
    )
    return loaded


def metadata() -> dict[str, Any]:
    """How Megatron is to lay out its state: so that it loads under any layout."""
    return {
        "distrib_optim_sharding_type": "fully_reshardable",
        "singleton_local_shards": False,
        "chained_optim_avoid_prefix": True,
        "dp_cp_group": _replica_group(),
    }


def _replica_group() -> Any:
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _chunk_key(index: int, count: int) -> str:
    return f"model{index}" if count > 1 else "model"


def _optimizer_state(optimizer: MegatronOptimizer, model: dict[str, Any]) -> dict[str, Any]:
    """To be saved beside the state of the model."""
    if not _is_distributed(optimizer):
        return {"optimizer": optimizer.sharded_state_dict(model, metadata=metadata())}
    parts = optimizer.chained_optimizers
    optimizer._synchronize_steps()
    tensors = _tensors([(part, own_state(part)) for part in parts], model)
    check_whole(tensors.values())
    return {"optimizer": parts[0].state_dict(), _TENSORS: tensors}


def _tensors(
    states: Sequence[tuple[DistributedOptimizer, OwnState]], model: dict[str, Any]
) -> dict[str, ShardedTensor]:
    return {
        name: tensor
        for part, own in states
        for name, tensor in sharded_state(part, own, model).items()
    }


def _is_distributed(optimizer: MegatronOptimizer) -> bool:
    return all(isinstance(part, DistributedOptimizer) for part in optimizer.chained_optimizers)


def _fit_parts(state: dict[Any, Any], optimizer: MegatronOptimizer) -> Any:
    """Loaded optimizer state in the form that this layout's optimizer takes.

    Experts that are spread over other ranks than dense layers have an optimizer of their own: the
    number of parts depends on ep and etp. Plain values, as the Adam step, are the same for all.
    """
    if not _is_distributed(optimizer):
        if len({type(key) for key in state}) > 1:  # single and numbered parts
            raise ConversionError(
                "the checkpoint has another number of optimizers (one, or one for experts and one "
                "for the rest) than this layout makes, which optim.distributed=false cannot "
                "convert; resume with the parallel.tp, ep and etp that saved it"
            )
        return state
    # Megatron writes them once for each optimizer, if there are several.
    plain = state["optimizer"] if "optimizer" in state else state[0]["optimizer"]

    def fit(part: MegatronOptimizer) -> dict[str, Any]:
        expert = part.param_groups[0]["is_expert_parallel"]
        groups = [group | {"is_expert_parallel": expert} for group in plain["param_groups"]]
        return {"optimizer": plain | {"param_groups": groups}}

    parts = optimizer.chained_optimizers
    return fit(parts[0]) if len(parts) == 1 else [fit(part) for part in parts]


def _commit(
    partial: Path, path: Path, trainer_state: dict[str, Any], facts: dict[str, Any]
) -> None:
    (partial / TRAINER_STATE).write_text(json.dumps(trainer_state, indent=2))
    files = {
        str(file.relative_to(partial)): file.stat().st_size
        for file in sorted(partial.rglob("*"))
        if file.is_file()
    }
    manifest = {"format": FORMAT, **facts, "files": files}
    with (partial / MANIFEST).open("w") as file:
        json.dump(manifest, file, indent=2)
        file.flush()
        os.fsync(file.fileno())
    if path.exists():
        shutil.rmtree(path)
    partial.rename(path)
