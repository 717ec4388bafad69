"""Which tensors a weight refresh must bring."""

import json
from pathlib import Path

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights.quantize import FP8, Tensors
from megatron_cpgd.weights.tensor_file import TensorFile


class ExpectedTensors:
    """The tensors that a complete arena has, known from the checkpoint of the first load.

    vLLM only warns, or not even that, when some are missing, and computes with stale weights or
    uninitialised memory. So the arena is compared before anything is overwritten.
    """

    def __init__(self, checkpoint: Tensors, needed: set[str]) -> None:
        """
        Args:
            checkpoint: every tensor of the checkpoint, quantised if the engine is.
            needed: those that this worker's part of the model reads; a tied output layer, for
                example, may be in the checkpoint and is not needed.
        """
        self.checkpoint = checkpoint
        self.needed = needed

    def check(self, arena: Tensors) -> None:
        """
        Raises:
            WeightSyncError: a needed tensor is missing, or one is unknown, has another shape or
                alone is in FP8; other formats are converted.
        """
        missing = sorted(self.needed - arena.keys())
        unknown = sorted(arena.keys() - self.checkpoint.keys())
        if missing or unknown:
            raise WeightSyncError(
                f"the arena has {len(arena)} tensors, the engine reads {len(self.needed)}: missing "
                f"{_shorten(missing)}, unknown {_shorten(unknown)}; nothing was overwritten"
            )
        for name, (dtype, shape) in arena.items():
            expected_dtype, expected = self.checkpoint[name]
            if shape != expected:
                raise WeightSyncError(
                    f"{name}: expected {list(expected)}, the arena has {list(shape)}; "
                    "nothing was overwritten"
                )
            if dtype != expected_dtype and FP8 in (dtype, expected_dtype):
                raise WeightSyncError(
                    f"{name}: expected {expected_dtype}, the arena has {dtype}; nothing was "
                    "overwritten"
                )


def checkpoint_tensors(model_dir: Path) -> Tensors:
    """Every tensor of a Hugging Face checkpoint, from the headers of its files."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [model_dir / file for file in files]
    else:
        paths = sorted(model_dir.glob("*.safetensors"))
    tensors: Tensors = {}
    for path in paths:
        with TensorFile.open(path) as file:
            tensors |= file.tensors
    return tensors


def _shorten(names: list[str]) -> str:
    return f"{names}" if len(names) <= 5 else f"{names[:5]} and {len(names) - 5} more"
