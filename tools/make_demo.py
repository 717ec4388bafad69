"""Make the model and the data of a demo: `python tools/make_demo.py OUT_DIR [--moe]`.

The model is a tiny Qwen3 that learns two-digit sums and differences from a tutor who spoils three
of four worked examples that need a carry or a borrow (see `megatron_cpgd.demo.arithmetic`). It can
thus do the right thing, seldom samples it, and almost never decodes it greedily: reinforcement
learning has to find out which of two learnt procedures is rewarded and to make it reliable. It
does not teach arithmetic to a model that knows none. With --moe it is a tiny Qwen3-MoE, whose
layers have 8 experts and send each token to two of them.

The same call again returns at once. The result depends on nothing but the recipe, up to the
rounding of the machine's float kernels.
"""

import argparse
import logging
import sys
from pathlib import Path

from megatron_cpgd.demo.assets import make_assets
from megatron_cpgd.demo.recipe import DENSE, MOE
from megatron_cpgd.errors import UserError


def main() -> int:
    """Exit code 0, or 2 if the folder cannot be used."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out_dir", type=Path, help="gets model/, train.jsonl and heldout.jsonl")
    parser.add_argument("--moe", action="store_true", help="the model is a mixture of experts")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    try:
        make_assets(args.out_dir, MOE if args.moe else DENSE)
    except UserError as error:
        logging.getLogger(__name__).error("%s", error)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
