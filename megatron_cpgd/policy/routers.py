"""The routers of this rank's pipeline chunks, and the order in which they see their tokens."""

from collections import deque
from collections.abc import Sequence

import torch
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_cpgd.policy.parallel import ParallelInfo
from megatron_cpgd.policy.schedule import local_positions
from megatron_cpgd.types import MicroBatch


def count_moe_layers(config: TransformerConfig) -> int:
    """MoE layers of the whole model."""
    return len(_moe_layers(config))


def find_routers(
    models: Sequence[torch.nn.Module], config: TransformerConfig
) -> dict[torch.nn.Module, list[tuple[int, TopKRouter]]]:
    """The routers of each chunk, with their column: the place among all MoE layers of the model."""
    columns = {layer: column for column, layer in enumerate(_moe_layers(config))}
    return {
        model: [
            (columns[module.layer_number - 1], module)  # counts from 1 over all layers
            for module in model.modules()
            if isinstance(module, TopKRouter)
        ]
        for model in models
    }


def router_order(values: Tensor, batch: MicroBatch, info: ParallelInfo) -> Tensor:
    """[B, S] of a micro-batch -> [tokens] in the order in which this rank's routers see them.

    Hidden states are [S / cp, B, H], and with sequence parallelism cut along S over TP.
    """
    local = values[:, local_positions(batch, info)].T
    if info.sequence_parallel:
        local = local.chunk(info.tp_size)[info.tp_rank]
    return local.reshape(-1)


class MicroBatchQueue[T]:
    """What a layer needs to know of the micro-batch that it computes, during one pass over a batch.

    It asks in each forward pass, and once more if the backward pass recomputes it. In every
    schedule a chunk's backward passes have the order of its forward passes.
    """

    def __init__(self) -> None:
        self._forward: T | None = None
        self._backward: deque[T] = deque()
        self.forwards = 0
        self.recomputed = 0

    def start_forward(self, item: T, *, backward: bool) -> None:
        """The next to ask is a micro-batch's forward pass.

        Args:
            backward: a backward pass follows, which may recompute the layer.
        """
        assert self._forward is None, "the forward pass before did not ask"
        self._forward = item
        self.forwards += 1
        if backward:
            self._backward.append(item)

    def take(self) -> tuple[T, bool]:
        """The item of the micro-batch, and whether this is a recomputation."""
        recomputes = self._forward is None
        item = self._backward.popleft() if recomputes else self._forward
        self._forward = None
        self.recomputed += recomputes
        assert item is not None
        return item, recomputes

    def finish(self) -> None:
        """The pass is over: every forward pass has asked, every recomputation too."""
        assert self._forward is None, "the last forward pass did not ask"
        assert self.recomputed in (0, self.forwards), f"{self.recomputed=} {self.forwards=}"


def _moe_layers(config: TransformerConfig) -> list[int]:
    assert isinstance(config.moe_layer_freq, list)
    return [i for i, has_experts in enumerate(config.moe_layer_freq) if has_experts]
