import json

import pytest
import torch
from safetensors.torch import save_file

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.expected_tensors import ExpectedTensors, checkpoint_tensors

FP8 = torch.float8_e4m3fn


def bf16(**shapes):
    return {name: (torch.bfloat16, shape) for name, shape in shapes.items()}


# The checkpoint holds a tied output layer that the engine does not read.
EXPECTED = ExpectedTensors(bf16(embed=(8, 4), q=(4, 4), lm_head=(8, 4)), {"embed", "q"})


def test_an_arena_without_the_tied_output_layer_is_complete():
    EXPECTED.check(bf16(embed=(8, 4), q=(4, 4)))


def test_an_arena_with_all_of_the_checkpoint_is_complete():
    EXPECTED.check(bf16(embed=(8, 4), q=(4, 4), lm_head=(8, 4)))


def test_a_missing_tensor_is_named():
    with pytest.raises(WeightSyncError, match=r"has 1 tensors, .* reads 2: missing \['q'\]"):
        EXPECTED.check(bf16(embed=(8, 4)))


def test_an_unknown_tensor_is_named():
    with pytest.raises(WeightSyncError, match=r"missing \[\], unknown \['k'\]"):
        EXPECTED.check(bf16(embed=(8, 4), q=(4, 4), k=(4, 4)))


def test_a_wrong_shape_is_named():
    with pytest.raises(WeightSyncError, match=r"q: expected \[4, 4\], the arena has \[4, 5\]"):
        EXPECTED.check(bf16(embed=(8, 4), q=(4, 5)))


def test_another_number_format_is_converted():
    EXPECTED.check(bf16(embed=(8, 4)) | {"q": (torch.float32, (4, 4))})


def test_codes_of_fp8_are_never_taken_for_numbers():
    with pytest.raises(WeightSyncError, match=r"q: expected torch.bfloat16, the arena has .*e4m3"):
        EXPECTED.check(bf16(embed=(8, 4)) | {"q": (FP8, (4, 4))})
    with pytest.raises(WeightSyncError, match=r"q: expected .*e4m3fn, the arena has torch.bfloat"):
        ExpectedTensors({"q": (FP8, (4, 4))}, {"q"}).check(bf16(q=(4, 4)))


def test_long_lists_are_cut():
    with pytest.raises(WeightSyncError, match="'n4'] and 3 more"):
        ExpectedTensors({}, set()).check(bf16(**{f"n{i}": (1,) for i in range(8)}))


def test_shapes_come_from_the_files_that_the_index_names(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model-1.safetensors")
    save_file({"b": torch.zeros(4)}, tmp_path / "model-2.safetensors")
    save_file({"old": torch.zeros(1)}, tmp_path / "consolidated.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert checkpoint_tensors(tmp_path) == {
        "a": (torch.float32, (2, 3)),
        "b": (torch.float32, (4,)),
    }


def test_shapes_of_a_checkpoint_in_one_file(tmp_path):
    save_file({"a": torch.zeros(2, 3)}, tmp_path / "model.safetensors")
    assert checkpoint_tensors(tmp_path) == {"a": (torch.float32, (2, 3))}
