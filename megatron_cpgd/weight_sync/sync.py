"""One refresh of the engine: every rank writes its share, the engine loads, both sums agree."""

from typing import Protocol

from torch import Tensor

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.weight_sync.arena import Arena


class WeightWriter(Protocol):
    """The part of a policy that a sync needs."""

    def write_weights(self, view: "TensorView | None") -> None:
        """Write this rank's share of the full HF tensors and wait for the others."""

    def release(self) -> None:
        """Leave the GPUs to the engine, if they share them, and wait for the others."""


class TensorView(Protocol):
    """A tensor of the arena by its HF name."""

    def __call__(self, name: str, /) -> Tensor: ...


def sync_weights(
    policy: WeightWriter, engine: RolloutEngine | None, arena: Arena | None, *, version: int
) -> dict[str, float | str]:
    """Bring the engine to `version`. Collective over the world; `engine` is None but on rank 0.

    Nobody writes the arena again before rank 0 broadcasts the next rollouts, and that happens
    after the engine has read it.

    Args:
        arena: None on ranks that do not share rank 0's host.

    Returns:
        Metrics, on rank 0.

    Raises:
        WeightSyncError: on rank 0, the engine did not load what the policy wrote.
    """
    policy.write_weights(arena.view if arena else None)
    if arena:
        arena.complete()
    policy.release()  # the engine reads the arena, so it may wake on GPUs without the policy
    if engine is None:
        return {}
    assert arena is not None
    expected = arena.file.digest()
    report = engine.refresh(arena.file.path, version)
    if report.digest != expected:
        raise WeightSyncError(
            f"weight sync, version {version}: the policy wrote {expected}, the engine read "
            f"{report.digest}; the shared memory at {arena.file.path} was changed in between"
        )
    return {
        "weights/version": version,
        "weights/digest": report.digest,
        "weights/bytes": report.nbytes,
    }
