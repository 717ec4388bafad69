"""RoPE settings of a Hugging Face config, by Megatron's names."""

from typing import Any


def rope_parameters(hf: dict[str, Any]) -> dict[str, Any]:
    """RoPE settings in the transformers 5 form, whichever form the file has."""
    parameters = dict(hf.get("rope_parameters") or hf.get("rope_scaling") or {})
    parameters.setdefault("rope_theta", hf.get("rope_theta", 10000.0))
    parameters.setdefault("rope_type", parameters.get("type", "default"))
    return parameters


def rotary_part(hf: dict[str, Any]) -> float:
    """Share of each head that RoPE rotates."""
    name, default = "partial_rotary_factor", 0.5 if hf["model_type"] == "glm4_moe" else 1.0
    return float((hf.get("rope_parameters") or {}).get(name, hf.get(name, default)))


def yarn_attributes(hf: dict[str, Any]) -> dict[str, Any]:
    """What GPTModel reads from attributes of its TransformerConfig that are no fields of it.

    For grouped-query attention; latent attention has fields, without this prefix.
    """
    rope = rope_parameters(hf)
    if rope["rope_type"] != "yarn" or hf["model_type"] == "deepseek_v3":
        return {}
    return {
        "yarn_rotary_scaling_factor": rope["factor"],
        "yarn_original_max_position_embeddings": rope["original_max_position_embeddings"],
        "yarn_beta_fast": rope.get("beta_fast") or 32.0,
        "yarn_beta_slow": rope.get("beta_slow") or 1.0,
        "yarn_mscale": rope.get("mscale") or None,
        "yarn_mscale_all_dim": rope.get("mscale_all_dim") or None,
        "yarn_correction_range_round_to_int": rope.get("truncate", True),
    }


def rope_arguments(hf: dict[str, Any]) -> dict[str, Any]:
    """Arguments of GPTModel."""
    rope = rope_parameters(hf)
    return {
        "position_embedding_type": "yarn" if yarn_attributes(hf) else "rope",
        "rotary_base": rope["rope_theta"],
        "rotary_percent": rotary_part(hf),
        "rope_scaling": rope["rope_type"] == "llama3",
        "rope_scaling_factor": rope.get("factor", 1.0),
    }
