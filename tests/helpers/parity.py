"""Training under a layout against the same training on one rank."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from tests.helpers.policy_jobs import logprobs_job, train_job, with_old_logprobs
from tests.helpers.ranks import run_distributed
from tests.helpers.tiny import save_tiny_model, tiny_config, tiny_sequences


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
    steps: int
    run: Run
    initial: dict[str, torch.Tensor]
    plain_runs: dict[str, Run] = field(default_factory=dict)
    """By layout: several tests look at the same training."""

    def train(self, parallel: dict[str, Any], **sections: Any) -> Run:
        return train(self.path, self.sequences, self.steps, parallel=parallel, **sections)

    def plain(self, parallel: dict[str, Any]) -> Run:
        """The training without further settings."""
        key = str(parallel)
        if key not in self.plain_runs:
            self.plain_runs[key] = self.train(parallel)
        return self.plain_runs[key]


def train(path: Path, sequences: list, steps: int, **sections: Any) -> Run:
    config = tiny_config(path, **sections)
    output = path / "trained.safetensors"
    [result, *_] = run_distributed(
        config.parallel.world_size, train_job, config, sequences, output, steps=steps
    )
    assert result["skipped"] == [None] * steps
    weights = load_file(output)
    output.unlink()
    return Run(result["logprobs"], result["grad_norms"], result["metrics"], weights)


def make_reference(path: Path, architecture: str, *, steps: int, **overrides: Any) -> Reference:
    """Save a tiny model to `path` and train it on one rank."""
    save_tiny_model(path, architecture, **overrides)
    sequences = tiny_sequences()
    [logprobs] = run_distributed(1, logprobs_job, tiny_config(path), sequences)
    sequences = with_old_logprobs(sequences, logprobs)
    run = train(path, sequences, steps)
    return Reference(path, sequences, steps, run, load_file(path / "model.safetensors"))


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
