"""Every layout trains like one rank: same log-probs, gradient norms and updates, in fp32."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

EXACT = ["pp2", "pp2_vpp2", "dp2"]
CLOSE = ["tp2", "tp2_no_sp", "cp2", "tp2_pp2"]
LAYOUTS: dict[str, dict[str, Any]] = {
    "pp2": {"pp": 2},
    "pp2_vpp2": {"pp": 2, "vpp": 2},
    "dp2": {"dp": 2},
    "tp2": {"tp": 2},
    "tp2_no_sp": {"tp": 2, "sequence_parallel": False},
    "cp2": {"cp": 2},
    "tp2_pp2": {"tp": 2, "pp": 2},
    "tp2_pp2_dp2": {"tp": 2, "pp": 2, "dp": 2},
}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"architecture": "qwen3"},
    "qwen2_bias_tied": {"architecture": "qwen2", "tie_word_embeddings": True},
}


@dataclass(frozen=True)
class Run:
    """What one training of three steps leaves."""

    logprobs: torch.Tensor
    grad_norms: list[float]
    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    path: Path
    sequences: list
    run: Run
    initial: dict[str, torch.Tensor]


def train(path: Path, sequences: list, folder: Path, parallel: dict, **sections: Any) -> Run:
    config = tiny_config(path, parallel=parallel, **sections)
    output = folder / "weights.safetensors"
    result = run_distributed(config.parallel.world_size, train_job, config, sequences, output)[0]
    assert result["skipped"] == [None] * 3
    weights = load_file(output)
    output.unlink()
    return Run(result["logprobs"], result["grad_norms"], result["metrics"], weights)


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory) -> Reference:
    folder = tmp_path_factory.mktemp(request.param)
    save_tiny_model(folder / "model", **MODELS[request.param])
    config = tiny_config(folder / "model")
    sequences = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, config, sequences)
    sequences = with_old_logprobs(sequences, logprobs)
    run = train(folder / "model", sequences, folder, {})
    initial = load_file(folder / "model" / "model.safetensors")
    return Reference(folder / "model", sequences, run, initial)


def update_error(run: Run, reference: Reference) -> float:
    """Relative L2 distance of the updates over all parameters together."""
    difference = update = 0.0
    for name, initial in reference.initial.items():
        expected = reference.run.weights[name] - initial
        difference += (run.weights[name] - reference.run.weights[name]).norm().item() ** 2
        update += expected.norm().item() ** 2
    assert update > 0
    return (difference / update) ** 0.5


def grad_norm_error(run: Run, reference: Reference) -> float:
    pairs = zip(run.grad_norms, reference.run.grad_norms, strict=True)
    return max(abs(a - b) / b for a, b in pairs)


@pytest.mark.parametrize("layout", EXACT)
def test_pipeline_and_data_parallel_equal_one_rank_bit_by_bit(reference, layout, tmp_path):
    run = train(reference.path, reference.sequences, tmp_path, LAYOUTS[layout])
    assert torch.equal(run.logprobs, reference.run.logprobs)
    assert grad_norm_error(run, reference) < 1e-5
    assert update_error(run, reference) < 1e-5


@pytest.mark.parametrize("layout", [*CLOSE, pytest.param("tp2_pp2_dp2", marks=pytest.mark.slow)])
def test_tensor_and_context_parallel_equal_one_rank_up_to_rounding(reference, layout, tmp_path):
    run = train(reference.path, reference.sequences, tmp_path, LAYOUTS[layout])
    assert (run.logprobs - reference.run.logprobs).abs().max() < 1e-4
    assert grad_norm_error(run, reference) < 1e-5
    assert update_error(run, reference) < 1e-3


@pytest.mark.parametrize("layout", ["dp2", "cp2", "tp2", "pp2_vpp2"])
def test_padded_batches_train_like_packed_ones(reference, layout, tmp_path):
    batch = {"format": "padded", "tokens_per_micro_batch": 64}
    run = train(reference.path, reference.sequences, tmp_path, LAYOUTS[layout], batch=batch)
    assert (run.logprobs - reference.run.logprobs).abs().max() < 1e-4
    assert grad_norm_error(run, reference) < 1e-5
    assert update_error(run, reference) < 1e-3


@pytest.mark.parametrize("recompute", ["full", "selective"])
def test_recompute_changes_nothing(reference, recompute, tmp_path):
    model = {"path": reference.path, "recompute": recompute}
    run = train(reference.path, reference.sequences, tmp_path, LAYOUTS["tp2"], model=model)
    assert grad_norm_error(run, reference) < 1e-5
    assert update_error(run, reference) < 1e-3


def test_metrics_are_those_of_the_whole_batch_on_every_layout(reference, tmp_path):
    run = train(reference.path, reference.sequences, tmp_path, LAYOUTS["tp2_pp2"])
    for ours, theirs in zip(run.metrics, reference.run.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
