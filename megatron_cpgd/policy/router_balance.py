"""Load balancing of the routers: losses, loads and the update of selection biases.

Upstream's own losses count padding, and their normalisation depends on the micro-batches. Here each
is a plain sum over the real tokens of a mini-batch, with coefficients that are known before any
split (docs/architecture.md). They look at the live routers, also where routes are replayed.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.transformer.moe.moe_utils import compute_routing_scores_for_aux_loss
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cpgd.config.router import RouterConfig
from megatron_cpgd.data.packing import input_sequence_index
from megatron_cpgd.policy import device
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.routers import (
    MicroBatchQueue,
    count_moe_layers,
    find_routers,
    router_order,
)
from megatron_cpgd.policy.schedule import ForwardContext
from megatron_cpgd.types import LossSequence, MicroBatch


@dataclass(frozen=True, slots=True, kw_only=True)
class RouterTokens:
    """The tokens of a micro-batch at a router of this rank, in its order."""

    real: Tensor
    """[tokens] bool, no padding and no filling."""
    sequence: Tensor
    """[tokens] int64, number of the token's sequence within the micro-batch; any at padding."""
    lengths: Tensor
    """[sequences] float32, real tokens of each, over all ranks."""


def sequence_aux_loss(
    logits: Tensor,
    tokens: RouterTokens,
    *,
    top_k: int,
    score_function: str,
    group: dist.ProcessGroup,
) -> Tensor:
    """This rank's part of the sum over sequences of sum_e f_e P_e (arXiv:2412.19437, Eq. 17-20).

    Collective over `group`, whose ranks hold the tokens of the same sequences. The choice has no
    gradient: with f of all ranks, what is left is a plain sum over tokens.

    Args:
        logits: [tokens, experts].
    """
    chosen, scores = compute_routing_scores_for_aux_loss(
        logits, top_k, score_function, padding_mask=~tokens.real
    )
    none = torch.zeros(len(tokens.lengths), logits.size(1), device=logits.device)
    counts = none.index_add(0, tokens.sequence, chosen.float())
    if group.size() > 1:
        dist.all_reduce(counts, group=group)
    lengths = tokens.lengths[:, None]
    f = counts * logits.size(1) / (top_k * lengths)
    p = none.index_add(0, tokens.sequence, scores) / lengths
    return (f * p).sum()


def z_loss(logits: Tensor, tokens: RouterTokens) -> Tensor:
    """The sum over real tokens of the squared log-sum-exp (arXiv:2202.08906, Eq. 5)."""
    return torch.where(tokens.real, logits.float().logsumexp(1), 0.0).square().sum()


class AddedLoss(torch.autograd.Function):
    """The logits as they are; a backward pass through them also differentiates a loss of them."""

    @staticmethod
    def forward(context: Any, logits: Tensor, loss: Tensor) -> Tensor:
        return logits.view_as(logits)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> tuple[Tensor, Tensor]:
        return gradient, gradient.new_ones(())


class LayerBalance:
    """What surrounds the choice of one router, in the place of its `routing`."""

    def __init__(self, column: int, router: TopKRouter) -> None:
        self.column = column
        self.router = router
        self.route = router.routing
        self.queue: MicroBatchQueue[RouterTokens] | None = None
        """Of the training pass that goes on; None: there is none."""


