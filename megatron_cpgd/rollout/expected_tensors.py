"""Which tensors a weight refresh must bring."""

import json
from pathlib import Path

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights.tensor_file import TensorFile

Shapes = dict[str, tuple[int, ...]]
"""By tensor name, as Hugging Face calls it."""


class ExpectedTensors:
    """The tensors that a complete arena has, known from the checkpoint of the first load.

    vLLM only warns, or not even that, when some are missing, and computes with stale weights or
    uninitialised memory. So the arena is compared before anything is overwritten.
    """

    def __init__(self, checkpoint: Shapes, needed: set[str]) -> None:
        """
        Args:
            checkpoint: shape of every tensor of the checkpoint.
            needed: those that this worker's part of the model reads; a tied output layer, for
                example, may be in the checkpoint and is not needed.
        """
        self.checkpoint = checkpoint
        self.needed = needed

    def check(self, arena: Shapes) -> None:
        """
        Raises:
            WeightSyncError: a needed tensor is missing, or one is unknown or has another shape.
        """
        missing = sorted(self.needed - arena.keys())
        unknown = sorted(arena.keys() - self.checkpoint.keys())
        if missing or unknown:
            raise WeightSyncError(
                f"the arena has {len(arena)} tensors, the engine reads {len(self.needed)}: missing "
                f"{_shorten(missing)}, unknown {_shorten(unknown)}; nothing was overwritten"
            )
        for name, shape in arena.items():
            if shape != self.checkpoint[name]:
                raise WeightSyncError(
                    f"{name}: expected {list(self.checkpoint[name])}, the arena has {list(shape)}; "
                    "nothing was overwritten"
                )


def checkpoint_shapes(model_dir: Path) -> Shapes:
    """Shape of every tensor of a Hugging Face checkpoint, from the headers of its files."""
    index = model_dir / "model.safetensors.index.json"
    if index.exists():
        files = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        paths = [model_dir / file for file in files]
    else:
        paths = sorted(model_dir.glob("*.safetensors"))
    shapes: Shapes = {}
    for path in paths:
        with TensorFile.open(path) as file:
            shapes |= {name: slot.shape for name, slot in file.slots.items()}
    return shapes


def _shorten(names: list[str]) -> str:
    return f"{names}" if len(names) <= 5 else f"{names[:5]} and {len(names) - 5} more"
