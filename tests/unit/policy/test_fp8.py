"""FP8 training on a machine without a GPU: what is refused, and what Megatron-Core is told."""

import os

import pytest
import torch

import megatron_cpgd.policy  # noqa: F401  before anything imports megatron

from megatron.core.enums import Fp8Recipe  # isort: skip
from megatron.core.fp8_utils import get_fp8_align_size  # isort: skip

from megatron_cpgd.config.fp8_checks import FP8_MULTIPLES
from megatron_cpgd.config.schema import PrecisionConfig
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.policy.fp8 import fp8_fields, hardware_problem, require_fp8, set_environment
from megatron_cpgd.policy.parallel import ParallelInfo

ADA, HOPPER, BLACKWELL, RTX_50 = (8, 9), (9, 0), (10, 0), (12, 0)


@pytest.mark.parametrize(
    ("recipe", "capability", "cuda", "problem"),
    [
        ("delayed", ADA, (12, 4), None),
        ("tensorwise", (8, 0), (13, 0), "8.9 (L40, H100), this GPU has compute capability 8.0"),
        ("blockwise", HOPPER, (12, 9), None),
        ("blockwise", HOPPER, (13, 0), None),
        ("blockwise", HOPPER, (12, 8), "need CUDA 12.9, torch was built for 12.8"),
        ("blockwise", ADA, (13, 0), "need compute capability 9.0 (H100), this GPU has compute"),
        ("mxfp8", BLACKWELL, (13, 0), None),
        ("mxfp8", HOPPER, (13, 0), "10.x or 11.x (B200), this GPU has compute capability 9.0"),
        ("mxfp8", RTX_50, (13, 0), "10.x or 11.x (B200), this GPU has compute capability 12.0"),
    ],
)
def test_each_recipe_names_the_gpu_that_it_needs(recipe, capability, cuda, problem):
    found = hardware_problem(recipe, capability, cuda)
    assert (found is None) == (problem is None)
    assert problem is None or problem in found


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
@pytest.mark.parametrize("train", ["fp8_blockwise", "fp8_tensorwise", "fp8_delayed", "mxfp8"])
def test_fp8_training_without_a_gpu_is_refused(train):
    with pytest.raises(ConfigError, match=f"precision.train={train}: FP8 training needs a GPU"):
        require_fp8(PrecisionConfig(train=train))


def test_bf16_needs_nothing():
    require_fp8(PrecisionConfig())
    assert fp8_fields(PrecisionConfig()) == {}


def test_megatron_is_told_the_recipe_and_the_layers_that_stay_in_bf16():
    precision = PrecisionConfig(train="fp8_tensorwise", fp8_format="hybrid", bf16_layers=2)
    assert fp8_fields(precision) == {
        "fp8": "hybrid",
        "fp8_recipe": "tensorwise",
        "first_last_layers_bf16": True,
        "num_layers_at_start_in_bf16": 2,
        "num_layers_at_end_in_bf16": 2,
    }


@pytest.mark.parametrize("recipe", FP8_MULTIPLES)
def test_tokens_are_padded_as_megatron_aligns_them(recipe):
    assert get_fp8_align_size(Fp8Recipe(recipe)) == FP8_MULTIPLES[recipe]


@pytest.mark.parametrize(
    ("capability", "given", "expected"),
    [(HOPPER, None, "1"), (HOPPER, "0", "0"), (BLACKWELL, None, None)],
)
def test_blocks_take_any_factor_unless_the_gpu_or_the_user_says_otherwise(
    monkeypatch, capability, given, expected
):
    name = "NVTE_FP8_BLOCK_SCALING_FP32_SCALES"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setenv(name, given or "")  # so that the end of the test restores what there was
    if given is None:
        monkeypatch.delenv(name)
    set_environment()
    assert os.environ.get(name) == expected


@pytest.mark.parametrize(
    ("tp", "cp", "sequence_parallel", "tokens"),
    [
        (1, 1, False, 16),
        (2, 1, False, 16),  # both ranks have every token
        (2, 1, True, 32),  # 16 on each
        (1, 2, False, 32),  # 16 on each, in two halves of 8
        (4, 2, True, 128),
    ],
)
def test_each_rank_gets_a_multiple_of_the_tokens_that_fp8_needs(tp, cp, sequence_parallel, tokens):
    sizes = {"tp": tp, "cp": cp, "pp": 1, "dp": 1, "ep": 1, "etp": 1}
    info = ParallelInfo(
        rank=0,
        world_size=tp * cp,
        vpp_size=1,
        **{f"{axis}_size": size for axis, size in sizes.items()},
        **{f"{axis}_rank": 0 for axis in sizes},
        sequence_parallel=sequence_parallel,
        hosts=(),
    )
    assert info.total_multiple(16) == tokens
