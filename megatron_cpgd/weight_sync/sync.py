"""One refresh of the engines: all ranks send, the engines load, both sums agree."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.rollout.engine import RolloutEngine
from megatron_cpgd.weights.fingerprint import Fingerprints, combine, describe_difference
from megatron_cpgd.weights.quantize import Tensors


@dataclass(frozen=True, slots=True)
class Sent:
    """What the engines can read now."""

    path: Path
    """An arena or a piece list, on their host."""
    tensors: Tensors
    """Number format and shape of what was summed, by HF name."""
    fingerprints: Fingerprints
    """Of the weights on the ranks, in the format of the engines."""
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
    if difference := describe_difference(sent.fingerprints, report.fingerprints):
        raise WeightSyncError(
            f"weight sync, version {version}: the engine has read other values than the policy has "
            f"from {sent.path}: {difference}"
        )
    return {
        "weights/version": version,
        "weights/digest": combine(sent.tensors, sent.fingerprints),
        "weights/bytes": report.nbytes,
        **sent.metrics,
    }
