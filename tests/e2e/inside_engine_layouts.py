"""Run as a program by test_engine_layouts.py: vLLM changes torch for the process that it runs in.

Argument: a scratch folder.
"""

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest

from megatron_cpgd.config.schema import RolloutConfig
from megatron_cpgd.errors import ConversionError
from megatron_cpgd.rollout.vllm_engine import engine_environment

os.environ.update(engine_environment(dict(os.environ), cpu=True) | {"VLLM_MLA_DISABLE": "1"})

from megatron_cpgd.rollout.dry_run import check_engine
from megatron_cpgd.weights.registry import weight_table

MODELS = Path("configs/models")
SIZES: dict[str, list[dict[str, Any]]] = {
    "Qwen3-8B": [{"tensor_parallel_size": 16}],  # 8 heads of keys
    "Qwen2.5-7B": [{}],
    "Qwen2.5-72B": [{"tensor_parallel_size": 8}],
    "Llama-3.1-405B": [{"tensor_parallel_size": 16}],
    "Qwen3-32B": [{"tensor_parallel_size": 4}],
    "Qwen3-30B-A3B": [
        {"tensor_parallel_size": 4},
        {"tensor_parallel_size": 8, "enable_expert_parallel": True},
    ],
    "GLM-4.5-Air": [{"tensor_parallel_size": 8}],
    "DeepSeek-V3": [{"tensor_parallel_size": 8, "enable_expert_parallel": True}],
}


def few_layers(name: str, folder: Path) -> dict[str, Any]:
    """The model with layers of each kind only; its config.json goes to `folder`."""
    hf = json.loads((MODELS / name / "config.json").read_text())
    hf["num_hidden_layers"] = hf.get("first_k_dense_replace", 0) + 1
    (folder / "config.json").write_text(json.dumps(hf))
    return hf


def check_that_other_models_are_told_apart(folder: Path) -> None:
    hf = few_layers("Qwen3-8B", folder)
    rollout = RolloutConfig(engine_args={"tensor_parallel_size": 2})
    for change, message in (
        # What vLLM has and the table lacks, and the other way round.
        ({"model_type": "llama"}, r"q_norm\.weight: 0 of 128 elements are filled"),
        ({"num_hidden_layers": 2}, r"engine rank 0: vLLM refuses model\.layers\.1\."),
        # Slices of the right size, of tensors that are too large; then too small.
        ({"intermediate_size": 24576}, r"up_proj\.weight: vLLM takes 2 parts, which do not make"),
        ({"intermediate_size": 6144}, r"vLLM refuses model\.layers\.0\.mlp\.gate_proj\.weight"),
    ):
        with pytest.raises(ConversionError, match=message):
            check_engine(folder, weight_table(hf | change), rollout)
    rollout = RolloutConfig(engine_args={"tensor_parallel_size": 5})
    with pytest.raises(ConversionError, match=r"vLLM refuses .*tensor_parallel_size=5: .* divisib"):
        check_engine(folder, weight_table(hf), rollout)


def main(folder: Path) -> None:
    for name, cases in SIZES.items():
        hf = few_layers(name, folder)
        for engine_args in cases:
            check_engine(folder, weight_table(hf), RolloutConfig(engine_args=engine_args))
    check_that_other_models_are_told_apart(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
