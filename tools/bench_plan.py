"""Seconds of a trainer's passes on one CPU rank: processor time against what a plan predicts.

    python tools/bench_plan.py

Random Qwen3 models of a few sizes, fp32, one thread. A pass is measured three times and the fastest
counts. The prediction is that of the machine `cpu`, not calibrated.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from transformers import Qwen3Config, Qwen3ForCausalLM

from megatron_cpgd.algorithm.objective import build_objective
from megatron_cpgd.config.schema import ExperimentConfig
from megatron_cpgd.planning.activations import passes_of
from megatron_cpgd.planning.layout import layout_of
from megatron_cpgd.planning.machine import cpu_machine
from megatron_cpgd.planning.model import read_model
from megatron_cpgd.planning.passes import Batch, pass_seconds, update_seconds
from megatron_cpgd.policy.parallel import init_model_parallel
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.types import LossSequence
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import weight_table

SIZES = {
    "1.3 M": (128, 4, 4, 32),
    "5.8 M": (256, 6, 8, 32),
    "21 M": (512, 6, 8, 64),
}
"""Hidden size, layers, heads, head size."""
REPEAT = 3


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """One measurement."""

    size: str
    tokens: int
    length: int
    micro_tokens: int
    recompute: str = "none"


CASES = (
    Case(size="1.3 M", tokens=4096, length=128, micro_tokens=1024),
    Case(size="1.3 M", tokens=4096, length=512, micro_tokens=2048),
    Case(size="5.8 M", tokens=4096, length=128, micro_tokens=1024),
    Case(size="5.8 M", tokens=4096, length=128, micro_tokens=1024, recompute="full"),
    Case(size="5.8 M", tokens=2048, length=512, micro_tokens=512),
    Case(size="21 M", tokens=2048, length=128, micro_tokens=1024),
    Case(size="21 M", tokens=1024, length=128, micro_tokens=256),
)


def main() -> None:
    """Print a table."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        store = f"file://{folder}/store"
        dist.init_process_group("gloo", init_method=store, rank=0, world_size=1)
        print("measured / predicted seconds")
        print(f"{'model':8}{'recompute':>10}{'tokens':>8}{'length':>8}{'forward':>9}{'train':>7}")
        for case in CASES:
            forward, train = measure(case, Path(folder))
            print(
                f"{case.size:8}{case.recompute:>10}{case.tokens:8}{case.length:8}"
                f"{forward:9.2f}{train:7.2f}",
                flush=True,
            )
        dist.destroy_process_group()


def measure(case: Case, folder: Path) -> tuple[float, float]:
    """Measured over predicted seconds of a forward pass, and of an optimizer step."""
    config = ExperimentConfig.model_validate(
        {
            "run": {"dir": folder / "run", "steps": 1},
            "model": {"path": save_model(case.size, folder), "recompute": case.recompute},
            "data": {"path": folder / "unused.jsonl"},
            "rewards": {"functions": [{"type": "math"}]},
            "precision": {"train": "fp32"},
            "batch": {
                "tokens_per_micro_batch": case.micro_tokens,
                "tokens_per_logprob_batch": case.micro_tokens,
            },
        }
    )
    info = init_model_parallel(config.parallel, seed=0)
    with HfCheckpoint.open(config.model.path) as checkpoint:
        model = read_model(checkpoint.config)
        policy = Policy(config, info, checkpoint, weight_table(checkpoint.config))
    sequences = make_sequences(case)
    objective = build_objective(config.algorithm)
    policy.train_step(sequences, objective)  # Adam's state is made here
    forward = fastest(lambda: policy.compute_logprobs(sequences))
    train = fastest(lambda: policy.train_step(sequences, objective))
    layout, machine = layout_of(config.parallel), cpu_machine()
    passes = passes_of("fp32", config.model.recompute, {}, accelerator=False)
    batch = Batch(tokens=case.tokens, length=case.length, micro_tokens=case.micro_tokens)
    planned = [
        pass_seconds(model, layout, machine, passes, batch, backward=backward).total
        for backward in (False, True)
    ]
    update = update_seconds(model, layout, machine, passes).total
    return forward / planned[0], train / (planned[1] + update)


def save_model(size: str, folder: Path) -> Path:
    """A random model of this size."""
    hidden, layers, heads, head_dim = SIZES[size]
    path = folder / size.replace(" ", "_")
    if not path.exists():
        config = Qwen3Config(
            vocab_size=2048, hidden_size=hidden, intermediate_size=3 * hidden,
            num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=heads // 2,
            head_dim=head_dim, max_position_embeddings=4096, tie_word_embeddings=False,
        )  # fmt: skip
        Qwen3ForCausalLM(config).float().save_pretrained(path)
    return path


def make_sequences(case: Case) -> list[LossSequence]:
    """Random tokens with one prompt token each, old log-probs as if the policy were uniform."""
    generator, responses = torch.Generator().manual_seed(0), case.length - 1
    return [
        LossSequence(
            input_ids=torch.randint(2048, (case.length,), generator=generator),
            prompt_length=1,
            tensors={
                "advantages": torch.ones(responses),
                "coefficients": torch.full((responses,), 1 / case.tokens),
                "old_logprobs": torch.full((responses,), -7.6),
                "log_clip_low": torch.full((responses,), -0.2),
                "log_clip_high": torch.full((responses,), 0.2),
            },
        )
        for _ in range(case.tokens // case.length)
    ]


def fastest(work: Callable[[], object]) -> float:
    """Processor seconds."""
    seconds = []
    for _ in range(REPEAT):
        start = time.process_time()
        work()
        seconds.append(time.process_time() - start)
    return min(seconds)


if __name__ == "__main__":
    sys.exit(main())
