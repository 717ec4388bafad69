"""vLLM with DeepSeek-V3 and GLM-4.5: latent attention, routers with a bias on sigmoid scores.

As test_moe_engine.py: weights after a refresh, and routes. Model C is A but for the biases.
"""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import Sampling
from tests.helpers.engines import (
    PROMPTS,
    SAMPLING,
    TOLERANCE,
    correction_biases,
    differing_entries,
    logprob_error,
    named_weights,
    start_engine,
    start_lab,
    write_arena,
)
from tests.helpers.tiny_moe_engine import deepseek_config, glm_config

CONFIGS = {
    "deepseek_v3": deepseek_config,
    "deepseek_v3_plain_queries": lambda: deepseek_config(q_lora_rank=None, v_head_dim=32),
    "glm4_moe": glm_config,
}
USUAL = "deepseek_v3"
ROUTED = Sampling(n=3, max_tokens=20, return_routes=True)
ENTRIES = 3 * (16 + 4 * 19) * 2  # 4 prompts of 16 tokens, 2 layers with experts


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=() if n == USUAL else pytest.mark.slow) for n in CONFIGS],
)
def lab(request, tmp_path_factory):
    directory = tmp_path_factory.mktemp(request.param)
    lab = start_lab(directory, CONFIGS[request.param](), return_routes=True)
    try:
        lab.models["C"] = deepcopy(lab.models["A"])
        for bias in correction_biases(lab.models["C"]).values():
            bias.copy_(bias.flip(0))
        lab.cold = lab.generate(replace(SAMPLING, return_routes=True))
        yield lab
    finally:
        lab.engine.close()


@pytest.mark.parametrize("which", ["B", "C", "A"])
def test_logprobs_and_routes_are_those_of_transformers_after_every_refresh(lab, which):
    lab.publish(which)
    groups = lab.generate(ROUTED)
    assert logprob_error(lab.models[which], PROMPTS, groups) < TOLERANCE
    assert differing_entries(lab.models[which], PROMPTS, groups) == (0, ENTRIES)
    for other in {"A", "B", "C"} - {which}:
        assert logprob_error(lab.models[other], PROMPTS, groups) > 0.1
        assert differing_entries(lab.models[other], PROMPTS, groups)[0] > 0.3 * ENTRIES


def test_refresh_there_and_back_equals_the_cold_start_bit_by_bit(lab):
    lab.publish("B")
    lab.publish("A")
    groups = lab.generate(replace(SAMPLING, return_routes=True))
    for group, cold in zip(groups, lab.cold, strict=True):
        assert [r.logprobs for r in group] == [r.logprobs for r in cold]
        assert [r.routes for r in group] == [r.routes for r in cold]


def test_a_missing_bias_is_named_and_nothing_is_loaded(lab, tmp_path):
    lab.publish("A")
    weights = named_weights(lab.models["B"])
    name = "model.layers.1.mlp.gate.e_score_correction_bias"
    assert torch.is_tensor(weights.pop(name))
    with pytest.raises(WeightSyncError, match=rf"missing \['{name}'\]"):
        lab.engine.refresh(write_arena(tmp_path / "arena", weights), lab.version + 1)
    lab.publish("A")
    assert logprob_error(lab.models["A"], PROMPTS, lab.generate()) < TOLERANCE


@pytest.mark.slow
def test_tensor_parallel_workers_return_the_same(lab):
    split = {"kv_cache_memory_bytes": 32 << 20, "max_num_seqs": 32, "tensor_parallel_size": 2}
    engine = start_engine(lab.arena.parent, engine_args=split, return_routes=True)
    two = replace(lab, engine=engine, version=0)
    try:
        for which in ("C", "B"):
            two.publish(which)
            groups = two.generate(ROUTED)
            assert logprob_error(two.models[which], PROMPTS, groups) < TOLERANCE
            assert differing_entries(two.models[which], PROMPTS, groups) == (0, ENTRIES)
    finally:
        engine.close()
