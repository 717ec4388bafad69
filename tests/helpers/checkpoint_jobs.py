"""Jobs for `run_distributed` about checkpoints and damaged steps."""

from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing

from megatron_cpgd.algorithm.objective import Objective
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.policy import checkpoint
from megatron_cpgd.policy import policy as policy_module
from megatron_cpgd.policy.optimizer_shards import own_state
from megatron_cpgd.types import LossSequence
from tests.helpers.policy_jobs import OBJECTIVE, build_policy, train_job, write_weights


def save_job(config: ExperimentConfig, sequences: list[LossSequence], folder: Path) -> torch.Tensor:
    """Two steps, a checkpoint, one more step; returns the log-probs after the third."""
    policy = build_policy(config)
    for _ in range(2):
        policy.train_step(sequences, OBJECTIVE)
    policy.save(folder, {"step": 2})
    policy.train_step(sequences, OBJECTIVE)
    return torch.cat(policy.compute_logprobs(sequences))


def optimizer_state_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> tuple[bool, int, int]:
    """Save after a step; then read the folder as Megatron itself would.

    Returns:
        Whether that is what Megatron gathers from the optimizers of all ranks, bit by bit; elements
        of the state that this rank has given to be saved, and that it has.
    """
    policy = build_policy(config)
    policy.train_step(sequences, OBJECTIVE)
    policy.save(folder, {"step": 1})
    metadata = checkpoint.metadata()
    model = checkpoint.model_state(policy._chunks)
    parts = policy._optimizer.chained_optimizers
    upstream = [
        [
            part.sharded_param_state_fully_reshardable(model, is_loading=reads, metadata=metadata)
            for part in parts
        ]
        for reads in (True, False)
    ]
    gathered = _plain(upstream[1])
    read = dist_checkpointing.load({"state": upstream[0]}, str(folder))["state"]
    own = checkpoint._optimizer_state(policy._optimizer, model)[checkpoint._TENSORS]
    held = [
        tensor
        for part in parts
        for tensors in own_state(part).values()
        for tensor in tensors.values()
    ]
    return (
        _equal(read, gathered),
        sum(tensor.data.numel() for tensor in own.values()),
        sum(tensor.numel() for tensor in held),
    )


def incomplete_state_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> None:
    """Save after a step; the last rank forgets one of its parameters."""
    policy = build_policy(config)
    policy.train_step(sequences, OBJECTIVE)
    if dist.get_rank() == dist.get_world_size() - 1:
        checkpoint.own_state = lambda part: dict(list(own_state(part).items())[1:])
    policy.save(folder, {"step": 1})


def _plain(state: Any) -> Any:
    """Copies of the data of sharded tensors."""
    if isinstance(state, dict):
        return {key: _plain(value) for key, value in state.items()}
    if isinstance(state, list):
        return [_plain(value) for value in state]
    return state.data.clone()


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, dict):
        return one.keys() == other.keys() and all(_equal(one[key], other[key]) for key in one)
    if isinstance(one, list):
        return all(_equal(a, b) for a, b in zip(one, other, strict=True))
    return torch.equal(one, other)


def gathered_save_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> torch.Tensor:
    """`save_job` with the optimizer's state as Megatron itself gathers and writes it."""

    def gathered(optimizer: Any, model: dict[str, Any]) -> dict[str, Any]:
        return {"optimizer": optimizer.sharded_state_dict(model, metadata=checkpoint.metadata())}

    checkpoint._optimizer_state = gathered
    return save_job(config, sequences, folder)


def continue_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> dict[str, Any]:
    """Load the checkpoint and take the third step."""
    policy = build_policy(config)
    state = policy.load(folder)
    policy.train_step(sequences, OBJECTIVE)
    return {
        "state": state,
        "optimizer_steps": policy.optimizer_steps,
        "logprobs": torch.cat(policy.compute_logprobs(sequences)),
    }


