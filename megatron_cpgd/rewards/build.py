"""From the settings of a reward to its function and its name."""

import functools
import re
from collections import Counter
from collections.abc import Sequence

from megatron_cpgd.config.schema import (
    ExactMatchReward,
    FormatReward,
    MathReward,
    PythonReward,
    Reward,
)
from megatron_cpgd.errors import ConfigError
from megatron_cpgd.rewards.base import RewardFunction
from megatron_cpgd.rewards.exact_match import exact_match
from megatron_cpgd.rewards.math_answer import math_answer
from megatron_cpgd.rewards.python_path import load_function
from megatron_cpgd.rewards.response_format import response_format


@functools.cache
def build_reward(config: Reward) -> RewardFunction:
    """The function that `config` describes.

    Raises:
        ConfigError: a pattern that does not compile, or a path that leads to no function.
    """
    match config:
        case MathReward():
            return math_answer
        case ExactMatchReward():
            return functools.partial(exact_match, after=config.after)
        case FormatReward():
            return functools.partial(response_format, pattern=_compile(config.pattern))
        case PythonReward():
            return load_function(config.path)


def reward_names(configs: Sequence[Reward]) -> list[str]:
    """A unique name for each reward: its type, or the name of the user's function; then `_2`."""
    seen: Counter[str] = Counter()
    names = []
    for config in configs:
        name = config.path.rpartition(".")[2] if isinstance(config, PythonReward) else config.type
        seen[name] += 1
        names.append(name if seen[name] == 1 else f"{name}_{seen[name]}")
    return names


def _compile(pattern: str) -> re.Pattern[str]:
    try:
        return re.compile(pattern, re.DOTALL)
    except re.error as error:
        raise ConfigError(
            f"rewards.functions: pattern {pattern!r} is not a regular expression: {error}"
        ) from error
