"""An engine with two sets of weights, and what transformers says of its log-probs."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, Qwen2Config, Qwen3Config
from transformers.models.auto import AutoModelForCausalLM

from megatron_cpgd.rollout.engine import Sampling
from megatron_cpgd.rollout.vllm_engine import VllmEngine
from megatron_cpgd.types import Rollout
from megatron_cpgd.weights.tensor_file import TensorFile
from tests.helpers.tiny_moe_engine import router_choices, split_experts

VOCAB = 67
MAX_MODEL_LEN = 256
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 128,  # heads of 32: vLLM's CPU attention has none of 16
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    # A generation config with an end token, which the engine has to ignore.
    "eos_token_id": 1,
}
CONFIGS = {
    "qwen2_tied_with_qkv_bias": Qwen2Config(**SIZES, tie_word_embeddings=True),
    "qwen3_with_qk_norm": Qwen3Config(**SIZES, head_dim=32, tie_word_embeddings=False),
    "llama": LlamaConfig(**SIZES, tie_word_embeddings=False),
}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6], [5, 3, 5, 8, 9, 7, 9], [2]]
SAMPLING = Sampling(n=2, max_tokens=12, seed=5)
TOLERANCE = 1e-5


def start_engine(model_dir: Path, **changes) -> VllmEngine:
    settings = {
        "dtype": "fp32",
        "max_model_len": MAX_MODEL_LEN,
        "engine_args": {"kv_cache_memory_bytes": 32 << 20, "max_num_batched_tokens": MAX_MODEL_LEN},
        "start_timeout_s": 300.0,
        "step_timeout_s": 120.0,
        "log_path": None,
        "seed": 0,
        "sleeps": True,
    }
    return VllmEngine(model_dir, **(settings | changes))


def random_model(config, seed: int) -> nn.Module:
    """Every parameter random, biases and norms too, so that a wrong one shows."""
    generator = torch.Generator().manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for name, tensor in [*model.named_parameters(), *correction_biases(model).items()]:
            # The activation of gpt-oss clamps at 7.
            scale = 3.0 if name.endswith("gate_up_proj_bias") else 0.2
            tensor.normal_(1.0 if "norm" in name else 0.0, scale, generator=generator)
            if name.endswith("sinks"):  # vLLM rounds them on CPU
                tensor.copy_(tensor.bfloat16())
    return model.eval()


def named_weights(model: nn.Module) -> dict[str, Tensor]:
    """By their names in a checkpoint, each once: a tied output layer is left out."""
    weights: dict[str, Tensor] = {}
    packed = model.config.model_type == "gpt_oss"
    for name, parameter in model.named_parameters():
        weight = parameter.detach()
        weights |= {name: weight} if packed else split_experts(name, weight)
    return weights | correction_biases(model)


def correction_biases(model: nn.Module) -> dict[str, Tensor]:
    """Of routers with sigmoid scores."""
    buffers = model.named_buffers()
    return {name: x for name, x in buffers if name.endswith(".e_score_correction_bias")}


def write_arena(path: Path, weights: dict[str, Tensor]) -> Path:
    layout = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in weights.items()}
    with TensorFile.create(path, layout, {"format": "pt"}) as arena:
        for name, tensor in weights.items():
            arena.view(name).copy_(tensor)
    return path


def logprob_error(
    model: nn.Module, prompts: list[list[int]], groups: list[list[Rollout]], temperature: float = 1
) -> float:
    """Largest difference to the log-probabilities of `model` over all sampled tokens."""
    errors = []
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            ids = torch.tensor([prompt + rollout.token_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(prompt) - 1 : -1] / temperature
            expected = logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None])[:, 0]
            errors.append((expected - torch.tensor(rollout.logprobs)).abs().max().item())
    return max(errors)


def differing_entries(
    model: nn.Module, prompts: list[list[int]], groups: list[list[Rollout]]
) -> tuple[int, int]:
    """(token, layer) places whose set of experts is not that of transformers' router; and all."""
    wrong = total = 0
    for prompt, group in zip(prompts, groups, strict=True):
        for rollout in group:
            tokens, layout = prompt + rollout.token_ids, rollout.routes.layout
            expected = router_choices(model, tokens)
            assert expected.shape == (len(tokens) - 1, len(layout.layers), layout.top_k)
            wrong += count_differing(rollout.routes.tensor(), expected)
            total += expected.shape[0] * expected.shape[1]
    return wrong, total


def count_differing(routes: Tensor, expected: Tensor) -> int:
    left, right = (x.long().sort(-1).values for x in (routes, expected))
    return int((left != right).any(-1).sum())


@dataclass
class Lab:
    """An engine, two sets of weights, and the shared arena through which they are published."""

    engine: VllmEngine
    models: dict[str, nn.Module]
    arena: Path
    version: int = 0
    cold: list[list[Rollout]] | None = None
    """What the engine sampled before its first refresh, with weights A."""

    def publish(self, which: str) -> int:
        with TensorFile.open(self.arena, writable=True) as arena:
            for name, tensor in named_weights(self.models[which]).items():
                arena.view(name).copy_(tensor)
            self.version += 1
            report = self.engine.refresh(self.arena, self.version)
            assert (report.tensors, report.nbytes) == (len(arena.names), arena.nbytes)
            assert report.fingerprints == arena.fingerprints()
        return self.version

    def generate(self, sampling: Sampling = SAMPLING, prompts=PROMPTS, **others):
        return self.engine.generate(prompts, sampling, version=self.version, **others)


def start_lab(directory: Path, config: Any, **changes: Any) -> Lab:
    """A lab whose engine loads meanwhile, with weights A; `changes` are settings of the engine."""
    models = {"A": random_model(config, 1), "B": random_model(config, 2)}
    models["A"].save_pretrained(directory)
    arena = write_arena(directory / "arena", named_weights(models["A"]))
    return Lab(start_engine(directory, **changes), models, arena)
