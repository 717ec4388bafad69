"""Checkpoints between Hugging Face folders and Megatron's torch_dist format, in one process.

Both directions go through the real model and the same weight table as training, so what converts
is what trains. Peak memory is one copy of the weights.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state

from megatron_cpgd.config.schema import ModelConfig, ParallelConfig, PrecisionConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy.checkpoint import (
    HF_FILES,
    carried_file,
    check_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from megatron_cpgd.policy.model import build_chunks
from megatron_cpgd.policy.parallel import ParallelInfo, init_model_parallel
from megatron_cpgd.policy.shards import Shards, load_hf_weights
from megatron_cpgd.policy.transformer_config import build_transformer_config, torch_dtype
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint, read_config
from megatron_cpgd.weights.hf_export import HfWriter
from megatron_cpgd.weights.registry import weight_table

logger = logging.getLogger(__name__)


def hf_to_megatron(hf_dir: Path, out_dir: Path, *, dtype: str) -> None:
    """Write the weights of a Hugging Face folder as a distributed checkpoint for any layout.

    Args:
        dtype: `bf16` or `fp32`, of the weights in the checkpoint.

    Raises:
        ConversionError: the source is damaged or not supported, or out_dir exists.
    """
    if out_dir.exists():
        raise ConversionError(f"{out_dir} exists; remove it or choose another folder")
    with HfCheckpoint.open(hf_dir) as checkpoint, _one_rank() as info:
        table = weight_table(checkpoint.config)
        checkpoint.check(table)
        chunks = _build(checkpoint.config, hf_dir, torch_dtype(dtype), info)
        load_hf_weights(chunks, table, checkpoint, info)
        save_checkpoint(out_dir, chunks, None, {}, hf_source=hf_dir, table=table)
    logger.info("wrote %s", out_dir)


def megatron_to_hf(checkpoint_dir: Path, out_dir: Path, *, max_shard_bytes: int) -> None:
    """Write the weights of a distributed checkpoint as a Hugging Face folder.

    Takes what `hf_to_megatron` or a training run has written, under any layout.

    Raises:
        ConversionError: the checkpoint is not complete, or out_dir exists.
    """
    dtype = getattr(torch, check_checkpoint(checkpoint_dir)["dtype"])
    source = checkpoint_dir / HF_FILES
    config = read_config(source)
    table = weight_table(config)
    with _one_rank() as info:
        writer = HfWriter.create(
            out_dir,
            table=table,
            source_dir=source,
            carried_file=carried_file(checkpoint_dir, table),
            dtype=dtype,
            max_shard_bytes=max_shard_bytes,
        )
        try:
            chunks = _build(config, source, dtype, info)
            load_checkpoint(checkpoint_dir, chunks, None)
            Shards(chunks, table, info).write(writer.view)
        except BaseException:
            writer.abort()
            raise
        writer.commit()
    logger.info("wrote %s", out_dir)


def _build(config: dict[str, Any], path: Path, dtype: torch.dtype, info: ParallelInfo) -> list[Any]:
    precision = PrecisionConfig(train="fp32" if dtype is torch.float32 else "bf16")
    transformer = build_transformer_config(
        config, ModelConfig(path=path), ParallelConfig(), precision
    )
    return build_chunks(transformer, config, info)


@contextmanager
def _one_rank() -> Iterator[ParallelInfo]:
    """A world of this process alone."""
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    try:
        yield init_model_parallel(ParallelConfig(), seed=0)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
