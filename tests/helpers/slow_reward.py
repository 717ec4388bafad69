"""A reward that takes its time, so that a run of a tiny model lasts minutes."""

import time
from typing import Any


def slow_reward(response: str, answer: str | None, fields: dict[str, Any]) -> float:
    """Half a second; 1 for a response of an even number of characters."""
    time.sleep(0.5)
    return float(len(response) % 2 == 0)
