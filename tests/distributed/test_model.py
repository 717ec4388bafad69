"""The Megatron model is the Hugging Face model, under every layout and in both directions."""

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.model_jobs import (
    load_weights_job,
    logits_job,
    rng_job,
    round_trip_job,
    save_weights_job,
    sharded_logprobs_job,
)
from tests.helpers.policy_jobs import logprobs_job
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
MODELS = {
    "qwen2": ("qwen2", {}),
    "qwen2_tied": ("qwen2", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "llama": ("llama", {}),
    "llama3_rope": ("llama", {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 65536}),
}


@pytest.fixture(scope="module", params=MODELS)
def saved(request, tmp_path_factory):
    """(folder, transformers model)."""
    architecture, overrides = MODELS[request.param]
    path = tmp_path_factory.mktemp(request.param)
    return path, save_tiny_model(path, architecture, **overrides)


def reference_logprobs(model, sequences, temperature):
    """Log-probs of the responses, one sequence at a time, by transformers."""
    result = []
    for sequence in sequences:
        with torch.no_grad():
            logits = model(sequence.input_ids[None]).logits[0].float() / temperature
        predicted = logits.log_softmax(-1)[sequence.prompt_length - 1 : -1]
        response = sequence.input_ids[sequence.prompt_length :]
        result.append(predicted.gather(1, response[:, None]).squeeze(1))
    return torch.cat(result)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_logits_equal_those_of_transformers(saved, attention):
    """`eager` shares no attention kernel with ours; with `sdpa` even the rounding is the same."""
    path, model = saved
    tokens = torch.randint(131, (3, 40), generator=torch.Generator().manual_seed(1))
    [logits] = run_distributed(1, logits_job, tiny_config(path), tokens)
    model.set_attn_implementation(attention)
    with torch.no_grad():
        expected = model(tokens).logits
    error = (logits - expected).abs().max().item()
    print(f"largest |logit difference|: {error:.1e}")
    assert error < (1e-6 if attention == "sdpa" else 1e-4)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
def test_packed_logprobs_equal_single_sequences_of_transformers(saved, temperature):
    path, model = saved
    sequences = tiny_sequences()
    config = tiny_config(path, parallel={"tp": 2}, rollout={"temperature": temperature})
    logprobs = torch.cat(run_distributed(2, logprobs_job, config, sequences)[0])
    expected = reference_logprobs(model, sequences, temperature)
    assert (logprobs - expected).abs().max() < 1e-4


@pytest.mark.parametrize("parallel", [{}, {"tp": 2, "pp": 2}], ids=["1", "tp2pp2"])
def test_hf_to_megatron_to_hf_is_bit_identical(saved, parallel, tmp_path):
    path, _ = saved
    config = tiny_config(path, parallel=parallel)
    target = tmp_path / "out.safetensors"
    run_distributed(config.parallel.world_size, round_trip_job, config, target)
    original, written = load_file(path / "model.safetensors"), load_file(target)
    assert written.keys() == original.keys()
    assert all(torch.equal(written[name], original[name]) for name in original)


def test_a_checkpoint_of_one_layout_holds_the_same_bits_under_another(saved, tmp_path):
    path, _ = saved
    run_distributed(2, save_weights_job, tiny_config(path, parallel={"tp": 2}), tmp_path / "c")
    target = tmp_path / "out.safetensors"
    config = tiny_config(path, parallel={"pp": 2, "vpp": 2})
    run_distributed(2, load_weights_job, config, tmp_path / "c", target)
    original, loaded = load_file(path / "model.safetensors"), load_file(target)
    assert all(torch.equal(loaded[name], original[name]) for name in original)


# 5 columns on 4 ranks: shares of 2, 2, 1 and 0 columns.
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("columns", [5, 64])
def test_sharded_logprobs_entropy_and_gradient_equal_log_softmax(ranks, columns):
    generator = torch.Generator().manual_seed(2)
    logits = 3 * torch.randn(7, columns, generator=generator)
    targets = torch.randint(columns, (7,), generator=generator)
    results = run_distributed(ranks, sharded_logprobs_job, logits, targets, 0.7)

    whole = logits.double().requires_grad_()
    log_p = (whole / 0.7).log_softmax(-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (2.0 * logprobs + 0.5 * entropy).sum().backward()

    for got_logprobs, got_entropy, _ in results:
        torch.testing.assert_close(got_logprobs.double(), logprobs.detach(), atol=1e-6, rtol=1e-5)
        torch.testing.assert_close(got_entropy.double(), entropy.detach(), atol=1e-6, rtol=1e-5)
    gradient = torch.cat([result[2] for result in results], dim=1).double()
    torch.testing.assert_close(gradient, whole.grad, atol=1e-6, rtol=1e-5)


def test_a_forked_rng_stream_gives_the_default_stream_back():
    [(before, after, _)] = run_distributed(1, rng_job)
    assert torch.equal(before, after)
