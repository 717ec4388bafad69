"""Names and shapes of the Transformer Engine models that a GPU trains, listed on a CPU.

Writes tests/data/te_weights.json, which tests/unit/weights/test_te_weights.py holds against the
weight tables. Again after a change of megatron-core or Transformer Engine, from the root of the
repository, with wheels that hold Python code only:

    pip install --target /tmp/te --no-deps transformer-engine==2.17.1 \
        nvdlfw-inspect onnxscript onnx onnx-ir ml-dtypes importlib-metadata zipp
    PYTHONPATH=.:/tmp/te python -m tests.helpers.list_te_weights
"""
# ruff: noqa: E402  the stub is installed before anything looks for Transformer Engine

import itertools
import json
import re
from contextlib import ExitStack
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from tests.helpers import te_stub

te_stub.install()

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

import megatron_cpgd.policy  # noqa: F401  before anything imports megatron

from megatron.core import parallel_state  # isort: skip

from megatron_cpgd.config.schema import (
    FP8_RECIPES,
    ModelConfig,
    ParallelConfig,
    PrecisionConfig,
)
from megatron_cpgd.policy.model import build_chunks
from megatron_cpgd.policy.parallel import init_model_parallel
from megatron_cpgd.policy.transformer_config import build_transformer_config
from tests.helpers.tiny import ARCHITECTURES, SIZES

OUT = Path(__file__).parents[1] / "data" / "te_weights.json"
LAYERS = {"num_hidden_layers": 2}
DENSE = [{}, {"tp": 2}, {"pp": 2}]
EXPERTS = [{}, {"tp": 2, "ep": 2}, {"dp": 4, "ep": 2, "etp": 2}]
H100 = SimpleNamespace(major=9, minor=0, multi_processor_count=132)


def main() -> None:
    """Write the list; FP8 recipes must not change it."""
    names = [name for name in ARCHITECTURES if name != "gpt_oss"]
    models = {name: list_model(name, PrecisionConfig()) for name in names}
    for train, name in itertools.product(FP8_RECIPES, names):
        layers = 0 if train == "fp8_delayed" else 1
        fp8 = list_model(name, PrecisionConfig(train=train, bf16_layers=layers))
        assert fp8 == models[name], (train, name)
    versions = {name: version(name) for name in ("megatron-core", "transformer-engine")}
    OUT.parent.mkdir(exist_ok=True)
    text = json.dumps({"versions": versions, "models": models}, indent=1)
    OUT.write_text(re.sub(r"\[\s+([-\d,\s]+?)\s+\]", _on_one_line, text) + "\n")


def _on_one_line(shape: re.Match[str]) -> str:
    return f"[{' '.join(shape[1].split())}]"


def list_model(architecture: str, precision: PrecisionConfig) -> dict[str, Any]:
    """config.json, and the weights of the last rank of each layout."""
    config_class, _, extra = ARCHITECTURES[architecture]
    hf = config_class(**SIZES | extra | LAYERS).to_dict()
    mixture = any("expert" in name for name in extra)
    layouts = [list_layout(hf, sizes, precision) for sizes in (EXPERTS if mixture else DENSE)]
    return {"config": json.loads(json.dumps(hf, default=str)), "layouts": layouts}


def list_layout(
    hf: dict[str, Any], sizes: dict[str, int], precision: PrecisionConfig
) -> dict[str, Any]:
    """Names as the modules have them, with the indices of layers and experts on this rank."""
    parallel = ParallelConfig(**sizes)
    world = parallel.world_size
    dist.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    parallel_state.initialize_model_parallel(
        parallel.tp,
        parallel.pp,
        expert_model_parallel_size=parallel.ep,
        expert_tensor_parallel_size=parallel.etp,
        create_gloo_process_groups=False,
    )
    try:
        info = init_model_parallel(parallel, seed=0)
        with pretended_gpu():
            # The fused permutation has tensors on the GPU, and no parameters.
            model = ModelConfig(path=Path("unused"), megatron={"moe_permute_fusion": False})
            transformer = build_transformer_config(hf, model, parallel, precision)
            [chunk] = build_chunks(transformer, hf, info)
    finally:
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()
    persistent = chunk.state_dict().keys()
    return {
        "parallel": sizes,
        "layers": [layer.layer_number - 1 for layer in chunk.decoder.layers],
        "parameters": {name: list(x.shape) for name, x in chunk.named_parameters()},
        "buffers": {name: list(x.shape) for name, x in chunk.named_buffers() if name in persistent},
    }


def pretended_gpu() -> ExitStack:
    """Inside, Transformer Engine believes in a GPU; tensors are on the CPU."""
    stack = ExitStack()
    for name, value in {
        "is_available": True, "get_device_capability": (9, 0), "get_device_properties": H100
    }.items():  # fmt: skip
        stack.enter_context(patch.object(torch.cuda, name, lambda *_, value=value: value))
    return stack


if __name__ == "__main__":
    main()
