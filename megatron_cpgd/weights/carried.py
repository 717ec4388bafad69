"""Tensors that an export takes over from the source of the model, because they are not trained.

Layers that predict further tokens come with the embedding and the output layer again, under names
of their own. In the model each is one tensor, so an export gives such a copy the trained values.
"""

import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import torch
from torch import Tensor

from megatron_cpgd.weights.hf_checkpoint import HfCheckpoint
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import TensorFile

Tensors = dict[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True, slots=True)
class CarriedTensors:
    """What of a source goes along; valid while the source is open."""

    source: HfCheckpoint
    names: list[str]
    """Tensors with values of their own."""
    copies: dict[str, str]
    """Name of a tensor -> the trained one that it equals."""

    @classmethod
    def find(cls, source: HfCheckpoint, table: WeightTable) -> Self:
        """Those of a model's files, opened; a copy is one only if its bits are those."""
        names: list[str] = []
        copies: dict[str, str] = {}
        for name in source.names:
            ignored = table.find_ignored(name)
            if ignored is None or not ignored.carried:
                continue
            if ignored.copy_of is not None and source.equal(name, ignored.copy_of):
                copies[name] = ignored.copy_of
            else:
                names.append(name)
        return cls(source, names, copies)

    @classmethod
    def open(cls, path: Path) -> Self:
        """Those of a file that `save` has written.

        Raises:
            ConversionError: missing, cut off or damaged.
        """
        file = TensorFile.open(path)
        copies = json.loads(file.metadata["copies"])
        return cls(HfCheckpoint(path.parent, {}, [file]), file.names, copies)

    def save(self, path: Path) -> str:
        """Write all but the copies into one safetensors file; returns its digest."""
        metadata = {"copies": json.dumps(self.copies)}
        with TensorFile.create(path, self._own(), metadata) as file:
            self.copy_to(file.view)
            file.flush()
            return file.digest()

    def layout(self, trained: Tensors) -> Tensors:
        """Number format and shape of all tensors, given those of the trained ones."""
        return trained | self._own() | {copy: trained[name] for copy, name in self.copies.items()}

    def copy_to(self, view: Callable[[str], Tensor]) -> None:
        """Write all but the copies into the tensors that `view` names, one by one."""
        for name in self.names:
            view(name).copy_(self.source.read(name, ()))

    def _own(self) -> Tensors:
        return {name: (self.source.dtype(name), self.source.shape(name)) for name in self.names}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.source.close()
