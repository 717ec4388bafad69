"""Rollout batches that a filter has left with few groups, or with nothing to train on."""

import pytest
import torch

from megatron_cpgd.types import TrainSequence
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config
from tests.helpers.train_jobs import train_batches_job

pytestmark = pytest.mark.distributed

# Two epochs, the second with weights of its own; a reference; every step decays Adam's state.
ALGORITHM = {
    "mini_batches": 2, "epochs": 2, "filter": {"truncated": "mask"}, "reference": {"coef": 0.1}
}  # fmt: skip


def group(number: int, *, truncated: bool = False) -> list[TrainSequence]:
    generator = torch.Generator().manual_seed(number)
    return [
        TrainSequence(
            group=number,
            prompt_ids=torch.tensor([1, 2]),
            response_ids=torch.randint(131, (length,), generator=generator),
            rollout_logprobs=torch.full((length,), -5.0),
            advantage=advantage,
            truncated=truncated,
        )
        for length, advantage in ((3, 1.0), (5, -1.0))
    ]


BATCHES = {
    "two groups": [*group(0), *group(1)],
    "no group": [],
    "all masked": [*group(0, truncated=True), *group(1, truncated=True)],
    "first mini-batch masked": [*group(0, truncated=True), *group(1)],
    "one group": group(0),
}


@pytest.fixture(scope="module", params=[{"dp": 2}, {"pp": 2, "vpp": 2}], ids=["dp2", "pp2_vpp2"])
def ranks(request, tmp_path_factory):
    """By rank: name of the batch -> what training on it gave."""
    model = tmp_path_factory.mktemp("model")
    save_tiny_model(model, "qwen2")
    config = tiny_config(model, parallel=request.param, algorithm=ALGORITHM)
    results = run_distributed(2, train_batches_job, config, list(BATCHES.values()))
    return [dict(zip(BATCHES, result, strict=True)) for result in results]


@pytest.mark.parametrize(
    ("batch", "steps", "clock"),
    [
        ("two groups", 4, 4),  # 2 mini-batches in 2 epochs
        ("no group", 0, 4),
        ("all masked", 0, 4),
        ("first mini-batch masked", 2, 6),
        ("one group", 2, 8),
    ],
)
def test_only_mini_batches_with_loss_are_optimizer_steps(ranks, batch, steps, clock):
    for rank in ranks:
        assert rank[batch]["metrics"]["policy/optimizer_steps"] == steps
        assert rank[batch]["metrics"]["policy/skipped_steps"] == 0
        assert rank[batch]["clock"] == clock


def test_a_step_without_loss_leaves_weights_and_optimizer_as_they_are(ranks):
    for rank in ranks:
        before, *after = (rank[name]["state"] for name in list(BATCHES)[:4])
        same = [all(map(torch.equal, before, state)) for state in after]
        assert same == [True, True, False]


def test_the_row_of_a_step_says_what_there_was(ranks):
    for rank in ranks:
        metrics = {name: result["metrics"] for name, result in rank.items()}
        assert metrics["no group"] == {
            "policy/optimizer_steps": 0, "policy/skipped_steps": 0, "policy/skipped_in_a_row": 0
        }  # fmt: skip
        assert "policy/grad_norm" not in metrics["all masked"]
        # It was sampled, so trainer and engine are compared on it.
        assert metrics["all masked"]["rollout/logprob_abs_diff_mean"] > 0
        shares = [m.get("rollout/masked_truncated_frac") for m in metrics.values()]
        assert shares == [0.0, None, 1.0, 0.5, 0.0]
