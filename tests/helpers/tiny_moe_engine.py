"""A tiny mixture of experts that vLLM can run, and transformers' own word on its routes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig

MOE_LAYERS = [0, 2, 3]
NUM_EXPERTS = 8
TOP_K = 3


def moe_config(**changes: Any) -> Qwen3MoeConfig:
    """Four layers, number 1 of them dense."""
    sizes: dict[str, Any] = {
        "vocab_size": 67,
        "hidden_size": 64,
        "intermediate_size": 96,
        "moe_intermediate_size": 64,  # vLLM's CPU kernel wants 32 in each of two workers
        "num_hidden_layers": 4,
        "mlp_only_layers": [1],
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "head_dim": 32,  # vLLM's CPU attention has none below
        "num_experts": NUM_EXPERTS,
        "num_experts_per_tok": TOP_K,
        "norm_topk_prob": True,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
    }
    return Qwen3MoeConfig(**(sizes | changes))


def split_experts(name: str, parameter: Tensor) -> dict[str, Tensor]:
    """A parameter by its names in a checkpoint, where every expert has its own tensors.

    In memory `experts.gate_up_proj` is [E, 2 * I, H] and `experts.down_proj` is [E, H, I].
    """
    prefix, _, part = name.rpartition(".")
    if not prefix.endswith(".experts"):
        return {name: parameter}
    if part == "gate_up_proj":
        gate, up = parameter.chunk(2, dim=1)
        parts = {"gate_proj": gate, "up_proj": up}
    else:
        parts = {part: parameter}
    return {
        f"{prefix}.{expert}.{name}.weight": tensor
        for name, experts in parts.items()
        for expert, tensor in enumerate(experts)
    }


@torch.no_grad()
def router_choices(model: nn.Module, token_ids: list[int]) -> Tensor:
    """[L - 1, MoE layers, top_k] as the router modules return them, the best expert first."""
    chosen: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda module, inputs, output: chosen.append(output[2]))
        for name, module in model.named_modules()
        if name.endswith(("mlp.gate", "mlp.router"))
    ]
    try:
        model(torch.tensor([token_ids[:-1]]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(chosen, dim=1)