class _BrokenObjective(Objective):
    def evaluate(self, *args: Any) -> Any:
        loss, statistics = super().evaluate(*args)
        return loss * torch.nan, statistics


def broken_step_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> tuple[list[str | None], int]:
    """A step with a gradient of NaN between two good ones; weights around the broken one, in the
    end, and after the good steps alone. Returns what was skipped, and the clock."""
    policy = build_policy(config)
    broken = _BrokenObjective(config=OBJECTIVE.config)
    skipped = [policy.train_step(sequences, OBJECTIVE).skipped]
    write_weights(policy, folder / "before")
    skipped.append(policy.train_step(sequences, broken).skipped)
    write_weights(policy, folder / "after")
    skipped.append(policy.train_step(sequences, OBJECTIVE).skipped)
    write_weights(policy, folder / "end")
    undisturbed = build_policy(config)
    for _ in range(2):
        undisturbed.train_step(sequences, OBJECTIVE)
    write_weights(undisturbed, folder / "undisturbed")
    return skipped, policy.optimizer_steps


class _PoisonedRank(Objective):
    """One rank's first gradient becomes NaN: before the replicas' sum where it computes a loss."""

    __slots__ = ("policy", "rank")

    def evaluate(self, *args: Any) -> Any:
        self._poison()
        return super().evaluate(*args)

    def reduce(self, *args: Any) -> dict[str, float]:
        self._poison()
        return super().reduce(*args)

    def _poison(self) -> None:
        if dist.get_rank() == self.rank:
            next(self.policy._chunks[0].parameters()).main_grad.fill_(torch.nan)


def poisoned_rank_job(
    config: ExperimentConfig, sequences: list[LossSequence], rank: int, before: Path, after: Path
) -> list[str | None]:
    """A good step, one in which a single rank has a gradient of NaN, and a good one again."""
    policy = build_policy(config)
    poisoned = _PoisonedRank(config=OBJECTIVE.config)
    object.__setattr__(poisoned, "policy", policy)
    object.__setattr__(poisoned, "rank", rank)
    skipped = [policy.train_step(sequences, OBJECTIVE).skipped]
    write_weights(policy, before)
    skipped.append(policy.train_step(sequences, poisoned).skipped)
    write_weights(policy, after)
    skipped.append(policy.train_step(sequences, OBJECTIVE).skipped)
    return skipped


def roll_back_job(
    config: ExperimentConfig, sequences: list[LossSequence], folder: Path
) -> dict[str, Any]:
    """Two steps, a checkpoint, three more, back to the checkpoint, and the third step again.

    Weights are written to saved, restored, third and third_again.safetensors in `folder`.
    """
    policy = build_policy(config)
    for _ in range(2):
        policy.train_step(sequences, OBJECTIVE)
    write_weights(policy, folder / "saved.safetensors")
    policy.save(folder / "step_000002", {"step": 2})
    policy.train_step(sequences, OBJECTIVE)
    write_weights(policy, folder / "third.safetensors")
    for _ in range(2):
        policy.train_step(sequences, OBJECTIVE)
    policy.roll_back(folder / "step_000002", lr_factor=1.0)
    write_weights(policy, folder / "restored.safetensors")
    clock = policy.optimizer_steps, policy.updates
    policy.train_step(sequences, OBJECTIVE)
    write_weights(policy, folder / "third_again.safetensors")
    policy.roll_back(folder / "step_000002", lr_factor=0.5)
    policy.roll_back(folder / "step_000002", lr_factor=0.5)
    return {
        "clock": clock,
        "learning_rate": policy.train_step(sequences, OBJECTIVE).learning_rate,
    }


def upstream_step_job(
    config: ExperimentConfig, sequences: list[LossSequence], weights: Path
) -> dict[str, Any]:
    """As `train_job`, with Megatron's own `optimizer.step()`."""
    policy_module.apply_gradients = lambda optimizer, optim, norm: optimizer.step()
    return train_job(config, sequences, weights)
