"""vLLM with a mixture of experts: its weights after a refresh, and the routes that it returns.

The engine prefills in chunks of 64 tokens and caches prefixes. Seeds do not work with chunks on
CPU, so responses are checked as they come.
"""

from dataclasses import replace

import pytest

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import Sampling
from tests.helpers.engines import (
    PROMPTS,
    SAMPLING,
    TOLERANCE,
    VOCAB,
    count_differing,
    differing_entries,
    logprob_error,
    named_weights,
    start_engine,
    start_lab,
    write_arena,
)
from tests.helpers.tiny_moe_engine import (
    MOE_LAYERS,
    NUM_EXPERTS,
    TOP_K,
    moe_config,
    router_choices,
)

ENGINE_ARGS = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 32}
CHUNKED = ENGINE_ARGS | {"enable_chunked_prefill": True, "max_num_batched_tokens": 64}
ROUTED = Sampling(n=3, max_tokens=20, return_routes=True)
LONG = [[(7 * i + j) % VOCAB for i in range(200)] for j in range(3)]
"""Longer than a chunk, and than the 128 tokens of a cached block."""


@pytest.fixture(scope="module")
def engine_lab(tmp_path_factory):
    directory = tmp_path_factory.mktemp("moe")
    lab = start_lab(directory, moe_config(), engine_args=CHUNKED, return_routes=True)
    try:
        lab.cold = lab.generate(replace(SAMPLING, return_routes=True))
        yield lab
    finally:
        lab.engine.close()


@pytest.fixture
def lab(engine_lab):
    """The engine with weights A."""
    engine_lab.publish("A")
    return engine_lab


def test_routes_of_prompts_and_responses_are_those_of_transformers(engine_lab):
    wrong, total = differing_entries(engine_lab.models["A"], PROMPTS, engine_lab.cold)
    # 4 prompts of 16 tokens, each twice, with 12 sampled tokens, the last of which has no row.
    assert (wrong, total) == (0, 2 * (16 + 4 * 11) * len(MOE_LAYERS))
    layout = engine_lab.cold[0][0].routes.layout
    assert (layout.layers, layout.top_k, layout.num_experts) == (MOE_LAYERS, TOP_K, NUM_EXPERTS)


def test_the_comparison_sees_a_shifted_row_and_a_shifted_layer(engine_lab):
    tokens = PROMPTS[2] + engine_lab.cold[2][0].token_ids
    routes = engine_lab.cold[2][0].routes.tensor()
    expected = router_choices(engine_lab.models["A"], tokens)
    assert count_differing(routes, expected) == 0
    for axis in (0, 1):
        assert count_differing(routes.roll(1, axis), expected) > 0.5 * expected[..., 0].numel()


def test_refreshed_experts_and_routers_have_the_logprobs_and_routes_of_transformers(lab):
    lab.publish("B")
    groups = lab.generate(ROUTED)
    assert logprob_error(lab.models["B"], PROMPTS, groups) < TOLERANCE
    assert logprob_error(lab.models["A"], PROMPTS, groups) > 0.1
    wrong, total = differing_entries(lab.models["B"], PROMPTS, groups)
    assert (wrong, total) == (0, 3 * (16 + 4 * 19) * len(MOE_LAYERS))
    wrong, _ = differing_entries(lab.models["A"], PROMPTS, groups)
    assert wrong > 0.5 * total


def test_refresh_there_and_back_equals_the_cold_start_bit_by_bit(lab):
    lab.publish("B")
    lab.publish("A")
    groups = lab.generate(replace(SAMPLING, return_routes=True))
    assert [[r.logprobs for r in g] for g in groups] == [[r.logprobs for r in g] for g in lab.cold]
    assert [[r.routes for r in g] for g in groups] == [[r.routes for r in g] for g in lab.cold]


@pytest.mark.parametrize("which", ["A", "B"])
def test_routes_are_right_with_prompts_in_chunks_and_from_the_prefix_cache(lab, which):
    lab.publish(which)
    for _ in range(2):  # the second time the first 128 tokens come from the cache
        groups = lab.generate(ROUTED, LONG)
        wrong, total = differing_entries(lab.models[which], LONG, groups)
        assert (wrong, total) == (0, 3 * 3 * (200 + 19) * len(MOE_LAYERS))


def test_a_response_of_one_token_has_the_routes_of_its_prompt(lab):
    groups = lab.generate(Sampling(max_tokens=1, return_routes=True))
    assert differing_entries(lab.models["A"], PROMPTS, groups) == (0, 16 * len(MOE_LAYERS))


def test_only_who_asks_gets_routes(lab):
    assert {rollout.routes for group in lab.generate() for rollout in group} == {None}


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.2.mlp.experts.5.up_proj.weight",
        "model.layers.3.mlp.experts.0.down_proj.weight",
        "model.layers.0.mlp.gate.weight",
    ],
)
def test_a_missing_tensor_of_an_expert_or_a_router_is_named(lab, tmp_path, name):
    weights = named_weights(lab.models["B"])
    del weights[name]
    with pytest.raises(WeightSyncError, match=rf"missing \['{name}'\]"):
        lab.engine.refresh(write_arena(tmp_path / "arena", weights), lab.version + 1)
    lab.publish("A")
    assert logprob_error(lab.models["A"], PROMPTS, lab.generate()) < TOLERANCE


@pytest.mark.slow
def test_tensor_parallel_workers_return_the_same_routes(engine_lab, tmp_path):
    directory = engine_lab.arena.parent
    split = ENGINE_ARGS | {"tensor_parallel_size": 2}
    engine = start_engine(directory, engine_args=split, return_routes=True)
    two = replace(engine_lab, engine=engine, version=0)
    try:
        assert differing_entries(two.models["A"], PROMPTS, two.generate(ROUTED))[0] == 0
        two.publish("B")
        groups = two.generate(ROUTED, LONG)
        assert logprob_error(two.models["B"], LONG, groups) < TOLERANCE
        assert differing_entries(two.models["B"], LONG, groups)[0] == 0
    finally:
        engine.close()
