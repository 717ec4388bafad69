"""A tiny mixture of experts that vLLM can run, and transformers' own word on its routes."""

from typing import Any

import torch
from torch import Tensor, nn
from transformers import DeepseekV3Config, Glm4MoeConfig, Qwen3MoeConfig

MOE_LAYERS = [0, 2, 3]
NUM_EXPERTS = 8
TOP_K = 3
SIGMOID_SIZES: dict[str, Any] = {
    "vocab_size": 67,
    "hidden_size": 64,
    "intermediate_size": 96,
    "moe_intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "n_routed_experts": 12,
    "n_shared_experts": 2,
    "first_k_dense_replace": 1,
    "routed_scaling_factor": 1.5,
    "norm_topk_prob": True,
    "max_position_embeddings": 512,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
}


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


def deepseek_config(**changes: Any) -> DeepseekV3Config:
    """Layer 0 dense; 12 experts in 4 groups, of which two groups and 4 experts are chosen."""
    sizes = SIGMOID_SIZES | {
        "num_experts_per_tok": 4,
        "n_group": 4,
        "topk_group": 2,
        "q_lora_rank": 20,
        "kv_lora_rank": 24,
        "qk_nope_head_dim": 24,
        "qk_rope_head_dim": 8,
        "v_head_dim": 20,
        "scoring_func": "sigmoid",  # these two are for vLLM, transformers has no others
        "topk_method": "noaux_tc",
    }
    return DeepseekV3Config(**(sizes | changes))


def glm_config(**changes: Any) -> Glm4MoeConfig:
    """Layer 0 dense; 3 of 12 experts are chosen."""
    sizes = SIGMOID_SIZES | {
        "num_experts_per_tok": 3,
        "head_dim": 32,
        "attention_bias": True,
        "use_qk_norm": True,
    }
    return Glm4MoeConfig(**(sizes | changes))


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
    """[L - 1, MoE layers, top_k] as the model's own modules choose them."""
    chosen: list[Tensor] = []

    def note(block: Any, output: Any) -> None:
        """`output` of the block's router: the choice is in it, or it is the block's own."""
        with_choice = isinstance(output, tuple)
        chosen.append(output[2] if with_choice else block.route_tokens_to_experts(output)[0])

    hooks = [
        gate.register_forward_hook(lambda gate, inputs, output, own=block: note(own, output))
        for block in model.modules()
        if isinstance(gate := getattr(block, "gate", getattr(block, "router", None)), nn.Module)
    ]
    try:
        model(torch.tensor([token_ids[:-1]]))
    finally:
        for hook in hooks:
            hook.remove()
    return torch.stack(chosen, dim=1)
