"""Do the Hugging Face folders exist, are they usable, and does the parallel layout fit?"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from megatron_cpgd.config.fp8_checks import check_fp8_sizes
from megatron_cpgd.config.schema import ExperimentConfig, ParallelConfig

ARCHITECTURES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM",
    "llama": "LlamaForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "glm4_moe": "Glm4MoeForCausalLM",
    "gpt_oss": "GptOssForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}
"""Supported `model_type` -> class in `architectures`."""

ROPE_TYPES = ("default", "llama3")
CORRECTION_BIAS = ("glm4_moe", "deepseek_v3")
"""Those of them whose routers have a selection bias, e_score_correction_bias."""
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json")


def check_model_folder(config: ExperimentConfig) -> list[str]:
    """Problems of `model.path`, `model.tokenizer`, of the sizes that depend on the model, and of
    `algorithm.reference.path`."""
    path, tokenizer = config.model.path, config.model.tokenizer
    hf, problems = _model(path, "model.path")
    if hf is not None:
        problems += check_sizes(hf, path, config)
    if tokenizer is not None and not tokenizer.is_dir():
        problems.append(f"model.tokenizer={tokenizer}: no such folder, seen from {Path.cwd()}")
    elif path.is_dir() and not config.model.trust_remote_code:
        where = "model.path" if tokenizer is None else "model.tokenizer"
        problems += _tokenizer(tokenizer or path, where)
    if config.reference_path not in (None, path):
        problems += _model(config.reference_path, "algorithm.reference.path")[1]
    return problems


def check_model_config(config: ExperimentConfig, folder: Path) -> list[str]:
    """Problems of a model, and of the sizes that depend on it, whose config.json is in `folder`."""
    hf, problems = _config(folder, "--model-config")
    return problems if hf is None else [*check_sizes(hf, folder, config)]


def _model(path: Path, where: str) -> tuple[dict[str, Any] | None, list[str]]:
    """config.json, unless it is unreadable or not supported, and the problems of a folder."""
    if not path.is_dir():
        hint = f"; download it: hf download {path} --local-dir ..." if _is_hub_id(path) else ""
        return None, [f"{where}={path}: no such folder, seen from {Path.cwd()}{hint}"]
    hf, problems = _config(path, where)
    return hf, [*_weights(path, where), *problems]


def _config(path: Path, where: str) -> tuple[dict[str, Any] | None, list[str]]:
    """config.json, unless it is unreadable or not supported, and its problems."""
    try:
        hf = json.loads((path / "config.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return None, [f"{where}={path}: has no config.json; give a Hugging Face folder"]
    except (OSError, ValueError) as error:
        return None, [f"{path / 'config.json'}: cannot be read as JSON: {error}"]
    if not isinstance(hf, dict):
        return None, [f"{path / 'config.json'}: must be a JSON object"]
    unsupported = [*_architecture(hf, path, where)]  # its sizes would have other names
    return None if unsupported else hf, unsupported


def _is_hub_id(path: Path) -> bool:
    return len(path.parts) == 2 and not path.is_absolute() and path.parts[0] not in (".", "..", "~")


def _weights(path: Path, where: str) -> Iterator[str]:
    if any(path.glob("*.safetensors")):
        return
    if any(path.glob("*.bin")):
        yield (
            f"{where}={path}: has only PyTorch .bin weights, which are pickles and can run code "
            "when opened; save it with `model.save_pretrained(folder)`, which writes safetensors"
        )
    else:
        yield f"{where}={path}: has no *.safetensors files"


def _tokenizer(path: Path, where: str) -> Iterator[str]:
    if not any((path / name).is_file() for name in _TOKENIZER_FILES):
        yield (
            f"{where}={path}: has no tokenizer, expected one of {', '.join(_TOKENIZER_FILES)}; "
            "copy it there or set model.tokenizer"
        )


def _architecture(hf: dict[str, Any], path: Path, where: str) -> Iterator[str]:
    model_type, classes = hf.get("model_type"), hf.get("architectures")
    supported = ", ".join(ARCHITECTURES.values())
    if model_type not in ARCHITECTURES:
        yield f"{where}={path}: model_type {model_type!r} is not one of {supported}"
    elif classes and classes != [ARCHITECTURES[model_type]]:
        yield f"{where}={path}: architectures {classes} is not one of {supported}"
    if model_type == "deepseek_v3":
        for name, value in (("scoring_func", "sigmoid"), ("topk_method", "noaux_tc")):
            if hf.get(name) != value:
                yield (
                    f"{where}={path}: {name} of config.json must be {value!r}, got "
                    f"{hf.get(name)!r}; the trainer's router is that one, vLLM's is what it says"
                )
    if "quantization_config" in hf:
        hint = "use the bf16 checkpoint"
        if model_type == "gpt_oss":
            hint = "convert MXFP4 to bf16 first: megatron-cpgd convert, there and back"
        yield f"{where}={path}: quantised weights cannot be trained; {hint}"
    rope_type = _rope(hf).get("rope_type", _rope(hf).get("type", "default"))
    known = ("default", "yarn") if model_type in ("deepseek_v3", "gpt_oss") else ROPE_TYPES
    if rope_type not in known:
        yield (
            f"{where}={path}: rope_type {rope_type!r} is not one of {', '.join(known)}; "
            "remove the scaling from config.json if you stay below the original length"
        )


def _rope(hf: dict[str, Any]) -> dict[str, Any]:
    """transformers 4 writes rope_scaling, 5 writes rope_parameters; old files say `type`."""
    return hf.get("rope_parameters") or hf.get("rope_scaling") or {}


def check_sizes(hf: dict[str, Any], path: Path, config: ExperimentConfig) -> Iterator[str]:
    """Problems of settings that depend on the model.

    Args:
        hf: parsed config.json of a supported architecture, in the folder `path`.
    """
    names = ("num_attention_heads", "num_hidden_layers", "max_position_embeddings")
    bad = [name for name in names if not _is_size(hf.get(name))]
    if bad:
        for name in bad:
            yield f"{path / 'config.json'}: {name} must be a positive integer, got {hf.get(name)!r}"
        return
    heads = hf["num_attention_heads"]
    kv_heads = hf.get("num_key_value_heads") or heads  # absent: multi-head attention
    yield from _layout(config.parallel, heads, kv_heads, hf["num_hidden_layers"], path)
    cp, cached = config.parallel.cp, _rope(hf).get("original_max_position_embeddings")
    if hf["model_type"] == "deepseek_v3" and cp > 1 and cached and cached % (2 * cp):
        yield (
            f"parallel.cp={cp}: Megatron-Core cuts its table of {cached} rotations (of "
            f"{path}: original_max_position_embeddings) into 2 * cp equal parts; use a power of two"
        )
    yield from _experts(hf, path, config)
    yield from check_fp8_sizes(hf, path, config)
    prompt, response = config.data.max_prompt_tokens, config.rollout.max_response_tokens
    if prompt + response > hf["max_position_embeddings"]:
        yield (
            f"data.max_prompt_tokens={prompt} + rollout.max_response_tokens={response} = "
            f"{prompt + response} exceeds max_position_embeddings={hf['max_position_embeddings']} "
            f"of {path}; lower one of them"
        )


def _layout(
    sizes: ParallelConfig, heads: int, kv_heads: int, layers: int, path: Path
) -> Iterator[str]:
    tp, stages = sizes.tp, sizes.pp * sizes.vpp
    fitting = [n for n in range(1, kv_heads + 1) if kv_heads % n == 0 == heads % n]
    for name, count in (("num_attention_heads", heads), ("num_key_value_heads", kv_heads)):
        if count % tp:
            yield (
                f"parallel.tp={tp} does not divide {name}={count} of {path}; use {_choice(fitting)}"
            )
    if sizes.stage_layers is not None:
        if sum(sizes.stage_layers) != layers:
            yield (
                f"parallel.stage_layers={sizes.stage_layers} are {sum(sizes.stage_layers)} layers, "
                f"but num_hidden_layers={layers} of {path}"
            )
    elif layers % stages:
        fitting = [n for n in range(1, layers + 1) if layers % n == 0]
        yield (
            f"parallel.pp={sizes.pp} * vpp={sizes.vpp} = {stages} does not divide "
            f"num_hidden_layers={layers} of {path}; use a product of {_choice(fitting)}, or say "
            "in parallel.stage_layers how many each stage has"
        )


def _experts(hf: dict[str, Any], path: Path, config: ExperimentConfig) -> Iterator[str]:
    sizes = config.parallel
    experts = next((hf[name] for name in _EXPERT_COUNTS if name in hf), None)
    if experts is None:
        settings = {
            "parallel.ep": (sizes.ep, 1),
            "parallel.etp": (sizes.etp, 1),
            "algorithm.routing_replay": (config.algorithm.routing_replay, "none"),
            "router.aux_loss_coef": (config.router.aux_loss_coef, 0),
            "router.z_loss_coef": (config.router.z_loss_coef, 0),
            "router.bias_update_rate": (config.router.bias_update_rate, 0),
        }
        for name, (value, neutral) in settings.items():
            if value != neutral:
                yield f"{name}={value}: {path} has no experts; set {name}={neutral}"
        if (every := config.tracking.routing_every) is not None:
            yield (
                f"tracking.routing_every={every}: {path} has no experts, so no routes to measure; "
                "set tracking.routing_every=null"
            )
        return
    width: Any = hf.get("moe_intermediate_size", hf.get("intermediate_size"))
    shares = (("ep", sizes.ep, "experts", experts), ("etp", sizes.etp, "rows of an expert", width))
    for name, size, what, count in shares:
        if _is_size(count) and count % size:
            yield f"parallel.{name}={size} does not divide the {count} {what} of {path}"
    if sizes.tp > 1 and not sizes.sequence_parallel:
        yield (
            f"parallel.sequence_parallel=false: with tp={sizes.tp} the experts of {path} need it; "
            "set sequence_parallel=true or tp=1"
        )
    rate = config.router.bias_update_rate
    if rate > 0 and hf["model_type"] not in CORRECTION_BIAS:
        yield (
            f"router.bias_update_rate={rate}: the routers of {path} ({hf['model_type']}) have no "
            f"selection bias, as {' and '.join(CORRECTION_BIAS)} have; set it to 0 or use "
            "router.aux_loss_coef"
        )


def _choice(numbers: list[int]) -> str:
    *most, last = map(str, numbers)
    return f"{', '.join(most)} or {last}" if most else last


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value > 0
