"""The piece list: where in the trainer's memory each part of each full HF tensor lies.

It is written once, by rank 0: Megatron's weights never move.
"""

import math
from contextlib import suppress
from pathlib import Path
from typing import Self

import msgspec

from megatron_cpgd.errors import WeightSyncError
from megatron_cpgd.weights.quantize import Tensors
from megatron_cpgd.weights.shared_storage import SharedStorage
from megatron_cpgd.weights.tensor_file import DTYPES
from megatron_cpgd.weights.tiling import Index, fills

_MAGIC = b"cpgd-pieces "
"""A safetensors file begins with the length of its header, which is a smaller number."""


Ranges = tuple[int | tuple[int, int, int], ...]
"""A place in a tensor: for each dimension a number, or start, stop and step."""


class Copy(msgspec.Struct, frozen=True, array_like=True):
    """Numbers of one trainer rank: a view of one of its storages, in elements."""

    rank: int
    storage: int
    offset: int
    stride: tuple[int, ...]


class Piece(msgspec.Struct, frozen=True, array_like=True):
    """A part of a full HF tensor, and the trainer ranks that hold it."""

    ranges: Ranges
    """Its place in the tensor."""
    copies: tuple[Copy, ...]

    @property
    def place(self) -> Index:
        """Index of the piece in the tensor."""
        return tuple(each if isinstance(each, int) else slice(*each) for each in self.ranges)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the piece: without the dimensions of which it has one number."""
        return tuple(len(range(*each)) for each in self.ranges if not isinstance(each, int))


class InPlaceTensor(msgspec.Struct, frozen=True, kw_only=True):
    """A full HF tensor in pieces."""

    name: str
    dtype: str
    """Of the engine, as safetensors spells it."""
    shape: tuple[int, ...]
    stored_dtype: str
    """Of the trainer."""
    pieces: tuple[Piece, ...]


class TrainerRank(msgspec.Struct, frozen=True, kw_only=True):
    """A trainer process whose memory can be read."""

    gpu: str | None
    """UUID of its GPU."""
    storages: tuple[SharedStorage, ...]


class PieceList(msgspec.Struct, frozen=True, kw_only=True):
    """All tensors of a model, in the order in which an engine loads them."""

    tensors: tuple[InPlaceTensor, ...]
    ranks: dict[int, TrainerRank]
    quantized: bool
    """The engine has linear layers in blocks of FP8 and quantises them itself."""

    @classmethod
    def decode(cls, content: bytes) -> Self:
        """
        Raises:
            WeightSyncError: damaged, or the pieces do not make up the tensors.
        """
        try:
            pieces = msgspec.msgpack.decode(content.removeprefix(_MAGIC), type=cls)
        except msgspec.DecodeError as error:
            raise WeightSyncError(f"damaged piece list: {error}") from error
        pieces.check()
        return pieces

    def encode(self) -> bytes:
        """For a file."""
        return _MAGIC + msgspec.msgpack.encode(self)

    @property
    def full_tensors(self) -> Tensors:
        """Number format and shape of every assembled tensor by HF name, before quantisation."""
        return {each.name: (DTYPES[each.dtype], each.shape) for each in self.tensors}

    def check(self) -> None:
        """Prove that the pieces make up every tensor, each element once, and lie in the storages.

        Raises:
            WeightSyncError: names the first tensor that does not.
        """
        for tensor in self.tensors:
            if not fills([piece.place for piece in tensor.pieces], tensor.shape):
                elements = sum(math.prod(piece.shape) for piece in tensor.pieces)
                raise WeightSyncError(
                    f"{tensor.name}: {len(tensor.pieces)} pieces with {elements} of "
                    f"{math.prod(tensor.shape)} elements do not make up {list(tensor.shape)}"
                )
            itemsize = DTYPES[tensor.stored_dtype].itemsize
            for piece in tensor.pieces:
                for copy in piece.copies:
                    if not self._holds(copy, piece.shape, itemsize):
                        raise WeightSyncError(f"{tensor.name}: {copy} lies outside its storage")

    def _holds(self, copy: Copy, shape: tuple[int, ...], itemsize: int) -> bool:
        storages = self.ranks[copy.rank].storages if copy.rank in self.ranks else ()
        if not 0 <= copy.storage < len(storages) or len(copy.stride) != len(shape):
            return False
        steps = zip(shape, copy.stride, strict=True)
        end = copy.offset + sum((size - 1) * stride for size, stride in steps) + 1
        low = min((copy.offset, *copy.stride))
        return low >= 0 and end * itemsize <= storages[copy.storage].nbytes


def is_piece_list(path: Path) -> bool:
    """Whether the file is a piece list, and not an arena or missing."""
    with suppress(OSError), path.open("rb") as file:
        return file.read(len(_MAGIC)) == _MAGIC
    return False


def ranges_of(place: Index) -> Ranges:
    """An index as data."""
    return tuple(
        each if isinstance(each, int) else (each.start, each.stop, each.step or 1) for each in place
    )
