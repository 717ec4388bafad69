"""Megatron's optimizer around the model chunks, and the learning rate of each step."""

import math
from typing import Any

import torch
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.optimizer import MegatronOptimizer, OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cpgd.config.schema import OptimConfig


def wrap_data_parallel(
    config: TransformerConfig, optim: OptimConfig, chunks: list[torch.nn.Module]
) -> list[DistributedDataParallel]:
    """Chunks with contiguous fp32 gradient buffers, reduced over the data-parallel ranks."""
    ddp = DistributedDataParallelConfig(
        use_distributed_optimizer=optim.distributed, grad_reduce_in_fp32=True
    )
    return [
        DistributedDataParallel(config, ddp, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]


def build_optimizer(
    config: TransformerConfig, optim: OptimConfig, models: list[DistributedDataParallel]
) -> MegatronOptimizer:
    """Adam on fp32 main parameters; hooks it into the schedule through `config`."""
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=optim.lr,
            weight_decay=optim.weight_decay,
            adam_beta1=optim.beta1,
            adam_beta2=optim.beta2,
            adam_eps=optim.eps,
            clip_grad=optim.grad_clip,
            bf16=config.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=optim.distributed,
        ),
        models,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    return optimizer


def learning_rate(optim: OptimConfig, step: int, total_steps: int) -> float:
    """Learning rate of optimizer step `step` (counted from 0) out of `total_steps`."""
    if step < optim.warmup_steps:
        return optim.lr * (step + 1) / optim.warmup_steps
    if optim.schedule == "constant":
        return optim.lr
    progress = (step - optim.warmup_steps) / max(total_steps - optim.warmup_steps, 1)
    progress = min(progress, 1.0)
    share = 1 - progress if optim.schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return optim.min_lr + (optim.lr - optim.min_lr) * share


def set_learning_rate(optimizer: MegatronOptimizer, optim: OptimConfig, lr: float) -> None:
    """Put the step's rate and weight decay into all parameter groups."""
    for group in optimizer.param_groups:
        group["lr"] = lr
        group["weight_decay"] = optim.weight_decay * group.get("wd_mult", 1.0)


def gradient_norm(optimizer: MegatronOptimizer) -> float | Tensor:
    """Norm of the reduced gradient before clipping, the same on every rank. Collective.

    A tensor with Transformer Engine, a number without.
    """
    optimizer.prepare_grads()
    return optimizer.get_grad_norm()  # type: ignore[no-any-return]


@torch.no_grad()
def apply_gradients(optimizer: MegatronOptimizer, optim: OptimConfig, norm: float | Tensor) -> None:
    """Clip and step: `optimizer.step()` without its second look at the norm. Collective.

    Args:
        norm: from `gradient_norm`; upstream's clipping takes it as it is.
    """
    parameters = optimizer.get_parameters()
    if parameters:  # else another rank of the replica holds this rank's share
        clip_grad_by_total_norm_fp32(parameters, optim.grad_clip, norm)
    updated = optimizer.step_with_ready_grads()
    assert updated, "the optimizer skipped a step with a finite gradient norm"


def zero_gradients(models: list[DistributedDataParallel], optimizer: Any) -> None:
    """Clear the gradient buffers before the micro-batches of a step."""
    for model in models:
        model.zero_grad_buffer()
    optimizer.zero_grad()
