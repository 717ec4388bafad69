"""One refresh of the engine: every rank writes its share, the engine loads, both sums agree."""

from pathlib import Path
from typing import Protocol

from torch import Tensor

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.weight_sync.arena import Arena
from megatron_cpgd.weight_sync.in_place import SharedWeights


class WeightWriter(Protocol):
    """The part of a policy that a sync needs."""

    def write_weights(self, view: "TensorView | None") -> None:
        """Write this rank's share of the full HF tensors and wait for the others."""


class TensorView(Protocol):
    """A tensor of the arena by its HF name."""

    def __call__(self, name: str, /) -> Tensor: ...


def sync_weights(
    policy: WeightWriter,
    engine: RolloutEngine | None,
    arena: Arena | SharedWeights | None,
    *,
    version: int,
) -> dict[str, float | str]:
    """Bring the engine to `version`. Collective over the world; `engine` is None but on rank 0.

    Nobody writes the arena, or changes the weights, before rank 0 broadcasts the next rollouts, and
    that happens after the engine has read them.

    Args:
        arena: None on ranks that do not share rank 0's host; or the weights, to be read in place.

    Returns:
        Metrics, on rank 0.

    Raises:
        WeightSyncError: on rank 0, the engine did not load what the policy wrote.
    """
    if isinstance(arena, SharedWeights):
        digest = arena.digest()
        return _refresh(engine, arena.path, digest, version) if engine else {}
    policy.write_weights(arena.view if arena else None)
    if arena:
        arena.complete()
    if engine is None:
        return {}
    assert arena is not None
    return _refresh(engine, arena.file.path, arena.file.digest(), version)


def _refresh(
    engine: RolloutEngine, arena: Path, expected: str, version: int
) -> dict[str, float | str]:
    report = engine.refresh(arena, version)
    if report.digest != expected:
        raise WeightSyncError(
            f"weight sync, version {version}: the policy wrote {expected}, the engine read "
            f"{report.digest}; the shared memory at {arena} was changed in between"
        )
    return {
        "weights/version": version,
        "weights/digest": report.digest,
        "weights/bytes": report.nbytes,
    }
