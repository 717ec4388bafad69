"""The engine reads the trainer's weights where they lie: nothing is copied, nothing doubled.

Megatron keeps its parameters in a few buffers whose addresses never change
(megatron/core/distributed/param_and_grad_buffer.py). Once, at the start, the ranks of rank 0's host
let other processes read these buffers, and rank 0 writes down where each part of each full HF
tensor lies. A refresh is then a message: vLLM's workers put the tensors together themselves.
"""

import os
from collections.abc import Iterable, Iterator
from itertools import count
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_cpgd.errors import ConfigError, WeightSyncError
from megatron_cpgd.weight_sync.sync import Sent
from megatron_cpgd.weights.engine_format import EngineFormat
from megatron_cpgd.weights.fingerprint import Fingerprints, fingerprint
from megatron_cpgd.weights.pieces import (
    Copy,
    InPlaceTensor,
    Piece,
    PieceList,
    Ranges,
    TrainerRank,
    ranges_of,
)
from megatron_cpgd.weights.quantize import Tensors
from megatron_cpgd.weights.shared_storage import free_shared_bytes, gpu_uuid, share_storage
from megatron_cpgd.weights.table import WeightTable
from megatron_cpgd.weights.tensor_file import DTYPE_NAMES
from megatron_cpgd.weights.tiling import Index


class PieceSource(Protocol):
    """The part of a policy that is shared."""

    def iter_pieces(self) -> Iterator[tuple[str, Index, Tensor]]:
        """Every part of a full HF tensor that this rank holds: name, place, view of the weight."""

    def release(self) -> None:
        """Leave the GPUs to the engines, weights aside, and wait for the others."""


_Views = dict[tuple[str, Ranges], Tensor]
"""The pieces of this rank by HF name and place in the tensor."""
_Held = dict[tuple[str, Ranges], tuple[Copy, str]]
"""Where the pieces of a rank are, and their number formats."""


class InPlaceWeights:
    """A WeightRoute: the weights as they are at any time, for the engines of rank 0's host."""

    def __init__(
        self, policy: PieceSource, table: WeightTable, format: EngineFormat,
        *, beside_rank_0: bool,
    ) -> None:  # fmt: skip
        """Share this rank's weights. Collective over the world.

        Args:
            policy: its weights stay in their storages from now on.
            format: of the engine's weights.
            beside_rank_0: whether this rank shares the host of rank 0, where the engines are.

        Raises:
            ConfigError: on every rank, those of rank 0's host do not hold the whole model, or their
                shared memory is too small for it.
        """
        self._tensors = table.hf_tensors(torch.float32 if format == "fp32" else torch.bfloat16)
        own: _Views = {}
        if beside_rank_0:
            own = {(name, ranges_of(place)): view for name, place, view in policy.iter_pieces()}
        _check_room(own)
        gathered: list[tuple[TrainerRank, _Held] | None] = [None] * dist.get_world_size()
        dist.all_gather_object(gathered, _share(own) if beside_rank_0 else None)
        near = {rank: shared for rank, shared in enumerate(gathered) if shared is not None}
        pieces = PieceList(
            tensors=_in_pieces(self._tensors, [held for _, held in near.values()]),
            ranks={rank: trainer for rank, (trainer, _) in near.items()},
            quantized=format == "fp8_block",
        )
        try:
            pieces.check()
        except WeightSyncError as error:
            raise ConfigError(
                "rollout.sync=in_place: the trainer's ranks on the host of rank 0 do not hold the "
                "whole model; choose parallel.* so that they do, or rollout.sync=arena "
                f"({error})"
            ) from None
        self._policy = policy
        self._own_share = _own_share(pieces)
        # Like the weights it has no name on disk, so a killed run leaves nothing behind.
        self._file = os.memfd_create("megatron_cpgd_pieces") if dist.get_rank() == 0 else None
        if self._file is not None:
            with open(self._file, "wb", closefd=False) as file:
                file.write(pieces.encode())

    @property
    def path(self) -> Path:
        """Of the piece list, on rank 0."""
        assert self._file is not None
        return Path(f"/proc/{os.getpid()}/fd/{self._file}")

    def send(self, version: int, *, report: bool) -> Sent | None:
        """See WeightRoute.send: the weights are summed up, nothing is moved."""
        sums = self.fingerprints()
        self._policy.release()
        return Sent(self.path, self._tensors, sums) if report else None

    @torch.no_grad()
    def fingerprints(self) -> Fingerprints:
        """Of the weights in the engine's format, before quantisation. Collective over the world.

        On return every rank has finished its changes of the weights.
        """
        formats = [dtype for dtype, _ in self._tensors.values()]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        sums = torch.zeros(len(formats), dtype=torch.int64, device=device)
        # Those that the policy has now: a weight that has moved away shows as a difference.
        for name, place, view in self._policy.iter_pieces():
            i = self._own_share.get((name, ranges_of(place)))
            if i is not None:
                sums[i] += fingerprint(view, place, formats[i])
        dist.all_reduce(sums)
        return dict(zip(self._tensors, (sums % 2**32).tolist(), strict=True))

    def close(self) -> None:
        """Remove the piece list; the weights stay readable as long as they exist."""
        if self._file is not None:
            os.close(self._file)


