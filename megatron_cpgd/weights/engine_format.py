"""The number formats in which engines take the weights."""

from typing import Literal

import torch

from megatron_cpgd.weights.quantize import Tensors, quantized_tensors
from megatron_cpgd.weights.table import WeightTable

type EngineFormat = Literal["bf16", "fp32", "fp8_block"]


def engine_tensors(table: WeightTable, format: EngineFormat) -> Tensors:
    """Number format and shape of every tensor that an engine loads, by HF name."""
    tensors = table.hf_tensors(torch.float32 if format == "fp32" else torch.bfloat16)
    return quantized_tensors(tensors) if format == "fp8_block" else tensors
