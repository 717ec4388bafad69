"""A random Qwen3 model, and a policy and batches of it in this process alone."""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.gpu_check.checks import Setup
from megatron_cpgd.policy.parallel import init_model_parallel
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.types import LossSequence
from megatron_cpgd.weights.hf_checkpoint import SINGLE_FILE, HfCheckpoint
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.tensor_file import TensorFile

MODEL = Path("configs/models/Qwen3-8B/config.json")
TINY = {
    "hidden_size": 256, "intermediate_size": 512, "num_attention_heads": 4, "head_dim": 64,
    "num_key_value_heads": 2, "vocab_size": 640,
}  # fmt: skip
"""Multiples of 128, for FP8."""
INITIAL_STD = 0.02


def read_sizes(layers: int, *, tiny: bool) -> dict[str, Any]:
    """config.json of Qwen3-8B with so many layers, or of a tiny model of its kind."""
    hf: dict[str, Any] = json.loads(MODEL.read_text())
    return hf | {"num_hidden_layers": layers} | (TINY if tiny else {})


def save_random_model(folder: Path, hf: dict[str, Any], device: str) -> None:
    """Write config.json and bfloat16 weights in place of what is in the folder."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(hf))
    generator = torch.Generator(device).manual_seed(0)
    tensors = weight_table(hf).hf_tensors(torch.bfloat16)
    with TensorFile.create(folder / SINGLE_FILE, tensors, {"format": "pt"}) as file:
        for name, (dtype, shape) in tensors.items():
            values = torch.randn(shape, generator=generator, device=device, dtype=dtype)
            mean = 1.0 if "norm" in name else 0.0
            file.view(name).copy_(values.mul_(INITIAL_STD).add_(mean))


def make_config(
    model: Path, *, train: str = "bf16", sequences: int = 1, length: int = 2, micro_tokens: int,
    lr: float = 1e-6,
) -> ExperimentConfig:  # fmt: skip
    """One optimizer step on so many sequences of this length, without recompute."""
    return ExperimentConfig.model_validate(
        {
            "run": {"dir": "unused", "steps": 100},
            "model": {"path": model},
            "data": {"path": "unused.jsonl", "max_prompt_tokens": 1},
            "rewards": {"functions": [{"type": "math"}]},
            "precision": {"train": train},
            "optim": {"lr": lr},
            "rollout": {
                "prompts_per_step": 1,
                "samples_per_prompt": sequences,
                "max_response_tokens": length - 1,
            },
            "batch": {
                "tokens_per_micro_batch": micro_tokens,
                "tokens_per_logprob_batch": micro_tokens,
            },
        }
    )


def join_alone(setup: Setup) -> None:
    """A world of this process."""
    backend = "nccl" if setup.device == "cuda" else "gloo"
    store = dist.HashStore()  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=store, rank=0, world_size=1)


def build_policy(config: ExperimentConfig) -> Policy:
    """Loaded from `model.path`."""
    info = init_model_parallel(config.parallel, seed=0)
    with HfCheckpoint.open(config.model.path) as checkpoint:
        return Policy(config, info, checkpoint, weight_table(checkpoint.config))


def make_sequences(count: int, length: int, vocab: int) -> list[LossSequence]:
    """Random tokens behind a prompt of one; advantages of both signs, no old log-probs yet."""
    generator = torch.Generator().manual_seed(0)
    return [
        LossSequence(
            input_ids=torch.randint(vocab, (length,), generator=generator),
            prompt_length=1,
            tensors={
                "advantages": torch.full((length - 1,), 1.0 if i % 2 else -1.0),
                "coefficients": torch.full((length - 1,), 1 / (count * length)),
                "log_clip_low": torch.full((length - 1,), -0.2),
                "log_clip_high": torch.full((length - 1,), 0.2),
            },
        )
        for i in range(count)
    ]


def set_old_logprobs(sequences: list[LossSequence], logprobs: list[torch.Tensor]) -> None:
    """Those of the policy, moved a little, so that ratios differ from 1 and some are clipped."""
    generator = torch.Generator().manual_seed(1)
    for sequence, values in zip(sequences, logprobs, strict=True):
        noise = 0.1 * torch.randn(len(values), generator=generator)
        sequence.tensors["old_logprobs"] = values + noise
