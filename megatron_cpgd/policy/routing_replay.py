"""Which experts the tokens go to: the routers' own choice, or routes that were recorded before.

A choice is that of one token in one MoE layer: a set of experts.

Upstream's router leaves the top-k to an object in its place `router_replay`, if there is one
(megatron/core/transformer/moe/router_replay.py). Upstream keeps those of all models in one list;
ours belong to a chunk and know their layer, so that pipeline stages and other models are safe.

Replay fixes the choice alone: the gates come from the live scores of the chosen experts, so the
router keeps its gradient (arXiv:2510.11370).
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cpgd.data.packing import token_index
from megatron_cpgd.policy import device
from megatron_cpgd.policy.host_memory import fill_host_memory
from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.routers import (
    MicroBatchQueue,
    count_moe_layers,
    find_routers,
    router_order,
)
from megatron_cpgd.policy.schedule import ForwardContext
from megatron_cpgd.types import LossSequence, MicroBatch

NOT_NEEDED = -2
"""In place of the -1 of a route that is missing, where nothing depends on the choice: padding, and
the last token of a sequence, which the engine never fed."""

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
        self.watch: Callable[[Tensor], None] | None = None
        """Gets the router's own choice, whatever is taken; does not change a bit of the pass."""

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        default_compute_topk: TopK,
    ) -> tuple[Tensor, Tensor]:
        """Upstream's name: scores [tokens, experts] -> scores and numbers [tokens, top_k]."""
        own = default_compute_topk(scores, topk, num_groups, group_topk)
        self.own = own[1]
        if self.watch is not None:
            self.watch(own[1])
        if self.choose is None:
            return own
        with torch.no_grad():
            experts = self.choose(own[1])
            # The best first, as upstream has them where gradients are computed. The gates are
            # normalised in this order: in another one a replay would differ in the last bit.
            experts = experts.sort(dim=1).values
            order = scores.gather(1, experts).argsort(dim=1, descending=True, stable=True)
            experts = experts.gather(1, order)
        return scores.gather(1, experts), experts


class LayerReplay(MicroBatchQueue[Tensor]):
    """The routes of one layer during one pass over a batch, instead of the router's choice.

    Items: [tokens, top_k], negative where there is none.
    """

    def __init__(self, fallbacks: Tensor) -> None:
        """
        Args:
            fallbacks: [2] int64; forward passes add the choices that were left to the router for
                want of a route, and all that matter.
        """
        super().__init__()
        self._fallbacks = fallbacks

    def __call__(self, own: Tensor) -> Tensor:
        """`LayerRouting.choose`."""
        routes, recomputes = self.take()
        assert routes.shape == own.shape
        routes = routes.to(own)
        known = (routes >= 0).all(dim=1)
        if not recomputes:
            missing = (routes == -1).any(dim=1)
            self._fallbacks += torch.stack([missing.sum(), (missing | known).sum()])
        return torch.where(known[:, None], routes, own)


@dataclass(frozen=True, slots=True, kw_only=True)
class RouteAgreement:
    """How often the routers of a pass chose another set of experts than given routes; NaN without
    any route."""

    disagreement: float
    """Share of the choices."""
    by_layer: list[float]
    """[MoE layers] the same of each layer."""
    token_frac: float
    """Share of the tokens with such a choice in any layer."""


class RouteComparison:
    """The routers' own choices in one pass, beside given routes of the same tokens."""

    def __init__(self, layers: int, tokens: int) -> None:
        """Counters of this rank, on the device."""
        options: dict[str, Any] = {"dtype": torch.int32, "device": device.current()}
        self._by_layer = torch.zeros(layers, 2, **options)
        # Layers that differ, and layers with a route; padding has the last place.
        self._by_token = torch.zeros(tokens + 1, 2, **options)
        self._waiting: dict[LayerRouting, tuple[Tensor, Tensor]] = {}

    def start_forward(self, routing: LayerRouting, routes: Tensor, rows: Tensor) -> None:
        """The next choice of this router is that of a micro-batch's forward pass.

        Args:
            routes: [tokens, top_k], negative where there is none.
            rows: [tokens] place of each among all tokens of the pass, -1 for padding.
        """
        self._waiting[routing] = routes, rows

    def __call__(self, routing: LayerRouting, own: Tensor) -> None:
        """`LayerRouting.watch`."""
        routes, rows = self._waiting.pop(routing)
        routes = routes.to(own)
        known = (routes >= 0).all(dim=1)
        differs = known & (routes.sort(dim=1).values != own.sort(dim=1).values).any(dim=1)
        counts = torch.stack([differs, known], dim=1).int()
        self._by_layer[routing.column] += counts.sum(dim=0)
        self._by_token.index_add_(0, rows % len(self._by_token), counts)

    def agreement(self) -> RouteAgreement:
        """Of all ranks. Collective over the world."""
        assert not self._waiting, "the last forward pass has left its routes"
        by_layer, by_token = self._by_layer.clone(), self._by_token.clone()
        for counts in (by_layer, by_token):
            dist.all_reduce(counts)
        return RouteAgreement(
            disagreement=_share(by_layer.sum(dim=0)),
            by_layer=[_share(counts) for counts in by_layer],
            token_frac=_share((by_token > 0).sum(dim=0)),
        )


