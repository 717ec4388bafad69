"""Batches that leave ranks or micro-batches without work, and numbers that are not finite."""

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.types import LossSequence
from tests.helpers.checkpoint_jobs import poisoned_rank_job
from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

LAYOUTS = {
    "dp2": {"dp": 2},
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "tp2": {"tp": 2},
    "cp2": {"cp": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    save_tiny_model(path, "qwen2", tie_word_embeddings=True)
    return path


@pytest.fixture(scope="module")
def sequences(model):
    plain = tiny_sequences(groups=2, size=3)
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(model), plain)
    return with_old_logprobs(plain, logprobs)


def train(model, sequences, target, parallel, **sections):
    config = tiny_config(model, parallel=parallel, **sections)
    result = run_distributed(
        config.parallel.world_size, train_job, config, sequences, target, steps=1
    )
    return result, load_file(target)


@pytest.fixture(scope="module")
def alone(model, sequences, tmp_path_factory):
    """A step on a single sequence by a single rank."""
    target = tmp_path_factory.mktemp("alone") / "weights.safetensors"
    [result], weights = train(model, sequences[:1], target, {})
    return result, weights


# Data parallel: one rank has nothing but filling. Interleaved: half of the micro-batches are.
@pytest.mark.parametrize("format", ["packed", "padded"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_one_sequence_trains_like_on_one_rank(
    model, sequences, alone, layout, format, tmp_path
):
    expected, expected_weights = alone
    batch = {"tokens_per_micro_batch": 48, "format": format}
    results, weights = train(model, sequences[:1], tmp_path / "w", LAYOUTS[layout], batch=batch)
    for result in results:
        assert (result["logprobs"] - expected["logprobs"]).abs().max() < 1e-4
        assert result["grad_norms"] == pytest.approx(expected["grad_norms"], rel=1e-5)
        assert result["metrics"][0] == pytest.approx(expected["metrics"][0], rel=1e-3, abs=1e-5)
    # Adam's first step is lr * sign of the gradient where that is not nearly 0: 1e-3 per element.
    for name, expected_tensor in expected_weights.items():
        assert (weights[name] - expected_tensor).abs().mean() < 1e-5, name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_without_any_response_token_changes_nothing(model, sequences, layout, tmp_path):
    [empty] = [sequence for sequence in sequences if sequence.response_length == 0]
    optim = {"lr": 1e-3, "weight_decay": 0.0}
    results, weights = train(model, [empty] * 3, tmp_path / "w", LAYOUTS[layout], optim=optim)
    for result in results:
        assert result["skipped"] == [None] and result["grad_norms"] == [0.0]
        assert result["metrics"] == [{"policy/loss": 0.0}] and len(result["logprobs"]) == 0
    initial = load_file(model / "model.safetensors")
    assert all(torch.equal(weights[name], initial[name]) for name in initial)


# One sequence's old log-probs are NaN, so one rank's loss is not finite.
def test_a_loss_that_is_not_finite_on_one_replica_skips_the_step_on_all(model, sequences, tmp_path):
    damaged = [
        LossSequence(input_ids=s.input_ids, prompt_length=s.prompt_length, tensors=dict(s.tensors))
        for s in sequences
    ]
    tensors = next(s for s in damaged if s.response_length).tensors
    tensors["old_logprobs"] = torch.full_like(tensors["old_logprobs"], torch.nan)
    results, weights = train(model, damaged, tmp_path / "w", {"dp": 2})
    assert [result["skipped"] for result in results] == [["policy/loss is nan"]] * 2
    initial = load_file(model / "model.safetensors")
    assert all(torch.equal(weights[name], initial[name]) for name in initial)


@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("layout", ["dp2", "pp2", "tp2"])
def test_a_gradient_of_nan_on_one_rank_skips_the_step_on_all(
    model, sequences, layout, rank, distributed, tmp_path
):
    optim = {"lr": 1e-3, "distributed": distributed}
    config = tiny_config(model, parallel=LAYOUTS[layout], optim=optim)
    before, after = tmp_path / "before", tmp_path / "after"
    results = run_distributed(2, poisoned_rank_job, config, sequences, rank, before, after)
    assert results == [[None, "gradient norm is nan", None]] * 2
    old, new = load_file(before), load_file(after)
    assert all(torch.equal(old[name], new[name]) for name in old)


# The gradient is 0, so Adam's step is 0 and what is left is p -= lr * weight_decay * p = 0.05 p.
@pytest.mark.parametrize("distributed", [True, False])
@pytest.mark.parametrize("layout", ["dp2", "tp2", "pp2_vpp2"])
def test_weight_decay_acts_on_matrices_only(model, sequences, layout, distributed, tmp_path):
    [empty] = [sequence for sequence in sequences if sequence.response_length == 0]
    optim = {"lr": 0.1, "weight_decay": 0.5, "distributed": distributed}
    _, weights = train(model, [empty], tmp_path / "w", LAYOUTS[layout], optim=optim)
    for name, initial in load_file(model / "model.safetensors").items():
        expected = initial if initial.ndim == 1 else initial * 0.95
        torch.testing.assert_close(weights[name], expected, rtol=1e-6, atol=0, msg=name)
