"""The policy: this rank's shard of the model, its optimizer, and what the loop does with them."""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from megatron_cpgd.algorithm.sequences import Sequences
from megatron_cpgd.config.fp8_checks import FP8_MULTIPLES
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.data.packing import unpack_tokens
from megatron_cpgd.policy import device
from megatron_cpgd.policy.checkpoint import load_checkpoint, save_checkpoint
from megatron_cpgd.policy.logprobs import LogprobSettings
from megatron_cpgd.policy.model import build_chunks, wrap_precision
from megatron_cpgd.policy.offload import DeviceState
from megatron_cpgd.policy.optimizer import (
    apply_gradients,
    build_optimizer,
    gradient_norm,
    learning_rate,
    set_learning_rate,
    wrap_data_parallel,
    zero_gradients,
)
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.reference import ReferenceWeights
from megatron_cpgd.policy.router_balance import RouterBalance
from megatron_cpgd.policy.routing_replay import RouteAgreement, RouteComparison, RoutingReplay
from megatron_cpgd.policy.schedule import (
    ForwardContext,
    LocalTokens,
    Schedule,
    batch_sequences,
    local_positions,
    plan_rank_micro_batches,
    run_schedule,
)
from megatron_cpgd.policy.shards import Shards, load_hf_weights
from megatron_cpgd.policy.transformer_config import build_transformer_config
from megatron_cpgd.types import LossSequence, MicroBatch
from megatron_cpgd.weights.buckets import Piece
from megatron_cpgd.weights.engine_format import EngineFormat
from megatron_cpgd.weights.fingerprint import Fingerprints
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.table import WeightTable


