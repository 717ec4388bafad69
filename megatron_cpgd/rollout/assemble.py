"""Full tensors that a vLLM worker puts together from pieces in the trainer's memory."""

import os
from itertools import count
from pathlib import Path

import torch
from torch import Tensor

from megatron_cpgd.weights.fingerprint import Fingerprints, fingerprint
from megatron_cpgd.weights.pieces import Copy, InPlaceTensor, Piece, PieceList
from megatron_cpgd.weights.quantize import (
    FP8,
    SCALE_SUFFIX,
    quantize,
    quantized_tensors,
    scale_shape,
)
from megatron_cpgd.weights.shared_storage import gpu_uuid, open_storage
from megatron_cpgd.weights.tensor_file import DTYPES, tensor_bytes


class TrainerMemory:
    """The storages that a piece list names, opened once."""

    def __init__(self, path: Path, device: torch.device) -> None:
        """
        Args:
            path: of the piece list.
            device: of this worker.

        Raises:
            WeightSyncError: the list is damaged or its tensors are not whole, or a trainer process
                cannot be read.
        """
        self._content = path.read_bytes()
        self.pieces = PieceList.decode(self._content)
        self.device = device
        self._gpu = gpu_uuid()
        self._turns = count(os.getpid())  # workers begin with different ranks
        self._storages = {
            rank: [open_storage(storage, device) for storage in trainer.storages]
            for rank, trainer in self.pieces.ranks.items()
        }

    def is_of(self, path: Path) -> bool:
        """Whether this is what the list at `path` describes."""
        return path.read_bytes() == self._content

    def view(self, tensor: InPlaceTensor, piece: Piece) -> Tensor:
        """The piece where it lies: on this GPU if possible, else in turn on all ranks with it.

        It must not be written to: that would change the weights of the trainer.
        """
        copy = self._nearest(piece.copies)
        storage = self._storages[copy.rank][copy.storage]
        part = torch.empty(0, dtype=DTYPES[tensor.stored_dtype], device=storage.device)
        return part.set_(storage, copy.offset, piece.shape, copy.stride)

    def _nearest(self, copies: tuple[Copy, ...]) -> Copy:
        ranks = self.pieces.ranks
        here = [copy for copy in copies if self._gpu and ranks[copy.rank].gpu == self._gpu]
        choice = here or copies
        return choice[next(self._turns) % len(choice)]


class AssembledWeights:
    """The tensors of one refresh, to be asked for in order; read as a TensorFile is."""

    def __init__(self, memory: TrainerMemory) -> None:
        self._memory = memory
        pieces = memory.pieces
        self._full = pieces.full_tensors
        self._by_name = {tensor.name: tensor for tensor in pieces.tensors}
        self._fingerprints: dict[str, Tensor] = {}
        self._scales: dict[str, Tensor] = {}
        self.tensors = quantized_tensors(self._full) if pieces.quantized else self._full
        """Number format and shape by name, as the engine takes them."""
        self.names = list(self.tensors)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor_bytes(*tensor) for tensor in self.tensors.values())

    def view(self, name: str) -> Tensor:
        """The full tensor on the worker's device; the factors of an FP8 weight come after it.

        Where nothing has to be put together it is the trainer's memory itself.
        """
        if name in self._scales:
            return self._scales.pop(name)
        weight = self._assemble(self._by_name[name])
        place = tuple(slice(0, size) for size in weight.shape)
        self._fingerprints[name] = fingerprint(weight, place, weight.dtype)
        if self.tensors[name][0] != FP8:
            return weight
        codes = torch.empty_like(weight, dtype=FP8)
        scales = weight.new_empty(scale_shape(weight.shape), dtype=torch.float32)
        quantize(weight, codes, scales, device=weight.device)
        self._scales[f"{name}{SCALE_SUFFIX}"] = scales
        return codes

    def fingerprints(self) -> Fingerprints:
        """As those of `InPlaceWeights`, of what was read. On return all reads are done."""
        sums = torch.stack([self._fingerprints[name] for name in self._full]).long() % 2**32
        return dict(zip(self._full, sums.tolist(), strict=True))

    def _assemble(self, tensor: InPlaceTensor) -> Tensor:
        memory, pieces = self._memory, tensor.pieces
        if len(pieces) == 1 and tensor.dtype == tensor.stored_dtype:
            return memory.view(tensor, pieces[0]).to(memory.device)
        whole = torch.empty(tensor.shape, dtype=DTYPES[tensor.dtype], device=memory.device)
        for piece in pieces:
            whole[piece.place].copy_(memory.view(tensor, piece))
        return whole
