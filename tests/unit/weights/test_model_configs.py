"""The models in configs/models/: their sizes, counted in three ways."""

import json
import math
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_cpgd.weights.registry import weight_table

MODELS = Path("configs/models")
PUBLISHED: dict[str, int] = yaml.safe_load((MODELS / "parameters.yaml").read_text())


def grouped_attention(hidden: int, heads: int, kv: int, *, bias: int = 0, norms: int = 0) -> int:
    """With heads of 128: q and o, k and v."""
    biases = bias * (heads + 2 * kv) * 128
    return 2 * hidden * heads * 128 + 2 * hidden * kv * 128 + biases + norms * 128


def latent_attention() -> int:
    """DeepSeek-V3: q down, norm, up; kv down with the rotary key, norm, up; o."""
    q = 7168 * 1536 + 1536 + 1536 * 128 * 192
    return q + 7168 * 576 + 512 + 512 * 128 * 256 + 128 * 128 * 7168


def dense(hidden: int, intermediate: int) -> int:
    return 3 * hidden * intermediate


def mixture(hidden: int, experts: int, intermediate: int, *, shared: int = 0) -> int:
    """Router and experts; those with shared experts also correct the scores of the router."""
    router = experts * hidden + (experts if shared else 0)
    return router + (experts + shared) * dense(hidden, intermediate)


def model(vocab: int, hidden: int, *blocks: tuple[int, int]) -> int:
    """Embedding, head, last norm, and so many layers of each size with two norms."""
    return 2 * vocab * hidden + hidden + sum(n * (size + 2 * hidden) for n, size in blocks)


GLM_AIR_LAYER = grouped_attention(4096, 96, 8, bias=1) + mixture(4096, 128, 1408, shared=1)
BY_HAND = {
    "Qwen2.5-7B": model(
        152064, 3584, (28, grouped_attention(3584, 28, 4, bias=1) + dense(3584, 18944))
    ),
    "Qwen2.5-72B": model(
        152064, 8192, (80, grouped_attention(8192, 64, 8, bias=1) + dense(8192, 29568))
    ),
    "Qwen3-8B": model(
        151936, 4096, (36, grouped_attention(4096, 32, 8, norms=2) + dense(4096, 12288))
    ),
    "Qwen3-32B": model(
        151936, 5120, (64, grouped_attention(5120, 64, 8, norms=2) + dense(5120, 25600))
    ),
    "Qwen3-30B-A3B": model(
        151936, 2048, (48, grouped_attention(2048, 32, 4, norms=2) + mixture(2048, 128, 768))
    ),
    "Qwen3-235B-A22B": model(
        151936, 4096, (94, grouped_attention(4096, 64, 4, norms=2) + mixture(4096, 128, 1536))
    ),
    "Llama-3.1-70B": model(128256, 8192, (80, grouped_attention(8192, 64, 8) + dense(8192, 28672))),
    "Llama-3.1-405B": model(
        128256, 16384, (126, grouped_attention(16384, 128, 8) + dense(16384, 53248))
    ),
    "GLM-4.5-Air": model(
        151552,
        4096,
        (1, grouped_attention(4096, 96, 8, bias=1) + dense(4096, 10944)),
        (45, GLM_AIR_LAYER),
    ),
    "DeepSeek-V3": model(
        129280,
        7168,
        (3, latent_attention() + dense(7168, 18432)),
        (58, latent_attention() + mixture(7168, 256, 2048, shared=1)),
    ),
}


def test_each_model_has_a_config_and_a_count() -> None:
    folders = {folder.name for folder in MODELS.iterdir() if folder.is_dir()}
    assert folders == PUBLISHED.keys() == BY_HAND.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_weight_table_formula_and_transformers_count_the_published_parameters(name: str) -> None:
    hf = json.loads((MODELS / name / "config.json").read_text())
    table = sum(math.prod(shape) for shape in weight_table(hf).hf_shapes.values())
    with torch.device("meta"):
        built = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(MODELS / name))
    buffers = [t for key, t in built.named_buffers() if key.endswith("e_score_correction_bias")]
    transformers = sum(tensor.numel() for tensor in [*built.parameters(), *buffers])
    assert table == transformers == BY_HAND[name] == PUBLISHED[name]


def test_glm_air_has_its_published_size_with_the_prediction_layer() -> None:
    # A layer with two norms, its own embedding and head, a projection of 2 * hidden, three norms.
    prediction = GLM_AIR_LAYER + 2 * 4096 + 2 * 151552 * 4096 + 2 * 4096 * 4096 + 3 * 4096
    assert PUBLISHED["GLM-4.5-Air"] + prediction == 110_468_824_832
