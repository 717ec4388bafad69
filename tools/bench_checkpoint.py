"""A checkpoint of data-parallel ranks that write and read their own parts of the optimizer's state,
beside Megatron's format for any layout, which gathers it: seconds, and host memory of a rank.

    python tools/bench_checkpoint.py --ranks 4 --hidden 768 --layers 10

The ratio of a round depends little on what else the machine does. Memory is what the resident set
of the rank that takes most grows by, for a moment; Linux only.
"""

import argparse
import ctypes
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

MIB = 2**20
FORMATS = ("own parts", "gathered")


def main() -> int:
    """Start the ranks, or be one of them."""
    arguments = _parse()
    if "RANK" in os.environ:
        _measure(arguments)
        return 0
    from megatron_cpgd.launch import launch_ranks

    with tempfile.TemporaryDirectory() as folder:
        _save_model(arguments, Path(folder))
        command = [sys.executable, __file__, *sys.argv[1:], "--folder", folder]
        return launch_ranks(command, arguments.ranks, Path(folder))


def _parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=4, help="all data-parallel")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=10)
    parser.add_argument("--vocab", type=int, default=8000)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--train", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def _save_model(arguments: argparse.Namespace, folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, Qwen3Config

    heads = arguments.hidden // 64
    config = Qwen3Config(
        vocab_size=arguments.vocab, hidden_size=arguments.hidden, head_dim=64,
        intermediate_size=3 * arguments.hidden, num_hidden_layers=arguments.layers,
        num_attention_heads=heads, num_key_value_heads=heads // 2, max_position_embeddings=512,
        tie_word_embeddings=False,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder / "model")


def _measure(arguments: argparse.Namespace) -> None:
    import torch.distributed as dist

    from megatron_cpgd.config.schema import ExperimentConfig
    from megatron_cpgd.policy.optimizer_shards import own_state
    from megatron_cpgd.policy.parallel import init_model_parallel, join_world, leave_world
    from megatron_cpgd.policy.policy import Policy
    from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
    from megatron_cpgd.weights.registry import weight_table

    config = ExperimentConfig.model_validate(
        {
            "run": {"dir": arguments.folder / "run", "steps": 1},
            "model": {"path": arguments.folder / "model"},
            "data": {"path": "unused.jsonl", "max_prompt_tokens": 64},
            "rewards": {"functions": [{"type": "exact_match"}]},
            "parallel": {"dp": arguments.ranks},
            "precision": {"train": arguments.train},
        }
    )
    join_world(timedelta(minutes=10))
    info = init_model_parallel(config.parallel, seed=0)
    with HfCheckpoint.open(config.model.path) as checkpoint:
        policy = Policy(config, info, checkpoint, weight_table(checkpoint.config))
    for part in policy._optimizer.chained_optimizers:
        part._init_optimizer_states_with_dummy_values()
        for tensors in own_state(part).values():
            for tensor in tensors.values():
                tensor.detach().uniform_()  # pages that were never written take no memory
    figures: dict[str, list[tuple[float, float]]] = {}
    for round_number in range(arguments.rounds):
        # The format that is first changes from round to round.
        for format in sorted(FORMATS, reverse=round_number % 2 == 0):
            for action, work in _actions(policy, format, arguments.folder / "checkpoint").items():
                figures.setdefault(f"{action}, {format}", []).append(_figures(work))
            dist.barrier()
            if info.rank == 0:
                shutil.rmtree(arguments.folder / "checkpoint")
    if info.rank == 0:
        _report(figures)
    leave_world()


def _actions(policy: Any, format: str, folder: Path) -> dict[str, Callable[[], object]]:
    from megatron_cpgd.policy import checkpoint

    def gathered(*, is_loading: bool) -> dict[str, Any]:
        model = checkpoint.model_state(policy._chunks)
        optimizer = policy._optimizer.sharded_state_dict(
            model, is_loading=is_loading, metadata=checkpoint.metadata()
        )
        return model | {"optimizer": optimizer}

    def save_gathered() -> None:
        folder.mkdir(exist_ok=True)
        checkpoint.save_state(gathered(is_loading=False), folder)

    def load_gathered() -> None:
        state = checkpoint.load_state(gathered(is_loading=True), folder)
        policy._optimizer.load_state_dict(state["optimizer"])

    def save() -> None:
        checkpoint.save_checkpoint(
            folder, policy._chunks, policy._optimizer, {},
            hf_source=folder.parent / "model", table=policy._table,
        )  # fmt: skip

    def load() -> None:
        checkpoint.load_checkpoint(folder, policy._chunks, policy._optimizer)

    if format == "gathered":
        return {"save": save_gathered, "load": load_gathered}
    return {"save": save, "load": load}


def _figures(work: Callable[[], object]) -> tuple[float, float]:
    """(seconds, MiB) of the rank that takes most."""
    import torch
    import torch.distributed as dist

    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    dist.barrier()
    before, start = _status_mib("VmRSS"), time.perf_counter()
    work()
    figures = torch.tensor([time.perf_counter() - start, _status_mib("VmHWM") - before])
    dist.all_reduce(figures, op=dist.ReduceOp.MAX)
    seconds, mib = figures.tolist()
    return seconds, mib


def _status_mib(name: str) -> float:
    [line] = [
        line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)
    ]
    return int(line.split()[1]) * 1024 / MIB


def _report(figures: dict[str, list[tuple[float, float]]]) -> None:
    for action in ("save", "load"):
        own, gathered = (figures[f"{action}, {format}"] for format in FORMATS)
        ratios = [a[0] / b[0] for a, b in zip(own, gathered, strict=True)]
        memory = [statistics.median(mib for _, mib in rows) for rows in (own, gathered)]
        sys.stdout.write(
            f"{action}: {memory[0]:.0f} MiB instead of {memory[1]:.0f}; own parts over gathered, "
            f"seconds of a round: median {statistics.median(ratios):.2f}, {min(ratios):.2f} to "
            f"{max(ratios):.2f}\n"
        )


if __name__ == "__main__":
    sys.exit(main())