class RoutingReplay:
    """The routers of this rank's pipeline chunks."""

    def __init__(
        self, models: Sequence[torch.nn.Module], config: TransformerConfig, info: ParallelInfo
    ) -> None:
        """Take over the choice of every router."""
        self._shape = (count_moe_layers(config), config.moe_router_topk)
        self._info = info
        self._fallbacks = torch.zeros(2, dtype=torch.int64, device=device.current())
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
        self._fallbacks.zero_()
        replays = {routing: LayerReplay(self._fallbacks) for routing in self._routings()}
        given = [sequence.routes for sequence in sequences]

        @contextmanager
        def forward(model: torch.nn.Module, batch: MicroBatch) -> Iterator[None]:
            routings = self._layers[model]
            columns = [routing.column for routing in routings]
            routes = self._local_routes(batch, given, columns)
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
        own = flat.view(-1).view(torch.uint8)

        def add_up(part: slice) -> Tensor:
            # A token of a layer has one owner: a sum of bytes with zeros brings it to all ranks.
            moved = own[part].to(device.current())
            dist.all_reduce(moved)
            return moved

        whole = fill_host_memory(len(own), self._info.hosts, add_up)
        routes += whole.view(torch.int16).view(flat.shape).split(lengths)

    @contextmanager
    def comparing(
        self, routes: Sequence[Tensor]
    ) -> Iterator[tuple[ForwardContext, RouteComparison]]:
        """A pass without backward in which the routers' own choices are compared with `routes`.

        It may replay or record besides. Yields the context of each forward pass, and the counts.

        Args:
            routes: of each sequence of the pass, as `LossSequence.routes`.
        """
        starts = [0, *accumulate(map(len, routes))]
        comparison = RouteComparison(self._shape[0], starts[-1])

        @contextmanager
        def forward(model: torch.nn.Module, batch: MicroBatch) -> Iterator[None]:
            routings = self._layers[model]
            given = self._local_routes(batch, routes, [routing.column for routing in routings])
            rows = router_order(token_index(batch, starts), batch, self._info).to(device.current())
            for routing, own in zip(routings, given.unbind(1), strict=True):
                comparison.start_forward(routing, own, rows)
            yield

        for routing in self._routings():
            routing.watch = partial(comparison, routing)
        try:
            yield forward, comparison
        finally:
            for routing in self._routings():
                routing.watch = None

    def fallback_frac(self) -> float:
        """Of the latest replay: share of the choices that were left to the routers for want of a
        route; padding and the last token of a sequence do not count. Collective over the world."""
        counts = self._fallbacks.clone()
        dist.all_reduce(counts)
        missing, needed = counts.tolist()
        return missing / needed if needed else 0.0

    def _routings(self) -> list[LayerRouting]:
        return [routing for routings in self._layers.values() for routing in routings]

    def _local_routes(
        self, batch: MicroBatch, routes: Sequence[Tensor | None], columns: list[int]
    ) -> Tensor:
        """[tokens, columns, top_k] of the tokens that this rank's routers see, in their order."""
        parts, starts, total = [], {}, 0
        for i, length in zip(batch.indices, batch.lengths, strict=True):
            if i < 0:  # filling
                continue
            given = routes[i]
            assert given is not None and given.shape == (length, *self._shape)
            parts.append(given[:, columns])
            parts[-1][-1].masked_fill_(parts[-1][-1] < 0, NOT_NEEDED)  # a copy, by the list
            starts[i] = total
            total += length
        none = torch.full((1, len(columns), self._shape[1]), NOT_NEEDED, dtype=torch.int16)
        rows = router_order(token_index(batch, starts), batch, self._info)
        return torch.cat([*parts, none])[rows].to(device.current())  # padding: the last row


def _share(counts: Tensor) -> float:
    part, whole = counts.tolist()
    return part / whole if whole else math.nan


@contextmanager
def _choosing(choices: Mapping[LayerRouting, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    for routing, choose in choices.items():
        routing.choose = choose
    try:
        yield
    finally:
        for routing in choices:
            routing.choose = None
