"""Weights, gradients and optimizer state that leave the device between steps."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.checkpoint_jobs import continue_job
from tests.helpers.offload_jobs import away_between_steps_job
from tests.helpers.plan_jobs import HeldBytes
from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

OFFLOAD = {"rollout": {"sleep": True}}
NOTHING = HeldBytes(weights=0, gradients=0, optimizer=0)


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2", tie_word_embeddings=True)
    return path


@pytest.fixture(scope="module")
def sequences(model):
    plain = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(model), plain)
    return with_old_logprobs(plain, logprobs)


# The optimizer's fp32 weights are views of the policy's with fp32, and copies with bf16; without
# the distributed optimizer every parameter has a storage of its own.
@pytest.mark.parametrize(
    ("parallel", "precision", "distributed"),
    [
        ({"tp": 2}, "fp32", False),
        ({"dp": 2}, "fp32", True),
        ({"dp": 2}, "bf16", False),
        ({"pp": 2, "vpp": 2}, "bf16", True),
    ],
    ids=["tp2_replicated", "dp2", "dp2_bf16_replicated", "pp2_vpp2_bf16"],
)
def test_state_that_was_away_trains_bit_by_bit_as_if_it_had_stayed(
    model, sequences, parallel, precision, distributed, tmp_path
):
    sections = {"parallel": parallel, "precision": {"train": precision}}
    optim = {"lr": 1e-2, "distributed": distributed}
    plain = tiny_config(model, **sections, optim=optim)
    away = tiny_config(model, **sections, **OFFLOAD, optim=optim | {"offload": True})
    expected = run_distributed(2, train_job, plain, sequences, tmp_path / "stayed")[0]
    folder = tmp_path / "step_2"
    results = run_distributed(2, away_between_steps_job, away, sequences, tmp_path / "away", folder)
    assert torch.equal(results[0]["logprobs"], expected["logprobs"])
    assert results[0]["grad_norms"] == expected["grad_norms"]
    stayed, returned = load_file(tmp_path / "stayed"), load_file(tmp_path / "away")
    assert all(torch.equal(returned[name], tensor) for name, tensor in stayed.items())
    for result in results:
        assert all(here.optimizer > 0 and left == NOTHING for here, left in result["held"])
    resumed = run_distributed(2, continue_job, plain, sequences, folder)[0]
    assert torch.equal(resumed["logprobs"], results[0]["trained"])


def test_without_the_setting_the_state_stays(model, sequences, tmp_path):
    config = tiny_config(model, parallel={"tp": 2}, **OFFLOAD)
    job = (away_between_steps_job, config, sequences, tmp_path / "weights", tmp_path / "step_2")
    assert all(here == left for here, left in run_distributed(2, *job)[0]["held"])
