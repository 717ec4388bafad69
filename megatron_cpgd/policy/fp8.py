"""FP8 training: what it needs of the machine, and Megatron-Core's settings for it."""

import os
from typing import Any

import torch

from megatron_cpgd.config.schema import PrecisionConfig
from megatron_cpgd.errors import ConfigError

Version = tuple[int, int]


def set_environment() -> None:
    """Let Transformer Engine scale blocks by any factor, as the engine does.

    By default it takes powers of two. Blackwell, which has no other, keeps that. The variable is
    read when Transformer Engine is imported, which megatron-core does.
    """
    if not torch.cuda.is_available():
        return
    device = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.get_device_capability(device) < (10, 0):
        os.environ.setdefault("NVTE_FP8_BLOCK_SCALING_FP32_SCALES", "1")


def require_fp8(precision: PrecisionConfig) -> None:
    """
    Raises:
        ConfigError: this machine cannot train with the recipe of `precision.train`.
    """
    recipe = precision.recipe
    if recipe is None:
        return
    where = f"precision.train={precision.train}"
    if not torch.cuda.is_available():
        raise ConfigError(
            f"{where}: FP8 training needs a GPU, and this machine has none that torch can use; set "
            "bf16 or fp32 (precision.rollout=fp8_block works without)"
        )
    try:
        import transformer_engine.pytorch  # noqa: F401
    except (ImportError, OSError) as error:
        raise ConfigError(
            f"{where}: FP8 training needs Transformer Engine, which cannot be imported: {error}; "
            "install the extra `gpu`, or set bf16"
        ) from error
    cuda = tuple(int(part) for part in (torch.version.cuda or "0.0").split(".")[:2])
    problem = hardware_problem(recipe, torch.cuda.get_device_capability(), (cuda[0], cuda[1]))
    if problem:
        raise ConfigError(f"{where}: {problem}; use another recipe or bf16")


def hardware_problem(recipe: str, capability: Version, cuda: Version) -> str | None:
    """What stands in the way of a recipe on a GPU of this compute capability.

    As transformer_engine/pytorch/quantization.py 2.17 decides.
    """
    gpu = f"this GPU has compute capability {capability[0]}.{capability[1]}"
    if recipe == "mxfp8":
        if not (10, 0) <= capability < (12, 0):
            return f"MXFP8 needs compute capability 10.x or 11.x (B200), {gpu}"
    elif recipe == "blockwise":
        if capability < (9, 0):
            return f"blocks of FP8 need compute capability 9.0 (H100), {gpu}"
        if cuda < (12, 9):
            return f"blocks of FP8 need CUDA 12.9, torch was built for {cuda[0]}.{cuda[1]}"
    elif capability < (8, 9):
        return f"FP8 needs compute capability 8.9 (L40, H100), {gpu}"
    return None


def fp8_fields(precision: PrecisionConfig) -> dict[str, Any]:
    """Fields of Megatron-Core's TransformerConfig."""
    if precision.recipe is None:
        return {}
    return {
        "fp8": precision.fp8_format,
        "fp8_recipe": precision.recipe,
        "first_last_layers_bf16": precision.bf16_layers > 0,
        "num_layers_at_start_in_bf16": precision.bf16_layers,
        "num_layers_at_end_in_bf16": precision.bf16_layers,
    }
