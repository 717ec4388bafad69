"""A demo from start to end: `make demo`, or `python tools/demo.py [--moe] [a.b=value ...]`.

Makes a tiny model with bad habits in arithmetic, trains it with CPGD (two Megatron-Core ranks and
a vLLM engine on CPU), exports it to Hugging Face, and evaluates the export again in transformers
and in a fresh vLLM. Starting it again continues an interrupted run. With --moe (`make demo-moe`)
the model is a mixture of experts, which the two ranks share.
"""

import argparse
import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from megatron_cpgd import cli
from megatron_cpgd.config.load import load_config
from megatron_cpgd.demo.assets import make_assets
from megatron_cpgd.demo.recipe import DENSE, MOE, Recipe
from megatron_cpgd.errors import USER_ERROR, UserError
from megatron_cpgd.tracking.metrics import read_metrics
from megatron_cpgd.tracking.run_folder import RunFolder

METRIC = "eval/heldout/accuracy"
TOLERANCE = 0.01
"""Engines may break a tie between two tokens differently: 2 of the 256 problems."""


def main() -> int:
    """Exit code 0 if the policy learned and both engines confirm it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--moe", action="store_true", help="train a mixture of experts")
    parser.add_argument("overrides", nargs="*", metavar="a.b=value", help="settings of the run")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if args.moe:
        return run_demo(Path("configs/demo_moe.yaml"), "runs/demo_moe_assets", MOE, args.overrides)
    return run_demo(Path("configs/demo.yaml"), "runs/demo_assets", DENSE, args.overrides)


def run_demo(config_file: Path, assets: str, recipe: Recipe, overrides: Sequence[str]) -> int:
    """Exit code 0 if the policy learned and both engines confirm it."""
    sys.stdout.write("1. model and data\n")
    make_assets(Path(assets), recipe)
    config = load_config(config_file, overrides)
    sys.stdout.write("2. CPGD training\n")
    code = cli.main(["train", str(config_file), *overrides])
    if code != 0:
        return code
    sys.stdout.write("3. the exported model in fresh engines\n")
    from megatron_cpgd.evaluate import evaluate_model

    folder = RunFolder(config.run.dir)
    exported = folder.hf(config.run.steps)
    rows = read_metrics(folder.metrics)
    before, after = rows[0][METRIC], rows[-1][METRIC]
    accuracies = {
        "before training": before,
        "after training, the run's engine": after,
        "exported, transformers": evaluate_model(config, exported, "transformers")[METRIC],
        "exported, fresh vLLM": evaluate_model(config, exported, "vllm")[METRIC],
    }
    gaps = [row["rollout/logprob_abs_diff_mean"] for row in rows[1:]]
    sys.stdout.write("\nheld-out accuracy, greedy\n")
    for name, accuracy in accuracies.items():
        sys.stdout.write(f"  {name:34s} {accuracy:.3f}\n")
    sys.stdout.write(
        f"mean |trainer - vLLM| log-prob, worst step: {max(gaps):.1e}\n"
        f"learning curve: {folder.learning_curve}\nexported model: {exported}\n"
    )
    confirmed = all(abs(value - after) <= TOLERANCE for value in list(accuracies.values())[1:])
    return 0 if confirmed and after > before else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except UserError as error:
        sys.stderr.write(f"demo: {error}\n")
        sys.exit(USER_ERROR)
