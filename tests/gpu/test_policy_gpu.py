"""One rank on a GPU with Transformer Engine layers: `pytest -m gpu`.

Not yet run on a GPU: the tests that need no Transformer Engine were run on CPU with gloo and local
layers, and the tolerances of bf16 are two to ten times what was measured there.
"""

import pytest
import torch

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy.policy import Policy
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, with_old_logprobs
from tests.helpers.tiny import GPU_SIZES, save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.gpu


@pytest.fixture(scope="module", params=["qwen2", "qwen3"])
def saved(request, tmp_path_factory):
    """(folder, transformers model in fp32 on the CPU)."""
    path = tmp_path_factory.mktemp(request.param)
    extra = {"head_dim": 64} if request.param == "qwen3" else {}
    return path, save_tiny_model(path, request.param, **GPU_SIZES, **extra)


def gpu_config(path, dtype: str, **batch) -> ExperimentConfig:
    return tiny_config(path, precision={"train": dtype}, batch=batch)


def logprobs(policy: Policy, sequences) -> torch.Tensor:
    return torch.cat(policy.compute_logprobs(sequences))


def transformers_logprobs(model, sequences) -> torch.Tensor:
    """Log-probs of the responses, one sequence at a time."""
    result = []
    for sequence in sequences:
        with torch.no_grad():
            log_p = model(sequence.input_ids[None]).logits[0].float().log_softmax(-1)
        predicted = log_p[sequence.prompt_length - 1 : -1]
        response = sequence.input_ids[sequence.prompt_length :]
        result.append(predicted.gather(1, response[:, None]).squeeze(1))
    return torch.cat(result)


def test_the_model_is_built_from_transformer_engine_layers(saved):
    policy = build_policy(gpu_config(saved[0], "bf16"))
    modules = [module for chunk in policy._chunks for module in chunk.modules()]
    from_te = {type(m).__name__ for m in modules if "TE" in type(m).__name__}
    assert {"TEDotProductAttention", "TERowParallelLinear"} <= from_te
    assert not any(type(m).__module__ == "megatron_cpgd.policy.cpu_layers" for m in modules)
    assert all(
        p.is_cuda and p.dtype is torch.bfloat16 for c in policy._chunks for p in c.parameters()
    )


# Padded: the attention kernels that take packed batches have no fp32 version.
def test_fp32_logprobs_equal_those_of_transformers(saved):
    path, model = saved
    policy = build_policy(gpu_config(path, "fp32", format="padded"))
    sequences = tiny_sequences()
    error = (logprobs(policy, sequences) - transformers_logprobs(model, sequences)).abs().max()
    print(f"fp32: largest |log-prob difference| {error:.1e}")
    assert error < 5e-3  # TF32 in the matrix products, if it is on, rounds to 10 bits


@pytest.mark.parametrize("format", ["packed", "padded"])
def test_bf16_logprobs_are_close_to_those_of_transformers(saved, format):
    path, model = saved
    policy = build_policy(gpu_config(path, "bf16", format=format))
    sequences = tiny_sequences()
    error = (logprobs(policy, sequences) - transformers_logprobs(model, sequences)).abs()
    print(f"bf16 {format}: |log-prob difference| mean {error.mean():.1e}, max {error.max():.1e}")
    assert error.mean() < 0.02 and error.max() < 0.2


# A sequence that saw its neighbour, or had its positions counted on, is off by whole units.
def test_a_packed_batch_is_its_sequences_one_by_one(saved):
    sequences = tiny_sequences()
    together, alone = (
        logprobs(build_policy(gpu_config(saved[0], "bf16", tokens_per_micro_batch=size)), sequences)
        for size in (4096, 1)
    )
    error = (together - alone).abs()
    print(f"packed: |log-prob difference| mean {error.mean():.1e}, max {error.max():.1e}")
    assert error.mean() < 0.01 and error.max() < 0.1


@pytest.mark.parametrize("recompute", ["none", "full"])
@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_training_moves_the_logprobs_where_the_advantages_point(saved, dtype, recompute):
    path, _ = saved
    batch = {"format": "packed" if dtype == "bf16" else "padded", "tokens_per_micro_batch": 64}
    config = tiny_config(
        path, precision={"train": dtype}, batch=batch, model={"path": path, "recompute": recompute}
    )
    policy = build_policy(config)
    sequences = tiny_sequences(groups=2, size=3)
    before = policy.compute_logprobs(sequences)
    with_old_logprobs(sequences, before)
    for sequence, values in zip(sequences, before, strict=True):
        sequence.tensors["old_logprobs"] = values  # ratio 1: nothing is clipped
    results = [policy.train_step(sequences, OBJECTIVE) for _ in range(3)]
    assert [result.skipped for result in results] == [None] * 3
    assert all(result.grad_norm > 0 for result in results)
    after = policy.compute_logprobs(sequences)
    gain = sum(
        float((sequence.tensors["advantages"] * (new - old)).sum())
        for sequence, old, new in zip(sequences, before, after, strict=True)
    )
    assert gain > 0


def test_the_export_of_what_was_loaded_is_bit_identical(saved):
    path, model = saved
    policy = build_policy(gpu_config(path, "fp32"))
    tensors = {name: torch.empty(shape) for name, shape in policy._table.hf_shapes.items()}
    policy.write_weights(tensors.__getitem__)
    original = model.state_dict()
    assert all(torch.equal(tensors[name], original[name]) for name in tensors)


def test_a_checkpoint_continues_where_it_was_saved(saved, tmp_path):
    config = gpu_config(saved[0], "bf16", tokens_per_micro_batch=64)
    first = build_policy(config)
    sequences = tiny_sequences(groups=2, size=3)
    with_old_logprobs(sequences, first.compute_logprobs(sequences))
    first.train_step(sequences, OBJECTIVE)
    first.save(tmp_path / "c", {})
    second = build_policy(config)
    second.load(tmp_path / "c")
    for policy in (first, second):
        policy.train_step(sequences, OBJECTIVE)
    pairs = zip(*(p.compute_logprobs(sequences) for p in (first, second)), strict=True)
    errors = [(a - b).abs().max() for a, b in pairs if len(a)]
    # Not 0: kernels of the backward pass may add in any order.
    assert max(errors) < 0.05


def test_a_reference_pass_uses_pinned_memory_and_leaves_the_weights_as_they_are(saved):
    path, _ = saved
    reference = {"reference": {"coef": 0.1}}
    policy = build_policy(tiny_config(path, precision={"train": "bf16"}, algorithm=reference))
    sequences = tiny_sequences(groups=2, size=3)
    untrained = policy.compute_logprobs(sequences)
    policy.train_step(with_old_logprobs(sequences, untrained), OBJECTIVE)
    trained = logprobs(policy, sequences)
    assert torch.equal(
        torch.cat(policy.compute_reference_logprobs(sequences)), torch.cat(untrained)
    )
    assert torch.equal(logprobs(policy, sequences), trained)
    assert policy._reference is not None
    assert all(piece.is_pinned() for _, kept in policy._reference._kept for piece in kept)
