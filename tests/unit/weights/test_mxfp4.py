"""MXFP4 against the format's definition and transformers' own reading of it, bit by bit."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers.integrations.mxfp4 import convert_moe_packed_tensors

from megatron_cpgd.errors import ConversionError
from megatron_cpgd.weights.hf_checkpoint import SINGLE_FILE, HfCheckpoint
from megatron_cpgd.weights.mxfp4 import dequantize

NAME = "model.layers.0.mlp.experts.down_proj"


def same_bits(left: Tensor, right: Tensor) -> bool:
    """Equal, -0 other than 0, NaN like NaN."""
    assert left.dtype == right.dtype == torch.bfloat16 and left.shape == right.shape
    nan = left.isnan() & right.isnan()
    return bool((nan | (left.view(torch.int16) == right.view(torch.int16))).all())


def random_parts(*shape: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(2)
    blocks = torch.randint(256, (*shape, 16), generator=generator, dtype=torch.uint8)
    return blocks, torch.randint(256, shape, generator=generator, dtype=torch.uint8)


def save_quantized(folder: Path, blocks: Tensor, scales: Tensor) -> None:
    (folder / "config.json").write_text(json.dumps({"model_type": "gpt_oss"}))
    parts = {f"{NAME}_blocks": blocks, f"{NAME}_scales": scales}
    save_file(parts | {"norm": torch.ones(3)}, folder / SINGLE_FILE)


def test_the_low_half_of_a_byte_comes_first_and_scales_are_powers_of_two() -> None:
    # 0x92 holds code 2 = 1.0 and code 9 = -0.5; exponent 128 - 127 doubles.
    blocks = torch.zeros(1, 16, dtype=torch.uint8)
    blocks[0, 0] = 0x92
    values = dequantize(blocks, torch.tensor([128], dtype=torch.uint8))
    assert values.tolist() == [2.0, -1.0] + [0.0] * 30


def test_every_code_with_every_scale_is_what_transformers_makes_of_it() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    blocks = (codes | codes.flip(0) << 4).expand(1, 1, 256, 16)
    scales = torch.arange(256, dtype=torch.uint8)[None, None]
    expected = convert_moe_packed_tensors(blocks, scales)
    assert same_bits(dequantize(blocks, scales).mT, expected)


# A rank's cut of the columns may begin and end inside of a group of 32.
@pytest.mark.parametrize("columns", [slice(0, 96), slice(32, 64), slice(40, 70), slice(90, 96)])
@pytest.mark.parametrize("rows", [slice(0, 10, 1), slice(1, 11, 2), slice(2, 6, 2)])
def test_slices_are_those_of_the_whole_tensor(tmp_path: Path, columns: slice, rows: slice) -> None:
    blocks, scales = random_parts(3, 10, 3)
    save_quantized(tmp_path, blocks, scales)
    expected = convert_moe_packed_tensors(blocks, scales)
    with HfCheckpoint.open(tmp_path) as checkpoint:
        assert sorted(checkpoint.names) == [NAME, "norm"]
        assert checkpoint.shape(NAME) == tuple(expected.shape) == (3, 96, 10)
        assert checkpoint.dtype(NAME) is torch.bfloat16
        part = checkpoint.read(NAME, (2, columns, rows))
    assert same_bits(part, expected[2, columns, rows])


def test_parts_that_do_not_fit_are_named(tmp_path: Path) -> None:
    blocks, scales = random_parts(3, 10, 3)
    save_quantized(tmp_path, blocks, scales[:2])
    message = rf"{NAME}_blocks: expected .* has \[2, 10, 3\], file has torch.uint8 \[3, 10, 3, 16\]"
    with pytest.raises(ConversionError, match=message):
        HfCheckpoint.open(tmp_path)
