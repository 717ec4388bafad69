"""Megatron's own modules of any rank of a layout, without its processes and its memory."""

from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from megatron_cpgd.config.schema import ExperimentConfig, PrecisionConfig
from megatron_cpgd.policy.model import build_chunks
from megatron_cpgd.policy.parallel import ParallelInfo, init_model_parallel, leave_world
from megatron_cpgd.policy.shards import iter_weights
from megatron_cpgd.policy.transformer_config import build_transformer_config
from megatron_cpgd.weights.placement import Placement, padded_vocab_size
from megatron_cpgd.weights.registry import read_decoder
from megatron_cpgd.weights.table import raise_problems


def placement(config: ExperimentConfig, hf: dict[str, Any]) -> Placement:
    """What each rank of the run is to hold."""
    padded = padded_vocab_size(hf["vocab_size"], config.parallel.tp)
    return Placement(read_decoder(hf), config.parallel, padded_vocab=padded)


def check_rank(config: ExperimentConfig, hf: dict[str, Any], expected: Placement, rank: int) -> int:
    """Compare the modules of one rank with what it is to hold; the process must be in no group.

    Returns:
        Parameters and persistent buffers of the rank, vocabulary padding included.

    Raises:
        ConversionError: names every tensor that is missing, unknown, or of another shape.
    """
    info, found = _build(config, hf, rank)
    at = expected.place(rank)
    place = {"stage": info.pp_rank, "tp": info.tp_rank, "ep": info.ep_rank, "etp": info.etp_rank}
    problems = [
        f"{axis}: expected place {getattr(at, axis)}, Megatron has {index}"
        for axis, index in place.items()
        if index != getattr(at, axis)
    ]
    wanted = {shard.entry.names: shard.shape for shard in expected.shards(rank)}
    by_name = {name: names for names in wanted for name in names}
    problems += [f"{name}: is not expected" for name in found if name not in by_name]
    shapes = {by_name[name]: shape for name, shape in found.items() if name in by_name}
    problems += [
        f"{names[0]}: expected {list(shape)}, Megatron has {list(shapes.get(names, ())) or 'none'}"
        for names, shape in wanted.items()
        if shapes.get(names) != shape
    ]
    raise_problems(f"rank {rank}", problems)
    return sum(torch.Size(shape).numel() for shape in found.values())


def _build(
    config: ExperimentConfig, hf: dict[str, Any], rank: int
) -> tuple[ParallelInfo, dict[str, tuple[int, ...]]]:
    """Where Megatron puts a rank; shape of its tensors by name with global layer and expert."""
    world_size = config.parallel.world_size
    dist.init_process_group("fake", rank=rank, world_size=world_size, store=FakeStore())
    try:
        info = init_model_parallel(config.parallel, seed=0)
        precision = config.precision
        if not torch.cuda.is_available():  # FP8 is Transformer Engine's and changes no shape
            precision = PrecisionConfig(train=precision.policy_weights)
        transformer = build_transformer_config(hf, config.model, config.parallel, precision)
        transformer.use_cpu_initialization = True  # else upstream names a device for each tensor
        with torch.device("meta"):
            chunks = build_chunks(transformer, hf, info)
        return info, {name: tuple(tensor.shape) for name, tensor in iter_weights(chunks, info)}
    finally:
        leave_world()