class TokenLoss[S](Protocol):
    """An objective as the policy sees it: a plain sum over tokens, and statistics that add up."""

    def evaluate(
        self, logprobs: Tensor, entropy: Tensor, tokens: LocalTokens, sequences: Sequences
    ) -> tuple[Tensor, S]:
        """Scalar sum over tokens["loss_mask"], and statistics of the same tokens.

        The sum is differentiable also when the mask is empty. All ranks of a context-parallel group
        call this together, on the same micro-batch.
        """

    def reduce(self, parts: list[S], all_reduce: Callable[[Tensor, Any], None]) -> dict[str, float]:
        """Metrics over all parts of all ranks; `all_reduce(tensor, op)` works in place."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepResult:
    """What one optimizer step did."""

    skipped: str | None
    """Why the weights are as before, e.g. "loss is nan"; None: they were updated."""
    grad_norm: float
    learning_rate: float
    metrics: dict[str, float]
    """Of the objective and the routers, over the mini-batch; equal on every rank."""


class Policy:
    """One rank of the trained model. All methods are collectives over the world."""

    def __init__(
        self, config: ExperimentConfig, info: ParallelInfo, checkpoint: HfCheckpoint,
        table: WeightTable,
    ) -> None:  # fmt: skip
        """Build the shard and load it from the Hugging Face checkpoint."""
        self.info = info
        self._table = table
        self._hf_source = config.model.path
        self._optim = config.optim
        self._batch = config.batch
        self._total_steps = (
            config.run.steps * config.algorithm.mini_batches * config.algorithm.epochs
        )
        transformer = build_transformer_config(
            checkpoint.config, config.model, config.parallel, config.precision
        )
        self._chunks = build_chunks(transformer, checkpoint.config, info)
        wrapped = [wrap_precision(transformer, chunk) for chunk in self._chunks]
        load_hf_weights(self._chunks, table, checkpoint, info)
        self.shards = Shards(self._chunks, table, info)
        self._models = wrap_data_parallel(transformer, config.optim, wrapped)
        self._optimizer = build_optimizer(transformer, config.optim, self._models)
        self._state = DeviceState(self._models, self._optimizer)
        self._shares_gpus, self._offloads = config.rollout.sleep, config.optim.offload
        spreads_experts = info.ep_size * info.etp_size > 1
        self._schedule = Schedule(
            models=list(self._models),
            info=info,
            logprobs=LogprobSettings(
                vocab_size=checkpoint.config["vocab_size"],
                temperature=config.rollout.temperature,
                chunk_tokens=config.batch.logprob_chunk_tokens,
            ),
            batch_format=config.batch.format,
            rank_multiple=FP8_MULTIPLES.get(config.precision.recipe or "", 1),
            # Pipeline stages exchange tensors of one shape; the gathering dispatcher takes the same
            # number of tokens from every rank.
            common_shape=info.pp_size > 1
            or (transformer.moe_token_dispatcher_type == "allgather" and spreads_experts),
        )
        self._routing: RoutingReplay | None = None
        self._comparison: RouteComparison | None = None
        if config.algorithm.routing_replay != "none" or config.needs_rollout_routes:
            self._routing = RoutingReplay(self._models, transformer, info)
        self._balance: RouterBalance | None = None
        # A captured graph does not ask which tokens are real.
        if transformer.num_moe_experts and transformer.cuda_graph_impl == "none":
            self._balance = RouterBalance(self._models, transformer, config.router, info)
        self._reference: ReferenceWeights | None = None
        if config.reference_path is not None:
            with HfCheckpoint.open(config.reference_path) as reference:
                self._reference = ReferenceWeights(self._chunks, table, reference, info)
        self.optimizer_steps = 0
        """Optimizer steps so far, skipped ones included: the clock of the learning rate."""
        self.updates = 0
        """Optimizer steps that changed the weights."""
        self.lr_scale = 1.0
        """Factor of the learning rate; each roll back makes it smaller."""

    def compute_logprobs(
        self, sequences: Sequence[LossSequence], *, compare_with: Sequence[Tensor] | None = None
    ) -> list[Tensor]:
        """[T] float32 CPU log-probs of each sequence's response under the current weights.

        Args:
            compare_with: routes of each sequence; `route_agreement` then compares the routers' own
                choices with them. That changes no bit of the log-probs.
        """
        if not sequences:  # on every rank: they all have the same list
            return []
        with (
            self._replaying(sequences, backward=False) as replaying,
            self._comparing(compare_with) as comparing,
        ):
            return self._forward_logprobs(sequences, [*replaying, *comparing])

    def record_routes(
        self, sequences: Sequence[LossSequence], *, compare_with: Sequence[Tensor] | None = None
    ) -> tuple[list[Tensor], list[Tensor]]:
        """As `compute_logprobs` without routes, and the routes of each sequence."""
        if not sequences:
            return [], []
        with (
            self._routers.recording(sequences) as (recording, routes),
            self._comparing(compare_with) as comparing,
        ):
            logprobs = self._forward_logprobs(sequences, [recording, *comparing])
        return logprobs, routes

    def route_agreement(self) -> RouteAgreement:
        """Of the latest pass with `compare_with`."""
        assert self._comparison is not None, "no pass has compared routes"
        return self._comparison.agreement()

    def fallback_frac(self) -> float:
        """Of the latest pass with routes: the share of (token, MoE layer) without one, which were
        left to the routers; neither padding nor the last token of a sequence counts."""
        return self._routers.fallback_frac()

    @torch.no_grad()
    def _forward_logprobs(
        self, sequences: Sequence[LossSequence], forward_contexts: Sequence[ForwardContext]
    ) -> list[Tensor]:
        budget = self._batch.tokens_per_logprob_batch or 2 * self._batch.tokens_per_micro_batch
        micro_batches = plan_rank_micro_batches(sequences, self._schedule, budget)
        offsets = [0]
        for sequence in sequences:
            offsets.append(offsets[-1] + sequence.response_length)
        # Every token has one owner; a sum with zeros brings it to all ranks bit by bit.
        flat = torch.zeros(offsets[-1])
        owner = parallel_state.is_pipeline_last_stage() and self.info.tp_rank == 0

        def collect(
            batch: MicroBatch, tokens: LocalTokens, logprobs: Tensor, entropy: Tensor
        ) -> tuple[None, None]:
            if owner:
                full = torch.zeros(batch.input_ids.shape)
                full[:, local_positions(batch, self.info)] = logprobs.cpu()
                for i, values in unpack_tokens(full, batch).items():
                    flat[offsets[i] : offsets[i + 1]] = values
            return None, None

        for model in self._models:
            model.eval()
        run_schedule(
            self._schedule,
            micro_batches,
            collect,
            forward_only=True,
            forward_contexts=forward_contexts,
        )
        for model in self._models:
            model.train()
        _all_reduce(flat, dist.ReduceOp.SUM)
        return list(flat.split([sequence.response_length for sequence in sequences]))

    def compute_reference_logprobs(self, sequences: Sequence[LossSequence]) -> list[Tensor]:
        """As `compute_logprobs`, of the reference policy, whose routers choose for themselves; the
        weights are the same afterwards."""
        assert self._reference is not None, "no reference policy: algorithm.reference.coef is 0"
        with self._reference.swapped_in():
            return self.compute_logprobs([replace(each, routes=None) for each in sequences])

    def train_step[S](
        self, sequences: Sequence[LossSequence], objective: TokenLoss[S]
    ) -> StepResult:
        """One optimizer step on one mini-batch, the same list on every rank.

        A loss or gradient that is not finite leaves weights and optimizer state untouched.
        """
        micro_batches = plan_rank_micro_batches(
            sequences, self._schedule, self._batch.tokens_per_micro_batch
        )

        def compute(
            batch: MicroBatch, tokens: LocalTokens, logprobs: Tensor, entropy: Tensor
        ) -> tuple[Tensor, S]:
            sequences = batch_sequences(batch, self.info)
            return objective.evaluate(logprobs, entropy.detach(), tokens, sequences)

        zero_gradients(self._models, self._optimizer)
        with (
            self._replaying(sequences, backward=True) as replaying,
            self._balancing(sequences) as balancing,
        ):
            parts = run_schedule(
                self._schedule,
                micro_batches,
                compute,
                forward_only=False,
                forward_contexts=[*replaying, *balancing],
            )
        # The tensor-parallel ranks hold the same statistics: one of them speaks.
        metrics = objective.reduce(parts if self.info.tp_rank == 0 else [], _all_reduce)
        if replaying:
            metrics["routing/fallback_frac"] = self.fallback_frac()
        if self._balance:
            metrics |= self._balance.reduce()
        lr = learning_rate(self._optim, self.optimizer_steps, self._total_steps) * self.lr_scale
        set_learning_rate(self._optimizer, self._optim, lr)
        norm = gradient_norm(self._optimizer)
        grad_norm = float(norm)
        skipped = _not_finite(metrics, grad_norm)
        if skipped is None:
            apply_gradients(self._optimizer, self._optim, norm)
            if self._balance:
                self._balance.update_biases()
            self.updates += 1
        self.optimizer_steps += 1
        return StepResult(skipped=skipped, grad_norm=grad_norm, learning_rate=lr, metrics=metrics)

    @property
    def _routers(self) -> RoutingReplay:
        assert self._routing is not None, "neither routing_replay nor routing_every is set"
        return self._routing

    @contextmanager
    def _replaying(
        self, sequences: Sequence[LossSequence], *, backward: bool
    ) -> Iterator[list[ForwardContext]]:
        """The context of each forward pass if the sequences have routes."""
        if sequences[0].routes is None:
            yield []
            return
        with self._routers.replaying(sequences, backward=backward) as forward_context:
            yield [forward_context]

    @contextmanager
    def _balancing(self, sequences: Sequence[LossSequence]) -> Iterator[list[ForwardContext]]:
        """The context of each forward pass of a mixture of experts."""
        if self._balance is None:
            yield []
            return
        with self._balance.training(sequences) as forward_context:
            yield [forward_context]

    @contextmanager
    def _comparing(self, routes: Sequence[Tensor] | None) -> Iterator[list[ForwardContext]]:
        """The context of each forward pass if there are routes to compare with."""
        if routes is None:
            yield []
            return
        with self._routers.comparing(routes) as (forward_context, self._comparison):
            yield [forward_context]

    def release(self) -> None:
        """Leave the GPUs to engines that share them; on return all ranks have done so.

        Cached memory goes, and with `optim.offload` the state, until `reload`.
        """
        if not self._shares_gpus:
            return
        if self._offloads:
            self._state.offload()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        dist.barrier()

    def reload(self) -> None:
        """Bring back what `release` took off the device; all engines must sleep by then."""
        self._state.reload()

    def write_weights(self, view: Callable[[str], Tensor] | None) -> None:
        """Write the model into full Hugging Face tensors; on return all ranks have written.

        Args:
            view: None on ranks that do not share rank 0's host.
        """
        self.reload()
        self.shards.write(view)

    def write_engine_weights(
        self, view: Callable[[str], Tensor] | None, format: EngineFormat
    ) -> Fingerprints:
        """See `Shards.write_for_engine`."""
        self.reload()
        return self.shards.write_for_engine(view, format)

    def iter_pieces(self) -> Iterator[Piece]:
        """Every part of a full Hugging Face tensor that this rank holds: name, place, view of the
        weight. No collective."""
        return self.shards.iter_pieces()

    def save(
        self, path: Path, trainer_state: dict[str, Any], files: Mapping[str, bytes] | None = None
    ) -> None:
        """Save weights, optimizer and `trainer_state` as a distributed checkpoint.

        Args:
            files: of rank 0, to be laid beside them: name -> content.
        """
        self.reload()
        steps = {
            "optimizer_steps": self.optimizer_steps,
            "updates": self.updates,
            "lr_scale": self.lr_scale,
        }
        # Before its first update Adam has no state, which upstream cannot save.
        optimizer = self._optimizer if self.updates else None
        state = steps | trainer_state
        save_checkpoint(
            path, self._chunks, optimizer, state, hf_source=self._hf_source, table=self._table,
            files=files,
        )  # fmt: skip

    def load(self, path: Path) -> dict[str, Any]:
        """Continue from a checkpoint of any layout; returns its trainer state."""
        self.reload()
        state = load_checkpoint(path, self._chunks, self._optimizer)
        self.optimizer_steps, self.updates = state["optimizer_steps"], state["updates"]
        self.lr_scale = state.get("lr_scale", 1.0)
        return state

    def roll_back(self, path: Path, *, lr_factor: float) -> None:
        """Take weights and Adam's state of an earlier checkpoint; the schedule goes on, scaled."""
        clock, lr_scale = self.optimizer_steps, self.lr_scale * lr_factor
        self.load(path)
        self.optimizer_steps, self.lr_scale = clock, lr_scale


def _all_reduce(tensor: Tensor, op: Any) -> None:
    """In place over the world, whatever device the tensor is on."""
    moved = tensor.to(device.current())
    dist.all_reduce(moved, op=op)
    tensor.copy_(moved)


def _not_finite(metrics: dict[str, float], grad_norm: float) -> str | None:
    """Which number of a step is not finite. Reduced over all ranks, so all of them agree."""
    for name, value in [*metrics.items(), ("gradient norm", grad_norm)]:
        if not math.isfinite(value):
            return f"{name} is {value}"
    return None
