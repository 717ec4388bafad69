"""From a checkpoint's config.json to its weight table."""

from collections.abc import Callable

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.architectures import (
    HfConfig,
    deepseek_v3,
    glm4_moe,
    gpt_oss,
    llama,
    mixtral,
    qwen2,
    qwen3,
    qwen3_moe,
)
from megatron_cpgd.weights.decoder import Decoder
from megatron_cpgd.weights.decoder_table import decoder_table
from megatron_cpgd.weights.table import WeightTable

ARCHITECTURES: dict[str, Callable[[HfConfig], Decoder]] = {
    "deepseek_v3": deepseek_v3,
    "glm4_moe": glm4_moe,
    "gpt_oss": gpt_oss,
    "llama": llama,
    "mixtral": mixtral,
    "qwen2": qwen2,
    "qwen3": qwen3,
    "qwen3_moe": qwen3_moe,
}
"""By `model_type` of config.json."""


def weight_table(hf_config: HfConfig) -> WeightTable:
    """The table of a model; arguments and errors as `read_decoder`."""
    return decoder_table(read_decoder(hf_config))


def read_decoder(hf_config: HfConfig) -> Decoder:
    """Names and shapes of a model.

    Args:
        hf_config: its config.json as a plain dict, as transformers 5 writes it.

    Raises:
        ConversionError: the architecture or one of its options is not supported.
    """
    model_type = hf_config.get("model_type")
    if model_type not in ARCHITECTURES:
        raise ConversionError(
            f"config.json: model_type={model_type!r} is not supported; supported are "
            f"{', '.join(sorted(ARCHITECTURES))}"
        )
    quantization = hf_config.get("quantization_config") or {}
    readable = model_type == "gpt_oss" and quantization.get("quant_method") == "mxfp4"
    if quantization and not readable:
        raise ConversionError(
            "config.json: quantization_config is set; quantised checkpoints are not supported, "
            "use the bfloat16 release of the model"
        )
    return ARCHITECTURES[model_type](hf_config)
