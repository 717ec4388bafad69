"""Run as a program by test_engine_layouts.py: vLLM changes torch for the process that it runs in.

Arguments: a scratch folder; for random layouts also the name of a model and how many.
"""

import json
import os
import sys
from collections import Counter
from pathlib import Path
from random import Random
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


def few_layers(name: str, folder: Path, layers: int = 2) -> dict[str, Any]:
    """The model with so few layers, those of each kind; its config.json goes to `folder`."""
    hf = json.loads((MODELS / name / "config.json").read_text())
    hf["num_hidden_layers"] = layers
    if "first_k_dense_replace" in hf:
        hf["first_k_dense_replace"] = 1
    (folder / "config.json").write_text(json.dumps(hf))
    return hf


def check_that_other_models_are_told_apart(folder: Path) -> None:
    hf = few_layers("Qwen3-8B", folder)
    rollout = RolloutConfig(engine_args={"tensor_parallel_size": 2})
    for change, message in (
        # What vLLM has and the table lacks, and the other way round.
        ({"model_type": "llama"}, r"q_norm\.weight: 0 of 128 elements are filled"),
        ({"num_hidden_layers": 3}, r"engine rank 0: vLLM refuses model\.layers\.2\."),
        # Slices of the right size, of tensors that are too large; then too small.
        ({"intermediate_size": 24576}, r"up_proj\.weight: vLLM takes 2 parts, which do not make"),
        ({"intermediate_size": 6144}, r"vLLM refuses model\.layers\.0\.mlp\.gate_proj\.weight"),
    ):
        with pytest.raises(ConversionError, match=message):
            check_engine(folder, weight_table(hf | change), rollout)
    rollout = RolloutConfig(engine_args={"tensor_parallel_size": 5})
    with pytest.raises(ConversionError, match=r"vLLM refuses .*tensor_parallel_size=5: .*divisib"):
        check_engine(folder, weight_table(hf), rollout)


def check_known_sizes(folder: Path) -> None:
    for name, cases in SIZES.items():
        hf = few_layers(name, folder)
        for engine_args in cases:
            check_engine(folder, weight_table(hf), RolloutConfig(engine_args=engine_args))


def check_random_layouts(name: str, count: int, folder: Path) -> None:
    """All ranks of each; prints how many there were."""
    ranks, layouts = 0, Counter()
    for number in range(count):
        random = Random(f"{name} {number}")
        stages = random.randint(1, 4)
        # vLLM refuses a stage without a layer of experts.
        hf = few_layers(name, folder, layers=random.randint(2 * stages, 2 * stages + 2))
        spread = "moe_intermediate_size" in hf and random.random() < 0.5
        engine_args = {
            "tensor_parallel_size": random.choice(tensor_parallel_sizes(hf, spread, 16 // stages)),
            "pipeline_parallel_size": stages,
            "enable_expert_parallel": spread,
        }
        rollout = RolloutConfig(engine_args=engine_args)
        try:
            ranks += len(check_engine(folder, weight_table(hf), rollout))
        except Exception as error:
            raise AssertionError(f"{engine_args}, {hf['num_hidden_layers']} layers") from error
        layouts[(*engine_args.values(), hf["num_hidden_layers"])] += 1
    print(f"{name}: {count} layouts, {len(layouts)} of them different, {ranks} ranks")


def tensor_parallel_sizes(hf: dict[str, Any], spread: bool, most: int) -> list[int]:
    """Those that divide what vLLM cuts; heads of keys are repeated if there are fewer."""
    cut = [hf["num_attention_heads"], hf["intermediate_size"], hf["vocab_size"]]
    keys = hf["num_key_value_heads"]
    if "moe_intermediate_size" in hf and (not spread or hf.get("n_shared_experts")):
        cut.append(hf["moe_intermediate_size"])
    return [
        size
        for size in range(1, most + 1)
        if all(length % size == 0 for length in cut) and (keys % size == 0 or size % keys == 0)
    ]


def main(folder: Path, name: str | None = None, count: str = "0") -> None:
    if name is not None:
        check_random_layouts(name, int(count), folder)
        return
    check_known_sizes(folder)
    check_that_other_models_are_told_apart(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
