"""The Megatron model is the Hugging Face model, under every layout and in both directions."""

from functools import partial

import pytest
import torch
from safetensors.torch import load_file

from megatron_cpgd.policy.logprobs import LogprobSettings
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


def log_softmax_results(hidden, weight, targets, upstream, temperature):
    """What `sharded_logprobs_job` returns, by autograd in float64 and with all logits at once."""
    hidden, weight = hidden.double().requires_grad_(), weight.double().requires_grad_()
    log_p = (hidden @ weight.T / temperature).log_softmax(-1)
    logprobs = log_p.gather(1, targets[:, None]).squeeze(1)
    entropy = -(log_p.exp() * log_p).sum(-1)
    (upstream * logprobs).sum().backward()
    return logprobs.detach(), entropy.detach(), hidden.grad, weight.grad


def head_inputs(columns, dtype=torch.float32):
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(7, 16, generator=generator).to(dtype)
    weight = torch.randn(columns, 16, generator=generator).to(dtype)
    targets = torch.randint(columns, (7,), generator=generator)
    return hidden, weight, targets, torch.randn(7, generator=generator)


# 5 columns on 4 ranks: shares of 2, 2, 1 and 0 columns. 7 tokens: chunks of 3, 3 and 1.
@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("columns", [5, 64])
@pytest.mark.parametrize("chunk_tokens", [3, 7])
def test_sharded_logprobs_entropy_and_gradients_equal_log_softmax(ranks, columns, chunk_tokens):
    inputs = head_inputs(columns)
    settings = LogprobSettings(vocab_size=columns, temperature=0.7, chunk_tokens=chunk_tokens)
    results = run_distributed(ranks, sharded_logprobs_job, *inputs, settings)
    logprobs, entropy, grad_hidden, grad_weight = log_softmax_results(*inputs, 0.7)
    close = partial(torch.testing.assert_close, atol=1e-5, rtol=1e-5)
    for result in results:
        close(result[0].double(), logprobs)
        close(result[1].double(), entropy)
        close(result[2].double(), grad_hidden)
    close(torch.cat([result[3] for result in results]).double(), grad_weight)


def test_the_logprob_function_can_be_differentiated_twice_in_a_row():
    """The first pass leaves gradients in the buffer that held the last chunk's logits."""
    inputs = head_inputs(64)
    settings = LogprobSettings(vocab_size=64, temperature=1.0, chunk_tokens=3)
    [once] = run_distributed(1, sharded_logprobs_job, *inputs, settings)
    [twice] = run_distributed(1, sharded_logprobs_job, *inputs, settings, backwards=2)
    assert all(torch.equal(a, b) for a, b in zip(once, twice, strict=True))


def test_bf16_logits_have_fp32_logprobs_and_the_gradient_of_one_rounding_per_product():
    """The logits round to 8 bits and so do the gradients; with fp32 statistics nothing adds up."""
    hidden, weight, targets, upstream = head_inputs(64, torch.bfloat16)
    settings = LogprobSettings(vocab_size=64, temperature=1.0, chunk_tokens=7)
    [result] = run_distributed(1, sharded_logprobs_job, hidden, weight, targets, upstream, settings)
    rounded = (hidden @ weight.T).float()
    expected = rounded.log_softmax(-1).gather(1, targets[:, None]).squeeze(1)
    assert result[0].dtype == torch.float32
    torch.testing.assert_close(result[0], expected, atol=1e-5, rtol=1e-5)
    _, _, grad_hidden, grad_weight = log_softmax_results(hidden, weight, targets, upstream, 1.0)
    for got, want in zip(result[2:], (grad_hidden, grad_weight), strict=True):
        assert (got.double() - want).norm() < 0.02 * want.norm()


def test_a_forked_rng_stream_gives_the_default_stream_back():
    [(before, after, _)] = run_distributed(1, rng_job)
    assert torch.equal(before, after)