def _storages(own: _Views) -> dict[int, torch.UntypedStorage]:
    """Those of the views, each once, by their addresses."""
    storages = (view.untyped_storage() for view in own.values())
    return {storage.data_ptr(): storage for storage in storages}


def _check_room(own: _Views) -> None:
    """Collective over the world."""
    storages = _storages(own).values()
    need = sum(each.nbytes() for each in storages if each.device.type == "cpu")
    needs, room = [0] * dist.get_world_size(), [free_shared_bytes()]
    dist.all_gather_object(needs, need)
    dist.broadcast_object_list(room)
    if sum(needs) > room[0]:
        raise ConfigError(
            "rollout.sync=in_place: the weights of all trainer ranks of this host take "
            f"{sum(needs) / 1e9:.2f} GB of /dev/shm, which has {room[0] / 1e9:.2f} GB left; make "
            "it larger"
        )


def _share(own: _Views) -> tuple[TrainerRank, _Held]:
    """Share the storages of the views; returns where the views are in them."""
    storages = _storages(own)
    number = {address: i for i, address in enumerate(storages)}
    held = {}
    for key, view in own.items():
        storage = number[view.untyped_storage().data_ptr()]
        copy = Copy(dist.get_rank(), storage, int(view.storage_offset()), view.stride())
        held[key] = copy, DTYPE_NAMES[view.dtype]
    # The last step: on CPU it changes the addresses.
    shared = tuple(share_storage(storage) for storage in storages.values())
    return TrainerRank(gpu=gpu_uuid(), storages=shared), held


def _in_pieces(tensors: Tensors, ranks: Iterable[_Held]) -> tuple[InPlaceTensor, ...]:
    """Every full tensor in the pieces that the ranks hold."""
    copies: dict[str, dict[Ranges, list[Copy]]] = {name: {} for name in tensors}
    stored: dict[str, str] = {}
    for held in ranks:
        for (name, ranges), (copy, dtype) in held.items():
            copies[name].setdefault(ranges, []).append(copy)
            stored[name] = dtype
    return tuple(
        InPlaceTensor(
            name=name,
            dtype=DTYPE_NAMES[dtype],
            shape=shape,
            stored_dtype=stored.get(name, DTYPE_NAMES[dtype]),
            pieces=tuple(Piece(ranges, tuple(held)) for ranges, held in copies[name].items()),
        )
        for name, (dtype, shape) in tensors.items()
    )


def _own_share(pieces: PieceList) -> dict[tuple[str, Ranges], int]:
    """The pieces that this rank sums up, with the numbers of their tensors."""
    share = {}
    turns = count()
    for i, tensor in enumerate(pieces.tensors):
        for piece in tensor.pieces:
            copy = piece.copies[next(turns) % len(piece.copies)]  # one of the ranks that hold it
            if copy.rank == dist.get_rank():
                share[tensor.name, piece.ranges] = i
    return share
