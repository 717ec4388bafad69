"""Every layout trains like one rank: same log-probs, gradient norms and updates, in fp32.

The measured differences are printed: `pytest -rP tests/distributed/test_layout_parity.py`.
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences

pytestmark = pytest.mark.distributed

STEPS = 3
EXACT = ["pp2", "pp2_vpp2", "dp2"]
CLOSE = ["tp2", "tp2_no_sp", "cp2", "tp2_pp2", "tp2_pp2_dp2"]
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
    """What one training leaves."""

    logprobs: torch.Tensor
    grad_norms: list[float]
    metrics: list[dict[str, float]]
    weights: dict[str, torch.Tensor]


@dataclass(frozen=True)
class Reference:
    """A model, its batch, and its training on one rank."""

    path: Path
    sequences: list
    run: Run
    initial: dict[str, torch.Tensor]
    packed_runs: dict[str, Run] = field(default_factory=dict)
    """By layout: several tests look at the same training."""

    def train(self, layout: str, **sections: Any) -> Run:
        parallel = LAYOUTS[layout]
        return train(self.path, self.sequences, parallel, **sections)

    def packed(self, layout: str) -> Run:
        if layout not in self.packed_runs:
            self.packed_runs[layout] = self.train(layout)
        return self.packed_runs[layout]


def train(path: Path, sequences: list, parallel: dict, **sections: Any) -> Run:
    config = tiny_config(path, parallel=parallel, **sections)
    output = path / "trained.safetensors"
    [result, *_] = run_distributed(
        config.parallel.world_size, train_job, config, sequences, output, steps=STEPS
    )
    assert result["skipped"] == [None] * STEPS
    weights = load_file(output)
    output.unlink()
    return Run(result["logprobs"], result["grad_norms"], result["metrics"], weights)


@pytest.fixture(scope="module", params=MODELS)
def reference(request, tmp_path_factory) -> Reference:
    path = tmp_path_factory.mktemp(request.param)
    save_tiny_model(path, **MODELS[request.param])
    sequences = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), sequences)
    sequences = with_old_logprobs(sequences, logprobs)
    run = train(path, sequences, {})
    return Reference(path, sequences, run, load_file(path / "model.safetensors"))


def update_error(run: Run, reference: Reference) -> float:
    """Relative L2 distance of the updates over all parameters together."""
    difference = update = 0.0
    for name, initial in reference.initial.items():
        expected = reference.run.weights[name] - initial
        difference += (run.weights[name] - reference.run.weights[name]).norm().item() ** 2
        update += expected.norm().item() ** 2
    assert update > 0
    return (difference / update) ** 0.5


def errors(run: Run, reference: Reference) -> tuple[float, float, float]:
    """(log-probs before training, grad norms of the steps, update of all steps)."""
    logprobs = (run.logprobs - reference.run.logprobs).abs().max().item()
    pairs = zip(run.grad_norms, reference.run.grad_norms, strict=True)
    norm = max(abs(a - b) / b for a, b in pairs)
    update = update_error(run, reference)
    print(f"log-probs {logprobs:.1e}, grad norm {norm:.1e}, update {update:.1e}")
    return logprobs, norm, update


@pytest.mark.parametrize("layout", EXACT)
def test_pipeline_and_data_parallel_equal_one_rank_bit_by_bit(reference, layout):
    logprobs, norm, update = errors(reference.packed(layout), reference)
    assert logprobs == 0
    assert norm < 1e-5
    assert update < 1e-5


@pytest.mark.parametrize("layout", CLOSE)
def test_tensor_and_context_parallel_equal_one_rank_up_to_rounding(reference, layout):
    logprobs, norm, update = errors(reference.packed(layout), reference)
    assert logprobs < 1e-4
    assert norm < 1e-5
    assert update < 1e-3


@pytest.mark.parametrize("layout", ["dp2", "cp2", "tp2", "pp2_vpp2"])
def test_padded_batches_train_like_packed_ones(reference, layout):
    batch = {"format": "padded", "tokens_per_micro_batch": 64}
    logprobs, norm, update = errors(reference.train(layout, batch=batch), reference)
    assert logprobs < 1e-4
    assert norm < 1e-5
    assert update < 1e-3


# Recomputed or not, the same layout does the same arithmetic.
@pytest.mark.parametrize(
    ("layout", "recompute"), [("tp2", "full"), ("pp2_vpp2", "full"), ("tp2", "selective")]
)
def test_recompute_changes_no_bit(reference, layout, recompute):
    model = {"path": reference.path, "recompute": recompute}
    run, plain = reference.train(layout, model=model), reference.packed(layout)
    assert run.grad_norms == plain.grad_norms
    assert all(torch.equal(run.weights[name], plain.weights[name]) for name in plain.weights)


@pytest.mark.parametrize("layout", ["tp2_pp2", "cp2", "dp2"])
def test_metrics_are_those_of_the_whole_batch_on_every_layout(reference, layout):
    run = reference.packed(layout)
    for ours, theirs in zip(run.metrics, reference.run.metrics, strict=True):
        assert ours == pytest.approx(theirs, rel=1e-3, abs=1e-5)
