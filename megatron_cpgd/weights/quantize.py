"""Weights in blocks of FP8, as DeepSeek-V3's checkpoints have them and vLLM reads them.

A weight `X.weight` [m, n] becomes float8_e4m3fn codes of the same name and shape, and a float32
factor for each block of 128 x 128, `X.weight_scale_inv` [ceil(m / 128), ceil(n / 128)]: the weight
is code * factor. Codes and factors are bit-equal to those of `per_block_cast_to_fp8` in
vllm/utils/deep_gemm.py.
"""

import math
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
FP8 = torch.float8_e4m3fn
FP8_MAX = 448.0
SMALLEST_MAXIMUM = 1e-4
"""A block whose largest number is below counts as if it had this one."""
SCALE_SUFFIX = "_scale_inv"

QUANTIZATION_CONFIG: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
"""`quantization_config` of a config.json whose checkpoint has such weights."""

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]
"""Number format and shape by HF name."""

_LINEAR = re.compile(r"model\.layers\.\d+\..*(_proj|_proj_with_mqa|\.w[123])\.weight")
"""The linear layers of all supported architectures. Embeddings, heads, norms, routers and biases
stay as they are, in vLLM as here."""


def is_quantized(name: str) -> bool:
    """Whether the tensor of this HF name goes to the engine in FP8."""
    return _LINEAR.fullmatch(name) is not None


def scale_shape(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Blocks along each dimension of a weight."""
    return tuple(math.ceil(size / BLOCK) for size in shape)


def quantized_tensors(tensors: Tensors) -> Tensors:
    """What a checkpoint holds once its linear layers are quantised."""
    result: Tensors = {}
    for name, (dtype, shape) in tensors.items():
        quantized = is_quantized(name)
        result[name] = (FP8 if quantized else dtype, shape)
        if quantized:
            result[f"{name}{SCALE_SUFFIX}"] = (torch.float32, scale_shape(shape))
    return result


def quantize(weight: Tensor, codes: Tensor, scales: Tensor, *, device: torch.device) -> None:
    """Fill codes and factors of one weight in place.

    Works on 128 rows at a time: temporaries stay small, and in the cache, whatever the weight.

    Args:
        weight: [m, n] bfloat16; from float32, quantising twice might differ from once.
        codes: [m, n] float8_e4m3fn.
        scales: [ceil(m / 128), ceil(n / 128)] float32.
        device: computes.
    """
    for block in range(len(scales)):
        rows = slice(block * BLOCK, (block + 1) * BLOCK)
        band_codes, scale = _quantize_band(weight[rows].to(device))
        codes[rows].copy_(band_codes)
        scales[block].copy_(scale)


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """[m, n] float32, the numbers that codes and factors stand for."""
    rows, columns = codes.shape
    factors = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.float() * factors


def _quantize_band(band: Tensor) -> tuple[Tensor, Tensor]:
    """Codes [rows, n] and factors [ceil(n / 128)] of at most 128 rows."""
    columns = band.size(1)
    blocks = F.pad(band, (0, -columns % BLOCK)).float().unflatten(1, (-1, BLOCK))
    scales = blocks.abs().amax(dim=0).amax(dim=-1).clamp(SMALLEST_MAXIMUM) / FP8_MAX
    codes = (blocks * (1.0 / scales)[:, None]).to(FP8).flatten(1)[:, :columns]
    return codes, scales
