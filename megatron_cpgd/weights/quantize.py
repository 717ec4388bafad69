"""Weights in blocks of FP8, as DeepSeek-V3's checkpoints have them and vLLM reads them.

A weight `X.weight` [m, n] becomes float8_e4m3fn codes of the same name and shape, and a float32
factor for each block of 128 x 128, `X.weight_scale_inv` [ceil(m / 128), ceil(n / 128)]: the weight
is code * factor. Codes and factors are bit-equal to those of `per_block_cast_to_fp8` in
vllm/utils/deep_gemm.py.
"""

import math
import re
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from megatron_cpgd.weights.tiling import Index, span

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
        band = weight[rows].to(device)
        scale = block_scales(_band_maxima(band))
        codes[rows].copy_(_band_codes(band, scale))
        scales[block].copy_(scale)


def raise_maxima(maxima: Tensor, part: Tensor, place: Index) -> None:
    """Let the largest magnitudes of a weight's blocks be at least those of one part, in place.

    Blocks that several parts share get their largest number from all of them: whatever the cut, the
    factors are those of the whole.

    Args:
        maxima: [ceil(m / 128), ceil(n / 128)] float32, of the whole weight.
        part: [rows, columns] bfloat16.
        place: of the part in the weight.
    """
    columns, offset = _block_columns(place)
    for block, rows in _bands(place):
        own = maxima[block, columns]
        torch.maximum(own, _band_maxima(part[rows], offset), out=own)


def block_scales(maxima: Tensor) -> Tensor:
    """Factors of blocks by their largest magnitudes."""
    scales: Tensor = maxima.clamp(SMALLEST_MAXIMUM) / FP8_MAX
    return scales


def quantize_part(part: Tensor, place: Index, scales: Tensor) -> Tensor:
    """[rows, columns] codes of one part of a weight; arguments as in `raise_maxima`."""
    codes = torch.empty(part.shape, dtype=FP8, device=part.device)
    columns, offset = _block_columns(place)
    for block, rows in _bands(place):
        codes[rows].copy_(_band_codes(part[rows], scales[block, columns], offset))
    return codes


def own_blocks(place: Index) -> Index:
    """The blocks that begin in a part: of all parts together each one once."""
    return tuple(slice(-(-own.start // BLOCK), -(-own.stop // BLOCK)) for own in map(span, place))


def dequantize(codes: Tensor, scales: Tensor) -> Tensor:
    """[m, n] float32, the numbers that codes and factors stand for."""
    rows, columns = codes.shape
    factors = scales.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    return codes.float() * factors


def _bands(place: Index) -> Iterator[tuple[int, slice]]:
    """Every row of blocks that a part reaches into, and the rows of the part in it."""
    rows = span(place[0])
    assert rows.step == 1, f"rows in turns have no blocks: {place}"
    for block in range(rows.start // BLOCK, -(-rows.stop // BLOCK)):
        first = max(block * BLOCK, rows.start)
        yield block, slice(first - rows.start, min((block + 1) * BLOCK, rows.stop) - rows.start)


def _block_columns(place: Index) -> tuple[slice, int]:
    """Columns of blocks that a part reaches into, and where in the first of them it begins."""
    columns = span(place[1])
    return slice(columns.start // BLOCK, -(-columns.stop // BLOCK)), columns.start % BLOCK


def _band_maxima(band: Tensor, offset: int = 0) -> Tensor:
    """Largest magnitude of each block in at most 128 rows."""
    return _band_blocks(band, offset).abs().amax(dim=0).amax(dim=-1)


def _band_codes(band: Tensor, scales: Tensor, offset: int = 0) -> Tensor:
    codes = (_band_blocks(band, offset) * (1.0 / scales)[:, None]).to(FP8)
    return codes.flatten(1)[:, offset : offset + band.size(1)]


def _band_blocks(band: Tensor, offset: int) -> Tensor:
    """[rows, blocks, 128] float32 of columns that begin in the middle of a block."""
    padded = F.pad(band, (offset, -(offset + band.size(1)) % BLOCK))
    blocks: Tensor = padded.float().unflatten(1, (-1, BLOCK))
    return blocks
