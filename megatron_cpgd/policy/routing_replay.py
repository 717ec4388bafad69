"""Which experts the tokens go to: the routers' own choice, or routes that were recorded before.

Upstream's router leaves the top-k to an object in its place `router_replay`, if there is one
(megatron/core/transformer/moe/router_replay.py). Upstream keeps those of all models in one list;
ours belong to a chunk and know their layer, so that pipeline stages and other models are safe.

Replay fixes the choice alone: the gates come from the live scores of the chosen experts, so the
router keeps its gradient (arXiv:2510.11370).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import accumulate

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cpgd.data.packing import token_index
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

PIECE_BYTES = 64 << 20
"""Recorded routes are summed over the ranks so many bytes at a time."""

TopK = Callable[[Tensor, int, int | None, int | None], tuple[Tensor, Tensor]]


class LayerRouting:
    """The top-k of one router, where upstream has its `RouterReplay`."""

    def __init__(self, column: int) -> None:
        """
        Args:
            column: of this layer among all MoE layers of the model.
        """
        self.column = column
        self.choose: Callable[[Tensor], Tensor] | None = None
        """[tokens, top_k] of the router's own choice -> the experts to take; None: those."""
        self.own: Tensor | None = None
        """[tokens, top_k] of the router's own choice for the latest micro-batch."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[Tensor, Tensor]:
        """Upstream's name: scores [tokens, experts] -> scores and numbers [tokens, top_k]."""
        with torch.no_grad():
            _, experts = default_compute_topk(scores, topk, num_groups, group_topk)
            self.own = experts
            if self.choose is not None:
                experts = self.choose(experts)
            # The best first, as upstream has them where gradients are computed. The gates are
            # normalised in this order: in another one a replay would differ in the last bit.
            experts = experts.sort(dim=1).values
            order = scores.gather(1, experts).argsort(dim=1, descending=True, stable=True)
            experts = experts.gather(1, order)
        return scores.gather(1, experts), experts


class LayerReplay(MicroBatchQueue[Tensor]):
    """The routes of one layer during one pass over a batch, instead of the router's choice.

    Items: [tokens, top_k], -1 where there is none.
    """

    def __init__(self, disagreement: Tensor) -> None:
        """
        Args:
            disagreement: [2] int64; forward passes add the routes that are not the router's own
                choice, and all of them.
        """
        super().__init__()
        self._disagreement = disagreement

    def __call__(self, own: Tensor) -> Tensor:
        """`LayerRouting.choose`."""
        routes, recomputes = self.take()
        assert routes.shape == own.shape
        routes = routes.to(own)
        known = (routes >= 0).all(dim=1)
        if not recomputes:
            differs = (routes.sort(dim=1).values != own.sort(dim=1).values).any(dim=1)
            self._disagreement += torch.stack([(differs & known).sum(), known.sum()])
        return torch.where(known[:, None], routes, own)


class RoutingReplay:
    """The routers of this rank's pipeline chunks."""

    def __init__(
        self, models: Sequence[torch.nn.Module], config: TransformerConfig, info: ParallelInfo
    ) -> None:
        """Take over the choice of every router."""
        self._shape = (count_moe_layers(config), config.moe_router_topk)
        self._info = info
        self._disagreement = torch.zeros(2, dtype=torch.int64, device=device.current())
        self._layers: dict[torch.nn.Module, list[LayerRouting]] = {}
        for model, routers in find_routers(models, config).items():
            self._layers[model] = []
            for column, router in routers:
                router.router_replay = LayerRouting(column)
                self._layers[model].append(router.router_replay)

    @contextmanager
    def replaying(
        self, sequences: Sequence[LossSequence], *, backward: bool
    ) -> Iterator[ForwardContext]:
        """A pass whose tokens go where `LossSequence.routes` says, without one as the router says.

        Yields the context of each forward pass.
        """
        self._disagreement.zero_()
        replays = {routing: LayerReplay(self._disagreement) for routing in self._routings()}

        @contextmanager
        def forward(model: torch.nn.Module, batch: MicroBatch) -> Iterator[None]:
            routings = self._layers[model]
            columns = [routing.column for routing in routings]
            routes = self._local_routes(batch, sequences, columns)
            for routing, own in zip(routings, routes.unbind(1), strict=True):
                replays[routing].start_forward(own, backward=backward)
            yield

        with _choosing(replays):
            yield forward
        for replay in replays.values():
            replay.finish()

    @contextmanager
    def recording(
        self, sequences: Sequence[LossSequence]
    ) -> Iterator[tuple[ForwardContext, list[Tensor]]]:
        """A pass without backward whose routers choose freely. Collective over the world.

        Yields the context of each forward pass, and a list that gets the routes of each sequence
        at the end: [L, MoE layers, top_k] int16, on every rank.
        """
        lengths = [sequence.length for sequence in sequences]
        starts = [0, *accumulate(lengths)]
        flat = torch.zeros(starts[-1], *self._shape, dtype=torch.int16)
        chosen: dict[LayerRouting, Tensor] = {}

        @contextmanager
        def forward(model: torch.nn.Module, batch: MicroBatch) -> Iterator[None]:
            yield
            routings = self._layers[model]
            if not routings:
                return
            rows = router_order(token_index(batch, starts), batch, self._info)
            real = rows >= 0
            experts = torch.stack([chosen.pop(routing) for routing in routings], dim=1)
            columns = torch.tensor([routing.column for routing in routings])
            flat[rows[real, None], columns] = experts.to("cpu", torch.int16)[real]

        def keep(routing: LayerRouting, own: Tensor) -> Tensor:
            chosen[routing] = own
            return own

        routes: list[Tensor] = []
        with _choosing({routing: partial(keep, routing) for routing in self._routings()}):
            yield forward, routes
        # A token of a layer has one owner: a sum of bytes with zeros brings it to all ranks.
        for piece in flat.view(-1).view(torch.uint8).split(PIECE_BYTES):
            moved = piece.to(device.current())
            dist.all_reduce(moved)
            piece.copy_(moved)
        routes += flat.split(lengths)

    def disagreement(self) -> float:
        """Of the latest replay: share of (token, layer) with a route that is another set of experts
        than the router's own choice; NaN without routes. Collective over the world."""
        counts = self._disagreement.clone()
        dist.all_reduce(counts)
        differing, all_routes = counts.tolist()
        return differing / all_routes if all_routes else math.nan

    def _routings(self) -> list[LayerRouting]:
        return [routing for routings in self._layers.values() for routing in routings]

    def _local_routes(
        self, batch: MicroBatch, sequences: Sequence[LossSequence], columns: list[int]
    ) -> Tensor:
        """[tokens, columns, top_k] of the tokens that this rank's routers see, in their order."""
        parts, starts, total = [], {}, 0
        for i in batch.indices:
            if i < 0:  # filling
                continue
            routes = sequences[i].routes
            assert routes is not None and routes.shape == (sequences[i].length, *self._shape)
            parts.append(routes[:, columns])
            starts[i] = total
            total += len(routes)
        none = torch.full((1, len(columns), self._shape[1]), -1, dtype=torch.int16)
        rows = router_order(token_index(batch, starts), batch, self._info)
        return torch.cat([*parts, none])[rows].to(device.current())  # padding: -1, the last row


@contextmanager
def _choosing(choices: Mapping[LayerRouting, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    for routing, choose in choices.items():
        routing.choose = choose
    try:
        yield
    finally:
        for routing in choices:
            routing.choose = None
