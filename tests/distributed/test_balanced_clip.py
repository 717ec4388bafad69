"""BAPO in the training loop: the range is searched on the whole optimizer step, on any layout."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.types import TrainSequence
from tests.helpers.loop_jobs import optimise_job
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

CLIP = {"type": "balanced", "positive_share": 0.775}
# A share for which the four optimizer steps end at the start, between and at both limits.
BAPO = {"preset": "bapo", "mini_batches": 2, "epochs": 2, "clip": CLIP}
RANGE = ("policy/clip_low", "policy/clip_high")


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2")
    return path


def train_sequences() -> list[TrainSequence]:
    """Four groups of three responses, one of them good."""
    return [
        TrainSequence(
            group=i // 3,
            prompt_ids=s.input_ids[: s.prompt_length],
            response_ids=s.input_ids[s.prompt_length :],
            rollout_logprobs=torch.zeros(s.response_length),
            advantage=1.0 if i % 3 == 0 else -1.0,
            truncated=False,
        )
        for i, s in enumerate(tiny_sequences())
    ]


def optimise(model, target, parallel, **algorithm) -> tuple[list[dict[str, Any]], torch.Tensor]:
    config = tiny_config(
        model, parallel=parallel, algorithm=BAPO | algorithm, optim={"lr": 5e-4},
        rollout={"prompts_per_step": 4, "samples_per_prompt": 3},
    )  # fmt: skip
    world_size = config.parallel.world_size
    results = run_distributed(world_size, optimise_job, config, train_sequences(), target)
    weights = load_file(target)
    return results, torch.cat([weights[name].flatten() for name in sorted(weights)])


@pytest.fixture(scope="module")
def alone(model, tmp_path_factory):
    [metrics], weights = optimise(model, tmp_path_factory.mktemp("alone") / "w", {})
    return metrics, weights


def test_a_range_is_searched_for_each_optimizer_step(model, alone, tmp_path):
    metrics, weights = alone
    assert metrics["policy/skipped_steps"] == 0
    assert 0.6 < metrics["policy/clip_low"] < 0.9 and 1.2 < metrics["policy/clip_high"] < 3.0
    start = {"type": "constant", "low": 0.4, "high": 0.2}
    [fixed], fixed_weights = optimise(model, tmp_path / "w", {}, clip=start)
    assert not set(RANGE) & set(fixed)
    assert (weights - fixed_weights).abs().max() > 1e-4


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"cp": 2}, {"pp": 2}])
def test_every_rank_of_any_layout_finds_the_range_of_one_rank(model, alone, parallel, tmp_path):
    metrics, weights = alone
    results, got = optimise(model, tmp_path / "w", parallel)
    for result in results:
        assert [result[name] for name in RANGE] == [metrics[name] for name in RANGE]
    assert (got - weights).abs().max() < 1e-4
