"""One refresh of the engines: all ranks send, the engines load, both sums agree."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RolloutEngine


@dataclass(frozen=True, slots=True)
class Sent:
    """What the engines can read now."""

    path: Path
    """An arena or a piece list, on their host."""
    digest: str
    """Of the weights that were sent."""
    metrics: dict[str, float] = field(default_factory=dict)


class WeightRoute(Protocol):
    """A way of the policy's weights to the engines."""

    def send(self, version: int, *, report: bool) -> Sent | None:
        """Make the weights readable for the engines, and leave the GPUs to those that share them.

        Collective over the world.

        Args:
            report: this is rank 0, which wants to know what was sent.
        """

    def close(self) -> None:
        """Give back what this rank holds for it."""


def sync_weights(
    route: WeightRoute, engine: RolloutEngine | None, *, version: int
) -> dict[str, float | str]:
    """Bring the engine to `version`. Collective over the world; `engine` is None but on rank 0.

    Nobody sends again, or changes the weights, before rank 0 broadcasts the next rollouts, and that
    happens after the engine has read them.

    Returns:
        Metrics, on rank 0.

    Raises:
        WeightSyncError: on rank 0, the engine did not load what the policy has sent.
    """
    sent = route.send(version, report=engine is not None)
    if engine is None:
        return {}
    assert sent is not None
    report = engine.refresh(sent.path, version)
    if report.digest != sent.digest:
        raise WeightSyncError(
            f"weight sync, version {version}: the policy wrote {sent.digest}, the engine read "
            f"{report.digest}; the shared memory at {sent.path} was changed in between"
        )
    return {
        "weights/version": version,
        "weights/digest": report.digest,
        "weights/bytes": report.nbytes,
        **sent.metrics,
    }
