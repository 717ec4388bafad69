"""May this configuration continue what is in the run folder?"""

from pathlib import Path
from typing import Any

from megatron_cpgd.config.load import read_config
from megatron_cpgd.config.messages import show
from megatron_cpgd.config.schema import ExperimentConfig

MAY_CHANGE = (
    "run.dir",
    "run.steps",
    "parallel.",
    "batch.",
    "tracking.rollouts_per_step",
    "stability.",
    "checkpoint.",
    "eval.",
    "rewards.workers",
    "rewards.timeout_s",
    "rollout.sync",
    "rollout.sleep",
    "optim.offload",
    "rollout.nodes",
    "rollout.devices",
    "rollout.start_timeout_s",
    "rollout.step_timeout_s",
)
"""Settings, or prefixes of them, that a resumed run may set anew.

None changes what is learnt, but for `run.steps` under a decaying learning rate, where it moves the
end of the decay, and for `stability.` once a collapse is found.
"""


def check_resume(config: ExperimentConfig, run_dir: Path) -> list[str]:
    """Differences between `config` and the one that `run_dir` was started with.

    Returns:
        One line for each differing setting and one that says what to do; empty if the folder is
        new or holds the same run.

    Raises:
        ConfigError: the saved config.yaml cannot be read by this version.
    """
    saved_path = run_dir / "config.yaml"
    if not saved_path.exists():
        return []
    saved = _flatten(read_config(saved_path).model_dump(mode="json"))
    wanted = _flatten(config.model_dump(mode="json"))
    lines = [
        f"{key}: the run in {run_dir} has {show(saved.get(key))}, now {show(wanted.get(key))}"
        for key in sorted(saved.keys() | wanted.keys())
        if saved.get(key) != wanted.get(key) and not key.startswith(MAY_CHANGE)
    ]
    if lines:
        lines.append(f"{run_dir} holds a different run; use another run.dir or its own settings")
    return lines


def _flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    flat: dict[str, Any] = {}
    for key, inner in value.items():
        flat |= _flatten(inner, f"{prefix}.{key}" if prefix else str(key))
    return flat
