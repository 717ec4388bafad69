"""Objectives that look at whole responses: what context parallelism cuts apart is put together."""

from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.config.algorithm import AlgorithmConfig
from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

OBJECTIVES: dict[str, dict[str, Any]] = {
    "gspo": {"preset": "gspo"},
    "minpro": {"preset": "minpro", "rejection": {"off_policy_delta": 0.05}},
}
LAYOUTS: dict[str, dict[str, Any]] = {"cp2": {"cp": 2}, "dp2": {"dp": 2}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """(folder, sequences): old log-probs around the live ones, the sampler's around the old."""
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2")
    sequences = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), sequences)
    for sequence in with_old_logprobs(sequences, logprobs):
        old = sequence.tensors["old_logprobs"]
        sequence.tensors["rollout_logprobs"] = old + 0.1 * torch.cos(torch.arange(len(old)))
    return path, sequences


def step(model, name, target, parallel, batch):
    path, sequences = model
    # A large epsilon makes Adam's first update proportional to the gradient itself.
    optim = {"lr": 1.0, "eps": 1e3, "weight_decay": 0.0, "grad_clip": 1e9}
    config = tiny_config(path, parallel=parallel, batch=batch, optim=optim)
    objective = build_objective(AlgorithmConfig.model_validate(OBJECTIVES[name]))
    [result, *_] = run_distributed(
        config.parallel.world_size, train_job, config, sequences, target, steps=1,
        objective=objective,
    )  # fmt: skip
    weights, initial = load_file(target), load_file(path / "model.safetensors")
    update = torch.cat([(weights[n] - initial[n]).flatten() for n in initial])
    return result["metrics"][0], result["grad_norms"][0], update


@pytest.fixture(scope="module", params=OBJECTIVES)
def alone(request, model, tmp_path_factory):
    """(name, metrics, gradient norm, update) on one rank, in one micro-batch."""
    target = tmp_path_factory.mktemp("alone") / "weights.safetensors"
    batch = {"tokens_per_micro_batch": 10_000}
    return request.param, step(model, request.param, target, {}, batch)


@pytest.mark.parametrize("format", ["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_loss_and_gradient_equal_those_of_one_rank(model, alone, layout, format, tmp_path):
    name, (metrics, norm, update) = alone
    batch = {"tokens_per_micro_batch": 48, "format": format}
    got, got_norm, got_update = step(model, name, tmp_path / "w", LAYOUTS[layout], batch)
    assert norm > 0 and metrics["policy/masked_frac"] > 0
    assert got_norm == pytest.approx(norm, rel=1e-5)
    assert (got_update - update).norm() / update.norm() < 1e-3
    assert got == pytest.approx(metrics, rel=1e-4, abs=1e-5)
