"""An engine's routes of one rollout as a record, checked where they enter."""

from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from megatron_cpgd.errors import RolloutError
from megatron_cpgd.types import RouteLayout, Routes


def pack_moe_layers(experts: NDArray[np.integer], layout: RouteLayout, *, tokens: int) -> Routes:
    """As `pack_routes`, of an array [tokens - 1, all layers, top_k] with zeros in dense layers."""
    if np.delete(experts, layout.layers, axis=1).any():
        raise RolloutError(
            f"routes: the engine returned some outside of the MoE layers {layout.layers}, "
            f"among {experts.shape[1]} layers"
        )
    return pack_routes(experts[:, layout.layers], layout, tokens=tokens)


def pack_routes(experts: NDArray[np.integer], layout: RouteLayout, *, tokens: int) -> Routes:
    """The record of one rollout.

    Args:
        experts: [tokens - 1, layers, top_k] numbers of experts, only of the MoE layers.
        tokens: of prompt and response.

    Raises:
        RolloutError: these cannot be what a router has chosen.
    """
    shape = (tokens - 1, len(layout.layers), layout.top_k)
    if experts.shape != shape:
        raise RolloutError(
            f"routes of {tokens} tokens: expected {list(shape)} (rows, MoE layers, top-k), the "
            f"engine returned {list(experts.shape)}"
        )
    check_experts(experts, layout)
    width = np.dtype(f"u{layout.dtype.itemsize}")
    return Routes(layout=layout, experts=experts.astype(width, copy=False).tobytes())


def check_experts(experts: NDArray[np.integer], layout: RouteLayout) -> None:
    """A row that no kernel has written is all 0, so it shows as one expert chosen twice.

    With top-1 routing only the absence of any other expert in all layers can show it.

    Args:
        experts: [R, layers, top_k].

    Raises:
        RolloutError: names the first wrong place.
    """
    # Contiguous columns: several times as fast as sorting millions of short rows.
    columns = np.ascontiguousarray(np.moveaxis(experts, -1, 0))
    wrong = np.full(experts.shape[:2], layout.top_k == 1 and not experts.any())
    for column in columns:
        wrong |= (column < 0) | (column >= layout.num_experts)
    for left, right in combinations(columns, 2):
        wrong |= left == right
    if not wrong.any():
        return
    token, place = np.argwhere(wrong)[0].tolist()
    raise RolloutError(
        f"routes: token {token} went to the experts {experts[token, place].tolist()} in layer "
        f"{layout.layers[place]}, expected {layout.top_k} different ones below "
        f"{layout.num_experts}; {wrong.sum()} of {wrong.size} entries are wrong. All 0 means that "
        "the engine's MoE kernel does not report its choice: try another "
        "rollout.engine_args.moe_backend"
    )
