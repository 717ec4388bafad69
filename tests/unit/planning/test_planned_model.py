"""Parameters, FLOPs and cache of public models, against published and hand-worked numbers."""

import pytest
import yaml

from megatron_cpgd.planning.layout import Layout
from megatron_cpgd.planning.state import read_elements
from tests.helpers.planning import MODELS, public_model

PUBLISHED: dict[str, int] = yaml.safe_load((MODELS / "parameters.yaml").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_parameters_are_those_of_the_published_checkpoint(name: str) -> None:
    model = public_model(name)
    decoder = model.decoder
    # The selection bias of a router is in the checkpoint, but it is not trained.
    corrected = decoder.experts is not None and decoder.experts.score_correction
    biases = len(decoder.moe_layers) * decoder.experts.count if corrected else 0
    assert model.parameters + biases == PUBLISHED[name]


def test_flops_of_a_dense_model_are_six_per_matrix_element_and_token_and_attention() -> None:
    # Qwen3-8B: q and o 4096^2, k and v 4096 * 1024, three MLP matrices 4096 * 12288, 36 layers;
    # the head 151936 * 4096. Attention: 32 heads * (128 + 128) * length per layer.
    matrices = 36 * (2 * 4096**2 + 2 * 4096 * 1024 + 3 * 4096 * 12288) + 151_936 * 4096
    attention = 36 * 32 * 256 * 2048
    model = public_model("Qwen3-8B")
    assert model.active_parameters == matrices == 7_568_097_280
    assert model.train_flops(10, 2048) == 10 * (6 * matrices + 3 * attention)


def test_of_a_mixture_only_the_chosen_experts_count() -> None:
    # Qwen3-30B-A3B: 48 layers with q 2048 * 4096 twice, k and v 2048 * 512, router 2048 * 128 and
    # 8 of 128 experts of three matrices 2048 * 768; head 151936 * 2048. "A3B".
    layer = 2 * 2048 * 4096 + 2 * 2048 * 512 + 2048 * 128 + 8 * 3 * 2048 * 768
    assert public_model("Qwen3-30B-A3B").active_parameters == 48 * layer + 151_936 * 2048


def test_deepseek_v3_has_37_billion_active_parameters() -> None:
    # arXiv:2412.19437 counts the embedding too.
    model = public_model("DeepSeek-V3")
    assert (model.active_parameters + model.vocab_matrix) / 1e9 == pytest.approx(37.6, abs=0.1)


def test_the_cache_holds_keys_and_values_or_the_compressed_form() -> None:
    # 2 * 36 layers * 8 heads * 128 * 2 bytes; heads are cut over the ranks, but none below one.
    assert public_model("Qwen3-8B").kv_bytes(1, 2) == 147_456
    assert public_model("Qwen3-8B").kv_bytes(16, 2) == 147_456 / 8
    # 61 layers * (512 + 64) * 2 bytes, on every rank.
    assert public_model("DeepSeek-V3").kv_bytes(32, 2) == 70_272


def test_stages_take_interleaved_blocks_of_layers() -> None:
    layout = Layout(pp=2, vpp=2)
    assert [list(chunk.layers) for chunk in layout.stage(1, 8)] == [[2, 3], [6, 7]]
    first, second = layout.stage(0, 8)
    assert first.embedding and not second.embedding
    assert layout.stage(1, 8)[1].head


def test_unequal_stages_have_the_layers_they_are_given() -> None:
    layout = Layout(pp=3, stage_layers=(1, 3, 1))
    assert [list(layout.stage(s, 5)[0].layers) for s in range(3)] == [[0], [1, 2, 3], [4]]


def test_earlier_stages_keep_more_micro_batches() -> None:
    assert [Layout(pp=4).in_flight(s) for s in range(4)] == [4, 3, 2, 1]
    # Interleaved, 4 stages of 2 chunks: stage 0 warms up with 4 + 6 chunk passes and keeps one
    # more; its 8 chunks of a round bound that: 8 / 2 micro-batches.
    assert Layout(pp=4, vpp=2).in_flight(0) == 4
    assert Layout(pp=4, vpp=2).in_flight(3) == 5 / 2


def test_a_rank_reads_whole_pages_of_matrices_that_are_cut_by_columns() -> None:
    # Qwen3-8B, tp 2: of o 4096^2 and of the last 4096 * 12288 of an MLP all, of the rest of the
    # layer and of embedding and head a half.
    model = public_model("Qwen3-8B")
    halves = (4096**2 + 2 * 1024 * 4096 + 2 * 12288 * 4096) // 2
    layer = 4096**2 + 4096 * 12288 + halves + 2 * 4096 + 2 * 128
    ends = 2 * 151_936 // 2 * 4096 + 4096
    assert read_elements(model, Layout(tp=2), 0) == 36 * layer + ends
    assert read_elements(model, Layout(), 0) == model.parameters
