"""Proof of what was written of full tensors: every element once, and which bits."""

import math
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from megatron_cpgd.weights.buckets import Piece
from megatron_cpgd.weights.fingerprint import Fingerprints, fingerprint
from megatron_cpgd.weights.quantize import Tensors
from megatron_cpgd.weights.table import raise_problems


class Tally:
    """Counts of one process; those of all processes add up."""

    def __init__(self, tensors: Tensors, device: torch.device) -> None:
        """
        Args:
            tensors: all that is to be written.
            device: of the pieces.
        """
        self._tensors = tensors
        self._index = {name: i for i, name in enumerate(tensors)}
        self.counts = torch.zeros(2, len(tensors), dtype=torch.int64, device=device)
        """[2, tensors] elements that were written, and sums of their bits; to be added over the
        processes."""

    def summed(self, pieces: Iterable[Piece]) -> Iterator[Piece]:
        """The same pieces; each adds its bits when it passes."""
        for name, place, values in pieces:
            i = self._index[name]
            self.counts[1, i] += fingerprint(values, place, self._tensors[name][0])
            yield name, place, values

    def wrote(self, name: str, values: Tensor) -> None:
        """Count the elements of a piece."""
        self.counts[0, self._index[name]] += values.numel()

    def check(self) -> None:
        """See `check_written`; for the counts of all processes."""
        check_written(self._tensors, dict(zip(self._index, self.counts[0].tolist(), strict=True)))

    @property
    def fingerprints(self) -> Fingerprints:
        """Of all tensors; from the counts of all processes."""
        sums = (self.counts[1] % 2**32).tolist()
        return dict(zip(self._index, sums, strict=True))


def check_written(tensors: Tensors, elements: Mapping[str, int]) -> None:
    """Prove that tensors are complete.

    Args:
        elements: that were written, by name.

    Raises:
        ConversionError: names every tensor that was not written once and whole.
    """
    expected = {name: math.prod(shape) for name, (_, shape) in tensors.items()}
    wrong = [
        f"{name}: {elements.get(name, 0)} of {expected.get(name, 0)} elements written"
        for name in expected | dict(elements)
        if elements.get(name, 0) != expected.get(name, 0)
    ]
    raise_problems("incomplete export", wrong)
