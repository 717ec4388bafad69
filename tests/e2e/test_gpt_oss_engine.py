"""gpt-oss in vLLM, before and after refreshes with the weights of a trainer on two ranks."""

from dataclasses import replace

import pytest
import torch
from transformers import AutoTokenizer, GptOssConfig
from transformers.models.auto import AutoModelForCausalLM

from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.types import LossSequence
from tests.helpers.engines import (
    PROMPTS,
    TOLERANCE,
    VOCAB,
    logprob_error,
    start_engine,
    start_lab,
)
from tests.helpers.full_run import read_rows, run_cli, settings, write_assets, write_yaml
from tests.helpers.model_jobs import round_trip_job
from tests.helpers.policy_jobs import logprobs_job
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import tiny_config
from tests.helpers.tiny_moe_engine import router_choices

CONFIG = GptOssConfig(
    vocab_size=VOCAB,
    hidden_size=64,
    intermediate_size=64,  # as wide as the hidden states: shapes do not tell rows from columns
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    num_local_experts=6,
    num_experts_per_tok=3,
    sliding_window=5,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)
LONG = [[(7 * i + j) % VOCAB for i in range(40)] for j in range(2)]
ROUTED = Sampling(n=2, max_tokens=12, seed=5, return_routes=True)
ENGINE_ARGS = {"kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": 256}


@pytest.fixture(scope="module")
def lab(tmp_path_factory):
    lab = start_lab(tmp_path_factory.mktemp("gpt_oss"), CONFIG, return_routes=True)
    try:
        yield lab
    finally:
        lab.engine.close()


def test_logprobs_after_a_refresh_are_those_of_the_trainer_that_wrote_it(lab, tmp_path):
    cold = lab.generate(ROUTED, LONG)
    assert logprob_error(lab.models["A"], LONG, cold) < TOLERANCE
    lab.models["B"].save_pretrained(tmp_path)
    config = tiny_config(tmp_path, parallel={"tp": 2, "ep": 2})
    lab.version += 1
    run_distributed(2, round_trip_job, config, tmp_path / "arena")
    lab.engine.refresh(tmp_path / "arena", lab.version)
    groups = lab.generate(ROUTED, LONG)
    assert logprob_error(lab.models["A"], LONG, groups) > 0.1
    sequences = [
        LossSequence(
            input_ids=torch.tensor(prompt + rollout.token_ids),
            prompt_length=len(prompt),
            tensors={},
        )
        for prompt, group in zip(LONG, groups, strict=True)
        for rollout in group
    ]
    trainer = run_distributed(2, logprobs_job, config, sequences)[0]
    engine = [torch.tensor(rollout.logprobs) for group in groups for rollout in group]
    for ours, theirs in zip(trainer, engine, strict=True):
        torch.testing.assert_close(ours, theirs, atol=TOLERANCE, rtol=0)
    for prompt, group in zip(LONG, groups, strict=True):
        for rollout in group:
            expected = router_choices(lab.models["B"], prompt + rollout.token_ids)
            routes = rollout.routes.tensor().long()
            assert torch.equal(routes.sort(-1).values, expected.sort(-1).values)


def test_a_refresh_there_and_back_changes_no_bit(lab):
    lab.publish("A")
    first = lab.generate()
    lab.publish("B")
    assert logprob_error(lab.models["B"], PROMPTS, lab.generate()) < TOLERANCE
    lab.publish("A")
    again = lab.generate()
    assert [[r.logprobs for r in g] for g in again] == [[r.logprobs for r in g] for g in first]


@pytest.mark.slow
def test_tensor_parallel_workers_refresh_too(lab):
    split = ENGINE_ARGS | {"tensor_parallel_size": 2}
    engine = start_engine(lab.arena.parent, engine_args=split)
    two = replace(lab, engine=engine, version=0)
    try:
        for which in "BA":
            two.publish(which)
            assert logprob_error(two.models[which], PROMPTS, two.generate()) < TOLERANCE
    finally:
        engine.close()


@pytest.mark.slow
def test_a_run_trains_on_the_routes_of_vllm_and_exports_what_transformers_loads(tmp_path):
    write_assets(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "model")
    sizes = {"vocab_size": len(tokenizer), "eos_token_id": tokenizer.eos_token_id}
    config = GptOssConfig(**CONFIG.to_dict() | sizes | {"initializer_range": 0.1})
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
    content = settings(tmp_path)
    content["run"] = {"steps": 2, "dir": str(tmp_path / "run")}
    content["parallel"] = {"tp": 2, "ep": 2}
    content["algorithm"]["routing_replay"] = "rollout"
    finished = run_cli("train", write_yaml(tmp_path / "run.yaml", content), folder=tmp_path)
    assert finished.code == 0, finished.err
    for row in read_rows(tmp_path / "run" / "metrics.jsonl")[1:]:
        assert row["routing/disagreement"] == 0
        assert row["rollout/logprob_abs_diff_max"] < 1e-3  # the engine's sinks are rounded
        assert row["policy/optimizer_steps"] == 4
    AutoModelForCausalLM.from_pretrained(tmp_path / "run" / "hf" / "step_000002")
