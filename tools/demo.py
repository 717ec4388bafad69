"""The demo from start to end: `make demo`, or `python tools/demo.py [a.b=value ...]`.

Makes a tiny model with bad habits in arithmetic, trains it with CPGD (two Megatron-Core ranks and
a vLLM engine on CPU), exports it to Hugging Face, and evaluates the export again in transformers
and in a fresh vLLM. Starting it again continues an interrupted run.
"""

import logging
import sys
from pathlib import Path

from megatron_cpgd import cli
from megatron_cpgd.config.load import load_config
from megatron_cpgd.demo.assets import Recipe, make_assets
from megatron_cpgd.errors import USER_ERROR, UserError
from megatron_cpgd.tracking.metrics import read_metrics
from megatron_cpgd.tracking.run_folder import RunFolder

CONFIG = Path("configs/demo.yaml")
ASSETS = Path("runs/demo_assets")
METRIC = "eval/heldout/accuracy"
TOLERANCE = 0.01
"""Engines may break a tie between two tokens differently: 2 of the 256 problems."""


def main(overrides: list[str]) -> int:
    """Exit code 0 if the policy learned and both engines confirm it."""
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    sys.stdout.write("1. model and data\n")
    make_assets(ASSETS, Recipe())
    config = load_config(CONFIG, overrides)
    sys.stdout.write("2. CPGD training\n")
    code = cli.main(["train", str(CONFIG), *overrides])
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
        sys.exit(main(sys.argv[1:]))
    except UserError as error:
        sys.stderr.write(f"demo: {error}\n")
        sys.exit(USER_ERROR)
