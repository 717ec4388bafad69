"""Where the seconds of a step go."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class StepTimer:
    """Times the parts of one step after another.

    with timer("generate"): ...
    metrics |= timer.finish_step()        # time/generate_s, ..., time/other_s, time/total_s
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start the first step now.

        Args:
            clock: seconds that only grow.
        """
        self._clock = clock
        self._start = clock()
        self._seconds: dict[str, float] = {}
        self._running: str | None = None

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the time inside the `with` block to `part`; blocks do not nest."""
        assert self._running is None, f"timer({part!r}) inside timer({self._running!r})"
        self._running, start = part, self._clock()
        try:
            yield
        finally:
            self._running = None
            self._seconds[part] = self._seconds.get(part, 0.0) + self._clock() - start

    def finish_step(self) -> dict[str, float]:
        """Seconds of each part, of everything else and of the whole; the next step starts now."""
        now = self._clock()
        total = now - self._start
        metrics = {f"time/{part}_s": seconds for part, seconds in self._seconds.items()}
        metrics["time/other_s"] = total - sum(self._seconds.values())
        metrics["time/total_s"] = total
        self._start, self._seconds = now, {}
        return metrics