class RouterBalance:
    """The routers of this rank's pipeline chunks."""

    def __init__(
        self,
        models: Sequence[torch.nn.Module],
        config: TransformerConfig,
        settings: RouterConfig,
        info: ParallelInfo,
    ) -> None:
        """Surround the choice of every router."""
        self._config = config
        self._settings = settings
        self._info = info
        self._layers: dict[torch.nn.Module, list[LayerBalance]] = {}
        for model, routers in find_routers(models, config).items():
            self._layers[model] = [LayerBalance(column, router) for column, router in routers]
            for layer in self._layers[model]:
                layer.router.routing = partial(self._route, layer)
        shape = (count_moe_layers(config), config.num_moe_experts)
        self._loads = torch.zeros(shape, dtype=torch.int64, device=device.current())
        """[MoE layers, experts] tokens of the latest mini-batch that a router chose an expert for;
        of this rank until `reduce`."""
        self._losses = torch.zeros(2, dtype=torch.float64, device=device.current())
        """Sums of both losses over the latest mini-batch and all layers; as the loads."""
        self._num_sequences = self._num_tokens = 0

    @contextmanager
    def training(self, sequences: Sequence[LossSequence]) -> Iterator[ForwardContext]:
        """Forward and backward passes of one mini-batch, the same on every rank.

        Yields the context of each forward pass.
        """
        self._num_sequences = len(sequences)
        self._num_tokens = sum(sequence.length for sequence in sequences)
        self._loads.zero_()
        self._losses.zero_()
        layers = [layer for layers in self._layers.values() for layer in layers]
        queues = [MicroBatchQueue[RouterTokens]() for _ in layers]

        @contextmanager
        def forward(model: torch.nn.Module, batch: MicroBatch) -> Iterator[None]:
            tokens = self._local_tokens(batch)
            for layer in self._layers[model]:
                assert layer.queue is not None
                layer.queue.start_forward(tokens, backward=True)
            yield

        try:
            for layer, queue in zip(layers, queues, strict=True):
                layer.queue = queue
            yield forward
        finally:
            for layer in layers:
                layer.queue = None
        for queue in queues:
            queue.finish()

    def reduce(self) -> dict[str, float]:
        """Loads and losses of the latest mini-batch over all ranks; returns the metrics.

        Collective over the world: each token of each layer was at one router.
        """
        dist.all_reduce(self._loads)
        dist.all_reduce(self._losses)
        aux, z = (self._losses / len(self._loads)).tolist()
        metrics = {}
        if self._settings.aux_loss_coef > 0:
            metrics["router/aux_loss"] = aux / self._num_sequences
        if self._settings.z_loss_coef > 0:
            metrics["router/z_loss"] = z / self._num_tokens
        loads = self._loads / self._loads.double().mean(dim=1, keepdim=True)
        return metrics | {
            "router/load_max": loads.max().item(),
            "router/load_min": loads.min().item(),
        }

    @torch.no_grad()
    def update_biases(self) -> None:
        """Make experts that the latest mini-batch overloaded less attractive; after `reduce`."""
        rate = self._settings.bias_update_rate
        if rate == 0:
            return
        for layers in self._layers.values():
            for layer in layers:
                loads = self._loads[layer.column]
                excess = loads * len(loads) - loads.sum()  # integers: the same sign on every rank
                layer.router.expert_bias -= rate * excess.sign()

    def _route(
        self, layer: LayerBalance, logits: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Upstream's `TopKRouter.routing`: [S, B, experts] -> gates and choice, [tokens, experts].

        Every micro-batch comes with gradients once: in its forward pass, or in its recomputation.
        """
        if layer.queue is None:
            return layer.route(logits, padding_mask)  # type: ignore[no-any-return]
        tokens, recomputes = layer.queue.take()
        if torch.is_grad_enabled():
            logits = self._with_losses(logits.flatten(0, 1), tokens).view_as(logits)
        gates, chosen = layer.route(logits, padding_mask)
        if not recomputes:
            own, replay = chosen, layer.router.router_replay
            if replay is not None:  # what was chosen may be replayed
                own = torch.zeros_like(chosen).scatter(1, replay.own, True)
            self._loads[layer.column] += (own & tokens.real[:, None]).sum(dim=0)
        return gates, chosen

    def _with_losses(self, logits: Tensor, tokens: RouterTokens) -> Tensor:
        """The same logits, [tokens, experts], with the gradient of the losses."""
        settings, config = self._settings, self._config
        loss = logits.new_zeros(())
        if settings.aux_loss_coef > 0:
            aux = sequence_aux_loss(
                logits,
                tokens,
                top_k=config.moe_router_topk,
                score_function=config.moe_router_score_function,
                group=parallel_state.get_tensor_and_context_parallel_group(),
            )
            loss = loss + settings.aux_loss_coef / self._num_sequences * aux
            self._losses[0] += aux.detach()
        if settings.z_loss_coef > 0:
            z = z_loss(logits, tokens)
            loss = loss + settings.z_loss_coef / self._num_tokens * z
            self._losses[1] += z.detach()
        if not loss.requires_grad:
            return logits
        # DDP averages over the ranks that hold the same parameters; the losses are sums.
        with_loss: Tensor = AddedLoss.apply(  # type: ignore[no-untyped-call]
            logits, loss * self._info.replica_size
        )
        return with_loss

    def _local_tokens(self, batch: MicroBatch) -> RouterTokens:
        index = router_order(input_sequence_index(batch), batch, self._info).to(device.current())
        return RouterTokens(
            real=index >= 0,
            sequence=index.clamp(min=0),
            lengths=torch.tensor(batch.lengths, dtype=torch.float32, device=index.device),
        )
