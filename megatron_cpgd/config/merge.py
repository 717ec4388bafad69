"""How one layer of settings is laid over another."""

from typing import Any


def merge(base: Any, over: Any) -> Any:
    """`over` laid over `base`: mappings merge key by key, anything else is replaced.

    A section that changes its `type` starts anew: settings of one variant mean nothing to another.
    """
    if not (isinstance(base, dict) and isinstance(over, dict)):
        return over
    if "type" in base and "type" in over and base["type"] != over["type"]:
        return over
    return {**base, **{key: merge(base.get(key), value) for key, value in over.items()}}
