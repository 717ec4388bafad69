"""Stands for a vLLM worker: `python -m tests.helpers.in_place_reader PIECE_LIST DEVICE`.

For each line that it gets it assembles all weights and prints their fingerprints.
"""

import sys
from pathlib import Path

import torch

from megatron_cpgd.rollout.assemble import AssembledWeights, TrainerMemory


def main(path: Path, device: torch.device) -> None:
    """Ends with its input."""
    memory = TrainerMemory(path, device)
    for _ in sys.stdin:
        weights = AssembledWeights(memory)
        for name in weights.names:
            assert weights.view(name).device == device
        print(weights.fingerprints(), flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]), torch.device(sys.argv[2]))
