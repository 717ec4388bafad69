"""What an engine reads in the memory of the ranks is what they would write into an arena."""

import pytest
import torch

from tests.helpers.in_place_jobs import in_place_job, moved_weight_job, refused_job
from tests.helpers.policy_jobs import with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

BF16_ENGINE = {"precision": {"train": "fp32", "rollout": "bf16"}}
BF16 = {"precision": {"train": "bf16"}}
FP8 = {"precision": {"train": "bf16", "rollout": "fp8_block"}}
# The step changes the selection biases too, which are buffers outside of Megatron's large ones.
BIASES = {"router": {"bias_update_rate": 0.1}}
LAYOUTS = {
    "one_rank_tied": ("qwen2", {}, {}),
    "tp2_bf16": ("qwen3", {"tp": 2}, BF16),
    "dp2_rounded_for_the_engine": ("qwen3", {"dp": 2}, BF16_ENGINE),
    "pp2_vpp2": ("qwen2", {"pp": 2, "vpp": 2}, {}),
    "tp2_pp2_fp8": ("qwen3", {"tp": 2, "pp": 2}, FP8),
    "tp2_ep2": ("qwen3_moe", {"tp": 2, "ep": 2}, {}),
    "ep2_in_fp8": ("qwen3_moe", {"dp": 2, "ep": 2}, FP8),
    "latent_attention_and_biases_ep2": ("deepseek_v3", {"tp": 2, "ep": 2}, BF16 | BIASES),
    "packed_experts_in_halves": ("gpt_oss", {"dp": 2, "etp": 2}, {}),
}


def model(tmp_path, architecture):
    sizes = {"num_hidden_layers": 4 if architecture == "qwen2" else 2}
    if architecture == "qwen2":
        sizes["tie_word_embeddings"] = True
    save_tiny_model(tmp_path / "model", architecture, **sizes)
    return tmp_path / "model"


def batch():
    sequences = tiny_sequences()
    return with_old_logprobs(sequences, [torch.full((s.response_length,), -5.0) for s in sequences])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_engine_reads_every_bit_of_the_weights_before_and_after_a_step(layout, tmp_path):
    architecture, parallel, sections = LAYOUTS[layout]
    # Large steps: small ones would leave norms in bf16 and factors of FP8 as they are.
    sections = {"optim": {"lr": 0.1}, **sections}
    config = tiny_config(model(tmp_path, architecture), parallel=parallel, **sections)
    sizes = config.parallel
    world = sizes.tp * sizes.pp * sizes.dp
    before, after = run_distributed(world, in_place_job, config, batch(), tmp_path)[0]
    for result in (before, after):
        assert result["wrong"] == []
        of_trainer, of_engine = result["sums"]
        assert of_trainer == of_engine
    assert all(before["sums"][0][name] != sum_ for name, sum_ in after["sums"][0].items())
    assert after["unchanged"] == []


def test_ranks_of_another_host_may_hold_a_second_replica_but_no_part_of_the_first(tmp_path):
    path = model(tmp_path, "qwen3")
    replica = tiny_config(path, parallel={"dp": 2})
    assert run_distributed(2, refused_job, replica, ["a", "b"]) == [None, None]
    part = tiny_config(path, parallel={"pp": 2})
    for message in run_distributed(2, refused_job, part, ["a", "b"]):
        # The second stage has the layer 1.
        assert "the host of rank 0 do not hold the whole model" in message
        assert "model.layers.1.input_layernorm.weight: 0 pieces with 0 of 64 elements" in message


def test_shared_memory_that_is_too_small_is_refused_by_all_ranks(tmp_path):
    config = tiny_config(model(tmp_path, "qwen3"), parallel={"tp": 2})
    messages = run_distributed(2, refused_job, config, ["a", "a"], room=10**5)
    assert messages[0] == messages[1]
    assert "GB of /dev/shm, which has 0.00 GB left" in messages[0]


def test_a_weight_that_has_moved_away_shows_under_its_name(tmp_path):
    config = tiny_config(model(tmp_path, "qwen3"))
    [(trainer, engine)] = run_distributed(1, moved_weight_job, config)
    assert [name for name in trainer if trainer[name] != engine[name]] == ["model.norm.weight"]
