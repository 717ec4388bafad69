"""How much of the gap between trainer and engine a replay of the engine's routes takes away.

    python tools/measure_routing_gap.py CONFIG [a.b=value ...] --noise 0 0.01 0.03 0.1 0.3

vLLM samples one batch of the run that CONFIG describes, with its routes. Then the trainer, one
process whatever `parallel` says, computes the log-probs of the same tokens twice: its routers
choose, and the engine's choices are replayed. Before that, noise is put on its routers and on
nothing else: with --noise 0.1, gaussian with a tenth of the root mean square of each layer's router
weights. The gates of the replayed experts come from the same noisy routers, so a replay cannot take
the whole gap away.
"""

import argparse
import json
import logging
import math
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from datetime import timedelta
from pathlib import Path

import torch

from megatron_cpgd.config.load import load_config
from megatron_cpgd.config.schema import ExperimentConfig, ParallelConfig
from megatron_cpgd.data.run_prompts import Prompts
from megatron_cpgd.errors import USER_ERROR, UserError
from megatron_cpgd.policy.parallel import init_model_parallel, join_world, leave_world
from megatron_cpgd.policy.policy import Policy
from megatron_cpgd.policy.routing_gap import measure_routing_gap, rollout_routes
from megatron_cpgd.rollout.start import start_engine
from megatron_cpgd.sampler import Sampler
from megatron_cpgd.scored_batch import train_sequences
from megatron_cpgd.tracking.timer import StepTimer
from megatron_cpgd.types import TrainSequence
from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.registry import weight_table
from megatron_cpgd.weights.tensor_file import TensorFile

ROUTER = re.compile(r"\.(gate|router)\.weight")
NOISES = [0.0, 0.01, 0.03, 0.1, 0.3]
COLUMNS = {
    "choices": ("routing/free_disagreement", ".2%"),
    "tokens": ("routing/free_disagreement_token_frac", ".2%"),
    "free mean": ("routing/free_logprob_abs_diff_mean", ".1e"),
    "free max": ("routing/free_logprob_abs_diff_max", ".1e"),
    "free k3": ("routing/free_kl_k3", ".1e"),
    "replayed mean": ("routing/replayed_logprob_abs_diff_mean", ".1e"),
    "replayed max": ("routing/replayed_logprob_abs_diff_max", ".1e"),
    "replayed k3": ("routing/replayed_kl_k3", ".1e"),
}


def main(argv: list[str] | None = None) -> int:
    """Exit code 0, or 2 if the run cannot be measured."""
    arguments = _parse(argv)
    logging.getLogger("megatron").setLevel(logging.ERROR)
    try:
        config = read_run(arguments.config, arguments.overrides)
        sequences = sample(config)
        with _only_rank():
            rows = [measure(config, sequences, noise) for noise in arguments.noise]
    except UserError as error:
        sys.stderr.write(f"measure_routing_gap: {error}\n")
        return USER_ERROR
    if arguments.json:
        print(json.dumps(rows))
    else:
        print_rows(rows, tokens=sum(len(each.response_ids) for each in sequences))
    return 0


def read_run(path: Path, overrides: Sequence[str]) -> ExperimentConfig:
    """The configuration on one rank, with routes.

    Raises:
        ConfigError: it is wrong, or the model has no experts.
    """
    config = load_config(path, [*overrides, "run.steps=1", "tracking.routing_every=1"])
    return config.model_copy(update={"parallel": ParallelConfig()})


def sample(config: ExperimentConfig) -> list[TrainSequence]:
    """The first batch of the run, by vLLM."""
    prompts = Prompts(config)
    with tempfile.TemporaryDirectory() as folder, ExitStack() as stack:
        engine = start_engine(config, Path(folder) / "engine.log")
        stack.callback(engine.close)
        sampler = Sampler(config, prompts, engine)
        stack.callback(sampler.close)
        return train_sequences(sampler.sample(step=1, version=0, timer=StepTimer()))


def measure(
    config: ExperimentConfig, sequences: list[TrainSequence], noise: float
) -> dict[str, float]:
    """`noise`, and the metrics of the trainer with so much of it. The caller has joined a world."""
    routes = rollout_routes(sequences)
    assert routes is not None
    with tempfile.TemporaryDirectory() as folder:
        noisy = copy_with_noise(config.model.path, Path(folder) / "model", noise)
        model = config.model.model_copy(update={"path": noisy})
        policy = build_policy(config.model_copy(update={"model": model}))
    return {"noise": noise} | measure_routing_gap(policy, sequences, routes, {})


def build_policy(config: ExperimentConfig) -> Policy:
    """The trainer's model; what is in memory does not need its folder any more."""
    info = init_model_parallel(config.parallel, seed=config.run.seed)
    with HfCheckpoint.open(config.model.path) as checkpoint:
        return Policy(config, info, checkpoint, weight_table(checkpoint.config))


def copy_with_noise(source: Path, target: Path, noise: float) -> Path:
    """A copy of a checkpoint; the noise is always the same but for its size."""
    shutil.copytree(source, target)
    generator = torch.Generator().manual_seed(0)
    routers = 0
    for path in sorted(target.glob("*.safetensors")):
        with TensorFile.open(path, writable=True) as file:
            for name in sorted(file.names):
                if ROUTER.search(name):
                    weight = file.view(name)
                    scale = noise * weight.float().square().mean().sqrt()
                    weight.add_(scale * torch.randn(weight.shape, generator=generator))
                    routers += 1
    assert routers > 0, f"no router's weight is known by its name in {source}"
    return target


def print_rows(rows: Sequence[dict[str, float]], *, tokens: int) -> None:
    """A line for each noise."""
    print(
        f"{tokens} sampled tokens; choices, tokens: share of (token, MoE layer) that the trainer "
        "routes elsewhere, and of tokens with any such layer;\nmean, max: |trainer - engine| "
        "log-prob; factor: free by replayed"
    )
    print(" ".join(f"{name:>13}" for name in ("noise", *COLUMNS, "factor mean", "factor k3")))
    for row in rows:
        cells = [f"{row['noise']:g}"]
        cells += [f"{row[metric]:{style}}" for metric, style in COLUMNS.values()]
        for gap in ("logprob_abs_diff_mean", "kl_k3"):
            cells.append(_factor(row[f"routing/free_{gap}"], row[f"routing/replayed_{gap}"]))
        print(" ".join(f"{cell:>13}" for cell in cells))


def _factor(free: float, replayed: float) -> str:
    return f"{free / replayed:.1f}" if replayed > 0 else "-"


@contextmanager
def _only_rank() -> Iterator[None]:
    """A world of this process."""
    os.environ |= {
        "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0",
    }  # fmt: skip
    join_world(timedelta(hours=1))
    try:
        yield
    finally:
        leave_world()


def _parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=(__doc__ or ""), formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", type=Path, metavar="CONFIG", help="YAML file of a run")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings of the run")
    parser.add_argument("--noise", default=NOISES, nargs="+", metavar="SIGMA", type=_noise)
    parser.add_argument("--json", action="store_true", help="all numbers instead of a table")
    return parser.parse_args(argv)


def _noise(text: str) -> float:
    value = float(text)
    if not 0 <= value < math.inf:
        raise argparse.ArgumentTypeError(f"expected a finite number of at least 0, got {text!r}")
    return value


if __name__ == "__main__":
    sys.exit(main())
