"""MXFP4 weights as bfloat16 numbers: 32 4-bit floats share a power of two.

The format of the released gpt-oss files; OCP Microscaling Formats (MX) v1.0, sections 5.3.3, 5.4.1.
"""

from functools import cache

import torch
from torch import Tensor

GROUP = 32
"""Numbers that share a scale, and lie in 16 bytes, the first one in the low half of its byte."""
_MAGNITUDES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


def dequantize(blocks: Tensor, scales: Tensor) -> Tensor:
    """[..., groups * 32] bfloat16; exact, but for numbers beyond the range of bfloat16.

    Args:
        blocks: [..., groups, 16] uint8.
        scales: [..., groups] uint8, exponents with a bias of 127.
    """
    index = scales.int()[..., None] << 8 | blocks
    pairs = _pairs().index_select(0, index.flatten()).view(index.shape)
    return pairs.view(torch.bfloat16).flatten(-2)


@cache
def _pairs() -> Tensor:
    """[scale * 256 + byte] the two bfloat16 numbers of a byte, seen as one int32."""
    values = torch.tensor([*_MAGNITUDES, *(-value for value in _MAGNITUDES)], dtype=torch.float64)
    exponents = torch.arange(256)[:, None] - 127
    scaled = torch.ldexp(values.expand(256, 16), exponents).bfloat16()
    byte = torch.arange(256)
    pairs = torch.stack([scaled[:, byte & 15], scaled[:, byte >> 4]], dim=-1)
    return pairs.view(torch.int32).flatten()
