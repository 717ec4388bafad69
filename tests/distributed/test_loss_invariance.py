"""The gradient of a global batch is the same however the batch is cut, ordered or spread."""

import random

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    """(model folder, sequences, grad norm and weights after one step in one micro-batch)."""
    folder = tmp_path_factory.mktemp("invariance")
    save_tiny_model(folder, "qwen2")
    sequences = tiny_sequences(groups=5, size=4)
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(folder), sequences)
    with_old_logprobs(sequences, logprobs)
    return folder, sequences, step(folder, sequences, folder, tokens=100_000)


def step(folder, sequences, output, *, tokens, **parallel):
    """(grad norm, weights) after one SGD-like Adam step: the update is the gradient's sign."""
    batch = {"tokens_per_micro_batch": tokens, "format": parallel.pop("format", "packed")}
    # A large epsilon makes Adam's first update proportional to the gradient itself.
    optim = {"lr": 1.0, "eps": 1e3, "weight_decay": 0.0, "grad_clip": 1e9}
    config = tiny_config(folder, parallel=parallel, batch=batch, optim=optim)
    target = output / "weights.safetensors"
    results = run_distributed(
        config.parallel.world_size, train_job, config, sequences, target, steps=1
    )
    return results[0]["grad_norms"][0], load_file(target)


# Micro-batch sizes down to one sequence each, random orders, both formats, one and two replicas.
@pytest.mark.parametrize("seed", range(8))
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(case, seed, tmp_path):
    folder, sequences, (expected_norm, expected) = case
    draw = random.Random(seed)
    shuffled = draw.sample(sequences, len(sequences))
    norm, weights = step(
        folder,
        shuffled,
        tmp_path,
        tokens=draw.choice([1, 30, 64, 200, 1000]),
        format=draw.choice(["packed", "padded"]),
        dp=draw.choice([1, 2]),
    )
    assert norm == pytest.approx(expected_norm, rel=1e-5)
    initial = load_file(folder / "model.safetensors")
    update = torch.cat([(expected[name] - initial[name]).flatten() for name in initial])
    difference = torch.cat([(weights[name] - expected[name]).flatten() for name in initial])
    assert difference.norm() / update.norm() < 1e-3
