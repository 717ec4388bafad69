"""Tiny random Hugging Face models and batches; every process makes the same ones."""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import (
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    Glm4MoeConfig,
    Glm4MoeForCausalLM,
    GptOssConfig,
    GptOssForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.types import LossSequence

ARCHITECTURES = {
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"head_dim": 16}),
    "llama": (LlamaConfig, LlamaForCausalLM, {}),
    "deepseek_v3": (
        DeepseekV3Config,
        DeepseekV3ForCausalLM,
        {
            "num_key_value_heads": 8,
            "q_lora_rank": 20,
            "kv_lora_rank": 24,
            "qk_nope_head_dim": 16,
            "qk_rope_head_dim": 8,
            "v_head_dim": 12,
            "n_routed_experts": 12,
            "num_experts_per_tok": 4,
            "n_group": 4,
            "topk_group": 2,
            "moe_intermediate_size": 24,
            "first_k_dense_replace": 1,
        },
    ),
    "glm4_moe": (
        Glm4MoeConfig,
        Glm4MoeForCausalLM,
        {
            "head_dim": 16,
            "attention_bias": True,
            "n_routed_experts": 12,
            "n_shared_experts": 2,
            "num_experts_per_tok": 4,
            "moe_intermediate_size": 24,
            "routed_scaling_factor": 1.5,
        },
    ),
    "gpt_oss": (
        GptOssConfig,
        GptOssForCausalLM,
        {
            "head_dim": 16,
            "num_local_experts": 6,
            "num_experts_per_tok": 3,
            "intermediate_size": 24,
            "sliding_window": 5,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {
                "rope_type": "yarn",
                "rope_theta": 150000.0,
                "factor": 4.0,
                "beta_fast": 32.0,
                "beta_slow": 1.0,
                "truncate": False,
                "original_max_position_embeddings": 64,
            },
        },
    ),
    "mixtral": (MixtralConfig, MixtralForCausalLM, {"num_local_experts": 6}),
    "qwen3_moe": (
        Qwen3MoeConfig,
        Qwen3MoeForCausalLM,
        {
            "head_dim": 16,
            "num_experts": 12,  # not a power of two
            "num_experts_per_tok": 3,
            "moe_intermediate_size": 24,
            "norm_topk_prob": True,
        },
    ),
}
SIZES: dict[str, Any] = {
    "vocab_size": 131,  # odd: the padding of the vocabulary is part of every test
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 256,
    "rms_norm_eps": 1e-6,
    "initializer_range": 0.2,
    "tie_word_embeddings": False,
}


# Multiples of 128 throughout, for FP8; flash and cuDNN attention all know heads of 64.
GPU_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.05,
}


def save_tiny_model(path: Path, architecture: str, **overrides: Any) -> Any:
    """Save a random fp32 model to `path` and return it, in eval mode.

    Norms and biases, those of routers included, get random values too: at their initial 1 and 0
    they would hide mistakes.
    """
    config_class, model_class, extra = ARCHITECTURES[architecture]
    torch.manual_seed(7)
    model = model_class(config_class(**{**SIZES, **extra, **overrides})).float().eval()
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
            if "norm" in name or name.endswith(("bias", "sinks")):
                # The activation of gpt-oss clamps at 7.
                scale = 3.0 if name.endswith("gate_up_proj_bias") else 0.1
                tensor.add_(scale * torch.randn_like(tensor))
    model.save_pretrained(path)
    return model


def add_prediction_layers(path: Path, count: int = 2) -> None:
    """Give a saved model layers that predict further tokens, as the released files have them."""
    weights = load_file(path / "model.safetensors")
    config = json.loads((path / "config.json").read_text())
    last, hidden = config["num_hidden_layers"] - 1, config["hidden_size"]
    block = {n: x for n, x in weights.items() if n.startswith(f"model.layers.{last}.")}
    for layer in range(last + 1, last + 1 + count):
        prefix = f"model.layers.{layer}."
        weights |= {
            name.replace(f"model.layers.{last}.", prefix): torch.rand_like(x)
            for name, x in block.items()
        }
        weights |= {
            f"{prefix}{name}.weight": torch.rand(hidden)
            for name in ("enorm", "hnorm", "shared_head.norm")
        }
        weights |= {
            f"{prefix}eh_proj.weight": torch.rand(hidden, 2 * hidden),
            f"{prefix}embed_tokens.weight": weights["model.embed_tokens.weight"].clone(),
            f"{prefix}shared_head.head.weight": weights["lm_head.weight"].clone(),
        }
    save_file(weights, path / "model.safetensors", {"format": "pt"})
    config["num_nextn_predict_layers"] = count
    (path / "config.json").write_text(json.dumps(config))


def tiny_config(model_path: Path, **sections: Any) -> ExperimentConfig:
    """A configuration for the policy alone; `sections` replace whole sections."""
    return ExperimentConfig.model_validate(
        {
            "run": {"dir": "unused", "steps": 10},
            "model": {"path": model_path},
            "data": {"path": "unused.jsonl"},
            "rewards": {"functions": [{"type": "exact_match"}]},
            "precision": {"train": "fp32"},
            "optim": {"lr": 1e-3},
            "batch": {"tokens_per_micro_batch": 48, "logprob_chunk_tokens": 20},
            **sections,
        }
    )


def tiny_sequences(vocab_size: int = 131, groups: int = 4, size: int = 3) -> list[LossSequence]:
    """Ragged sequences, some without a response, with random advantages of both signs."""
    generator = torch.Generator().manual_seed(11)

    def number(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    sequences = []
    for i in range(groups * size):
        prompt, response = number(1, 9), 0 if i == 5 else number(1, 20)
        sequences.append(
            LossSequence(
                input_ids=torch.randint(vocab_size, (prompt + response,), generator=generator),
                prompt_length=prompt,
                tensors={
                    "advantages": torch.randn(1, generator=generator).expand(response).clone(),
                    "coefficients": torch.full((response,), 0.01 * (1 + i % groups)),
                },
            )
        )
    return sequences
