"""FP8 blocks: against the definition, block by block; e2e/inside_engine_process.py against vLLM."""

from itertools import pairwise, product

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from megatron_cpgd.weights.quantize import (
    BLOCK,
    FP8,
    block_scales,
    dequantize,
    is_quantized,
    own_blocks,
    quantize,
    quantize_part,
    quantized_tensors,
    raise_maxima,
    scale_shape,
)
from megatron_cpgd.weights.registry import weight_table
from tests.helpers.tiny import ARCHITECTURES, SIZES

CPU = torch.device("cpu")

weights = st.builds(
    lambda rows, columns, seed, exponent, zeros: _weight(rows, columns, seed, exponent, zeros),
    rows=st.integers(1, 300),
    columns=st.integers(1, 300),
    seed=st.integers(0, 2**31),
    exponent=st.integers(-40, 38),
    zeros=st.booleans(),
)


def _weight(rows: int, columns: int, seed: int, exponent: int, zeros: bool) -> torch.Tensor:
    """Normal numbers times a power of 10 that differs by block, some blocks 0."""
    generator = torch.Generator().manual_seed(seed)
    blocks = scale_shape((rows, columns))
    factor = 10.0 ** torch.randint(exponent - 3, exponent + 1, blocks, generator=generator).float()
    if zeros:
        factor *= torch.randint(2, blocks, generator=generator)
    grown = factor.repeat_interleave(BLOCK, 0)[:rows].repeat_interleave(BLOCK, 1)[:, :columns]
    normal = torch.randn(rows, columns, generator=generator).clamp(-3, 3)
    return (normal * grown).bfloat16()


def quantized(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    codes = torch.empty(weight.shape, dtype=FP8)
    scales = torch.empty(scale_shape(tuple(weight.shape)))
    quantize(weight, codes, scales, device=CPU)
    return codes, scales


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@given(weights)
def test_codes_and_factors_follow_the_definition_in_every_block(weight):
    codes, scales = quantized(weight)
    assert scales.shape == scale_shape(tuple(weight.shape))
    for i in range(scales.size(0)):
        for j in range(scales.size(1)):
            own = (slice(i * BLOCK, (i + 1) * BLOCK), slice(j * BLOCK, (j + 1) * BLOCK))
            block = weight[own].float()
            scale = torch.tensor(max(block.abs().max().item(), 1e-4)) / 448
            assert scales[i, j] == scale
            assert same_bits(codes[own].contiguous(), (block * (1 / scale)).to(FP8))


@given(weights)
def test_the_error_is_at_most_half_a_step_of_the_largest_codes(weight):
    # The largest codes, 256 to 448, are 32 apart.
    codes, scales = quantized(weight)
    step = dequantize(torch.full(weight.shape, 32.0).to(FP8), scales)
    error = (dequantize(codes, scales) - weight.float()).abs()
    assert (error <= step * 0.5001).all()


@given(weights)
def test_quantising_what_was_quantised_changes_no_code(weight):
    codes, scales = quantized(weight)
    again, _ = quantized(dequantize(codes, scales).bfloat16())
    assert same_bits(codes, again)


def test_a_block_worked_by_hand():
    # Largest number 7: factor 7 / 448 = 1/64, a power of two, so that small integers are exact.
    weight = torch.tensor([[7.0, -3.5, 0.0], [1.0, 0.25, -7.0]]).bfloat16()
    codes, scales = quantized(weight)
    assert scales.tolist() == [[1 / 64]]
    assert codes.float().tolist() == [[448, -224, 0], [64, 16, -448]]
    assert dequantize(codes, scales).tolist() == weight.tolist()


def test_a_block_of_zeros_has_a_factor_that_is_not_zero():
    codes, scales = quantized(torch.zeros(130, 5).bfloat16())
    assert (codes.float() == 0).all()
    assert scales.tolist() == [[pytest.approx(1e-4 / 448)]] * 2


@st.composite
def cut_weights(draw):
    """A weight and where it is cut along rows and columns."""
    weight = draw(weights)
    cuts = [sorted({0, size, *draw(st.lists(st.integers(1, size)))}) for size in weight.shape]
    return weight, [[slice(a, b) for a, b in pairwise(ends)] for ends in cuts]


@given(cut_weights())
def test_parts_that_know_the_largest_numbers_of_all_make_the_codes_of_the_whole(case):
    weight, cuts = case
    codes, scales = quantized(weight)
    places = list(product(*cuts))
    maxima = torch.zeros(scales.shape)
    for place in places:
        raise_maxima(maxima, weight[place], place)
    factors = block_scales(maxima)
    assert factors.equal(scales)
    for place in places:
        assert same_bits(quantize_part(weight[place], place, factors), codes[place].contiguous())
    owned = torch.zeros(scales.shape)
    for place in places:
        owned[own_blocks(place)] += 1
    assert (owned == 1).all()


def test_the_names_are_those_of_the_public_fp8_checkpoints():
    tensors = {
        "model.layers.3.mlp.up_proj.weight": (torch.bfloat16, (300, 128)),
        "model.layers.3.self_attn.q_proj.bias": (torch.bfloat16, (300,)),
    }
    assert quantized_tensors(tensors) == {
        "model.layers.3.mlp.up_proj.weight": (FP8, (300, 128)),
        "model.layers.3.mlp.up_proj.weight_scale_inv": (torch.float32, (3, 1)),
        "model.layers.3.self_attn.q_proj.bias": (torch.bfloat16, (300,)),
    }


# gpt-oss is refused with FP8: one tensor holds all of its experts.
@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES.keys() - {"gpt_oss"}))
def test_matrices_of_layers_are_quantised_but_for_routers(architecture):
    config_class, _, extra = ARCHITECTURES[architecture]
    table = weight_table(config_class(**{**SIZES, **extra}).to_dict())
    routers = {e.segments[0].hf for e in table.entries if "router" in e.name}
    outside = {e.segments[0].hf for e in table.entries if "layers" not in e.name}
    expected = {
        name
        for name, shape in table.hf_shapes.items()
        if len(shape) == 2 and name not in routers | outside
    }
    assert {name for name in table.hf_shapes if is_quantized(name)} == expected
    assert expected
