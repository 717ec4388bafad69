"""Names of the options that go to Megatron-Core and vLLM, read from their sources without importing
them: a misspelt one is found before a job waits for its nodes."""

import re
from collections.abc import Iterator
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from megatron_cpgd.config.messages import did_you_mean
from megatron_cpgd.config.schema import ExperimentConfig

_MEGATRON = ("megatron", "core/model_parallel_config.py", "core/transformer/transformer_config.py")
_VLLM = ("vllm", "engine/arg_utils.py")


def check_option_names(config: ExperimentConfig) -> Iterator[str]:
    """Problems of `model.megatron` and `rollout.engine_args`; none where upstream is not installed,
    as on a login node."""
    for where, given, source in (
        ("model.megatron", config.model.megatron, _MEGATRON),
        ("rollout.engine_args", config.rollout.engine_args, _VLLM),
    ):
        known = (given and declared_names(*source)) or given.keys()
        for name in sorted(given.keys() - known):
            yield f"{where}.{name}: {source[0]} has no such option; {did_you_mean(name, known)}"


@cache
def declared_names(package: str, *files: str) -> frozenset[str] | None:
    """What classes in these files declare as `name: type`, of which the options are a part; None:
    the package is not installed."""
    spec = find_spec(package)
    if spec is None:
        return None
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    paths = [folder / file for folder in folders for file in files]
    texts = [path.read_text(encoding="utf-8") for path in paths if path.is_file()]
    names = (re.findall(r"^    (\w+):", text, re.MULTILINE) for text in texts)
    return frozenset().union(*names) or None
