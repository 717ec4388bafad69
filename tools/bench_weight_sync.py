"""The two ways of `rollout.sync` side by side: seconds of a refresh, and memory it takes.

A random Qwen3 is on the ranks of this machine, cut by tensor parallelism, and in a real vLLM. Every
round brings the weights into the engine through an arena and in place, one right after the other,
so that the ratio of a round depends little on what else the machine does. Processor time is that of
the ranks and the engine together. That all was read is proven by the digests.

    python tools/bench_weight_sync.py --ranks 2 --hidden 1024 --layers 12
"""

import argparse
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path

GIB = 2**30
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")


@dataclass(frozen=True, slots=True)
class Times:
    """Of one way, by round."""

    wall: list[float] = field(default_factory=list)
    processor: list[float] = field(default_factory=list)


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
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=2, help="trainer ranks, all tensor-parallel")
    parser.add_argument("--hidden", type=int, default=1024)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--vocab", type=int, default=32000)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--train", choices=["fp32", "bf16"], default="bf16")
    parser.add_argument("--rollout", choices=["fp32", "bf16", "fp8_block"], default="bf16")
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
    from megatron_cpgd.policy.parallel import init_model_parallel, join_world, leave_world
    from megatron_cpgd.policy.policy import Policy
    from megatron_cpgd.rollout.start import start_engine
    from megatron_cpgd.rollout.vllm_engine import VllmEngine
    from megatron_cpgd.weight_sync.arena import open_arena
    from megatron_cpgd.weight_sync.arena_weights import ArenaWeights
    from megatron_cpgd.weight_sync.in_place import InPlaceWeights
    from megatron_cpgd.weight_sync.sync import WeightRoute, sync_weights
    from megatron_cpgd.weights.engine_format import engine_tensors
    from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
    from megatron_cpgd.weights.registry import weight_table

    config = ExperimentConfig.model_validate(
        {
            "run": {"dir": arguments.folder / "run", "steps": 1},
            "model": {"path": arguments.folder / "model"},
            "data": {"path": "unused.jsonl", "max_prompt_tokens": 64},
            "rewards": {"functions": [{"type": "exact_match"}]},
            "parallel": {"tp": arguments.ranks},
            "precision": {"train": arguments.train, "rollout": arguments.rollout},
            "rollout": {"max_response_tokens": 64},
        }
    )
    rank_0 = os.environ["RANK"] == "0"
    engine = start_engine(config, arguments.folder / "engine.log") if rank_0 else None
    try:
        join_world(timedelta(minutes=10))
        info = init_model_parallel(config.parallel, seed=0)
        with HfCheckpoint.open(config.model.path) as checkpoint:
            table = weight_table(checkpoint.config)
            policy = Policy(config, info, checkpoint, table)
        format = config.precision.engine_weights
        arena = open_arena(engine_tensors(table, format))
        in_place = InPlaceWeights(policy, table, format, beside_rank_0=True)
        assert arena is not None
        ways: dict[str, WeightRoute] = {
            "arena": ArenaWeights(policy, arena, format), "in_place": in_place
        }  # fmt: skip
        pids = [0] * dist.get_world_size()
        dist.all_gather_object(pids, os.getpid())
        if isinstance(engine, VllmEngine):
            pids.append(engine.pid)
        times = {way: Times() for way in ways}
        for version in range(1 + arguments.rounds):
            # The way that is first changes from round to round.
            for way in sorted(ways, reverse=version % 2 == 0):
                dist.barrier()
                start, used = time.perf_counter(), _processor_seconds(pids)
                sync_weights(ways[way], engine, version=version)
                times[way].wall.append(time.perf_counter() - start)
                times[way].processor.append(_processor_seconds(pids) - used)
                dist.barrier()
        if rank_0:
            _report(times, arena.nbytes, in_place.path.stat().st_size)
        for way in ways.values():
            way.close()
        leave_world()
    finally:
        if engine is not None:
            engine.close()


def _processor_seconds(pids: list[int]) -> float:
    """That the processes have used since they began."""
    ticks = 0
    for pid in pids:
        # The 14th and 15th field are user and system time, the second a name in parentheses.
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])
    return ticks / CLOCK_TICKS


def _report(times: dict[str, Times], arena_bytes: int, list_bytes: int) -> None:
    """Without the first round, which maps the memory."""
    for kind in ("wall", "processor"):
        arena, in_place = (getattr(times[way], kind)[1:] for way in ("arena", "in_place"))
        ratios = [a / b for a, b in zip(arena, in_place, strict=True)]
        sys.stdout.write(
            f"{kind} time: arena {statistics.median(arena):.2f} s, in place "
            f"{statistics.median(in_place):.2f} s; ratio of a round: median "
            f"{statistics.median(ratios):.2f}, {min(ratios):.2f} to {max(ratios):.2f}\n"
        )
    sys.stdout.write(
        f"memory: arena {arena_bytes / GIB:.3f} GiB, piece list {list_bytes / GIB:.6f} GiB\n"
    )


if __name__ == "__main__":
    sys.exit(main())
