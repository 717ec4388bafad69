"""What of a Hugging Face config Megatron-Core would compute differently, or not at all."""

from typing import Any

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.policy.rope import rope_parameters, rotary_part
from megatron_cpgd.weights.decoder import Decoder


def check_supported(hf: dict[str, Any], decoder: Decoder) -> None:
    """Raises ConversionError, with all that stands in the way."""
    problems = [f"{name}: is missing" for name in _router_names(hf, decoder) if name not in hf]
    if problems:
        raise ConversionError("config.json: " + "; ".join(problems))
    if hf.get("hidden_act", "silu") != "silu":
        problems.append(f"hidden_act: expected silu, got {hf['hidden_act']}")
    if hf.get("use_sliding_window"):
        problems.append("use_sliding_window: sliding-window attention is not supported")
    if hf["model_type"] == "mixtral" and hf.get("sliding_window") is not None:
        problems.append("sliding_window: sliding-window attention is not supported")
    if hf["model_type"] == "gpt_oss":
        problems += _gpt_oss_problems(hf, decoder)
    elif decoder.output_bias:
        problems.append("attention_bias: biases of o_proj are not supported")
    if decoder.mlp_bias:
        problems.append("mlp_bias: biases of the MLP are not supported")
    if decoder.experts is not None and decoder.experts.score_correction:
        problems += _router_problems(hf)
    if decoder.latent is not None:
        problems += _latent_problems(hf)
    elif hf["model_type"] == "gpt_oss" and rope_parameters(hf)["rope_type"] == "yarn":
        problems += _yarn_problems(rope_parameters(hf))
    else:
        problems += _rope_problems(rope_parameters(hf))
    if hf["model_type"] != "glm4_moe" and rotary_part(hf) != 1:
        problems.append("partial_rotary_factor: rotating a part of a head is not supported")
    if problems:
        raise ConversionError("config.json: " + "; ".join(problems))


def _router_names(hf: dict[str, Any], decoder: Decoder) -> list[str]:
    """What the router cannot do without."""
    if decoder.experts is None:
        return []
    corrected = decoder.experts.score_correction
    groups = corrected and (hf.get("n_group") or 1) > 1
    return [
        "num_experts_per_tok",
        *(["routed_scaling_factor"] if corrected else []),
        *(["topk_group"] if groups else []),
    ]


def _router_problems(hf: dict[str, Any]) -> list[str]:
    problems = []
    chosen = hf["num_experts_per_tok"]
    if not hf.get("norm_topk_prob", False) or chosen < 2:
        problems.append("norm_topk_prob, num_experts_per_tok: expected true and at least 2")
    if (hf.get("n_group") or 1) > 1 and chosen != 2 * hf["topk_group"]:
        problems.append(
            f"topk_group: Megatron-Core rates a group by its num_experts_per_tok / topk_group = "
            f"{chosen} / {hf['topk_group']} best experts, the model by 2"
        )
    return problems


def layer_types(hf: dict[str, Any]) -> list[str]:
    """The kind of attention of each layer of gpt-oss."""
    kinds = ("sliding_attention", "full_attention")
    return hf.get("layer_types") or [kinds[i % 2] for i in range(hf["num_hidden_layers"])]


def _gpt_oss_problems(hf: dict[str, Any], decoder: Decoder) -> list[str]:
    problems, kinds = [], layer_types(hf)
    rope = hf.get("rope_parameters") or hf.get("rope_scaling")
    if not rope or "rope_theta" not in hf | rope:
        problems.append("rope_parameters, rope_theta: expected both")  # 10000 is not its default
    if not decoder.output_bias:
        problems.append("attention_bias: expected true")
    if hf.get("swiglu_limit", 7.0) != 7.0:
        problems.append(f"swiglu_limit: expected 7.0, got {hf['swiglu_limit']}")
    known = {"sliding_attention", "full_attention"}
    if len(kinds) != decoder.layers or not known.issuperset(kinds):
        problems.append(f"layer_types: expected {decoder.layers} of {sorted(known)}, got {kinds}")
    window = hf.get("sliding_window")
    if "sliding_attention" in kinds and (not isinstance(window, int) or window < 1):
        problems.append(f"sliding_window: expected a positive integer, got {window!r}")
    return problems


def _yarn_problems(rope: dict[str, Any]) -> list[str]:
    needed = ("factor", "original_max_position_embeddings")
    problems = [f"yarn {name}: is missing or 0" for name in needed if not rope.get(name)]
    if rope.get("attention_factor") is not None:
        problems.append("yarn attention_factor: is not supported")
    return problems


def _latent_problems(hf: dict[str, Any]) -> list[str]:
    problems, rope = [], rope_parameters(hf)
    if hf.get("attention_bias"):
        problems.append("attention_bias: biases of latent attention are not supported")
    if not hf.get("rope_interleave", True):
        problems.append("rope_interleave: expected true")
    if rope["rope_type"] not in ("default", "yarn"):
        problems.append(f"rope_type: expected default or yarn, got {rope['rope_type']}")
    if rope["rope_type"] == "yarn":
        needed = ("factor", "original_max_position_embeddings", "mscale", "mscale_all_dim")
        problems += [f"yarn {name}: is missing or 0" for name in needed if not rope.get(name)]
        if "attention_factor" in rope or not rope.get("truncate", True):
            problems.append("yarn attention_factor, truncate: are not supported")
    return problems


def _rope_problems(rope: dict[str, Any]) -> list[str]:
    if rope["rope_type"] == "default":
        return []
    if rope["rope_type"] != "llama3":
        return [f"rope_type: expected default or llama3, got {rope['rope_type']}"]
    # Constants of megatron/core/models/common/embeddings/rotary_pos_embedding.py.
    expected = {
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    return [
        f"rope {name}: Megatron-Core computes with {value}, the config has {rope.get(name)}"
        for name, value in expected.items()
        if rope.get(name) != value
    ]
