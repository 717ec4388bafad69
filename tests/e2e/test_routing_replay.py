"""A run that trains on the routes of vLLM: two expert-parallel ranks, two steps, two epochs."""

import pytest
import torch
from transformers import AutoTokenizer, Qwen3MoeForCausalLM

from tests.helpers.full_run import read_rows, run_cli, settings, write_assets, write_yaml
from tests.helpers.tiny_moe_engine import moe_config

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    folder = write_assets(tmp_path_factory.mktemp("assets"))
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    torch.manual_seed(0)
    config = moe_config(
        vocab_size=len(tokenizer),
        initializer_range=0.1,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(folder / "model")
    content = settings(folder)
    content["run"] = {"steps": 2, "dir": str(folder / "run")}
    content["parallel"] = {"dp": 2, "ep": 2}
    content["algorithm"]["routing_replay"] = "rollout"
    finished = run_cli("train", write_yaml(folder / "run.yaml", content), folder=folder)
    assert finished.code == 0, finished.err
    return read_rows(folder / "run" / "metrics.jsonl")


# Both compute in fp32 with the same weights: a route in a wrong place would show at once.
def test_the_trainers_routers_agree_with_the_replayed_routes(rows):
    for row in rows[1:]:
        assert row["routing/disagreement"] == 0
        assert row["rollout/logprob_abs_diff_max"] < 1e-4
        assert row["policy/optimizer_steps"] == 4
